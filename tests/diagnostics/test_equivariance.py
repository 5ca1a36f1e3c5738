"""Lie derivatives are those of images that really move; what cannot move a network gives 0."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import models, recipe
from distill.data import datasets
from distill.diagnostics.equivariance import (
    Edge,
    Kind,
    LieDerivative,
    consistency,
    lie_derivative,
    tangent,
)
from distill.models.network import Network
from distill.types import Outputs
from tests.models import made

KINDS: tuple[Kind, ...] = get_args(Kind)
EDGES: tuple[Edge, ...] = get_args(Edge)
SMALL = {
    "classes": tuple("abcde"),
    "image_size": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
VIT = {"model": "vit", "width": 24, "depth": 2, "heads": 2, "patch_size": 4}


def images(height: int, width: int | None = None, count: int = 3) -> Tensor:
    shape = (count, 3, height, width or height)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def student(**keys: Any) -> Network:
    torch.manual_seed(0)
    built = models.build_student(recipe.Model(**keys), **SMALL)
    for module in built.modules():  # a classifier that begins at zero answers always the same
        if isinstance(module, nn.Linear) and module.out_features == 5:
            nn.init.normal_(module.weight, std=0.3)
    return built.eval()


class Plain(nn.Module):
    """Two convolutions and the mean of what they find."""

    def __init__(
        self,
        padding: str = "circular",
        *,
        bend: nn.Module | None = None,
        stride: int = 1,
        patch: int = 0,
    ) -> None:
        super().__init__()
        near: dict[str, Any] = {"padding": 1, "padding_mode": padding}
        self.first = (
            nn.Conv2d(3, 16, patch, patch) if patch else nn.Conv2d(3, 16, 3, stride, **near)
        )
        self.second = nn.Conv2d(16, 32, 3, **near)
        self.bend = bend or nn.ReLU()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Outputs:
        x = self.bend(self.second(self.bend(self.first((x - 0.5) / 0.25))))
        return Outputs(self.head(x.mean(dim=(2, 3))))


class Reader(nn.Module):
    """Answers with some function of the image."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.function(x))


def moved(x: Tensor, kind: Kind, t: float, edge: Edge) -> Tensor:
    """The trigonometric polynomial through the pixels of x, moved by t: every pixel looked up."""
    height, width = x.shape[-2:]
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij"
    )
    v, u = rows - (height - 1) / 2, columns - (width - 1) / 2
    angle, factor = math.radians(t), 1 + t / 100
    if kind == "translate_x":
        u = u - t
    elif kind == "translate_y":
        v = v - t
    elif kind == "rotate":
        u, v = (
            math.cos(angle) * u + math.sin(angle) * v,
            math.cos(angle) * v - math.sin(angle) * u,
        )
    elif kind == "scale":
        u, v = u / factor, v / factor
    else:
        u = u - math.tan(angle) * v
    if edge == "reflect":
        x = F.pad(x, (0, width - 2, 0, height - 2), mode="reflect")
    waves = []
    for at, n in ((v + (height - 1) / 2, x.shape[-2]), (u + (width - 1) / 2, x.shape[-1])):
        k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        k = k * (k.abs() * 2 != n)  # without Nyquist: there the wave stands still
        waves.append(torch.exp(2j * math.pi * at[..., None] * k / n))
    return torch.einsum("bckl,hwk,hwl->bchw", torch.fft.fft2(x), *waves).real / x[0, 0].numel()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tangent_is_the_start_of_the_movement(kind: Kind, edge: Edge) -> None:
    x, h = moved(images(9, 12), kind, 0.0, edge), 1e-4
    expected = (moved(x, kind, h, edge) - moved(x, kind, -h, edge)) / (2 * h)
    found = tangent(x, kind, edge=edge)
    assert (found - expected).abs().max() <= 1e-7 * expected.abs().max()
    assert found.is_contiguous()
    single = tangent(x.float(), kind, edge=edge)
    assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [15, 16])
def test_a_wave_has_the_slope_of_a_wave(size: int) -> None:
    at = torch.arange(size, dtype=torch.float64)
    for edge, radians in (("wrap", 2 * math.pi * 3 / size), ("reflect", math.pi * 3 / (size - 1))):
        wave, slope = (
            torch.cos(radians * at),
            radians * torch.sin(radians * at),
        )  # of cos(r (u − t))
        across = wave.expand(1, 1, 7, size)
        right = tangent(across, "translate_x", edge=edge)
        down = tangent(across.mT, "translate_y", edge=edge)
        assert (right - slope).abs().max() <= 1e-12
        assert torch.equal(down, right.mT)
        assert tangent(across, "translate_y", edge=edge).abs().max() <= 1e-12


def test_the_fastest_wave_stands_still() -> None:
    """A wave of two pixels is at its extremes in all of them, wherever it is moved."""
    wave = torch.tensor([1.0, -1.0]).repeat(6)[None, None, None]
    for edge, x in (("wrap", wave), ("reflect", wave[..., :11])):
        assert tangent(x, "translate_x", edge=edge).abs().max() <= 1e-6


def test_what_is_round_is_turned_into_itself() -> None:
    at = torch.arange(41, dtype=torch.float64) - 20
    square = at**2 + at[:, None] ** 2
    blob = torch.exp(-square / 18)[None, None]
    assert tangent(blob, "rotate").abs().max() <= 1e-9
    assert tangent(blob.roll(4, -1), "rotate").abs().max() >= 1e-2
    grown = tangent(blob, "scale")
    assert (grown - 0.01 * square / 9 * blob).abs().max() <= 1e-7


def test_borders_of_one_and_two_pixels() -> None:
    for shape in ((1, 1), (1, 5), (2, 2)):
        x = torch.rand(1, 3, *shape)
        for kind in KINDS:
            assert tangent(x, kind).isfinite().all()
    assert not tangent(torch.rand(1, 3, 1, 1), "translate_x").any()


@pytest.fixture(scope="module")
def digits() -> Tensor:
    pixels = datasets.load(recipe.Data(name="digits", image_size=32)).test.pixels
    assert pixels is not None
    return torch.from_numpy(pixels[:32]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255.0


def test_what_breaks_equivariance_in_networks(digits: Tensor) -> None:
    """Nothing does in a circular linear one; then bends, borders, strides and patches do."""
    errors = []
    for keys in (
        {"bend": nn.Identity()},
        {},
        {"padding": "zeros"},
        {"stride": 2},
        {"patch": 4},
    ):
        torch.manual_seed(0)
        network = Plain(**keys).double().eval()
        found = lie_derivative(network, digits.double(), "translate_x", edge="wrap")
        assert found.method == "jvp"
        errors.append(float(found.error.square().mean().sqrt()))
    assert errors[0] <= 1e-16
    assert errors[1:] == sorted(errors[1:])
    assert errors[1] >= 1e8 * errors[0]
    assert 3 <= errors[4] / errors[1] <= 30  # 6.6 on photographs and logits
    assert errors[4] <= 1e-3


def expected_derivative(network: nn.Module, x: Tensor, kind: Kind, edge: Edge, h: float) -> Tensor:
    def answer(t: float) -> Tensor:
        return network(moved(x, kind, t, edge)).logits.softmax(dim=-1)

    with torch.no_grad():
        return (answer(h) - answer(-h)) / (2 * h)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_images_that_really_move(kind: Kind, edge: Edge) -> None:
    x = moved(images(16), kind, 0.0, edge)
    torch.manual_seed(0)
    for network in (student(**VIT).double(), Plain("zeros", bend=nn.GELU()).double()):
        change = expected_derivative(network, x, kind, edge, 1e-5)
        found = lie_derivative(network, x, kind, edge=edge)
        error = change.square().mean(dim=1).sqrt()
        assert found.method == "jvp"
        assert (found.error - error).abs().max() <= 1e-7 * error.max()
        with torch.no_grad():
            p = network(x).logits.softmax(dim=-1)
        spread = float((p - p.mean(dim=0)).square().mean().sqrt())
        assert torch.allclose(found.relative, error / spread, rtol=1e-6)


def test_the_published_units() -> None:
    """Half images, radians, and the size: of images whose sides differ."""
    x, network = moved(images(9, 13), "scale", 0.0, "reflect"), Plain(bend=nn.GELU()).double()
    units = {
        "translate_x": 6.0,
        "translate_y": 4.0,
        "rotate": math.degrees(1),
        "scale": 100.0,
        "shear": math.degrees(1),
    }
    assert set(units) == set(KINDS)
    for kind in KINDS:
        found = lie_derivative(network, x, kind)
        change = expected_derivative(network, x, kind, "reflect", 1e-5)
        expected = change.abs().mean(dim=1) * units[kind]
        assert torch.allclose(found.official, expected, rtol=1e-6), kind


def sampled(x: Tensor) -> Tensor:
    """An operation that has no forward-mode derivative, and changes nothing."""
    same = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), x.shape, False)
    return F.grid_sample(x, same, align_corners=False)


class Sampling(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Outputs:
        found: Outputs = self.inner(sampled(x))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_where_there_is_no_derivative(dtype: torch.dtype) -> None:
    network, x = student(**VIT).to(dtype), images(16).to(dtype)
    for kind in KINDS:
        exact = lie_derivative(network, x, kind)
        found = lie_derivative(Sampling(network), x, kind)
        assert (exact.method, found.method) == ("jvp", "differences")
        assert (found.error - exact.error).abs().max() <= 5e-3 * exact.error.max()
        assert torch.allclose(found.relative, exact.relative, rtol=1e-2)


def test_a_fault_of_the_network_is_no_missing_derivative() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        lie_derivative(Reader(fails), images(8), "rotate")

    def exhausted(x: Tensor) -> Tensor:
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    calls: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        lie_derivative(Reader(exhausted), images(8), "rotate")
    assert len(calls) == 1


def test_who_does_not_look_is_not_moved() -> None:
    constant = Reader(lambda x: 0 * x.mean(dim=(2, 3)) + torch.tensor([1.0, 2.0, 3.0]))
    for kind in KINDS:
        found = lie_derivative(constant, images(8), kind)
        assert not torch.stack([found.error, found.relative, found.official]).any()
    one = lie_derivative(Plain().double().eval(), images(8, count=1), "rotate")
    assert one.relative.isinf().all()
    assert one.error.isfinite().all()


FAMILIES = (
    "timm/vit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_atto",
    "timm/levit_128s",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "torchvision/resnet18",
)


@pytest.mark.parametrize("model", FAMILIES)
def test_families(model: str) -> None:
    network = made.shared(model)
    x = made.images()
    found = lie_derivative(network, x, "translate_x")
    assert found.method == "jvp"
    assert found.error.shape == (2,)
    assert found.error.isfinite().all()
    assert (found.error > 0).all()
    kept = consistency(network, x, shifts=[0, 3])
    assert kept.shape == (2, 2, 2)
    assert kept[..., 0].all()


def test_attention_that_a_fused_kernel_would_compute() -> None:
    """PyTorch's own multi-head attention has a kernel of its own for inference."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
    tokens = Reader(lambda x: layer(x.flatten(2).mT @ torch.ones(3, 16).double()).mean(dim=1))
    assert lie_derivative(tokens.eval(), images(4), "rotate").method == "jvp"
    assert torch.backends.mha.get_fastpath_enabled()


def state(network: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: t.clone() for name, t in network.named_buffers()}
    for name, parameter in network.named_parameters():
        found[name] = parameter.detach().clone()
        found[f"{name} learns"] = parameter.requires_grad
    for name, module in network.named_modules():
        found[f"{name} is"] = [module.training, len(module._forward_hooks)]
    return found


def test_nothing_is_changed_by_the_asking() -> None:
    for network in (student(**VIT), student(model="resnet8")):
        before = state(network)
        x = images(16).float()
        given = x.clone()
        for found in (lie_derivative(network, x, "scale"), lie_derivative(network, x, "scale")):
            assert not found.error.requires_grad
        consistency(network, x, shifts=[1])
        torch.testing.assert_close(state(network), before, rtol=0, atol=0)
        assert torch.equal(x, given)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert network(x).logits.requires_grad  # and it can be trained as before


def values(found: LieDerivative) -> Tensor:
    return torch.stack([found.error, found.relative, found.official])


def test_neither_batches_nor_autocast_matter() -> None:
    network, x = student(**VIT), images(16, count=7).float()
    whole = lie_derivative(network, x, "rotate")
    for size in (1, 3):
        part = lie_derivative(network, x, "rotate", batch_size=size)
        assert torch.allclose(values(part), values(whole), rtol=1e-4)
        kept = consistency(network, x, batch_size=size)
        assert torch.equal(kept, consistency(network, x))
    with torch.autocast("cpu", torch.bfloat16):
        again = lie_derivative(network, x, "rotate")
        kept = consistency(network, x)
    assert torch.equal(values(again), values(whole))
    assert torch.equal(kept, consistency(network, x))


def test_shifts_are_those_of_padded_and_rolled_images() -> None:
    """Of a network that answers with where it is brightest among some pixels."""
    network, x = Reader(lambda x: x[:, 0, 5:8, 9:11].flatten(1)), images(16, count=8)

    def predicted(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x).logits.argmax(dim=1)

    for axis, dim in ((0, 3), (1, 2)):
        sides = {3: (7, 7, 0, 0), 2: (0, 0, 7, 7)}[dim]
        padded = F.pad(x, sides, mode="reflect")
        for edge in EDGES:
            found = consistency(network, x, shifts=range(-7, 8), edge=edge)
            assert found.shape == (8, 2, 15)
            for d in range(-7, 8):
                moved_by_d = x.roll(d, dim) if edge == "wrap" else padded.narrow(dim, 7 - d, 16)
                expected = predicted(moved_by_d) == predicted(x)
                assert torch.equal(found[:, axis, d + 7], expected)
            assert 0 < found.float().mean() < 1


def test_circular_convolutions_are_consistent_under_rolls() -> None:
    torch.manual_seed(0)
    network, x = Plain().double().eval(), images(12, count=16)
    assert consistency(network, x, edge="wrap").all()
    assert consistency(network, x).shape == (16, 2, 7)

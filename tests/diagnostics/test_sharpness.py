"""Curvature against whole Hessians and quadratics; steps against what they cost by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.diagnostics import UndefinedError
from distill.diagnostics.sharpness import curvature, perturbation, sam, trace
from distill.diagnostics.tapped import forgetful
from distill.models.network import Network
from distill.types import Outputs
from tests.diagnostics.test_equivariance import VIT, images, state, student
from tests.models import made
from tests.models.conftest import tied

SWIN = {**VIT, "depth": [1, 1], "attention": "window", "window": 2, "pool": "mean"}
IMAGE = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
PLAIN = torch.tensor([[1.0, -1.0]])  # the NLL of logits (0, q) with these labels is q


class Says(nn.Module):
    """Logits (0, q(w)) of every image: what is asked about is the function q of the weights."""

    def __init__(self, weights: Tensor, q: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        half = len(weights) // 2
        self.first, self.second = (nn.Parameter(w) for w in (weights[:half], weights[half:]))
        self.q = q

    def forward(self, x: Tensor) -> Outputs:
        value = self.q(torch.cat([self.first, self.second]))
        return Outputs(torch.stack([0 * value, value]).expand(len(x), 2))


def quadratic(eigenvalues: Tensor) -> Says:
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(n, n, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(draw)
    matrix = basis * eigenvalues @ basis.T
    return Says(draw[0], lambda w: w @ matrix @ w / 2)


def test_a_quadratic_has_the_eigenvalues_that_it_has() -> None:
    spectrum = torch.tensor([-3.0, -1, 0, 0.5, 2, 7, 8], dtype=torch.float64)
    network = quadratic(spectrum)
    found = curvature(network, IMAGE, PLAIN)
    torch.testing.assert_close(found.values, spectrum, rtol=1e-9, atol=1e-9)
    assert (found.smallest, found.largest) == pytest.approx((-3, 8))
    assert float(found.shares.sum()) == pytest.approx(1)
    decayed = curvature(network, IMAGE, PLAIN, weight_decay=0.25)
    torch.testing.assert_close(decayed.values, spectrum + 0.25, rtol=1e-9, atol=1e-9)
    few = curvature(network, IMAGE, PLAIN, steps=3)
    assert len(few.values) == 3
    assert -3 <= few.smallest <= few.largest <= 8


def test_repeated_eigenvalues_are_one_and_their_share_is_that_of_the_weights() -> None:
    kinds, counts = torch.tensor([-1.0, 0, 4], dtype=torch.float64), torch.tensor([100, 200, 100])
    network = quadratic(kinds.repeat_interleave(counts))
    several, shares = [curvature(network, IMAGE, PLAIN, seed=seed) for seed in range(20)], []
    for found in several:
        assert (found.smallest, found.largest) == pytest.approx((-1, 4))
        near = (found.values[:, None] - kinds).abs() < 1e-6
        shares.append(found.shares @ near.double())
        assert float(shares[-1].sum()) == pytest.approx(1)
    assert (torch.stack(shares) - counts / 400).abs().max() < 0.1
    assert (torch.stack(shares).mean(dim=0) - counts / 400).abs().max() < 0.02
    assert sum(one.negative for one in several) / 20 == pytest.approx(100 / 500, abs=0.02)


def test_a_flat_and_a_linear_loss_have_no_curvature() -> None:
    weights = torch.ones(6, dtype=torch.float64)
    for q in (lambda w: 3 * w.sum(), lambda w: 0 * w.sum()):
        found = curvature(Says(weights, q), IMAGE, PLAIN)
        assert found[:3] == (0, 0, 0)
        assert not trace(Says(weights, q), IMAGE, PLAIN).any()
    decayed = curvature(Says(weights, q), IMAGE, PLAIN, weight_decay=0.5)
    assert decayed[:3] == pytest.approx((0.5, 0.5, 0))


class Answers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), *layers).double()

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(3 * self.layers(x))


def small() -> Answers:
    """A smooth network of 67 weights."""
    torch.manual_seed(0)
    return Answers(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))


CLASSES = torch.arange(10) % 3
MIXED = torch.softmax(torch.arange(30.0).reshape(10, 3) % 7, dim=1)


def hessian(network: nn.Module, x: Tensor, labels: Tensor, decay: float) -> Tensor:
    """All of it, of the loss as it is defined."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}

    def loss(weights: Tensor) -> Tensor:
        pieces = torch.split(weights, [shape.numel() for shape in shapes.values()])
        own = {n: w.view(s) for (n, s), w in zip(shapes.items(), pieces, strict=True)}
        log_p = functional_call(network, own, (x,)).logits.log_softmax(dim=1)
        told = F.one_hot(labels, 3) if labels.ndim == 1 else labels.double()
        return -(told * log_p).sum(dim=1).mean() + decay / 2 * weights.square().sum()

    flat = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    whole: Tensor = torch.autograd.functional.hessian(loss, flat)
    return whole


@pytest.mark.parametrize(("labels", "decay"), [(CLASSES, 0.0), (MIXED, 0.01)])
def test_against_the_whole_hessian(labels: Tensor, decay: float) -> None:
    network, x = small(), images(2, count=10)
    whole = hessian(network, x, labels, decay)
    spectrum = torch.linalg.eigvalsh(whole)
    all_of_them = curvature(network, x, labels, weight_decay=decay, steps=1000, batch_size=4)
    assert all_of_them.largest == pytest.approx(float(spectrum[-1]), rel=1e-9)
    assert all_of_them.smallest == pytest.approx(float(spectrum[0]), rel=1e-9)
    few = curvature(network, x, labels, weight_decay=decay)
    assert len(few.values) == 20
    assert few.largest == pytest.approx(float(spectrum[-1]), rel=1e-3)
    assert spectrum[0] - 1e-12 <= few.smallest <= 0.5 * spectrum[0]

    probes = trace(network, x, labels, weight_decay=decay, probes=400, batch_size=4)
    error = float(probes.std()) / 20
    assert float(probes.mean()) == pytest.approx(float(whole.trace()), abs=3 * error)
    spread = 2 * (whole.square().sum() - whole.diag().square().sum())
    assert error == pytest.approx(float(spread.sqrt()) / 20, rel=0.15)

    for seed in range(3):  # by eigenvalues and the first vector's parts along their vectors
        start = torch.randn(len(whole), generator=torch.Generator().manual_seed(seed)).double()
        values, vectors = torch.linalg.eigh(whole)
        parts = (start @ vectors).square()
        negative = parts @ (-values).clamp_min(0) / (parts @ values.abs())
        found = curvature(network, x, labels, weight_decay=decay, steps=1000, seed=seed)
        assert found.negative == pytest.approx(float(negative), rel=1e-6)
        assert 0.05 < negative < 0.6


def test_probes_of_a_diagonal_hessian_are_exact() -> None:
    scale = torch.arange(1, 9).double()
    network = Says(torch.ones(8, dtype=torch.float64), lambda w: scale @ w**3 / 6)
    assert torch.allclose(trace(network, IMAGE, PLAIN, probes=3), scale.sum())
    assert torch.allclose(trace(network, IMAGE, PLAIN, weight_decay=0.5), scale.sum() + 4)


def test_the_worst_step_on_a_slope_and_in_a_bowl() -> None:
    slope = torch.tensor([3.0, 0, 0, -4], dtype=torch.float64)
    linear = Says(torch.ones(4, dtype=torch.float64), lambda w: slope @ w)
    assert sam(linear, IMAGE, PLAIN) == pytest.approx(0.05 * 5)
    assert sam(linear, IMAGE, PLAIN, radius=2) == pytest.approx(10)
    flat = Says(2 * torch.ones(4, dtype=torch.float64), lambda w: 0 * w.sum())
    assert sam(flat, IMAGE, PLAIN) == 0
    bowl = sam(flat, IMAGE, PLAIN, weight_decay=0.1, radius=0.5)
    assert bowl == pytest.approx(0.1 / 2 * (4.5**2 - 4**2))


def test_the_worst_step_of_a_network() -> None:
    network, x = small(), images(2, count=10)
    before = F.cross_entropy(network(x).logits, CLASSES)
    slope = torch.autograd.grad(before, list(network.parameters()))
    size = torch.stack([g.square().sum() for g in slope]).sum().sqrt()
    stepped = small()
    with torch.no_grad():
        for parameter, g in zip(stepped.parameters(), slope, strict=True):
            parameter += 0.05 * g / size
        expected = F.cross_entropy(stepped(x).logits, CLASSES) - before
    assert sam(network, x, CLASSES, batch_size=3) == pytest.approx(float(expected), rel=1e-9)
    assert expected > 0.9 * 0.05 * size


def test_noise_on_a_slope_and_in_a_bowl() -> None:
    weights = torch.tensor([1.0, -2, 0, 5], dtype=torch.float64)
    slope = torch.tensor([3.0, 1, 9, -1], dtype=torch.float64)
    on_slope = perturbation(Says(weights, lambda w: slope @ w), IMAGE, PLAIN, draws=2000)
    size = 0.02 * float((slope * weights).norm())  # the weight at 0 has no noise
    assert float(on_slope.std()) == pytest.approx(size, rel=0.06)
    assert abs(float(on_slope.mean())) < 4 * size / math.sqrt(2000)
    bowl = perturbation(Says(weights, lambda w: 5 * w @ w), IMAGE, PLAIN, draws=2000, scale=0.1)
    expected = 5 * 0.1**2 * 30
    assert float(bowl.mean()) == pytest.approx(expected, abs=4 * float(bowl.std()) / 44)
    flat = Says(weights, lambda w: 0 * w.sum())
    assert torch.allclose(
        perturbation(flat, IMAGE, PLAIN, weight_decay=10, draws=2000, scale=0.1), bowl
    )


def test_noise_costs_the_same_however_layers_are_scaled() -> None:
    x = images(2, count=10)
    network = Answers(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    before, bends = perturbation(network, x, CLASSES), curvature(network, x, CLASSES).largest
    with torch.no_grad():
        for parameter in network.layers[1].parameters():
            parameter *= 50
        network.layers[3].weight /= 50
    torch.testing.assert_close(perturbation(network, x, CLASSES), before)
    assert before.abs().min() > 0
    assert curvature(network, x, CLASSES).largest > 10 * bends


# With the first derivative PyTorch compiles some of its own, in a way it deprecates.
forward_mode = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script:FutureWarning")


def check(network: Network, size: tuple[int, int]) -> None:
    """A probe against forward mode, and everything finite in single precision."""
    x, labels = made.images(size, 3), torch.tensor([0, 3, 4])
    exact = copy.deepcopy(network).double()
    weights = dict(exact.named_parameters())
    count = sum(parameter.numel() for parameter in weights.values())
    signs = torch.empty(count).bernoulli_(generator=torch.Generator().manual_seed(0)) * 2 - 1
    pieces = torch.split(signs.double(), [parameter.numel() for parameter in weights.values()])
    probe = {n: v.view_as(w) for (n, w), v in zip(weights.items(), pieces, strict=True)}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(
            functional_call(forgetful(exact), weights, x.double()).logits, labels
        )

    with sdpa_kernel(SDPBackend.MATH):
        _, change = torch.func.jvp(torch.func.grad(loss), (weights,), (probe,))
    expected = float(sum((change[name] * v).detach().sum() for name, v in probe.items()))
    found = trace(forgetful(exact), x.double(), labels, probes=1, batch_size=2)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    bends = curvature(network, x, labels, steps=3)
    assert bends.smallest < bends.largest
    assert 0 <= bends.negative <= 1
    assert sam(network, x, labels) > 0
    assert perturbation(network, x, labels, draws=2).isfinite().all()


@forward_mode
@pytest.mark.parametrize("keys", [VIT, SWIN, {"model": "resnet8"}])
def test_own_networks(keys: dict[str, Any]) -> None:
    check(student(**keys), (16, 16))


@forward_mode
@pytest.mark.soak
@pytest.mark.parametrize("model", [
    "timm/resnet10t", "timm/convnext_atto", "timm/efficientnet_lite0", "timm/regnetx_002",
    "timm/densenet121", "timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224",
    "timm/beit_base_patch16_224", "timm/cait_xxs24_224", "timm/convit_tiny", "timm/pit_ti_224",
    "timm/levit_128s", "timm/pvt_v2_b0", "timm/twins_svt_small", "timm/mixer_s32_224",
    "timm/swin_tiny_patch4_window7_224", "timm/swinv2_tiny_window8_256", "timm/davit_tiny",
    "timm/maxvit_tiny_tf_224", "timm/coatnet_0_rw_224", "timm/xcit_nano_12_p16_224",
    "torchvision/swin_t", "torchvision/vit_b_16", "torchvision/convnext_tiny",
    "torchvision/mobilenet_v2",
])  # fmt: skip
def test_families(model: str) -> None:
    check(made.network(model), made.SQUARE)


class Keeps(nn.Module):
    """Keeps what follows from its weights alone, as LeViT's attention does in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1, 2], dtype=torch.float64))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Keeps:
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Outputs:
        self.kept.setdefault("logits", self.weight**3)
        return Outputs(self.kept["logits"].expand(len(x), 3))


def test_what_layers_keep_of_their_weights_is_not_used() -> None:
    network = Keeps().eval()
    with torch.no_grad():
        kept = network(images(2)).logits
        old = network.kept["logits"]
    whole = hessian(Keeps(), images(2), torch.arange(3), 0.0)
    found = curvature(network, images(2), torch.arange(3), batch_size=2)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(whole)[-1]))
    assert (perturbation(network, images(2), torch.arange(3)) != 0).all()
    assert network.kept["logits"] is old
    assert torch.equal(network(images(2)).logits, kept)


def test_single_images_whose_tokens_follow_a_normalisation() -> None:
    """PyTorch takes their gradient for one that lies in memory as images do."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 4, 3, 2, 1), norm)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Outputs:
            tokens = self.stem(x).flatten(2).transpose(1, 2) + torch.ones(1, 4, 4)
            return Outputs(self.head(F.layer_norm(tokens, (4,))).square().mean(dim=1))

    network, x = Tokens().double().eval(), images(8)
    expected = float(hessian(network, x, torch.arange(3), 0.0).trace())
    for size in (1, 2, 3):
        found = trace(network, x, torch.arange(3), probes=50, batch_size=size)
        assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / 7)
        assert torch.allclose(found, trace(network, x, torch.arange(3), probes=50))


@forward_mode
def test_weights_of_two_names_are_one() -> None:
    network = made.wrapped(tied(5, 16), "tied", (16, 16)).eval()
    check(network, (16, 16))
    x, labels = made.images((16, 16), 3), torch.tensor([0, 3, 4])
    plain, decayed = (trace(network, x, labels, weight_decay=decay) for decay in (0.0, 1.0))
    assert torch.allclose(decayed - plain, torch.tensor(9 + 4 * 5.0).double())


class Twisted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope


def test_operations_without_a_second_derivative() -> None:
    rough = Says(torch.ones(4), lambda w: F.hardsigmoid(w).square().sum())
    once = Says(torch.ones(4), lambda w: Twisted.apply(w).square().sum())
    for network in (rough, once):
        for measure in (curvature, trace):
            with pytest.raises(UndefinedError, match="no second derivative"):
                measure(network, IMAGE, PLAIN)
        assert sam(network, IMAGE, PLAIN) > 0
        assert perturbation(network, IMAGE, PLAIN).isfinite().all()


def test_faults_of_the_network_are_told_as_they_are() -> None:
    def fails(w: Tensor) -> Tensor:
        raise RuntimeError("size mismatch")

    def exhausted(w: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    for q, error in ((fails, RuntimeError), (exhausted, torch.OutOfMemoryError)):
        for measure in (curvature, trace, perturbation, sam):
            with pytest.raises(error):
                measure(Says(torch.ones(4), q), IMAGE, PLAIN)
    broken = Says(torch.ones(4), lambda w: (w - 1).sum().sqrt().log())
    for measure in (curvature, trace, perturbation, sam):
        with pytest.raises(UndefinedError, match="not a finite number"):
            measure(broken, IMAGE, PLAIN)


def numbers(network: nn.Module, x: Tensor, **keys: Any) -> Tensor:
    labels = torch.arange(len(x)) % 5
    found = curvature(network, x, labels, steps=4, **keys)
    return torch.cat([
        found.values,
        trace(network, x, labels, probes=2, **keys),
        perturbation(network, x, labels, draws=2, **keys),
        torch.tensor([sam(network, x, labels, **{k: v for k, v in keys.items() if k != "seed"})]),
    ])  # fmt: skip


def test_nothing_is_changed_by_the_asking() -> None:
    for keys in (VIT, {"model": "resnet8"}):
        network, x = student(**keys), made.images((16, 16), 5)
        next(network.parameters()).requires_grad_(False)
        before = state(network)
        found = numbers(network, x)
        torch.testing.assert_close(state(network), before, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert not found.requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(numbers(network.requires_grad_(False), x), found)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert torch.allclose(numbers(network, x, batch_size=2), found, rtol=1e-3, atol=1e-6)
        other = numbers(network, x, seed=1)
        assert (other[:-1] != found[:-1]).all()
        assert other[-1] == found[-1]

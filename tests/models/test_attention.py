"""A map is what the layer computes, and lies over the image; nothing else changes by taking it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from distill.errors import IncompatibleError
from distill.models.attention import Watch, Windows, spread
from distill.models.grids import Size
from distill.models.network import Network
from distill.types import AttentionSite
from tests.models import made
from tests.models.made import ATTENDING, SQUARE, WIDE

VIT, SWIN = "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"
SWINV2, CONVIT = "timm/swinv2_tiny_window8_256", "timm/convit_tiny"
OURS: dict[str, dict[str, Any]] = {
    "vit": {"width": 24, "depth": 3, "heads": 3, "patch_size": 8, "pool": "cls"},
}
SHIFTED = {
    "width": 16,
    "depth": [2, 2],
    "heads": 2,
    "patch_size": 4,
    "attention": "window",
    "window": 7,
    "position": "none",
}


def tapped(model: str, image: Size = SQUARE, **arguments: Any) -> tuple[Network, list[str]]:
    """A network that gives all of its maps, and their names."""
    network = made.network(model, image, **(OURS.get(model, {}) | arguments))
    names = [site.name for site in network.anatomy(image).attention]
    network.tap(names)
    return network, names


def maps_of(network: Network, images: Tensor) -> dict[str, Tensor]:
    features = network(images).features
    assert features is not None
    return features


@pytest.mark.parametrize(
    ("model", "image"),
    [
        (model, image)
        for model in (*ATTENDING, *OURS)
        for image in (SQUARE, WIDE)
        if image == SQUARE or model not in (*made.SQUARE_ONLY, *OURS)
    ],
)
def test_rows_sum_to_one_and_the_logits_stay(model: str, image: Size) -> None:
    plain = made.network(model, image, **OURS.get(model, {}))
    network, names = tapped(model, image)
    sites = network.anatomy(image).attention
    images = made.images(image)
    with torch.no_grad():
        logits, maps, *_ = network(images)
        expected = plain(images)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert expected.features is None
    assert maps is not None
    assert list(maps) == names
    for site in sites:
        rows = maps[site.name]
        tokens = [site.prefix + math.prod(grid) for grid in (site.queries, site.keys)]
        assert rows.shape == (2, site.heads, *tokens)
        assert rows.min() >= 0
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-5, rtol=0)


class Unfused:
    """What timm's own layers hand to their dropout when they compute the map themselves."""

    def __init__(self, backbone: nn.Module) -> None:
        self.maps: dict[str, Tensor] = {}
        for name, module in backbone.named_modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
            if name.endswith(".attn_drop"):
                module.register_forward_pre_hook(self._keep(name.removesuffix(".attn_drop")))

    def _keep(self, name: str) -> Callable[..., None]:
        return lambda _, given: self.maps.__setitem__(name, given[0])


@pytest.mark.parametrize(
    "model",
    [
        VIT,
        "timm/deit_tiny_distilled_patch16_224",
        "timm/beit_base_patch16_224",
        "timm/eva02_tiny_patch14_224",
        "timm/pit_ti_224",
        "timm/pvt_v2_b0",
        "timm/coatnet_0_rw_224",
        CONVIT,
    ],
)
def test_it_is_the_map_of_timms_unfused_layer(model: str) -> None:
    network, names = tapped(model)
    theirs = copy.deepcopy(network.backbone)
    unfused, images = Unfused(theirs), made.images()
    with torch.no_grad():
        maps = maps_of(network, images)
        theirs((images - network.mean) / network.std)
    assert len(names) >= 3
    for name in names:
        torch.testing.assert_close(
            maps[name], unfused.maps[name.removesuffix("@attention")], rtol=1e-5, atol=1e-6
        )


def test_convits_map_is_the_mixed_one() -> None:
    network, names = tapped(CONVIT)
    layer: Any = network.backbone.get_submodule("blocks.0.attn")
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        maps = maps_of(network, made.images())
        mixed = layer.get_attention(seen[0])
        # By its definition: (1 - sigma) content + sigma position, rows normalised.
        q, k = layer.qk(seen[0]).reshape(2, 16, 2, 4, 48).permute(2, 0, 3, 1, 4)
        content = (q @ k.transpose(-2, -1) * layer.scale).softmax(dim=-1)
    torch.testing.assert_close(maps[names[0]], mixed, rtol=1e-5, atol=1e-6)
    assert (maps[names[0]] - content).abs().max() > 0.01


@pytest.mark.parametrize("image", [SQUARE, WIDE, (112, 112)])
@pytest.mark.parametrize("model", [SWIN, SWINV2])
def test_windows_are_put_together_as_timm_took_them_apart(model: str, image: Size) -> None:
    """Against numbered cells that are rolled, padded and dealt out by timm's own functions.

    At 64 px windows of 7 do not tile the grids of 16 and 8 cells, at 112 px they do.
    """
    from timm.models.swin_transformer import window_partition

    network, names = tapped(model, image, window_size=7)
    assert len(names) == 8
    theirs = copy.deepcopy(network.backbone)
    unfused, images = Unfused(theirs), made.images(image)
    with torch.no_grad():
        maps = maps_of(network, images)
        theirs((images - network.mean) / network.std)
    shifted = 0
    for site in network.anatomy(image).attention:
        block: Any = theirs.get_submodule(site.name.removesuffix(".attn@attention"))
        rows, columns = site.queries
        height, width = block.window_size
        numbers = torch.arange(rows * columns).reshape(1, rows, columns, 1)
        numbers = numbers.roll((-block.shift_size[0], -block.shift_size[1]), dims=(1, 2))
        numbers = F.pad(numbers, (0, 0, 0, -columns % width, 0, -rows % height), value=-1)
        windows = window_partition(numbers, (height, width)).flatten(1)
        parts = unfused.maps[site.name.removesuffix("@attention")].unflatten(0, (2, len(windows)))
        expected = torch.zeros_like(maps[site.name])
        for window, part in zip(windows, parts.unbind(1), strict=True):
            real = (window >= 0).nonzero().flatten()
            cells = window[real]
            expected[:, :, cells[:, None], cells] = part[:, :, real][..., real]
        expected /= expected.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(maps[site.name], expected, rtol=1e-5, atol=1e-6)
        shifted += any(block.shift_size)
    assert shifted >= 2


def reached(block: nn.Module, given: tuple[Any, ...], grid: Size) -> Tensor:
    """Which cells of its input each cell of a block's output depends on, (N, N), by gradients."""
    x = given[0].detach()[:1].clone().requires_grad_()
    out = block(x, *given[1:])
    cells = math.prod(grid)

    def by_cell(t: Tensor) -> Tensor:
        """(N, C), from any of the layouts."""
        if t.ndim == 4 and tuple(t.shape[2:]) == grid:
            t = t.movedim(1, -1)
        return t.reshape(-1, cells, t.shape[-1])[0]

    found = []
    for cell in by_cell(out):
        weights = torch.linspace(1.0, 2.0, len(cell))  # a norm makes the plain sum constant
        (gradient,) = torch.autograd.grad((cell * weights).sum(), x, retain_graph=True)
        found.append(by_cell(gradient).abs().amax(dim=-1))
    strength = torch.stack(found)
    return strength > 1e-12 * strength.max()


@pytest.mark.parametrize(
    ("model", "first", "image"),
    [
        (SWIN, 2, SQUARE),
        (SWIN, 2, WIDE),
        ("torchvision/swin_t", 2, SQUARE),
        ("torchvision/swin_t", 2, WIDE),
        ("torchvision/swin_v2_t", 2, WIDE),
        ("timm/twins_svt_small", 1, WIDE),
        ("timm/maxvit_tiny_tf_224", 2, SQUARE),
        ("timm/maxvit_tiny_tf_224", 2, WIDE),
        ("torchvision/maxvit_t", 2, SQUARE),
        ("vit", 2, SQUARE),
    ],
)
def test_a_cell_attends_to_the_cells_it_depends_on(model: str, first: int, image: Size) -> None:
    """No cell outside of its window has any weight, and every other one has.

    What surrounds the layer says which cells belong together, and no word of it is read here.
    """
    network = made.network(model, image, **(SHIFTED if model == "vit" else {}))
    anatomy = network.anatomy(image)
    sites = [s for s in anatomy.attention[first:] if s.queries == s.keys and s.queries[0] <= 8][:2]
    network.tap([site.name for site in sites])
    given: dict[str, tuple[Any, ...]] = {}
    around = {site.name: _block(site, anatomy.sites) for site in sites}
    for name, block in around.items():
        network.backbone.get_submodule(block).register_forward_pre_hook(
            lambda _, arguments, name=name: given.__setitem__(name, arguments)
        )
    with torch.no_grad():
        maps = maps_of(network, made.images(image))
    windowed = 0
    for site in sites:
        block = network.backbone.get_submodule(around[site.name])
        expected = reached(block, given[site.name], site.queries)
        assert torch.equal(maps[site.name][0].amax(dim=0) > 1e-12, expected), site.name
        windowed += not expected.all()
    assert len(sites) == 2
    assert windowed >= 1


def _block(site: AttentionSite, sites: dict[str, Any]) -> str:
    """The innermost module around a layer that gives a grid."""
    name = site.name.removesuffix("@attention")
    while "." in name:
        name = name.rpartition(".")[0]
        if name in sites and sites[name].grid == site.queries:
            return name
    raise AssertionError(site.name)


@pytest.mark.parametrize("model", ["timm/pvt_v2_b0", "timm/twins_svt_small"])
def test_reduced_keys_lie_where_they_say(model: str) -> None:
    """Where the image is changed, there queries from afar see another key."""
    image, side = (128, 192), 32
    network = made.network(model, image)
    sites = [s for s in network.anatomy(image).attention if s.keys != s.queries][:1]
    (site,) = sites
    network.tap([site.name])
    images = made.images(image, 4)
    rows, columns = (torch.arange(m) * n // m for n, m in zip(image, site.queries, strict=True))
    for row, column in ((0, 160), (96, 32), (64, 128)):
        other = images.clone()
        other[:, :, row : row + side, column : column + side] = made.images((side, side), 4)
        with torch.no_grad():
            change = maps_of(network, images)[site.name] - maps_of(network, other)[site.name]
        near = ((rows - row).abs() <= side)[:, None] & ((columns - column).abs() <= side)
        seen = change[..., ~near.flatten(), :].abs().mean(dim=(0, 1, 2))
        cell = divmod(int(seen.argmax()), site.keys[1])
        for begin, place, n, m in zip((row, column), cell, image, site.keys, strict=True):
            assert begin <= place * n / m < begin + side


# Cells of a 6 x 6 grid in windows of 4 x 4, numbered row by row; -1 is padding.
UPPER_RIGHT = [4, 5, -1, -1, 10, 11, -1, -1, 16, 17, -1, -1, 22, 23, -1, -1]
LOWER_RIGHT = [28, 29, -1, -1, 34, 35, -1, -1] + [-1] * 8


def test_windows_that_do_not_tile_the_grid_are_padded() -> None:
    cells = Windows((4, 4), (0, 0), dilated=False, early=False).cells((6, 6))
    assert cells.shape == (4, 16)
    assert cells[1].tolist() == UPPER_RIGHT
    assert cells[3].tolist() == LOWER_RIGHT
    assert sorted(cells.flatten().tolist()) == [-1] * 28 + list(range(36))


def test_rolled_before_or_behind_the_padding() -> None:
    first = [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21]
    late = Windows((4, 4), (2, 2), dilated=False, early=False).cells((6, 6))
    assert late[0].tolist() == [cell + 14 for cell in first]
    assert late[1].tolist()[:4] == [-1, -1, 12, 13]  # what was rolled out comes in behind
    early = Windows((4, 4), (2, 2), dilated=False, early=True).cells((6, 6))
    assert early[0].tolist() == [cell + 14 for cell in first]
    assert early[1].tolist()[:4] == [12, 13, -1, -1]
    for cells in (late, early):
        assert sorted(cells.flatten().tolist()) == [-1] * 28 + list(range(36))


def test_windows_spread_over_the_whole_grid() -> None:
    cells = Windows((2, 2), (0, 0), dilated=True, early=False).cells((4, 6))
    # A window has every second row and every third column.
    assert cells[0].tolist() == [0, 3, 12, 15]
    assert cells[1].tolist() == [1, 4, 13, 16]
    assert cells[5].tolist() == [8, 11, 20, 23]


def test_one_window_is_not_shifted_where_the_layer_shifts() -> None:
    cells = Windows((7, 7), (3, 3), dilated=False, early=False).cells((5, 7))
    assert cells.reshape(7, 7)[:5].flatten().tolist() == list(range(35))


def test_what_went_to_padding_is_shared_out() -> None:
    windows = Windows((4, 4), (0, 0), dilated=False, early=False)
    cells = windows.cells((6, 6))
    maps = torch.rand(2 * 4, 3, 16, 16).softmax(dim=-1)
    whole = spread(maps, cells, 36)
    assert whole.shape == (2, 3, 36, 36)
    torch.testing.assert_close(whole.sum(dim=-1), torch.ones(2, 3, 36))
    # Cell 29 is the second of the lower right window, where 4 of 16 keys are cells.
    row = maps[4 + 3, :, 1]
    kept = row[:, [0, 1, 4, 5]]
    expected = torch.zeros(3, 36)
    expected[:, [28, 29, 34, 35]] = kept / kept.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(whole[1, :, 29], expected)
    assert torch.equal(spread(maps.unflatten(0, (2, 4)), cells, 36), whole)


class Calls(TorchFunctionMode):
    """Counts the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.weights: list[bool] = []  # whether multi-head attention was asked for them

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        if func is F.multi_head_attention_forward:
            self.weights.append(kwargs["need_weights"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model", "layers"), [(VIT, 4), ("timm/pit_ti_224", 12), ("vit", 3)])
def test_only_tapped_layers_compute_their_map(model: str, layers: int) -> None:
    """The fused kernel runs as often as ever, and a softmax stands beside it in tapped ones."""
    network = made.network(model, **OURS.get(model, {}))
    names = [site.name for site in network.anatomy().attention]
    counts = []
    for taps in (0, 1, 3):
        network.tap(names[-taps:] if taps else [])
        with torch.no_grad(), Calls() as calls:
            network(made.images())
        assert calls.names.count("scaled_dot_product_attention") == layers
        assert calls.names.count("softmax") == taps
        counts.append(len(calls.names))
    assert 0 < counts[1] - counts[0] < 40
    assert counts[2] - counts[0] == 3 * (counts[1] - counts[0])


def test_only_tapped_multi_head_attention_gives_its_weights() -> None:
    network = made.network("torchvision/vit_b_16")
    names = [site.name for site in network.anatomy().attention]
    network.tap(names[1:2])
    with torch.no_grad(), Calls() as calls:
        network(made.images())
    assert calls.weights == [False, True, False, False]


IDENTITY = torch.eye(7).expand(2, 4, 7, 7)  # as values, attention returns its map


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.arange(35).reshape(5, 7) % 3 > 0},
        {"attn_mask": torch.linspace(-3, 3, 70).reshape(2, 1, 5, 7)},
        {"enable_gqa": True},
    ],
)
def test_the_map_of_fused_attention(keys: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in keys else 4
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8)
    seen: list[Tensor] = []
    with Watch(seen.append, lambda _: None):
        out = F.scaled_dot_product_attention(q, k, IDENTITY[:, :heads], **keys)
    (rows,) = seen
    torch.testing.assert_close(rows, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "most"), [(VIT, 1e-5), ("vit", 1e-5), (CONVIT, 2e-3), ("torchvision/vit_b_16", 2e-3)]
)
def test_halves_do_not_blur_a_map(model: str, most: float) -> None:
    """Beside a fused kernel it is computed exactly, elsewhere as exactly as the layer does."""
    network, _ = tapped(model)
    images = made.images()
    with torch.no_grad():
        expected = maps_of(network, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = maps_of(network, images)
    for name, rows in maps.items():
        sums = rows.double().sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=most, rtol=0)
        torch.testing.assert_close(rows.float(), expected[name], atol=5e-3, rtol=0)


def kernel(network: Network) -> Tensor:
    """The first layer's."""
    return next(m.weight for m in network.backbone.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("model", [*ATTENDING, *OURS])
def test_a_gradient_flows_from_a_map_to_the_stem(model: str) -> None:
    network, names = tapped(model)
    rows = maps_of(network, made.images())[names[-1]]
    # Every row sums to 1, and so would a plain sum whatever the weights are.
    (rows * torch.rand_like(rows)).sum().backward()
    gradient = kernel(network).grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("model", [VIT, SWIN, "vit"])
def test_compiles_to_one_graph(model: str) -> None:
    """Values and gradients stay, of grids and vectors beside the maps too."""
    network, names = tapped(model, **({"depths": (2,)} if model == SWIN else {}))
    grid = (network.anatomy().blocks or network.anatomy().stages)[-1].name
    network.tap(["pooled", grid])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for run in (network, compiled):
        network.zero_grad()
        outputs.append(run(made.images()))
        rows = outputs[-1].features[names[-1]]
        (rows * torch.linspace(0, 1, rows.shape[-1])).sum().backward()
        gradients.append(kernel(network).grad)
    expected, found = outputs
    assert found.features.keys() == {"pooled", grid, *names}
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


def deep_copy(network: Network) -> Network:
    return copy.deepcopy(network)


def average(network: Network) -> Network:
    inner = AveragedModel(network).module
    assert isinstance(inner, Network)
    return inner


@pytest.mark.parametrize("again", [deep_copy, average])
@pytest.mark.parametrize("model", [VIT, SWIN, "timm/resnet10t"])
def test_a_copy_writes_into_itself(model: str, again: Callable[[Network], Network]) -> None:
    network, names = tapped(model)
    anatomy = network.anatomy()
    network.tap(["pooled", (anatomy.blocks or anatomy.stages)[-1].name])
    twin = again(network)
    images = made.images()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        first = network(images)
        other = twin(images)
        repeated = network(images)
    assert first.features is not None
    assert other.features is not None
    assert other.features.keys() == first.features.keys()
    assert len(first.features) == len(names) + 2
    for name, feature in first.features.items():
        assert torch.equal(feature, repeated.features[name])  # type: ignore[index]
        assert not torch.allclose(feature, other.features[name])


@pytest.mark.parametrize("model", [VIT, SWIN, "torchvision/vit_b_16", "vit"])
def test_an_error_inside_of_a_layer_leaves_no_trace(model: str) -> None:
    network, names = tapped(model)
    images = made.images()
    expected = maps_of(network, images)[names[-1]]
    name = names[1].removesuffix("@attention")
    layer: Any = network.backbone.get_submodule(name)
    weight = (
        layer.out_proj.weight if isinstance(layer, nn.MultiheadAttention) else layer.proj.weight
    )
    whole, weight.data = weight.data, torch.zeros(1, 1)
    assert not _get_current_function_mode_stack()
    with pytest.raises(RuntimeError):
        network(images)
    assert not _get_current_function_mode_stack()
    weight.data = whole
    assert torch.equal(maps_of(network, images)[names[-1]], expected)


def test_a_distillation_token_has_logits_of_its_own() -> None:
    network = made.network("timm/deit_tiny_distilled_patch16_224")
    backbone: Any = network.backbone
    nn.init.normal_(backbone.head_dist.weight)
    nn.init.normal_(backbone.head.weight)
    images = made.images()
    assert network.anatomy().token
    plain = network(images).logits
    network.tap(["token", "blocks.3@prefix"])
    network.eval()
    mean, features, *_ = network(images)
    torch.testing.assert_close(mean, plain)
    assert features is not None
    network.train()
    logits, trained, *_ = network(images)
    assert trained is not None
    torch.testing.assert_close(trained["token"], features["token"])
    torch.testing.assert_close((logits + trained["token"]) / 2, mean)
    cls, dist = backbone.norm(trained["blocks.3@prefix"]).unbind(1)
    torch.testing.assert_close(logits, backbone.head(cls))
    torch.testing.assert_close(trained["token"], backbone.head_dist(dist))


@pytest.mark.parametrize("model", [VIT, "timm/resnet10t", "torchvision/vit_b_16"])
def test_a_network_without_such_a_token_is_refused(model: str) -> None:
    network = made.network(model)
    assert not network.anatomy().token
    with pytest.raises(IncompatibleError, match="has no distillation token") as refused:
        network.tap(["token"])
    assert "pool: distill" in str(refused.value.hint)
    assert network(made.images()).features is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.9", r"no module 'blocks\.9' in VisionTransformer; did you mean 'blocks\.\d"),
        ("blocks.0.atn@attention", r"did you mean 'blocks\.\d\.attn@attention'"),
        ("patch_embed@prefix", "no module 'patch_embed@prefix'"),
        ("", "no module ''"),
    ],
)
def test_a_tap_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(IncompatibleError, match=words):
        made.network(VIT).tap([name])

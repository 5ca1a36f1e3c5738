"""Heads that look at known places, and maps of networks measured cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distill.diagnostics import UndefinedError, attention
from distill.diagnostics.attention import at_once, centres, distances, locality, neighbours
from distill.diagnostics.tapped import tapped
from distill.models.grids import Size
from distill.models.network import Network
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made

# Grid -> patches and share of the 3 x 3 around, of tokens that look at all alike.
UNIFORM = {
    7: (3.610, 0.150), 8: (4.137, 0.118), 14: (7.281, 0.042), 16: (8.326, 0.032),
    28: (14.590, 0.011), 32: (16.677, 0.008),
}  # fmt: skip
GRIDS: list[tuple[Size, Size]] = [
    ((4, 4), (4, 4)), ((3, 5), (3, 5)), ((8, 6), (4, 3)), ((6, 6), (2, 2)), ((7, 7), (3, 3)),
    ((3, 4), (6, 8)), ((4, 4), (6, 6)),
]  # fmt: skip


def rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits.softmax(dim=-1)


def by_hand(
    maps: Tensor, queries: Size, keys: Size, prefix: int, image: Size
) -> dict[str, list[list[float]]]:
    """Every pair of cells looked up, in plain numbers."""
    found: dict[str, list[list[float]]] = {"distance": [], "near": [], "entropy": []}
    for heads in maps.double():
        for column in found.values():
            column.append([])
        for head in heads:
            distance = near = entropy = 0.0
            for q in range(math.prod(queries)):
                row = head[prefix + q, prefix:].tolist()
                for k, weight in enumerate(row):
                    share = weight / sum(row) / math.prod(queries)
                    gaps = []
                    for axis in (0, 1):
                        i, j = (divmod(at, g[1])[axis] for at, g in ((q, queries), (k, keys)))
                        n, m = queries[axis], keys[axis]
                        gaps.append(((i + 0.5) / n - (j + 0.5) / m, 1.5 / min(n, m), image[axis]))
                    distance += share * math.hypot(*(gap * pixels for gap, _, pixels in gaps))
                    near += share * all(abs(gap) < most - 1e-9 for gap, most, _ in gaps)
                    entropy -= share * math.log(max(weight / sum(row), 1e-300))
            for name, value in (("distance", distance), ("near", near), ("entropy", entropy)):
                found[name][-1].append(value)
    return found


@pytest.mark.parametrize("n", list(UNIFORM))
def test_uniform_attention(n: int) -> None:
    patch, grid = 16, (n, n)
    distance, near = distances(grid, grid, (n * patch, n * patch)), neighbours(grid, grid)
    seen = locality(torch.full((1, 2, n * n, n * n), 1 / n**2), distance, near)
    patches, share = UNIFORM[n]
    assert (seen.distance / patch - patches).abs().max() < 6e-4
    assert (seen.near - share).abs().max() < 6e-4
    assert torch.allclose(seen.entropy, torch.tensor(math.log(n * n), dtype=torch.float64))
    for one in (seen.relative, seen.spread):
        assert torch.allclose(one, torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("queries", "keys"), GRIDS)
def test_against_every_pair_of_cells(queries: Size, keys: Size, prefix: int) -> None:
    maps = rows(2, 3, prefix + math.prod(queries), prefix + math.prod(keys))
    image = (24, 40)
    distance = distances(queries, keys, image)
    found = locality(maps, distance, neighbours(queries, keys))
    for name, expected in by_hand(maps, queries, keys, prefix, image).items():
        assert torch.allclose(getattr(found, name), torch.tensor(expected).double()), name
    assert torch.allclose(found.relative, found.distance / distance.mean())
    assert torch.allclose(found.spread, found.entropy / math.log(math.prod(keys)))


def test_known_places() -> None:
    grid, image = (3, 4), (12, 32)  # cells of 4 x 8 pixels
    distance, near = distances(grid, grid, image), neighbours(grid, grid)
    itself = torch.eye(12)
    right, across = itself.roll(1, dims=1), itself.roll(2, dims=1)
    assert [distance[0, k] for k in (0, 1, 4, 5)] == [0, 8, 4, math.hypot(4, 8)]
    assert near.sum(dim=1).tolist() == [4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4]
    heads = torch.stack([itself, right, across, (itself + right) / 2])
    found = locality(heads[None], distance, near)
    assert found.distance[0, 0] == 0
    assert found.near[0, 0] == 1
    assert found.entropy[0].tolist() == pytest.approx([0, 0, 0, math.log(2)])
    # Three of four look 8 px to the right; the last of a row at the next row's first, or the top.
    ends = [math.hypot(24, 4), math.hypot(24, 4), math.hypot(24, 8)]
    assert float(found.distance[0, 1]) == pytest.approx((9 * 8 + sum(ends)) / 12)
    assert float(found.near[0, 1]) == pytest.approx(9 / 12)
    assert float(found.near[0, 2]) == 0


def test_a_coarser_grid_lies_over_the_same_image() -> None:
    assert centres((2, 4), (8, 8)).tolist() == [
        [row, column] for row in (1.5, 5.5) for column in (0.5, 2.5, 4.5, 6.5)
    ]
    near = neighbours((8, 8), (4, 4)).reshape(8, 8, 4, 4)
    assert near[4, 5, 1:4, 1:4].all()  # in the key of row 2 and column 2
    assert near[4, 5].sum() == 9
    assert near[0, 7].sum() == 4
    finer = neighbours((4, 4), (8, 8)).reshape(4, 4, 8, 8)
    assert finer[1, 2].nonzero().tolist() == [[r, c] for r in range(6) for c in range(2, 8)]


def test_tokens_in_front_are_left_out() -> None:
    plain = rows(1, 2, 9, 9)
    distance, near = distances((3, 3), (3, 3), (9, 9)), neighbours((3, 3), (3, 3))
    maps = torch.rand(1, 2, 11, 11, dtype=torch.float64)
    maps[..., 2:, 2:] = 0.25 * plain
    found, expected = locality(maps, distance, near), locality(plain, distance, near)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    # A cell that looks at nothing else has no distance, and the others keep theirs.
    maps[..., 2:6, 2:] = 0
    kept = locality(maps, distance, near)
    single = (plain[..., 4:, :] * distance[4:]).sum(dim=-1).mean(dim=-1)
    assert torch.allclose(kept.distance, single)
    maps[..., 2:, 2:] = 0
    assert locality(maps, distance, near).distance.isnan().all()


def maps_of(network: Network, x: Tensor) -> dict[str, Tensor]:
    sites = network.anatomy((x.shape[-2], x.shape[-1])).attention
    with torch.no_grad():
        features: dict[str, Tensor] = tapped(network, [site.name for site in sites])(x).features
    return features


def check(network: Network, x: Tensor) -> attention.Attention:
    image = (x.shape[-2], x.shape[-1])
    found, maps = attention.attention(network, x), maps_of(network, x)
    assert [layer.site.name for layer in found.layers] == list(maps)
    for layer in found.layers:
        site = layer.site
        distance, near = (
            distances(site.queries, site.keys, image),
            neighbours(site.queries, site.keys),
        )
        cells = maps[site.name].double()[..., site.prefix :, site.prefix :]
        expected = torch.einsum("baqk,qk->ba", cells / cells.sum(dim=-1, keepdim=True), distance)
        expected /= len(distance)
        assert layer.heads.distance.shape == (len(x), site.heads)
        assert torch.allclose(layer.heads.distance, expected)
        assert torch.allclose(layer.uniform.distance, distance.mean())
        assert torch.allclose(layer.uniform.near, near.double().mean())
        assert torch.allclose(layer.heads.relative, expected / distance.mean())
        assert ((layer.heads.near >= 0) & (layer.heads.near <= 1 + 1e-9)).all()
        assert ((layer.heads.spread >= 0) & (layer.heads.spread <= 1 + 1e-9)).all()
    for column, overall in found.overall._asdict().items():
        means = [getattr(layer.heads, column).mean(dim=1) for layer in found.layers]
        assert torch.allclose(overall, sum(means) / len(means))
        assert overall.shape == (len(x),)
    return found


@pytest.mark.parametrize(
    "keys",
    [
        VIT,
        VIT | {"pool": "cls"},
        VIT | {"pool": "distill"},
        VIT | {"depth": 3, "attention": "gated", "heads": 4, "pool": "cls"},
        {"model": "swin_tiny", "patch_size": 2, "window": 2},
    ],
    ids=["mean", "cls", "distill", "gated", "swin"],
)
def test_our_networks(keys: dict[str, object]) -> None:
    network = student(**keys)
    found = check(network, made.images((16, 16), 3))
    if keys["model"] == "swin_tiny":
        assert found.layers[0].site.queries == (8, 8)
        # Four cells attend to each other, in every head of every layer.
        assert all(float(layer.heads.entropy.max()) <= math.log(4) + 1e-6 for layer in found.layers)
        assert float(found.layers[0].heads.relative.max()) < 0.4


@pytest.mark.parametrize(
    ("model", "image"),
    [
        ("timm/deit_tiny_distilled_patch16_224", made.WIDE),
        ("timm/swin_tiny_patch4_window7_224", made.SQUARE),
        ("timm/pvt_v2_b0", made.WIDE),
    ],
)
def test_others_networks(model: str, image: Size) -> None:
    network = made.shared(model) if image == made.SQUARE else made.network(model, image)
    found = check(network, made.images(image))
    if "pvt" in model:
        assert any(layer.site.queries != layer.site.keys for layer in found.layers)


@pytest.mark.soak
@pytest.mark.parametrize("model", list(made.ATTENDING))
def test_all_families(model: str) -> None:
    check(made.shared(model), made.images())


def test_a_network_that_looks_at_all_alike() -> None:
    network = student(**VIT | {"pool": "cls"})
    for name, parameter in network.named_parameters():
        if "qkv" in name:
            nn.init.zeros_(parameter)
    found = attention.attention(network, made.images((16, 16)))
    for layer in found.layers:
        for seen, alike in zip(layer.heads, layer.uniform, strict=True):
            assert torch.allclose(seen, alike.expand(2, 2))
    assert torch.allclose(found.overall.relative, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(found.overall.spread, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("model", ["resnet8", "row_gru", "timm/xcit_nano_12_p16_224"])
def test_networks_without_maps(model: str) -> None:
    """Of XCiT's the channels attend to each other."""
    network = made.shared(model) if "/" in model else student(model=model)
    x = made.images() if "/" in model else made.images((16, 16))
    with pytest.raises(UndefinedError, match="no attention maps between the cells"):
        attention.attention(network, x)


def test_pixels_are_those_of_the_images_given() -> None:
    network, x = student(**VIT), made.images((32, 32))
    network.input_size = 16
    found = attention.attention(network, x)
    smaller = nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    expected = attention.attention(network, smaller)
    assert torch.allclose(found.overall.distance, 2 * expected.overall.distance)
    assert torch.allclose(found.overall.relative, expected.overall.relative)


def test_few_maps_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = student(**VIT), made.images((16, 16), 5)
    sites = network.anatomy((16, 16)).attention
    numbers = 2 * 2 * 16 * 16  # layers, heads, cells
    whole = attention.attention(network, x)
    for held, images in ((numbers * 5 // 2, 2), (1, 1), (numbers * 64, 5)):
        monkeypatch.setattr(attention, "_NUMBERS", held)
        assert at_once(sites, 5) == images
        parts = attention.attention(network, x)
        assert torch.allclose(parts.overall.distance, whole.overall.distance, rtol=1e-5)


def test_nothing_is_changed_by_the_asking() -> None:
    network, x = student(**VIT | {"drop": 0.5}).train(), made.images((16, 16), 5)
    before = state(network)
    found = attention.attention(network, x)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert network(x).features is None
    parts = attention.attention(network, x, batch_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        again = attention.attention(network, x)
    for column in attention.Locality._fields:
        whole = getattr(found.overall, column)
        assert torch.allclose(getattr(parts.overall, column), whole, rtol=1e-5)
        assert torch.equal(getattr(again.overall, column), whole)

"""Two networks' grids, channels and depths are brought together, whatever the two are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.component import Projector, Stages
from distill.errors import IncompatibleError
from distill.objectives import Objective, _projectors
from distill.objectives._align import STRIDE_COST, Resample, ResampleMaps, common, match, shared
from distill.objectives._standard import Standard
from distill.objectives.features import Features
from distill.types import Anatomy, AttentionSite, Batch, Outputs, Pair, Site

PROJECTORS: tuple[Projector, ...] = ("linear", "mlp", "conv", "attention", "orthogonal")


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def cnn(stages: int, *, first: int = 8, name: str = "cnn", depths: bool = False) -> Anatomy:
    """Stages of 8 channels and half the grid of the one before; `depths`: crowded at the end."""
    sites = []
    for i in range(stages):
        depth = (i + 1) / stages
        grid, stride = (64 // (first * 2**i) or 1,) * 2, float(first * 2**i)
        sites.append(Site(f"s{i}", 8, grid, stride, depth**0.3 if depths else depth, 0))
    return Anatomy(name, 8, False, {site.name: site for site in sites}, tuple(sites), (), ())


def vit(blocks: int, *, side: int = 4, name: str = "vit", prefix: int = 1) -> Anatomy:
    """Equal blocks, and attention in each."""
    sites = [
        Site(f"b{i}", 6, (side, side), 64 / side, (i + 1) / blocks, prefix) for i in range(blocks)
    ]
    maps = [
        AttentionSite(f"b{i}@attention", 2, (side, side), (side, side), prefix, (i + 1) / blocks)
        for i in range(blocks)
    ]
    named = {site.name: site for site in sites}
    return Anatomy(name, 6, False, named, (sites[-1],), tuple(sites), tuple(maps))


def pair(student: Anatomy, teacher: Anatomy) -> Pair:
    return Pair(student, teacher, 3, torch.arange(10))


def names(student: Anatomy, teacher: Anatomy, stages: Stages) -> list[tuple[str, str]]:
    return [(a.name, b.name) for a, b in match(pair(student, teacher), stages)]


def test_presets_take_the_blocks_that_stand_for_stages() -> None:
    """Of twelve blocks those that the papers name, counted from 0."""
    twelve = vit(12)
    expected: dict[Stages, list[int]] = {
        "penultimate": [11],
        "last2": [9, 11],
        "lg": [0, 6, 11],
        "all": [1, 3, 9, 11],
    }
    for stages, blocks in expected.items():
        assert names(twelve, vit(12), stages) == [(f"b{i}", f"b{i}") for i in blocks]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("penultimate", [("s4", "b11")]),
        ("last2", [("s3", "b9"), ("s4", "b11")]),
        ("lg", [("s2", "b0"), ("s3", "b6"), ("s4", "b11")]),
        # Depths .2 .4 .6 .8 1 to blocks at .17 .33 .83 1: the middle stage has none.
        ("all", [("s0", "b1"), ("s1", "b3"), ("s3", "b9"), ("s4", "b11")]),
    ],
)
def test_five_stages_and_twelve_blocks_belong_together_in_order(
    stages: Stages, expected: list[tuple[str, str]]
) -> None:
    assert names(cnn(5, first=2), vit(12), stages) == expected
    assert names(vit(12), cnn(5, first=2), stages) == [(b, a) for a, b in expected]


def test_a_network_of_few_blocks_gives_each_once() -> None:
    assert names(vit(3), vit(12), "all") == [("b0", "b3"), ("b1", "b9"), ("b2", "b11")]
    assert names(vit(3), vit(3), "lg") == [(f"b{i}", f"b{i}") for i in range(3)]


def test_between_cnns_stages_of_like_strides_belong_together() -> None:
    assert names(cnn(3, first=8), cnn(5, first=2), "all") == [
        ("s0", "s2"),
        ("s1", "s3"),
        ("s2", "s4"),
    ]
    assert names(cnn(4), cnn(4), "all") == [(f"s{i}", f"s{i}") for i in range(4)]


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize(("few", "many"), [(1, 4), (2, 5), (3, 5), (4, 4), (3, 6)])
def test_the_choice_is_the_cheapest_that_keeps_the_order(
    few: int, many: int, first: int, crowded: bool
) -> None:
    small, large = cnn(few, first=4), cnn(many, first=first, depths=crowded)

    def cost(chosen: tuple[Site, ...]) -> float:
        return sum(
            abs(a.depth - b.depth) + STRIDE_COST * abs(math.log2(a.stride / b.stride))
            for a, b in zip(small.stages, chosen, strict=True)
        )

    best = min(cost(chosen) for chosen in combinations(large.stages, few))
    for found in (
        tuple(b for _, b in match(pair(small, large), "all")),
        tuple(a for a, _ in match(pair(large, small), "all")),
    ):
        assert found in set(combinations(large.stages, few))
        assert cost(found) == pytest.approx(best)


def test_named_modules_are_taken_as_they_are() -> None:
    chosen = match(pair(cnn(4), vit(12)), "last2", [["s3", "b0"], ["s0", "b11"], ["s0", "b2"]])
    assert [(a.name, b.name) for a, b in chosen] == [("s3", "b0"), ("s0", "b11"), ("s0", "b2")]


def test_errors_name_both_sides_and_the_nearest_module() -> None:
    objective = Objective({"features": Features(pairs=[["s9", "b0"]])}, {})
    with pytest.raises(IncompatibleError, match=r"s9.*s0") as caught:
        objective.connect(cnn(4), [vit(12)], num_classes=3, samples=torch.arange(3))
    assert "student cnn" in str(caught.value)
    assert "teacher vit" in str(caught.value)
    flat = Anatomy("mlp", 8, False, {}, (), (), ())
    for sides in ((flat, vit(12)), (cnn(4), flat)):
        with pytest.raises(IncompatibleError, match="mlp has no grids of features") as caught:
            match(pair(*sides), "last2")
        assert "pooled" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "target"), [((8, 8), (4, 4)), ((12, 6), (3, 2)), ((6, 4), (1, 1))]
)
def test_resampling_is_average_pooling_where_one_grid_divides_the_other(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, *source)
    expected = F.adaptive_avg_pool2d(x, target)
    torch.testing.assert_close(Resample(source, target)(x), expected, rtol=0, atol=1e-6)


ODD = [((27, 27), (7, 7)), ((16, 16), (7, 5)), ((7, 7), (16, 16)), ((14, 14), (8, 8))]


@pytest.mark.parametrize(("source", "target"), ODD)
def test_resampling_keeps_constants_and_means(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    constant = torch.full((1, 2, *source), 3.7)
    found = Resample(source, target)(constant)
    torch.testing.assert_close(found, torch.full((1, 2, *target), 3.7), rtol=0, atol=2e-6)
    x = torch.randn(2, 3, *source)
    mean = Resample(source, target)(x).mean(dim=(2, 3))
    torch.testing.assert_close(mean, x.mean(dim=(2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), ODD)
def test_resampling_is_the_area_that_cells_share(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    x = torch.randn(1, 1, *source)
    found = Resample(source, target)(x)[0, 0]
    for a, b in product(range(target[0]), range(target[1])):
        total = 0.0
        for i, j in product(range(source[0]), range(source[1])):
            rows = min((a + 1) / target[0], (i + 1) / source[0]) - max(a / target[0], i / source[0])
            columns = min((b + 1) / target[1], (j + 1) / source[1])
            columns -= max(b / target[1], j / source[1])
            if rows > 0 and columns > 0:
                total += float(x[0, 0, i, j]) * rows * columns * target[0] * target[1]
        assert float(found[a, b]) == pytest.approx(total, abs=2e-6)


def test_the_finer_grid_is_reached_by_interpolation() -> None:
    x = torch.randn(2, 3, 4, 5)
    found = Resample((4, 5), (9, 5), bilinear=True)(x)
    torch.testing.assert_close(found, F.interpolate(x, (9, 5), mode="bilinear"))
    assert Resample((4, 5), (4, 5), bilinear=True)(x) is x
    assert common((4, 9), (7, 5), "max") == (7, 9)
    assert common((4, 9), (7, 5), "min") == (4, 5)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("target", [(3, 3), (7, 5), (6, 4), (12, 12)])
def test_resampled_maps_stay_stochastic(target: tuple[int, int], kept: bool, prefix: int) -> None:
    site = AttentionSite("a", 2, (6, 4), (3, 2), prefix, 1.0)
    maps = (3 * torch.randn(2, 2, prefix + 24, prefix + 6)).softmax(dim=-1)
    found = ResampleMaps(site, target, prefix=kept)(maps)
    front = int(kept and prefix > 0)
    cells = front + target[0] * target[1]
    assert found.shape == (2, 2, cells, cells)
    assert (found >= 0).all()
    # Four roundings of float32: half as much is usual.
    assert (found.double().sum(dim=-1) - 1).abs().max() <= 4.8e-7


def test_a_resampled_map_is_the_mean_of_rows_and_the_sum_of_columns() -> None:
    site = AttentionSite("a", 1, (4, 4), (4, 4), 2, 1.0)
    maps = (3 * torch.randn(1, 1, 18, 18)).softmax(dim=-1)
    found = ResampleMaps(site, (2, 2), prefix=True)(maps)[0, 0]
    # Tokens of a quarter of the image, and those in front.
    groups = [[0, 1]] + [
        [2 + 4 * i + j for i in (2 * a, 2 * a + 1) for j in (2 * b, 2 * b + 1)]
        for a, b in product(range(2), repeat=2)
    ]
    for i, j in product(range(5), repeat=2):
        plain = maps[0, 0].double()[groups[i]][:, groups[j]].sum() / len(groups[i])
        assert float(found[i, j]) == pytest.approx(float(plain), abs=1e-6)
    grid = found[1:, 1:] / found[1:, 1:].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(ResampleMaps(site, (2, 2), prefix=False)(maps)[0, 0], grid)


def test_a_map_on_its_own_grid_is_itself() -> None:
    site = AttentionSite("a", 3, (4, 3), (4, 3), 1, 1.0)
    maps = torch.randn(2, 3, 13, 13).softmax(dim=-1)
    torch.testing.assert_close(ResampleMaps(site, (4, 3), prefix=True)(maps), maps)


def test_shared_lengths_add_up_on_both_sides() -> None:
    for n, m in product((1, 3, 7, 16), repeat=2):
        lengths = shared(n, m)
        torch.testing.assert_close(lengths.sum(dim=0), torch.full((n,), 1 / n))
        torch.testing.assert_close(lengths.sum(dim=1), torch.full((m,), 1 / m))


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize(("channels", "target"), [(6, 10), (10, 6)])
def test_projectors_change_channels_alone(kind: Projector, channels: int, target: int) -> None:
    projector = _projectors.build(kind, channels, target)
    x = torch.randn(3, channels, 4, 5, requires_grad=True)
    y = projector(x)
    assert y.shape == (3, target, 4, 5)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in projector.parameters())
    moved = x.detach().clone()
    moved[0, :, 1, 1] = moved[0, :, 1, 1].flip(0)  # which leaves mean and variance as they are
    changed = (projector(moved) - y).abs().amax(dim=1) > 1e-4
    # A cell is projected by itself, but where the projector looks at its neighbours.
    assert int(changed[0].sum()) == {"conv": 9, "attention": 20}.get(kind, 1)
    assert not changed[1:].any()


@pytest.mark.parametrize(("channels", "target"), [(6, 10), (10, 6)])
def test_an_orthogonal_projector_stays_so_as_it_learns(channels: int, target: int) -> None:
    projector = _projectors.build("orthogonal", channels, target)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.05)
    before = projector(torch.eye(channels)[..., None, None])[..., 0, 0].detach()
    x, y = torch.randn(8, channels, 3, 3), torch.randn(8, target, 3, 3)
    for _ in range(20):
        optimizer.zero_grad()
        (projector(x) - y).square().mean().backward()
        optimizer.step()
    matrix = projector(torch.eye(channels)[..., None, None])[..., 0, 0].detach()
    assert (matrix - before).abs().max() > 0.05
    gram = matrix @ matrix.T if channels <= target else matrix.T @ matrix
    torch.testing.assert_close(gram, torch.eye(min(channels, target)), rtol=0, atol=1e-5)


def test_standard_takes_the_first_batch_and_then_a_tenth_of_each() -> None:
    standard = Standard(3)
    scale = torch.tensor([1.0, 50.0, 0.0])[:, None, None]
    batches = [4 + scale * torch.randn(16, 3, 4, 4) for _ in range(3)]
    first = standard(batches[0])
    assert first.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    deviation = first.double().std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 1.0, 0.0]).double())
    mean = batches[0].mean(dim=(0, 2, 3))
    spread = batches[0].std(dim=(0, 2, 3), correction=0)
    for x in batches[1:]:
        standard(x)
        mean = 0.9 * mean + 0.1 * x.mean(dim=(0, 2, 3))
        spread = 0.9 * spread + 0.1 * x.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(standard.mean.flatten(), mean)
    torch.testing.assert_close(standard.deviation.flatten(), spread)
    kept = {name: value.clone() for name, value in standard.state_dict().items()}
    standard.eval()
    found = standard(batches[0])
    assert all(torch.equal(kept[name], value) for name, value in standard.state_dict().items())
    expected = (batches[0] - standard.mean) / spread.clamp_min(1e-3)[:, None, None]
    torch.testing.assert_close(found, expected)


def test_features_of_the_same_network_are_soon_matched() -> None:
    term = Features(stages="penultimate")
    term.connect(pair(vit(4), vit(4)))
    optimizer = torch.optim.Adam(term.parameters(), lr=0.02)
    mixing = torch.randn(6, 6)

    def seen() -> Outputs:
        x = torch.einsum("cd,bdhw->bchw", mixing, torch.randn(32, 6, 4, 4))
        return Outputs(torch.zeros(32, 3), {"b3": x})

    ids = torch.arange(32)
    data = Batch(torch.zeros(32, 3, 2, 2), torch.zeros(32, 3), ids, ids)
    losses: list[Tensor] = []
    for _ in range(300):
        both = seen()
        optimizer.zero_grad()
        losses.append(term(both, both, data).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.3
    assert losses[-1] < 0.05


def test_half_precision_of_the_networks_leaves_grids_and_maps_exact() -> None:
    """The objective runs in the networks' autocast."""
    resample = Resample((8, 8), (3, 5))
    site = AttentionSite("a", 2, (4, 4), (4, 4), 1, 1.0)
    maps = ResampleMaps(site, (3, 3), prefix=True)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 17, 17).softmax(dim=-1)
    expected = resample(x), maps(y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(x), expected[0])
        assert torch.equal(maps(y), expected[1])
    term = Features(stages="last2")
    term.connect(pair(vit(6), cnn(3)))
    own, other = (
        Outputs(
            torch.zeros(4, 3),
            {tap: torch.randn(4, side.sites[tap].channels, *side.sites[tap].grid) for tap in taps},
        )
        for side, taps in ((vit(6), term.reads.student), (cnn(3), term.reads.teacher))
    )
    ids = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(own, other, Batch(torch.zeros(4, 3, 2, 2), torch.zeros(4, 3), ids, ids))
    assert value.dtype == torch.float32
    assert value.isfinite().all()

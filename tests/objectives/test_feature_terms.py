"""How terms on features and relations put together what they read of two networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import component
from distill.errors import IncompatibleError
from distill.objectives import Objective
from distill.objectives._term import Term
from distill.objectives.infonce import InfoNCE, infonce_loss
from distill.objectives.locality_penalty import LocalityPenalty, locality_penalty_loss
from distill.objectives.ofa import OFA, ofa_loss
from distill.objectives.review import Review
from distill.objectives.rkd import RKD, angle_loss, distance_loss
from distill.objectives.vitkd import ViTKD, hidden_cells
from distill.types import Anatomy, Batch, Outputs, Pair
from tests.objectives.test_align import cnn, pair, vit
from tests.objectives.test_soft_biases import learned

SIZE, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def batch(size: int = SIZE, *, first: int = 0, view: int = 0) -> Batch:
    ids = torch.arange(size) + first
    labels = torch.eye(CLASSES)[ids % CLASSES]
    return Batch(torch.rand(size, 3, 8, 8), labels, ids, torch.full_like(ids, view))


def outputs(network: Anatomy, taps: tuple[str, ...], size: int = SIZE) -> Outputs:
    """Random logits and features; whatever is tapped gets a gradient."""
    maps = {site.name: site for site in network.attention}
    features = {}
    for tap in taps:
        if tap == "pooled":
            features[tap] = torch.randn(size, network.width)
        elif tap in maps:
            tokens = maps[tap].prefix + maps[tap].queries[0] * maps[tap].queries[1]
            features[tap] = torch.randn(size, maps[tap].heads, tokens, tokens).softmax(dim=-1)
        else:
            site = network.sites[tap]
            features[tap] = torch.randn(size, site.channels, *site.grid)
    return Outputs(
        torch.randn(size, CLASSES).requires_grad_(),
        {tap: x.requires_grad_() for tap, x in features.items()},
    )


def connected(term: Term, student: Anatomy, teacher: Anatomy) -> tuple[Term, Outputs, Outputs]:
    term.connect(pair(student, teacher))
    return term, outputs(student, term.reads.student), outputs(teacher, term.reads.teacher)


def read(told: Outputs, tap: str) -> Tensor:
    assert told.features is not None
    return told.features[tap].detach()


PAIRS = {
    "cnn-to-vit": (vit(12), cnn(4)),
    "vit-to-cnn": (cnn(5, first=2), vit(12)),
    "cnn-to-cnn": (cnn(3), cnn(5, first=2, name="deep")),
    "vit-to-vit": (vit(4, side=4), vit(12, side=7, prefix=2, name="large")),
}


@pytest.mark.parametrize("sides", PAIRS)
@pytest.mark.parametrize("name", ["at", "features", "locality", "review", "ofa"])
def test_grids_and_channels_may_be_any(name: str, sides: str) -> None:
    term = component.build("objectives", name, {})
    _, student, teacher = connected(term, *PAIRS[sides])
    value = term(student, teacher, batch())
    assert value.shape == (SIZE,)
    value.mean().backward()
    assert student.features is not None
    assert teacher.features is not None
    for x in student.features.values():
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0
    assert all(x.grad is None for x in teacher.features.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_at_is_the_mean_over_pairs_on_the_coarser_grid() -> None:
    term = component.build(
        "objectives", "at", {"pairs": [["s0", "b1"], ["s3", "b0"], ["s0", "b2"]]}
    )
    _, student, teacher = connected(term, cnn(4), vit(3))  # grids of 8 and 1, and of 4
    assert term.matched == [("s0", "b1"), ("s0", "b2")]  # on one cell any two maps are alike

    def unit(features: Tensor) -> Tensor:
        energy = F.adaptive_avg_pool2d(features.double().square().mean(dim=1), 4).flatten(1)
        return energy / energy.norm(dim=1, keepdim=True)

    own = unit(read(student, "s0"))
    expected = [(own - unit(read(teacher, tap))).square().mean(dim=1) for tap in ("b1", "b2")]
    found = term(student, teacher, batch()).double()
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0))


def test_at_needs_more_than_one_cell() -> None:
    term = component.build("objectives", "at", {"stages": "penultimate"})
    with pytest.raises(IncompatibleError, match="one cell in common"):
        term.connect(pair(cnn(4), vit(3)))


def test_locality_is_the_sum_over_stages_on_the_finer_grid() -> None:
    term = component.build("objectives", "locality", {})
    _, student, teacher = connected(term, vit(12), cnn(3))  # grids of 4, and of 8, 4 and 2
    assert term.matched == [("b0", "s0"), ("b6", "s1"), ("b11", "s2")]
    convolutions = [module for module in term.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(1, 1)] * 3
    expected = torch.zeros(SIZE, dtype=torch.double)
    for (own, other), conv in zip(term.matched, convolutions, strict=True):
        assert conv.bias is not None
        x = torch.einsum("bchw,dc->bdhw", read(student, own), conv.weight[..., 0, 0])
        x = (x + conv.bias[:, None, None]).double()
        y = read(teacher, other).double()
        side = max(x.shape[2], y.shape[2])
        x, y = (F.interpolate(z, (side, side), mode="bilinear") for z in (x, y))
        expected += ((x - y) ** 2).flatten(1).mean(dim=1)
    torch.testing.assert_close(term(student, teacher, batch()).double(), expected)


def plain_vitkd(term: ViTKD, student: Outputs, teacher: Outputs, data: Batch) -> Tensor:
    first = torch.zeros(len(data.ids), dtype=torch.double)
    for i in range(2):
        linear = term.channels[i]
        x = F.linear(read(student, f"b{i}").movedim(1, -1), linear.weight[..., 0, 0], linear.bias)
        first += ((x.movedim(-1, 1) - read(teacher, f"b{i}")).double() ** 2).sum(dim=(1, 2, 3))
    seen = term.channels[2](read(student, "b5"))
    hidden = hidden_cells(data, (4, 4), masked=0.5)
    rows = []
    for b, mask in enumerate(hidden):
        grid = seen[b].clone()
        for i, j in mask[0].nonzero().tolist():
            grid[:, i, j] = term.mask[:, 0, 0]
        wide, _, narrow = term.generate
        guess = narrow(wide(grid[None]).clamp_min(0))[0]
        error = (guess - read(teacher, "b5")[b]).double() ** 2
        rows.append(sum(error[:, i, j].sum() for i, j in mask[0].nonzero().tolist()))
    return 3e-5 * first + 3e-6 / 0.5 * torch.stack([torch.as_tensor(row) for row in rows])


def test_vitkd_mimics_two_blocks_and_generates_what_is_hidden_of_the_last() -> None:
    term = ViTKD()
    _, student, teacher = connected(term, vit(6), vit(6, name="large"))
    nn.init.normal_(term.mask)
    data = batch()
    expected = plain_vitkd(term, student, teacher, data)
    found = term(student, teacher, data)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.sum().backward()
    assert term.mask.grad is not None
    assert term.mask.grad.abs().sum() > 0
    assert student.features is not None
    gradient = student.features["b5"].grad
    assert gradient is not None
    hidden = hidden_cells(data, (4, 4), masked=0.5).expand_as(gradient)
    assert not gradient[hidden].any()
    assert gradient[~hidden].any()


def test_half_the_cells_are_hidden_others_in_every_view() -> None:
    views = [hidden_cells(batch(50, view=view), (7, 5), masked=0.5) for view in range(40)]
    for hidden in views:
        assert hidden.shape == (50, 1, 7, 5)
        assert (hidden.sum(dim=(1, 2, 3)) == 18).all()
    often = torch.stack(views).float().mean(dim=(0, 1))
    assert (often - 18 / 35).abs().max() < 0.06
    order = torch.randperm(50)
    moved = hidden_cells(batch(50).rows(order), (7, 5), masked=0.5)
    assert torch.equal(moved, views[0][order])
    assert not hidden_cells(batch(), (7, 5), masked=0.0).any()
    assert hidden_cells(batch(), (7, 5), masked=1.0).all()


def test_vitkd_reads_the_norm_behind_the_last_block() -> None:
    student = vit(6)
    norm = student.blocks[-1]._replace(name="norm")
    term = ViTKD()
    term.connect(pair(student._replace(sites=student.sites | {"norm": norm}), vit(6)))
    assert term.reads == (("b0", "b1", "norm"), ("b0", "b1", "b5"))


@pytest.mark.parametrize("sides", [(cnn(4), vit(6)), (vit(6), cnn(4)), (vit(6), vit(2))])
def test_vitkd_refuses_what_is_no_row_of_blocks(sides: tuple[Anatomy, Anatomy]) -> None:
    objective = Objective({"vitkd": ViTKD()}, {})
    with pytest.raises(IncompatibleError, match="equal blocks") as caught:
        objective.connect(sides[0], [sides[1]], num_classes=3, samples=torch.arange(3))
    assert f"student {sides[0].model}, teacher {sides[1].model}" in str(caught.value)


def test_review_mixes_the_later_stages_into_the_earlier() -> None:
    """The attention based fusion of the paper, on grids that halve."""
    term = Review(width=5)
    _, student, teacher = connected(term, cnn(3), cnn(3, name="teacher"))
    mixed, expected = torch.zeros(0), torch.zeros(SIZE, dtype=torch.double)
    for i, fusion in zip((2, 1, 0), term.fusions, strict=True):
        conv, norm = fusion.enter
        x = F.group_norm(F.conv2d(read(student, f"s{i}"), conv.weight), 1, norm.weight, norm.bias)
        if i < 2:
            later = mixed.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            z = F.conv2d(torch.cat([x, later], dim=1), fusion.weigh.weight, fusion.weigh.bias)
            x = x * z[:, 0:1].sigmoid() + later * z[:, 1:2].sigmoid()
        mixed = x
        conv, norm = fusion.leave
        shown = F.group_norm(F.conv2d(x, conv.weight, padding=1), 1, norm.weight, norm.bias)
        d = (shown - read(teacher, f"s{i}")).double()  # pooling is linear
        side, total, weight = d.shape[2], d.square().mean(dim=(1, 2, 3)), 1.0
        assert side == 8 // 2**i
        while side > 1:
            side, weight = side // 2, weight / 2
            total += weight * F.avg_pool2d(d, d.shape[2] // side).square().mean(dim=(1, 2, 3))
        expected += total / (2 - weight)
    found = term(student, teacher, batch()).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ofa_adds_up_the_logits_and_an_answer_of_every_stage() -> None:
    term = OFA(epsilon=1.4)
    _, student, _ = connected(term, cnn(4), Anatomy("teacher", 0, False, {}, (), (), ()))
    assert term.reads == (("s0", "s1", "s2", "s3"), ())
    told, data = Outputs(torch.randn(SIZE, CLASSES)), batch()  # as out of a cache
    answers = [student.logits, *(term.heads[i](read(student, f"s{i}")) for i in range(4))]
    assert all(z.shape == (SIZE, CLASSES) for z in answers)
    losses = [ofa_loss(z, told.logits, data.labels.argmax(1), epsilon=1.4) for z in answers]
    torch.testing.assert_close(term(student, told, data), torch.stack(losses).sum(dim=0))


def test_of_mixed_labels_the_larger_is_ofas() -> None:
    """With a weight below 0 the loss would fall without end."""
    term = OFA(epsilon=2.0)
    _, student, _ = connected(term, cnn(2), vit(3))
    told, data = Outputs(torch.tensor([[9.0, 0.0, -9.0]]).repeat(SIZE, 1)), batch()
    mixed = data._replace(labels=0.6 * data.labels + 0.4 * data.labels.roll(1, 1))
    assert torch.equal(term(student, told, mixed), term(student, told, data))
    away = student._replace(logits=-1e3 * mixed.labels)
    assert (term(away, told, mixed) > 0).all()


@pytest.mark.parametrize("anchors", [4, 128])
def test_rkd_weighs_distances_of_all_and_angles_of_some(anchors: int) -> None:
    term = RKD(anchors=anchors)
    student, teacher = vit(3), cnn(2)
    own, other = (outputs(side, ("pooled",), 12) for side in (student, teacher))
    found = term(own, other, batch(12))
    s, t = read(own, "pooled"), read(other, "pooled")
    rest = (found - 25 * distance_loss(s, t)).item()
    if anchors == 128:
        assert rest == pytest.approx(float(50 * angle_loss(s, t)), rel=1e-4)
    alone = RKD(distance=0, anchors=anchors)
    loss = alone(own, other, batch(12))
    assert loss.item() == pytest.approx(rest, rel=1e-3)
    loss.backward()
    assert own.features is not None
    gradient = own.features["pooled"].grad
    assert gradient is not None
    assert int(gradient.any(dim=1).sum()) == min(anchors, 12)


def test_every_image_is_an_anchor_in_some_views() -> None:
    """Not those with the least ids, which in a folder of classes would be the first classes."""
    term, counts = RKD(distance=0, anchors=4), torch.zeros(12)
    for view in range(60):
        own, other = (outputs(side, ("pooled",), 12) for side in (vit(3), cnn(2)))
        term(own, other, batch(12, view=view)).backward()
        assert own.features is not None
        gradient = own.features["pooled"].grad
        assert gradient is not None
        counts += gradient.any(dim=1)
    assert counts.sum() == 4 * 60
    assert counts.min() > 8
    assert counts.max() < 35


def test_infonce_compares_what_two_learned_heads_give() -> None:
    term = InfoNCE(dim=7, temperature=0.2)
    _, student, teacher = connected(term, vit(3), cnn(2))
    u, v = term.own(read(student, "pooled")), term.other(read(teacher, "pooled"))
    assert u.shape == v.shape == (SIZE, 7)
    found = term(student, teacher, batch())
    torch.testing.assert_close(found, infonce_loss(u, v, temperature=0.2))
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())


@pytest.mark.parametrize("layers", ["last2", "all"])
def test_the_locality_penalty_leaves_out_tokens_in_front(layers: str) -> None:
    term = component.build("objectives", "locality_penalty", {"layers": layers})
    student = vit(6, side=3, prefix=2)
    term.connect(Pair(student, None, CLASSES, torch.arange(SIZE)))
    blocks = range(6) if layers == "all" else (4, 5)
    assert term.reads == (tuple(f"b{i}@attention" for i in blocks), ())
    told = outputs(student, term.reads.student)
    cells = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    squared = torch.cdist(cells, cells).square()
    expected = torch.zeros(SIZE)
    for tap in term.reads.student:
        rows = read(told, tap)[:, :, 2:, 2:]
        rows = rows / rows.sum(dim=-1, keepdim=True)
        expected += locality_penalty_loss(rows, squared) / len(term.reads.student)
    torch.testing.assert_close(term(told, None, batch()), expected)


def test_a_student_without_attention_cannot_be_local_by_penalty() -> None:
    objective = Objective({"locality_penalty": LocalityPenalty()}, {})
    with pytest.raises(IncompatibleError, match="student cnn"):
        objective.connect(cnn(4), [vit(3)], num_classes=3, samples=torch.arange(3))


def test_the_more_the_locality_penalty_counts_the_nearer_a_student_looks(tmp_path: Path) -> None:
    distances = []
    for weight in (0.0, 0.3, 10.0):
        network, images = learned(tmp_path, "locality_penalty", weight)
        term = LocalityPenalty()
        term.connect(Pair(network.anatomy(), None, 10, torch.arange(1)))
        network.tap(list(term.reads.student))
        with torch.no_grad():
            distances.append(float(term(network(images), None, batch()).mean()))
    assert distances[0] > distances[1] > distances[2]

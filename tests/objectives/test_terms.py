"""What every term keeps, found by being there: a new file in `distill/objectives` is tested."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distill import component
from distill.objectives._term import Term
from distill.types import Anatomy, AttentionSite, Batch, Outputs, Pair, Site

TERMS = sorted(component.find("objectives"))
CLASSES = (2, 3, 10)
LABELS = ("one-hot", "mixed")
SAMPLES = 40  # in the made-up training set

# Terms whose least value is not 0, or not where the student's logits are the teacher's.
ELSEWHERE = {
    "nkd": "at agreement it is the teacher's entropy, and not 0",
    "tfkd": "its teacher is made up",
    "token": "it reads another head than the logits'",
    "ttm": "the teacher alone is softened: best are gamma times its logits",
    "wttm": "the teacher alone is softened: best are gamma times its logits",
}


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def anatomy(name: str, classes: int, *, channels: tuple[int, int], heads: int) -> Anatomy:
    """A made-up network: two stages, equal blocks at the second's stride, and attention in them."""
    first = Site("first", channels[0], (8, 8), 4.0, 0.3, 0)
    blocks = [Site(f"b{i}", channels[1], (4, 4), 8.0, 0.4 + 0.1 * i, 1) for i in range(6)]
    last = Site("last", channels[1], (4, 4), 8.0, 1.0, 1)
    attention = [AttentionSite(f"b{i}@attention", heads, (4, 4), (4, 4), 1, 0.4) for i in range(6)]
    sites = {site.name: site for site in (first, *blocks, last)}
    return Anatomy(name, classes, True, sites, (first, last), tuple(blocks), tuple(attention))


STUDENT, TEACHER = {"channels": (4, 6), "heads": 2}, {"channels": (5, 8), "heads": 3}


def build(name: str, classes: int = 10, *, alike: bool = False, **arguments: Any) -> Term:
    """A term between two made-up networks, which differ unless they are to be `alike`."""
    term = component.build("objectives", name, arguments)
    assert isinstance(term, Term)
    student = anatomy("student", classes, **STUDENT)
    teacher = anatomy("teacher", classes, **(STUDENT if alike else TEACHER))
    term.connect(Pair(student, teacher, classes, torch.arange(SAMPLES)))
    return term


def batch(size: int, classes: int, labels: str = "one-hot") -> Batch:
    y = torch.eye(classes)[torch.arange(size) % classes]
    if labels == "mixed":
        y = 0.7 * y + 0.3 * y.roll(1, 0)
    ids = torch.arange(size)
    return Batch(torch.rand(size, 3, 32, 32), y, ids, torch.zeros_like(ids))


def logits(size: int, classes: int, scale: float = 3.0) -> Tensor:
    return torch.randn(size, classes) * scale


def spread(z: Tensor, *shape: int) -> Tensor:
    """Values (B, *shape) that follow from the logits alone, each logit counting in all of them."""
    count = torch.tensor(shape).prod()
    angles = torch.arange(z.shape[1] * int(count), dtype=z.dtype).reshape(z.shape[1], -1)
    return (z @ (1 + angles).sin()).unflatten(1, shape)


def outputs(taps: tuple[str, ...], network: Anatomy, z: Tensor) -> Outputs:
    """The logits, and features that follow from them for every tap."""
    features = {}
    attention = {site.name: site for site in network.attention}
    for tap in taps:
        if tap == "pooled":
            features[tap] = z
        elif tap == "token":
            features[tap] = z.flip(1)
        elif tap in attention:
            tokens = attention[tap].prefix + 16
            maps = spread(z, attention[tap].heads, tokens, tokens)
            features[tap] = maps.softmax(dim=-1)
        else:
            name, _, prefix = tap.partition("@")
            site = network.sites[name]
            shape = (site.prefix, site.channels) if prefix else (site.channels, *site.grid)
            features[tap] = spread(z, *shape)
    again = Outputs(z.roll(1, 1), {"pooled": z.roll(1, 1)})  # of what a term shows besides
    return Outputs(z, features or None, again=again)


def loss(
    term: Term, student: Tensor, teacher: Tensor, data: Batch, *, alike: bool = False
) -> Tensor:
    own = anatomy("student", student.shape[1], **STUDENT)
    other = anatomy("teacher", student.shape[1], **(STUDENT if alike else TEACHER))
    return term(
        outputs(term.reads.student, own, student), outputs(term.reads.teacher, other, teacher), data
    )


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_finite_however_large_the_logits(
    name: str, classes: int, labels: str
) -> None:
    term, data = build(name, classes), batch(6, classes, labels)
    signs = torch.where(torch.rand(6, classes) < 0.5, -1.0, 1.0)
    constant = torch.zeros(6, classes)
    cases = [logits(6, classes), 1e4 * signs, -1e4 * signs, constant, constant + 1e4]
    for student in cases:
        for teacher in cases:
            z = student.clone().requires_grad_()
            value = loss(term, z, teacher, data)
            assert value.shape in ((6,), ())
            assert value.dtype == torch.float32
            value.mean().backward()
            assert value.isfinite().all()
            assert z.grad is not None
            assert z.grad.isfinite().all()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_the_student_gets_a_gradient_and_the_teacher_none(name: str, classes: int) -> None:
    term, data = build(name, classes), batch(8, classes, "mixed")
    student = logits(8, classes).requires_grad_()
    teacher = logits(8, classes).requires_grad_()
    loss(term, student, teacher, data).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None or not teacher.grad.any()


@pytest.mark.parametrize("name", TERMS)
def test_a_term_that_needs_no_teacher_works_without_one(name: str) -> None:
    term, data = build(name, 3), batch(4, 3)
    z = logits(4, 3)
    student = outputs(term.reads.student, anatomy("student", 3, **STUDENT), z)
    if term.needs_teacher:
        with pytest.raises(AssertionError):
            term(student, None, data)
    else:
        assert torch.equal(term(student, None, data), term(student, Outputs(logits(4, 3)), data))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_the_batch_does_not_matter(name: str, labels: str) -> None:
    term, data = build(name, 5), batch(12, 5, labels)
    again = copy.deepcopy(term)  # a term may keep what it has seen
    student, teacher = logits(12, 5), logits(12, 5)
    order = torch.randperm(12)
    moved = data.rows(order)
    value = loss(term, student, teacher, data)
    found = loss(again, student[order], teacher[order], moved)
    torch.testing.assert_close(found, value[order] if value.ndim else value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_agreement_is_a_minimum(name: str, classes: int) -> None:
    """At the teacher's own logits no small step is better, for terms that compare the two."""
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    term, data = build(name, classes, alike=True), batch(12, classes)
    if not (term.needs_teacher or term.needs_labels):
        pytest.skip("it compares the student with itself")
    if any(p.requires_grad for p in term.parameters()):
        pytest.skip("what it learns stands between the two")
    # Sure of the label, so that a term that also reads labels, or only the first class, agrees.
    teacher = 30 * data.labels
    best = loss(term, teacher, teacher, data, alike=True).mean()
    for _ in range(20):
        student = teacher + logits(12, classes, 5.0)
        other = loss(term, student, teacher, data, alike=True).mean()
        assert other >= best - 1e-5
    assert best.abs() < 1e-4


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", TERMS)
def test_bf16_logits_give_the_value_of_their_float32_copies(name: str, labels: str) -> None:
    term, data = build(name), batch(8, 10, labels)
    again = copy.deepcopy(term)
    student = outputs(term.reads.student, anatomy("student", 10, **STUDENT), logits(8, 10))
    teacher = outputs(term.reads.teacher, anatomy("teacher", 10, **TEACHER), logits(8, 10))
    halves, copies = (
        [tree_map_only(Tensor, change, side) for side in (student, teacher)]
        for change in (Tensor.bfloat16, lambda x: x.bfloat16().float())
    )
    found = term(*halves, data)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, again(*copies, data))


@pytest.mark.parametrize("name", TERMS)
def test_compiled_without_a_break_it_is_the_same(name: str) -> None:
    term, data = build(name), batch(8, 10, "mixed")
    again = copy.deepcopy(term)  # a term may keep what it has seen
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    values, gradients = [], []
    z = logits(8, 10)
    told = outputs(term.reads.teacher, anatomy("teacher", 10, **TEACHER), logits(8, 10))
    for forward in (term, compiled):
        student = outputs(term.reads.student, anatomy("student", 10, **STUDENT), z)
        student = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), student)
        value = forward(student, told, data)
        value.sum().backward()
        values.append(value.detach())
        leaves = [x for x in tree_leaves(student) if isinstance(x, Tensor)]
        gradients.append([x.grad for x in leaves if x.grad is not None])
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TERMS)
def test_one_image_is_enough(name: str) -> None:
    value = loss(build(name, 4), logits(1, 4), logits(1, 4), batch(1, 4))
    assert value.isfinite().all()


class _NoQuestions(TorchDispatchMode):
    """Refuses what would wait for a device: its values on the host, or the host's on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        masks = [x for x in tree_leaves(args[1:]) if getattr(x, "dtype", None) == torch.bool]
        asks = name in WAITING or (name.startswith("index") and masks)
        assert not asks, f"{name} waits for the device, and cannot be recorded"
        return func(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "equal"}


@pytest.mark.parametrize("name", TERMS)
def test_a_step_asks_the_device_nothing(name: str) -> None:
    term, data = build(name), batch(6, 10, "mixed")
    student, teacher = logits(6, 10).requires_grad_(), logits(6, 10)
    term.set_progress(0.5)
    own, other = anatomy("student", 10, **STUDENT), anatomy("teacher", 10, **TEACHER)
    told = outputs(term.reads.student, own, student), outputs(term.reads.teacher, other, teacher)
    with _NoQuestions():
        if term.shows:
            term.show(data)
        term(*told, data).mean().backward()


def test_a_question_would_be_noticed() -> None:
    for ask in (lambda x: float(x[0]), lambda x: x[x > 0], lambda x: torch.tensor([1.0]) + x):
        with _NoQuestions(), pytest.raises(AssertionError, match="waits for the device"):
            ask(torch.ones(3))

"""Any network learns from what is inside of any other, and a pair that cannot is told so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from distill import component
from distill.engine import optim
from distill.engine.step import Distiller, train_step
from distill.errors import IncompatibleError
from distill.models.grids import Size
from distill.models.network import Network
from distill.models.weights import fingerprint, to_bytes
from distill.objectives import Objective
from distill.recipe import Optimizer
from distill.teacher import Live
from distill.types import Anatomy, Batch, Outputs
from tests.models import made
from tests.models.made import ATTENDING, CLASSES, CNNS, FAMILIES, OTHERS, SQUARE, WIDE

TERMS = ("kd", "similarity", "features", "attention", "guidance")


def ring(families: Sequence[str], step: int) -> list[tuple[str, str]]:
    """Each family once as student and once as teacher, (student, teacher)."""
    return [(one, families[(i + step) % len(families)]) for i, one in enumerate(families)]


def two_by_two(*groups: Sequence[str]) -> Iterator[str]:
    """Two of one group, two of the next and so on, so that neighbours pair up in all ways."""
    left = [list(group) for group in groups]
    while any(left):
        for group in left:
            yield from group[:2]
            del group[:2]


EVERY = list(two_by_two(list(CNNS), [*ATTENDING, *OTHERS]))
PAIRS = [(*pair, SQUARE) for pair in ring(EVERY, 1)]
PAIRS += [(*pair, WIDE) for pair in ring([m for m in EVERY if m not in made.SQUARE_ONLY], step=3)]
CROSS = [
    pytest.param(one, two, SQUARE, marks=pytest.mark.soak)
    for one, two in product(EVERY, EVERY)
    if (one, two, SQUARE) not in PAIRS
]


def batch(image: Size, count: int = 2) -> Batch:
    ids = torch.arange(count)
    labels = torch.eye(CLASSES)[ids % CLASSES]
    return Batch(made.images(image, count), labels, ids, torch.zeros_like(ids))


def objective(*terms: str, **arguments: Any) -> Objective:
    built = {name: component.build("objectives", name, arguments) for name in terms}
    return Objective(built, dict.fromkeys(terms, 1.0))


def connect(built: Objective, student: Anatomy, teacher: Anatomy) -> None:
    built.connect(student, [teacher], num_classes=CLASSES, samples=torch.arange(10))


def understood(student: Anatomy, teacher: Anatomy) -> tuple[str, ...]:
    """The terms that this pair has something for."""
    missing = set() if teacher.attention else {"attention", "guidance"}
    missing |= set() if student.attention else {"attention"}
    return tuple(name for name in TERMS if name not in missing)


def pair(
    student: Network, teacher: Network, terms: Sequence[str], image: Size, **arguments: Any
) -> tuple[Distiller, Live]:
    """The two networks with all that is between them."""
    built = objective(*terms, **arguments)
    connect(built, student.anatomy(image), teacher.anatomy(image))
    student.tap(built.student_taps())
    teacher.tap(built.teacher_taps(0))
    student.train().requires_grad_(True)
    return Distiller(student, built), Live(teacher)


@torch.no_grad()
def otherwise(network: Network) -> Network:
    """With other weights."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


@cache
def untapped(model: str) -> set[str]:
    """The names of the backbone's weights, as they are without anything from here."""
    with torch.device("meta"):
        return set(made.backbone(model, SQUARE, **FAMILIES[model]).state_dict())


def stem(network: Network) -> Tensor:
    """The first layer's kernels."""
    return next(m.weight for m in network.backbone.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("student", "teacher", "image"), [*PAIRS, *CROSS])
def test_every_pair(student: str, teacher: str, image: Size) -> None:
    own = made.shared(student, image)
    alike = student == teacher
    other = otherwise(made.network(teacher, image)) if alike else made.shared(teacher, image)
    terms = understood(own.anatomy(image), other.anatomy(image))
    before = fingerprint(other)
    distiller, live = pair(own, other, terms, image)
    data = batch(image)
    losses = distiller(data, live(data), dict.fromkeys(terms, 1.0))
    assert list(losses.parts) == list(terms)
    for name, part in losses.parts.items():
        assert part.isfinite(), name
        (gradient,) = torch.autograd.grad(part, stem(own), retain_graph=True, allow_unused=True)
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    assert fingerprint(other) == before
    assert not other.training
    names = {f"backbone.{name}" for name in untapped(student)}
    assert set(own.state_dict()) == names
    optimizer = optim.build(distiller, Optimizer(lr=1e-3))
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in distiller.parameters()}
    learned = list(distiller.objective.parameters())
    assert len(learned) >= 4  # a norm and a kernel with biases, at least
    assert not {id(p) for p in learned} & {id(p) for p in own.parameters()}
    for name in ("attention", "guidance"):
        if name not in terms:
            refused(name, own.anatomy(image), other.anatomy(image))


def refused(term: str, student: Anatomy, teacher: Anatomy) -> None:
    with pytest.raises(IncompatibleError) as error:
        connect(objective(term), student, teacher)
    said = str(error.value)
    assert said.startswith(f"objective: {term}: ")
    assert f"(student {student.model}, teacher {teacher.model})" in said
    lacking = teacher if not teacher.attention and term == "guidance" else student
    lacking = lacking if not lacking.attention else teacher
    assert f"{lacking.model} has no attention maps" in said
    assert error.value.hint


def test_the_pairs_are_of_all_kinds() -> None:
    timm = {name for name in EVERY if name.startswith("timm/")}
    assert len(timm) >= 20
    for image, families in ((SQUARE, EVERY), (WIDE, set(EVERY) - set(made.SQUARE_ONLY))):
        chosen = [(one, two) for one, two, size in PAIRS if size == image]
        assert {one for one, _ in chosen} == {two for _, two in chosen} == set(families)
        kinds = {(one in CNNS, two in CNNS) for one, two in chosen}
        assert kinds == set(product((True, False), repeat=2))
        assert any(one in ATTENDING and two in ATTENDING for one, two in chosen)


def test_a_network_without_grids_is_refused_before_anything_runs() -> None:
    student = made.network("timm/resnet10t").anatomy()
    with torch.device("meta"):
        hiera = made.network("timm/hiera_tiny_224", (224, 224)).anatomy((224, 224))
    for pairing in ((student, hiera), (hiera, student)):
        with pytest.raises(IncompatibleError, match="hiera_tiny_224 has no grids") as error:
            connect(objective("features"), *pairing)
        one, two = (side.model for side in pairing)
        assert f"(student {one}, teacher {two})" in str(error.value)
        assert "pooled" in str(error.value.hint)
        connect(objective("kd", "similarity"), *pairing)


VIT, RESNET = "timm/vit_tiny_patch16_224", "timm/resnet10t"


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (RESNET, "timm/convnext_atto"),
        (RESNET, VIT),
        ("timm/deit_tiny_distilled_patch16_224", RESNET),
        ("timm/deit_tiny_distilled_patch16_224", "timm/swin_tiny_patch4_window7_224"),
    ],
)
def test_every_term_in_every_direction(student: str, teacher: str) -> None:
    """It teaches the first layer something, or says at once for whom it has nothing."""
    own, other = made.shared(student), made.shared(teacher)
    data = batch(SQUARE, 4)
    taught, said = [], {}
    for name in component.find("objectives"):
        try:
            distiller, live = pair(own, other, (name,), SQUARE)
        except IncompatibleError as error:
            said[name] = str(error)
            continue
        loss = distiller(data, live(data), {name: 1.0}).total
        assert loss.isfinite(), name
        (gradient,) = torch.autograd.grad(loss, stem(own), allow_unused=True)
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        taught.append(name)
    assert set(taught) >= {"ce", *understood(own.anatomy(), other.anatomy())}
    for name, sentence in said.items():
        assert sentence.startswith(f"objective: {name}: timm/")
        assert f"(student {student}" in sentence


@cache
def deep_vit() -> Network:
    return made.network(VIT, depth=12, embed_dim=48)


@pytest.mark.parametrize(
    ("stages", "projector"),
    [("penultimate", "mlp"), ("last2", "conv"), ("lg", "attention"), ("all", "orthogonal")],
)
def test_projectors_and_stages(stages: str, projector: str) -> None:
    own, other = deep_vit(), made.shared(RESNET)
    terms = ("features",)
    distiller, live = pair(own, other, terms, SQUARE, stages=stages, projector=projector)
    (term,) = distiller.objective.terms.values()
    count = {"penultimate": 1, "last2": 2, "lg": 3, "all": 4}[stages]
    assert len(term.matched) == count
    assert len(set(term.matched)) == len({one for one, _ in term.matched}) == count
    data = batch(SQUARE)
    losses = distiller(data, live(data), {"features": 1.0})
    losses.total.backward()
    for name, parameter in distiller.objective.named_parameters():
        assert parameter.grad is not None, name
    gradient = stem(own).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    own.zero_grad()


def test_pairs_that_are_named() -> None:
    named = [["blocks.0", "layer2"], ["blocks.3", "layer4"]]
    own, other = made.network(VIT), made.network(RESNET)
    distiller, live = pair(own, other, ("features",), SQUARE, pairs=named)
    data = batch(SQUARE)
    told = live(data)
    assert told.features is not None
    assert told.features.keys() == {"layer2", "layer4"}
    assert distiller(data, told, {"features": 1.0}).total > 0
    with pytest.raises(IncompatibleError, match="resnet10t has no module 'layer9'"):
        connect(
            objective("features", pairs=[["blocks.0", "layer9"]]), own.anatomy(), other.anatomy()
        )


def test_clipping_and_weights_take_projectors_along_and_the_file_does_not() -> None:
    limit, rate = 0.01, 1.0
    own, other = made.network(VIT), made.network(RESNET)
    distiller, live = pair(own, other, ("features", "similarity"), SQUARE)
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    optimizer = optim.build(distiller, Optimizer(name="sgd", lr=rate, momentum=0.0))
    weights = {"features": 1.0, "similarity": 1.0}
    train_step(distiller, live, optimizer, batch(SQUARE), weights=weights, clip_norm=limit)
    moves = {name: p.detach() - before[name] for name, p in distiller.named_parameters()}
    whole = torch.cat([move.flatten() for move in moves.values()]).norm()
    assert float(whole) == pytest.approx(rate * limit, rel=1e-3)
    projectors = {name: move for name, move in moves.items() if "bridges" in name}
    assert len(projectors) == 8  # two sites: a norm and a kernel, each with a bias
    assert all(move.abs().max() > 0 for move in projectors.values())
    # What is saved is the network alone, and says the same in one that was never tapped.
    written = load_tensors(to_bytes(own))
    assert set(written) == untapped(VIT)
    alone = made.network(VIT)
    alone.backbone.load_state_dict(written)
    images = made.images()
    with torch.no_grad():
        torch.testing.assert_close(alone(images).logits, own.eval()(images).logits)


def told(network: Network, taps: Sequence[str], data: Batch) -> Outputs:
    network.tap(taps)
    with torch.no_grad():
        outputs: Outputs = network.eval()(data.images)
    return outputs


@pytest.mark.parametrize("model", [VIT, "timm/swin_tiny_patch4_window7_224", RESNET])
def test_a_twin_has_nothing_to_learn(model: str) -> None:
    """Logits, relations and maps of the same network agree, and of others they do not."""
    one, two = made.network(model), made.network(model)
    anatomy = one.anatomy()
    terms = [name for name in understood(anatomy, anatomy) if name not in ("features", "guidance")]
    built = objective(*terms)
    connect(built, anatomy, two.anatomy())
    data = batch(SQUARE, 4)
    own = told(one, built.student_taps(), data)
    other = told(two, built.teacher_taps(0), data)
    parts = built(own, other, data, dict.fromkeys(terms, 1.0)).parts
    for name in terms:
        assert parts[name].abs() < 1e-6, name
    parts = built(told(otherwise(one), [], data), other, data, dict.fromkeys(terms, 1.0)).parts
    for name in terms:
        assert parts[name] > 1e-6, name


def test_a_teacher_may_see_larger_images() -> None:
    """Each grid is that of the network's own images; they meet on the coarser one."""
    image, larger = SQUARE, (96, 96)
    own, other = made.network(RESNET, image), made.network(VIT, larger)
    other.input_size = 96
    built = objective("features", "attention" if own.anatomy().attention else "guidance")
    connect(built, own.anatomy(image), other.anatomy(larger))
    assert {site.grid for site in other.anatomy().blocks} == {(6, 6)}
    data = batch(image)
    outputs = told(other, built.teacher_taps(0), data)
    assert outputs.features is not None
    shapes = {tuple(f.shape[-2:]) for f in outputs.features.values()}
    assert shapes == {(6, 6), (37, 37)}
    own.tap(built.student_taps())
    losses = built(own(data.images), outputs, data, {"features": 1.0, "guidance": 1.0})
    assert losses.total.isfinite()


def test_several_teachers_and_one_that_is_named() -> None:
    student = made.network(RESNET)
    teachers = [made.network("timm/convnext_atto"), made.network(VIT)]
    anatomies = [teacher.anatomy() for teacher in teachers]
    ids = torch.arange(10)
    with pytest.raises(IncompatibleError, match="and there are 2") as error:
        objective("features").connect(student.anatomy(), anatomies, num_classes=5, samples=ids)
    assert error.value.hint == "name it: {term: features, teacher: 0}"
    terms = {"features": component.build("objectives", "features", {})}
    second = Objective(terms, {"features": 1.0}, {"features": 1})
    second.connect(student.anatomy(), anatomies, num_classes=5, samples=ids)
    assert second.teacher_taps(0) == []
    assert second.teacher_taps(1) == ["blocks.2", "blocks.3"]

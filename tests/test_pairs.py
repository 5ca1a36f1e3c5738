"""Any two networks make a pair: nothing is configured but their names."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from distill import models, recipe, yamlio
from distill.engine import machine, session
from distill.engine.preflight import rehearse
from distill.engine.session import Session
from distill.engine.step import Step, train_step
from distill.engine.train import train
from distill.errors import IncompatibleError, Stopped
from distill.models.weights import load, to_bytes
from distill.recipe import Recipe
from distill.types import Outputs
from tests.engine import processes

SIZE = 64  # pixels
CLASSES = ("ant", "bee", "cat")

# One small member of a family each, by whether it is convolutional.
CNNS = {
    "resnet": "timm/resnet10t",
    "convnext": "timm/convnext_atto",
    "mobilenetv3": "timm/mobilenetv3_small_050",
    "efficientnet": "timm/efficientnet_lite0",
}
OTHERS = {
    "vit": "timm/vit_tiny_patch16_224",
    "swin": "timm/swin_tiny_patch4_window7_224",
    "mixer": "timm/mixer_s32_224",
    "deit": "timm/deit_tiny_distilled_patch16_224",
}


class Own(nn.Module):
    """A network that a user wrote."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, kernel_size=7, stride=4)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).relu().mean(dim=(2, 3)))
        return logits


def own(num_classes: int, image_size: int) -> nn.Module:
    """A model that a recipe names as `tests.test_pairs:own`."""
    return Own(num_classes)


# Each family teaches and learns; a CNN and a transformer stand on either side of each other.
PAIRS = [
    (CNNS["resnet"], OTHERS["vit"]),
    (OTHERS["vit"], CNNS["resnet"]),
    (CNNS["convnext"], OTHERS["mixer"]),
    (OTHERS["mixer"], CNNS["mobilenetv3"]),
    (CNNS["mobilenetv3"], CNNS["convnext"]),
    (OTHERS["swin"], CNNS["efficientnet"]),
    (CNNS["efficientnet"], OTHERS["deit"]),
    (OTHERS["deit"], OTHERS["swin"]),
    ("torchvision/resnet18", "tests.test_pairs:own"),
    ("tests.test_pairs:own", "torchvision/resnet18"),
    ("resnet8", OTHERS["vit"]),
]
EVERY = [*CNNS.values(), *OTHERS.values(), "torchvision/resnet18", "tests.test_pairs:own"]
PAIRS += [
    pytest.param(teacher, student, marks=pytest.mark.soak)  # type: ignore[misc]
    for teacher in EVERY
    for student in EVERY
    if (teacher, student) not in PAIRS
]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, each of another colour: eight images to learn, three to test."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for channel, label in enumerate(CLASSES):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 128, (SIZE, SIZE + 8, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of a model's weights, as another run would have left it: here the initial ones."""
    folder = tmp_path_factory.mktemp("weights")
    data: dict[str, Any] = {"classes": CLASSES, "image_size": SIZE}
    data |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    @cache
    def file(model: str) -> Path:
        torch.manual_seed(0)  # as a run with the default seed begins
        network = models.build_student(recipe.Model(model=model, weights=None), **data)
        path = folder / f"{model.replace('/', '-').replace(':', '-')}.safetensors"
        path.write_bytes(to_bytes(network))
        return path

    return file


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_epoch_with_no_more_than_two_names(
    teacher: str, student: str, pictures: Path, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = {
        "data": {"name": "folder", "root": str(pictures), "image_size": SIZE},
        "teachers": [{"model": teacher, "weights": str(weights(teacher))}],
        "student": {"model": student},
        "objective": [{"term": "ce", "weight": 0.5}, {"term": "kd", "weight": 0.5}],
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 12},
    }
    (tmp_path / "recipe.yaml").write_text(yamlio.dump(spec))
    before = weights(teacher).read_bytes()
    result = train(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run", workers=0)
    assert (result.student, result.teachers[0]["model"]) == (student, teacher)
    assert result.steps == 2
    assert math.isfinite(result.nll)
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["kd"] > 0 or student == teacher
    assert weights(teacher).read_bytes() == before
    learned = load(tmp_path / "run", vouched=[student])
    assert learned.classes == CLASSES
    initial = safetensors.torch.load_file(weights(student))
    assert learned.backbone.state_dict().keys() == initial.keys()
    moved = [not p.equal(initial[name]) for name, p in learned.backbone.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


SMALL = {"model": "vit", "width": 24, "depth": 3, "heads": 3, "patch_size": 16}
FEATURES = {"term": "features", "weight": 0.5}
Write = Callable[..., Recipe]


@pytest.fixture
def write(pictures: Path, weights: Callable[[str], Path], tmp_path: Path) -> Write:
    """A recipe for a small transformer with these teachers and terms."""

    def make(
        teachers: list[dict[str, Any]], *terms: dict[str, Any], **sections: dict[str, Any]
    ) -> Recipe:
        spec = {
            "data": {"name": "folder", "root": str(pictures), "image_size": SIZE},
            "teachers": [{"weights": str(weights(t["model"])), **t} for t in teachers],
            "student": SMALL,
            "objective": [{"term": "ce", "weight": 0.5}, *terms],
            "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
            "train": {"epochs": 1, "batch_size": 12, "ema": 0.9},
        }
        (tmp_path / "recipe.yaml").write_text(yamlio.dump(spec | sections))
        return Recipe.load(tmp_path / "recipe.yaml")

    return make


@contextmanager
def prepared(of: Recipe, path: Path) -> Iterator[Session]:
    found = session.prepare(of, path, machine.setup(workers=0))
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize(
    ("term", "student", "lacking"),
    [
        ("attention", SMALL, "resnet8"),
        ("attention", {"model": CNNS["resnet"]}, CNNS["resnet"]),
        ("guidance", SMALL, "resnet8"),
    ],
)
def test_a_pair_without_attention_is_refused_before_a_run(
    write: Write, tmp_path: Path, term: str, student: dict[str, Any], lacking: str
) -> None:
    wrong = write([{"model": "resnet8"}], {"term": term}, student=student)
    for attempt in (rehearse, train):
        with pytest.raises(IncompatibleError) as refused:
            attempt(wrong, tmp_path / "run")
        said = str(refused.value)
        assert said.startswith(f"objective: {term}: {lacking} has no attention maps")
        assert said.endswith(f"(student {student['model']}, teacher resnet8)")
        assert refused.value.hint
    assert not [path for path in (tmp_path / "run").glob("*") if path.name != ".lock"]


def test_what_stands_between_is_saved_on_the_way_and_left_behind(
    write: Write, tmp_path: Path
) -> None:
    both = write([{"model": CNNS["convnext"]}], FEATURES)
    result = train(both, tmp_path / "run", workers=0)
    assert result.steps == 2
    learned = load(tmp_path / "run")
    names = set(learned.backbone.state_dict())
    assert set(safetensors.torch.load_file(tmp_path / "run" / "student.safetensors")) == names
    assert not [name for name in names if "bridge" in name or "target" in name]
    (newest,) = (tmp_path / "run" / "checkpoint").glob("step-00000002")
    model, average = (
        safetensors.torch.load_file(newest / f"{part}.safetensors") for part in ("model", "ema")
    )
    between = {name for name in model if not name.startswith("student.")}
    assert {name.removeprefix("student.backbone.") for name in set(model) - between} == names
    kernels = [name for name in between if "bridges" in name and model[name].ndim == 4]
    assert sorted(model[name].shape[1] for name in kernels) == [24, 24]
    counts = [model[name] for name in between if name.endswith(".batches")]
    assert counts == [2, 2]  # what the teacher's features are standardised by
    assert not [name for name in average if "terms" in name]


def test_a_run_with_projectors_goes_on_as_if_it_had_not_stopped(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = write(
        [{"model": "tests.test_pairs:own"}],
        FEATURES | {"projector": "mlp"},
        {"term": "similarity", "weight": 10.0},
        student=SMALL | {"drop": 0.1},
        train={"epochs": 3, "batch_size": 12, "ema": 0.9},
    )
    train(three, tmp_path / "whole" / "run", workers=0)
    steps = 0

    def stopping(*parts: Any, **keys: Any) -> Step:
        nonlocal steps
        steps += 1
        if steps in (1, 4):
            signal.raise_signal(signal.SIGTERM)
        return train_step(*parts, **keys)

    monkeypatch.setattr("distill.engine.fit.train_step", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(three, tmp_path / "cut" / "run", workers=0)
    train(three, tmp_path / "cut" / "run", workers=0)
    assert steps == 6
    whole, cut = (processes.traces(tmp_path / part / "run") for part in ("whole", "cut"))
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors"} <= whole.keys()
    assert whole == cut


def test_of_several_teachers_one_is_named_whose_features_are_read(
    write: Write, tmp_path: Path
) -> None:
    several = [{"model": CNNS["convnext"]}, {"model": "resnet8"}]
    with pytest.raises(IncompatibleError, match=r"features reads .* and there are 2") as refused:
        rehearse(write(several, FEATURES), tmp_path / "run")
    assert refused.value.hint == "name it: {term: features, teacher: 0}"
    named = write(several, FEATURES | {"teacher": 1, "standardise": False})
    with prepared(named, tmp_path / "run") as ready:
        assert ready.teacher is not None
        term = ready.distiller.objective.terms["features"]
        batch = next(ready.loader.epoch(0))
        told = ready.teacher(batch)
        networks = [tutor.network for tutor in ready.tutors]
        assert networks[1] is not None
        grids = [site.name for site in networks[1].anatomy().stages]
        assert list(term.reads.teacher) == grids[-2:]
        assert told.members[0].features is None
        assert told.members[1].features is not None
        assert set(told.members[1].features) == set(grids[-2:])
        answer = ready.distiller.student(batch.images)

        def loss(outputs: Outputs) -> Tensor:
            parts = ready.distiller.objective(answer, outputs, batch, {"ce": 0.0, "features": 1.0})
            return parts.total.detach()

        first = loss(told)
        for i, matters in ((0, False), (1, True)):
            assert networks[i] is not None
            changed = copy.deepcopy(ready.teacher)
            with torch.no_grad():
                for parameter in changed.members[i].network.parameters():
                    parameter.mul_(1.5)
            assert torch.equal(loss(changed(batch)), first) is not matters


def test_a_teacher_is_shown_the_images_at_its_own_size(write: Write, tmp_path: Path) -> None:
    smaller = write([{"model": "resnet8", "input_size": 48}], FEATURES)
    rehearse(smaller, tmp_path / "run")
    with prepared(smaller, tmp_path / "run") as ready:
        (tutor,) = ready.tutors
        assert tutor.network is not None
        shown: list[torch.Size] = []
        tutor.network.backbone.register_forward_pre_hook(
            lambda _, given: shown.append(given[0].shape[-2:])
        )
        assert ready.teacher is not None
        batch = next(ready.loader.epoch(0))
        told = ready.teacher(batch)
        assert batch.images.shape[-1] == SIZE
        assert shown == [(48, 48)]
        assert told.features is not None
        assert {tuple(grid.shape[-2:]) for grid in told.features.values()} == {(24, 24), (12, 12)}
        weights = ready.distiller.objective.weights_at(0.5)
        assert ready.distiller(batch, told, weights).total.isfinite()

"""Classes are matched by name wherever they come from, or a sentence says that they do not match.

The images of a class have a colour of their own, so that it shows what an answer means.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill import models
from distill.data import datasets
from distill.data.datasets import Dataset
from distill.data.loader import evaluation_batches
from distill.engine import cached, finished
from distill.engine.networks import facts
from distill.engine.train import train
from distill.errors import DistillError
from distill.identity import require_same
from distill.models import weights
from distill.recipe import Data, Model, Recipe, Teacher
from tests.promises import Measured

CPU = torch.device("cpu")
COLOURS = {
    "ant": (255, 0, 0),
    "bee": (0, 255, 0),
    "caf\u00e9": (0, 0, 255),  # composed
    "dog": (255, 255, 0),
    "eel": (0, 255, 255),
}
NAMES = ("ant", "bee", "caf\u00e9", "dog")  # what the teacher knows, in its order
DECOMPOSED = "cafe\u0301"
COLOURS |= {"Ant": COLOURS["ant"], "ant ": COLOURS["ant"], DECOMPOSED: COLOURS["caf\u00e9"]}


def picture(name: str, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-30, 30, (8, 8, 3))
    pixels = np.clip(np.asarray(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def in_folders(root: Path, train: Sequence[str], test: Sequence[str] | None = None) -> Data:
    """A folder with these classes, of which the order is that of their names."""
    for split, names in (("train", train), ("test", train if test is None else test)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                (root / split / name / f"{i}.png").write_bytes(picture(name, i))
    return Data.model_validate({"name": "folder", "root": str(root), "image_size": 8})


def in_shards(root: Path, names: Sequence[str], *, listed: bool = True) -> Data:
    """Shards with these classes in this order."""
    root.mkdir(parents=True)
    for split in ("train", "test"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for number in range(8 * len(names)):
                label = number % len(names)
                parts = {"png": picture(names[label], number), "cls": str(label).encode()}
                for suffix, content in parts.items():
                    about = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
    if listed:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
    return Data.model_validate({"name": "webdataset", "root": str(root), "image_size": 8})


def in_rows(root: Path, names: Sequence[str]) -> Data:
    """Rows of the Hugging Face library."""
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(names))})
    labels = [i % len(names) for i in range(8 * len(names))]
    stored = [{"bytes": picture(names[y], i), "path": None} for i, y in enumerate(labels)]
    split = hf.Dataset.from_dict({"image": stored, "label": labels}, features=features)
    hf.DatasetDict(train=split, test=split).save_to_disk(str(root))
    return Data.model_validate({"name": "hf", "root": str(root), "image_size": 8})


def recipe(data: Data, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": data.model_dump(),
            "student": {"model": "resnet8"},
            "objective": [{"term": "ce"}],
            "optimizer": {"lr": 0.01, "name": "adamw"},
            "train": {"epochs": 12, "batch_size": 8},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a teacher that knows every one of the four colours."""
    folder = tmp_path_factory.mktemp("teacher")
    train(recipe(in_folders(folder / "photos", NAMES)), folder / "run", workers=0)
    assert json.loads((folder / "run/result.json").read_text())["top1"] == 1.0
    return folder / "run"


def answers_right(network: Any, dataset: Dataset, data: Data) -> bool:
    """Whether a network's first class of every test image is that of the image's colour."""
    ids = np.arange(len(dataset.test))
    right = []
    for images, labels, _ in evaluation_batches(
        dataset, dataset.test, ids, data, batch_size=64, device=CPU
    ):
        with torch.no_grad():
            said = network.eval()(images).logits.argmax(dim=1)
        middle = images.mean(dim=(2, 3)).numpy() * 255
        for colour, answer, label in zip(middle, said.tolist(), labels.tolist(), strict=True):
            shown = np.asarray(COLOURS[dataset.classes[answer]])
            right.append(np.abs(colour - shown).max() < 60 and answer == label)
    return all(right)


def as_teacher(run: Path, data: Data) -> str:
    dataset = datasets.load(data)
    teacher = models.build_teacher(Teacher(weights=str(run)), **facts(dataset))
    assert teacher.classes == dataset.classes
    return "right" if answers_right(teacher, dataset, data) else "WRONG"


def labels_right(data: Data) -> str:
    """Whether the test images have the labels of what they show."""
    dataset = datasets.load(data)
    assert dataset.test.pixels is not None
    shown = dataset.test.pixels.mean(axis=(1, 2))
    wanted = np.asarray([COLOURS[dataset.classes[label]] for label in dataset.test.labels])
    return "right" if np.abs(shown - wanted).max() < 60 else "WRONG"


def as_one_folder(root: Path) -> Data:
    """Class folders that a file parts, with the last class first in it."""
    in_folders(root, NAMES)
    rows = [f"train/{name}/{i}.png" for name in reversed(NAMES) for i in range(8)]
    shutil.rmtree(root / "test")
    for name in NAMES:
        (root / "train" / name).rename(root / name)
    (root / "train").rmdir()
    lines = [f"{row.removeprefix('train/')},{'train' if i % 8 else 'test'}" for i, row in
             enumerate(rows) if i < 24 or i % 8]  # fmt: skip
    (root / "split.csv").write_text("\n".join(["path,split", *lines]))
    keys = {"root": str(root), "split_file": "split.csv", "image_size": 8}
    return Data.model_validate({"name": "folder", **keys})


def as_student(run: Path, data: Data) -> str:
    """A student that begins with weights of other classes draws its classifier anew."""
    dataset = datasets.load(data)
    spec = Model(model="resnet8", weights=str(run))
    student = models.build_student(spec, **facts(dataset))
    if student.reinitialised:
        assert student.classes == dataset.classes
        return "right"
    return "right" if answers_right(student, dataset, data) else "WRONG"


def evaluated(run: Path, root: Path) -> str:
    """A finished run on the data that lie elsewhere."""
    found = finished.Loader(root)(run)
    return "right" if answers_right(found.network, found.dataset, found.recipe.data) else "WRONG"


def renamed(root: Path, name: str, new: str) -> Path:
    for split in ("train", "test"):
        (root / split / name).rename(root / split / new)
    return root


def from_cache(run: Path, before: Data, after: Data) -> str:
    """What a cache of one order of classes says to the other."""
    keys = {"cache": {"path": "cache", "views": 1}, "teachers": [{"weights": str(run)}]}
    identities = []
    for data in (before, after):
        dataset, asked = datasets.load(data), recipe(data, **keys)
        teacher = models.build_teacher(asked.teachers[0], **facts(dataset))
        identities.append(cached.identity(asked, dataset, teacher))
    require_same(*identities, origin="cache", hint="")
    return "WRONG"


def gone_on(place: Path) -> str:
    """A run whose classes are swapped before it goes on."""
    data = in_shards(place / "shards", ("ant", "bee"))
    train(recipe(data, train={"epochs": 1, "batch_size": 8}), place / "run", workers=0)
    (place / "run" / "result.json").unlink()
    (place / "shards" / "classes.txt").write_text("bee\nant\n")
    train(recipe(data, train={"epochs": 1, "batch_size": 8}), place / "run", workers=0)
    return "WRONG"


def with_a_name_twice(run: Path, data: Data, place: Path) -> str:
    network = weights.load(run)
    network.description = network.description.model_copy(
        update={"classes": ("ant", "bee", "bee", "dog")}
    )
    place.write_bytes(weights.to_bytes(network))
    return as_teacher(place, data)


Case = Callable[[Path, Path], str]

# What is met, and whether it can be met.
CASES: dict[str, tuple[Case, str]] = {
    "teacher, same order": (lambda p, r: as_teacher(r, in_folders(p, NAMES)), "right"),
    "teacher, reversed": (lambda p, r: as_teacher(r, in_shards(p, NAMES[::-1])), "right"),
    "teacher, rotated": (lambda p, r: as_teacher(r, in_rows(p, NAMES[1:] + NAMES[:1])), "right"),
    "teacher, fewer": (lambda p, r: as_teacher(r, in_folders(p, ("bee", "dog"))), "right"),
    "teacher, one": (lambda p, r: as_teacher(r, in_folders(p, ("dog",))), "right"),
    "teacher, one more": (lambda p, r: as_teacher(r, in_folders(p, (*NAMES, "eel"))), "refused"),
    "teacher, another": (lambda p, r: as_teacher(r, in_folders(p, (*NAMES[:3], "eel"))), "refused"),
    "teacher, upper case": (lambda p, r: as_teacher(r, in_folders(p, ("Ant", "bee"))), "refused"),
    "teacher, a blank": (lambda p, r: as_teacher(r, in_folders(p, ("ant ", "bee"))), "refused"),
    "teacher, decomposed": (
        lambda p, r: as_teacher(r, in_folders(p, ("ant", DECOMPOSED))), "refused"),
    "teacher, numbers": (lambda p, r: as_teacher(r, in_shards(p, NAMES, listed=False)), "refused"),
    "teacher, a name twice": (
        lambda p, r: with_a_name_twice(r, in_folders(p / "a", ("bee", "dog")), p / "t.safetensors"),
        "refused"),
    "file of weights, reversed": (
        lambda p, r: as_teacher(r / "student.safetensors", in_shards(p, NAMES[::-1])), "right"),
    "test lacks the first": (lambda p, r: labels_right(in_folders(p, NAMES, NAMES[1:])), "right"),
    "test lacks the middle": (
        lambda p, r: labels_right(in_folders(p, NAMES, ("ant", "dog"))), "right"),
    "test has one more": (lambda p, r: labels_right(in_folders(p, NAMES[:2], NAMES)), "refused"),
    "test has another": (
        lambda p, r: labels_right(in_folders(p, ("ant", "bee"), ("ant", "dog"))), "refused"),
    "test in upper case": (
        lambda p, r: labels_right(in_folders(p, ("ant", "bee"), ("Ant", "bee"))), "refused"),
    "test with a blank": (
        lambda p, r: labels_right(in_folders(p, ("ant", "bee"), ("ant ", "bee"))), "refused"),
    "test decomposed": (
        lambda p, r: labels_right(in_folders(p, NAMES, ("ant", DECOMPOSED))), "refused"),
    "split file, test lacks one": (lambda p, r: labels_right(as_one_folder(p)), "right"),
    "student's weights, reversed": (
        lambda p, r: as_student(r, in_shards(p, NAMES[::-1])), "right"),
    "student's weights, same": (lambda p, r: as_student(r, in_shards(p, NAMES)), "right"),
    "cache, swapped": (
        lambda p, r: from_cache(r, in_shards(p / "a", NAMES), in_shards(p / "b", NAMES[::-1])),
        "refused"),
    "checkpoint, swapped": (lambda p, r: gone_on(p), "refused"),
    "evaluated elsewhere, same": (
        lambda p, r: (in_folders(p, NAMES), evaluated(r, p))[1], "right"),
    "evaluated elsewhere, one renamed": (
        lambda p, r: (in_folders(p, NAMES), evaluated(r, renamed(p, "dog", "aardvark")))[1],
        "refused"),
    "evaluated elsewhere, one fewer": (
        lambda p, r: (in_folders(p, NAMES[1:]), evaluated(r, p))[1], "refused"),
    "evaluated elsewhere, one more": (
        lambda p, r: (in_folders(p, (*NAMES, "eel")), evaluated(r, p))[1], "refused"),
}  # fmt: skip


@pytest.mark.promise("R16")
def test_classes_are_matched_by_name_or_refused(
    run: Path, tmp_path: Path, measured: Measured
) -> None:
    found = {}
    for number, (name, (case, _)) in enumerate(CASES.items()):
        try:
            found[name] = case(tmp_path / str(number), run)
        except DistillError:
            found[name] = "refused"
    assert found == {name: wanted for name, (_, wanted) in CASES.items()}
    right = sum(one == "right" for one in found.values())
    measured(
        "classes permuted, missing, added or renamed",
        f"{right} right, {len(found) - right} refused of {len(found)}, 0 silent",
    )

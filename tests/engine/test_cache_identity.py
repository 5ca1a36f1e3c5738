"""A cache answers for its own data, teacher and views; any other ingredient is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.data import images, views
from distill.engine import machine
from distill.engine.session import prepare
from distill.errors import IdentityError
from distill.models import weights
from distill.models.network import Network
from distill.recipe import Recipe
from tests.engine.test_cached import (  # noqa: F401 (fixtures)
    _one_thread,
    build,
    listing,
    load,
    photographs,
    teacher_run,
)
from tests.promises import Measured

Load = Callable[..., Recipe]
r18 = pytest.mark.promise("R18")
CHANGES = {
    "data.augment=[crop, color_jitter, randaugment, erase]": "views.augment",
    "data.augment.3.magnitude=8": "views.augment.3.magnitude",
    "data.augment.0.padding=2": "views.augment.0.padding",
    "data.augment.1.probability=0.4": "views.augment.1.probability",
    "data.augment.2.brightness=0.1": "views.augment.2.brightness",
    "data.augment.3.num_ops=1": "views.augment.3.num_ops",
    "data.augment=[flip, crop, color_jitter, randaugment, erase]": "views.augment.0.name",
    "data.mixup=0.6": "views.mixup",
    "data.cutmix=0.5": "views.cutmix",
    "data.seed=1": "views.seed",
    "data.fraction=0.25": "data.mixed",
    "data.val=0.2": "data.mixed",
    "data.eval_crop=0.9": "pixels.eval_crop",
    "data.decoder=fast": "pixels.decoder",
    "data.image_size=16": "pixels.image_size",
    "cache.codec=fp16": "codec",
    "cache.precision=bf16": "precision",
}


def refused(recipe: Recipe, place: Path, field: str) -> None:
    for use in (
        lambda: prepare(recipe, place / "student", machine.setup(workers=0)).close(),
        lambda: build(recipe, place / "tc"),
    ):
        with pytest.raises(IdentityError, match=field) as caught:
            use()
        assert caught.value.exit_status == 4


@r18
def test_every_ingredient_of_a_cache_is_named_when_it_is_another(
    load: Load,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path), tmp_path / "tc")
    before = listing(tmp_path / "tc")
    found = []
    for change, field in CHANGES.items():
        refused(load(path, change), tmp_path, field)
        found.append(change)
    for module in (images, views):
        with monkeypatch.context() as other:
            other.setattr(module, "VERSION", module.VERSION + 1)
            refused(load(path), tmp_path, "version")
            found.append(module.__name__)
    assert listing(tmp_path / "tc") == before
    prepare(load(path), tmp_path / "student", machine.setup(workers=0)).close()
    build(load(path), tmp_path / "tc")
    assert listing(tmp_path / "tc") == before
    count = f"{len(found)} of {len(found)} refused by name; unchanged: taken"
    measured("another view, split, codec, precision or version of code", count)


def bit(network: Network) -> None:
    with torch.no_grad():
        tensor = next(network.backbone.parameters()).view(-1)
        tensor[0] = torch.nextafter(tensor[0], torch.tensor(1e9))


def described(**values: object) -> Callable[[Network], None]:
    def change(network: Network) -> None:
        network.description = network.description.model_copy(update=values)

    return change


def buffer(network: Network) -> None:
    """A running mean of a normalisation, which no optimizer ever sees."""
    name, tensor = next((n, x) for n, x in network.backbone.named_buffers() if "mean" in n)
    tensor += 1e-6
    assert name


TEACHERS: dict[str, tuple[Callable[[Network], None], str]] = {
    "a bit of a weight": (bit, r"teacher\.weights"),
    "a buffer": (buffer, r"teacher\.weights"),
    "mean": (described(mean=(0.5, 0.5, 0.5)), r"teacher\.mean"),
    "std": (described(std=(0.5, 0.5, 0.5)), r"teacher\.std"),
    "input size": (described(input_size=12), r"teacher\.input_size"),
    "order of classes": (
        described(classes=tuple("1234567890")), r"teacher\.selection"
    ),
}  # fmt: skip


@r18
def test_another_teacher_is_named(
    load: Load,  # noqa: F811
    tmp_path: Path,
    teacher_run: Path,  # noqa: F811
    measured: Measured,
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path), tmp_path / "tc")
    file = tmp_path / "changed.safetensors"
    recipe = load(path, f"teachers=[{{weights: {file}}}]")
    for change, field in TEACHERS.values():
        network = weights.load(teacher_run)
        change(network)
        file.write_bytes(weights.to_bytes(network))
        refused(recipe, tmp_path, field)
    file.write_bytes(weights.to_bytes(weights.load(teacher_run)))
    prepare(recipe, tmp_path / "student", machine.setup(workers=0)).close()
    measured("another teacher", f"{len(TEACHERS)} of {len(TEACHERS)} refused by name")


@r18
def test_other_images_are_named(load: Load, tmp_path: Path, measured: Measured) -> None:  # noqa: F811
    root = photographs(tmp_path / "photos", classes=3, count=6)
    (tmp_path / "photo-teacher.yaml").write_text(
        f"""
        data: {{name: folder, root: {root}, image_size: 24}}
        student: {{model: mlp}}
        objective: [{{term: ce}}]
        optimizer: {{name: sgd, lr: 0.1}}
        train: {{epochs: 1, batch_size: 9}}
        """
    )
    keys = {
        "data": {"name": "folder", "root": str(root), "image_size": 24, "augment": ["flip"]},
        "teachers": [{"recipe": "photo-teacher.yaml"}],
        "train": {"epochs": 2, "batch_size": 9},
    }
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path, **keys), tmp_path / "tc")
    first, second = "train/class0/0.jpg", "train/class0/1.jpg"
    ways: dict[str, Callable[[Path], object]] = {
        "renamed": lambda o: (o / first).rename(o / "train/class0/00.jpg"),
        "a byte more": lambda o: (o / first).write_bytes((o / first).read_bytes() + b"\0"),
        "one less": lambda o: (o / first).unlink(),
        "one more": lambda o: shutil.copy(o / first, o / "train/class0/more.jpg"),
        "a test image": lambda o: (o / "test/class0/0.jpg").write_bytes((o / first).read_bytes()),
        "of another class": lambda o: (o / first).rename(o / "train/class1/x.jpg"),
        "two swapped": lambda o: swap(o / first, o / second),
    }
    other = tmp_path / "other"
    for name, change in ways.items():
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(root, other)
        change(other)
        recipe = load(path, f"data.root={other}", **keys)
        with pytest.raises(IdentityError) as caught:
            prepare(recipe, tmp_path / "student", machine.setup(workers=0))
        assert "data.images" in str(caught.value), name
    measured("other images", f"{len(ways)} of {len(ways)} refused by name")


def swap(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)

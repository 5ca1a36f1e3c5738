"""A first recipe for a folder of images: what lies there, and settings that suit it."""

from __future__ import annotations

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from distill import component, storage, yamlio
from distill.data import folder, images, splits
from distill.data.folder import Entry
from distill.errors import PreflightError, RecipeError
from distill.recipe import OUTSIDE_MODELS, Data, Model

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)  # pixels; networks shrink the side by 16 or 32
PRETRAINED_FROM = 96  # pixels; below, what a network learned at 224 px is of little use
TEST_PART = 0.2  # of the images of each class, where the folder has no split of its own
VAL_PART = 0.1
BIAS_UNTIL = 50_000  # training images; with fewer, a CNN's bias is worth having
VAL_FROM = 20  # training images a class; with fewer, all are needed for training
SAMPLE = 200  # images whose size is read
EPOCHS = (10, 20, 30, 50, 100, 200, 300)
LARGE = ("timm/resnet50.a1_in1k", "timm/mobilenetv3_large_100.ra_in1k")  # teacher, student
SMALL = ("resnet32x4", "resnet8x4")


class Survey(NamedTuple):
    """What lies in a folder of images."""

    root: Path  # of the class folders, or of train and test
    classes: tuple[str, ...]
    train: list[Entry]
    test: list[Entry]
    own_split: bool  # the folder says what is test
    side: int  # pixels; median of the images' shorter sides
    bad_train: list[str]  # what is wrong with which file
    bad_test: list[str]


class Network(NamedTuple):
    """What decides how a network is trained."""

    model: str
    pretrained: bool  # it begins with published weights; else
    plain: bool  # it normalises batches and attends to nothing, as CNNs do
    convolves: bool  # in more than one layer: a single one makes patches


class Settings(NamedTuple):
    """How to train one network."""

    network: Network
    optimizer: dict[str, Any]
    why: str
    few: bool  # images for a network that does not convolve
    epochs: int
    batch_size: int


def survey(path: Path) -> Survey:
    """Look at the images in `path`: their classes, splits and sizes, and which cannot be used.

    Raises:
        PreflightError: If there are no class folders with images in them, or too few images.
    """
    root = path.absolute()
    own_split = any((root / name).is_dir() for name in ("test", "val", "validation"))
    if (root / "train").is_dir() and own_split:
        found = folder.scan(root, None)
        bad_train, bad_test = ({e.name: w for e, w in _bad(root, list(s))} for s in found[1:])
        train = [entry for entry in found.train if entry.name not in bad_train]
        test = list(found.test)
    else:
        own_split = False
        root = root / "train" if (root / "train").is_dir() else root
        entries = list(folder.entries(root, root))
        bad_train, bad_test = {entry.name: what for entry, what in _bad(root, entries)}, {}
        train, test = _split([entry for entry in entries if entry.name not in bad_train])
    classes = tuple(sorted({entry.label for entry in train}))
    if len(classes) < 2 or not test:
        raise PreflightError(
            f"{path}: {len(train)} training and {len(test)} test images of {len(classes)} classes",
            hint="each class is a folder of its own; two classes of two images are the least",
        )
    return Survey(
        root=root,
        classes=classes,
        train=train,
        test=test,
        own_split=own_split,
        side=_side([root / entry.name for entry in train]),
        bad_train=list(bad_train.values()),
        bad_test=list(bad_test.values()),
    )


def propose(
    found: Survey, out: Path, *, teacher: str | None = None, student: str | None = None
) -> dict[Path, str]:
    """The files of a first recipe: `out`, its teacher's recipe and, where needed, a split file.

    Args:
        found: The images.
        out: The recipe's file; the others lie beside it.
        teacher: Model of the teacher; None chooses.
        student: Model of the student; None chooses.

    Returns:
        The content of each file by its path.

    Raises:
        RecipeError: If a model of ours is named that there is not.
    """
    default = LARGE if found.side >= PRETRAINED_FROM else SMALL
    size = max((size for size in SIZES if size <= found.side), default=SIZES[0])
    teacher_file = out.with_name(f"{out.stem}-teacher{out.suffix}")
    split_file = None if found.own_split else out.with_name(f"{out.stem}-split.csv")
    num_train = round(len(found.train) * (1 - _val(found)))
    networks = (
        _network("--teacher", teacher or default[0], found.classes, size),
        _network("--student", student or default[1], found.classes, size),
    )
    first, second = (_settings(network, num_train) for network in networks)
    data = _data(found, size, split_file)
    files = {
        out: _student_recipe(found, data, second, teacher_file.name),
        teacher_file: _teacher_recipe(data, first, out.name),
    }
    if split_file is not None:
        files[split_file] = _split_csv(found)
    return files


def write(files: dict[Path, str]) -> None:
    """Write `files`; none of them may be there already.

    Raises:
        PreflightError: If one is, or cannot be written. Nothing is written in the first case.
    """
    content = {path: text.encode(errors="surrogateescape") for path, text in files.items()}
    there = [path for path in files if path.exists()]
    others = [path for path in there if not path.is_file() or path.read_bytes() != content[path]]
    if others or len(there) == len(files):  # not what a killed process began
        raise PreflightError(
            f"{(others or there)[0]}: is there already; nothing was written",
            hint="give another --out, or move it away",
        )
    for path, data in content.items():
        storage.sweep(path.parent, below=False)
        storage.write(path, data)


def _bad(root: Path, entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """The files whose first bytes show that they are no usable image, and why."""
    most = Data.model_fields["max_pixels"].default

    def fault(entry: Entry) -> str | None:
        try:
            images.check_header(root / entry.name, max_pixels=most)
        except images.BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        faults = pool.map(fault, entries)
        return [(entry, what) for entry, what in zip(entries, faults, strict=True) if what]


def _side(files: Sequence[Path]) -> int:
    """The median shorter side of a sample of images: the same whichever way up they are."""
    most = Data.model_fields["max_pixels"].default
    some = files[:: max(1, len(files) // SAMPLE)]
    sides = [min(images.check_header(path, max_pixels=most)) for path in some]
    return round(median(sides)) if sides else 0


def _split(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Training and test images, balanced over classes, the same at every call."""
    number = {label: i for i, label in enumerate(sorted({entry.label for entry in entries}))}
    labels = np.array([number[entry.label] for entry in entries], np.int64)
    train, test = splits.held_out(labels, TEST_PART, seed=0)
    return [entries[i] for i in train], [entries[i] for i in test]


def _split_csv(found: Survey) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "split"])
    rows = [(entry.name, name) for name in ("train", "test") for entry in getattr(found, name)]
    table.writerows(sorted(rows))
    return text.getvalue()


def _val(found: Survey) -> float:
    return VAL_PART if len(found.train) >= VAL_FROM * len(found.classes) else 0.0


def _network(option: str, model: str, classes: tuple[str, ...], size: int) -> Network:
    """What the model is, whatever it is called: another than the usual is built and looked at."""
    if model in LARGE or model in SMALL:
        return Network(model, pretrained=model in LARGE, plain=True, convolves=True)
    known = component.find("models.zoo")
    if not model.startswith(OUTSIDE_MODELS) and ":" not in model and model not in known:
        raise RecipeError(
            f"{option}: no model {model!r}" + component.suggestion(model, list(known))
        )
    import torch

    from distill.models import backbones, build_student
    from distill.models.network import normalises_batches

    if backbones.published(model):
        return Network(model, pretrained=True, plain=False, convolves=False)
    # Without values the largest takes seconds and no memory. A user's own code may want some.
    spec = Model(model=model, weights=None)
    with torch.device("cpu" if ":" in model else "meta"):
        built = build_student(spec, classes=classes, image_size=size, mean=(0, 0, 0), std=(1, 1, 1))
    plain = normalises_batches(built) and not built.anatomy().attention
    return Network(model, pretrained=False, plain=plain, convolves=built.is_convolutional)


def _settings(network: Network, num_train: int) -> Settings:
    """Optimizer and length that suit the network and the number of training images."""
    batch_size = min(8, num_train)  # batch normalisation needs some
    while batch_size < 64 and batch_size * 16 <= num_train:
        batch_size *= 2
    steps = 2_000 if network.pretrained else 10_000
    enough = steps / max(1, num_train // batch_size)
    epochs = next((n for n in EPOCHS if n >= enough), EPOCHS[-1])
    optimizer = {"name": "adamw", "lr": 3e-4, "weight_decay": 0.05}
    why = "AdamW with a small rate: the weights are good already, and only move to the new classes."
    if not network.pretrained and not network.plain:
        optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}
        why = "AdamW, as networks with attention or without batch normalisation are trained."
    elif not network.pretrained:
        lr = 0.05 * batch_size / 64
        optimizer = {"name": "sgd", "lr": lr, "weight_decay": 5e-4}
        why = (
            "SGD as distillation papers train small CNNs: 0.05 for 64 images a step, in proportion."
        )
    few = not network.pretrained and not network.convolves and num_train < BIAS_UNTIL
    return Settings(network, optimizer, why, few, epochs, batch_size)


def _student_recipe(found: Survey, data: str, settings: Settings, teacher_file: str) -> str:
    counts = Counter(entry.label for entry in found.train)
    uneven = max(counts.values()) >= 10 * min(counts.values())
    head = [
        f"{len(found.classes):,} classes, {len(found.train):,} training and {len(found.test):,} "
        f"test images, {found.side} px on the median shorter side.",
        f"A class has {min(counts.values()):,} to {max(counts.values()):,} training images"
        + ("; mind the rare ones: top-1 hardly counts them." if uneven else "."),
    ]
    return "\n".join(
        [
            _comment(*head),
            "",
            data,
            _comment("Trained first, by its own recipe, if its run is not there yet."),
            _yaml({"teachers": [{"recipe": teacher_file}]}),
            _student(settings),
            _comment(
                "Mostly the teacher's softened classes, a little the labels: the usual shares and",
                "temperature of the distillation literature.",
            ),
            _yaml(
                {
                    "objective": [
                        {"term": "ce", "weight": 0.1},
                        {"term": "kd", "weight": 0.9, "temperature": 4.0},
                    ]
                }
            ),
            _training(settings),
        ]
    )


def _teacher_recipe(data: str, settings: Settings, student_file: str) -> str:
    return "\n".join(
        [
            _comment(f"The teacher of {student_file}, trained from labels alone."),
            "",
            data,
            _student(settings),
            _comment(
                "No label smoothing: it erases what a student can learn from the probabilities of",
                "the wrong classes (arXiv:1906.02629).",
            ),
            _yaml({"objective": [{"term": "ce"}]}),
            _training(settings),
        ]
    )


def _data(found: Survey, size: int, split_file: Path | None) -> str:
    """The section `data`, which both recipes share."""
    places: dict[str, Any] = {"root": str(found.root)}
    if split_file is not None:
        places["split_file"] = str(split_file.absolute())
    try:
        "".join(places.values()).encode()
    except UnicodeEncodeError:
        raise PreflightError(f"{found.root!r}: a recipe can only name a path in UTF-8") from None
    large = size >= PRETRAINED_FROM
    val = _val(found)
    parts = [
        "data:\n  name: folder",
        textwrap.indent(_yaml(places), "  "),
        "  # The largest usual size that most images reach: more pixels would only be blown up.",
        f"  image_size: {size}",
        "  # flip swaps left and right in half of the images: take it out where that changes the",
        "  # class, as with letters or traffic signs.",
        f"  augment: [{'resized_crop' if large else 'crop'}, flip]",
        "  # Held out of training to choose settings by; the test split is for the end.",
        f"  val: {val}"
        + ("" if val else f"  # none: fewer than {VAL_FROM} training images a class"),
    ]
    if found.bad_train and found.own_split:
        parts += [
            f"  # Training images that cannot be read, and are left out: {len(found.bad_train):,}.",
            "  on_bad_image: skip",
        ]
        part = len(found.bad_train) / (len(found.train) + len(found.bad_train))
        if part > Data.model_fields["max_bad"].default:
            parts.append(f"  max_bad: {ceil(100 * part) / 100}")
    return "\n".join(parts)


def _student(settings: Settings) -> str:
    network = settings.network
    section: dict[str, Any] = {"model": network.model}
    why = "From scratch: the images are small, or there are no pretrained weights for it."
    if network.pretrained:
        section["weights"] = "pretrained"
        why = "Begins with ImageNet's weights: a few thousand images alone teach it much less."
    lines = [why]
    if settings.few:
        lines += [
            "Few images for a network without a CNN's bias: from 899 digits a ViT learned to read",
            "62.8 % of others, with stem: conv and position: conv 94.7 %, a CNN 99.6 %.",
        ]
    return _comment(*lines) + "\n" + _yaml({"student": section})


def _training(settings: Settings) -> str:
    warmup = max(1, settings.epochs // 20)
    return "\n".join(
        [
            _comment(settings.why),
            _yaml({"optimizer": {**settings.optimizer, "warmup_epochs": float(warmup)}}),
            _comment("On a recent GPU, precision: bf16 is faster and takes half the memory."),
            _yaml({"train": {"epochs": settings.epochs, "batch_size": settings.batch_size}}),
            "",
        ]
    )


def _comment(*lines: str) -> str:
    return "\n".join(f"# {line}" for line in lines)


def _yaml(data: dict[str, Any]) -> str:
    return yamlio.dump(data).rstrip("\n")

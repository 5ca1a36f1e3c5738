"""Small caches, made by hand: no teacher, no images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from safetensors.numpy import save

from distill.cache import layout, write
from distill.cache.layout import Column, Manifest, Unit, view_part
from distill.cache.store import Folder, Store
from distill.cache.write import Writer

TYPES = {
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32,
    "F16": np.float16, "F32": np.float32, "I64": np.int64,
}  # fmt: skip

IDENTITY: dict[str, Any] = {
    "codec": "int8",
    "data": {"classes": "c1", "images": "d1", "mixed": None},
    "features": {},
    "precision": "fp32",
    "teacher": {"weights": "ab" * 8, "shapes": [[3, 4], [5]]},
    "views": {"augment": [{"name": "crop", "padding": 4}], "mixup": 0.1, "seed": 0},
}
SCORES = {"test": {"top1": 0.1, "nll": 2.302585092994046}}
CANARIES = save(
    {
        "positions": np.array([0, 3]),
        "views": np.array([0, 1]),
        "pixels": np.array([1, 2], np.uint32),
        "logits": np.zeros((2, 3), np.float32),
    }
)


def manifest(
    *,
    samples: int = 5,
    unit_rows: int = 3,
    views: int = 2,
    test: int = 2,
    val: int = 1,
    codec: str = "int8",
    num_classes: int = 3,
    columns: tuple[Column, ...] | None = None,
    identity: Mapping[str, object] | None = None,
) -> Manifest:
    """What a cache consists of that has few rows; `identity` replaces fields of its identity."""
    return Manifest(
        identity={**IDENTITY, "codec": codec, **(identity or {})},
        about={"model": "resnet8", "parameters": 78_042, "flops": 12_400_000},
        num_classes=num_classes,
        views=views,
        samples=samples,
        samples_sha256=hashlib.sha256(samples_file(samples, val)).hexdigest(),
        test=test,
        val=val,
        unit_rows=unit_rows,
        columns=columns or layout.columns(codec, num_classes),
        eval_rows=2,
        eval_columns=(Column("logits", "F32", (num_classes,)),),
    )


def ids(samples: int, val: int = 1) -> tuple[ndarray, ndarray]:
    """Sorted ids of the training and validation samples: every fourth id is nobody's."""
    train = np.arange(samples) * 4 // 3 + 2
    return train.astype("<i8"), (train[-1] + 1 + np.arange(val)).astype("<i8")


def samples_file(samples: int, val: int = 1) -> bytes:
    train, held_out = ids(samples, val)
    return save({"train": train, "val": held_out})


def part_columns(manifest: Manifest, part: str) -> dict[str, ndarray]:
    """All rows of a view or an evaluation split, numbers that follow from its name."""
    rows = {"test": manifest.test, "val": manifest.val}.get(part, manifest.samples)
    some = Unit(part, 0, 0, rows)
    draw = np.random.default_rng([*part.encode(), rows])
    return {
        column.name: (draw.standard_normal((rows, *column.shape)) * 100)
        .astype(np.int64 if column.dtype[0] in "UI" else np.float64)
        .astype(TYPES[column.dtype])
        for column in manifest.columns_of(some)
    }


def view_columns(manifest: Manifest, view: int) -> dict[str, ndarray]:
    return part_columns(manifest, view_part(view))


def unit_columns(manifest: Manifest, unit: Unit) -> dict[str, ndarray]:
    rows = slice(unit.start, unit.start + unit.rows)
    return {name: whole[rows] for name, whole in part_columns(manifest, unit.part).items()}


def begin(store: Store, wanted: Manifest) -> Manifest:
    samples = samples_file(wanted.samples, wanted.val)
    return write.begin(store, wanted, samples=samples, canaries=CANARIES)


def fill(store: Store, manifest: Manifest) -> int:
    """Write the units that are missing; return how many those were."""
    left = write.missing(store, manifest)
    with writing(store, manifest) as writer:
        for unit in left:
            writer.put(unit, unit_columns(manifest, unit))
    return len(left)


@contextmanager
def writing(store: Store, manifest: Manifest) -> Iterator[Writer]:
    writer = Writer(store, manifest)
    try:
        yield writer
    finally:
        writer.close()


def complete(store: Store, wanted: Manifest) -> Manifest:
    """A cache with all that belongs to it."""
    there = begin(store, wanted)
    fill(store, there)
    assert write.finish(store, there, SCORES) == []
    return there


def cache(path: Path, wanted: Manifest | None = None) -> tuple[Folder, Manifest]:
    """A complete cache in a folder."""
    store = Folder(path)
    return store, complete(store, wanted or manifest())


def tree(path: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, hidden ones too."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def content(store: Store) -> dict[str, bytes]:
    """The bytes of every file of a store."""
    return {name: store.read(name) or b"" for name in sorted(store.sizes())}


def same(one: Mapping[str, ndarray], other: Mapping[str, ndarray]) -> bool:
    """Whether columns are equal: names, types, shapes and numbers."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name])
        for name in one
    )


def flipped(data: bytes, position: int, bit: int) -> bytes:
    """The data with one bit of one byte turned over."""
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)

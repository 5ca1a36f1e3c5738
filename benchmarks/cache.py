"""The teacher cache against its goals: reading, views' parameters, building, and a step from it.

    python benchmarks/cache.py [reading] [views] [building] [step] [teacher1000] [--data ROOT]

All of them but the last by default, in about ten minutes. `--data` is a folder with CIFAR-10 in its
binary format, whose pictures are then used; random pixels take as long. `teacher1000` runs the
command itself over JPEGs with a real teacher of 1,000 classes: see efficientnet.py.

One thread. Rates are per second of CPU time, which writing and checking threads count into, so
that other work on the machine counts little; what is compared takes turns in one run. A row's
ratio is to the first row of its table. How exact a codec is, codecs.py shows.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _cache_runs import building, step, teacher1000
from _timing import Work, compare, repeated, report, verdict
from numpy import ndarray
from safetensors.numpy import save as save_tensors
from torch import Tensor

from distill.cache import codec as codecs
from distill.cache import layout, write
from distill.cache.layout import Manifest
from distill.cache.read import Reader
from distill.cache.store import Folder
from distill.data import augment, mixing, views
from distill.data.pixels import CHUNK
from distill.engine.memory import keep_freed
from distill.recipe import Augmentation
from distill.teacher import unpack

BATCH = 1_024
GATHERED = 8_000_000  # bytes that the loader reads at once
IMAGENET = 1_281_167  # training images


def reading(rounds: int) -> None:
    """Rows a second by codec and number of classes, and what it takes to make them logits."""
    for num_classes, codec, rows in (
        (10, "int8", IMAGENET),
        (1_000, "int8", 131_072),
        (1_000, "fp16", 131_072),
        (1_000, "topk:100", 131_072),
    ):
        with tempfile.TemporaryDirectory() as folder:
            _reading(Path(folder), codec, num_classes, rows, rounds)


def _reading(folder: Path, codec: str, num_classes: int, rows: int, rounds: int) -> None:
    reader, flat = _random_cache(folder, codec, num_classes, rows)
    rng = np.random.default_rng(1)
    batches = itertools.cycle([rng.integers(0, rows, BATCH) for _ in range(97)])
    gather = max(1, GATHERED // (BATCH * reader.row_bytes)) * BATCH
    gathers = itertools.cycle([rng.permutation(rows)[:gather] for _ in range(5)])
    columns = reader.rows(np.arange(BATCH), 0)
    units = sum(unit.part == "views/v0000" for unit in reader.manifest.units())
    variants = {
        f"np.take of one flat array, {BATCH:,} rows": repeated(
            lambda: np.take(flat, next(batches), axis=0), BATCH
        ),
        f"Reader.rows, {BATCH:,} rows": repeated(lambda: reader.rows(next(batches), 0), BATCH),
        f"Reader.rows, {gather:,} rows as the loader": repeated(
            lambda: reader.rows(next(gathers), 0), min(gather, rows)
        ),
        f"to logits, {BATCH:,} rows": repeated(
            lambda: unpack(codec, _tensors(columns), num_classes), BATCH
        ),
    }
    found = compare(variants, rounds=rounds)
    report(
        f"{codec}, {num_classes:,} classes, {reader.row_bytes:,} bytes a row, {rows:,} rows in "
        f"{units} units",
        found,
        unit="rows",
    )
    goal = 1_000_000 if num_classes == 10 else 200_000
    slowest = min(found[1].rate, found[2].rate)
    both = 1 / (1 / found[2].rate + 1 / found[3].rate)
    verdict(f"rows a second, goal {goal:,}", slowest, slowest >= goal)
    print(
        f"  to logits: {1e6 / found[3].rate:.2f} us a row; read and decoded: {both:,.0f} rows/s; "
        f"a view is opened and checked at {_opening(reader):.1f} GB/s"
    )
    reader.close()


def _opening(reader: Reader) -> float:
    """Bytes per nanosecond of CPU time at which a view is mapped, and all of it checked."""
    times = []
    for _ in range(5):
        fresh = Reader(reader.store, reader.manifest, num_views=1)
        began = time.process_time()
        fresh.rows(fresh.ids[:1], 0)
        times.append(time.process_time() - began)
        fresh.close()
    return len(reader.ids) * reader.row_bytes / statistics.median(times) / 1e9


def _random_cache(folder: Path, codec: str, num_classes: int, rows: int) -> tuple[Reader, ndarray]:
    """A reader of a cache of random logits, and the same bytes as one array in memory."""
    columns = layout.columns(codec, num_classes)
    row_bytes = sum(column.row_bytes for column in columns)
    ids = save_tensors({"train": np.arange(rows), "val": np.arange(0)})
    manifest = Manifest(
        identity={"codec": codec}, about={}, num_classes=num_classes, views=1, samples=rows,
        samples_sha256=hashlib.sha256(ids).hexdigest(), test=0, val=0, columns=columns,
        unit_rows=layout.rows_for(row_bytes), eval_rows=256, eval_columns=columns,
    )  # fmt: skip
    store = Folder(folder)
    write.begin(store, manifest, samples=ids, canaries=b"")
    generator = torch.Generator().manual_seed(0)
    for unit in manifest.units():
        logits = 3 * torch.randn(unit.rows, num_classes, generator=generator)
        made = {name: column.numpy() for name, column in codecs.encode(codec, logits).items()}
        store.write(unit.name, write.encode(manifest, unit, made))
    flat = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    return Reader(store, manifest, num_views=1), flat


def _tensors(columns: dict[str, ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def view_parameters(rounds: int) -> None:
    """Samples a second of all that is drawn for a view, in chunks as the loader draws them."""
    _view_parameters("32 px, in memory", 32, ("crop", "flip", "randaugment"), rounds)
    _view_parameters("224 px, in files", 224, ("resized_crop", "flip", "randaugment"), rounds)


def _view_parameters(title: str, size: int, names: tuple[str, ...], rounds: int) -> None:
    order = np.random.default_rng(0).permutation(IMAGENET)
    chunks = itertools.cycle(np.split(order[: 8 * CHUNK], 8))
    batches = itertools.cycle(np.split(order[: 64 * BATCH], 64))
    stages = augment.build([Augmentation(name=name) for name in names], seed=0)

    def planned(stage: augment.Stage, ids: ndarray) -> None:
        stage.plan(ids, np.full(len(ids), 3), size=size)

    def whole(ids: ndarray) -> None:
        for stage in stages:
            planned(stage, ids)
        _mixed(ids, size)
        views.partner(ids, IMAGENET, data_seed=0, view=3)

    variants = {
        f"all of it, {CHUNK:,} at once": repeated(lambda: whole(next(chunks)), CHUNK),
        f"all of it, {BATCH:,} at once": repeated(lambda: whole(next(batches)), BATCH),
        "order of an epoch": repeated(_order, IMAGENET),
        "partners": repeated(
            lambda: views.partner(next(chunks), IMAGENET, data_seed=0, view=3), CHUNK
        ),
        "mixup and cutmix": repeated(lambda: _mixed(next(chunks), size), CHUNK),
    }
    for name, stage in zip(names, stages, strict=True):
        variants[name] = repeated(lambda stage=stage: planned(stage, next(chunks)), CHUNK)
    if names[0] == "resized_crop":
        variants["resized_crop, file by file"] = _file_by_file(stages[0])
    found = compare(variants, rounds=rounds)
    report(f"parameters of a view, {title}", found, unit="samples")
    rate = 1 / (1 / found[0].rate + 1 / found[2].rate)
    verdict("samples a second, the order included, goal 200,000", rate, rate >= 200_000)


def _mixed(positions: ndarray, size: int) -> None:
    draws = views.uniform(
        0, positions[::2], np.full(len(positions) // 2, 3), stream=0, num=mixing.NUM_DRAWS
    )
    mixing.plan(draws, mixup=0.8, cutmix=1.0, height=size, width=size)


def _order() -> ndarray:
    return views.epoch_order(IMAGENET, data_seed=0, train_seed=0, epoch=3, view=3)


def _file_by_file(stage: augment.Stage) -> Work:
    """The boxes of a batch of files, each at its own size, as a decoding process draws them."""
    ids = np.arange(128)

    def batch() -> None:
        for drawn in stage.uniforms(ids, ids):
            stage.augmentation.plan(drawn[None], height=375, width=500)

    return repeated(batch, len(ids))


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ["reading", "views", "building", "step", "teacher1000"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--data", type=Path, default=None, help="a folder with CIFAR-10's")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(parts)}")
    chosen = options.parts or parts[:-1]
    torch.set_num_threads(1)
    keep_freed()
    if "reading" in chosen:
        reading(options.rounds)
    if "views" in chosen:
        view_parameters(options.rounds)
    if "building" in chosen:
        building(options.rounds, options.data)
    if "step" in chosen:
        step(options.rounds, options.data)
    if "teacher1000" in chosen:
        teacher1000()


if __name__ == "__main__":
    main()

"""Every method with few images: one pair a direction, several seeds, and the student alone.

    python benchmarks/methods.py [--root ~/data] [--out runs/methods] [--direction cnn-to-vit]...
        [--method kd]... [--seeds 3]

The teachers are trained once, by `recipes/fashion-mnist/teacher-{cnn,vit}.yaml`, on all 54,000
images. A student sees 1,000 images of Fashion-MNIST in ten views each; a seed decides which images,
their views, their order and the initial weights. All methods of a seed share these, and the number
of steps. Logits, features and attention come from a cache. Whatever is done already is not done
again. All that is asked for goes to benchmarks/results/methods.jsonl, each run with the SHA-256 of
its result.json and of its student.safetensors, and from there into docs/methods.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _document import put
from _intervals import interval

from distill import yamlio
from distill.engine import machine
from distill.engine.run import Run
from distill.engine.train import train
from distill.recipe import Recipe

ROOT = Path(__file__).parents[1]
HERE = ROOT / "recipes" / "fashion-mnist"
RESULTS = ROOT / "benchmarks" / "results" / "methods.jsonl"
DOCUMENT = ROOT / "docs" / "methods.md"
Row = dict[str, Any]

STUDENTS: dict[str, dict[str, Any]] = {
    "cnn": {
        "student": {"model": "resnet8"},
        "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4, "warmup_epochs": 2},
    },
    "vit": {
        "student": {"model": "vit", "patch_size": 7, "width": 64, "depth": 4, "heads": 4},
        "optimizer": {
            "name": "adamw",
            "lr": 2e-3,
            "weight_decay": 0.05,
            "warmup_epochs": 4,
            "clip_norm": 1.0,
        },
    },
}
KEPT = {  # all that any of the methods reads inside of the teacher
    "cnn": ["pooled", "layer1", "layer2", "layer3"],
    "vit": [
        "pooled",
        *(f"blocks.{i}" for i in (0, 1, 3, 4, 5)),
        *(f"blocks.{i}.attention@attention" for i in (4, 5)),
    ],
}
DIRECTIONS = ("cnn-to-cnn", "cnn-to-vit", "vit-to-vit", "vit-to-cnn")

CE = {"term": "ce", "weight": 0.2}
KD = {"term": "kd", "weight": 0.8, "temperature": 2}


def beside(term: str, weight: float, **arguments: Any) -> list[dict[str, Any]]:
    """A term beside KD and cross-entropy, as those that look inside a teacher are used."""
    return [CE, KD, {"term": term, "weight": weight, **arguments}]


def instead(term: str, weight: float, labels: float, **arguments: Any) -> list[dict[str, Any]]:
    """A term in place of KD."""
    return [{"term": "ce", "weight": labels}, {"term": term, "weight": weight, **arguments}]


RAMP = {"start": 0.0, "end": 1.0, "until": 0.1}  # the warm-up of DKD and RLD
METHODS: dict[str, list[dict[str, Any]]] = {
    "alone": [{"term": "ce"}],
    "smoothing 0.1": [{"term": "ce", "smoothing": 0.1}],
    "tfkd": instead("tfkd", 0.8, 0.2),
    "kd, T = 1": instead("kd", 0.8, 0.2, temperature=1),
    "kd, T = 2": [CE, KD],
    "kd, T = 4": instead("kd", 0.8, 0.2, temperature=4),
    "kd alone, T = 1": [{"term": "kd", "temperature": 1}],
    "kd, T = 2 to 6": instead("kd", 0.8, 0.2, temperature=[2, 3, 4, 5, 6]),
    "hard": instead("hard", 0.5, 0.5),
    "token": instead("token", 0.5, 0.5),
    "dkd": instead("dkd", RAMP, 1.0),
    "nkd": instead("nkd", 1.0, 1.0),
    "dist": instead("dist", 2.0, 1.0),
    "lskd": instead("lskd", 9.0, 0.1),
    "ttm": instead("ttm", 4.0, 1.0),
    "wttm": instead("wttm", 4.0, 1.0),
    "rld": instead("rld", RAMP, 1.0),
    "ctkd": instead("ctkd", 0.8, 0.2),
    "ofa": instead("ofa", 1.0, 1.0),
    "features": beside("features", 0.3),
    "features, alone": instead("features", 1.0, 0.5),
    "locality": beside("locality", 2.5),
    "vitkd": beside("vitkd", 1.0),
    "at": beside("at", 1000.0),
    "attention": beside("attention", 1.0),
    "guidance": beside("guidance", {"start": 0.0, "end": 0.2, "begin": 0.1, "until": 0.1}),
    "similarity": beside("similarity", 1000.0),
    "relations": beside("relations", 5.0),
    "rkd": beside("rkd", 0.02),
    "crd": beside("crd", 0.1, negatives=512),
    "infonce": beside("infonce", 0.2),
    "review": beside("review", 0.5),
    "locality_penalty": [{"term": "ce"}, {"term": "locality_penalty", "weight": 0.2}],
    "shift_consistency": [{"term": "ce"}, {"term": "shift_consistency", "weight": 1.0}],
    "subset": [{"term": "ce"}, {"term": "subset", "weight": 0.2}],
}
NOT_FOR = {  # what a direction has not
    "token": ("cnn-to-cnn", "vit-to-cnn"),
    "vitkd": ("cnn-to-cnn", "cnn-to-vit", "vit-to-cnn"),
    "attention": ("cnn-to-cnn", "cnn-to-vit", "vit-to-cnn"),
    "guidance": ("cnn-to-cnn", "cnn-to-vit"),
    "locality_penalty": ("cnn-to-cnn", "vit-to-cnn"),
}


def recipe(direction: str, method: str, seed: int, root: str, out: Path) -> Recipe:
    """The recipe of one run."""
    teacher, _, student = direction.partition("-to-")
    terms, taught = METHODS[method], _taught(method)
    data = {
        "name": "fashion-mnist",
        "root": root,
        "augment": ["crop", "flip"],
        "val": 0.1,
        "fraction": 1 / 54,
        "seed": seed,
    }
    sections: dict[str, Any] = {
        "data": data,
        "teachers": [{"weights": str(out / f"teacher-{teacher}")}] if taught else [],
        **STUDENTS[student],
        "objective": terms,
        "cache": {"views": 10},
        "train": {"epochs": 40, "batch_size": 100, "eval_epochs": 40, "seed": seed},
    }
    if method == "token":
        sections["student"] = {**sections["student"], "pool": "distill"}
    if taught:
        sections["cache"]["path"] = str(out / f"cache-{teacher}-{seed}")
        sections["cache"]["features"] = KEPT[teacher]
    path = out / f"{direction}.yaml"
    path.write_text(yamlio.dump(sections))
    return Recipe.load(path)


ALONE = ("ce", "tfkd", "locality_penalty", "shift_consistency", "subset")


def _taught(method: str) -> bool:
    """Whether it needs a teacher: without one a student is the same in both directions."""
    return any(term["term"] not in ALONE for term in METHODS[method])


def prepare(root: str, out: Path, seeds: int, direction: str) -> None:
    """Train the teacher and write what it says."""
    teacher = direction.partition("-to-")[0]
    places = [f"data.root={root}", "data.download=false"]
    train(Recipe.load(HERE / f"teacher-{teacher}.yaml", places), out / f"teacher-{teacher}")
    for seed in range(seeds):
        wanted = recipe(direction, "kd, T = 2", seed, root, out)
        assert wanted.cache is not None
        command = [sys.executable, "-m", "distill", "teacher-cache", out / f"{direction}.yaml"]
        subprocess.run([*command, "--out", str(wanted.cache.path)], check=True)


def main() -> None:
    """Run what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", default="~/data")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--direction", action="append", choices=DIRECTIONS)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine.setup(workers=0)
    found = []
    for direction in options.direction or DIRECTIONS:
        prepare(options.root, options.out, options.seeds, direction)
        for method in options.method or METHODS:
            if direction not in NOT_FOR.get(method, ()):
                for seed in range(options.seeds):
                    found.append(one(direction, method, seed, options.root, options.out))
                    print(found[-1], flush=True)
    rows = kept(found)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(put(page, "methods", table(rows)), encoding="utf-8")


def one(direction: str, method: str, seed: int, root: str, out: Path) -> Row:
    """What the student reached after the last epoch, and the digests of what holds that."""
    slug = method.replace(",", "").replace(" ", "-").replace("=", "")
    where = direction if _taught(method) else f"{direction.rpartition('-')[2]}-alone"
    run = Run(out / where / f"{slug}-{seed}")
    result = run.finished() or train(recipe(direction, method, seed, root, out), run.path)
    return {
        "direction": direction, "method": method, "seed": seed, "top1": result.top1,
        "sha256": hashlib.sha256(run.result.read_bytes()).hexdigest(),
        "weights": hashlib.sha256(run.student.read_bytes()).hexdigest(),
    }  # fmt: skip


def kept(found: Iterable[Row]) -> list[Row]:
    """These rows, and earlier ones of other runs, in the order of the table."""
    rows = {(row["direction"], row["method"], row["seed"]): row for row in (*read(), *found)}
    order = [*METHODS]
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], order.index(key[1]), key))]


def read() -> list[Row]:
    """The rows that are written down."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def gains(rows: Iterable[Row]) -> dict[tuple[str, str], list[float]]:
    """Points over the student alone by direction and method, paired by seed."""
    top1: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        top1.setdefault((row["direction"], row["method"]), {})[row["seed"]] = 100 * row["top1"]
    return {
        (direction, method): [
            value - top1[direction, "alone"][seed] for seed, value in sorted(values.items())
        ]
        for (direction, method), values in top1.items()
    }


def table(rows: Sequence[Row]) -> str:
    """Gains over the student alone with their intervals, a method a line, in Markdown."""
    found = gains(rows)
    alone = {
        direction: statistics.mean(
            100 * row["top1"] for row in rows
            if (row["direction"], row["method"]) == (direction, "alone")
        )
        for direction in DIRECTIONS
    }  # fmt: skip
    titles = (" to ".join(part.replace("cnn", "CNN").replace("vit", "ViT") for part in
              direction.split("-to-")) for direction in DIRECTIONS)  # fmt: skip
    lines = [
        f"| method | {' | '.join(titles)} |",
        "|---|---|---|---|---|",
        f"| alone, top-1 | {' | '.join(f'{alone[one]:.1f} %' for one in DIRECTIONS)} |",
    ]
    for method in METHODS:
        if method != "alone":
            cells = (_cell(found.get((direction, method))) for direction in DIRECTIONS)
            name = f"{method} +kd" if METHODS[method][:2] == [CE, KD] != METHODS[method] else method
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(points: Sequence[float] | None) -> str:
    if not points:
        return "–"
    mean, half = interval(points)
    ends = "one seed" if half is None else f"{mean - half:+.1f} to {mean + half:+.1f}"
    return f"{mean:+.1f} ({ends})"


if __name__ == "__main__":
    main()

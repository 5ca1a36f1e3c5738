"""A class that the student never sees, learned from what the teacher says of the others.

    python benchmarks/omitted.py --root ~/data --out runs/omitted [--seeds 1]

Hinton, Vinyals, Dean (2015, section 3) left a digit out of what a student was trained on. Here a
ResNet-8 that has seen all of Fashion-MNIST teaches an MLP that sees no image of one class, once
from labels and once from the teacher's cached logits alone. Recall of the omitted class is the part
of its test images that the student finds; "bias fixed" raises its logit by what makes the student
name it as often as it is there, as in the paper. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import yamlio
from distill.data import datasets
from distill.data.loader import evaluation_batches
from distill.engine import machine
from distill.engine.train import train
from distill.models import weights
from distill.recipe import Recipe

CLASSES = ("Ankle boot", "Dress", "Bag", "Sandal", "Trouser")
TEACHER: dict[str, Any] = {
    "student": {"model": "resnet8"},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 0.2},
    "train": {"epochs": 2, "batch_size": 128},
}
STUDENT: dict[str, Any] = {
    "student": {"model": "mlp", "width": 256, "depth": 1},
    "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01},
    "cache": {"views": 1},
    "train": {"epochs": 4, "batch_size": 256},
}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "labels": [{"term": "ce"}],
    "T = 1": [{"term": "kd", "temperature": 1}],
    "T = 4": [{"term": "kd", "temperature": 4}],
}


def written(path: Path, sections: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yamlio.dump(sections))
    return path


def recalls(run: Path, recipe: Recipe, omitted: str) -> tuple[float, float]:
    """The part of the omitted class's test images that is found, and with its bias fixed."""
    dataset = datasets.load(recipe.data)
    network, ids = weights.load(run).eval(), np.arange(len(dataset.test))
    device = torch.device("cpu")
    batches = evaluation_batches(
        dataset, dataset.test, ids, recipe.data, batch_size=1000, device=device
    )
    with torch.no_grad():
        told = [(network(images).logits, labels) for images, labels, _ in batches]
    logits, labels = (torch.cat(part) for part in zip(*told, strict=True))
    label = dataset.classes.index(omitted)
    own = labels == label
    raw = (logits[own].argmax(dim=1) == label).float().mean()
    others = logits.clone()
    others[:, label] = -torch.inf
    short = others.amax(dim=1) - logits[:, label]  # by how much it is not named
    logits[:, label] += short.kthvalue(int(own.sum())).values
    fixed = (logits[own].argmax(dim=1) == label).float().mean()
    return float(raw), float(fixed)


def main() -> None:
    """Run all, and print a table of recalls in per cent."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--omit", nargs="*", default=CLASSES)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    machine.setup(workers=0)
    data = {"name": "fashion-mnist", "root": options.root, "val": 0.1}
    train(Recipe.load(written(out / "teacher.yaml", {"data": data, **TEACHER})), out / "teacher")
    teachers = [{"weights": str(out / "teacher")}]
    taught = {"data": data, "teachers": teachers, "objective": OBJECTIVES["T = 1"], **STUDENT}
    cache = str(out / "cache")
    path = written(out / "taught.yaml", taught)
    command = [sys.executable, "-m", "distill", "teacher-cache", str(path), "--out", cache]
    subprocess.run(command, check=True)
    print("| omitted | " + " | ".join(OBJECTIVES) + " |\n|" + "---|" * (len(OBJECTIVES) + 1))
    for omitted in options.omit:
        cells = []
        for name, objective in OBJECTIVES.items():
            found = []
            for seed in range(options.seeds):
                sections = {**STUDENT, "data": {**data, "omit": [omitted]}, "objective": objective}
                sections["train"] = {**STUDENT["train"], "seed": seed}
                if name != "labels":
                    sections |= {"teachers": teachers, "cache": {"views": 1, "path": cache}}
                recipe = Recipe.load(written(out / "student.yaml", sections))
                slug = f"{omitted}-{name}-{seed}".replace(" ", "").replace("=", "")
                train(recipe, out / slug)
                found.append(recalls(out / slug, recipe, omitted))
            raw, fixed = (100 * sum(part) / len(part) for part in zip(*found, strict=True))
            cells.append(f"{raw:.1f} / {fixed:.1f}")
        print(f"| {omitted} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Our training loop against a bare PyTorch loop over the same tensors, side by side in one run.

    python benchmarks/engine.py [--rounds 7]

Both train the same network on the same random images of CIFAR's shape, in memory as uint8, cropped
and flipped by one gather and normalised in the network, and on the same labels, as probabilities.
Ours is `distill.engine.fit.fit` as `distill train` calls it, with its rows of metrics, schedules
and final checkpoint; the bare loop is forward, backward, step. Variants take turns; ratios and
differences are of neighbours in time. On a CPU times are CPU time of the process on one thread, so
that other work on the machine counts little; on a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _timing import Row, inverse, report, rows, verdict
from torch import Tensor, nn

from distill import console
from distill.engine import machine
from distill.engine.fit import Training, fit
from distill.engine.monitor import Display
from distill.engine.run import Run
from distill.engine.session import Session, prepare
from distill.recipe import Recipe

IMAGES = 2_000
CUDA = torch.cuda.is_available()
GOAL = 1.05  # of the bare loop's time

RECIPE = """
data: {{name: cifar10, root: {root}, augment: {augment}, image_size: {size}}}
student: {{model: "{model}"}}
objective: [{{term: ce}}]
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 5e-4, schedule: constant}}
train: {{epochs: {epochs}, batch_size: {batch}}}
"""


def tiny(num_classes: int, image_size: int) -> nn.Module:
    """A network that computes next to nothing, so that the loop around it shows."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def write_images(root: Path) -> None:
    """Random images in CIFAR-10's binary format."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (IMAGES // 5, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(len(rows)) % 10
        rows.tofile(folder / f"{name}.bin")


def clock() -> float:
    """Seconds: the clock's once a GPU is done, else this process's own."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ours(recipe: Recipe, folder: Path) -> Callable[[], float]:
    """Seconds of a run of the recipe, each in a directory of its own."""
    here = machine.setup(workers=0)
    console.err.quiet = True
    count = 0

    def run() -> float:
        nonlocal count
        count += 1
        path = folder / f"run-{count}"
        path.mkdir()
        session = prepare(recipe, path, here)
        with machine.stop_request() as stop:
            began = clock()
            training = Training(recipe, Run(path), session, here)
            with Display(path.name, 0, training.total, recipe.train.batch_size) as display:
                fit([training], here, stop, display, path=path)
            return clock() - began

    return run


def bare(recipe: Recipe, folder: Path, steps: int) -> Callable[[], float]:
    """Seconds of the same number of steps of a bare loop."""
    here = machine.setup(workers=0)
    session: Session = prepare(recipe, folder / "bare", here)
    dataset, device = session.dataset, here.device
    assert dataset.train.pixels is not None
    padded = np.pad(dataset.train.pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    canvas = torch.from_numpy(padded).to(device)
    plain = torch.from_numpy(dataset.train.pixels).to(device)
    labels = F.one_hot(torch.from_numpy(dataset.train.labels)).float().to(device)
    batch, size = recipe.train.batch_size, dataset.image_size
    around = torch.arange(size, device=device)

    def images(ids: Tensor) -> Tensor:
        if not recipe.data.augment:
            return plain[ids].permute(0, 3, 1, 2).float() / 255
        shift = torch.randint(0, 9, (2, len(ids), 1), device=device)
        columns = shift[1] + around
        flipped = torch.rand(len(ids), 1, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        rows = shift[0] + around
        pixels = canvas[ids[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2).float() / 255

    def run() -> float:
        student = session.distiller.student
        optimizer = torch.optim.SGD(
            student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        began = clock()
        done = 0
        while done < steps:
            order = torch.randperm(len(labels), device=device)
            for first in range(0, len(labels) - batch + 1, batch):
                ids = order[first : first + batch]
                loss = F.cross_entropy(student(images(ids)).logits, labels[ids])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done += 1
                if done == steps:
                    break
        return clock() - began

    return run


def compare(name: str, steps: int, rounds: int, **keys: Any) -> Row:
    """Our loop against the bare one."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        per_epoch = IMAGES // keys["batch"]
        epochs = -(-steps // per_epoch)
        path = root / "recipe.yaml"
        path.write_text(RECIPE.format(root=folder, epochs=epochs, **keys))
        recipe = Recipe.load(path)
        total = epochs * per_epoch
        variants = bare(recipe, root, total), ours(recipe, root)
        for variant in variants:
            variant()
        pairs = [tuple(variant() for variant in variants) for _ in range(rounds)]
    costs = [(our - plain) / total * 1e6 for plain, our in pairs]
    found = rows(
        {
            who: [total / seconds for seconds in times]
            for who, times in zip(("a bare loop", "ours"), zip(*pairs, strict=True), strict=True)
        }
    )
    extra = f"{statistics.median(costs):+,.0f} [{min(costs):+,.0f} .. {max(costs):+,.0f}] µs a step"
    report(
        name,
        inverse(found),
        unit="steps",
        per="s" if CUDA else "CPU-s",
        note=f"Ratios are of times; ours less a bare loop: {extra}.",
    )
    print(f"  {extra}")
    return inverse(found)[1]


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6_000, help="of the tiny network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"augment": "[crop, flip]", "size": 32, "batch": 128}
    steps = 1_000 if CUDA else 15  # a run records its CUDA graph once
    row = compare(
        "our loop: resnet20, batch 128, crop + flip",
        steps,
        options.rounds,
        model="resnet20",
        **shape,
    )
    verdict(f"ours over a bare loop, goal {GOAL}", row.ratio, row.ratio <= GOAL)
    shape = {"augment": "[]", "size": 8, "batch": 16}
    title = "our loop: tiny net, batch 16, 8 px"
    compare(title, options.steps, options.rounds, model="engine:tiny", **shape)


if __name__ == "__main__":
    main()

"""Our training loop against a bare PyTorch loop over the same tensors, side by side in one run.

    python benchmarks/engine.py [--repeats 7]

Both train the same network on the same random images of CIFAR's shape, in memory as uint8, cropped
and flipped by one gather and normalised in the network, and on the same labels, as probabilities.
Ours is `distill.engine.fit.fit` as `distill train` calls it, with its rows of metrics, schedules
and final checkpoint; the bare loop is forward, backward, step. Variants take turns; ratios and
differences are of neighbours in time. Times are CPU time of the process on one thread, so that
other work on the machine counts little.
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
from torch import Tensor, nn

from distill import console
from distill.engine import machine
from distill.engine.fit import Training, fit
from distill.engine.monitor import Display
from distill.engine.run import Run
from distill.engine.session import Session, prepare
from distill.recipe import Recipe

IMAGES = 2_000

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


def ours(recipe: Recipe, folder: Path) -> Callable[[], float]:
    """CPU seconds of a run of the recipe, each in a directory of its own."""
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
            began = time.process_time()
            training = Training(recipe, Run(path), session, here)
            with Display(path.name, 0, training.total, recipe.train.batch_size) as display:
                fit([training], here, stop, display, path=path)
            return time.process_time() - began

    return run


def bare(recipe: Recipe, folder: Path, steps: int) -> Callable[[], float]:
    """CPU seconds of the same number of steps of a bare loop."""
    session: Session = prepare(recipe, folder / "bare", machine.setup(workers=0))
    dataset = session.dataset
    assert dataset.train.pixels is not None
    canvas = torch.from_numpy(np.pad(dataset.train.pixels, ((0, 0), (4, 4), (4, 4), (0, 0))))
    plain = torch.from_numpy(dataset.train.pixels)
    labels = F.one_hot(torch.from_numpy(dataset.train.labels)).float()
    batch, size = recipe.train.batch_size, dataset.image_size
    around = torch.arange(size)

    def images(ids: Tensor) -> Tensor:
        if not recipe.data.augment:
            return plain[ids].permute(0, 3, 1, 2).float() / 255
        shift = torch.randint(0, 9, (2, len(ids), 1))
        columns = shift[1] + around
        columns = torch.where(torch.rand(len(ids), 1) < 0.5, columns.flip(1), columns)
        rows = shift[0] + around
        pixels = canvas[ids[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2).float() / 255

    def run() -> float:
        student = session.distiller.student
        optimizer = torch.optim.SGD(
            student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        began = time.process_time()
        done = 0
        while done < steps:
            order = torch.randperm(len(labels))
            for first in range(0, len(labels) - batch + 1, batch):
                ids = order[first : first + batch]
                loss = F.cross_entropy(student(images(ids)).logits, labels[ids])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done += 1
                if done == steps:
                    break
        return time.process_time() - began

    return run


def compare(name: str, steps: int, repeats: int, **keys: Any) -> None:
    """Print one line: our loop against the bare one."""
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
        pairs = [tuple(variant() for variant in variants) for _ in range(repeats)]
    ratios = [our / plain for plain, our in pairs]
    costs = [(our - plain) / total * 1e6 for plain, our in pairs]
    plain, our = (statistics.median(times) / total * 1e6 for times in zip(*pairs, strict=True))
    print(
        f"{name:34s} bare {plain:9,.0f} us   ours {our:9,.0f} us   ours/bare "
        f"{statistics.median(ratios):.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]   "
        f"{statistics.median(costs):+,.0f} us [{min(costs):+,.0f} .. {max(costs):+,.0f}] a step"
    )


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"augment": "[crop, flip]", "size": 32, "batch": 128}
    compare(
        "resnet20, batch 128, crop + flip",
        15,
        options.repeats,
        model="resnet20",
        **shape,
    )
    shape = {"augment": "[]", "size": 8, "batch": 16}
    compare("tiny net, batch 16, 8 px", 6_000, options.repeats, model="engine:tiny", **shape)


if __name__ == "__main__":
    main()

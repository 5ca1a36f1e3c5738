"""Peak memory and time against the number of images, up to a million; a fresh process each.

    python benchmarks/scale.py [NUMBER ...]

The sets are tar shards that hold one tiny PNG again and again under other names: all shards are one
file, linked, so that a million images take 21 MB of disk. `bytes an image` is the slope of the peak
between the two largest numbers.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).parents[1]
NUMBERS = (10_000, 100_000, 1_000_000)
SHARD = 10_000  # images
CLASSES = 10

RECIPE = """
data: {{name: webdataset, root: {root}, image_size: 16, augment: [resized_crop, flip]}}
teachers: [{{weights: {teacher}}}]
student: {{model: resnet8}}
objective: [{{term: ce, weight: 0.5}}, {{term: kd, weight: 0.5}}]
cache: {{views: 8}}
optimizer: {{name: sgd, lr: 0.1}}
train: {{epochs: 30, batch_size: 256}}
"""
TEACHER = """
data: {{name: webdataset, root: {root}, image_size: 16, fraction: 0.01}}
student: {{model: resnet8}}
objective: [{{term: ce}}]
optimizer: {{name: sgd, lr: 0.1}}
train: {{epochs: 1, batch_size: 16}}
"""
LOAD = """
import sys
from distill.data import datasets
from distill.recipe import Recipe
recipe = Recipe.load(sys.argv[1])
dataset = datasets.load(recipe.data)
"""
TRAIN = """
import itertools, torch
from distill.data.loader import Loader
loader = Loader(dataset, recipe.data, batch_size=256, train_seed=0, device=torch.device("cpu"))
for epoch in range(2):
    for batch in itertools.islice(loader.epoch(epoch), 40):
        pass
loader.close()
"""


class Cost(NamedTuple):
    """What a process took."""

    peak: int  # bytes in memory
    seconds: float


def shard(path: Path) -> None:
    """A shard of one image under many names."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(stream, "PNG")
    image = stream.getvalue()
    with path.open("wb") as file:
        for number in range(SHARD):
            for suffix, content in (("png", image), ("cls", str(number % CLASSES).encode())):
                about = tarfile.TarInfo(f"{number:08d}.{suffix}")
                about.size = len(content)
                file.write(about.tobuf(tarfile.USTAR_FORMAT) + content)
                file.write(bytes(-len(content) % 512))
        file.write(bytes(1024))


def images(root: Path, number: int, one: Path) -> Path:
    """A set of so many training images, and a shard of test images."""
    root.mkdir()
    for i in range(number // SHARD):
        os.link(one, root / f"train-{i:05d}.tar")
    os.link(one, root / "test-00000.tar")
    return root


def run(*arguments: str, cwd: Path) -> Cost:
    """Run Python with these arguments."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said)
    return Cost(usage.ru_maxrss * 1024, time.monotonic() - began)


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:]] or list(NUMBERS)
    found: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        shard(home / "one.tar")
        small = images(home / "small", SHARD, home / "one.tar")
        (home / "teacher.yaml").write_text(TEACHER.format(root=small))
        run("-m", "distill", "train", "teacher.yaml", "--out", "teacher", cwd=home)
        for number in numbers:
            root = images(home / f"set{number}", number, home / "one.tar")
            recipe = f"recipe{number}.yaml"
            (home / recipe).write_text(RECIPE.format(root=root, teacher=home / "teacher"))
            distill = ("-m", "distill")
            for name, arguments in {
                "look through the shards, once": ("-c", LOAD, recipe),
                "load": ("-c", LOAD, recipe),
                "load, 2 epochs of 40 batches": ("-c", LOAD + TRAIN, recipe),
                "distill check": (*distill, "check", recipe),
                "distill teacher-cache --dry-run": (*distill, "teacher-cache", recipe, "--dry-run"),
            }.items():
                cost = run(*arguments, cwd=home)
                found.setdefault(name, []).append(cost)
                print(f"{number:>9,}  {name:32} {cost.peak / 1e6:8.1f} MB {cost.seconds:7.1f} s")
    if len(numbers) > 1:
        print("\nbytes an image")
        for name, costs in found.items():
            slope = (costs[-1].peak - costs[-2].peak) / (numbers[-1] - numbers[-2])
            print(f"  {name:32} {slope:6.1f}")


if __name__ == "__main__":
    main()

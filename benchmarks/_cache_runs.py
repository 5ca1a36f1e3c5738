"""The parts of cache.py that run a network: a cache is built, and trained from."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import efficientnet
import numpy as np
import torch
from _timing import Work, compare, report, verdict
from torch import Tensor

from distill import console
from distill.data import datasets
from distill.data.loader import evaluation_batches
from distill.data.pixels import Views
from distill.engine import machine
from distill.engine.jobs import BATCH_SIZE, Settings, build_jobs
from distill.engine.precompute import precompute
from distill.engine.session import Session, prepare
from distill.engine.step import train_step
from distill.models import backbones, weights
from distill.models.network import Description, Network
from distill.recipe import Recipe
from distill.types import Outputs

RECIPE = """
data: {{name: cifar10, root: "{root}", augment: {augment}, mixup: {mixup}}}
teachers: {teachers}
student: {{model: {student}}}
objective: {objective}
cache: {{path: {path}, views: {views}}}
optimizer: {{name: sgd, lr: 0.01, schedule: constant}}
train: {{epochs: 4, batch_size: {batch}}}
"""
CE, KD = "{term: ce}", "{term: kd, temperature: 4}"


def building(rounds: int, root: Path | None) -> None:
    """The whole pass of a ResNet-56 beside the same network on the same images in memory.

    What a pass costs once, such as its canaries, shows in one view of few images; eight views are
    still few, and the goal holds for them.
    """
    for title, augmentations, mixup in (
        ("crop + flip", "[crop, flip]", 0.0),
        ("crop + flip + RandAugment, mixup", "[crop, flip, randaugment]", 0.2),
    ):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            _write_pictures(place, root, train=1_280, test=256)
            keys = {"augment": augmentations, "mixup": mixup}
            keys |= {"teachers": _teacher(place), "objective": f"[{KD}]", "path": "unused"}
            one, eight = (_recipe(place, **keys, views=views) for views in (1, 8))
            _building(f"building: ResNet-56, {title}", place, one, eight, rounds)


def _building(title: str, place: Path, one: Recipe, eight: Recipe, rounds: int) -> None:
    here = machine.setup(workers=0)
    console.err.quiet = True
    dataset = datasets.load(one.data)
    numbers = itertools.count()

    def passed(recipe: Recipe) -> int:
        jobs = build_jobs(recipe, str(place / f"{next(numbers)}"), place, dataset, here)
        with machine.stop_request() as stop:
            return precompute(recipe, jobs, dataset, here, stop, Settings()).images

    network = build_jobs(one, str(place / "none"), place, dataset, here)[0].network
    images = _seen(one, dataset)

    def bare() -> int:
        with torch.no_grad():
            for batch in 3 * images:
                network(batch)
        return 3 * sum(map(len, images))

    variants = {
        "forward passes alone": bare,
        "a pass over 1 view": lambda: passed(one),
        "a pass over 8 views": lambda: passed(eight),
    }
    found = compare(variants, rounds=rounds)
    report(f"{title}, {len(dataset.train_ids):,} images", found, unit="images")
    verdict("8 views over forward passes, goal 0.9", found[2].ratio, found[2].ratio >= 0.9)


def _seen(recipe: Recipe, dataset: datasets.Dataset) -> list[Tensor]:
    """The images of a pass over one view, in batches of its size."""
    device, size = torch.device("cpu"), BATCH_SIZE["cpu"]
    train, test = np.arange(len(dataset.train_ids)), np.arange(len(dataset.test))
    tested = evaluation_batches(
        dataset, dataset.test, test, recipe.data, batch_size=size, device=device
    )
    source = Views(dataset, recipe.data, device=device, audience="teacher")
    trained = source.single(train, np.zeros_like(train), batch_size=size)
    found = [*(images for images, _, _ in tested), *(batch.images for batch, _ in trained)]
    return [images.contiguous(memory_format=torch.channels_last) for images in found]


def step(rounds: int, root: Path | None) -> None:
    """A step from the cache beside one from labels alone, and one with the teacher live."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write_pictures(place, root, train=2_560, test=256)
        teachers, both = _teacher(place), f"[{CE}, {KD}]"
        alone = _recipe(place, objective=f"[{CE}]")
        live = _recipe(place, teachers=teachers, objective=both)
        cached = _recipe(place, teachers=teachers, objective=both, path=str(place / "cache"))
        here = machine.setup(workers=0)
        console.err.quiet = True
        dataset = datasets.load(cached.data)
        jobs = build_jobs(cached, str(place / "cache"), place, dataset, here)
        with machine.stop_request() as stop:
            precompute(cached, jobs, dataset, here, stop, Settings())
        sessions = {
            "ce, no teacher": prepare(alone, place / "a", here),
            "ce + kd, logits at hand": prepare(alone, place / "b", here),
            "ce + kd, cached": prepare(cached, place / "c", here),
            "ce + kd, live": prepare(live, place / "d", here),
        }
        told = Outputs(torch.randn(cached.train.batch_size, 10))
        objective = sessions["ce + kd, cached"].distiller.objective
        sessions["ce + kd, logits at hand"].distiller.objective = objective
        sessions["ce + kd, logits at hand"] = sessions["ce + kd, logits at hand"]._replace(
            teacher=lambda batch: told
        )
        variants = {name: _steps(session) for name, session in sessions.items()}
        found = compare(variants, rounds=8 * rounds)
        report("a step of ResNet-20 on 32 px, batch 128, teacher ResNet-56", found, unit="images")
        share = found[2].ratio
        verdict("cached over no teacher, goal 0.95", share, share >= 0.95)
        print(f"  cached over live: {found[2].rate / found[3].rate:.2f}")
        _lookup(sessions["ce + kd, cached"], sessions["ce, no teacher"], found[0].rate)


def _steps(session: Session) -> Work:
    """A step of a run that has no end."""
    batches = itertools.chain.from_iterable(session.loader.epoch(e) for e in itertools.count())
    shares = session.distiller.objective.weights_at(0.0)

    def work() -> int:
        batch = next(batches)
        train_step(session.model, session.teacher, session.optimizer, batch, weights=shares)
        return len(batch.ids)

    return work


def _lookup(cached: Session, alone: Session, rate: float) -> None:
    """What reading and decoding alone cost, in parts of a step without a teacher."""

    def epoch(session: Session) -> float:
        began = time.process_time()
        for batch in session.loader.epoch(0):
            if session.teacher is not None:
                session.teacher(batch)
        images = session.loader.steps_per_epoch * len(batch.ids)
        return (time.process_time() - began) / images

    costs = [epoch(cached) - epoch(alone) for _ in range(31)]
    cost = statistics.median(costs)
    print(f"  reading and decoding: {1e6 * cost:.2f} us an image, {cost * rate:.2%} of a step")


def teacher1000() -> None:
    """`distill teacher-cache` and its verdict, with a real teacher of 1,000 classes over JPEGs."""
    size = 160
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        efficientnet.write(place / "lite0.safetensors", image_size=size)
        images = efficientnet.write_folder(place / "images", side=300)
        (place / "recipe.yaml").write_text(
            f"""
data:
  {{name: folder, root: {place}/images, image_size: {size}, eval_crop: 0.875, mixup: 0.2,
    augment: [resized_crop, flip, randaugment]}}
teachers: [{{model: "benchmarks.efficientnet:lite0", weights: {place}/lite0.safetensors}}]
student: {{model: resnet20}}
objective: [{{term: kd, temperature: 4}}]
cache: {{views: 2, codec: int8}}
optimizer: {{lr: 1e-3}}
train: {{epochs: 2, batch_size: 64}}
"""
        )
        command = [sys.executable, "-m", "distill", "teacher-cache", str(place / "recipe.yaml")]
        command += ["--out", str(place / "cache"), "--json"]
        began = time.monotonic()
        built = _run(command)
        whole = time.monotonic() - began
        teacher = built["teachers"][0]
        print(
            f"\nteacher1000: {images:,} JPEGs, 2 views of each at {size} px, "
            f"{teacher['bytes'] / 1e6:.1f} MB in {teacher['units']} units\n"
            f"  {built['images']:,} answers in {built['seconds']:.1f} s, "
            f"{built['images'] / built['seconds']:.1f} answers/s, waiting for pixels "
            f"{built['data_wait']:.0%}; the command took {whole:.1f} s\n"
            f"  right on {teacher['scores']['test']['top1']:.1%} of the test images"
        )
        asked = _run([*command, "--verify", "teacher", "--sample", "256"])
        kl = asked["caches"][0]["kl"]
        print(
            f"  {asked['verdict']}: {asked['caches'][0]['sample']} views asked again, KL mean "
            f"{kl['mean']:.1e}, median {kl['median']:.1e}, greatest {kl['max']:.1e} nats; same "
            f"first class {asked['caches'][0]['top1_agreement']:.1%}"
        )


def _run(command: list[str]) -> dict[str, Any]:
    """What a command prints as JSON; run beside this folder, so that recipes can name it."""
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _write_pictures(place: Path, root: Path | None, *, train: int, test: int) -> None:
    """The first pictures of CIFAR-10 below `root`, or random ones, in its own format."""
    folder = place / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        count = test if name == "test_batch" else train // 5
        if root is None:
            rows = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
            rows[:, 0] = np.arange(count) % 10
        else:
            rows = np.fromfile(root / folder.name / f"{name}.bin", np.uint8, count * 3073)
        rows.tofile(folder / f"{name}.bin")


def _teacher(place: Path) -> str:
    """A recipe's teachers: a ResNet-56 that was never trained, for its speed is the same."""
    torch.manual_seed(0)
    path = place / "teacher.safetensors"
    gray = (0.5, 0.5, 0.5)
    description = Description(
        model="resnet56", arguments={}, num_classes=10, classes=None, image_size=32,
        input_size=None, mean=gray, std=gray,
    )  # fmt: skip
    backbone = backbones.build("resnet56", {}, num_classes=10, image_size=32)
    path.write_bytes(weights.to_bytes(Network(backbone, description)))
    return f"[{{weights: {path}}}]"


def _recipe(place: Path, **keys: Any) -> Recipe:
    defaults = {"augment": "[crop, flip]", "mixup": 0.0, "teachers": "[]", "student": "resnet20"}
    defaults |= {"path": "null", "views": 2, "batch": 128}
    path = place / "recipe.yaml"
    path.write_text(RECIPE.format(root=place, **(defaults | keys)))
    return Recipe.load(path)

"""What a sweep of eight temperatures costs, against eight runs started one by one from a shell.

    python benchmarks/sweep.py [--root ~/data] [--rounds 1] [--student resnet8]
    python benchmarks/sweep.py side-by-side [--student vit] [--batch 128] [--rounds 5]

The first runs the real commands and counts the CPU seconds of their processes: `distill
temperature-sweep`, and `distill train` eight times, each with the teacher live. Both begin in an
empty folder. Then it measures the parts by themselves (start, data, teacher, student), so that the
sums explain the totals. With --root the images are Fashion-MNIST's, else noise.

The second times the loop of a sweep over eight temperatures against that of one run, with the
teacher live and from a cache: on a CPU eight times the work takes eight times as long; on a GPU
that one small student does not fill, the goal is three times. There it also times the same eight
steps by hand, captured in one CUDA graph, one after the other and on a stream each: what the loop
could still gain, and whether streams pay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _setting import Setting, write_cache
from _setting import write as write_setting
from _timing import Work, compare, inverse, report, rows, verdict
from _turns import Variant, interleave
from torch import Tensor

from distill import console, models, yamlio
from distill.data import datasets
from distill.engine import machine
from distill.engine.networks import facts
from distill.engine.session import Session, answers, prepare
from distill.engine.step import train_step
from distill.models.weights import to_bytes
from distill.recipe import Model, Recipe
from distill.types import Batch, Outputs

TEMPERATURES = (1, 2, 3, 4, 5, 6, 8, 10)
IMAGES, TEST, EPOCHS = 2_000, 1_000, 5
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet8": {"model": "resnet8"},
    "vit": {"model": "vit", "patch_size": 7, "width": 64, "depth": 4, "heads": 4},
}
GOAL = 0.75
GOAL_GPU = 3.0  # times one student, for eight


def write(folder: Path, root: Path | None, student: str, batch: int, images: int = IMAGES) -> Path:
    """A recipe, with a teacher of initial weights: what it says costs the same."""
    if root is None:
        _write_noise(folder, images)
    name, whole = ("cifar10", 1.0) if root is None else ("fashion-mnist", images / 54_000)
    sections = {
        "data": {
            "name": name,
            "root": str(root or folder),
            "augment": ["crop", "flip"],
            "val": 0.1,
            "fraction": whole,
        },
        "teachers": [{"weights": str(folder / "teacher.safetensors")}],
        "student": STUDENTS[student],
        "objective": [{"term": "ce", "weight": 0.1}, {"term": "kd", "weight": 0.9}],
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train": {"epochs": EPOCHS, "batch_size": batch},
    }
    path = folder / "recipe.yaml"
    path.write_text(yamlio.dump(sections))
    known = facts(datasets.load(Recipe.load(path).data))
    teacher = models.build_student(Model.model_validate({"model": "resnet20"}), **known)
    (folder / "teacher.safetensors").write_bytes(to_bytes(teacher))
    return path


def _write_noise(root: Path, images: int) -> None:
    """CIFAR-10's files with noise in them."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    sizes = {f"data_batch_{i}": images // 5 for i in range(1, 6)} | {"test_batch": TEST}
    for name, size in sizes.items():
        rows = rng.integers(0, 256, (size, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(size) % 10
        rows.tofile(folder / f"{name}.bin")


def command(*arguments: object) -> float:
    """CPU seconds of `distill ARGUMENTS` and its children; with a GPU, seconds of the clock."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "distill", *map(str, arguments), "--workers", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    if torch.cuda.is_available():
        return time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def totals(recipe: Path, rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of eight runs, and of a sweep, in each round."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            alone = sum(
                command(
                    "train",
                    recipe,
                    "--out",
                    f"{place}/{t}",
                    "--set",
                    f"objective.1.temperature={t}",
                )
                for t in TEMPERATURES
            )
            listed = ",".join(map(str, TEMPERATURES))
            options = ["--temperatures", listed, "--out", f"{place}/sweep"]
            together = command("temperature-sweep", recipe, *options)
        print(
            f"  eight runs {alone:7.1f} s   sweep {together:7.1f} s   ratio {together / alone:.2f}"
        )
        found.append((alone, together))
    return found


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def parts(recipe: Path, trained: int) -> dict[str, float]:
    """CPU seconds of each part of one run, on a set of so many training images."""
    with tempfile.TemporaryDirectory() as place:
        changes = [f"data.fraction={110 / trained}", "train.epochs=1", "train.batch_size=50"]
        options = [word for change in changes for word in ("--set", change)]
        start = command("train", recipe, "--out", f"{place}/start", *options)
        here = machine.setup(workers=0)
        loaded = Recipe.load(recipe)
        session = prepare(loaded, Path(place) / "run", here)
    batches: list[Batch] = []
    outputs: list[Outputs] = []
    ask = session.teacher
    assert ask is not None
    epochs = range(EPOCHS)
    data = timed(lambda: batches.extend(b for e in epochs for b in session.loader.epoch(e)))
    teacher = timed(lambda: outputs.extend(map(ask, batches)))
    told = iter(outputs)
    weights = session.distiller.objective.weights_at(0.5)

    def learn() -> None:
        for batch in batches:
            train_step(
                session.model, lambda _: next(told), session.optimizer, batch, weights=weights
            )

    student = timed(learn)
    asked = session.student, "val", loaded, session.dataset, here
    validation = EPOCHS * timed(lambda: answers(*asked))
    session.close()
    return {
        "start and end": start,
        "data": data,
        "teacher": teacher,
        "student": student,
        "validation": validation,
    }


def sweep(options: argparse.Namespace) -> None:
    """Eight runs against one sweep, and what both are made of."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write(Path(folder), options.root, options.student, options.batch, options.images)
        print(f"\neight temperatures, {options.student}, batch {options.batch}, CPU seconds")
        found = totals(recipe, options.rounds)
        one = parts(recipe, 54_000 if options.root else 9 * options.images // 10)
    start, data, teacher, student, validation = one.values()
    count, own = len(TEMPERATURES), student + validation
    print("\none run: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in one.items()))
    alone = count * (start + data + teacher + own)
    together = start + (data + teacher) + data + count * own
    print(f"eight runs: 8 (start + data + teacher + student + validation) = {alone:.1f} s")
    print(f"a sweep: start + data + teacher + data + 8 (student + validation) = {together:.1f} s")
    named = zip(("eight runs", "a sweep of eight"), zip(*found, strict=True), strict=True)
    spent = rows({name: list(seconds) for name, seconds in named})
    title = f"eight temperatures, {options.student}, batch {options.batch}, whole commands"
    report(title, spent, unit="CPU-s", per="", note="Ratios are of times.")
    verdict(f"sweep over eight runs, goal {GOAL}", spent[1].ratio, spent[1].most <= GOAL)


def side_by_side(options: argparse.Namespace) -> None:
    """Eight students in `distill temperature-sweep`'s loop against one, live and cached."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = (200 if device == "cuda" else 10) * options.batch
    setting = Setting(
        teacher="resnet20", student="resnet8", size=32, batch=options.batch, precision="fp32",
        device=device, images=images, turn=images, workers=1,
    )  # fmt: skip
    program = [sys.executable, str(Path(__file__).with_name("_variant.py")), "ours"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        write_setting(setting, folder)
        write_cache(setting, folder)
        for how in ("live", "cached"):
            variants = [
                Variant(name, [*program, str(folder), json.dumps({"how": how, **keys})])
                for name, keys in (
                    ("one student", {}),
                    ("eight in one loop", {"temperatures": TEMPERATURES}),
                )
            ]
            found = interleave(
                variants, rounds=options.rounds, wall=device == "cuda", folder=folder,
                environment=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            report(
                f"a sweep's loop: resnet8, batch {options.batch}, teacher resnet20 {how}",
                inverse(found),
                unit="images",
                per="s" if device == "cuda" else "CPU-s",
                note="Ratios are of times, eight students' to one's.",
            )
            if device == "cuda" and not found[1].failed:
                ratio = 1 / found[1].ratio
                verdict(f"eight over one, {how}, goal {GOAL_GPU:g}", ratio, ratio <= GOAL_GPU)
    if device == "cuda":
        by_hand(options)


def by_hand(options: argparse.Namespace) -> None:
    """The same eight steps captured in one CUDA graph: what is possible, and if streams pay."""
    console.err.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(write(Path(folder), options.root, options.student, options.batch))
        here = machine.setup(workers=0)
        sessions = [prepare(recipe, Path(folder) / str(t), here) for t in TEMPERATURES]
    batch = next(sessions[0].loader.epoch(0))
    logits = torch.randn(len(batch.ids), 10, device=here.device)
    variants = {"one in a CUDA graph": captured(sessions[:1], batch, logits, False)}
    for streams in (False, True):
        how = "a stream each" if streams else "one after the other"
        variants[f"eight in one CUDA graph, {how}"] = captured(sessions, batch, logits, streams)
    found = inverse(compare(variants, rounds=options.rounds, wall=True))
    title = f"by hand, a step of {options.student}, batch {options.batch}"
    report(title, found, unit="steps", per="s", note="Ratios are of times.")


def captured(sessions: list[Session], batch: Batch, logits: Tensor, streams: bool) -> Work:
    """The eight steps written by hand and captured in one CUDA graph."""
    students = [session.distiller.student for session in sessions]
    optimizers = [
        torch.optim.AdamW(s.parameters(), lr=1e-3, fused=True, capturable=True) for s in students
    ]
    side = [torch.cuda.Stream() for _ in students]

    def one(i: int, temperature: float) -> None:
        z = students[i](batch.images).logits.float()
        log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (z, logits))
        kd = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean() * temperature**2
        (0.1 * F.cross_entropy(z, batch.labels) + 0.9 * kd).backward()
        optimizers[i].step()
        optimizers[i].zero_grad(set_to_none=False)

    def step() -> None:
        main = torch.cuda.current_stream()
        for i, temperature in enumerate(TEMPERATURES[: len(sessions)]):
            if not streams:
                one(i, temperature)
                continue
            side[i].wait_stream(main)
            with torch.cuda.stream(side[i]):
                one(i, temperature)
        for stream in side if streams else ():
            main.wait_stream(stream)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def work() -> int:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        return 10

    return work


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("sweep", "side-by-side"), default="sweep")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--student", choices=STUDENTS, default="resnet8")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--images", type=int, default=IMAGES, help="of a run of the first")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sweep(options) if options.what == "sweep" else side_by_side(options)


if __name__ == "__main__":
    main()

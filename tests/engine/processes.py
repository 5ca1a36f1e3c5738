"""Training in processes of their own, that tests can kill and send signals to."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch

context: ForkServerContext = multiprocessing.get_context("forkserver")
# With torch._dynamo, which the first optimizer imports: else each process began with seconds of
# imports, and that is where most kills hit it.
context.set_forkserver_preload(
    [
        "torch._dynamo",
        "distill.sweep",
        "distill.report.sweep",
        "distill.report.run",
        "distill.cli",
        "distill.models.zoo.vit",
        "distill.models.zoo.resnet",
    ]
)


def start(recipe: Path, out: Path, **options: Any) -> ForkServerProcess:
    """Begin to train in a process of its own, which imports nothing heavy any more."""
    process = context.Process(target=_train, args=(recipe, out, options))
    process.start()
    return process


def _as_alone() -> None:
    """Be like a process that no server forked: one thread, and workers that are its children."""
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)


def _train(recipe: Path, out: Path, options: dict[str, Any]) -> None:
    from distill.engine.train import train
    from distill.errors import DistillError
    from distill.recipe import Recipe

    _as_alone()
    try:
        train(Recipe.load(recipe), out, **options)
    except DistillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


class Strike(NamedTuple):
    """A process sends itself a signal as a function of its is called for the n-th time."""

    where: str  # distill.engine.fit.Training.take
    call: int  # from 1
    signum: int


class Slow(NamedTuple):
    """A function takes longer."""

    where: str
    seconds: float


def command(
    folder: Path,
    *arguments: object,
    said: Path,
    strike: Strike | None = None,
    slow: Slow | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    ignored: int | None = None,
) -> ForkServerProcess:
    """Begin `distill ARGUMENTS` in a folder, in a process that imports nothing heavy any more.

    Args:
        folder: Where it works.
        arguments: Of the command line.
        said: Takes what it prints: a file, a pipe, or a terminal, which then is its own.
        strike: A signal that it sends itself.
        slow: What takes it longer.
        log: Takes a line `step began ended` for each optimizer step, by the monotonic clock.
        env: More variables.
        ignored: A signal that is ignored from the beginning.
    """
    words = [str(word) for word in arguments]
    process = context.Process(
        target=_command, args=(folder, words, said, strike, slow, log, dict(env or {}), ignored)
    )
    process.start()
    return process


def _command(
    folder: Path,
    arguments: list[str],
    said: Path,
    strike: Strike | None,
    slow: Slow | None,
    log: Path | None,
    env: dict[str, str],
    ignored: int | None,
) -> None:
    from distill.cli import app

    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `distill.__main__` does
    own = os.O_RDWR if said.is_char_device() else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(said, own), stream.fileno())
    os.chdir(folder)
    os.environ.update({"COLUMNS": "200", **env})
    _as_alone()
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    if log is not None:
        _log_steps(log)
    if slow is not None:
        _replace(slow.where, lambda number: time.sleep(slow.seconds))
    if strike is not None:
        _strike(strike)
    sys.argv = ["distill", *arguments]
    app(arguments, prog_name="distill")


def launch(folder: Path, count: int, arguments: list[str], *, said: Path) -> ForkServerProcess:
    """Begin a process that starts `distill ARGUMENTS` in `count` others, real ones, of a group."""
    process = context.Process(target=_launch, args=(folder, count, arguments, said))
    process.start()
    return process


def _launch(folder: Path, count: int, arguments: list[str], said: Path) -> None:
    from distill.engine import launch

    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    os.chdir(folder)
    sys.exit(launch.spawn(count, arguments))


def _replace(where: str, before: Callable[[int], None]) -> None:
    """Do something before each call of a function, which is told its number."""
    owner, _, name = where.rpartition(".")
    found = pkgutil.resolve_name(owner)
    act, numbers = getattr(found, name), itertools.count(1)

    def replaced(*values: Any, **keys: Any) -> Any:
        before(next(numbers))
        return act(*values, **keys)

    setattr(found, name, replaced)


def _strike(strike: Strike) -> None:
    def before(number: int) -> None:
        if number == strike.call:
            os.kill(os.getpid(), strike.signum)

    _replace(strike.where, before)


def _log_steps(log: Path) -> None:
    from distill.engine.fit import Training

    take = Training.take

    def logged(self: Training, batch: Any) -> bool:
        with log.open("a") as lines:
            lines.write(f"{self.step + 1} {time.monotonic()}")
            lines.flush()
            row = take(self, batch)
            lines.write(f" {time.monotonic()}\n")
        return row

    Training.take = logged  # type: ignore[method-assign]


def struck(recipe: Path, out: Path, strike: Strike, **options: Any) -> ForkServerProcess:
    """Begin to train in a process that sends itself a signal."""
    process = context.Process(target=_struck, args=(recipe, out, strike, options))
    process.start()
    return process


def _struck(recipe: Path, out: Path, strike: Strike, options: dict[str, Any]) -> None:
    _strike(strike)
    _train(recipe, out, options)


def build(recipe: Path, out: Path, shard: tuple[int, int]) -> ForkServerProcess:
    """Begin to make a part of the recipe's teacher cache in a process of its own."""
    process = context.Process(target=_build, args=(recipe, out, shard))
    process.start()
    return process


def _build(recipe: Path, out: Path, shard: tuple[int, int]) -> None:
    from distill.data import datasets
    from distill.engine import machine
    from distill.engine.jobs import Settings, build_jobs
    from distill.engine.precompute import precompute
    from distill.errors import DistillError
    from distill.recipe import Recipe

    _as_alone()
    try:
        loaded = Recipe.load(recipe)
        dataset, here = datasets.load(loaded.data), machine.setup(workers=0)
        with machine.stop_request() as stop:
            jobs = build_jobs(loaded, str(out), out, dataset, here)
            settings = Settings(shard=shard, unit_rows=32, views_per_read=2)
            precompute(loaded, jobs, dataset, here, stop, settings)
    except DistillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


def sweep(recipe: Path, place: Path, temperatures: tuple[float, ...]) -> ForkServerProcess:
    """Begin a sweep in `place/sweep` in a process of its own."""
    process = context.Process(target=_sweep, args=(recipe, place, temperatures))
    process.start()
    return process


def _sweep(recipe: Path, place: Path, temperatures: tuple[float, ...]) -> None:
    from distill.grid import temperature_axis
    from distill.recipe import Recipe
    from distill.report.sweep import write
    from distill.sweep import Sweep, sweep

    _as_alone()
    os.chdir(place)
    loaded = Recipe.load(recipe)
    axes = [temperature_axis(loaded, temperatures)]
    found = sweep(loaded, axes, Path("sweep"), workers=0, checkpoint_seconds=0)
    assert isinstance(found, Sweep)
    write(found.to_json(), Path("sweep"))


def rank(folder: Path, out: Path) -> ForkServerProcess:
    """Begin to rank the teachers of `folder/student.yaml` in a process of its own."""
    process = context.Process(target=_rank, args=(folder, out))
    process.start()
    return process


def _rank(folder: Path, out: Path) -> None:
    from distill import rank
    from distill.engine import jobs
    from distill.recipe import Recipe
    from distill.report.rank import write

    _as_alone()
    jobs.TIMED_SECONDS = 0.1
    os.chdir(folder)
    loaded = Recipe.load("student.yaml")
    found = rank.rank(loaded, out, epochs=2, workers=0, checkpoint_seconds=0)
    assert isinstance(found, rank.Ranking)
    write(found.to_json(), out)


def timed(start: Callable[[Path], ForkServerProcess], place: Path) -> float:
    """Let a process come to its end in a place; return the seconds that it took."""
    first = context.Process(target=int)  # what all others are forked from is there with it
    first.start()
    first.join()
    began = time.monotonic()
    process = start(place)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def killed(
    start: Callable[[Path], ForkServerProcess], folder: Path, kills: int, *, seconds: float
) -> Iterator[Path]:
    """Places in which a process came to its end after it had been killed at random points.

    Args:
        start: Begins it in a place, or goes on there.
        folder: Of the places.
        kills: How many there are, over all places.
        seconds: That it takes when nobody kills it.
    """
    draw = random.Random(kills)
    done = 0
    for number in itertools.count():
        if done >= kills:
            return
        place = folder / f"cut-{number}"
        while True:
            first, began = not place.exists(), time.monotonic()
            process = start(place)
            process.join(timeout=draw.uniform(0.1, 0.9) * seconds if done < kills else None)
            if process.exitcode is not None:
                if first:  # the machine was busier before
                    seconds = min(seconds, time.monotonic() - began)
                break
            process.kill()
            process.join()
            done += 1
        assert process.exitcode == 0
        yield place


def traces(out: Path) -> dict[str, bytes]:
    """Everything a finished run left behind that must not depend on how often it was cut."""
    import json

    newest = max((out / "checkpoint").glob("step-????????"))
    found = {
        path.name: path.read_bytes()
        for path in [*newest.glob("*.safetensors"), out / "student.safetensors"]
    }
    found["metrics.jsonl"] = (out / "metrics.jsonl").read_bytes()
    found["recipe.yaml"] = (out / "recipe.yaml").read_bytes()
    result = json.loads((out / "result.json").read_text())
    for clock in ("seconds", "images_per_second", "data_wait", "memory", "run", "teachers"):
        del result[clock]
    result["warnings"] = [one for one in result["warnings"] if "% of the time" not in one]
    found["result.json"] = json.dumps(result).encode()
    return found


def free_port() -> int:
    """A port that nobody listens to, for a process group to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def largest_difference(first: Path, second: Path) -> float:
    """Over all tensors of two files; but for noise."""
    a, b = (safetensors.torch.load_file(file) for file in (first, second))
    assert {n: (x.shape, x.dtype) for n, x in a.items()} == {
        n: (x.shape, x.dtype) for n, x in b.items()
    }
    for tensors in (a, b):
        # Softmax ignores a bias of the keys, so its gradient is rounding noise, and AdamW blows
        # that up to whole steps. All other weights agree.
        for name, tensor in tensors.items():
            if name.endswith("qkv.bias"):
                tensor.unflatten(0, (3, -1))[1].zero_()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)

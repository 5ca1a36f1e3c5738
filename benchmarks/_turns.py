"""Variants as processes that take turns: each waits until it is asked, and times its own work.

A process of its own gives each variant its own peak of memory, its own libraries and its own
failures. All are started at once; from the first turn on, which warms up and is not counted, only
one of them works at a time. One line on stdin asks for a turn, one on stdout tells what it took.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from _meters import Joules
from _timing import Row, cpu_seconds, in_turn, rows

BEGINNING, TURN = 600.0, 600.0  # seconds after which a variant is given up


class Turns:
    """The side of a variant.

    Attributes:
        waited: Seconds without a batch so far; whoever knows adds to it.

    Args:
        units: Of a turn.
        device: Whose work is waited for.
    """

    def __init__(self, units: int, device: str) -> None:
        self.units, self.waited = units, 0.0
        self._cuda = device == "cuda"
        self._done = 0
        # Only answers go to stdout; what libraries print goes where errors go.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def begin(self) -> None:
        """Wait for the next turn; the process ends where there is none."""
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # the next in turn needs the memory
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # whatever a library still wants to do
        self._sync()
        self._waited = self.waited
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def end(self, units: int | None = None) -> None:
        """Say what the turn took."""
        self._sync()
        answer = {
            "units": self.units if units is None else units,
            "wall": time.perf_counter() - self._wall,
            "cpu": cpu_seconds() - self._cpu,
            "waited": self.waited - self._waited,
            "memory": self._memory(),
        }
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def step(self, units: int) -> None:
        """Count a step in; a turn that is full ends, and the next one begins."""
        self._done += units
        if self._done >= self.units:
            self.end(self._done)
            self._done = 0
            self.begin()

    def over(self, batches: Any) -> Waiting:
        """The batches, and the wait for each of them counted."""
        return Waiting(batches, self)

    def whole(self, epoch: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each of whose calls is a turn."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            result = epoch(*args, **kwargs)
            self.end()
            return result

        return call

    def _sync(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()

    def _memory(self) -> int:
        if self._cuda:
            import torch

            free, whole = torch.cuda.mem_get_info()
            if free < whole / 2:  # the next in turn needs some
                torch.cuda.empty_cache()
            return int(torch.cuda.max_memory_allocated())
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Waiting:
    """A loader in every respect, that counts how long it is waited for."""

    def __init__(self, loader: Any, turns: Turns) -> None:
        self._loader, self._turns = loader, turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        began = time.perf_counter()
        source = iter(self._loader)
        while True:
            batch = next(source, None)
            self._turns.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch
            began = time.perf_counter()


class Variant(NamedTuple):
    """What is started, and what it is held to."""

    name: str
    command: Sequence[str]
    limit: float | None = None  # units a second that the device allows
    path: Sequence[Path] = ()  # where it finds its libraries first


class _Process:
    """The side that asks."""

    def __init__(self, variant: Variant, folder: Path, environment: Mapping[str, str]) -> None:
        self.variant, self.answers = variant, list[dict[str, Any]]()
        self.failed: str | None = None
        self._said: IO[str] = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 (closed with the process)
        place = Path(tempfile.mkdtemp(dir=folder))  # some peers write where they are
        path = [*map(str, variant.path), environment.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            list(variant.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=place,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,
        )

    def turn(self, seconds: float) -> dict[str, Any] | None:
        """Ask for a turn; None where the process cannot give one any more."""
        if self.failed is not None:
            return None
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        try:
            asked.write(b"go\n")
            asked.flush()
            ready, _, _ = select.select([answers], [], [], seconds)
            line = answers.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [answers], b""
        if not line:
            self.failed = self._reason() if ready else f"no turn within {seconds:.0f} s"
            self.close()
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._said.close()

    def _reason(self) -> str:
        self._said.seek(0)
        lines = [line.rstrip() for line in self._said.read().splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        return (named or lines or ["it ended without a word"])[-1].strip()[:300]


def interleave(
    variants: Sequence[Variant],
    *,
    rounds: int,
    wall: bool,
    folder: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of all variants over so many rounds; one that fails has a row that says why.

    Args:
        variants: The first is the one that others are held to.
        rounds: Turns of each.
        wall: Whether seconds are those of the clock; else of processors, which workers count into.
        folder: For what they write.
        environment: Of their processes.
        say: Told of each turn.
    """
    clock = "wall" if wall else "cpu"
    processes = {v.name: _Process(v, folder, environment) for v in variants}
    try:
        for name, process in processes.items():
            say(f"{name}: warming up")
            process.turn(BEGINNING)
        joules = Joules(cuda=wall)
        for number in range(rounds):
            for name in in_turn(list(processes), number):
                say(f"{name}: round {number + 1} of {rounds}")
                before = joules.read()
                answer = processes[name].turn(TURN)
                if answer is not None:
                    answer["joules"] = joules.since(before)
                    processes[name].answers.append(answer)
    finally:
        for process in processes.values():
            process.close()
    return _rows(list(processes.values()), rounds, clock)


def _rows(processes: Sequence[_Process], rounds: int, clock: str) -> list[Row]:
    whole = {p.variant.name: p for p in processes if len(p.answers) == rounds}
    rates = {
        name: [answer["units"] / max(answer[clock], 1e-9) for answer in process.answers]
        for name, process in whole.items()
    }
    base = processes[0].variant.name
    figures: dict[str, Row] = {}
    if base in rates:
        figures = {row.name: row for row in rows(rates)}
    found = []
    for process in processes:
        variant = process.variant
        if variant.name not in figures:
            reason = process.failed or f"no figures: {base!r} has none"
            found.append(Row(variant.name, 0.0, 0.0, 0.0, 0.0, failed=reason))
            continue
        row, answers = figures[variant.name], process.answers
        spent = [a["joules"] / a["units"] for a in answers if a["joules"] is not None]
        found.append(
            row._replace(
                share=row.rate / variant.limit if variant.limit else None,
                memory=max(answer["memory"] for answer in answers),
                waited=statistics.median(a["waited"] / a["wall"] for a in answers),
                joules=statistics.median(spent) if spent else None,
            )
        )
    return found

"""What a run says of itself: rows of metrics.jsonl, and a line that moves on the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from distill import console, storage
from distill.engine.finite import Finding, Watch, first
from distill.types import Losses

T = TypeVar("T")

WAITED = 0.05  # of the time, from which on a wait for images is shown
PLAIN_SECONDS = 10.0  # between two lines where the output is no terminal
RATIO = (0.05, 50.0)  # of teacher's to labels' gradient; outside it one of them decides alone


class Monitor:
    """The losses of every step, left on the device until a row of metrics needs them."""

    def __init__(
        self,
        path: Path | None,
        names: list[str],
        device: torch.device,
        watch: Watch | None = None,
    ) -> None:
        self.path = path  # None in all processes but one
        self._watch = watch  # traces what is not finite
        self.names = ["loss", *names]
        self.device = device
        self.fetched: list[list[float]] = []  # a list of losses for each step since the last row
        self.waiting: list[Tensor] = []

    def add(self, losses: Losses) -> None:
        """Count one step in. Waits for nothing, and computes nothing."""
        self.waiting += (losses.total, *losses.parts.values())

    def means(self, step: int) -> dict[str, float]:
        """The means since the last row, over all processes.

        Raises:
            DivergedError: If one of them is not a finite number.
        """
        self._fetch()
        count = max(1, len(self.fetched))
        means = [sum(column) / count for column in zip(*self.fetched, strict=True)]
        if dist.is_initialized():
            shared = torch.tensor(means, device=self.device)
            dist.all_reduce(shared)
            means = (shared / dist.get_world_size()).tolist()
        if not all(map(math.isfinite, means)):  # and so they are in all processes
            found = self._broken(step) or Finding(step, 9, f"a loss is not finite at step {step}")
            raise first(found).error()
        return dict(zip(self.names, means, strict=True))

    def require_finite(self, step: int) -> None:
        """Check this process's losses, so that a checkpoint is only ever made of a sound run.

        Raises:
            DivergedError: If one of them is not a finite number.
        """
        self._fetch()
        if found := self._broken(step):
            raise found.error()

    def _fetch(self) -> None:
        if self.waiting:
            values = torch.stack(self.waiting).float().view(-1, len(self.names))
            self.fetched += values.tolist()
            self.waiting.clear()

    def _broken(self, step: int) -> Finding | None:
        """The first of the losses of the steps up to this one that is not finite."""
        for at, losses in enumerate(self.fetched, start=step - len(self.fetched) + 1):
            total, *parts = zip(self.names, losses, strict=True)
            for name, value in (*parts, total):  # a term says more than their sum
                if not math.isfinite(value):
                    found = Finding(at, 9, f"{name} is {value} at step {at}")
                    return found if self._watch is None else self._watch.past(found)
        return None

    def row(self, values: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl and begin new means.

        A row holds nothing that depends on the clock: however often a run is cut and goes on,
        the file comes out the same, byte for byte.
        """
        self.fetched.clear()
        self.append(values)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a row that closes no means."""
        if self.path is not None:
            storage.append(self.path, (json.dumps(dict(values)) + "\n").encode())

    def state(self) -> dict[str, Any]:
        """The means in work and the rows so far, for a checkpoint.

        Where means are in work, all processes have to ask.
        """
        rows = self.path.read_text(encoding="utf-8") if self.path and self.path.exists() else ""
        self._fetch()
        state = {"losses": self.fetched, "rows": rows}
        if dist.is_initialized() and self.fetched:
            each: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(each, self.fetched)
            state["processes"] = each
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; rows written after it are forgotten."""
        own = each = state.get("processes", [state["losses"]])
        if dist.is_initialized() and len(each) == dist.get_world_size():
            own = [each[dist.get_rank()]]
        # Of another number of processes all have their mean.
        self.fetched = [
            [sum(values) / len(own) for values in zip(*losses, strict=True)]
            for losses in zip(*own, strict=True)
        ]
        if self.path is not None:
            storage.write(self.path, state["rows"].encode())


def imbalance(row: Mapping[str, float]) -> str | None:
    """What a user is told of a row in which teacher or labels decide alone."""
    ratio = max(row.get("gradient_ratio", 1.0), 1e-12)
    if RATIO[0] <= ratio <= RATIO[1]:
        return None
    strong, weak = ("teacher", "labels") if ratio > 1 else ("labels", "teacher")
    return (
        f"at step {row['step']} the gradient from the {strong} is {max(ratio, 1 / ratio):.0f} "
        f"times the one from the {weak}, which hardly counts; mind weights and temperature"
    )


class _Bar:
    """A bar on a terminal, for as long as the work goes on."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console.err,
            disable=not console.err.is_terminal or console.err.quiet,
            transient=True,
            refresh_per_second=5,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.stop()


class Display(_Bar):
    """A progress bar on a terminal; elsewhere one plain line every ten seconds.

    Attributes:
        epoch: The one in work, counted from 1.
        waited: Seconds without a batch to work on, as far as is known.

    Args:
        name: Begins every line.
        done: Steps done before.
        total: Steps of all students, over all that the command trains.
        batch_size: Images a step.
    """

    def __init__(self, name: str, done: int, total: int, batch_size: int) -> None:
        super().__init__()
        self.name, self.total, self.batch_size, self.epoch = name, total, batch_size, 1
        self.began_at = self.done = done
        self.began = self.shown = time.monotonic()
        self.waited = 0.0  # seconds of it without a batch
        self.text = ""
        self.task = self.bar.add_task(console.visible(name), total=total, completed=done, text="")

    def losses(self, means: Sequence[Mapping[str, float]]) -> None:
        """Show these means, one of each student, until the next ones."""
        if len(means) == 1:
            loss, *parts = [f"{name} {value:.3f}" for name, value in means[0].items()]
            self.text = f"{loss} ({' '.join(parts)})" if len(parts) > 1 else loss
        elif losses := [one["loss"] for one in means if one]:
            self.text = f"{len(means)} students, loss {min(losses):.3f} to {max(losses):.3f}"

    def skip(self, steps: int) -> None:
        """Count steps in that were made before."""
        self.done += steps
        self.began_at += steps

    def advance(self) -> None:
        """Move on by a step. Costs a clock reading, and ten times a second a little more."""
        self.done += 1
        now = time.monotonic()
        terminal = not self.bar.disable
        if now - self.shown < (0.1 if terminal else PLAIN_SECONDS) and self.done < self.total:
            return
        self.shown = now
        seconds = max(now - self.began, 1e-9)
        rate = (self.done - self.began_at) * self.batch_size / seconds
        text = f"{self.text}  {rate:,.0f} images/s"
        if self.waited > WAITED * seconds:
            text += f", waiting for images {self.waited / seconds:.0%}"
        if terminal:
            text = console.visible(text)
            self.bar.update(self.task, completed=self.done, total=self.total, text=text)
        else:
            left = (self.total - self.done) * self.batch_size / max(rate, 1e-9)
            where = f"epoch {self.epoch} step {self.done}/{self.total}"
            console.say(f"{self.name}: {where}  {text}  {left:.0f} s left")


class Passage(_Bar):
    """How far a pass over data is: a bar on a terminal, elsewhere a plain line every ten seconds.

    Attributes:
        done: Answers so far.
    """

    def __init__(self, name: str, total: int) -> None:
        super().__init__()
        self.name, self.total, self.done = name, total, 0
        self.began = self.shown = time.monotonic()
        self.waited = 0.0  # seconds without pixels
        self.task = self.bar.add_task(console.visible(name), total=total, text="")

    @property
    def data_wait(self) -> float:
        """Fraction of the time that was spent waiting for pixels."""
        return self.waited / max(time.monotonic() - self.began, 1e-9)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, and the wait for each of them counted."""
        source = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(source, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def advance(self, count: int) -> None:
        """Count answers in."""
        self.done += count
        now, terminal = time.monotonic(), not self.bar.disable
        if now - self.shown < (0.1 if terminal else PLAIN_SECONDS):
            return
        self.shown = now
        rate = self.done / max(now - self.began, 1e-9)
        text = f"{rate:,.0f} answers/s, waiting for pixels {self.data_wait:.0%}"
        if terminal:
            self.bar.update(self.task, completed=self.done, text=text)
        else:
            left = (self.total - self.done) / max(rate, 1e-9)
            console.say(f"{self.name}: {self.done:,} of {self.total:,}  {text}  {left:.0f} s left")

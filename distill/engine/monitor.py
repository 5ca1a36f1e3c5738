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
from distill.errors import DivergedError
from distill.types import Losses

T = TypeVar("T")

WAITED = 0.05  # of the time, from which on a wait for images is shown
PLAIN_SECONDS = 10.0  # between two lines where the output is no terminal


class Monitor:
    """The losses of every step, left on the device until a row of metrics needs them."""

    def __init__(self, path: Path | None, names: list[str], device: torch.device) -> None:
        self.path = path  # None in all processes but one
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
        self.require_finite(step)  # only now: no process may leave the others waiting above
        return self._finite(means, step)

    def require_finite(self, step: int) -> None:
        """Check this process's losses, so that a checkpoint is only ever made of a sound run.

        Raises:
            DivergedError: If one of them is not a finite number.
        """
        self._fetch()
        for at, losses in enumerate(self.fetched, start=step - len(self.fetched) + 1):
            self._finite(losses, at)

    def _fetch(self) -> None:
        if self.waiting:
            values = torch.stack(self.waiting).float().view(-1, len(self.names))
            self.fetched += values.tolist()
            self.waiting.clear()

    def _finite(self, values: list[float], step: int) -> dict[str, float]:
        found = dict(zip(self.names, values, strict=True))
        for name in (*self.names[1:], self.names[0]):  # a term says more than their sum
            if not math.isfinite(found[name]):
                raise DivergedError(
                    f"{name} is {found[name]} at step {step}; checkpoints from before it are kept",
                    hint="a lower optimizer.lr, a longer warmup_epochs, or a clip_norm",
                )
        return found

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
        """The means in work and the rows so far, for a checkpoint."""
        rows = self.path.read_text(encoding="utf-8") if self.path and self.path.exists() else ""
        self._fetch()
        return {"losses": self.fetched, "rows": rows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; rows written after it are forgotten."""
        self.fetched = state["losses"]
        if self.path is not None:
            storage.write(self.path, state["rows"].encode())


class _Bar:
    """A bar on a terminal, for as long as the work goes on."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
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
        self.task = self.bar.add_task(name, total=total, completed=done, text="")

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
        self.task = self.bar.add_task(name, total=total, text="")

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

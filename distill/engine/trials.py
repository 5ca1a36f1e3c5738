"""Many short runs that are compared: trained side by side, each kept in a directory of its own.

A trial is a run like any other: its directory holds a recipe, checkpoints and a student, and goes
on where it was cut. What is compared lies in its `trial.json`. So a set of trials can be killed at
any point, spread over machines that know nothing of each other, or be added to later.
"""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict

from distill import console, evaluate, jsonio, storage
from distill.engine import checkpoint, machine
from distill.engine.fit import Training, fit
from distill.engine.machine import Machine
from distill.engine.memory import free_bytes
from distill.engine.monitor import Display
from distill.engine.run import Run
from distill.engine.session import Session, announce, answers, prepare_together
from distill.errors import DamagedError, DistillError, IdentityError, PreflightError
from distill.grid import Trial
from distill.identity import require_known, require_same
from distill.models import cost, weights
from distill.recipe import Recipe

FORMAT = 1  # of trial.json
MEMORY_PART = 0.5  # of what is free, for the students that are trained side by side


class Outcome(NamedTuple):
    """What is kept of a trial."""

    scores: dict[str, float]  # on the split that it is judged by, after the last epoch
    correct: Bool[np.ndarray, " N"]  # by image of that split, in the order of their ids
    parameters: int
    flops: int
    warnings: list[str]
    failed: str | None = None  # the reason


class _Kept(BaseModel):
    """What `trial.json` holds of one that did not fail."""

    model_config = ConfigDict(extra="forbid")

    scores: dict[str, float]
    correct: str  # a bit an image, in base64
    images: int
    parameters: int
    flops: int
    warnings: list[str]
    failed: None = None


def outcome(path: Path) -> Outcome | None:
    """What a trial's directory says; None where it is not done.

    Raises:
        DamagedError: If it cannot be read.
        IdentityError: If a newer version wrote it.
    """
    file = path / "trial.json"
    try:
        found = jsonio.mapping(file.read_text(encoding="utf-8"))
        require_known(found.pop("format", 1), FORMAT, str(file))
        if found.get("failed"):
            return Outcome({}, np.zeros(0, bool), 0, 0, [], str(found["failed"]))
        kept = jsonio.checked(_Kept, found)
        bits = np.frombuffer(base64.b64decode(kept.correct, validate=True), np.uint8)
        if not 0 <= kept.images <= 8 * len(bits):
            raise ValueError(f"images: {kept.images:,}, and it tells of {8 * len(bits):,}")
        correct = np.unpackbits(bits, count=kept.images).astype(bool)
        return Outcome(kept.scores, correct, kept.parameters, kept.flops, kept.warnings)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IdentityError:
        raise
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{file}: cannot be read: {error}",
            hint="delete it and run the same command again: it is made anew from the checkpoint",
        ) from None


def run_trials(
    trials: Sequence[Trial],
    out: Path,
    here: Machine,
    *,
    split: str = "val",
    memory: float | None = None,
) -> None:
    """Train the trials that are not done yet, those side by side that see the same batches.

    One that fails is kept as failed, and the others go on; the next call tries it again.

    Args:
        trials: Each has its run in `out/NAME`.
        out: Of all of them.
        here: Where.
        split: That they are judged by: `val` or `test`.
        memory: Bytes for the students of a round and their optimizers; None is half of what is
            free. The others wait for the next round.

    Raises:
        IdentityError: If a directory holds a run of another recipe.
        PreflightError: If another process works on one of them, or a disk is full.
        Stopped: If a signal asked for it; all is saved.
    """
    storage.make_folder(out)  # or say why it cannot be, before anything is looked for in it
    for trial in trials:
        _require_same_recipe(out / trial.name, trial)
    left = [trial for trial in trials if not _done(out / trial.name)]
    if not left:
        return
    rounds = _Rounds(out, here, split, memory, left=len(left))
    with Display(out.parent.name, 0, 1, left[0].recipe.train.batch_size) as display:
        for alike in _streams(left):
            while alike:
                alike = rounds.train(alike, display)


def _streams(trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """The trials that see the same batches, together."""
    found: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        recipe = trial.recipe
        train = recipe.train.model_dump(exclude={"ema", "eval_epochs"})
        shared = recipe.data.model_dump_json(), json.dumps(train), recipe.num_views
        found.setdefault(shared, []).append(trial)
    yield from found.values()


class _Rounds:
    """One process's way through its trials."""

    def __init__(
        self,
        out: Path,
        here: Machine,
        split: str,
        memory: float | None,
        *,
        left: int,
    ) -> None:
        self.out, self.here, self.split, self.memory = out, here, split, memory
        self.left = left  # trials that no round has tried yet

    def train(self, trials: list[Trial], display: Display) -> list[Trial]:
        """Train as many as fit into memory, the first at least; return the others."""
        lost: set[int] = set()

        def lose(i: int, error: Exception) -> None:
            _fail(self.out / trials[i].name, error)
            lost.add(i)

        with machine.determinism(trials[0].recipe.train.deterministic), ExitStack() as held:
            for trial in trials:
                held.enter_context(storage.lock(self.out / trial.name))
            sessions = prepare_together(
                [trial.recipe for trial in trials],
                self.out / trials[0].name,
                self.here,
                memory=free_bytes(self.here.device) * MEMORY_PART
                if self.memory is None
                else self.memory,
                lost=lose,
            )
            for session in sessions.values():
                held.callback(session.close)
            numbers = {self._begun(trials[i], session): i for i, session in sessions.items()}
            self.left -= len(lost) + len(numbers)
            if numbers:
                self._require_room(list(numbers))
                self._fit(list(numbers), display, lambda one, error: lose(numbers[one], error))
            for training, i in numbers.items():
                if i not in lost:
                    _settle(training, self.split)
        return [trial for i, trial in enumerate(trials) if i not in lost | set(sessions)]

    def _begun(self, trial: Trial, session: Session) -> Training:
        """The trial, gone on with where it can be."""
        run = Run(self.out / trial.name)
        try:
            return Training(trial.recipe, run, session, self.here, quiet=True)
        except DamagedError as error:
            console.warn(f"{error}; {trial.name} is begun anew")
            run.clear()
            return Training(trial.recipe, run, session, self.here, quiet=True)

    def _require_room(self, trainings: list[Training]) -> None:
        """Refuse a disk that these and the later rounds, about as large each, would fill."""
        if self.here.main:
            needs = [training.room for training in trainings]
            files = checkpoint.FILES * (len(needs) + self.left)
            storage.require_room(self.out, sum(needs) + self.left * max(needs), files=files)

    def _fit(
        self,
        trainings: list[Training],
        display: Display,
        lost: Callable[[Training, Exception], None],
    ) -> None:
        first = trainings[0]
        if all(training.step == 0 for training in trainings):
            announce(first.recipe, first.session, self.here)
        if len(trainings) > 1:
            console.say(f"{len(trainings)} students side by side, {first.total:,} steps each")
        # Of the later rounds' steps no more is known than that they are about as many.
        steps = sum(training.total for training in trainings)
        display.total = display.done + steps + self.left * first.total
        display.skip(sum(training.step for training in trainings))
        with machine.stop_request() as stop:
            fit(trainings, self.here, stop, display, path=self.out.parent, lost=lost)


def _settle(training: Training, split: str) -> None:
    """Judge a trained student by its split, and keep it."""
    session, run = training.session, training.run
    student, dataset = session.student, session.dataset
    told = answers(student, split, training.recipe, dataset, training.here)
    storage.sync(run.metrics)
    storage.write(run.student, weights.to_bytes(student))
    _keep(
        run.path,
        {
            "scores": evaluate.scores(told)._asdict(),
            "correct": base64.b64encode(np.packbits(told.correct).tobytes()).decode(),
            "images": len(told.ids),
            "parameters": cost.parameters(student),
            "flops": cost.flops(student, dataset.image_size),
            "warnings": training.warnings,
        },
    )


def _fail(path: Path, error: Exception) -> None:
    """Keep the reason; what stands in the way of every trial ends them all."""
    if isinstance(error, PreflightError):
        raise error
    error = machine.not_deterministic(error)
    reason = str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"
    console.warn(f"{path.name} failed, and the others go on: {reason}")
    if not isinstance(error, DistillError):
        storage.write(path / "error.txt", "".join(traceback.format_exception(error)).encode())
    _keep(path, {"failed": reason})


def _keep(path: Path, values: dict[str, Any]) -> None:
    kept = {"format": FORMAT, **values}
    storage.write(path / "trial.json", (json.dumps(kept, indent=1) + "\n").encode())


def _done(path: Path) -> bool:
    found = outcome(path)
    return found is not None and found.failed is None


def _require_same_recipe(path: Path, trial: Trial) -> None:
    run = Run(path)
    if run.recipe.exists():
        require_same(
            Recipe.load(run.recipe).identity(),
            trial.recipe.identity(),
            origin=f"{path}: holds a trial of another recipe",
            hint="give another --out",
        )

"""The loop: one student, or several side by side, step by step on the same batches."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import console, evaluate, schedule, storage
from distill.engine import checkpoint, memory, optim, parallel
from distill.engine.ahead import Ahead, Lanes
from distill.engine.capture import Quickest, Told
from distill.engine.checkpoint import Checkpoint
from distill.engine.finite import Watch
from distill.engine.machine import Machine, StopRequest
from distill.engine.monitor import Display, Monitor, imbalance
from distill.engine.run import Counter, Run
from distill.engine.session import Session, answers
from distill.engine.step import Step, add_gradients, train_step
from distill.errors import Stopped
from distill.recipe import Recipe
from distill.teacher import Once
from distill.types import Batch

ROW_STEPS = 50  # steps between two rows of metrics.jsonl, or an epoch where that is shorter
RATIO_PART = 0.1  # of the run in which it is said who decides alone: later the labels are learned


class Training:
    """A run in the works: begun, or put back where its newest checkpoint left it.

    Attributes:
        step: Optimizer steps done.
        total: Optimizer steps of the whole run.
        seconds: Spent on them, over all starts.
        waited: Of these, seconds in which the device had no batch to work on.
        warnings: Said so far, for the result.
        losses: Means that the last row of metrics holds.
        room: Bytes of disk that it may still need; known in the process that writes.

    Args:
        recipe: What is trained.
        run: Where it is kept.
        session: Its parts.
        here: Where it happens.
        quiet: Say nothing of its epochs, as one of many.

    Raises:
        PreflightError: If there is no room for checkpoints.
        DamagedError: If there are checkpoints and none is whole.
        IdentityError: If the newest belongs to another recipe, teacher or data set.
    """

    def __init__(
        self, recipe: Recipe, run: Run, session: Session, here: Machine, *, quiet: bool = False
    ) -> None:
        self.recipe, self.run, self.session, self.here = recipe, run, session, here
        self._quiet = quiet
        options = {"deterministic": recipe.train.deterministic, **here.options}
        self._alike: dict[str, Any] = {"identity": session.identity, "options": options}
        steps_per_epoch = session.loader.steps_per_epoch
        self.total = recipe.train.epochs * steps_per_epoch
        self._row_steps = min(ROW_STEPS, steps_per_epoch)
        self._micro_batches = here.micro_batches(recipe.train.batch_size)
        self._make: Quickest | None = None  # a step; built for the first batch
        self._lr = 0.0
        weights = session.distiller.objective.weights
        # Those that change, where a recorded step finds them.
        self._changing = {
            name: torch.zeros((), device=here.device)
            for name, weight in weights.items()
            if isinstance(weight, schedule.Ramp)
        }
        names = list(session.distiller.objective.weights)
        self._watch = Watch(session, here)
        path = run.metrics if here.main else None
        self._monitor = Monitor(path, names, here.device, self._watch)
        self.losses: dict[str, float] = {}
        if here.main:
            state = session.distiller.state_dict().values()
            size = sum(tensor.numel() * tensor.element_size() for tensor in state)
            rows = self.total // self._row_steps + recipe.train.epochs
            self.room = checkpoint.room(run.checkpoints, size, rows)
            storage.require_room(run.path, self.room, files=checkpoint.FILES)
            self._place = run.place()
        self.step, self.seconds, self.waited, self.warnings = self._resume()
        if here.main:  # only now, when nothing of another run stands there
            storage.write(run.recipe, recipe.to_yaml().encode())

    @property
    def counter(self) -> Counter:
        """How far the run is."""
        return Counter(self.step, self.seconds, self.waited, self.warnings)

    def take(self, batch: Batch) -> bool:
        """One step on a batch, and what is written of it; returns whether a row of metrics was."""
        session = self.session
        if self._make is None:
            self._make = self._quickest(batch, self._set_progress())
        scales = self._set_progress()
        with memory.wanted(len(batch.ids) // self._micro_batches, self.here.device):
            done = self._make(batch, self.hear(batch))
        if self.here.device.type == "cpu":
            self._watch.step(self.step + 1, batch, done)
        if session.average is not None:
            session.average.update(session.distiller.student, first=self.step == 0)
        self.step += 1
        self._monitor.add(done.losses)
        if row := self.step % self._row_steps == 0 or self.step == self.total:
            written = self._write_row(done, scales)
            self.losses = {name: written[name] for name in self._monitor.names}
            self._mind_balance(written)
        epoch, rest = divmod(self.step, session.loader.steps_per_epoch)
        if rest == 0:
            if session.filler is not None:
                session.filler.finish(session.loader.view(epoch - 1), session.loader.views)
            self._validate(epoch)
        return row

    def hear(self, batch: Batch) -> Told:
        """What a teacher says whom others hear too, so that no recorded step asks it once more."""
        teacher = self.session.teacher
        if not isinstance(teacher, Once) or self._micro_batches > 1:
            return None
        with self.session.autocast:
            return teacher(batch)

    @property
    def recorded(self) -> bool:
        """Whether its steps are replayed."""
        return self._make is not None and self._make.recorded

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            DivergedError: If a loss or a tensor is not finite; nothing is written.
        """
        session, run = self.session, self.run
        self._monitor.require_finite(self.step)
        state, others = optim.state_tensors(session.optimizer)
        here = self.here
        tensors = {
            "model": parallel.whole(session.distiller.state_dict(), here),
            "optimizer": parallel.whole(state, here),
        }
        values = {
            "optimizer": others,
            "monitor": self._monitor.state(),
            "seconds": self.seconds,
            "waited": self.waited,
            "warnings": self.warnings,
        }
        if session.average is not None:
            tensors["ema"] = parallel.whole(session.average.network.state_dict(), here)
        if session.scaler is not None:
            values["scaler"] = session.scaler.state_dict()
        if here.main:
            run.require_place(self._place)
            found = Checkpoint(self.step, tensors, values)
            checkpoint.save(run.checkpoints, found, **self._alike)

    def _resume(self) -> Counter:
        """Put the newest checkpoint back, or begin."""
        session, run = self.session, self.run
        found = checkpoint.load(run.checkpoints, warn=console.warn, **self._alike)
        if found is None:
            if self.here.main:
                storage.make_folder(run.checkpoints)
                storage.write(run.metrics, b"")
            return Counter(0, 0.0, 0.0, [])
        parallel.load(session.distiller, found.tensors["model"])
        state = parallel.parts(found.tensors["optimizer"], session.optimizer)
        optim.load_state(session.optimizer, state, found.values["optimizer"])
        if session.average is not None:
            # Runs that were begun with PyTorch's AveragedModel have its names.
            average = {n.removeprefix("module."): x for n, x in found.tensors["ema"].items()}
            average.pop("n_averaged", None)
            parallel.load(session.average.network, average)
        if session.scaler is not None:
            session.scaler.load_state_dict(found.values["scaler"])
        self._monitor.load(found.values["monitor"])
        console.say(f"{run.path}: going on after step {found.step}")
        values = found.values
        waited = values.get("waited", 0.0)  # which was not counted always
        return Counter(found.step, values["seconds"], waited, values["warnings"])

    def _quickest(self, batch: Batch, scales: dict[str, float]) -> Quickest:
        """The step, in as many pieces as the device's memory asks for."""
        recipe, session, here = self.recipe, self.session, self.here
        weights: dict[str, float | Tensor] = {**scales, **self._changing}
        self._micro_batches = self._pieces(batch, weights)
        make = functools.partial(
            train_step,
            session.model,
            session.teacher,
            session.optimizer,
            weights=weights,
            clip_norm=recipe.optimizer.clip_norm,
            micro_batches=self._micro_batches,
            autocast=session.autocast,
            scaler=session.scaler,
        )
        return Quickest(
            lambda batch, told: make(batch, told=told),
            session.distiller,
            here.device,
            record=session.recordable,
        )

    def _pieces(self, batch: Batch, weights: Mapping[str, float | Tensor]) -> int:
        """In how many the batch's gradients are added up, so that it fits into memory."""
        session, device, asked = self.session, self.here.device, self._micro_batches
        # A filler would keep what is heard in a rehearsal, and what fits is decided by the hour.
        if session.filler is not None or self.recipe.train.deterministic:
            return asked
        if self.here.shards or (self.here.world > 1 and self.recipe.train.sync_batchnorm):
            return asked  # a process whose pass fails would leave the others waiting in theirs
        add = functools.partial(
            add_gradients,
            session.distiller,
            session.teacher,
            weights=weights,
            autocast=session.autocast,
            scaler=session.scaler,
        )
        pieces = memory.pieces_that_fit(
            session.distiller,
            lambda batch, pieces: add(batch, micro_batches=pieces),
            batch,
            asked,
            reserve=optim.missing_bytes(session.optimizer),
            device=device,
        )
        if pieces > asked:
            self._warn(memory.in_pieces(session.distiller, len(batch.ids), pieces, device))
        return pieces

    def _set_progress(self) -> dict[str, float]:
        """Set all that follows from the step alone: learning rate, dropout's seed, loss weights."""
        recipe, session, here = self.recipe, self.session, self.here
        progress = (self.step + 0.5) / self.total
        self._lr = recipe.optimizer.rate(progress, recipe.train.epochs)
        optim.set_lr(session.optimizer, self._lr)
        # A function of the step, so that no generator's state has to be saved and put back.
        seed = ((recipe.train.seed << 42) + (self.step << 10) + here.rank) & ((1 << 63) - 1)
        torch.default_generator.manual_seed(seed)
        if here.device.type == "cuda":
            torch.cuda.default_generators[here.device.index or 0].manual_seed(seed)
        session.distiller.objective.set_progress(progress)
        scales = session.distiller.objective.weights_at(progress)
        for name, weight in self._changing.items():
            weight.fill_(scales[name])
        return scales

    def _write_row(self, done: Step, scales: dict[str, float]) -> dict[str, float]:
        """A row of metrics: the means since the last one, and how the step in work is balanced."""
        session, step = self.session, self.step
        means = self._monitor.means(step)
        self._watch.state(step)
        ratio = session.distiller.objective.gradient_ratio(
            done.losses.logits, done.told, done.batch, scales
        )
        row: dict[str, Any] = {
            "step": step,
            "epoch": (step - 1) // session.loader.steps_per_epoch + 1,
            "split": "train",
            **means,
            "lr": self._lr,
            **{f"weight_{name}": scale for name, scale in scales.items()},
        }
        if ratio is not None:
            row["gradient_ratio"] = min(float(ratio), 1e12)  # JSON knows no infinity
        self._monitor.row(row)
        return row

    def _mind_balance(self, row: dict[str, float]) -> None:
        """Warn once if teacher or labels decide alone while there is still something to decide."""
        said = any("gradient" in warning for warning in self.warnings)
        early = self.step / self.total <= RATIO_PART
        if early and not said and (warning := imbalance(row)):
            self._warn(warning)

    def _warn(self, what: str) -> None:
        """Say it, and keep it for the result; once."""
        if what not in self.warnings:
            self.warnings.append(what)
            console.warn(what)

    def _validate(self, epoch: int) -> None:
        """A row of scores on the validation split, where one is held out and its turn has come."""
        recipe, session = self.recipe, self.session
        last = epoch == recipe.train.epochs
        if len(session.dataset.val_ids) and (last or epoch % recipe.train.eval_epochs == 0):
            told = answers(session.student, "val", recipe, session.dataset, self.here)
            scores = evaluate.scores(told)
            row = {"step": self.step, "epoch": epoch, "split": "val", **scores._asdict()}
            self._monitor.append(row)
            if not self._quiet:
                console.say(f"epoch {epoch}: val top1 {scores.top1:.2%}  nll {scores.nll:.3f}")


def fit(
    trainings: Sequence[Training],
    here: Machine,
    stop: StopRequest,
    display: Display,
    *,
    path: Path,
    lost: Callable[[Training, Exception], None] | None = None,
) -> None:
    """Train to the last step, saving on the way.

    All students of a step see the same batch, which is made once. One that is ahead of the others,
    because they were killed before they had saved as much, waits for them.

    Args:
        trainings: Runs whose sessions share a loader.
        here: Where.
        stop: Asked between steps.
        display: Counts the steps of all students.
        path: Named where the loop is stopped.
        lost: Told of a run that failed, which the others then go on without. Left out, the first
            failure ends the loop.

    Raises:
        DivergedError: If a loss stops being finite, and nobody is told of it.
        Stopped: If a signal asked for it; all is saved.
    """
    loader, total = trainings[0].session.loader, trainings[0].total
    alive = list(trainings)
    ahead, lanes = Ahead(here.device), Lanes(here.device)
    saved = last = time.monotonic()
    waited = 0.0

    def attempt(training: Training, act: Callable[[], bool | None]) -> bool:
        try:
            return bool(act())
        except Exception as error:
            if lost is None:
                raise
            lost(training, error)
            alive.remove(training)
            return False

    while alive and (step := min(training.step for training in alive)) < total:
        epoch, start = divmod(step, loader.steps_per_epoch)
        display.epoch = epoch + 1
        for batch in ahead.over(loader.epoch(epoch, start=start)):
            row = False
            takers = [one for one in alive if one.step == step]
            for training in takers:
                if training.recorded:
                    training.hear(batch)  # before their lanes part
            for training in takers:
                with lanes.of(training) if training.recorded else nullcontext():
                    row |= attempt(training, lambda: training.take(batch))  # noqa: B023
                display.advance()
            lanes.join()
            step += 1
            now = time.monotonic()
            for training in alive:
                training.seconds += now - last
                training.waited += ahead.waited - waited
            display.waited += ahead.waited - waited
            last, waited = now, ahead.waited
            if row:
                display.losses([training.losses for training in alive])
            stopped = stop.agreed(here)
            due = now - saved > here.checkpoint_seconds
            if parallel.saves(due, bool(stopped) or step == total, here, agreed=row):
                for training in list(alive):
                    attempt(training, training.save)
                saved = time.monotonic()
                if here.world == 1:
                    stopped = stop.signum  # it may have come meanwhile
            if stopped:
                here.accelerator.wait_for_everyone()  # launchers end those whose peers have ended
                raise _stopped(stopped, f"after step {step} of {total}", path)
            if not alive:
                break


def _stopped(signum: int, when: str, path: Path) -> Stopped:
    return Stopped(
        f"{path}: stopped by {signal.Signals(signum).name} {when}, and saved",
        hint="the same command goes on from there",
        signum=signum,
    )

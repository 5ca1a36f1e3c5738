"""Training: one readable path from a recipe to a result."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from distill import console, evaluate, schedule, storage
from distill.data import datasets
from distill.engine import checkpoint, generations, machine, optim
from distill.engine.checkpoint import Checkpoint
from distill.engine.finish import finish
from distill.engine.machine import Machine, StopRequest
from distill.engine.monitor import Display, Monitor
from distill.engine.networks import trained
from distill.engine.run import Counter, Result, Run
from distill.engine.session import Session, announce, answers, prepare
from distill.engine.step import Step, train_step
from distill.errors import PreflightError, Stopped
from distill.evaluate import Predictions
from distill.identity import require_same
from distill.models import weights
from distill.recipe import Recipe

ROW_STEPS = 50  # steps between two rows of metrics.jsonl, or an epoch where that is shorter
RATIO = (0.05, 50.0)  # of teacher's to labels' gradient; outside it one of them decides alone
ANOTHER_OUT = "give another --out, or `--restart` to replace it"
RATIO_PART = 0.1  # of the run in which it counts: later the labels are learned, and pull no more


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    restart: bool = False,
    baseline: bool = False,
    workers: int | None = None,
    device_batch_size: int | None = None,
    compile: bool = False,
    checkpoint_seconds: float = 300.0,
) -> Result:
    """Train the recipe's student and evaluate it; go on where an earlier call stopped.

    Teachers that are recipes are trained first, each in a run directory beside `out`.

    Args:
        recipe: What to train.
        out: The run directory.
        restart: Forget what the run directory holds.
        baseline: Also train the same student from labels alone (same seed, order, views and
            steps), in `out/baseline`, and report the gain.
        workers: Processes that decode images, for each training process; None chooses.
        device_batch_size: Most images at once on a device; the global batch stays the recipe's.
        compile: Compile student and teacher with `torch.compile`.
        checkpoint_seconds: Time between two checkpoints.

    Raises:
        RecipeError: If a baseline is asked for, and the images have no labels.
        IncompatibleError: If parts of the recipe do not fit each other or the machine.
        IncompleteError: If the recipe's cache lacks views that it reads.
        IdentityError: If `out` holds a run of another recipe, teacher or data set, or the cache was
            made from something else.
        DamagedError: If there are checkpoints and none is whole.
        PreflightError: If data are missing or `out` cannot be written.
        DivergedError: If the loss stops being finite.
        Stopped: If a signal asked the run to stop; the same call goes on.
    """
    here = machine.setup(
        workers=workers,
        device_batch_size=device_batch_size,
        compile=compile,
        checkpoint_seconds=checkpoint_seconds,
    )
    out = Path(out)
    asked, recipe = recipe, generations.last(recipe, out)
    with machine.stop_request() as stop:
        alone = recipe.without_teacher() if baseline else None
        train_teachers(recipe, out, here, stop)
        result, told = _run(recipe, out, here, stop, restart=restart)
        if alone is not None:
            plain, said = _run(alone, out / "baseline", here, stop, restart=restart)
            if result.baseline != plain.to_json():
                result = _with_baseline(recipe, result, plain, here, told, said)
        if asked.generations > 1 and result.generations is None:
            result = generations.together(asked, result, here)
            if here.main:
                Run(out).finish(result)
    return result


def train_teachers(
    recipe: Recipe, path: Path, here: Machine, stop: StopRequest, *, parts: int | None = None
) -> None:
    """Train those of the recipe's teachers that are recipes and have no run beside `path` yet.

    Their own teachers come first.

    Args:
        recipe: Whose teachers.
        path: The recipe's own run directory.
        here: Where.
        stop: Asked between steps.
        parts: Into how many a job is cut that may meet others like it at these runs; None: this
            is no part of a job.

    Raises:
        PreflightError: If the parts of a job would all train the same teacher.
        IdentityError: If a run is that of another recipe.
    """
    for i, spec in enumerate(recipe.teachers):
        if spec.recipe is None:
            continue
        run = Run(Path(str(trained(spec, path, i).weights)))
        if parts is not None and run.finished() is not None:
            _require_same_recipe(run, spec.recipe)  # and no lock: others may read it too
            continue
        if parts is not None and parts > 1:
            raise PreflightError(
                f"{run.path}: the teacher is not trained yet, and the parts of a job cannot all "
                "train it",
                hint=f"distill train its recipe with --out {run.path} first",
            )
        train_teachers(spec.recipe, run.path, here, stop)
        _run(spec.recipe, run.path, here, stop, restart=False)


def _with_baseline(
    recipe: Recipe,
    result: Result,
    plain: Result,
    here: Machine,
    told: Predictions | None,
    said: Predictions | None,
) -> Result:
    """The result with the same student from labels alone beside it, paired image by image."""
    dataset = datasets.load(recipe.data)
    told, said = (
        known or answers(weights.load(run).to(here.device), "test", recipe, dataset, here)
        for known, run in ((told, result.run), (said, plain.run))
    )
    gain, interval = evaluate.paired_gain(told, said)
    warnings = list(result.warnings)
    for teacher in result.teachers:
        if teacher["top1"] < plain.top1:
            warnings.append(
                f"teacher {teacher['model']} ({teacher['top1']:.1%}) is worse than the student "
                f"without it ({plain.top1:.1%}): such a teacher usually holds a student back"
            )
            console.warn(warnings[-1])
    result = result._replace(
        baseline=plain.to_json(), gain=gain, gain_ci95=list(interval), warnings=warnings
    )
    if here.main:
        Run(Path(result.run)).finish(result)
    return result


def _run(
    recipe: Recipe, path: Path, here: Machine, stop: StopRequest, *, restart: bool
) -> tuple[Result, Predictions | None]:
    """One run in one directory: done already, gone on with, or begun."""
    run = Run(path)
    with storage.lock(path) if here.main else nullcontext():
        if not restart:
            _require_same_recipe(run, recipe)
        session = prepare(recipe, path, here)
        if restart and here.main:  # only now, when nothing stands in the new run's way
            run.clear()
        here.accelerator.wait_for_everyone()
        if (result := run.finished()) is not None:
            require_same(
                result.identity,
                session.identity,
                origin=f"{path}: holds a finished run of something else",
                hint=ANOTHER_OUT,
            )
            console.say(f"{path}: finished already; --restart trains again")
            return result._replace(run=str(path)), None  # it may have been moved
        if here.main:
            state = session.distiller.state_dict().values()
            size = sum(tensor.numel() * tensor.element_size() for tensor in state)
            # Weights, their average and two moments, in each checkpoint and in the one in work.
            storage.require_room(path, 4 * size * (checkpoint.KEEP + 1))
            storage.write(run.recipe, recipe.to_yaml().encode())
        try:
            counter = fit(recipe, run, session, here, stop)
            return finish(recipe, run, session, here, counter)
        finally:
            session.close()
            here.accelerator.free_memory()


def _require_same_recipe(run: Run, recipe: Recipe) -> None:
    if run.recipe.exists():
        require_same(
            Recipe.load(run.recipe).identity(),
            recipe.identity(),
            origin=f"{run.path}: holds a run of another recipe",
            hint=ANOTHER_OUT,
        )


def fit(recipe: Recipe, run: Run, session: Session, here: Machine, stop: StopRequest) -> Counter:
    """Train to the last step, saving on the way."""
    loader, terms = session.loader, session.distiller.objective.weights
    total = recipe.train.epochs * loader.steps_per_epoch
    row_steps = min(ROW_STEPS, loader.steps_per_epoch)
    micro_batches = here.micro_batches(recipe.train.batch_size)
    monitor = Monitor(run.metrics if here.main else None, list(terms), here.device)
    step, seconds, warnings = _resume(run, session, monitor, here)
    if step == 0:
        warnings += announce(recipe, session, here)
        for warning in warnings:
            console.warn(warning)
    began, saved = time.monotonic() - seconds, time.monotonic()
    images = recipe.train.batch_size
    with Display(run.path.name, step, total, images, loader.steps_per_epoch) as display:
        while step < total:
            epoch, start = divmod(step, loader.steps_per_epoch)
            for batch in loader.epoch(epoch, start=start):
                scales = _set_progress(recipe, session, here, step, total)
                done = train_step(
                    session.model,
                    session.teacher,
                    session.optimizer,
                    batch,
                    weights=scales,
                    clip_norm=recipe.optimizer.clip_norm,
                    micro_batches=micro_batches,
                    autocast=session.autocast,
                    scaler=session.scaler,
                )
                if session.ema is not None:
                    session.ema.update_parameters(session.distiller.student)
                step += 1
                monitor.add(done.losses)
                if row := step % row_steps == 0 or step == total:
                    written = _write_row(session, monitor, done, scales, step)
                    display.losses({name: written[name] for name in monitor.names})
                    _mind_balance(written, step / total, warnings)
                if step % loader.steps_per_epoch == 0:
                    if session.filler is not None:
                        session.filler.finish(loader.view(epoch), loader.views)
                    _validate(recipe, session, monitor, here, step)
                display.step(step)
                stopped = stop.agreed(here) if row or here.world == 1 else None
                now = time.monotonic()
                due = now - saved > here.checkpoint_seconds
                if here.main and (due or stopped or step == total):
                    monitor.require_finite(step)
                    _save(run, session, monitor, Counter(step, now - began, warnings))
                    saved = time.monotonic()
                if stopped and step < total:
                    raise Stopped(
                        f"{run.path}: stopped by {signal.Signals(stopped).name} after step {step} "
                        f"of {total}, and saved",
                        hint="the same command goes on from there",
                        signum=stopped,
                    )
    return Counter(step, time.monotonic() - began, warnings)


def _set_progress(
    recipe: Recipe, session: Session, here: Machine, step: int, total: int
) -> dict[str, float]:
    """Set all that follows from the step alone: learning rate, dropout's seed, loss weights."""
    progress = (step + 0.5) / total
    spec = recipe.optimizer
    factor = schedule.learning_rate(
        progress, warmup=spec.warmup_epochs / recipe.train.epochs, shape=spec.schedule
    )
    for group in session.optimizer.param_groups:
        group["lr"] = spec.lr * factor
    # A function of the step, so that no generator's state has to be saved and put back.
    seed = ((recipe.train.seed << 42) + (step << 10) + here.rank) & ((1 << 63) - 1)
    torch.default_generator.manual_seed(seed)
    if here.device.type == "cuda":
        torch.cuda.default_generators[here.device.index or 0].manual_seed(seed)
    session.distiller.objective.set_progress(progress)
    return session.distiller.objective.weights_at(progress)


def _write_row(
    session: Session, monitor: Monitor, done: Step, scales: dict[str, float], step: int
) -> dict[str, float]:
    """A row of metrics: the means since the last one, and how the step in work is balanced."""
    means = monitor.means(step)
    ratio = session.distiller.objective.gradient_ratio(
        done.losses.logits, done.told, done.batch, scales
    )
    row = {
        "step": step,
        "epoch": (step - 1) // session.loader.steps_per_epoch + 1,
        "split": "train",
        **means,
        "lr": session.optimizer.param_groups[0]["lr"],
        **{f"weight_{name}": scale for name, scale in scales.items()},
    }
    if ratio is not None:
        row["gradient_ratio"] = min(float(ratio), 1e12)  # JSON knows no infinity
    monitor.row(row)
    return row


def _mind_balance(row: dict[str, float], progress: float, warnings: list[str]) -> None:
    """Warn once if teacher or labels decide alone while there is still something to decide."""
    ratio = max(row.get("gradient_ratio", 1.0), 1e-12)
    said = any("gradient" in warning for warning in warnings)
    if progress <= RATIO_PART and not said and not RATIO[0] <= ratio <= RATIO[1]:
        strong, weak = ("teacher", "labels") if ratio > 1 else ("labels", "teacher")
        warnings.append(
            f"at step {row['step']} the gradient from the {strong} is {max(ratio, 1 / ratio):.0f} "
            f"times the one from the {weak}, which hardly counts; mind weights and temperature"
        )
        console.warn(warnings[-1])


def _validate(recipe: Recipe, session: Session, monitor: Monitor, here: Machine, step: int) -> None:
    """A row of scores on the validation split, where one is held out and its turn has come."""
    epoch = step // session.loader.steps_per_epoch
    last = epoch == recipe.train.epochs
    if len(session.dataset.val_ids) and (last or epoch % recipe.train.eval_epochs == 0):
        told = answers(session.student, "val", recipe, session.dataset, here)
        scores = evaluate.scores(told)
        monitor.append({"step": step, "epoch": epoch, "split": "val", **scores._asdict()})
        console.say(f"epoch {epoch}: val top1 {scores.top1:.2%}  nll {scores.nll:.3f}")


def _save(run: Run, session: Session, monitor: Monitor, counter: Counter) -> None:
    state, others = optim.state_tensors(session.optimizer)
    tensors = {"model": session.distiller.state_dict(), "optimizer": state}
    values = {
        "optimizer": others,
        "monitor": monitor.state(),
        "seconds": counter.seconds,
        "warnings": counter.warnings,
    }
    if session.ema is not None:
        tensors["ema"] = session.ema.state_dict()
    if session.scaler is not None:
        values["scaler"] = session.scaler.state_dict()
    checkpoint.save(
        run.checkpoints, Checkpoint(counter.step, tensors, values), identity=session.identity
    )


def _resume(run: Run, session: Session, monitor: Monitor, here: Machine) -> Counter:
    """Put the newest checkpoint back, or begin."""
    found = checkpoint.load(run.checkpoints, identity=session.identity, warn=console.warn)
    if found is None:
        if here.main:
            storage.write(run.metrics, b"")
        return Counter(0, 0.0, [])
    session.distiller.load_state_dict(found.tensors["model"])
    optim.load_state(session.optimizer, found.tensors["optimizer"], found.values["optimizer"])
    if session.ema is not None:
        session.ema.load_state_dict(found.tensors["ema"])
    if session.scaler is not None:
        session.scaler.load_state_dict(found.values["scaler"])
    monitor.load(found.values["monitor"])
    console.say(f"{run.path}: going on after step {found.step}")
    return Counter(found.step, found.values["seconds"], found.values["warnings"])

"""Training: one readable path from a recipe to a result."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from distill import console, evaluate, storage
from distill.data import datasets
from distill.engine import generations, machine
from distill.engine.finish import finish
from distill.engine.fit import Training, fit
from distill.engine.machine import Machine
from distill.engine.monitor import Display
from distill.engine.networks import trained
from distill.engine.run import Result, Run
from distill.engine.session import announce, answers, prepare
from distill.errors import PreflightError
from distill.evaluate import Predictions
from distill.identity import require_same
from distill.models import weights
from distill.recipe import Recipe

ANOTHER_OUT = "give another --out, or `--restart` to replace it"


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    restart: bool = False,
    baseline: bool = False,
    workers: int | None = None,
    device_batch_size: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    shard_weights: bool = False,
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
        cuda_graph: On a GPU that waits for its host, launch a step as one CUDA graph.
        shard_weights: Keep a part of weights, gradients and moments in each process, for models
            that do not fit on a device.
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
        Stopped: If a signal asked the run to stop between two steps; the same call goes on.
    """
    here = machine.setup(
        workers=workers,
        device_batch_size=device_batch_size,
        compile=compile,
        cuda_graph=cuda_graph,
        shard_weights=shard_weights,
        checkpoint_seconds=checkpoint_seconds,
    )
    out = Path(out)
    asked, recipe = recipe, generations.last(recipe, out)
    alone = recipe.without_teacher() if baseline else None
    train_teachers(recipe, out, here)
    result, told = _run(recipe, out, here, restart=restart)
    if alone is not None:
        plain, said = _run(alone, out / "baseline", here, restart=restart)
        if result.baseline != plain.to_json():
            result = _with_baseline(recipe, result, plain, here, told, said)
    if asked.generations > 1 and result.generations is None:
        result = generations.together(asked, result, here)
        if here.main:
            Run(out).finish(result)
    return result


def train_teachers(recipe: Recipe, path: Path, here: Machine, *, parts: int | None = None) -> None:
    """Train those of the recipe's teachers that are recipes and have no run beside `path` yet.

    Their own teachers come first.

    Args:
        recipe: Whose teachers.
        path: The recipe's own run directory.
        here: Where.
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
        train_teachers(spec.recipe, run.path, here)
        _run(spec.recipe, run.path, here, restart=False)


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
    own = [recipe.student.model]
    told, said = (
        known
        or answers(weights.load(run, vouched=own).to(here.device), "test", recipe, dataset, here)
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
    recipe: Recipe, path: Path, here: Machine, *, restart: bool
) -> tuple[Result, Predictions | None]:
    """One run in one directory: done already, gone on with, or begun."""
    run = Run(path)
    lock = storage.lock(path) if here.main else nullcontext()
    with lock, machine.determinism(recipe.train.deterministic):
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
        try:
            training = Training(recipe, run, session, here)
            if training.step == 0:
                training.warnings += announce(recipe, session, here)
            display = Display(path.name, training.step, training.total, recipe.train.batch_size)
            with display, machine.stop_request() as stop:
                fit([training], here, stop, display, path=path)
            return finish(recipe, run, session, here, training.counter)
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

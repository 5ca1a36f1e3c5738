"""What is not finite is found in the step it shows in, traced to its cause, and never saved."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distill.cache.read import Reader
from distill.data.loader import Loader
from distill.engine import checkpoint, machine
from distill.engine.caches import build_caches
from distill.engine.finite import LEAST_SCALE, Watch
from distill.engine.fit import Training, fit
from distill.engine.jobs import Settings
from distill.engine.monitor import Display
from distill.engine.run import Run
from distill.engine.session import Session, prepare
from distill.engine.train import train
from distill.errors import DivergedError
from distill.models import weights
from distill.recipe import Recipe
from distill.teacher import Live
from distill.types import Batch, Outputs
from tests.engine import processes
from tests.promises import Measured

# The numbers of a student with BatchNorm, a teacher with it, an average, and Adam's moments.
TEACHER = """
data: {name: digits, fraction: 0.1}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 30}
"""
STUDENT = """
data: {name: digits, fraction: 0.14, augment: [crop, flip], val: 0.1}
teachers: [{recipe: teacher.yaml}]
student: {model: resnet8}
objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
optimizer: {name: adamw, lr: 2e-3, clip_norm: 1.0}
train: {epochs: 4, batch_size: 20, ema: 0.9}
"""
AT = 4  # the step that is poisoned: in the middle of the first epoch of five

TERMS = """
import os
import torch
from distill.objectives._term import Term


class Steep(Term):
    '''Zero, and its root's slope there is not finite.'''
    needs_teacher = False

    def forward(self, student, teacher, batch):
        return (0 * student.logits).pow(2).sum(dim=1).sqrt()


class Alone(Term):
    '''Not finite in the second of two processes.'''
    needs_teacher = False

    def forward(self, student, teacher, batch):
        bad = float("nan") if os.environ.get("RANK") == "1" else 0.0
        return student.logits.sum(dim=1) * bad
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, a trained teacher, its cache, and what an undisturbed run leaves behind."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    (folder / "terms.py").write_text(TERMS)
    recipe = Recipe.load(folder / "student.yaml")
    train(recipe, folder / "straight", workers=0)
    return folder


@pytest.fixture
def recipe(home: Path) -> Recipe:
    taught = f"teachers=[{{weights: {home / 'teacher'}}}]"
    return Recipe.load(home / "student.yaml", [taught])


@pytest.fixture(autouse=True)
def own_terms(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(home)


Poison = Callable[[Session], None]


def run_until_found(
    recipe: Recipe, out: Path, poison: Poison, *, steps: int = 1, **options: Any
) -> DivergedError:
    """Train with a checkpoint after each step, poison what step `AT` meets, return what is said.

    Args:
        recipe: What is trained.
        out: Where.
        poison: Called before step `AT`.
        steps: Within which it must be found.
        options: Of the machine.
    """
    here = machine.setup(workers=0, **options)
    run = Run(out)
    out.mkdir()
    session = prepare(recipe, out, here)
    try:
        training = Training(recipe, run, session, here)
        for batch in session.loader.epoch(0):
            if training.step == AT - 1:
                poison(session)
            if training.step >= AT - 1 + steps:
                pytest.fail(f"not found in {steps} steps")
            try:
                training.take(batch)
            except DivergedError as error:
                require_sound(out, training, AT - 1)
                return error
            if training.step < AT:
                training.save()
    finally:
        session.close()
    raise AssertionError


def require_sound(out: Path, training: Training, last: int) -> None:
    """The newest checkpoint is the one before the poison, and nothing on disk is not finite."""
    try:
        training.save()
    except DivergedError:
        pass
    else:  # the update was not made: what is saved is the step before
        assert training.step == last
    found = checkpoint.load(out / "checkpoint", warn=pytest.fail, **training._alike)
    assert found is not None
    assert found.step == last
    assert not (out / "student.safetensors").exists()
    assert finite(out)


def finite(run: Path) -> bool:
    """Whether every number in every file of tensors is."""
    tensors = [
        t for f in run.rglob("*.safetensors") for t in safetensors.torch.load_file(f).values()
    ]
    assert tensors
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def poisoned_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    """Change the batch of step `AT` as the loader gives it, however often it is asked for."""
    epoch = Loader.epoch

    def poisoned(self: Loader, number: int, *, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(epoch(self, number, start=start), start):
            yield change(batch) if number * self.steps_per_epoch + step == AT - 1 else batch

    monkeypatch.setattr(Loader, "epoch", poisoned)


def poke(tensor: Tensor, value: float) -> None:
    """Put a value into a tensor's corner."""
    tensor.data[(0,) * tensor.ndim] = value


def nothing(session: Session) -> None:
    """The poison is in the input."""


@pytest.mark.promise("R10")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_is_named(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    measured: Measured,
) -> None:
    named: list[int] = []

    def change(batch: Batch) -> Batch:
        images = batch.images.clone()
        images[7, 1, 2, 3] = value
        named.append(int(batch.ids[7]))
        return batch._replace(images=images)

    poisoned_batches(monkeypatch, change)
    error = run_until_found(recipe, tmp_path / "run", nothing)
    assert f" at step {AT}: not all numbers in image {named[0]} are finite; " in str(error)
    measured("NaN or inf in an image", "found in its step, the image named")


@pytest.mark.promise("R10")
def test_what_a_live_teacher_says_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    def poison(session: Session) -> None:
        assert isinstance(session.teacher, Live)

        def broken(module: nn.Module, inputs: Any, outputs: Outputs) -> Outputs:
            logits = outputs.logits.clone()
            logits[[2, 5]] = math.inf
            return outputs._replace(logits=logits)

        session.teacher.network.register_forward_hook(broken)

    error = run_until_found(recipe, tmp_path / "run", poison)
    assert f"kd is nan at step {AT}: what teacher resnet8 says of image " in str(error)
    assert "is not finite" in str(error)
    assert str(error).count("image ") == 2
    assert "weights for that teacher" in error.hint
    measured("a live teacher's logits", "found in its step, teacher and images named")


@pytest.mark.promise("R10")
def test_the_buffers_of_a_teacher_are_named(
    recipe: Recipe, tmp_path: Path, measured: Measured
) -> None:
    def poison(session: Session) -> None:
        name, buffer = next(
            (n, b) for n, b in session.tutors[0].network.named_parameters() if "norm" not in n
        )
        poke(buffer, math.nan)
        poisoned.append(name)

    poisoned: list[str] = []
    error = run_until_found(recipe, tmp_path / "run", poison)
    assert f"kd is nan at step {AT}: what teacher resnet8 says of image " in str(error)
    assert f", for its {poisoned[0]} is not; " in str(error)
    # One whose file holds it already is found before the first step.
    network = weights.load(recipe.teachers[0].weights or "")
    norm = next(n for n, b in network.named_buffers() if n.endswith("running_var"))
    network.get_buffer(norm)[0] = math.nan
    (tmp_path / "broken.safetensors").write_bytes(weights.to_bytes(network))
    broken = f"teachers=[{{weights: {tmp_path / 'broken.safetensors'}}}]"
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml", [broken])
    with pytest.raises(DivergedError, match=r"^teacher resnet8: the network's answers") as said:
        train(recipe, tmp_path / "never", workers=0)
    assert ", for its backbone." in str(said.value)
    assert not list((tmp_path / "never").rglob("*.safetensors"))
    measured("a teacher's buffers and weights", "found in its step, or before the first; named")


@pytest.mark.promise("R10")
def test_a_row_of_a_cache_is_named(
    home: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    cache = tmp_path / "cache"
    kept = Recipe.load(
        tmp_path_recipe(recipe, tmp_path), [f"cache={{path: {cache}, views: 1, codec: fp16}}"]
    )
    here = machine.setup(workers=0)
    build_caches(kept, str(cache), tmp_path / "run", here, Settings())
    rows, named = Reader.rows, []

    def poisoned(self: Reader, ids: np.ndarray, view: int) -> dict[str, np.ndarray]:
        found = {name: column.copy() for name, column in rows(self, ids, view).items()}
        at = (AT - 1) * 20 + 11  # of the epoch's rows, which are fetched many batches at once
        named.append(int(ids[at]))
        (logits,) = [column for name, column in found.items() if column.ndim == 2]
        logits[at, 2] = np.inf
        return found

    monkeypatch.setattr(Reader, "rows", poisoned)
    error = run_until_found(kept, tmp_path / "run", nothing)
    expected = f"what teacher resnet8 says of image {named[0]} is not finite, in its cache {cache}"
    assert f"kd is nan at step {AT}: {expected}" in str(error)
    assert "--verify full" in error.hint
    measured("inf in fp16 of a teacher's cache", "found in its step, cache and image named")


def tmp_path_recipe(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path


@pytest.mark.promise("R10")
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_gradient_whose_loss_is_finite_is_named_with_its_term(
    recipe: Recipe, tmp_path: Path, clip: str, measured: Measured
) -> None:
    """The root of zero; the last layer that it reaches is named first."""
    steep = ["objective=[{term: ce}, {term: 'terms:Steep', name: steep}]"]
    changed = Recipe.load(
        tmp_path_recipe(recipe, tmp_path), [*steep, f"optimizer.clip_norm={clip}"]
    )
    with pytest.raises(DivergedError) as caught:
        train(changed, tmp_path / "run", workers=0, checkpoint_seconds=0)
    said = "the gradient is not finite at step 1, though the losses are: that of steep, beginning"
    assert str(caught.value).startswith(f"{said} with student.backbone.")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    measured("a gradient, the loss finite", "found before its update; term and weight named")


@pytest.mark.promise("R10")
def test_the_students_buffers_weights_and_moments_are_named(
    recipe: Recipe, tmp_path: Path, measured: Measured
) -> None:
    def buffer(session: Session) -> None:
        norms = [m for m in session.distiller.student.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms[1].running_var is not None
        norms[1].running_var[0] = math.nan  # no loss shows it while it is trained

    def weight(session: Session) -> None:
        poke(next(session.distiller.student.parameters()), math.inf)

    def moment(session: Session) -> None:
        parameter = session.optimizer.param_groups[0]["params"][0]
        poke(session.optimizer.state[parameter]["exp_avg"], math.nan)

    said = str(run_until_found(recipe, tmp_path / "buffer", buffer))
    assert said.startswith("student.backbone.")
    assert f"running_var is not finite after step {AT}, though the losses are; " in said
    first = "student." + next(n for n, _ in weights_of(recipe, tmp_path))
    said = str(run_until_found(recipe, tmp_path / "weight", weight))
    assert f" at step {AT}: {first} is not finite; " in said
    said = str(run_until_found(recipe, tmp_path / "moment", moment, steps=2))
    assert f" at step {AT + 1}: {first} is not finite; " in said
    measured("the student's buffers and weights", "found in its step, the first tensor named")
    measured("the optimizer's moments", "found in the step after, by the weight they move")


def weights_of(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Tensor]]:
    session = prepare(recipe, folder / "some", machine.setup(workers=0))
    session.close()
    yield from session.distiller.student.named_parameters()


@pytest.mark.promise("R10")
def test_moments_that_move_nothing_are_found_with_the_row(
    recipe: Recipe, tmp_path: Path, measured: Measured
) -> None:
    """An infinite second moment stops a weight for ever, and no loss shows it."""

    def moment(session: Session) -> None:
        parameter = session.optimizer.param_groups[0]["params"][0]
        poke(session.optimizer.state[parameter]["exp_avg_sq"], math.inf)

    said = str(run_until_found(recipe, tmp_path / "run", moment, steps=2))
    assert said.startswith("optimizer.0.exp_avg_sq is not finite after step 5; ")
    measured("a second moment that stops a weight", "found with the next row of metrics; named")


@pytest.mark.promise("R10")
def test_a_scale_that_no_gradient_survives_is_an_error(
    recipe: Recipe, tmp_path: Path, measured: Measured
) -> None:
    """In fp16 a step whose gradients overflow is left out; all of them must not be."""
    here = machine.setup(workers=0)
    session = prepare(recipe, tmp_path / "run", here)
    session.close()
    for scale in (1.0, LEAST_SCALE / 2):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        watch = Watch(session._replace(scaler=scaler), here)
        if scale == 1.0:
            watch.state(3)
            continue
        with pytest.raises(DivergedError, match="however small the losses are scaled") as caught:
            watch.state(3)
        assert "bf16" in caught.value.hint
    measured("fp16 whose every step is left out", "found with the next row of metrics")


@pytest.mark.promise("R10")
def test_a_gpus_losses_are_traced_when_a_row_fetches_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Steps later the batch is made once more: its images and teachers tell what began it."""
    named: list[int] = []

    def change(batch: Batch) -> Batch:
        images = batch.images.clone()
        images[3] = math.nan
        named.append(int(batch.ids[3]))
        return batch._replace(images=images)

    poisoned_batches(monkeypatch, change)
    # As on a GPU: no step is looked at.
    monkeypatch.setattr(Watch, "step", lambda *_: None)
    monkeypatch.setattr("distill.engine.step.math", SimpleNamespace(isfinite=lambda _: True))
    with pytest.raises(DivergedError) as caught:
        train(recipe, tmp_path / "run", workers=0)
    said = f" is nan at step {AT}: not all numbers in image {named[0]} are finite; "
    assert said in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    measured("the losses of a GPU", "found with the next row; step, image or teacher named")


@pytest.mark.promise("R10")
def test_a_run_that_was_ended_so_goes_on_as_if_it_had_not(
    home: Path, tmp_path: Path, measured: Measured
) -> None:
    """Nothing of the step that broke is left in what is saved."""
    straight = processes.traces(home / "straight")
    recipe = Recipe.load(home / "student.yaml")
    out = home / "again"
    with pytest.MonkeyPatch.context() as patch:
        poisoned_batches(patch, lambda batch: batch._replace(images=batch.images * math.nan))
        with pytest.raises(DivergedError, match="image "):
            train(recipe, out, workers=0, checkpoint_seconds=0)
    assert finite(out)
    train(recipe, out, workers=0)
    assert processes.traces(out) == straight
    measured("the run without what broke it", "goes on, and ends byte for byte as ever")


@pytest.mark.promise("R10")
def test_one_process_of_two_ends_both_with_one_sentence(
    home: Path, recipe: Recipe, tmp_path: Path, measured: Measured
) -> None:
    path = tmp_path_recipe(recipe, tmp_path)
    port = str(processes.free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "PYTHONPATH": f"{home}:{Path(__file__).parents[2]}"}
    command = ["train", str(path), "--out", str(tmp_path / "run"), "--checkpoint-seconds", "0"]
    objective = "objective=[{term: ce}, {term: 'terms:Alone', name: alone}]"
    group = [
        subprocess.Popen(
            [sys.executable, "-m", "distill", *command, "--set", objective],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in group]
    assert [process.returncode for process in group] == [1, 1], said
    text = said[0] + said[1]
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: alone is nan at step 1: ")
    assert "the student's logits are finite" in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    measured("one process of two", "both end with exit 1, its sentence said once")


def test_a_sound_run_is_not_disturbed(recipe: Recipe, tmp_path: Path) -> None:
    """Large numbers are no reason to stop as long as they are finite."""
    here = machine.setup(workers=0)
    session = prepare(recipe, tmp_path / "run", here)
    (tmp_path / "run").mkdir()
    list(session.distiller.student.parameters())[-1].data[0] = 1e20  # whose square is not
    Watch(session, here).state(1)
    training = Training(recipe, Run(tmp_path / "run"), session, here)
    with machine.stop_request() as stop, Display("run", 0, training.total, 20) as bar:
        training.total = 5
        fit([training], here, stop, bar, path=tmp_path)
    assert training.step == 5
    session.close()

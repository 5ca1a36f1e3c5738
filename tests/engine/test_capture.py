"""However a step is launched, it is the same step. What needs a GPU is skipped without one."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.engine import machine
from distill.engine.ahead import AHEAD, Ahead
from distill.engine.capture import TIMED, WARM, Quickest
from distill.engine.step import Distiller, Step, train_step
from distill.engine.train import train
from distill.objectives import Objective
from distill.objectives.ce import CE
from distill.recipe import Recipe
from distill.types import Batch, Outputs

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(self.layers(images))


class Unruly(Small):
    """What no compiler takes."""

    def forward(self, images: Tensor) -> Outputs:
        if torch.compiler.is_compiling():
            raise RuntimeError("not with me\nfor reasons")
        return super().forward(images)


def batches(count: int, device: torch.device = CPU) -> list[Batch]:
    torch.manual_seed(1)
    ids = torch.arange(6, device=device)
    return [
        Batch(
            torch.rand(6, 3, 2, 2).to(device), torch.rand(6, 5).softmax(1).to(device), ids, ids * 0
        )
        for _ in range(count)
    ]


def parts(student: nn.Module) -> tuple[Distiller, torch.optim.Optimizer, Callable[..., Step]]:
    distiller = Distiller(student, Objective({"ce": CE()}, {"ce": 1.0}))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.3, momentum=0.9)
    step = functools.partial(train_step, distiller, None, optimizer, weights={"ce": 1.0})
    return distiller, optimizer, lambda batch, told: step(batch, told=told)


@pytest.mark.parametrize("kind", [Small, Unruly])
def test_what_cannot_be_recorded_is_compiled_or_made_as_it_is(
    kind: type[Small], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    student = kind()
    plain, _, make = parts(copy.deepcopy(student))
    for batch in batches(4):
        make(batch, None)
    distiller, _, made = parts(student)

    def step(batch: Batch, told: Outputs | None) -> Step:
        # A CPU has no CUDA graphs; a machine that has a GPU too would record nothing instead.
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not on a CPU")
        return made(batch, told)

    quickest = Quickest(step, distiller, CPU, record=True)
    first, *others = batches(4)
    losses = [quickest.record(first).losses.total]
    losses += [quickest(batch).losses.total for batch in others]
    said = capsys.readouterr().err
    assert "cannot be one CUDA graph" in said
    assert ("nor can torch.compile" in said) is (kind is Unruly)
    assert "for reasons" not in said  # a line, and no traceback
    assert not quickest.recorded
    for one, other in zip(distiller.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len({float(loss) for loss in losses}) == 4  # each its own


def test_a_cpu_makes_every_step_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    distiller, _, step = parts(Small())
    quickest = Quickest(step, distiller, CPU, record=True)
    for batch in batches(WARM + TIMED + 3):
        quickest(batch)
    assert not quickest.recorded
    assert capsys.readouterr().err == ""


def test_waiting_for_batches_is_counted() -> None:
    import time

    def slow() -> object:
        for batch in batches(3):
            time.sleep(0.05)
            yield batch

    ahead = Ahead(CPU)
    for _ in ahead.over(slow()):  # type: ignore[arg-type]
        time.sleep(0.03)
    assert 0.15 <= ahead.waited < 0.24


GPU = """
data: {name: digits, augment: [crop, flip], mixup: 0.5, val: 0.1}
teachers: [{recipe: teacher.yaml}]
student: {model: MODEL}
objective:
  - {term: ce, weight: {start: 0.5, end: 0.1}}
  - {term: kd, weight: 0.9, temperature: 3}
  - {term: features, weight: 0.1}
optimizer: {name: OPTIMIZER, lr: 2e-3, weight_decay: 0.05, warmup_epochs: 1, clip_norm: 1.0}
train: {epochs: 3, batch_size: 64, ema: 0.9, seed: 3, precision: PRECISION}
"""
TEACHER = """
data: {name: digits}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 64}
"""


@cuda
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("model", "precision"), [("resnet8", "bf16"), ("vit, patch_size: 4, drop: 0.1", "fp32")]
)
def test_a_recorded_run_is_the_run_kernel_by_kernel(
    tmp_path: Path, model: str, precision: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.engine.capture.HOST_BOUND", 0.0)
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    text = GPU.replace("MODEL", model).replace("PRECISION", precision)
    (tmp_path / "run.yaml").write_text(text.replace("OPTIMIZER", optimizer))
    losses = {}
    for graph in (False, True):
        out = tmp_path / str(graph)
        train(Recipe.load(tmp_path / "run.yaml"), out, cuda_graph=graph)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[graph] = [row["loss"] for row in rows if row["split"] == "train"]
    tolerance = 2e-2 if precision == "bf16" else 1e-3
    np.testing.assert_allclose(losses[True], losses[False], rtol=tolerance)


@cuda
def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Between two rows of metrics nothing asks the device, recorded or not."""
    from distill.engine.fit import Training
    from distill.engine.run import Run
    from distill.engine.session import prepare

    (tmp_path / "teacher.yaml").write_text(TEACHER)
    text = GPU.replace("MODEL", "resnet8").replace("PRECISION", "bf16")
    (tmp_path / "run.yaml").write_text(text.replace("OPTIMIZER", "sgd"))
    recipe = Recipe.load(tmp_path / "run.yaml")
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    here = machine.setup(workers=0)
    session = prepare(recipe, tmp_path / "out", here)
    (tmp_path / "out").mkdir(exist_ok=True)
    training = Training(recipe, Run(tmp_path / "out"), session, here)
    ahead = Ahead(here.device)
    made = 0
    for batch in ahead.over(session.loader.epoch(0)):
        if made > WARM + TIMED + AHEAD:
            torch.cuda.set_sync_debug_mode("error")
        training.take(batch)
        made += 1
        if made == session.loader.steps_per_epoch - 1:
            break
    torch.cuda.set_sync_debug_mode("default")
    assert training.step == made

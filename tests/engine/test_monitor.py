"""A run says what happened, in numbers that are the same each time, and stops when they break."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.engine.monitor import Monitor
from distill.engine.train import train
from distill.errors import DivergedError, PreflightError
from distill.recipe import Recipe
from distill.types import Losses
from tests.engine import processes

CPU = torch.device("cpu")


def losses(total: float, ce: float, kd: float) -> Losses:
    parts = {"ce": torch.tensor(ce), "kd": torch.tensor(kd)}
    return Losses(torch.tensor(total), parts, torch.zeros(1, 2))


def monitor(path: Path | None = None) -> Monitor:
    if path is not None and path.parent.is_dir():
        path.touch()
    return Monitor(path, ["ce", "kd"], CPU)


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_row_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    told = monitor(tmp_path / "metrics.jsonl")
    for value in (1.0, 2.0, 6.0):
        told.add(losses(value, 2 * value, -value))
    assert told.means(3) == {"loss": 3.0, "ce": 6.0, "kd": -3.0}
    told.row({"step": 3, **told.means(3)})
    told.add(losses(8.0, 0.0, 1.0))
    assert told.means(4) == {"loss": 8.0, "ce": 0.0, "kd": 1.0}
    told.append({"step": 4, "split": "val"})  # closes no means
    assert told.means(4)["loss"] == 8.0
    rows = read_rows(tmp_path)
    assert rows == [{"step": 3, "loss": 3.0, "ce": 6.0, "kd": -3.0}, {"step": 4, "split": "val"}]


def test_other_processes_write_nothing() -> None:
    told = monitor(None)
    told.add(losses(1.0, 1.0, 1.0))
    told.row(told.means(1))
    assert told.state() == {"losses": [], "rows": ""}


def test_means_in_work_and_rows_survive_json_bit_for_bit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(7, 3, generator=draw).tolist()
    straight = monitor(tmp_path / "straight.jsonl")
    cut = monitor(tmp_path / "cut.jsonl")
    for told in (straight, cut):
        told.append({"step": 0})
        for row in values[:4]:
            told.add(losses(*row))
    state = json.loads(json.dumps(cut.state()))
    cut.append({"step": "written after the checkpoint, and lost with the rest"})
    resumed = monitor(tmp_path / "cut.jsonl")
    resumed.load(state)
    for told in (straight, resumed):
        for row in values[4:]:
            told.add(losses(*row))
        told.row(told.means(7))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_with_the_step_it_began_in(value: float) -> None:
    told = monitor()
    for step in range(11, 51):
        broken = step >= 13
        told.add(losses(value if broken else 1.0, 1.0, value if broken else 1.0))
    for check in (told.means, told.require_finite):
        with pytest.raises(DivergedError, match=rf"^kd is {value} at step 13; ") as caught:
            check(50)
        assert "optimizer.lr" in caught.value.hint


def test_infinities_of_both_signs_are_one_sentence_too() -> None:
    told = monitor()
    told.add(losses(math.inf, 1.0, math.inf))
    told.add(losses(-math.inf, 1.0, -math.inf))
    with pytest.raises(DivergedError, match=r"^kd is inf at step 1; "):
        told.means(2)


def test_a_sum_that_overflows_is_named_where_every_term_is_sound() -> None:
    told = monitor()
    told.add(losses(math.inf, 3e38, 3e38))
    with pytest.raises(DivergedError, match=r"^loss is inf at step 1; "):
        told.means(1)


def test_rows_that_cannot_be_written_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PreflightError, match="cannot be written: not a directory"):
        monitor(tmp_path / "file" / "metrics.jsonl").append({"step": 1})


RECIPE = """
data: {name: digits, fraction: 0.1, val: 0.1}
student: {model: vit, width: 16, depth: 1, heads: 2}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 1e20, schedule: constant}
train: {epochs: 3, batch_size: 16, ema: 0.9}
"""


def finite(run: Path) -> bool:
    """Whether every number in every checkpoint is."""
    files = list(run.rglob("*.safetensors"))
    assert all(file.parent.parent.name == "checkpoint" for file in files)
    return all(
        bool(tensor.isfinite().all())
        for file in files
        for tensor in safetensors.torch.load_file(file).values()
    )


def test_a_run_that_diverges_is_one_sentence_and_leaves_nothing_broken(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = ["--out", "run", "--checkpoint-seconds", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "distill", "train", "recipe.yaml", *options],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "400", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "step" in said
    assert said.endswith("checkpoints from before it are kept")
    assert "hint: a lower optimizer.lr" in done.stderr
    assert finite(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("val", [0.0, 0.1])
def test_weights_that_the_last_step_ruined_are_not_saved(tmp_path: Path, val: float) -> None:
    """The loss of every step is finite, and so is every gradient: only the weights tell."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    only = ["train.epochs=1", "train.batch_size=80", "train.ema=0"]
    only += ["optimizer.lr=3e38", "objective.0.weight=1e4"]
    recipe = Recipe.load(tmp_path / "recipe.yaml", [*only, f"data.val={val}"])
    said = r"^student\.backbone\.\S+ is not finite after step 1; "
    with pytest.raises(DivergedError, match=said):
        train(recipe, tmp_path / "run")
    assert read_rows(tmp_path / "run") == []
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stem", ["model", "optimizer", "ema"])
def test_no_checkpoint_holds_what_is_not_finite(tmp_path: Path, stem: str, value: float) -> None:
    def tensors(last: float) -> dict[str, dict[str, torch.Tensor]]:
        sound = {"w": torch.ones(3), "num_batches_tracked": torch.tensor(3)}
        return {name: dict(sound) for name in ("model", "optimizer", "ema")} | {
            stem: {"w": torch.tensor([1.0, last])}
        }

    checkpoint.save(tmp_path, Checkpoint(1, tensors(1.0), {}), identity={})
    with pytest.raises(DivergedError, match=f"^{stem}: w is not finite after step 2; "):
        checkpoint.save(tmp_path, Checkpoint(2, tensors(value), {}), identity={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_rows_carry_no_clock(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    steps = ["optimizer.lr=0.05", "optimizer.schedule=step", "optimizer.milestones=[1, 2]"]
    sound = Recipe.load(tmp_path / "recipe.yaml", steps)
    for name in ("one", "two"):
        train(sound, tmp_path / name)
    text = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    assert text[0] == text[1]
    rows = read_rows(tmp_path / "one")
    train_rows = [row for row in rows if row["split"] == "train"]
    assert {key for row in train_rows for key in row} == {
        "step", "epoch", "split", "loss", "ce", "lr", "weight_ce",
    }  # fmt: skip
    assert [(row["step"], row["epoch"]) for row in train_rows] == [(5, 1), (10, 2), (15, 3)]
    assert [row["lr"] for row in train_rows] == pytest.approx([0.05, 0.005, 0.0005])
    assert {key for row in rows if row["split"] == "val" for key in row} == {
        "step", "epoch", "split", "top1", "top5", "nll", "ece",
    }  # fmt: skip
    assert processes.traces(tmp_path / "one")["metrics.jsonl"] == text[0].encode()

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from distill.evaluate import ece
from tests.cli.conftest import images, listing, process


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return list(json.loads(line)["runs"])


def answers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_scores_as_it_did_after_training(distill: Callable[..., Result], runs: Path) -> None:
    before = listing(runs)
    (row,) = rows(distill("evaluate", runs / "kd", "--json"))
    result = json.loads((runs / "kd" / "result.json").read_text())
    for key in ("top1", "top5", "nll", "ece", "student", "parameters", "flops"):
        assert row[key] == result[key]
    assert row["run"] == str(runs / "kd")
    assert row["images"] == 897
    assert listing(runs) == before  # nothing is written into a run


def test_runs_are_compared_with_the_first(distill: Callable[..., Result], runs: Path) -> None:
    alone, taught = rows(distill("evaluate", runs / "kd/baseline", runs / "kd", "--json"))
    result = json.loads((runs / "kd" / "result.json").read_text())
    assert "gain" not in alone
    assert taught["gain"] == pytest.approx(result["gain"])
    assert taught["gain_ci95"] == pytest.approx(result["gain_ci95"])
    assert taught["gain"] == pytest.approx(taught["top1"] - alone["top1"])


def test_a_table_for_people(distill: Callable[..., Result], runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "kd/baseline", tmp_path / "[red]x[y]")
    result = distill("evaluate", runs / "kd", "[red]x[y]")
    assert result.exit_code == 0, result.stderr
    for word in ("top-1", "top-5", "NLL", "ECE", "parameters", "gain", "[red]x[y]", "vit"):
        assert word in result.stdout


def test_answers_for_every_image(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    (row,) = rows(distill("evaluate", runs / "kd", "--predictions", "a.csv", "--json"))
    told = answers(tmp_path / "a.csv")
    assert [int(line["id"]) for line in told] == list(range(897))
    correct = np.array([line["correct"] == "1" for line in told])
    assert correct.mean() == pytest.approx(row["top1"])
    assert all((line["label"] == line["predicted"]) == (line["correct"] == "1") for line in told)
    confidence = np.array([float(line["confidence"]) for line in told])
    assert ece(confidence, correct) == pytest.approx(row["ece"], abs=1e-3)
    assert {line["name"] for line in told} == {""}


def test_answers_of_several_runs(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    two = distill("evaluate", runs / "kd", runs / "kd/baseline", "--predictions", "a.csv")
    assert two.exit_code == 0, two.stderr
    assert {path.name for path in tmp_path.glob("*.csv")} == {"a-kd.csv", "a-baseline.csv"}
    for name in ("one", "two"):
        shutil.copytree(runs / "kd", tmp_path / name / "kd")
    both = distill("evaluate", "one/kd", "two/kd", "--predictions", "b.csv")
    assert both.exit_code == 0, both.stderr
    assert {path.name for path in tmp_path.glob("b*")} == {"b-one-kd.csv", "b-two-kd.csv"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and a run `kd` on them."""
    folder = tmp_path_factory.mktemp("photos")
    names = ["train/[red]cat[", "train/do,g", "test/[red]cat[", "test/do,g"]
    images(folder / "photos", *names, count=8)
    (folder / "recipe.yaml").write_text(
        f"""
        data: {{name: folder, root: {folder / "photos"}, image_size: 16}}
        student: {{model: resnet8}}
        objective: [{{term: ce}}]
        optimizer: {{name: sgd, lr: 0.01}}
        train: {{epochs: 1, batch_size: 8}}
        """
    )
    done = process("train", "recipe.yaml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_answers_name_the_files(
    distill: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    result = distill("evaluate", photos / "run", "--predictions", "a.csv")
    assert result.exit_code == 0, result.stderr
    told = answers(tmp_path / "a.csv")
    assert len(told) == 16
    for line in told:
        assert (photos / "photos" / line["name"]).is_file()
        assert line["name"].split("/")[1] == line["label"]
        assert line["predicted"] in ("[red]cat[", "do,g")


def test_data_that_moved(distill: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "photos", tmp_path / "moved")
    (here,) = rows(distill("evaluate", photos / "run", "--json"))
    (there,) = rows(distill("evaluate", photos / "run", "--data-root", "moved", "--json"))
    assert there == here
    lost = distill("evaluate", photos / "run", "--data-root", "nowhere")
    assert lost.exit_code == 6
    assert "nowhere: no such folder" in lost.stderr


def test_runs_on_different_data_are_not_compared(
    distill: Callable[..., Result], runs: Path, photos: Path, tmp_path: Path
) -> None:
    result = distill("evaluate", runs / "kd", photos / "run", "--predictions", "a.csv", "--json")
    assert result.exit_code == 2
    assert "are not those of" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_finished_run(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    assert distill("evaluate", "nowhere").exit_code == 6
    shutil.copytree(runs / "kd", tmp_path / "half")
    (tmp_path / "half" / "student.safetensors").unlink()
    result = distill("evaluate", "half")
    assert result.exit_code == 6
    assert "half: has no student.safetensors" in result.stderr
    (tmp_path / "half" / "student.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"{}      ")
    assert distill("evaluate", "half").exit_code == 2
    (tmp_path / "half" / "student.safetensors").write_bytes(b"no weights")
    result = distill("evaluate", "half")
    assert result.exit_code == 5
    assert "Traceback" not in result.stderr


def test_predictions_that_cannot_be_written(distill: Callable[..., Result], runs: Path) -> None:
    result = distill("evaluate", runs / "kd", "--predictions", "no/such/a.csv")
    assert result.exit_code == 6
    assert "no/such/a.csv: cannot be written" in result.stderr


def test_as_a_user_runs_it(runs: Path) -> None:
    done = process("evaluate", "kd", "--json", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["runs"][0]["run"] == "kd"

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

from distill.definitions import SUITES, definitions
from distill.engine import launch
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
    (row,) = rows(distill("evaluate", runs / "kd", "--json", "--suite", "clean"))
    result = json.loads((runs / "kd" / "result.json").read_text())
    for key in ("top1", "top5", "nll", "ece", "student", "parameters", "flops"):
        assert row[key] == result[key]
    assert row["run"] == str(runs / "kd")
    assert row["images"] == 897
    new = {"kd/report.html", "kd/evaluation.json", "kd/evaluation.csv", "kd/.lock"}
    after = listing(runs)
    assert {name: data for name, data in after.items() if name not in new} == {
        name: data for name, data in before.items() if name not in new
    }
    assert new <= set(after)


def test_runs_are_compared_with_the_first(distill: Callable[..., Result], runs: Path) -> None:
    alone, taught = rows(
        distill("evaluate", runs / "kd/baseline", runs / "kd", "--json", "--suite", "clean")
    )
    result = json.loads((runs / "kd" / "result.json").read_text())
    assert "gain" not in alone
    assert taught["gain"] == pytest.approx(result["gain"])
    assert taught["gain_ci95"] == pytest.approx(result["gain_ci95"])
    assert taught["gain"] == pytest.approx(taught["top1"] - alone["top1"])


def test_a_table_for_people(distill: Callable[..., Result], runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "kd/baseline", tmp_path / "[red]x[y]")
    result = distill("evaluate", runs / "kd", "[red]x[y]", "--suite", "clean,cost")
    assert result.exit_code == 0, result.stderr
    for word in ("top-1", "top-5", "NLL", "ECE", "parameters", "gain", "[red]x[y]", "vit"):
        assert word in result.stdout


def test_answers_for_every_image(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    (row,) = rows(
        distill("evaluate", runs / "kd", "--predictions", "a.csv", "--json", "--suite", "clean")
    )
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
    two = distill(
        "evaluate", runs / "kd", runs / "kd/baseline", "--predictions", "a.csv", "--suite", "clean"
    )
    assert two.exit_code == 0, two.stderr
    assert {path.name for path in tmp_path.glob("*.csv")} == {"a-kd.csv", "a-baseline.csv"}
    for name in ("one", "two"):
        shutil.copytree(runs / "kd", tmp_path / name / "kd")
    both = distill("evaluate", "one/kd", "two/kd", "--predictions", "b.csv", "--suite", "clean")
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
    result = distill("evaluate", photos / "run", "--predictions", "a.csv", "--suite", "clean")
    assert result.exit_code == 0, result.stderr
    told = answers(tmp_path / "a.csv")
    assert len(told) == 16
    for line in told:
        assert (photos / "photos" / line["name"]).is_file()
        assert line["name"].split("/")[1] == line["label"]
        assert line["predicted"] in ("[red]cat[", "do,g")


def test_data_that_moved(distill: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "photos", tmp_path / "moved")
    (here,) = rows(distill("evaluate", photos / "run", "--json", "--suite", "clean"))
    (there,) = rows(
        distill("evaluate", photos / "run", "--data-root", "moved", "--json", "--suite", "clean")
    )
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
    """Which is said before anything is evaluated."""
    (runs / "file").write_text("mine")
    for place in (runs / "file" / "a.csv", runs / "kd"):
        result = distill("evaluate", runs / "kd", "--predictions", place)
        assert result.exit_code == 6
        assert "cannot be written" in result.stderr
        assert "accuracy" not in result.stderr
    (runs / "file").unlink()


def test_as_a_user_runs_it(runs: Path) -> None:
    done = process("evaluate", "kd", "--json", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["runs"][0]["run"] == "kd"


def test_two_processes_find_the_same_to_the_last_digit(runs: Path, tmp_path: Path) -> None:
    # 897 images in batches of 16: a last one that is smaller, and one process has one more.
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = ["evaluate", runs / "kd", "--suite", "clean,fidelity,corruptions", "--images"]
        arguments = [str(one) for one in (*command, 33, "--out", out)]
        assert launch.spawn(count, arguments) == 0
        told = json.loads((out / "evaluation.json").read_text())
        assert told["environment"].pop("processes") == count
        found.append(told)
    assert found[0] == found[1]


def test_every_suite_of_every_subject_is_in_the_files(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    result = distill(
        "evaluate", runs / "kd", "--suite", "all", "--images", 16, "--out", "e", "--json"
    )
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    kept = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert [one["role"] for one in kept["subjects"]] == ["run", "teacher", "alone"]
    known = {name: one for name, one in definitions().items() if one.suite != "comparison"}
    for subject, short in zip(kept["subjects"], printed["subjects"], strict=True):
        assert short == {key: value for key, value in subject.items() if key != "tables"}
        assert set(subject["numbers"]) == set(SUITES)
        for suite, numbers in subject["numbers"].items():
            assert set(numbers) == {name for name, one in known.items() if one.suite == suite}
            for name, number in numbers.items():
                assert number["definition_version"] == known[name].version
                assert (number["value"] is None) == bool(number.get("reason")), name
                if number["ci95"] and number["value"] is not None:
                    low, high = number["ci95"]
                    assert low <= number["value"] <= high, name
    (comparison,) = kept["comparisons"]
    assert set(comparison["numbers"]) == {
        name for name, one in definitions().items() if one.suite == "comparison"
    }
    with (tmp_path / "e" / "evaluation.csv").open(newline="", encoding="utf-8") as file:
        rows_ = list(csv.DictReader(file))
    assert len(rows_) == 3 * len(known)
    html = (tmp_path / "e" / "report.html").read_text()
    for heading in ("Training", "Accuracy and calibration", "Corruptions", "Cost", "Inductive"):
        assert heading in html


def test_a_reference_that_all_are_compared_with(
    distill: Callable[..., Result], runs: Path, tmp_path: Path
) -> None:
    options = ("--suite", "corruptions", "--images", 8, "--out", "e", "--json")
    result = distill("evaluate", runs / "kd", "--reference", runs / "teacher", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert [run["run"] for run in found["runs"]] == [str(runs / "kd"), str(runs / "teacher")]
    pairs = {(one["subject"], one["reference"]) for one in found["comparisons"]}
    assert ("kd", "teacher") in pairs
    own, other = found["subjects"][:2]
    assert own["tables"]["corruptions"]["corruptions"]["reference"] == other["name"] == "teacher"
    assert other["numbers"]["corruptions"]["mce"]["value"] == pytest.approx(1.0)


def test_an_unknown_suite(distill: Callable[..., Result], runs: Path) -> None:
    result = distill("evaluate", runs / "kd", "--suite", "corruption")
    assert result.exit_code == 2
    assert "--suite corruption: no such suite" in result.stderr
    assert "corruptions" in result.stderr

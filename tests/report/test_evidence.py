"""An evaluation's page: the verdict first, no more than is known, and every name as it is."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.definitions import SUITES
from distill.report import evidence
from distill.suites import Image
from tests.cli.conftest import picture, process
from tests.report.test_page import HOSTILE, Page
from tests.suites.conftest import STUDENT, TEACHER

Evaluation = dict[str, Any]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one`, all of whose suites were measured into `ev`."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    for arguments in (
        ("train", "student.yaml", "--out", "one", "--baseline"),
        ("evaluate", "one", "--suite", "all", "--images", "16", "--out", "ev"),
    ):
        done = process(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def found(measured: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.chdir(measured)  # its runs are named from there
    return dict(json.loads((measured / "ev" / "evaluation.json").read_text()))


def with_gain(found: Evaluation, value: float, low: float, high: float) -> Evaluation:
    changed = copy.deepcopy(found)
    changed["comparisons"][0]["numbers"]["gain"] |= {"value": value, "ci95": [low, high]}
    return changed


@pytest.mark.parametrize(
    ("gain", "first"),
    [
        ((0.02, 0.01, 0.03), "The teacher helped: +2.00 points."),
        ((-0.02, -0.03, -0.01), "The teacher hurt: -2.00 points."),
        (
            (0.02, -0.01, 0.05),
            "No difference is shown: +2.00 points, and 0 is within the interval.",
        ),
    ],
)
def test_the_verdict(found: Evaluation, gain: tuple[float, float, float], first: str) -> None:
    lines = evidence.verdict(with_gain(found, *gain))
    assert lines[0] == first
    assert "one against student alone" in lines[1]
    assert "897 test images" in lines[1]
    assert any(line.startswith("On corrupted images") for line in lines)
    assert any("One seed" in line for line in lines)


def test_without_a_control_nothing_is_said_of_the_teacher(found: Evaluation) -> None:
    found["comparisons"] = []
    for subject in found["subjects"]:
        subject["control"] = None
    text = " ".join(evidence.verdict(found))
    assert "helped:" not in text
    assert "`distill train --baseline` makes one" in text


def test_more_is_not_called_fewer(found: Evaluation) -> None:
    student, teacher = found["subjects"][:2]
    for subject, count in ((student, 200), (teacher, 100)):
        subject["numbers"]["cost"]["parameters"]["value"] = count
    assert "2 times more parameters" in " ".join(evidence.verdict(found))


def test_the_page_has_all_suites_and_their_files(measured: Path) -> None:
    page = Page((measured / "ev" / "report.html").read_text())
    headings = [text for _, text in page.all("h2")]
    assert headings == [
        "Training", "Accuracy and calibration", "Fidelity to the teacher", "Corruptions",
        "Inductive biases", "Dense features", "Cost", "Recipe and environment",
    ]  # fmt: skip
    names = [attributes.get("download") for attributes, _ in page.all("a")]
    assert set(names) >= {
        "evaluation.json", "evaluation.csv", "reliability.svg", "corruptions.csv",
        "confusion-one.png", "consistency.csv", "pareto-macs.svg", "bias.csv",
    }  # fmt: skip
    linked = (*page.all("a"), *page.all("img"))
    addresses = [a.get("href") or a.get("src") or "" for a, _ in linked]
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_the_table_has_every_number(found: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(evidence.table_of(found))))
    for subject in found["subjects"]:
        for suite in SUITES:
            own = [r for r in rows if (r["subject"], r["suite"]) == (subject["name"], suite)]
            assert {row["name"] for row in own} == set(subject["numbers"][suite])
    first = next(row for row in rows if row["name"] == "top1")
    assert float(first["value"]) == pytest.approx(
        found["subjects"][0]["numbers"]["clean"]["top1"]["value"], rel=1e-5
    )


def test_more_networks_than_colours_have_all_their_bars(found: Evaluation) -> None:
    first = found["subjects"][0]
    found["subjects"] += [first | {"name": f"more-{i}"} for i in range(10)]
    names = [subject["name"] for subject in found["subjects"]]
    shown = evidence.to_html(found, {}, "{}")
    for title in ("Recognised, by class", "Mean over severities"):
        pictures = [f"{title} ({i} of 3)" for i in (1, 2, 3)]
        assert all(picture in shown for picture in pictures)
    assert all(f">{name}</text>" in shown for name in names)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_as_they_are(found: Evaluation, name: str) -> None:
    text = json.dumps(found).replace('"one"', json.dumps(name))
    changed = json.loads(text)
    for subject in changed["subjects"]:
        subject["runs"] = []
        if "clean" in subject["tables"]:
            subject["tables"]["clean"]["classes"] = [name] * 10
    images = {name: {"worst": [Image(picture((8, 8), 0), (name, name))]}}
    page = Page(evidence.to_html(changed, images, text))
    assert not page.all("script")
    for tag in ("img", "a", "svg"):
        assert not any(
            key.startswith("on") for attributes, _ in page.all(tag) for key in attributes
        )
    assert any(name in shown for _, shown in page.all("td") + page.all("th"))


@pytest.mark.soak
def test_a_browser_shows_it_without_an_error_or_a_request(measured: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    page = measured / "ev" / "report.html"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=360,2000",
         f"--log-net-log={tmp_path / 'net.json'}", f"--screenshot={tmp_path / 'page.png'}",
         f"file://{page}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
    asked = re.findall(r'"url":"(https?://[^"/]+)', (tmp_path / "net.json").read_text())
    assert {one for one in asked if not one.endswith(".google.com")} == set()  # the browser's own


def test_a_page_of_some_suites_alone(found: Evaluation, write: Callable[..., Page]) -> None:
    for suite in SUITES:
        page = write(found, suite)
        assert len(page.all("table")) >= 2


@pytest.fixture
def write() -> Callable[..., Page]:
    def only(found: Evaluation, suite: str) -> Page:
        changed = copy.deepcopy(found)
        for subject in changed["subjects"]:
            for column in ("numbers", "tables"):
                subject[column] = {suite: subject[column][suite]}
        return Page(evidence.to_html(changed, {}, "{}"))

    return only

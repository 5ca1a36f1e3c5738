"""Accuracy on corrupted images: its means, its reference, official files, one image or many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import corruptions as made
from distill.engine import machine
from distill.engine.machine import Machine
from distill.errors import IncompatibleError
from distill.suites import corruptions
from distill.suites.corruptions import Judged
from distill.suites.subjects import Subject, evenly, find
from tests.cli.conftest import process

IMAGES = 40


@pytest.fixture(scope="module")
def here() -> Machine:
    return machine.setup()


@pytest.fixture(scope="module")
def subjects(evaluated: Path, here: Machine) -> list[Subject]:
    return find([evaluated / "one"], None, here)


def test_the_means_are_those_of_the_corrupted_images(
    subjects: list[Subject], here: Machine
) -> None:
    found = corruptions.measure(subjects, here, images=IMAGES)
    tested = subjects[0].first
    dataset, network = tested.dataset, tested.network
    assert network is not None
    assert dataset.test.pixels is not None
    ids = evenly(len(dataset.test), IMAGES)
    pixels = torch.from_numpy(dataset.test.pixels[ids]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    images, labels = pixels / 255, torch.from_numpy(dataset.test.labels[ids])
    right: dict[str, list[float]] = {}
    losses = []
    for name in made.names():
        for severity in made.SEVERITIES:
            shown = made.corrupt(images, torch.from_numpy(ids), name, severity)
            with torch.no_grad():
                log_p = network(shown).logits.double().log_softmax(dim=1)
            right.setdefault(name, []).append(
                float((log_p.argmax(dim=1) == labels).double().mean())
            )
            if name in made.COMMON:
                losses.append(float(-log_p[torch.arange(IMAGES), labels].mean()))
    numbers, table = found[subjects[0].name].numbers, found[subjects[0].name].tables["corruptions"]
    assert table["accuracy"] == {name: pytest.approx(row) for name, row in right.items()}
    for key, group in corruptions.GROUPS.items():
        expected = np.mean([right[name] for name in group])
        assert numbers[key].value == pytest.approx(expected, abs=1e-12)
    assert numbers["corrupted_nll"].value == pytest.approx(np.mean(losses), rel=1e-5)
    alone = found[subjects[2].name]
    assert subjects[2].role == "alone"
    assert table["reference"] == subjects[2].name
    assert alone.numbers["mce"].value == pytest.approx(1.0)
    theirs = alone.tables["corruptions"]["accuracy"]
    ratios = [(5 - sum(right[n])) / (5 - sum(theirs[n])) for n in made.COMMON]
    assert numbers["mce"].value == pytest.approx(np.mean(ratios), rel=1e-9)
    # At 8 pixels the mildest zooms change nothing: there is nothing to be relative to.
    assert theirs["zoom_blur"][0] == alone.tables["corruptions"]["clean"]


def test_the_relative_error_is_that_above_the_clean_one() -> None:
    draw = np.random.default_rng(0)
    ids, shape = np.arange(400), (400, 2, 5)
    own, other = (
        Judged(ids, draw.random(shape) < p, np.zeros(shape), np.zeros(shape), draw.random(400) < q)
        for p, q in ((0.6, 0.9), (0.5, 0.8))
    )
    found = corruptions._relative([own], [other], [0, 1])
    errors = [5 * (1 - one.correct.mean(axis=(0, 2))) for one in (own, other)]
    clean = [5 * (1 - one.clean.mean()) for one in (own, other)]
    assert found["mce"].value == pytest.approx((errors[0] / errors[1]).mean(), abs=1e-12)
    above = (errors[0] - clean[0]) / (errors[1] - clean[1])
    assert found["relative_mce"].value == pytest.approx(above.mean(), abs=1e-12)
    for number in found.values():
        assert number.ci95 is not None
        assert number.ci95[0] < number.value < number.ci95[1]  # type: ignore[operator]
    same = corruptions._relative([own], [own], [0, 1])
    assert [n.value for n in same.values()] == [pytest.approx(1.0)] * 2
    perfect = other._replace(correct=np.ones(shape, bool), clean=np.ones(400, bool))
    for number in corruptions._relative([own], [perfect], [0, 1]).values():
        assert number.value is None
        assert number.reason == "the reference loses nothing to one of the corruptions"


def test_official_files_of_another_size_are_refused(
    subjects: list[Subject], here: Machine, tmp_path: Path
) -> None:
    labels = subjects[0].first.dataset.test.labels
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    np.save(tmp_path / "fog.npy", np.zeros((5 * len(labels), 32, 32, 3), np.uint8))
    with pytest.raises(IncompatibleError, match=r"holds images of 32 px, the runs see 8 px"):
        corruptions.measure(subjects, here, images=IMAGES, folder=tmp_path)


def test_official_files_are_shown_in_place_of_our_own(here: Machine, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        """
        data: {name: digits, fraction: 0.2, image_size: 32}
        student: {model: resnet8}
        objective: [{term: ce}]
        optimizer: {name: sgd, lr: 0.1}
        train: {epochs: 4, batch_size: 16}
        """
    )
    done = process("train", "recipe.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (subject,) = find([tmp_path / "run"], None, here)
    source = subject.first.dataset.test
    assert source.pixels is not None
    clean = np.broadcast_to(source.pixels, (len(source), 32, 32, 3))
    files = tmp_path / "c"
    files.mkdir()
    np.save(files / "labels.npy", np.tile(source.labels, 5).astype(np.uint8))
    # What they call fog are the images as they are; from the third severity on, their negatives.
    np.save(files / "fog.npy", np.concatenate([clean, clean, *[255 - clean] * 3]))
    found = corruptions.measure([subject], here, images=IMAGES, folder=files)
    table = found[subject.name].tables["corruptions"]
    assert table["official"] == ["fog"]
    assert table["accuracy"]["fog"][:2] == [table["clean"]] * 2
    assert len(set(table["accuracy"]["fog"][2:])) == 1
    assert table["accuracy"]["fog"][2] != table["clean"]
    own = corruptions.measure([subject], here, images=IMAGES)[subject.name].tables["corruptions"]
    assert own["official"] == []
    assert own["accuracy"]["snow"] == table["accuracy"]["snow"]

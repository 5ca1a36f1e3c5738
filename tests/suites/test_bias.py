"""Every part is asked of every network, on the same images; where one has none, it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.definitions import definitions
from distill.diagnostics import (
    attention,
    equivariance,
    permutation,
    rank,
    sharpness,
    similarity,
    specificity,
)
from distill.engine import machine
from distill.engine.machine import Machine
from distill.models.network import Network
from distill.suites import Found, bias
from distill.suites.subjects import Sample, Subject, find, sample, training_views


@pytest.fixture(scope="module")
def here() -> Machine:
    return machine.setup()


@pytest.fixture(scope="module")
def subjects(evaluated: Path, here: Machine) -> list[Subject]:
    return find([evaluated / "one"], None, here)


@pytest.fixture(scope="module")
def found(subjects: list[Subject], here: Machine) -> dict[str, Found]:
    return bias.measure(subjects, here)


@pytest.fixture(scope="module")
def shown(subjects: list[Subject], here: Machine) -> Sample:
    return sample(subjects[0].first, here, bias.SHUFFLED)


def network(subject: Subject) -> Network:
    assert isinstance(subject.first.network, Network)
    return subject.first.network


def test_every_measure_has_a_value_or_a_reason(found: dict[str, Found]) -> None:
    names = {name for name, one in definitions().items() if one.suite == "bias"}
    for one in found.values():
        assert set(one.numbers) == names
        for name, number in one.numbers.items():
            assert (number.value is None) == bool(number.reason), name
            assert number.value is None or np.isfinite(number.value), name


def test_what_a_network_has_not_is_not_defined(
    found: dict[str, Found], subjects: list[Subject]
) -> None:
    student, teacher, alone = (found[one.name].numbers for one in subjects)
    assert student["attention_distance"].value is not None
    assert teacher["attention_distance"].value is None  # a ResNet
    assert "no attention" in teacher["attention_distance"].reason
    assert (teacher["data_specificity"].value, teacher["data_specificity"].ci95) == (0, None)
    assert teacher["cka"].value is None  # it has no teacher
    assert student["cka"].value != alone["cka"].value
    assert found[subjects[0].name].numbers["patches_8"].value is not None


def test_numbers_are_the_means_of_what_the_diagnostics_say(
    found: dict[str, Found], subjects: list[Subject], shown: Sample, here: Machine
) -> None:
    numbers, own = found[subjects[0].name].numbers, network(subjects[0])
    few = shown.images[: bias.IMAGES]
    errors = [
        equivariance.lie_derivative(own, few, k).error for k in ("translate_x", "translate_y")
    ]  # type: ignore[arg-type]
    assert numbers["lie_translation"].value == pytest.approx(float(torch.stack(errors).mean()))
    assert numbers["lie_translation"].n == bias.IMAGES
    kept = equivariance.consistency(own, few).double().mean()
    assert numbers["consistency"].value == pytest.approx(float(kept))
    right = permutation.correct(own, *shown, grid=4).double().mean()
    assert numbers["patches_4"].value == pytest.approx(float(right))
    overall = attention.attention(own, few).overall
    assert numbers["attention_distance"].value == pytest.approx(float(overall.distance.mean()))
    layers = specificity.specificity(own, few)
    specific = numbers["data_specificity"]
    assert specific.value == pytest.approx(sum(layer.value for layer in layers) / len(layers))
    assert specific.ci95 is not None
    assert 0 < specific.ci95[0] < specific.value < specific.ci95[1] < 1
    ranks = rank.ranks(own, shown.images)
    assert ranks.pooled is not None
    assert numbers["effective_rank"].value == pytest.approx(ranks.pooled.effective)
    batches = torch.split(shown.images[:512], 256)
    told = similarity.cka(network(subjects[1]), own, batches).pooled
    assert numbers["cka"].value == pytest.approx(told)


def test_sharpness_is_that_of_the_loss_that_was_trained_with(
    found: dict[str, Found], subjects: list[Subject], here: Machine
) -> None:
    numbers, own = found[subjects[0].name].numbers, network(subjects[0])
    batches = list(training_views(subjects[0].first, here, images=bias.BENT))
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert subjects[0].first.recipe.optimizer.name == "adamw"  # whose decay is in no loss
    assert numbers["sharpness_sam"].value == pytest.approx(
        sharpness.sam(own, images, labels, weight_decay=0.0), rel=1e-4
    )


def test_nothing_of_the_networks_is_changed(
    found: dict[str, Found], subjects: list[Subject], shown: Sample
) -> None:
    del found
    for subject in subjects:
        own = network(subject)
        assert not own.training
        assert own(shown.images[:2]).features is None
        assert not any(parameter.requires_grad for parameter in own.parameters())
        with torch.no_grad():
            said = own(torch.from_numpy(_pixels(subject, 16))).logits.numpy()
        np.testing.assert_allclose(said, subject.first.answers.logits[:16], atol=1e-5)


def _pixels(subject: Subject, count: int) -> np.ndarray:
    pixels = subject.first.dataset.test.pixels
    assert pixels is not None
    images = np.broadcast_to(pixels[:count], (*pixels[:count].shape[:3], 3)).transpose(0, 3, 1, 2)
    return (images / np.float32(255)).astype(np.float32)


def test_there_are_pictures_of_where_it_looks(
    found: dict[str, Found], subjects: list[Subject]
) -> None:
    for subject in subjects:
        images = found[subject.name].images
        assert len(images["saliency"]) == bias.SHOWN
        assert all(image.png.startswith(b"\x89PNG") for image in images["saliency"])

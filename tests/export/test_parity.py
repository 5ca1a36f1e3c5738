from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from distill.errors import VerificationError
from distill.export import parity
from distill.export.parity import Known
from distill.export.program import Logits, Pixels, Student, in_unit
from tests.export.conftest import pixels

N = 100


@pytest.fixture
def known() -> Known:
    """A student that names a class by a pixel, right on nine of ten images."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(N, 4)).astype(np.float32) * 3
    labels = logits.argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 4
    shown = pixels(8, N)
    shown[:, 0, 0, 0] = np.arange(N)
    return Known(shown, labels, logits)


def saying(logits: Logits) -> Callable[[Sequence[Pixels]], list[Logits]]:
    """A runtime that has these answers; the first pixel tells which image is asked about."""

    def answer(batches: Sequence[Pixels]) -> list[Logits]:
        return [logits[batch[:, 0, 0, 0]] for batch in batches]

    return answer


def same(batch: Pixels) -> Pixels:
    return batch


def test_all_images_and_the_first_in_small_batches_are_asked(known: Known) -> None:
    asked: list[int] = []

    def answer(batches: Sequence[Pixels]) -> list[Logits]:
        asked.extend(len(batch) for batch in batches)
        return saying(known.logits)(batches)

    found = parity.compare(answer, same, known)
    assert asked == [1] * 64 + [2] * 32 + [7] * 9 + [1] + [32, 32, 32, 4]
    assert found == parity.Parity(64, (1, 2, 7), 0.0, 1.0, 0.9, 0.9, N, 0.0, (0.0, 0.0))
    parity.require(found, "fp32", known, max_drop=0)


def test_the_largest_difference_counts(known: Known) -> None:
    logits = known.logits.copy()
    logits[77, 2] += 0.25
    found = parity.compare(saying(logits), same, known)
    assert found.max_abs == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(VerificationError, match=r"up to 2\.5e-01; allowed are 1\.\de-04"):
        parity.require(found, "fp32", known, max_drop=1)
    with pytest.raises(VerificationError, match=r"allowed are \d\.\de-02, the largest"):
        parity.require(found, "fp16", known, max_drop=1)
    parity.require(found, "int8", known, max_drop=0)


def test_large_logits_are_compared_by_their_size(known: Known) -> None:
    """Float32 has seven digits, whatever they stand for."""
    student = known._replace(logits=10 * known.logits)
    largest = float(abs(student.logits).max())
    assert largest > 60
    for part, fine in ((0.9e-5, True), (1.1e-5, False)):
        logits = student.logits.copy()
        logits[7] += np.float32(part * largest)
        found = parity.compare(saying(logits), same, student)
        if fine:
            parity.require(found, "fp32", student, max_drop=0)
        else:
            with pytest.raises(VerificationError, match="logits differ"):
                parity.require(found, "fp32", student, max_drop=0)


def test_one_other_class_is_too_many(known: Known) -> None:
    logits, tie = known.logits.copy(), known.logits.copy()
    first, second = np.argsort(-logits[5])[:2]
    logits[5, first] = logits[5, second]
    tie[5, first] = logits[5, second] - 5e-5  # nothing that the difference would tell
    found = parity.compare(saying(tie), same, known._replace(logits=logits))
    assert found.max_abs < 1e-4
    assert found.agreement < 1
    with pytest.raises(VerificationError, match="not for all"):
        parity.require(found, "fp32", known, max_drop=1)


def test_a_drop_is_measured_with_its_interval(known: Known) -> None:
    logits = known.logits.copy()
    lost = np.flatnonzero(logits.argmax(axis=1) == known.labels)[:6]
    logits[lost] = -logits[lost]
    found = parity.compare(saying(logits), same, known)
    wrong = (logits.argmax(axis=1) != known.labels).mean()
    assert found.drop == pytest.approx(wrong - 0.1)
    assert found.drop_ci95[0] < found.drop < found.drop_ci95[1]
    parity.require(found, "int8", known, max_drop=found.drop)
    with pytest.raises(VerificationError, match=r"points less \(.* and --max-drop is 1$"):
        parity.require(found, "int8", known, max_drop=0.01)


@pytest.mark.parametrize("fault", ["nan", "shape"])
def test_answers_that_are_none(known: Known, fault: str) -> None:
    logits = known.logits.copy()
    if fault == "nan":
        logits[3, 1] = np.nan
    else:
        logits = logits[:, :3]
    with pytest.raises(VerificationError, match="not finite"):
        parity.compare(saying(logits), same, known)


def test_a_runtime_that_fails(known: Known) -> None:
    def answer(batches: Sequence[Pixels]) -> list[Logits]:
        raise RuntimeError("no kernel\nfor this")

    with pytest.raises(VerificationError, match=r"^its runtime cannot run it: no kernel for this$"):
        parity.compare(answer, same, known)


def test_whole_files(known: Known) -> None:
    pictures, logits = list(known.pixels[:40]), known.logits[:40]
    assert parity.compare_files(saying(known.logits), pictures, logits).agreement == 1
    turned = known.logits.copy()
    turned[:3] = -turned[:3]
    with pytest.raises(VerificationError, match="of 40 picture files it names 92%"):
        parity.compare_files(saying(turned), pictures, logits)


def test_the_student_is_asked_as_it_was_evaluated(student: Callable[..., Student]) -> None:
    given = student()
    shown = pixels(32, 40)
    told = parity.known(given.network, shown, np.zeros(40, np.int64)).logits
    with torch.no_grad():
        expected = given.network(torch.from_numpy(in_unit(shown))).logits.numpy()
    np.testing.assert_allclose(told, expected, atol=1e-5)

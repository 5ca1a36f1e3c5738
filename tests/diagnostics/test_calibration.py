"""Calibration by plain formulas and reference libraries; temperatures where they are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
from scipy.optimize import minimize_scalar

from distill import evaluate
from distill.diagnostics import UndefinedError, calibration

CASES = range(200)


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of 2 to 40 classes, from hesitant to sure, that know something."""
    draw = np.random.default_rng(seed)
    n, classes = int(draw.integers(2, 300)), int(draw.integers(2, 41))
    labels = draw.integers(classes, size=n)
    logits = draw.normal(size=(n, classes)) + 2 * np.eye(classes)[labels] * draw.random()
    return logits * 10 ** draw.uniform(-1, 1), labels


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=1, keepdims=True))


def plain_bins(confidence: np.ndarray, correct: np.ndarray, bins: int) -> list[np.ndarray]:
    """Of each bin of equal width: number, mean confidence, accuracy; open below, closed above."""
    found = []
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if b == 0:
            inside |= confidence == 0
        means = (x[inside].mean() if inside.any() else np.nan for x in (confidence, correct))
        found.append(np.array([inside.sum(), *means]))
    return found


def test_scores_of_images_are_those_of_scikit_learn_and_of_plain_sums() -> None:
    for seed in CASES:
        logits, labels = case(seed)
        classes, p = logits.shape[1], softmax(logits)
        truth = np.eye(classes)[labels]
        expected = [sum((p[i, k] - truth[i, k]) ** 2 for k in range(classes)) for i in range(2)]
        found = calibration.brier(logits, labels)
        assert found[:2] == pytest.approx(expected, abs=1e-12)
        assert found == pytest.approx(((p - truth) ** 2).sum(axis=1), abs=1e-12)
        known = list(range(classes))
        if classes > 2:  # for two, scikit-learn looks at one of them
            reference = sklearn.metrics.brier_score_loss(labels, p, labels=known)
        else:
            reference = 2 * sklearn.metrics.brier_score_loss(labels, p[:, 1], labels=known)
        assert found.mean() == pytest.approx(reference, abs=1e-12)
        if p.min() > 1e-12:  # scikit-learn clips what is smaller than the machine's epsilon
            reference = sklearn.metrics.log_loss(labels, p, labels=known)
            assert calibration.nll(logits, labels).mean() == pytest.approx(reference, abs=1e-12)


def test_scores_at_the_ends() -> None:
    sure = np.array([[1e4, -1e4, 0.0]] * 2, np.float32)
    labels = np.array([0, 1])
    assert calibration.brier(sure, labels).tolist() == [0.0, 2.0]
    assert calibration.nll(sure, labels).tolist() == [0.0, 2e4]
    even = np.zeros((1, 4))
    assert calibration.brier(even, labels[:1]) == pytest.approx([0.75])
    assert calibration.nll(even, labels[:1]) == pytest.approx([math.log(4)])


def test_single_precision_loses_nothing_but_what_the_logits_lost() -> None:
    logits, labels = case(1)
    halved = logits.astype(np.float32)
    assert (calibration.nll(halved, labels) == calibration.nll(halved.astype(float), labels)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_have_no_score(value: float) -> None:
    logits, labels = case(3)
    logits[:2, 1] = value
    for measure in (calibration.brier, calibration.nll, calibration.fit_temperature):
        with pytest.raises(UndefinedError, match="its answers to 2 images are not finite"):
            measure(logits, labels)


def test_reliability_is_what_the_calibration_error_is_the_sum_of() -> None:
    for seed in CASES:
        confidence, correct = calibration.top_label(*case(seed))
        confidence[::7] = 1.0
        bins = 15 if seed % 2 else 10
        found = calibration.reliability(confidence, correct, bins=bins)
        plain = np.array(plain_bins(confidence, correct, bins))
        np.testing.assert_allclose(np.stack(found[1:], axis=1), plain, rtol=0, atol=1e-12)
        assert found.edges == pytest.approx(np.arange(bins + 1) / bins)
        gaps = np.abs(found.accuracy - found.confidence) * found.images
        error = np.nansum(gaps) / len(confidence)
        if bins == 15:
            assert evaluate.ece(confidence, correct) == pytest.approx(error, abs=1e-12)


def test_full_confidence_is_in_the_last_bin_and_none_in_the_first() -> None:
    found = calibration.reliability(np.array([1.0, 1.0, 0.0]), np.array([True, False, True]))
    assert found.images.tolist() == [1] + [0] * 13 + [2]
    assert (found.confidence[-1], found.accuracy[-1]) == (1.0, 0.5)
    assert (found.confidence[0], found.accuracy[0]) == (0.0, 1.0)
    assert np.isnan(found.accuracy[1:-1]).all()


def test_bins_are_open_below_and_closed_above() -> None:
    for bins in (10, 15):
        ends = np.arange(1, bins + 1) / bins
        assert (calibration.bin_of(ends, bins) == np.arange(bins)).all()
        beyond = ends[:-1] + 1e-12
        assert (calibration.bin_of(beyond, bins) == np.arange(1, bins)).all()
    # As those of the calibration error: 0.2 = 3/15 shares one with 0.15, and their gaps cancel.
    confidence, correct = np.array([0.2, 0.15] * 20), np.arange(40) >= 33
    assert evaluate.ece(confidence, correct) == pytest.approx(0.0, abs=1e-12)
    assert calibration.reliability(confidence, correct).images[2] == 40


def test_top_label_says_what_predictions_say() -> None:
    logits, labels = case(5)
    confidence, correct = calibration.top_label(logits, labels)
    told = evaluate.of_logits(logits, labels)
    assert confidence == pytest.approx(told.confidence, abs=1e-6)
    assert (correct == told.correct).all()


def test_adaptive_error_is_the_plain_one_over_bins_of_equal_count() -> None:
    for seed in CASES:
        confidence, correct = calibration.top_label(*case(seed))
        assert len(np.unique(confidence)) == len(confidence)
        order = np.argsort(confidence)
        error = 0.0
        for part in np.array_split(order, 15):
            if len(part):
                gap = abs(correct[part].mean() - confidence[part].mean())
                error += len(part) / len(order) * gap
        found = calibration.adaptive_ece(confidence, correct)
        assert found == pytest.approx(error, abs=1e-12)
        assert calibration.adaptive_ece(confidence, correct, bins=1) == pytest.approx(
            abs(correct.mean() - confidence.mean()), abs=1e-12
        )


def test_each_image_is_in_one_bin_and_bins_are_equally_full() -> None:
    confidence, correct = calibration.top_label(*case(11))
    gaps = calibration.adaptive_gaps(confidence, correct)
    held = gaps != 0
    assert (held.sum(axis=1) == 1).all()
    assert np.ptp(held.sum(axis=0)) <= 1
    assert gaps.sum(axis=1) == pytest.approx(correct - confidence, abs=1e-15)
    assert (np.diff(held.argmax(axis=1)[np.argsort(confidence)]) >= 0).all()


def test_the_order_of_images_of_equal_confidence_leaves_no_trace() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.integers(1, 5, size=200) / 4
    correct = draw.random(200) < confidence
    expected = calibration.adaptive_ece(confidence, correct)
    for _ in range(20):
        order = draw.permutation(200)
        found = calibration.adaptive_ece(confidence[order], correct[order])
        assert found == pytest.approx(expected, abs=1e-12)
    # All alike: every bin holds the same mean, whoever is in it.
    assert calibration.adaptive_ece(np.full(90, 0.5), np.arange(90) < 63) == pytest.approx(0.2)


def test_classwise_error_is_the_plain_formula() -> None:
    for seed in range(40):
        logits, labels = case(seed)
        p = softmax(logits)
        expected = []
        for k in range(p.shape[1]):
            images, told, share = np.array(plain_bins(p[:, k], labels == k, 15)).T
            expected.append(np.nansum(images * np.abs(share - told)) / len(labels))
        assert calibration.classwise_ece(logits, labels) == pytest.approx(
            np.array(expected), abs=1e-12
        )


def test_answers_drawn_from_what_is_said_are_calibrated() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(200_000, 4)) * 2
    edges = softmax(logits).cumsum(axis=1)
    labels = (edges < draw.random(200_000)[:, None]).sum(axis=1).clip(max=3)
    top = calibration.top_label(logits, labels)
    assert evaluate.ece(*top) < 0.005
    assert calibration.adaptive_ece(*top) < 0.005
    assert calibration.classwise_ece(logits, labels).max() < 0.005
    fitted = calibration.fit_temperature(logits, labels)
    assert abs(fitted.temperature - 1) < 3 * fitted.se
    over = evaluate.ece(*calibration.top_label(3 * logits, labels))
    assert over > 0.1
    scaled = calibration.cross_scaled(3 * logits, labels)
    assert evaluate.ece(*calibration.top_label(scaled, labels)) < 0.005


def test_the_temperature_minimises_the_nll() -> None:
    at_bound = 0
    for seed in CASES:
        logits, labels = case(seed)
        found = calibration.fit_temperature(logits, labels)

        def nll(log_t: float, z: np.ndarray = logits, y: np.ndarray = labels) -> float:
            return float(calibration.nll(z / math.exp(log_t), y).mean())

        assert found.nll == pytest.approx(nll(math.log(found.temperature)), abs=1e-12)
        bounds = (math.log(calibration.COLDEST), math.log(calibration.HOTTEST))
        reference = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        assert found.nll <= reference.fun + 1e-12
        at_bound += found.at_bound
        if not found.at_bound:  # a minimum's place is known to the root of its value's error
            assert math.log(found.temperature) == pytest.approx(reference.x, abs=1e-4)
            p = softmax(logits / found.temperature)
            slope = (p * logits).sum(axis=1) - logits[np.arange(len(labels)), labels]
            assert abs(slope.mean()) < 1e-10 * np.abs(logits).max()
    assert 0 < at_bound < 100


def test_where_the_best_temperature_is_known() -> None:
    # Two classes, logit a for the first, right in a share r: σ(a / T) = r.
    for a, right, n in ((3.0, 8, 10), (0.02, 99, 100), (40.0, 6, 10)):
        logits = np.tile([a, 0.0], (n, 1))
        labels = (np.arange(n) >= right).astype(int)
        share = right / n
        found = calibration.fit_temperature(logits, labels)
        assert found.temperature == pytest.approx(a / math.log(share / (1 - share)), rel=1e-10)
        entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert found.nll == pytest.approx(entropy, rel=1e-10)
        # β = logit(r) / a has the variance 1 / (n a² r (1 − r)), and T = 1/β.
        se = found.temperature**2 / a / math.sqrt(n * share * (1 - share))
        assert found.se == pytest.approx(se, rel=1e-8)


def test_scaled_logits_have_the_scaled_temperature() -> None:
    logits, labels = case(7)
    one = calibration.fit_temperature(logits, labels)
    assert not one.at_bound
    for c in (0.05, 0.9, 7.0, 60.0):
        other = calibration.fit_temperature(c * logits, labels)
        assert other.temperature == pytest.approx(c * one.temperature, rel=1e-10)
        assert other.nll == pytest.approx(one.nll, rel=1e-12)
        assert other.se == pytest.approx(c * one.se, rel=1e-8)
    shifted = calibration.fit_temperature(logits + np.arange(len(labels))[:, None], labels)
    assert shifted.temperature == pytest.approx(one.temperature, rel=1e-10)


def test_the_standard_error_is_that_of_the_bootstrap() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(5, size=1000)
    logits = 3 * draw.normal(size=(1000, 5)) + 4 * np.eye(5)[labels]
    found = calibration.fit_temperature(logits, labels)
    drawn = []
    for _ in range(200):
        chosen = draw.integers(1000, size=1000)
        drawn.append(calibration.fit_temperature(logits[chosen], labels[chosen]).temperature)
    assert found.se == pytest.approx(np.std(drawn), rel=0.2)


def test_without_a_minimum_the_temperature_is_the_bound_and_says_so() -> None:
    labels = np.arange(20) % 4
    sure = np.eye(4)[labels]
    for scale in (0.01, 1.0, 1e4):
        right = calibration.fit_temperature(scale * sure, labels)
        assert (right.temperature, right.at_bound) == (calibration.COLDEST, True)
        wrong = calibration.fit_temperature(-scale * sure, labels)
        assert (wrong.temperature, wrong.at_bound) == (calibration.HOTTEST, True)
        assert math.isnan(right.se)
        assert math.isfinite(wrong.nll)


def test_there_is_no_temperature_of_nothing() -> None:
    with pytest.raises(UndefinedError, match="equally likely"):
        calibration.fit_temperature(np.full((5, 3), 2.5), np.arange(5) % 3)
    with pytest.raises(UndefinedError, match="no images"):
        calibration.fit_temperature(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(UndefinedError, match="no images"):
        calibration.cross_scaled(np.array([[1.0, 2.0]]), np.array([0]))


def test_each_half_is_scaled_by_the_temperature_of_the_other() -> None:
    logits, labels = case(9)
    even, odd = (
        calibration.fit_temperature(logits[i::2], labels[i::2]).temperature for i in (0, 1)
    )
    assert even != pytest.approx(odd, rel=1e-3)
    found = calibration.cross_scaled(logits, labels)
    assert (found[0::2] == logits[0::2] / odd).all()
    assert (found[1::2] == logits[1::2] / even).all()
    own = calibration.fit_temperature(logits, labels).nll
    assert calibration.nll(found, labels).mean() > own  # what is not fitted to is not as good

"""Confusions are those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from distill.diagnostics import confusion
from distill.diagnostics.confusion import Confused


def test_counts_and_scores_are_those_of_scikit_learn() -> None:
    absent = silent = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        n, classes = int(draw.integers(1, 200)), int(draw.integers(2, 30))
        labels = draw.integers(classes, size=n)
        told = np.where(draw.random(n) < 0.6, labels, draw.integers(classes, size=n))
        known = np.unique(labels)
        counts = confusion.confusion(labels, told, classes)
        reference = sklearn.metrics.confusion_matrix(labels, told, labels=range(classes))
        assert (counts == reference).all()
        found = confusion.by_class(counts)
        precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
            labels, told, labels=known, zero_division=np.nan
        )
        assert (found.support[known] == support).all()
        np.testing.assert_allclose(found.recall[known], recall, atol=1e-12)
        np.testing.assert_allclose(found.precision[known], precision, atol=1e-12)
        np.testing.assert_allclose(found.f1[known], f1, atol=1e-12)
        missing = np.setdiff1d(np.arange(classes), known)
        assert np.isnan(np.stack(found[1:])[:, missing]).all()
        assert confusion.macro_f1(counts) == pytest.approx(f1.mean(), abs=1e-12)
        per_class = [(told[labels == k] == k).mean() for k in known]
        assert confusion.balanced_accuracy(counts) == pytest.approx(np.mean(per_class), abs=1e-12)
        if set(told) <= set(labels) and len(known) > 1:  # scikit-learn warns of others
            expected = sklearn.metrics.balanced_accuracy_score(labels, told)
            assert confusion.balanced_accuracy(counts) == pytest.approx(expected, abs=1e-12)
        absent += len(missing)
        silent += int(np.isnan(precision).sum())
    assert absent > 100  # both kinds of undefined scores were among them
    assert silent > 10


def test_a_class_that_is_never_predicted_has_no_precision_and_no_f1_but_zero() -> None:
    found = confusion.by_class(confusion.confusion(np.array([0, 1]), np.array([0, 0]), 3))
    np.testing.assert_array_equal(found.recall, [1.0, 0.0, np.nan])
    np.testing.assert_array_equal(found.precision, [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(found.f1, [2 / 3, 0.0, np.nan])


def test_the_most_frequent_confusions_come_first() -> None:
    counts = np.array([[9, 2, 0], [3, 1, 0], [2, 0, 0]])
    expected = [Confused(1, 0, 3, 0.75), Confused(0, 1, 2, 2 / 11), Confused(2, 0, 2, 1.0)]
    assert confusion.top_confusions(counts) == expected
    assert confusion.top_confusions(counts, most=1) == expected[:1]
    assert confusion.top_confusions(np.diag([1, 2])) == []

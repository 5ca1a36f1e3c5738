"""The scores are those of the reference libraries, whatever the order and the batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from distill import evaluate
from distill.errors import DivergedError
from distill.evaluate import Predictions
from distill.types import Outputs


class Echo(nn.Module):
    """Answers with its input, through a BatchNorm that would move if it were trained."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_classes, eps=0.0)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(self.norm(images))


def batches(
    logits: Tensor, labels: Tensor, *, size: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    ids = torch.arange(len(labels)) if order is None else order
    for part in torch.split(ids, size):
        yield logits[part], labels[part], part


def predict(
    logits: Tensor, labels: Tensor, *, size: int = 64, order: Tensor | None = None
) -> Predictions:
    shuffled = batches(logits, labels, size=size, order=order)
    return evaluate.predict(Echo(logits.shape[1]), shuffled)


def case(seed: int) -> tuple[Tensor, Tensor]:
    """Random logits and labels: 2 to 100 classes, hesitant to sure."""
    draw = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 400, (), generator=draw))
    classes = 2 if seed % 10 == 0 else int(torch.randint(3, 101, (), generator=draw))
    scale = 10 ** float(torch.rand((), generator=draw) * 2 - 1)
    logits = torch.randn(n, classes, generator=draw) * scale
    return logits, torch.randint(classes, (n,), generator=draw)


def plain_ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Guo et al., equation 3, bin by bin: each open below and closed above."""
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            error += inside.sum() / len(confidence) * abs(gap)
    return error


@pytest.mark.parametrize("seed", range(200))
def test_scores_are_those_of_scikit_learn_and_torchmetrics(seed: int) -> None:
    logits, labels = case(seed)
    classes = logits.shape[1]
    found = evaluate.scores(predict(logits, labels))
    p = logits.double().softmax(dim=1)
    y, known = labels.numpy(), list(range(classes))
    assert found.top1 == sklearn.metrics.accuracy_score(y, logits.argmax(dim=1).numpy())
    assert found.top1 == pytest.approx(
        float(multiclass_accuracy(logits, labels, classes, average="micro")), abs=1e-6
    )
    if classes > 5:
        assert found.top5 == pytest.approx(
            sklearn.metrics.top_k_accuracy_score(y, logits.numpy(), k=5, labels=known), abs=1e-12
        )
    else:
        assert found.top5 == 1.0
    own = -logits.double().log_softmax(dim=1)[torch.arange(len(y)), labels]
    assert found.nll == pytest.approx(float(own.mean()), rel=1e-12, abs=1e-12)
    if p.min() > 1e-12:  # scikit-learn clips what is smaller than the machine's epsilon
        assert found.nll == pytest.approx(
            sklearn.metrics.log_loss(y, p.numpy(), labels=known), rel=1e-10, abs=1e-12
        )
    if float(p.float().max()) < 1.0:  # torchmetrics gives full confidence a sixteenth bin
        reference = multiclass_calibration_error(p.float(), labels, classes, n_bins=15, norm="l1")
        assert found.ece == pytest.approx(float(reference), abs=2e-6)


@pytest.mark.parametrize("seed", range(50))
def test_ece_is_the_plain_formula_in_float64(seed: int) -> None:
    draw = np.random.default_rng(seed)
    confidence = draw.beta(2, 1, size=draw.integers(1, 2000))
    confidence[draw.random(len(confidence)) < 0.1] = 1.0
    correct = draw.random(len(confidence)) < confidence**2
    expected = plain_ece(confidence, correct)
    assert evaluate.ece(confidence, correct) == pytest.approx(expected, abs=1e-12)


def test_ece_at_the_ends() -> None:
    for end, right, expected in ((1.0, 1, 0.0), (1.0, 0, 1.0), (0.0, 0, 0.0), (0.0, 1, 1.0)):
        assert evaluate.ece(np.full(7, end), np.full(7, bool(right))) == expected
    # The bins are closed above: 0.2 = 3/15 shares one with 0.15, and their gaps cancel.
    confidence, correct = np.array([0.2, 0.15] * 20), np.array([False] * 33 + [True] * 7)
    assert evaluate.ece(confidence, correct) == pytest.approx(0.0, abs=1e-12)


def test_a_tie_counts_against_the_label_in_top5() -> None:
    labels = torch.arange(10)
    logits = torch.zeros(10, 10)
    assert evaluate.scores(predict(logits, labels)).top5 == 0.0
    logits = torch.zeros(10, 10)
    logits[:, :4] = 1.0  # four sure answers, and the other six tie for the fifth place
    assert evaluate.scores(predict(logits, labels)).top5 == 0.4
    logits[:, 4] = 0.5
    assert evaluate.scores(predict(logits, labels)).top5 == 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_have_no_scores(value: float) -> None:
    logits, labels = case(3)
    logits[4:6, 1] = value
    network = Echo(logits.shape[1]).eval()
    told = evaluate.predict(network, batches(logits, labels, size=16))
    n = len(labels)
    with pytest.raises(DivergedError, match=f"answers to 2 of {n} images are not finite"):
        evaluate.scores(told)


def test_two_classes_are_always_among_five() -> None:
    logits, labels = case(0)
    assert logits.shape[1] == 2
    assert predict(logits, labels).top5.all()


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    right, wrong = predict(logits, torch.tensor([0, 1])), predict(logits, torch.tensor([1, 0]))
    assert evaluate.scores(right) == (1.0, 1.0, 0.0, 0.0)
    assert evaluate.scores(wrong) == (0.0, 1.0, 2e4, 1.0)


def test_order_and_batches_leave_no_trace() -> None:
    logits, labels = case(3)
    expected = predict(logits, labels, size=len(labels))
    assert expected.ids.tolist() == list(range(len(labels)))
    for seed, size in ((0, 1), (1, 7), (2, 1000)):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        found = predict(logits, labels, size=size, order=order)
        for column, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(column, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training: bool) -> None:
    logits, labels = case(4)
    network = Echo(logits.shape[1]).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    told = evaluate.predict(network, batches(logits, labels, size=16))
    assert network.training is training
    assert network.norm.training is training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    np.testing.assert_array_equal(told.predicted, logits.argmax(dim=1))  # so it was in eval mode


def outcome(student: np.ndarray, baseline: np.ndarray) -> tuple[Predictions, Predictions]:
    """Two sets of answers that are right where the given booleans are true."""
    n = len(student)
    zeros = np.zeros(n)

    def answers(correct: np.ndarray) -> Predictions:
        return Predictions(
            np.arange(n), np.zeros(n, int), (~correct).astype(int), zeros, zeros, zeros > 0
        )

    return answers(student), answers(baseline)


def test_paired_gain_is_a_plain_paired_bootstrap() -> None:
    draw = np.random.default_rng(0)
    common, luck = draw.random(500), draw.random((2, 500))
    student = 0.7 * common + 0.3 * luck[0] < 0.65
    baseline = 0.7 * common + 0.3 * luck[1] < 0.55
    gain, (low, high) = evaluate.paired_gain(*outcome(student, baseline))
    assert gain == pytest.approx(student.mean() - baseline.mean(), abs=1e-12)
    means = []
    for _ in range(5_000):
        chosen = draw.integers(0, 500, size=500)
        means.append(student[chosen].mean() - baseline[chosen].mean())
    expected = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.005)
    unpaired = 1.96 * np.sqrt((student.var() + baseline.var()) / 500)
    assert high - low < 2 * unpaired  # what the two have in common cancels


def test_paired_gain_covers_the_true_gain_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        common = draw.random(300)
        student, baseline = common < 0.8, common < 0.7
        flipped = draw.random((2, 300)) < 0.2
        gain, (low, high) = evaluate.paired_gain(
            *outcome(student ^ flipped[0], baseline ^ flipped[1]), resamples=1_000
        )
        assert low <= gain <= high
        covered += low <= 0.1 * 0.6 <= high  # 0.8 and 0.7, each right at 80 % and wrong at 20 %
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_gain_without_a_difference_is_nothing() -> None:
    same = np.array([True, False, True])
    assert evaluate.paired_gain(*outcome(same, same)) == (0.0, (0.0, 0.0))

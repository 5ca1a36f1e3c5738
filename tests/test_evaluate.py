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
    multiclass_confusion_matrix,
)

# Its public function rounds to float32 first.
from torchmetrics.functional.classification.calibration_error import (
    _ce_compute as torchmetrics_ece,
)

from distill import evaluate
from distill.diagnostics import calibration, confusion
from distill.errors import DivergedError
from distill.evaluate import Predictions
from distill.types import Outputs
from tests.promises import Measured


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


def extreme(seed: int) -> tuple[Tensor, Tensor]:
    """What random answers hardly are: one image, two classes, all wrong, nearly sure, tied."""
    draw = torch.Generator().manual_seed(seed)
    n, classes = (1, 2, 7, 60)[seed % 4], (2, 3, 6, 40)[seed // 4 % 4]
    labels = torch.randint(classes, (n,), generator=draw)
    logits = torch.randn(n, classes, generator=draw)
    match seed % 5:
        case 0:
            logits[torch.arange(n), labels] += 12.0  # sure, and right
        case 1:
            logits[torch.arange(n), (labels + 1) % classes] += 12.0  # sure, and wrong
        case 2:
            logits *= 1e-3  # knows nothing
        case 3:
            logits = logits.round()  # ties
    return logits, labels


@pytest.mark.promise("R20")
def test_the_largest_difference_to_the_reference_libraries(measured: Measured) -> None:
    """All in float64, where an error of a formula cannot hide behind rounding."""
    worst: dict[str, float] = dict.fromkeys(
        ("top-1", "top-5", "NLL", "ECE", "Brier", "confusion", "macro-F1"), 0.0
    )
    compared = dict.fromkeys(worst, 0)

    def compare(name: str, found: float, *references: float) -> None:
        compared[name] += 1
        worst[name] = max(worst[name], *(abs(found - float(told)) for told in references))

    for logits, labels in [*map(case, range(160)), *map(extreme, range(40))]:
        told = predict(logits, labels)
        found, y, classes = evaluate.scores(told), labels.numpy(), logits.shape[1]
        p = logits.double().softmax(dim=1)
        known = list(range(classes))
        tied = any(len(row.unique()) < classes for row in logits)
        counts = multiclass_confusion_matrix(logits, labels, classes).numpy()
        compare(
            "top-1",
            found.top1,
            sklearn.metrics.accuracy_score(y, logits.argmax(dim=1).numpy()),
            counts.trace() / counts.sum(),
        )
        if classes > 5 and not tied:  # of a tie scikit-learn takes the later class
            top5 = sklearn.metrics.top_k_accuracy_score(y, logits.numpy(), k=5, labels=known)
            compare("top-5", found.top5, top5)
        else:  # the plain rule: fewer than five are as probable
            rank = [(row >= row[label]).sum() for row, label in zip(logits, labels, strict=True)]
            compare("top-5", found.top5, np.mean([int(r) <= 5 for r in rank]))
        nll = [torch.nn.functional.cross_entropy(logits.double(), labels)]
        if p.min() > 1e-12:  # scikit-learn clips what is smaller than the machine's epsilon
            nll.append(sklearn.metrics.log_loss(y, p.numpy(), labels=known))
        compare("NLL", found.nll, *nll)
        if float(p.max()) < 1.0:  # torchmetrics gives full confidence a sixteenth bin
            sure, best = p.max(dim=1)
            reference = torchmetrics_ece(sure, (best == labels).double(), 15, norm="l1")
            compare("ECE", found.ece, reference, plain_ece(told.confidence, told.correct))
        truth = np.eye(classes)[y]
        compare(
            "Brier",
            calibration.brier(logits.numpy(), y).mean(),
            ((p.numpy() - truth) ** 2).sum(axis=1).mean(),
            *(
                [sklearn.metrics.brier_score_loss(y, p.numpy(), labels=known)]
                if classes > 2
                else []
            ),
        )
        own = confusion.confusion(y, told.predicted, classes)
        matrix = sklearn.metrics.confusion_matrix(y, told.predicted, labels=known)
        compare("confusion", 0.0, np.abs(own - matrix).max(), np.abs(own - counts).max())
        present = np.unique(y)
        f1 = sklearn.metrics.f1_score(
            y, told.predicted, labels=present, average="macro", zero_division=0.0
        )
        compare("macro-F1", confusion.macro_f1(own), f1)
    for name, difference in worst.items():
        assert difference <= 1e-12, (name, difference)
        assert compared[name] > 100
        measured(
            f"{name}, random and extreme cases",
            f"{compared[name]} compared, {difference:.0e} apart at most",
        )


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

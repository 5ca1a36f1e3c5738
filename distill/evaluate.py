"""Accuracy and calibration, exact over processes, with one answer kept for every image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.errors import DivergedError
from distill.types import Outputs

BINS = 15  # equal-width confidence bins of the calibration error, as the literature counts them


class Scores(NamedTuple):
    """Means over a split. Rates are fractions in [0, 1]."""

    top1: float
    top5: float
    nll: float  # nats
    ece: float


class Predictions(NamedTuple):
    """One answer an image, sorted by id."""

    ids: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    predicted: Int[np.ndarray, " N"]
    confidence: Float[np.ndarray, " N"]  # probability of the predicted class
    nll: Float[np.ndarray, " N"]  # −log probability of the label, in nats
    top5: Bool[np.ndarray, " N"]  # the label is among the five most probable classes

    @property
    def correct(self) -> Bool[np.ndarray, " N"]:
        """Whether the predicted class is the label."""
        correct: np.ndarray = self.predicted == self.labels
        return correct


class Answers(NamedTuple):
    """What a network says of every image, sorted by id."""

    ids: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    logits: Float[np.ndarray, "N K"]

    @property
    def predictions(self) -> Predictions:
        """What is predicted by them."""
        return of_logits(self.logits, self.labels)._replace(ids=self.ids)


def predict(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> Predictions:
    """Run a network over (images, labels, ids) batches, each image once over all processes.

    The network is in eval mode while it runs, and as it was afterwards. Every process returns
    the answers of all of them.
    """
    return Predictions(*_told(network, batches, autocast, judge))


def answer(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> Answers:
    """As `predict`, with all that the network says: its logits, in float32."""
    return Answers(*_told(network, batches, autocast, lambda logits, labels: (logits,)))


def _told(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    autocast: AbstractContextManager[Any] | None,
    kept: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> list[np.ndarray]:
    """Ids, labels, and columns of what is kept of the logits, over all processes, sorted by id."""
    was_training = network.training
    network.eval()
    rows: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), autocast or nullcontext():
        for images, labels, ids in batches:
            outputs: Outputs = network(images)
            rows.append((ids, labels, *kept(outputs.logits.float(), labels)))
    network.train(was_training)
    return together([torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)])


def together(columns: list[np.ndarray]) -> list[np.ndarray]:
    """The rows of all processes, the same in each of them, sorted by the first column.

    Args:
        columns: This process's; none where it has no rows.
    """
    if dist.is_initialized():
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, columns)
        columns = [np.concatenate(c) for c in zip(*(s for s in shares if s), strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return [column[order] for column in columns]


def judge(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> tuple[Tensor, ...]:
    """Of every image, all that scores are made of.

    Returns:
        Predicted class, its probability, −log probability of the label, and whether that is among
        the five most probable; in float64.
    """
    if logits.device.type == "mps":  # which has no float64
        logits, labels = logits.cpu(), labels.cpu()
    log_p = F.log_softmax(logits.double(), dim=-1)
    best, predicted = log_p.max(dim=-1)
    own = log_p.gather(1, labels[:, None])
    # The label's rank with ties counted against it, so that constant logits score nothing.
    ahead = (log_p >= own).sum(dim=-1)
    return predicted, best.exp(), -own[:, 0], ahead <= 5


def of_logits(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> Predictions:
    """The predictions that these logits are, of images 0 … N − 1."""
    known = torch.from_numpy(labels)
    answers = judge(torch.from_numpy(logits), known)
    return Predictions(np.arange(len(labels)), labels, *(column.numpy() for column in answers))


def scores(predictions: Predictions) -> Scores:
    """Top-1 and top-5 accuracy, mean negative log-likelihood, expected calibration error.

    Computed in float64 from the sorted answers, so that the number of processes and the batch
    size leave no trace in them.

    Raises:
        DivergedError: If an answer is not finite: a rank among such logits would mean nothing.
    """
    if broken := int((~np.isfinite(predictions.nll)).sum()):
        raise DivergedError(
            f"the network's answers to {broken:,} of {len(predictions.nll):,} images are not "
            "finite numbers",
            hint="it diverged in training: a lower optimizer.lr, a longer warmup_epochs, or a "
            "clip_norm",
        )
    return Scores(
        top1=float(predictions.correct.mean()),
        top5=float(predictions.top5.mean()),
        nll=float(predictions.nll.astype(np.float64).mean()),
        ece=ece(predictions.confidence, predictions.correct),
    )


def ece(confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"]) -> float:
    """Expected calibration error: Σ_b (n_b / N) |accuracy_b − mean confidence_b|.

    Over 15 bins of equal width, each open below and closed above, so that full confidence has
    a place in the last one.
    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: Whether that class is the label.

    Returns:
        A fraction in [0, 1].
    """
    return float(np.abs(gaps(confidence, correct).mean(axis=0)).sum())


def gaps(
    confidence: Float[np.ndarray, "N ..."], correct: Bool[np.ndarray, "N ..."]
) -> Float[np.ndarray, "N ... 15"]:
    """What each answer adds to the gap of each bin: correct − confidence in its own, 0 elsewhere.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: Whether that class is the label.
    """
    confidence = confidence.astype(np.float64)
    found = np.zeros((*confidence.shape, BINS))
    np.put_along_axis(
        found, bin_of(confidence)[..., None], (correct - confidence)[..., None], axis=-1
    )
    return found


def bin_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """In which of `bins` bins of equal width each is; they are open below and closed above.

    So that full confidence has a place in the last one. No confidence at all is in the first.
    """
    number = np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1
    return np.clip(number, 0, bins - 1)


def paired_gain(
    student: Predictions, baseline: Predictions, *, resamples: int = 10_000
) -> tuple[float, tuple[float, float]]:
    """The student's top-1 less the baseline's, with a 95 % interval over images.

    The same images are drawn for both (paired bootstrap, percentile interval, fixed seed), so
    what the two have in common cancels. Training again with another seed is not in the interval.

    Returns:
        The difference and the ends of its interval, as fractions in [−1, 1].
    """
    difference = student.correct.astype(np.int64) - baseline.correct.astype(np.int64)
    n = len(difference)
    # A resample of n values in {−1, 0, 1} is a multinomial draw of their counts.
    shares = np.array([(difference == value).mean() for value in (-1, 0, 1)])
    counts = np.random.default_rng(0).multinomial(n, shares, size=resamples)
    means = (counts[:, 2] - counts[:, 0]) / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), (float(low), float(high))

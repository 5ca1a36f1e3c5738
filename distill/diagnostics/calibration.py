"""Whether a network is right as often as it says it is, and what one temperature would mend.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from distill.diagnostics import UndefinedError
from distill.evaluate import BINS, bin_of, ece

COLDEST, HOTTEST = 1e-3, 1e3  # temperatures that are looked at
_EXACT = 1e-12  # relative step of the temperature at which the search ends


class TopLabel(NamedTuple):
    """How sure a network is of the class it predicts, and whether that is the label."""

    confidence: Float[np.ndarray, " N"]  # in [0, 1]
    correct: Bool[np.ndarray, " N"]


class Reliability(NamedTuple):
    """What a reliability diagram is drawn from, by bin. Means of an empty bin are NaN."""

    edges: Float[np.ndarray, " bins+1"]
    images: Int[np.ndarray, " bins"]  # how many
    confidence: Float[np.ndarray, " bins"]  # mean
    accuracy: Float[np.ndarray, " bins"]


class Fitted(NamedTuple):
    """The temperature that suits the answers best."""

    temperature: float  # T; above 1 the network is too sure
    nll: float  # mean at that temperature, in nats
    se: float  # standard error of T over images; NaN at a bound
    at_bound: bool  # the NLL still falls where the search ends: T is not a minimum


def log_probabilities(logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Log softmax in float64: z_k − log Σ_j exp z_j.

    Raises:
        UndefinedError: If a logit is not finite.
    """
    if broken := int((~np.isfinite(logits).all(axis=1)).sum()):
        raise UndefinedError(f"its answers to {broken:,} images are not finite numbers")
    exact = torch.from_numpy(logits.astype(np.float64))
    log_p: np.ndarray = exact.log_softmax(dim=-1).numpy()
    return log_p


def nll(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Negative log-likelihood of each image's label, −log p_y, in nats."""
    own: np.ndarray = -log_probabilities(logits)[np.arange(len(labels)), labels]
    return own


def brier(
    logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Brier score of each image: Σ_k (p_k − y_k)², where y is 1 at the label and else 0.

    The sum over all classes, as Brier wrote it, in [0, 2]; for two classes it is twice the score
    that looks at one of them, and scores divided by K are smaller too.
    Brier: Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    error = np.exp(log_probabilities(logits))
    error[np.arange(len(labels)), labels] -= 1
    score: np.ndarray = (error**2).sum(axis=1)
    return score


def top_label(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> TopLabel:
    """The largest probability of each image, and whether it is the label's.

    `ece(*top_label(logits / temperature, labels))` is the error at another temperature.
    """
    log_p = log_probabilities(logits)
    return TopLabel(np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == labels)


def reliability(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], *, bins: int = BINS
) -> Reliability:
    """Accuracy by confidence. Σ_b n_b / N · |accuracy_b − confidence_b| is the ECE.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: Whether that class is the label.
        bins: How many of equal width.
    """
    which = bin_of(confidence, bins)
    images = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, weights=w, minlength=bins) for w in (confidence, correct)]
    means = [np.where(images, total / np.maximum(images, 1), np.nan) for total in sums]
    return Reliability(np.linspace(0, 1, bins + 1), images, *means)


def adaptive_ece(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], *, bins: int = BINS
) -> float:
    """Calibration error over bins of equally many images.

    Σ_b n_b / N · |accuracy_b − confidence_b|.
    Nixon, Dusenberry, Jerfel, Nguyen, Liu, Zhang, Tran: Measuring Calibration in Deep Learning,
    2019, arXiv:1904.01685; the bins are those of Nguyen, O'Connor: Posterior Calibration and
    Exploratory Analysis for Natural Language Processing Models, 2015, arXiv:1508.05154. Of the
    predicted class alone, as `ece`: theirs is also averaged over classes.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: Whether that class is the label.
        bins: How many.

    Returns:
        A fraction in [0, 1].
    """
    gaps = adaptive_gaps(confidence, correct, bins=bins)
    return float(np.abs(gaps.mean(axis=0)).sum())


def adaptive_gaps(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], *, bins: int = BINS
) -> Float[np.ndarray, "N bins"]:
    """What each image adds to the gap of each bin, as `evaluate.gaps`, for `adaptive_ece`.

    The images are sorted by confidence and cut into bins whose sizes differ by one at most. Images
    of equal confidence count with the mean of their correctness, so that a cut between them gives
    the same whatever their order.
    """
    confidence = confidence.astype(np.float64)
    values, group, sizes = np.unique(confidence, return_inverse=True, return_counts=True)
    gap = (np.bincount(group, weights=correct) / sizes - values)[group]
    found = np.zeros((len(gap), bins))
    for b, part in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
        found[part, b] = gap[part]
    return found


def classwise_ece(
    logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " K"]:
    """Calibration error of each class's probability: Σ_b n_b / N · |share of class k_b − p_k,b|.

    Over all images, those of other classes too, in the bins of `ece`; the mean over classes is the
    class-wise ECE. With many classes nearly all probabilities are near 0, and so is the error.
    Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach: Beyond Temperature Scaling, 2019,
    arXiv:1910.12656.

    Returns:
        Fractions in [0, 1].
    """
    p = np.exp(log_probabilities(logits))
    return np.array([ece(p[:, k], labels == k) for k in range(p.shape[1])])


def fit_temperature(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> Fitted:
    """The temperature T that minimises the mean NLL of softmax(z / T).

    The NLL is convex in β = 1/T. Its slope there, the mean of E_p[z] − z_y, rises from one bound to
    the other; its root is found by Newton's steps in log β, halving the bracket where they stray or
    stall. Where the slope has no root in between, the answers are all right (colder is ever better)
    or no better than chance (hotter is), and T is the bound.
    Its standard error is the sandwich estimate, √Σ_i slope_i² / Σ_i Var_p[z] for β, which holds
    whether or not the scaled probabilities are the true ones.

    What is measured on the images it was fitted to looks too well calibrated; see `cross_scaled`.

    Args:
        logits: Of each image.
        labels: Of each image.

    Raises:
        UndefinedError: If there is no image, or the NLL is the same at every temperature.
    """
    if not len(labels):
        raise UndefinedError("there are no images to fit a temperature to")
    if (logits == logits[:, :1]).all():
        raise UndefinedError("it finds all classes equally likely, at every temperature")
    z = log_probabilities(logits)
    z -= z.max(axis=1, keepdims=True)
    own = z[np.arange(len(labels)), labels]

    def slopes(beta: float) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        weights = np.exp(beta * z)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = np.einsum("nk,nk->n", weights, z)
        variance = np.einsum("nk,nk->n", weights, (z - mean[:, None]) ** 2)
        return mean - own, variance

    for bound, sign in ((HOTTEST, 1), (COLDEST, -1)):
        if sign * slopes(1 / bound)[0].mean() >= 0:
            return Fitted(bound, float(nll(z / bound, labels).mean()), math.nan, True)
    low, high = -math.log(HOTTEST), -math.log(COLDEST)  # of log β
    at, moved = 0.0, high - low
    while moved > _EXACT:
        beta = math.exp(at)
        slope, curvature = (float(part.mean()) for part in slopes(beta))
        low, high = (low, at) if slope > 0 else (at, high)
        step = slope / (beta * curvature) if beta * curvature > 0 else math.inf
        trusted = low <= at - step <= high and abs(step) <= moved / 2
        before, at = at, at - step if trusted else (low + high) / 2
        moved = abs(at - before)
    beta = math.exp(at)
    each, variances = slopes(beta)
    se = float(np.sqrt((each**2).sum()) / variances.sum() / beta**2)  # of 1/β
    return Fitted(1 / beta, float(nll(z * beta, labels).mean()), se, False)


def cross_scaled(
    logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N K"]:
    """The logits, those of each half of the images over the temperature that fits the other half.

    The halves are the even and the odd positions, so that a split that is sorted by class gives
    both of them all classes. No image had a part in its own temperature: what is measured on these
    logits, such as `ece(*top_label(...))`, is what scaling gives on images not seen before. A half
    whose temperature is at a bound still scales the other.

    Raises:
        UndefinedError: As `fit_temperature`, of either half.
    """
    scaled = np.empty(logits.shape)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for half, other in ((even, odd), (odd, even)):
        scaled[half] = logits[half] / fit_temperature(logits[other], labels[other]).temperature
    return scaled

"""Accuracy on corrupted images: every subject sees the same ones.

Hendrycks, Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, arXiv:1903.12261.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from distill import evaluate
from distill.data import corruptions
from distill.data.corruptions import official
from distill.data.pixels import to_float
from distill.definitions import Number
from distill.engine import machine
from distill.engine.machine import Machine
from distill.engine.session import batches_of
from distill.errors import IncompatibleError
from distill.statistics import resampled
from distill.suites import Found, centred, interval, mean, nothing
from distill.suites.subjects import Subject, Tested, evenly, networks

_NOTHING = 1e-12  # of an error: what is left of it by rounding
CHUNK = 256  # images that are corrupted at once
GROUPS = {
    "mca": corruptions.COMMON,
    "mca_extra": corruptions.EXTRA,
    "mca_affine": corruptions.AFFINE,
    "mca_basic": corruptions.BASIC,
}
_NAMES = (*GROUPS, "mce", "relative_mce", "corrupted_nll", "corrupted_ece")


class Judged(NamedTuple):
    """What a network says of every image under every corruption and severity."""

    ids: Int[ndarray, " N"]
    correct: Bool[ndarray, "N C 5"]
    nll: Float[ndarray, "N C 5"]
    confidence: Float[ndarray, "N C 5"]
    clean: Bool[ndarray, " N"]  # whether it is right on the image as it is


def measure(
    subjects: Sequence[Subject],
    here: Machine,
    *,
    images: int,
    folder: Path | None = None,
    reference: str | None = None,
) -> dict[str, Found]:
    """Accuracy by corruption and severity, and its means.

    Args:
        subjects: Who is tested.
        here: Where.
        images: Of the test split, spread over it evenly; the same for all.
        folder: Official files, read for the corruptions that they hold.
        reference: The subject that errors are relative to; left out: the first run's student
            without teacher, else its teacher, else itself.

    Raises:
        IncompatibleError: If the official files are of other images.
    """
    names = (*corruptions.COMMON, *corruptions.EXTRA, *corruptions.AFFINE)
    judged = _judged(networks(subjects), names, here, images, folder)
    read = official.available(folder) if folder else ()
    first = subjects[0]
    name = reference or first.control or first.teacher or first.name
    other = next(one for one in subjects if one.name == name)
    known = [judged.get(one.key) for one in other.members]
    theirs = [one for one in known if one is not None]
    found = {}
    for subject in subjects:
        if any(one.key not in judged for one in subject.members):
            found[subject.name] = nothing("a cache says nothing of other images", *_NAMES)
            continue
        own = [judged[one.key] for one in subject.members]
        numbers = {
            name: mean([_mean(one.correct, names, group) for one in own])
            for name, group in GROUPS.items()
        }
        common = [names.index(name) for name in corruptions.COMMON]
        numbers |= _relative(own, theirs, common)
        numbers["corrupted_nll"] = mean([one.nll[:, common].mean(axis=(1, 2)) for one in own])
        numbers["corrupted_ece"] = _ece(own, common)
        accuracy = np.mean([one.correct.mean(axis=0) for one in own], axis=0)
        table: dict[str, Any] = {
            "images": len(own[0].ids),
            "clean": float(np.mean([one.clean.mean() for one in own])),
            "accuracy": {name: accuracy[i].tolist() for i, name in enumerate(names)},
            "reference": name if theirs else None,
            "official": list(read),
            "approximated": {
                name: why for name, why in corruptions.APPROXIMATED.items() if name not in read
            },
        }
        per_image = {"mca": [_mean(one.correct, names, corruptions.COMMON) for one in own]}
        found[subject.name] = Found(numbers, {"corruptions": table}, {}, per_image)
    return found


def _judged(
    tested: Sequence[Tested],
    names: Sequence[str],
    here: Machine,
    images: int,
    folder: Path | None,
) -> dict[str, Judged]:
    """By network; those that are shown the same images are shown them once."""
    alike: dict[tuple[int, float], list[Tested]] = {}
    for one in tested:
        alike.setdefault(one.view, []).append(one)
    found: dict[str, Judged] = {}
    for group in alike.values():
        rows = list(_rows(group, names, here, images, folder))
        for i, one in enumerate(group):
            columns = [np.concatenate(column) for column in zip(*(r[i] for r in rows), strict=True)]
            found[one.key] = Judged(*evaluate.together(columns))
    return found


def _rows(
    group: Sequence[Tested],
    names: Sequence[str],
    here: Machine,
    images: int,
    folder: Path | None,
) -> Iterator[list[Judged]]:
    """What each network of the group says of some images after others."""
    first = group[0]
    dataset, recipe = first.dataset, first.recipe
    ids = evenly(len(dataset.test), images)
    theirs = official.available(folder) if folder else ()
    if folder and theirs:
        official.require(folder, dataset.test.labels)
        if (dataset.image_size, recipe.data.eval_crop) != (32, 1.0):
            raise IncompatibleError(
                f"{folder}: holds images of 32 px, the runs see {dataset.image_size} px",
                hint="leave --corrupted out: the corruptions are then made of the runs' own images",
            )
    for chunk in _chunks(batches_of(dataset.test, ids, recipe, dataset, here)):
        sizes = [len(part) for part, _, _ in chunk]
        clean, labels, chosen = (torch.cat(column) for column in zip(*chunk, strict=True))
        kept: list[list[list[Tensor]]] = [[] for _ in group]
        for name in (None, *names):
            for severity in corruptions.SEVERITIES if name else (1,):
                shown = clean
                if name in theirs and folder and name:
                    rows = official.read(folder, name, severity)[chosen.cpu().numpy()]
                    pixels = torch.from_numpy(np.ascontiguousarray(rows)).to(here.device)
                    shown = to_float(pixels.permute(0, 3, 1, 2))
                elif name:
                    shown = corruptions.corrupt(clean, chosen, name, severity)
                for said, one in zip(kept, group, strict=True):
                    said.append(_judge(one, shown, labels, sizes, here))
        yield [_together(chosen, said, len(names)) for said in kept]


def _chunks(
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Batches together, as many as are corrupted at once; each stays the batch it is."""
    chunk: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        chunk.append(batch)
        if sum(len(images) for images, _, _ in chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _judge(
    one: Tested, images: Tensor, labels: Tensor, sizes: list[int], here: Machine
) -> list[Tensor]:
    """Correct, nll and confidence of every image, in the batches that they came in."""
    assert one.network is not None
    with torch.no_grad(), machine.autocast(one.recipe.train.precision, here.device):
        logits = [one.network(part).logits.float() for part in torch.split(images, sizes)]
    predicted, confidence, nll, _ = evaluate.judge(torch.cat(logits), labels)
    return [predicted == labels.to(predicted.device), nll, confidence]


def _together(ids: Tensor, said: list[list[Tensor]], corrupted: int) -> Judged:
    """The images as they are come first."""
    correct, nll, confidence = (
        torch.stack(column, dim=1).cpu().numpy() for column in zip(*said, strict=True)
    )
    shape = (len(ids), corrupted, len(corruptions.SEVERITIES))
    return Judged(
        ids.cpu().numpy(),
        correct[:, 1:].reshape(shape),
        nll[:, 1:].reshape(shape),
        confidence[:, 1:].reshape(shape),
        correct[:, 0],
    )


def _mean(
    correct: Bool[ndarray, "N C 5"], names: Sequence[str], group: Sequence[str]
) -> Float[ndarray, " N"]:
    found: ndarray = correct[:, [names.index(name) for name in group]].mean(axis=(1, 2))
    return found


def _relative(own: list[Judged], theirs: list[Judged], common: list[int]) -> dict[str, Number]:
    """The mean corruption error and the relative one."""
    if not theirs:
        reason = "there is no reference to divide by"
        return {name: Number(None, reason=reason) for name in ("mce", "relative_mce")}
    theirs = theirs if len(theirs) == len(own) else [theirs[0]] * len(own)
    errors = [_errors(side, common) for side in (own, theirs)]
    rows = [row for side in errors for row in side]
    each = len(common) + 1  # the last is that on images as they are

    def mce(parts: ndarray) -> ndarray:
        return _quotients(parts[: each - 1], parts[each:-1])

    def relative(parts: ndarray) -> ndarray:
        return _quotients(parts[: each - 1] - parts[each - 1], parts[each:-1] - parts[-1])

    found = {}
    n, seeds = rows[0].shape[1], len(own)
    for name, of in (("mce", mce), ("relative_mce", relative)):
        value = float(of(np.stack([row.mean(axis=1, keepdims=True) for row in rows])).mean())
        if math.isnan(value):
            reason = "the reference loses nothing to one of the corruptions"
            found[name] = Number(None, n=n, seeds=seeds, reason=reason)
        else:
            found[name] = interval(value, resampled(rows, of), n=n, seeds=seeds)
    return found


def _quotients(ours: ndarray, reference: ndarray) -> ndarray:
    """The mean over corruptions; NaN where the reference loses nothing to one of them."""
    lost = np.where(reference > _NOTHING, reference, np.nan)
    found: ndarray = (ours / lost).mean(axis=0)
    return found


def _errors(side: list[Judged], common: list[int]) -> list[Float[ndarray, "S N"]]:
    """Of every corruption the errors by seed and image, and last those on images as they are."""
    wrong = [1 - np.stack([one.correct[:, i].mean(axis=1) for one in side]) for i in common]
    return [*wrong, 1.0 - np.stack([one.clean for one in side])]


def _ece(own: list[Judged], common: list[int]) -> Number:
    """The mean of the calibration errors of all corruptions and severities."""
    flat = [(one.confidence[:, common], one.correct[:, common]) for one in own]
    shape = flat[0][0].shape
    cells = shape[1] * shape[2]
    rows = []
    for confidence, correct in flat:
        gaps = evaluate.gaps(confidence.reshape(len(confidence), -1), correct.reshape(shape[0], -1))
        rows.append(gaps.reshape(len(gaps), -1).T)
    by_bin = [np.stack([seed[k] for seed in rows]) for k in range(len(rows[0]))]

    def of(parts: ndarray) -> ndarray:
        found: ndarray = np.abs(parts).sum(axis=0) / cells
        return found

    value = float(of(np.stack([row.mean(axis=1, keepdims=True) for row in by_bin])).mean())
    return centred(value, resampled(by_bin, of), n=shape[0], seeds=len(own))

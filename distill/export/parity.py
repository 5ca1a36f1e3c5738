"""Whether an exported file says what the student says, on real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from distill import evaluate
from distill.diagnostics.tapped import tapped
from distill.errors import VerificationError
from distill.export.program import STAGE, Logits, Pixels, Precision, Stage, reason
from distill.models.network import Network

BATCHES = (1, 2, 7)  # sizes in which the first images are shown
FIRST = 64  # images that are shown in batches of every size
MAPPED = 16  # of these, the ones whose maps are compared: a map can have a million values
MOST = {"fp32": 1e-4, "fp16": 5e-3}  # of the difference of a logit, times the scale of logits
USUAL = {"fp32": 10.0, "fp16": 1.0}  # largest logit up to which that scale is 1
_FILES_AGREE = 0.95
_BATCH = 32  # images at once where only accuracy is asked for

Answer = Callable[[Sequence[np.ndarray]], list[Logits]]  # to what the file takes
T = TypeVar("T")
Map = Float[np.ndarray, "b C h w"]


class Known(NamedTuple):
    """Test images, and what the student says of them in PyTorch."""

    pixels: Pixels
    labels: Int[np.ndarray, " N"]
    logits: Float[np.ndarray, "N K"]
    maps: tuple[Map, ...] = ()  # of the first images, by stage


class Parity(NamedTuple):
    """How an exported file's answers compare with the student's. Rates are fractions in [0, 1]."""

    images: int  # in batches of every size
    batches: tuple[int, ...]
    max_abs: float  # largest difference of a logit, over all that was asked
    agreement: float  # same predicted class
    accuracy: float
    student_accuracy: float
    accuracy_images: int
    drop: float  # of accuracy
    drop_ci95: tuple[float, float]  # paired bootstrap over the images

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._asdict().items()}


def known(
    network: Network, pixels: Pixels, labels: Int[np.ndarray, " N"], stages: Sequence[Stage] = ()
) -> Known:
    """What the student says of these images, on the CPU in float32."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / torch.tensor(255.0)
    maps: list[Map] = []
    with torch.no_grad():
        logits = torch.cat([network(part).logits for part in torch.split(images, _BATCH)])
        if taps := [stage.module for stage in stages]:
            told = tapped(network, taps)(images[:MAPPED])
            maps = [told.read(tap).numpy() for tap in taps]
    return Known(pixels, labels, logits.numpy(), tuple(maps))


def compare(answer: Answer, show: Callable[[Pixels], np.ndarray], student: Known) -> Parity:
    """Ask for all images at once and for the first in small batches, and compare the answers.

    Args:
        answer: The exported file's runtime.
        show: Brings pixels into what it takes.
        student: What it ought to say.

    Raises:
        VerificationError: If its runtime fails, or answers in another shape or with no numbers.
    """
    first = student.pixels[:FIRST]
    cuts = [(first, size) for size in BATCHES] + [(student.pixels, _BATCH)]
    asked = [_cut(pixels, size) for pixels, size in cuts]
    told = iter(_ran(answer, [show(batch) for batches in asked for batch in batches]))
    found = [np.concatenate([next(told) for _ in batches]) for batches in asked]
    for logits in found:
        if logits.shape[1:] != student.logits.shape[1:] or not np.isfinite(logits).all():
            raise VerificationError(
                f"it answers {logits.shape[1:]} values an image, or some that are not finite"
            )
    differences = [abs(logits - student.logits[: len(logits)]).max() for logits in found]
    same = [
        logits.argmax(axis=1) == student.logits[: len(logits)].argmax(axis=1) for logits in found
    ]
    own, exported = (evaluate.of_logits(x, student.labels) for x in (student.logits, found[-1]))
    drop, interval = evaluate.paired_gain(own, exported)
    return Parity(
        images=len(first),
        batches=BATCHES,
        max_abs=float(max(differences)),
        agreement=float(np.concatenate(same).mean()),
        accuracy=float(exported.correct.mean()),
        student_accuracy=float(own.correct.mean()),
        accuracy_images=len(student.labels),
        drop=drop,
        drop_ci95=interval,
    )


def compare_maps(
    told: Callable[[Sequence[np.ndarray]], list[list[np.ndarray]]],
    show: Callable[[Pixels], np.ndarray],
    student: Known,
    precision: Precision,
) -> list[float]:
    """Ask for the maps of the first images, in batches of every size.

    They may differ from the student's by as much as `require` lets logits.

    Args:
        told: The exported file's runtime, which gives the map of each stage of each batch.
        show: Brings pixels into what it takes.
        student: What it ought to give.
        precision: The file's.

    Returns:
        The largest difference of a value, by stage.

    Raises:
        VerificationError: If its runtime fails, or gives something else.
    """
    count = len(student.maps[0])
    cuts = [_cut(student.pixels[:count], size) for size in BATCHES]
    answers = iter(_ran(told, [show(batch) for batches in cuts for batch in batches]))
    largest = [0.0] * len(student.maps)
    for batches in cuts:
        columns = zip(*[next(answers) for _ in batches], strict=True)
        for i, (parts, own) in enumerate(zip(columns, student.maps, strict=True)):
            found = np.concatenate(parts)
            if found.shape != own.shape or not np.isfinite(found).all():
                raise VerificationError(
                    f"{STAGE}{i} has the shape {found.shape}, the student's {own.shape}, or holds "
                    "values that are not finite"
                )
            largest[i] = max(largest[i], float(abs(found - own).max()))
    for i, (difference, own) in enumerate(zip(largest, student.maps, strict=True)):
        _require_near(f"the values of {STAGE}{i}", difference, precision, float(abs(own).max()))
    return largest


class Files(NamedTuple):
    """How a graph answers whole picture files, against the student on their evaluation view."""

    images: int
    max_abs: float  # largest difference of a logit
    agreement: float  # same predicted class


def compare_files(
    answer: Answer,
    pictures: Sequence[UInt8[np.ndarray, "H W 3"]],
    logits: Float[np.ndarray, "n K"],
) -> Files:
    """Ask for pictures as their files hold them, one at a time: the graph has to resize them.

    Raises:
        VerificationError: If more than one in twenty is named otherwise. A pixel that is rounded to
            the next level may turn a tie, a wrong way of resizing turns many.
    """
    told = np.concatenate(_ran(answer, [picture[None] for picture in pictures]))
    agreement = float((told.argmax(axis=1) == logits.argmax(axis=1)).mean())
    if agreement < _FILES_AGREE:
        raise VerificationError(
            f"of {len(pictures)} picture files it names {agreement:.0%} as the student does"
        )
    return Files(len(pictures), float(abs(told - logits).max()), agreement)


def require(parity: Parity, precision: Precision, student: Known, *, max_drop: float) -> None:
    """Refuse a file that does not say the same.

    In float32 every predicted class must be the student's, and no logit may differ by more than
    1e-4, or 1e-5 of the largest: beyond ten that is what PyTorch's own answers differ by from one
    batch size to another. In float16 none may by more than 5e-3 of the largest. What rounding does
    to the classes is bounded by the drop of accuracy.

    Args:
        parity: How it compares.
        precision: The file's.
        student: What it was compared with.
        max_drop: Accuracy that may be lost to rounding, as a fraction.

    Raises:
        VerificationError: With what differs and by how much.
    """
    if precision != "int8":
        largest = float(abs(student.logits).max())
        _require_near("its logits", parity.max_abs, precision, largest)
    if precision == "fp32" and parity.agreement < 1:
        raise VerificationError(
            f"it names the student's class for {parity.agreement:.2%} of the images, not for all"
        )
    if parity.drop > max_drop:
        low, high = parity.drop_ci95
        raise VerificationError(
            f"it is right on {parity.accuracy:.2%} of {parity.accuracy_images:,} test images, the "
            f"student on {parity.student_accuracy:.2%}: {100 * parity.drop:.2f} points less "
            f"({100 * low:.2f} to {100 * high:.2f}), and --max-drop is {100 * max_drop:g}"
        )


def _require_near(what: str, difference: float, precision: Precision, largest: float) -> None:
    allowed = MOST[precision] * max(1.0, largest / USUAL[precision])
    if difference > allowed:
        raise VerificationError(
            f"{what} differ from the student's by up to {difference:.1e}; allowed are "
            f"{allowed:.1e}, the largest being {largest:.3g}"
        )


def _ran(answer: Callable[[Sequence[np.ndarray]], list[T]], batches: list[np.ndarray]) -> list[T]:
    try:
        return answer(batches)
    except VerificationError:
        raise
    except Exception as error:  # a runtime that cannot run what its exporter wrote
        raise VerificationError(f"its runtime cannot run it: {reason(error)}") from error


def _cut(pixels: Pixels, size: int) -> list[Pixels]:
    return [pixels[i : i + size] for i in range(0, len(pixels), size)]

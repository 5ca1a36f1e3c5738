"""What features know of foreground and background, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import folder
from distill.data import masks as drawn
from distill.definitions import Number
from distill.diagnostics import UndefinedError
from distill.diagnostics.dense import mean_iou, probe
from distill.engine.canaries import numerics
from distill.engine.machine import Machine
from distill.errors import IncompatibleError
from distill.models.network import Network
from distill.statistics import resampled
from distill.suites import Found, Image, as_bytes, interval, nothing, png
from distill.suites.subjects import Sample, Subject, Tested, sample

IMAGES = 512  # half of them are fitted to
SHOWN = 8
_NAMES = ("dense_iou", "dense_iou_pixels", "dense_accuracy")
_TINT = (230, 159, 0)  # of what is said to be foreground
MADE = (
    "No masks were given (--masks): foreground is what Otsu's threshold parts from the plain "
    "background: a stand-in made of how light each pixel is, which the probe on pixels sees too."
)


def measure(subjects: Sequence[Subject], here: Machine, *, masks: Path | None) -> dict[str, Found]:
    """A probe on the frozen features of each, on the same images and masks.

    Raises:
        IncompatibleError: If masks are given, and the images are no files.
        PreflightError: If masks are missing or are no masks.
    """
    found: dict[str, Found] = {}
    pairs: dict[tuple[int, float], tuple[Sample, Tensor | None]] = {}
    for subject in subjects:
        tested = subject.first
        if tested.view not in pairs:
            images = sample(tested, here, IMAGES)
            own = _given(tested, images, masks) if masks else drawn.automatic(images.images.cpu())
            pairs[tested.view] = images, own
        shown, known = pairs[tested.view]
        try:
            if known is None:
                raise UndefinedError("no masks were given, and the images have no plain background")
            with numerics("fp32", here.device):
                found[subject.name] = _probed(tested, shown, known.to(here.device), masks)
        except UndefinedError as error:
            found[subject.name] = nothing(str(error), *_NAMES)
    return found


def _given(tested: Tested, shown: Sample, masks: Path) -> Tensor:
    """The user's masks of these images."""
    data = tested.recipe.data
    if data.name != "folder":
        raise IncompatibleError(
            f"--masks {masks}: masks have the names of image files, and {data.name} has none",
            hint="leave --masks out, or evaluate a run on a folder of images",
        )
    root = Path(str(data.root)).expanduser().absolute()
    entries = folder.scan(root, data.split_file).test
    return drawn.load(
        masks,
        [entries[i].name for i in shown.ids.tolist()],
        size=tested.dataset.image_size,
        crop=data.eval_crop,
        max_pixels=data.max_pixels,
        images=root,
    )


def _probed(tested: Tested, shown: Sample, known: Tensor, masks: Path | None) -> Found:
    if not isinstance(tested.network, Network):
        raise UndefinedError("it is not one network")
    found = probe(tested.network, shown.images, known)
    numbers = {
        "dense_iou": _number(found.features, mean_iou),
        "dense_iou_pixels": _number(found.pixels, mean_iou),
        "dense_accuracy": _number(found.features, lambda right: right.sum(dim=-1)),
    }
    trivial = [float(mean_iou(one.mean(dim=0))) for one in (found.background, found.foreground)]
    pictures = [
        Image(_tinted(shown.images[i], said), (f"image {int(shown.ids[i])}",))
        for i, said in zip(found.held[:SHOWN].tolist(), found.said, strict=False)
    ]
    table = {
        "masks": MADE if masks is None else f"Masks from {masks}.",
        "site": found.site.name,
        "grid": list(found.site.grid),
        "ridge": found.ridge,
        "trivial": max(trivial),
    }
    return Found(numbers, table, {"dense": pictures})


def _number(right: Tensor, of: Callable[[Tensor], Tensor]) -> Number:
    """Of all images together, from what is right in each."""
    rows = [column[None] for column in right.T.numpy()]

    def statistic(means: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(np.moveaxis(means, 0, -1)))
        found: np.ndarray = of(parts).numpy()
        return found

    value = float(of(right.mean(dim=0)))
    return interval(value, resampled(rows, statistic), n=len(right), seeds=1)


def _tinted(image: Tensor, said: Tensor) -> bytes:
    """The image, with what is said to be foreground in colour."""
    pixels = as_bytes(image)
    covered = np.where(said.numpy()[..., None], 0.5 * pixels + 0.5 * np.array(_TINT), 0.5 * pixels)
    return png(covered.round().astype(np.uint8))

"""Views of the training images: from their numbers to pixels on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from distill import recipe
from distill.data import augment, mixing, views
from distill.data.augment import Stage
from distill.data.augment._augmentation import Plan, to_device
from distill.data.augment._canvas import Canvas
from distill.data.augment.crop import Crop
from distill.data.augment.flip import Flip
from distill.data.augment.resized_crop import ResizedCrop
from distill.data.on_device import DeviceDecoder
from distill.data.workers import Decoder, Files
from distill.types import Batch

if TYPE_CHECKING:
    from distill.data.datasets import Dataset

# Samples that are drawn at once: enough that numpy's cost per call vanishes, few enough that an
# epoch begins without a wait.
CHUNK = 65_536

_MIXING = 0  # stream of random numbers; the augmentations have 1, 2, … in their order


class Views:
    """Any views of the training images, as batches on the device.

    The pixels of a row follow from its sample and its view's number, and from its neighbour's
    where pairs are mixed: never from the rest of the batch.

    Attributes:
        mixes: Whether rows 2j and 2j + 1 of a batch are mixed with each other.

    Args:
        dataset: Its `train_ids` are read.
        data: Decides the views.
        device: Where images are augmented and delivered; images in memory are copied there whole.
        workers: Processes that decode files; 0 decodes in this one. Images in memory need none.
        audience: For whom the images are. A teacher sees them before what is done for the student
            alone; for both, a batch has the two where they differ.

    Raises:
        RecipeError: If an augmentation is unknown or its arguments are wrong.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: recipe.Data,
        *,
        device: torch.device,
        workers: int = 0,
        audience: Literal["student", "teacher", "both"] = "student",
    ) -> None:
        self.mixes = data.mixup > 0 or data.cutmix > 0
        self._dataset, self._data, self._device = dataset, data, device
        self._labelled = dataset.labelled
        stages = augment.build(data.augment, seed=data.seed)
        own = [stage for stage in stages if stage.augmentation.student_only]
        shared = stages[: len(stages) - len(own)]
        self._pixels: _Memory | _Files
        if dataset.train.pixels is None:
            self._pixels = _Files(dataset, data, shared, device, workers)
        else:
            self._pixels = _Memory(dataset, shared, device)
        self._own = own if audience != "teacher" else []
        self._both = audience == "both" and bool(own)

    def batches(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"], *, batch_size: int
    ) -> Iterator[Batch]:
        """The views `numbers` of the samples at `positions` among those trained on, in this order.

        Where pairs are mixed, rows 2j and 2j + 1 are a pair of one view, its first sample first.

        Args:
            positions: Of samples in `train_ids`.
            numbers: Of a view of each.
            batch_size: Rows a batch; the last may have fewer.

        Raises:
            PreflightError: If a file is no usable image, or a worker was killed.
        """
        pixels = self._pixels.batches(positions, numbers, batch_size)
        size = max(1, CHUNK // batch_size) * batch_size
        for first in range(0, len(positions), size):
            chunk = slice(first, first + size)
            drawn = self._draw(positions[chunk], numbers[chunk], batch_size)
            for number, samples in enumerate(drawn.samples):
                rows = slice(number * batch_size, (number + 1) * batch_size)
                yield self._batch(next(pixels), drawn, samples, rows)

    def single(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"], *, batch_size: int
    ) -> Iterator[tuple[Batch, Int[ndarray, " b"]]]:
        """These views in any order, whoever they are mixed with.

        A sample's views come one after the other, so that its file is decoded once for them all.

        Args:
            positions: Of samples in `train_ids`.
            numbers: Of a view of each; no pair of both stands twice.
            batch_size: Most rows a batch.

        Returns:
            Batches, and which of the asked views their rows are.

        Raises:
            PreflightError: If a file is no usable image, or a worker was killed.
        """
        if not self.mixes:
            which = np.lexsort((numbers, positions))
            rows, views_of = positions[which], numbers[which]
        else:
            rows, views_of, which = self._with_partners(positions, numbers)
        first = 0
        for batch in self.batches(rows, views_of, batch_size=batch_size + batch_size % 2):
            here = which[first : first + len(batch.ids)]
            first += len(here)
            wanted = np.flatnonzero(here >= 0)
            if len(wanted) < len(here):
                batch = batch.rows(to_device({"rows": wanted}, self._device).device["rows"])
            if len(wanted):
                yield batch, here[wanted]

    def close(self) -> None:
        """End the worker processes."""
        self._pixels.close()

    def _with_partners(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"]
    ) -> tuple[Int[ndarray, " m"], Int[ndarray, " m"], Int[ndarray, " m"]]:
        """Positions and views in pairs, and which was asked for; −1 for one that comes along."""
        n, seed = len(self._dataset.train_ids), self._data.seed
        found = []
        for view in np.unique(numbers):
            asked = np.flatnonzero(numbers == view)
            pairs, places = views.pairs(positions[asked], n, data_seed=seed, view=int(view))
            which = np.full(pairs.size, -1)
            which[places] = asked
            # Pairs that were asked for the same sample's sake come together.
            key = np.full(len(pairs), n)
            np.minimum.at(key, places // 2, positions[asked])
            found.append((key, pairs, np.full(pairs.shape, view), which.reshape(-1, 2)))
        key, pairs, numbers, which = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(key, kind="stable")
        return pairs[order].ravel(), numbers[order].ravel(), which[order].ravel()

    def _draw(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"], batch_size: int
    ) -> _Drawn:
        """All that some batches need beside their pixels, in one go."""
        ids = self._dataset.train_ids[positions]
        size = self._dataset.image_size
        labels = self._dataset.train.labels[ids, None]
        # A copy: it may be one number for all, which torch does not take.
        samples = {"ids": ids, "labels": labels, "views": np.array(numbers)}
        plans = [
            to_device(stage.plan(ids, numbers, size=size), self._device)
            for stage in (*self._pixels.stages, *self._own)
        ]
        pairs = None
        if self.mixes:
            # A pair is known by its first sample, the same whichever epoch reads the view.
            draws = views.uniform(
                self._data.seed, ids[::2], numbers[::2], stream=_MIXING, num=mixing.NUM_DRAWS
            )
            alphas = {"mixup": self._data.mixup, "cutmix": self._data.cutmix}
            pairs = to_device(mixing.plan(draws, **alphas, height=size, width=size), self._device)
        columns = to_device(samples, self._device).device
        steps = zip(*(torch.split(x, batch_size) for x in columns.values()), strict=True)
        return _Drawn(list(steps), plans, pairs)

    def _batch(
        self,
        pixels: UInt8[Tensor, "b 3 S S"],
        drawn: _Drawn,
        samples: tuple[Tensor, ...],
        rows: slice,
    ) -> Batch:
        shared = len(self._pixels.stages)
        halves = slice(rows.start // 2, rows.stop // 2)
        pairs = drawn.pairs.rows(halves).device if drawn.pairs else {}
        for stage, plan in zip(self._pixels.stages, drawn.plans[:shared], strict=True):
            pixels = stage.augmentation.apply(pixels, plan.rows(rows))
        shown = _mixed(pixels, pairs) if self._both else None
        for stage, plan in zip(self._own, drawn.plans[shared:], strict=True):
            pixels = stage.augmentation.apply(pixels, plan.rows(rows))
        ids, classes, numbers = samples
        labels = torch.zeros(len(ids), len(self._dataset.classes), device=self._device)
        if self._labelled:
            labels.scatter_(1, classes, 1.0)
            if pairs:
                labels = mixing.blend(labels, pairs["share"])
        return Batch(_mixed(pixels, pairs), labels, ids, numbers, shown)


class _Drawn(NamedTuple):
    """What was drawn for some batches."""

    samples: list[tuple[Tensor, ...]]  # ids, labels (B, 1) and views of each batch
    plans: list[Plan]  # one a stage
    pairs: Plan | None


class _Memory:
    """Training images held on the device; a crop and a flip that come first cost one copy.

    Attributes:
        stages: The augmentations that are still to be applied to what `batches` gives.
    """

    def __init__(self, dataset: Dataset, stages: list[Stage], device: torch.device) -> None:
        assert dataset.train.pixels is not None
        self._ids, self._size, self._device = dataset.train_ids, dataset.image_size, device
        self.stages = list(stages)
        self._crop, self._flip = self._take(Crop), self._take(Flip)
        padding = 0
        if self._crop:
            assert isinstance(self._crop.augmentation, Crop)
            padding = self._crop.augmentation.padding(self._size)
        images = torch.from_numpy(dataset.train.pixels[self._ids]).to(device)
        self._canvas = Canvas(images, padding=padding, mirrored=self._flip is not None)

    def batches(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"], batch_size: int
    ) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
        size = max(1, CHUNK // batch_size) * batch_size
        for first in range(0, len(positions), size):
            chunk = slice(first, first + size)
            offsets = self._offsets(positions[chunk], numbers[chunk])
            placed = to_device({"offsets": offsets}, self._device).device["offsets"]
            for row in torch.split(placed, batch_size):
                yield self._canvas.windows(row).expand(-1, 3, -1, -1)

    def close(self) -> None:
        """Nothing to end."""

    def _take(self, kind: type) -> Stage | None:
        found = self.stages and isinstance(self.stages[0].augmentation, kind)
        return self.stages.pop(0) if found else None

    def _offsets(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"]
    ) -> Int[ndarray, " n"]:
        ids = self._ids[positions]
        top: int | ndarray = 0
        left: int | ndarray = 0
        flip: int | ndarray = 0
        if self._crop:
            corner = self._crop.plan(ids, numbers, size=self._size)
            top, left = corner["top"], corner["left"]
        if self._flip:
            flip = self._flip.plan(ids, numbers, size=self._size)["flip"].astype(np.int64)
            left = np.where(flip, 2 * self._canvas.padding - left, left)
        return self._canvas.offsets(positions, top, left, flip)


class _Files:
    """Training images in files; a resized crop that comes first is made while decoding.

    Attributes:
        stages: The augmentations that are still to be applied to what `batches` gives.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: recipe.Data,
        stages: list[Stage],
        device: torch.device,
        workers: int,
    ) -> None:
        assert dataset.train.files is not None
        cuts = bool(stages) and isinstance(stages[0].augmentation, ResizedCrop)
        self.stages = stages[1:] if cuts else stages
        self._ids = dataset.train_ids
        decoder = Decoder(
            dataset.train.files,
            size=dataset.image_size,
            crop=data.eval_crop,
            cut=stages[0] if cuts else None,
            fast=data.decoder == "fast",
            max_pixels=dataset.max_pixels,
        )
        on_device = cuts and data.decoder == "gpu"
        self._files = Files(
            dataset.train.files,
            DeviceDecoder(decoder, device) if on_device else decoder,
            device=device,
            workers=workers,
        )

    def batches(
        self, positions: Int[ndarray, " n"], numbers: Int[ndarray, " n"], batch_size: int
    ) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
        rows = [slice(at, at + batch_size) for at in range(0, len(positions), batch_size)]
        return self._files.batches(
            (self._ids[positions[batch]] for batch in rows), (numbers[batch] for batch in rows)
        )

    def close(self) -> None:
        """End the worker processes."""
        self._files.close()


def to_float(pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """The images in [0, 1]: value / 255 rounded to float32, the same on every device."""
    # CUDA would multiply by the rounded reciprocal of a number given as a scalar.
    return pixels / _full_scale(pixels.device)


def _mixed(pixels: UInt8[Tensor, "B 3 S S"], pairs: dict[str, Tensor]) -> Float[Tensor, "B 3 S S"]:
    if "box" in pairs:
        pixels = mixing.cut(pixels, pairs["box"])
    images = to_float(pixels)
    return mixing.blend(images, pairs["weight"]) if "weight" in pairs else images


@cache
def _full_scale(device: torch.device) -> Float[Tensor, ""]:
    return torch.full((), 255.0, device=device)

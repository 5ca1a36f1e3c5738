"""Batches: which samples, in what order, and their pixels on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

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
from distill.data.workers import Files
from distill.errors import IncompatibleError
from distill.types import Batch

if TYPE_CHECKING:
    from distill.data.datasets import Dataset, Source

# Samples that are drawn at once: enough that numpy's cost per call vanishes, few enough that an
# epoch begins without a wait.
_CHUNK = 65_536

_MIXING = 0  # stream of random numbers; the augmentations have 1, 2, … in their order


class Loader:
    """Batches of one training run, in an order that depends on nothing but the seeds.

    The samples and pixels of a global batch are the same for any number of ranks and workers, and
    for any batch at which an epoch begins. An epoch leaves out the samples that fill no batch,
    another rest each time.

    Attributes:
        steps_per_epoch: Batches an epoch.

    Args:
        dataset: Its `train_ids` are read.
        data: Decides the views.
        batch_size: Images a step over all ranks.
        train_seed: Decides the order.
        device: Where images are augmented and delivered; images in memory are copied there whole.
        rank: Which part of every batch is read.
        world: Number of parts.
        workers: Processes that decode files; 0 decodes in this one. Images in memory need none.

    Raises:
        IncompatibleError: If the batch is larger than the training set, or cannot be divided.
        RecipeError: If an augmentation is unknown or its arguments are wrong.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: recipe.Data,
        *,
        batch_size: int,
        train_seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self._mixes = data.mixup > 0 or data.cutmix > 0
        _check_batch(batch_size, len(dataset.train_ids), world, even=self._mixes)
        self.steps_per_epoch = len(dataset.train_ids) // batch_size
        self._dataset, self._data = dataset, data
        self._train_seed, self._device = train_seed, device
        self._rank, self._world, self._rows = rank, world, batch_size // world
        stages = augment.build(data.augment, seed=data.seed)
        self._pixels: _Memory | _Files
        if dataset.train.pixels is None:
            self._pixels = _Files(dataset, data, stages, device, workers)
        else:
            self._pixels = _Memory(dataset, stages, device)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's rows of the epoch's batches from batch `start` on, in view number `epoch`.

        Raises:
            PreflightError: If a file is no usable image, or a worker was killed.
        """
        order = views.epoch_order(
            len(self._dataset.train_ids),
            data_seed=self._data.seed,
            train_seed=self._train_seed,
            epoch=epoch,
            view=epoch,
        )
        shape = (self.steps_per_epoch, self._world, self._rows)
        positions = order[: np.prod(shape)].reshape(shape)[start:, self._rank]
        pixels = self._pixels.batches(positions, epoch)
        for chunk in _chunks(positions):
            drawn = self._draw(chunk, epoch)
            for step in range(len(chunk)):
                yield self._batch(next(pixels), drawn, step)

    def close(self) -> None:
        """End the worker processes."""
        self._pixels.close()

    def _draw(self, positions: Int[ndarray, "steps b"], view: int) -> _Drawn:
        """All that some steps need beside their pixels, in one go."""
        ids = self._dataset.train_ids[positions.ravel()]
        size = self._dataset.image_size
        samples = {
            "ids": ids,
            "labels": self._dataset.train.labels[ids, None],
            "views": np.full(len(ids), view),
        }
        plans = [
            to_device(stage.plan(ids, view, size=size), self._device)
            for stage in self._pixels.stages
        ]
        pairs = None
        if self._mixes:
            # A pair is known by its first sample, the same whichever epoch reads the view.
            draws = views.uniform(
                self._data.seed, ids[::2], view, stream=_MIXING, num=mixing.NUM_DRAWS
            )
            alphas = {"mixup": self._data.mixup, "cutmix": self._data.cutmix}
            pairs = to_device(mixing.plan(draws, **alphas, height=size, width=size), self._device)
        columns = to_device(samples, self._device).device
        steps = zip(*(torch.split(x, self._rows) for x in columns.values()), strict=True)
        return _Drawn(list(steps), plans, pairs)

    def _batch(self, pixels: UInt8[Tensor, "b 3 S S"], drawn: _Drawn, step: int) -> Batch:
        rows = slice(step * self._rows, (step + 1) * self._rows)
        for stage, plan in zip(self._pixels.stages, drawn.plans, strict=True):
            pixels = stage.augmentation.apply(pixels, plan.rows(rows))
        halves = slice(rows.start // 2, rows.stop // 2)
        pairs = drawn.pairs.rows(halves).device if drawn.pairs else {}
        if "box" in pairs:
            pixels = mixing.cut(pixels, pairs["box"])
        images = _to_float(pixels)
        if "weight" in pairs:
            images = mixing.blend(images, pairs["weight"])
        ids, numbers, view = drawn.samples[step]
        labels = torch.zeros(len(images), len(self._dataset.classes), device=self._device)
        labels.scatter_(1, numbers, 1.0)
        if pairs:
            labels = mixing.blend(labels, pairs["share"])
        return Batch(images, labels, ids, view)


def evaluation_batches(
    dataset: Dataset,
    source: Source,
    ids: Int[ndarray, " n"],
    data: recipe.Data,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Float[Tensor, "b 3 S S"], Int[Tensor, " b"], Int[Tensor, " b"]]]:
    """Images, labels and ids of the samples `ids` as they are, each once over all ranks.

    Rank r has ids[r::world], in batches of `batch_size` and a smaller one at the end.

    Raises:
        PreflightError: If a file is no usable image, or a worker was killed.
    """
    mine = ids[rank::world]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    files = None
    if source.files is not None:
        files = Files(
            source.files,
            size=dataset.image_size,
            crop=data.eval_crop,
            cut=None,
            max_pixels=dataset.max_pixels,
            device=device,
            workers=workers,
        )
    try:
        stored = files.batches(batches, 0) if files else _stored(source, batches, device)
        for pixels, batch in zip(stored, batches, strict=True):
            samples = to_device({"labels": source.labels[batch], "ids": batch}, device).device
            yield _to_float(pixels), samples["labels"], samples["ids"]
    finally:
        if files:
            files.close()


class _Drawn(NamedTuple):
    """What was drawn for some steps."""

    samples: list[tuple[Tensor, ...]]  # ids, labels (B, 1) and views of each step
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
        self, positions: Int[ndarray, "steps b"], view: int
    ) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
        for chunk in _chunks(positions):
            offsets = self._offsets(chunk.ravel(), view).reshape(chunk.shape)
            for row in to_device({"offsets": offsets}, self._device).device["offsets"]:
                yield self._canvas.windows(row).expand(-1, 3, -1, -1)

    def close(self) -> None:
        """Nothing to end."""

    def _take(self, kind: type) -> Stage | None:
        found = self.stages and isinstance(self.stages[0].augmentation, kind)
        return self.stages.pop(0) if found else None

    def _offsets(self, positions: Int[ndarray, " n"], view: int) -> Int[ndarray, " n"]:
        ids = self._ids[positions]
        top: int | ndarray = 0
        left: int | ndarray = 0
        flip: int | ndarray = 0
        if self._crop:
            corner = self._crop.plan(ids, view, size=self._size)
            top, left = corner["top"], corner["left"]
        if self._flip:
            flip = self._flip.plan(ids, view, size=self._size)["flip"].astype(np.int64)
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
        self._files = Files(
            dataset.train.files,
            size=dataset.image_size,
            crop=data.eval_crop,
            cut=stages[0] if cuts else None,
            max_pixels=dataset.max_pixels,
            device=device,
            workers=workers,
        )

    def batches(
        self, positions: Int[ndarray, "steps b"], view: int
    ) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
        return self._files.batches((self._ids[row] for row in positions), view)

    def close(self) -> None:
        """End the worker processes."""
        self._files.close()


def _check_batch(batch_size: int, samples: int, world: int, *, even: bool) -> None:
    if batch_size > samples:
        raise IncompatibleError(
            f"train.batch_size is {batch_size}, and there are {samples} training images",
            hint=f"a batch of {samples} or less; data.val and data.fraction leave images out",
        )
    unit = world * (2 if even else 1)
    if batch_size % unit:
        lower = batch_size // unit * unit
        near = " or ".join(str(size) for size in (lower, lower + unit) if size)
        pairs = ", and mixup and cutmix pair the images of a device" if even else ""
        raise IncompatibleError(
            f"train.batch_size {batch_size} cannot be divided over {world} devices{pairs}",
            hint=f"a multiple of {unit}, such as {near}",
        )


def _chunks(positions: Int[ndarray, "steps b"]) -> Iterator[Int[ndarray, "steps b"]]:
    steps = max(1, _CHUNK // positions.shape[1])
    for first in range(0, len(positions), steps):
        yield positions[first : first + steps]


def _stored(
    source: Source, batches: list[Int[ndarray, " b"]], device: torch.device
) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
    assert source.pixels is not None
    for batch in batches:
        pixels = to_device({"pixels": source.pixels[batch]}, device).device["pixels"]
        yield pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def _to_float(pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """The images in [0, 1]: value / 255 rounded to float32, the same on every device."""
    # CUDA would multiply by the rounded reciprocal of a number given as a scalar.
    return pixels / _full_scale(pixels.device)


@cache
def _full_scale(device: torch.device) -> Float[Tensor, ""]:
    return torch.full((), 255.0, device=device)

"""Batches: which samples, in what order, and what comes with each of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from distill import recipe
from distill.data import views
from distill.data.augment._augmentation import to_device
from distill.data.manifest import Recorded
from distill.data.pixels import Views, to_float
from distill.data.tars import Tars
from distill.data.workers import Decoder, Files
from distill.errors import IncompatibleError
from distill.types import Batch

if TYPE_CHECKING:
    from distill.data.datasets import Dataset, Source

_GATHERED = 8_000_000  # bytes of rows that are fetched at once


class Rows(Protocol):
    """What was kept of each sample in each view, such as a teacher's answers."""

    row_bytes: int

    def rows(self, ids: Int[ndarray, " n"], view: int) -> dict[str, ndarray] | None:
        """Columns with a row for each of these samples; None where that view is not kept."""
        ...


class Loader:
    """Batches of one training run, in an order that depends on nothing but the seeds.

    The samples and pixels of a global batch are the same for any number of ranks and workers, and
    for any batch at which an epoch begins. An epoch leaves out the samples that fill no batch,
    another rest each time.

    Attributes:
        steps_per_epoch: Batches an epoch.
        views: Any views of the same images.

    Args:
        dataset: Its `train_ids` are read.
        data: Decides the views.
        batch_size: Images a step over all ranks.
        train_seed: Decides the order.
        device: Where images are augmented and delivered; images in memory are copied there whole.
        rank: Which part of every batch is read.
        world: Number of parts.
        workers: Processes that decode files; 0 decodes in this one. Images in memory need none.
        num_views: Epoch e reads view e mod this; None gives each epoch its own.
        audience: For whom the images are, as `Views` takes it.
        kept: Delivered with each batch as `cached`.

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
        num_views: int | None = None,
        audience: Literal["student", "both"] = "student",
        kept: Rows | None = None,
    ) -> None:
        mixes = data.mixup > 0 or data.cutmix > 0
        _check_batch(batch_size, len(dataset.train_ids), world, even=mixes)
        self.steps_per_epoch = len(dataset.train_ids) // batch_size
        self._dataset, self._data = dataset, data
        self._train_seed, self._device = train_seed, device
        self._rank, self._world, self._rows = rank, world, batch_size // world
        self._num_views, self._kept, self._audience = num_views, kept, audience
        self.views = Views(dataset, data, device=device, workers=workers, audience=audience)

    def view(self, epoch: int) -> int:
        """The number of the view that an epoch reads."""
        return epoch if self._num_views is None else epoch % self._num_views

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """This rank's rows of the epoch's batches from batch `start` on.

        Raises:
            PreflightError: If a file is no usable image, or a worker was killed.
        """
        view = self.view(epoch)
        order = self._order(epoch, view)
        shape = (self.steps_per_epoch, self._world, self._rows)
        positions = order[: np.prod(shape)].reshape(shape)[start:, self._rank].ravel()
        numbers = np.broadcast_to(view, len(positions))
        batches = self.views.batches(positions, numbers, batch_size=self._rows)
        if self._kept is None:
            yield from batches
            return
        for batch, columns in zip(
            batches, self._fetched(self._kept, positions, view), strict=False
        ):
            yield batch._replace(cached=columns)

    def apart(self) -> Loader:
        """Another loader of the same batches, that reads beside whatever this one is reading."""
        return Loader(
            self._dataset,
            self._data,
            batch_size=self._rows * self._world,
            train_seed=self._train_seed,
            device=self._device,
            rank=self._rank,
            world=self._world,
            num_views=self._num_views,
            audience=self._audience,
            kept=self._kept,
        )

    def close(self) -> None:
        """End the worker processes."""
        self.views.close()

    def _order(self, epoch: int, view: int) -> Int[ndarray, " n"]:
        """Positions in `train_ids` as an epoch reads them."""
        ids, mixed = self._dataset.train_ids, self._data.shuffle_shards
        if mixed is not None:
            files = self._dataset.train.files
            assert isinstance(files, Tars | Recorded), "the recipe checks this"
            ends = np.searchsorted(ids, files.ends)
            return views.shard_order(ends, mixed=mixed, train_seed=self._train_seed, epoch=epoch)
        return views.epoch_order(
            len(ids),
            data_seed=self._data.seed,
            train_seed=self._train_seed,
            epoch=epoch,
            view=view,
        )

    def _fetched(
        self, kept: Rows, positions: Int[ndarray, " n"], view: int
    ) -> Iterator[dict[str, Tensor] | None]:
        """The columns of every batch; None without end where the view is not kept."""
        size = max(1, _GATHERED // (self._rows * kept.row_bytes)) * self._rows
        for first in range(0, len(positions), size):
            columns = kept.rows(self._dataset.train_ids[positions[first : first + size]], view)
            if columns is None:
                yield from repeat(None)
                return
            placed = to_device(columns, self._device).device
            steps = zip(*(torch.split(x, self._rows) for x in placed.values()), strict=True)
            for step in steps:
                yield dict(zip(placed, step, strict=True))


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

    Batches of `batch_size`, the last one smaller, are dealt out whole: rank r has every world-th
    from the r-th on. So every batch is the same for any number of ranks, and so is every last bit
    of what a network says of it.

    Raises:
        PreflightError: If a file is no usable image, or a worker was killed.
    """
    batches = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
    batches = batches[rank::world]
    files = None
    if source.pixels is None:
        assert source.files is not None
        decoder = Decoder(
            source.files,
            size=dataset.image_size,
            crop=data.eval_crop,
            max_pixels=dataset.max_pixels,
        )
        files = Files(source.files, decoder, device=device, workers=workers)
    try:
        none = map(np.zeros_like, batches)
        stored = files.batches(batches, none) if files else _stored(source, batches, device)
        for pixels, batch in zip(stored, batches, strict=True):
            samples = to_device({"labels": source.labels[batch], "ids": batch}, device).device
            yield to_float(pixels), samples["labels"], samples["ids"]
    finally:
        if files:
            files.close()


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


def _stored(
    source: Source, batches: list[Int[ndarray, " b"]], device: torch.device
) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
    assert source.pixels is not None
    for batch in batches:
        pixels = to_device({"pixels": source.pixels[batch]}, device).device["pixels"]
        yield pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

"""Image files as batches of pixels, decoded in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data import images
from distill.data.augment import Stage
from distill.data.augment.resized_crop import ResizedCrop
from distill.errors import DistillError, PreflightError

_KEPT = 3  # decoded files: a sample and two partners, where its views are mixed


class _Request(NamedTuple):
    """A batch to decode. It names its files, so that workers need not hold a list of them all."""

    ids: Int[ndarray, " b"]
    views: Int[ndarray, " b"]
    files: list[Path]


class Files:
    """Batches of decoded files, in the order asked for, read ahead by `workers` processes.

    Args:
        files: One file a sample.
        size: Pixels of the sides of the result.
        crop: Part of an image's shorter side that is kept where `cut` is None.
        cut: The resized crop that is drawn for every sample, if there is one.
        max_pixels: An image with more counts as bad.
        device: Where batches are delivered.
        workers: Number of processes; 0 decodes in this one.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        size: int,
        crop: float,
        cut: Stage | None,
        max_pixels: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self._requests = _Requests(files)
        self._device = device
        self._batches: DataLoader[Tensor] | None = DataLoader(
            _Decoder(size, crop, cut, max_pixels),
            sampler=self._requests,
            batch_size=None,  # a request is a batch already
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_stand_apart,
            generator=torch.Generator(),  # its own: every pass draws a seed from it
        )

    def batches(
        self, ids: Iterable[Int[ndarray, " b"]], views: Iterable[Int[ndarray, " b"]]
    ) -> Iterator[UInt8[Tensor, "b 3 S S"]]:
        """The pixels of each batch of samples, in channels_last memory.

        A file is decoded once for rows that are near each other.

        Raises:
            PreflightError: If a file is no usable image, or a worker was killed.
        """
        self._requests.batches = zip(ids, views, strict=True)
        assert self._batches is not None, "closed"
        batches = iter(self._batches)
        try:
            for pixels in batches:
                if isinstance(pixels, DistillError):
                    raise pixels
                yield pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        except DistillError:
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise _died(error) from None
        except (OSError, EOFError) as error:  # the pipe that pixels were coming through broke
            with suppress(RuntimeError):  # torch's own notice follows, from a signal's handler
                time.sleep(1)
            raise _died(error) from None
        finally:
            del batches  # or the traceback of an error would keep the workers running

    def close(self) -> None:
        """End the worker processes."""
        self._batches = None


def _died(error: Exception) -> PreflightError:
    return PreflightError(
        f"a process that decodes images died: {error}".splitlines()[0],
        hint="most often memory or /dev/shm is full: fewer workers need less",
    )


class _Requests(Sampler[_Request]):
    """What the next pass over the files asks for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.batches: Iterable[tuple[Int[ndarray, " b"], Int[ndarray, " b"]]] = ()

    def __iter__(self) -> Iterator[_Request]:
        for ids, views in self.batches:
            yield _Request(ids, views, [self._files[number] for number in ids])


class _Decoder(Dataset[Tensor]):
    """Turns a request into pixels; this is what a worker process holds."""

    def __init__(self, size: int, crop: float, cut: Stage | None, max_pixels: int) -> None:
        self._size, self._crop, self._cut, self._max_pixels = size, crop, cut, max_pixels

    def __getitem__(self, request: _Request) -> UInt8[Tensor, "b S S 3"] | DistillError:  # type: ignore[override]
        pixels = np.empty((len(request.ids), self._size, self._size, 3), dtype=np.uint8)
        try:
            self._fill(pixels, request)
        except DistillError as error:
            return error  # as a value: torch would raise it with a traceback for a message
        return torch.from_numpy(pixels)

    def _fill(self, pixels: UInt8[ndarray, "b S S 3"], request: _Request) -> None:
        decode = lru_cache(_KEPT)(partial(images.decode, max_pixels=self._max_pixels))
        if self._cut is None:
            for row, file in zip(pixels, request.files, strict=True):
                row[:] = images.evaluation_view(decode(file), size=self._size, crop=self._crop)
            return
        assert isinstance(self._cut.augmentation, ResizedCrop)
        draws = self._cut.uniforms(request.ids, request.views)
        for row, file, drawn in zip(pixels, request.files, draws, strict=True):
            row[:] = self._cut.augmentation.cut(decode(file), drawn, size=self._size)


def _unchanged(batch: Any) -> Any:
    return batch


def _stand_apart(worker: int) -> None:
    """Leave signals to the process group (Ctrl-C, a scheduler's warning) to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)

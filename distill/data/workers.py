"""Image files as batches of pixels, decoded in processes of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from distill.data import encoded, images
from distill.data.augment import Stage
from distill.data.augment.resized_crop import ResizedCrop, scaled
from distill.data.encoded import Encoded
from distill.errors import DistillError, PreflightError
from distill.signals import STOP_SIGNALS

A = TypeVar("A")
T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_KEPT = 3  # decoded files: a sample and two partners, where its views are mixed


class Request(NamedTuple):
    """A batch to decode."""

    ids: Int[ndarray, " b"]
    views: Int[ndarray, " b"]

    def of(self, rows: Sequence[int]) -> Request:
        """Some rows of it."""
        which = np.array(rows, dtype=np.int64)
        return Request(self.ids[which], self.views[which])


class Decodes(Protocol):
    """How a request becomes pixels: begun in a worker process, finished in the main one."""

    def __call__(self, request: Request) -> Any: ...

    def finish(self, made: Any, device: torch.device) -> UInt8[Tensor, "b 3 S S"]: ...


class Files:
    """Batches of decoded files, in the order asked for, read ahead by `workers` processes.

    Args:
        files: One image a sample.
        decoder: Decodes them.
        device: Where batches are delivered.
        workers: Number of processes; 0 works in this one.
    """

    def __init__(
        self, files: Encoded, decoder: Decodes, *, device: torch.device, workers: int
    ) -> None:
        self._files, self._decoder, self._requests = files, decoder, _Requests()
        self._device = device
        self._batches: DataLoader[Any] | None = DataLoader(
            _Jobs(decoder),
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
        self._requests.batches = zip(self._files.ahead(ids), views, strict=True)
        assert self._batches is not None, "closed"
        for made in _delivered(self._batches):
            yield self._decoder.finish(made, self._device)

    def close(self) -> None:
        """End the worker processes."""
        self._batches = None


def in_processes(job: Callable[[A], T], tasks: Sequence[A], *, workers: int) -> Iterator[T]:
    """The job's results for these tasks, in their order, made ahead by `workers` processes.

    Args:
        job: Can be pickled; so can what it gives.
        tasks: What it is called with.
        workers: Number of processes; 0 works in this one.

    Raises:
        PreflightError: If a worker was killed.
        DistillError: What the job raises; any other error is a bug and comes as RuntimeError.
    """
    loader: DataLoader[T] = DataLoader(
        _Jobs(job),
        sampler=tasks,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_stand_apart,
        generator=torch.Generator(),
    )
    return _delivered(loader)


def cores() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Jobs(Dataset[T]):
    """Calls a job; this is what a worker process holds."""

    def __init__(self, job: Callable[[Any], T]) -> None:
        self._job = job

    def __getitem__(self, task: Any) -> T | DistillError:  # type: ignore[override]
        try:
            return _shared(self._job(task))
        except DistillError as error:
            return error  # as a value: torch would raise it with a traceback for a message


def _shared(made: T) -> T:
    """Put tensors where the main process reads them, while an error is still heard.

    torch would do it in a thread of the worker; where that fails, the main process waits forever.

    Raises:
        PreflightError: If there is no room.
    """
    if get_worker_info() is None:
        return made
    try:
        return cast("T", tree_map_only(Tensor, Tensor.share_memory_, made))
    except RuntimeError as error:
        raise PreflightError(
            f"/dev/shm: no room for a batch of images: {str(error).splitlines()[0]}",
            hint="fewer --workers or a smaller batch need less of it, --workers 0 none; a "
            "container has 64 MB unless it is started with --shm-size",
        ) from None


def _delivered(loader: DataLoader[T]) -> Iterator[T]:
    """What workers make, one after the other; what stopped them is raised."""
    found = iter(loader)
    try:
        for one in found:
            if isinstance(one, DistillError):
                raise one
            yield one
    except DistillError:
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _died(error) from None
    except (OSError, EOFError) as error:  # the pipe that results were coming through broke
        with suppress(RuntimeError):  # torch's own notice follows, from a signal's handler
            time.sleep(1)
        raise _died(error) from None
    finally:
        del found  # or the traceback of an error would keep the workers running


def _died(error: Exception) -> PreflightError:
    return PreflightError(
        f"a process that decodes images died: {error}".splitlines()[0],
        hint="most often memory or /dev/shm is full: fewer workers need less",
    )


class _Requests(Sampler[Request]):
    """What the next pass over the files asks for."""

    def __init__(self) -> None:
        self.batches: Iterable[tuple[Int[ndarray, " b"], Int[ndarray, " b"]]] = ()

    def __iter__(self) -> Iterator[Request]:
        for ids, views in self.batches:
            yield Request(ids, views)


class Decoder:
    """Turns a request into pixels, in the worker process alone.

    Args:
        files: One image a sample.
        size: Pixels of the sides of the result.
        crop: Part of an image's shorter side that is kept where `cut` is None.
        cut: The resized crop that is drawn for every sample, if there is one.
        fast: Whether what is cut may have nearly the pixels of Pillow, in less time.
        max_pixels: An image with more counts as bad.
    """

    def __init__(
        self,
        files: Encoded,
        *,
        size: int,
        crop: float,
        cut: Stage | None = None,
        fast: bool = False,
        max_pixels: int,
    ) -> None:
        self.files, self.max_pixels = files, max_pixels
        self.size, self._crop, self._cut, self._fast = size, crop, cut, fast

    def __call__(self, request: Request) -> UInt8[Tensor, "b S S 3"]:
        """The pixels of a batch."""
        pixels = np.empty((len(request.ids), self.size, self.size, 3), dtype=np.uint8)
        self._fill(pixels, request)
        return torch.from_numpy(pixels)

    def finish(
        self, made: UInt8[Tensor, "b S S 3"], device: torch.device
    ) -> UInt8[Tensor, "b 3 S S"]:
        """The pixels on the device, in channels_last memory."""
        return made.to(device, non_blocking=True).permute(0, 3, 1, 2)

    def draws(self, request: Request) -> tuple[ResizedCrop, Float[ndarray, "b D"]]:
        """The resized crop, and what is drawn for each of its rows."""
        assert self._cut is not None
        crop = self._cut.augmentation
        assert isinstance(crop, ResizedCrop)
        return crop, self._cut.uniforms(request.ids, request.views)

    def _fill(self, pixels: UInt8[ndarray, "b S S 3"], request: Request) -> None:
        decode = lru_cache(_KEPT)(partial(encoded.decode, self.files, max_pixels=self.max_pixels))
        ids = request.ids.tolist()
        if self._cut is None:
            for row, number in zip(pixels, ids, strict=True):
                row[:] = images.evaluation_view(decode(number), size=self.size, crop=self._crop)
            return
        again = Counter(ids)
        crop, draws = self.draws(request)
        for row, number, drawn in zip(pixels, ids, draws, strict=True):
            if not self._fast:
                row[:] = crop.cut(decode(number), drawn, size=self.size)
                continue
            choose = partial(crop.box, drawn)
            if again[number] > 1:
                part = images.cropped(decode(number), choose)
            else:
                part = encoded.part(self.files, number, choose, max_pixels=self.max_pixels)
            row[:] = scaled(part, size=self.size)


def _unchanged(batch: Any) -> Any:
    return batch


def _stand_apart(worker: int) -> None:
    """Leave signals (Ctrl-C, a scheduler's warning) to the main process, and end when it ends.

    torch looks for that every five seconds; until then a worker would hold the folder's lock.
    """
    for signum in STOP_SIGNALS:
        if signum != signal.SIGTERM:  # by which torch ends it
            signal.signal(signum, signal.SIG_IGN)
    os.setpgid(0, 0)
    end_with(os.getppid(), signal.SIGKILL)


def end_with(parent: int, signum: int) -> None:
    """Let the kernel send this process a signal when the one that started it ends, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signum)

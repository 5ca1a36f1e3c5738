"""What runs beside each other on a GPU: batches and steps, and the steps of several students."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distill.engine.capture import tensors
from distill.types import Batch

AHEAD = 4  # steps that the host may be in front of the device; more would only fill its memory


class Ahead:
    """Batches, made on a GPU in a stream of their own: copies and augmentation run beside steps.

    Attributes:
        waited: Seconds in which the device had nothing to do for want of a batch.

    Args:
        device: Where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self.waited = 0.0
        self._device = device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._steps: deque[Any] = deque()  # an event each, of those that the device may be at

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the step on one has been launched by the time the next is asked for."""
        source = iter(batches)
        if self._stream is not None:  # what is on its way to the device has to be there first
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        while True:
            began = time.perf_counter()
            batch = self._next(source)
            if batch is None:
                return
            # On a GPU the host's wait counts only where the device had run dry before it ended.
            if not self._steps or self._steps[-1].query():
                self.waited += time.perf_counter() - began
            yield batch
            if self._stream is not None:
                self._steps.append(torch.cuda.current_stream(self._device).record_event())
                if len(self._steps) > AHEAD:
                    self._steps.popleft().synchronize()

    def _next(self, source: Iterator[Batch]) -> Batch | None:
        if self._stream is None:
            return next(source, None)
        using = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            batch = next(source, None)
        using.wait_stream(self._stream)
        for tensor in tensors(batch):  # or their memory would be used again before they are read
            tensor.record_stream(using)
        return batch


class Lanes:
    """Streams in which recorded steps of several students run beside each other on a GPU.

    A small network's kernels fill a part of a GPU each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[object, Any] = {}

    @contextmanager
    def of(self, owner: object) -> Generator[None]:
        """Launch what belongs to `owner` in a stream of its own, after all that came before."""
        if owner not in self._streams:
            cuda: Any = torch.cuda
            self._streams[owner] = cuda.Stream(self._device)
        stream = self._streams[owner]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let what comes now wait for all lanes."""
        for stream in self._streams.values():
            torch.cuda.current_stream(self._device).wait_stream(stream)

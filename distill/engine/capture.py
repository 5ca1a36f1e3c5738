"""The training step as one CUDA graph, where launching it costs more than running it.

A step of a small network is some thousand kernels of a few microseconds each: a host launches them
more slowly than a GPU runs them. Recorded once, they are launched as one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from distill import console
from distill.engine.step import Step
from distill.types import Batch, Losses, Outputs

Told = Outputs | None
MakeStep = Callable[[Batch, Told], Step]

WARM = 3  # steps before the first that is timed: kernels are chosen in them, moments allocated
TIMED = 3
HOST_BOUND = 0.7  # of a step's time spent launching it, from which on recording it pays


class Quickest:
    """Makes every step; on a GPU that waits for its host, as one CUDA graph from some step on.

    The first steps are made kernel by kernel and timed. What cannot be recorded is compiled with
    PyTorch's own CUDA graphs (`reduce-overhead`), and what cannot be that is made as it is; each
    of these is said. All of them make the same step.

    Args:
        step: Makes a step on a batch, given what a teacher has said of it already. It reads all
            that changes from step to step, such as the learning rate, from tensors.
        model: What `step` trains.
        device: Where.
        record: Whether a graph may be tried at all.
    """

    def __init__(
        self, step: MakeStep, model: nn.Module, device: torch.device, *, record: bool
    ) -> None:
        self._step, self._model, self._device = step, model, device
        self._trying = record and device.type == "cuda"
        self._made = 0
        self._shares: list[float] = []  # of launching, in each timed step
        self._graph: Graph | None = None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

    def __call__(self, batch: Batch, told: Told = None) -> Step:
        """A step on the batch."""
        if self._graph is not None:
            return self._graph(batch, told)
        if not self._trying:
            return self._step(batch, told)
        self._made += 1
        if self._made <= WARM:
            return self._step(batch, told)
        if len(self._shares) < TIMED:
            return self._timed(batch, told)
        self._trying = False
        if statistics.median(self._shares) < HOST_BOUND:
            return self._step(batch, told)
        return self.record(batch, told)

    def record(self, batch: Batch, told: Told = None) -> Step:
        """Record the step and make it on the batch, or fall back to what works."""
        try:
            self._graph = Graph(self._step, batch, told)
        except Exception as error:  # whatever in a step a graph cannot hold shows as any of many
            console.warn(
                f"the step cannot be one CUDA graph ({_line(error)}): trying torch.compile's "
                "reduce-overhead"
            )
            return self._compiled(batch, told)
        console.say("the step runs as one CUDA graph: the GPU was waiting for its kernels")
        return self._graph(batch, told)

    def _compiled(self, batch: Batch, told: Told) -> Step:
        forget_gradients(self._model)
        before = self._model._compiled_call_impl
        self._model.compile(mode="reduce-overhead")
        step = self._step

        def make(batch: Batch, told: Told) -> Step:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return apart(step(batch, told))  # the next step overwrites what this one gave

        try:
            done = make(batch, told)
        except Exception as error:
            console.warn(
                f"nor can torch.compile reduce its overhead ({_line(error)}): every kernel is "
                "launched by itself"
            )
            forget_gradients(self._model)
            self._model._compiled_call_impl = before
            return step(batch, told)
        self._step = make
        return done

    def _timed(self, batch: Batch, told: Told) -> Step:
        """A step, and how much of its time the host needed to launch it."""
        event: Any = torch.cuda.Event
        started, ended = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        started.record()
        done = self._step(batch, told)
        ended.record()
        launching = time.perf_counter() - began
        ended.synchronize()
        self._shares.append(1000 * launching / max(started.elapsed_time(ended), 1e-6))
        return done


class Graph:
    """A step recorded on one batch, replayed on every other of its shapes.

    Recording computes nothing: the step on the batch that it was recorded on is made by calling it.
    """

    def __init__(self, step: MakeStep, batch: Batch, told: Told) -> None:
        self._inputs = tree_map_only(Tensor, torch.clone, (batch, told))
        self._slots = tensors(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread is recorded: one of a loader may be pinning memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._done = step(*self._inputs)

    def __call__(self, batch: Batch, told: Told) -> Step:
        """The step on this batch. Its losses are kept, all else until the next one."""
        for slot, given in zip(self._slots, tensors((batch, told)), strict=True):
            slot.copy_(given, non_blocking=True)
        self._graph.replay()
        return apart(self._done)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure, in its order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def apart(done: Step) -> Step:
    """The step with its losses in memory of their own."""
    losses = done.losses
    total, *parts = torch.stack([losses.total, *losses.parts.values()]).unbind()
    kept = dict(zip(losses.parts, parts, strict=True))
    return done._replace(losses=Losses(total, kept, losses.logits))


def forget_gradients(model: nn.Module) -> None:
    """Drop what a step that failed has added up."""
    for parameter in model.parameters():
        parameter.grad = None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Numbers that are not finite: found before they are made use of, and traced to where they began.

On a CPU every step is looked at before its update is made, so that the weights of the step before
stay as they are. On a GPU a look would wait for the device: losses and weights are looked at when a
row of metrics is written, and before every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.engine import cached
from distill.engine.machine import Machine
from distill.engine.optim import state_tensors
from distill.engine.step import Step
from distill.errors import DivergedError
from distill.objectives import apart_from_others
from distill.types import Batch, Outputs

if TYPE_CHECKING:
    from distill.data.datasets import Dataset
    from distill.engine.session import Session

GENTLER = "a lower optimizer.lr, a longer warmup_epochs, or a clip_norm"
LEAST_SCALE = 1e-4  # of fp16's losses; gradients that overflow even then are no matter of range
_LISTED = 3  # images that are named


class Finding(NamedTuple):
    """What was found in a step. Of several the least says most: the first step, then the cause."""

    step: int
    depth: int  # of the cause, along the way from images to gradients
    what: str
    hint: str = GENTLER

    def error(self) -> DivergedError:
        """What a user is told."""
        return DivergedError(f"{self.what}; checkpoints from before it are kept", hint=self.hint)


def first(found: Finding) -> Finding:
    """Of what all processes found the one that says most. All of them have to ask."""
    if not dist.is_initialized():
        return found
    others: list[Any] = [found] * dist.get_world_size()
    dist.all_gather_object(others, found)
    least: Finding = min(others)
    return least


class Watch:
    """Looks at what a run computes."""

    def __init__(self, session: Session, here: Machine) -> None:
        self._session, self._here = session, here
        student = session.distiller.student
        self._buffers = [_own(x) for x in student.buffers() if x.is_floating_point()]

    def step(self, number: int, batch: Batch, done: Step) -> None:
        """Look at a step, and at what BatchNorm keeps of it. On a GPU it would be waited for.

        Raises:
            DivergedError: If a loss, a gradient or a buffer is not finite.
        """
        losses = {**done.losses.parts, "loss": done.losses.total}  # a term says more than the sum
        broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if not broken and done.made and _are_finite(self._buffers):
            return
        if broken:
            said = f"{broken[0]} is {float(losses[broken[0]])} at step {number}"
        elif not done.made:
            said = f"the gradient is not finite at step {number}, though the losses are"
        elif name := broken_tensor(self._session.distiller.named_buffers()):
            said = f"{name} is not finite after step {number}, though the losses are"
            raise Finding(number, 9, said).error()
        else:
            return
        found = self._traced(Finding(number, 9, said), batch, done)
        if not done.made and not self._here.shards:
            found = first(found)  # all processes have the same gradients
        raise found.error()

    def past(self, found: Finding) -> Finding:
        """What was found in a step some time ago, traced to its images or teachers."""
        session = self._session
        if session.filler is not None or self._here.shards:
            return found  # others would have to take part
        epoch, number = divmod(found.step - 1, session.loader.steps_per_epoch)
        try:
            batch = next(session.loader.apart().epoch(epoch, start=number))
            return self._traced(found, batch, None)
        except Exception:  # whatever hinders the search must not hide what was found
            return found

    def state(self, step: int) -> None:
        """Look at all that a checkpoint would hold, and at the scale of fp16's losses.

        Raises:
            DivergedError: If something is not finite.
        """
        session = self._session
        moments = state_tensors(session.optimizer)[0]
        named = {
            **session.distiller.state_dict(),
            **{f"optimizer.{n}": x for n, x in moments.items()},
        }
        if not _are_finite([_own(x) for x in named.values() if x.is_floating_point()]) and (
            name := broken_tensor(named.items())
        ):
            raise Finding(step, 9, f"{name} is not finite after step {step}").error()
        scaler = session.scaler
        if scaler is not None and scaler.get_scale() < LEAST_SCALE:
            raise Finding(
                step,
                9,
                f"the gradients are not finite at step {step}, however small the losses are "
                f"scaled for fp16 (by {scaler.get_scale():.0e})",
                "--set train.precision=bf16, or a lower optimizer.lr",
            ).error()

    def _traced(self, found: Finding, batch: Batch, done: Step | None) -> Finding:
        """The finding with what is not finite first, from the images to the gradients.

        Args:
            found: What is known.
            batch: Of that step.
            done: The step; None where later ones were made since.
        """
        for depth, (what, hint) in enumerate(self._causes(batch, done)):
            if what:
                return Finding(found.step, depth, f"{found.what}: {what}", hint)
        return found

    def _causes(self, batch: Batch, done: Step | None) -> Iterator[tuple[str | None, str]]:
        """What may be to blame, each with what to do about it; nothing where it is not."""
        session, shown = self._session, batch.images if batch.shown is None else batch.shown
        yield (
            _said("not all numbers in {} are finite", session.dataset, batch, batch.images, shown),
            "look at these images; data.omit and data.on_bad_image leave some out",
        )
        yield self._of_teachers(batch, done)
        if done is None:
            return
        distiller = session.distiller
        for kind in (distiller.named_parameters(), distiller.named_buffers()):
            name = broken_tensor(kind)
            yield name and f"{name} is not finite", GENTLER
        part = done.batch
        what = "the student's logits of {} are not finite"
        yield _said(what, session.dataset, part, done.losses.logits), GENTLER
        if not all(map(math.isfinite, (*done.losses.parts.values(), done.losses.total))):
            sound = "its images, what teachers say and the student's logits are finite"
            yield sound, f"another temperature or weight of the term, or {GENTLER}"
        last = broken_tensor(reversed([(n, p.grad) for n, p in distiller.named_parameters()]))
        term = None if self._here.shards else self._steepest(done)
        yield (
            (f"that of {term}, " if term else "") + f"beginning with {last}",
            f"another weight or temperature of the term, or {GENTLER}",
        )

    def _of_teachers(self, batch: Batch, done: Step | None) -> tuple[str | None, str]:
        session = self._session
        for part, told in self._told(batch, done):
            for i, member in enumerate(told.members or (told,)):
                tensors = (member.logits, *(member.features or {}).values())
                tutor = session.tutors[i]
                what = f"what teacher {tutor.model} says of {{}} is not finite"
                if not (said := _said(what, session.dataset, part, *tensors)):
                    continue
                if session.opened is not None:
                    prefix = getattr(session.opened.members[i], "prefix", None)
                    for reader in session.opened.caches.readers:
                        if cached.prefix(reader.manifest) == prefix:
                            said += f", in its cache {reader.store.origin}"
                    return said, "distill teacher-cache RECIPE --verify full looks at all of it"
                return f"{said}{of_network(tutor.network)}", "other weights for that teacher"
        return None, ""

    def _told(self, batch: Batch, done: Step | None) -> Iterator[tuple[Batch, Outputs]]:
        """What the teachers say of the batch, in pieces that fit."""
        teacher = self._session.teacher
        if done is not None and done.told is not None:
            yield done.batch, done.told
        if teacher is None or self._session.filler is not None or self._here.shards:
            return
        size = self._here.device_batch_size or len(batch.ids)
        if done is None or len(done.batch.ids) < len(batch.ids):
            for at in range(0, len(batch.ids), size):
                part = batch.rows(slice(at, at + size))
                with self._session.autocast:
                    yield part, teacher(part)

    def _steepest(self, done: Step) -> str | None:
        """The term whose gradient is not finite."""
        distiller = self._session.distiller
        weights = dict.fromkeys(distiller.objective.weights, 1.0)
        with self._session.autocast, apart_from_others():
            parts = distiller(done.batch, done.told, weights).parts
        parameters = [p for p in distiller.parameters() if p.requires_grad]
        for name, part in parts.items():
            if part.requires_grad:
                gradients = torch.autograd.grad(
                    part, parameters, retain_graph=True, allow_unused=True
                )
                if broken_tensor(("", x) for x in gradients) is not None:
                    return str(name)
        return None


def broken_tensor(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first that is not finite."""
    for name, tensor in named:
        if tensor is not None and not _own(tensor).isfinite().all():
            return name
    return None


def of_network(network: nn.Module | None) -> str:
    """What in a network is to blame for answers that are not finite, as the end of a sentence."""
    if network is None:
        return ""
    name = broken_tensor([*network.named_parameters(), *network.named_buffers()])
    return f", for its {name} is not" if name else ""


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all are. False may also mean that their squares overflow."""
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors)
    return bool(torch.stack([norm.float() for norm in norms]).sum().isfinite())


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _said(what: str, dataset: Dataset, batch: Batch, *tensors: Tensor) -> str | None:
    """`what` of the images for which one of these tensors is not finite; None where all are."""
    broken = torch.zeros(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
    for tensor in tensors:
        broken |= ~tensor.flatten(1).isfinite().all(dim=1)
    ids = batch.ids[broken].tolist()
    if not ids:
        return None
    files = dataset.train.files
    names = [f"image {i}" + (f" ({files.name(i)})" if files else "") for i in ids[:_LISTED]]
    more = [f"{len(ids) - _LISTED} others"] if len(ids) > _LISTED else []
    return what.format(" and ".join([", ".join(names), *more]))

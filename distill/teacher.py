"""What teaches: a network, a cache, or an ensemble of either, as a map from batch to `Outputs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from distill.cache import codec
from distill.types import Batch, Outputs

FEATURE = "feature."  # begins the column of a feature, beside those of the logits


class Teacher(Protocol):
    """Anything that says something of a batch."""

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of the batch's images, without gradients."""
        ...


class Live:
    """A frozen network, run on every batch."""

    def __init__(self, network: nn.Module) -> None:
        # A teacher left in train mode would move its BatchNorm statistics even without gradients.
        self.network = network.eval().requires_grad_(False)

    def __call__(self, batch: Batch) -> Outputs:
        """The network's outputs."""
        # Not inference_mode: autograd could not save its tensors for the student's backward.
        with torch.no_grad():
            images = batch.images if batch.shown is None else batch.shown
            outputs: Outputs = self.network(images)
        return outputs


class Cached:
    """What a cache holds of a network's answers to a batch; nothing is computed but their code.

    Args:
        codec: How the logits are kept.
        num_classes: How many there are.
        prefix: Begins the names of this teacher's columns among those of a batch.
        live: Asked for what the cache does not hold: features too large to keep.
    """

    def __init__(
        self, codec: str, num_classes: int, *, prefix: str = "", live: Teacher | None = None
    ) -> None:
        self.codec, self.num_classes, self.prefix, self.live = codec, num_classes, prefix, live

    def __call__(self, batch: Batch) -> Outputs:
        """The answers that were kept of the batch's samples in their views."""
        with torch.no_grad():
            outputs = unpack(self.codec, own_columns(batch, self.prefix), self.num_classes)
        if self.live is None:
            return outputs
        more = self.live(batch).features or {}
        return Outputs(outputs.logits, more | (outputs.features or {}))


class Once:
    """A teacher that is asked once about a batch, however many students want to know.

    Args:
        teacher: Who is asked.
        pieces: Micro-batches of a batch, whose answers are kept until the next ones.
    """

    def __init__(self, teacher: Teacher, pieces: int) -> None:
        self.teacher, self.pieces = teacher, pieces
        self._told: dict[tuple[int, int], tuple[Batch, Outputs]] = {}

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says, or has said already of these very images."""
        # Rows of one batch are other tensors for each student, and the same memory; as long as the
        # batch is kept here, nothing else can lie there.
        place = batch.images.data_ptr(), len(batch.images)
        if place not in self._told:
            if len(self._told) == self.pieces:
                del self._told[next(iter(self._told))]
            self._told[place] = batch, self.teacher(batch)
        return self._told[place][1]


class Ensemble:
    """Several teachers as one classifier.

    Args:
        members: The teachers.
        weights: Their shares; they need not sum to 1.
        mean: Of what: the members' probabilities, or their logits, which is the normalised
            geometric mean of the probabilities.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        weights: Sequence[float],
        mean: Literal["probability", "logit"] = "probability",
    ) -> None:
        self.members, self.mean = list(members), mean
        self.shares = [weight / sum(weights) for weight in weights]

    def __call__(self, batch: Batch) -> Outputs:
        """The weighted mean of the members, as logits, and what each of them says."""
        answers = tuple(member(batch) for member in self.members)
        if self.mean == "logit":
            weighted = [
                answer.logits.float().log_softmax(dim=-1) * share
                for answer, share in zip(answers, self.shares, strict=True)
            ]
            return Outputs(torch.stack(weighted).sum(dim=0), members=answers)
        mixed = Outputs(answers[0].logits, members=answers, shares=tuple(self.shares))
        return mixed._replace(logits=mixed.softened(1.0))


def own_columns(batch: Batch, prefix: str) -> dict[str, Tensor]:
    """One teacher's columns among those that came with a batch from caches."""
    assert batch.cached is not None, "the loader has no cache"
    return {
        name.removeprefix(prefix): column
        for name, column in batch.cached.items()
        if name.startswith(prefix)
    }


def pack(kept: str, outputs: Outputs) -> dict[str, Tensor]:
    """Outputs as a cache's columns: the logits in the codec `kept`, features in float16."""
    columns = codec.encode(kept, outputs.logits)
    for name, feature in (outputs.features or {}).items():
        columns[FEATURE + name] = feature.half()
    return columns


def unpack(kept: str, columns: dict[str, Tensor], num_classes: int) -> Outputs:
    """The outputs that columns stand for."""
    features = {
        name.removeprefix(FEATURE): column.float()
        for name, column in columns.items()
        if name.startswith(FEATURE)
    }
    return Outputs(codec.decode(kept, columns, num_classes), features or None)

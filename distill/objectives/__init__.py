"""The objective: a weighted sum of terms.

Each module beside this one is a term: `kd.py` is `term: kd`. To add a method, add a module.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill import component, schedule
from distill.errors import IncompatibleError
from distill.objectives._gather import apart_from_others as apart_from_others
from distill.objectives._term import Reads, Term
from distill.recipe import TermSpec
from distill.types import Anatomy, Batch, Losses, Outputs, Pair


class Objective(nn.Module):
    """Σ weight(progress) · mean over the batch of each term. There is no hidden `1 − alpha`."""

    def __init__(
        self,
        terms: Mapping[str, Term],
        weights: Mapping[str, schedule.Schedule],
        teachers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.teachers = dict(teachers or {})  # which of several a term hears; else all together

    @property
    def looks_inside(self) -> bool:
        """Whether a term reads more than logits, or learns something between the two networks."""
        return any(
            term.reads != Reads() or type(term).connect is not Term.connect
            for _, term in self._terms()
        )

    def connect(
        self, student: Anatomy, teachers: Sequence[Anatomy], *, num_classes: int, samples: Tensor
    ) -> None:
        """Let every term choose what it reads of the networks, and build what it learns.

        Raises:
            IncompatibleError: If a term finds nothing to read.
        """
        for name, term in self._terms():
            number = self.teachers.get(name)
            teacher = teachers[number or 0] if teachers and term.needs_teacher else None
            try:
                term.connect(Pair(student, teacher, num_classes, samples))
            except IncompatibleError as error:
                sides = f"student {student.model}"
                sides += f", teacher {teacher.model}" if teacher else ""
                raise IncompatibleError(
                    f"objective: {name}: {error} ({sides})", hint=error.hint
                ) from error
            if len(teachers) > 1 and number is None and term.reads.teacher:
                raise IncompatibleError(
                    f"objective: {name} reads what is inside of one teacher, and there are "
                    f"{len(teachers)}",
                    hint=f"name it: {{term: {name}, teacher: 0}}",
                )

    def shown(self, batch: Batch) -> dict[str, Tensor]:
        """The other images that terms want the student to see, by term."""
        return {name: term.show(batch) for name, term in self._terms() if term.shows}

    def reads(self) -> dict[str, Reads]:
        """What each term reads inside of the networks; without those that read logits alone."""
        return {name: term.reads for name, term in self._terms() if term.reads != Reads()}

    def student_taps(self) -> list[str]:
        """What the terms read of the student besides its logits."""
        return sorted({tap for _, term in self._terms() for tap in term.reads.student})

    def teacher_taps(self, number: int) -> list[str]:
        """What the terms read of one of the teachers besides its logits."""
        terms = [term for name, term in self._terms() if self.teachers.get(name, 0) == number]
        return sorted({tap for term in terms for tap in term.reads.teacher})

    def set_progress(self, progress: float) -> None:
        """Tell the terms how much of the run is done, in [0, 1]."""
        for _, term in self._terms():
            term.set_progress(progress)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        weights: Mapping[str, float | Tensor],
        again: Mapping[str, Outputs] | None = None,
    ) -> Losses:
        """The weighted sum and its unweighted parts, each a mean over the batch.

        Args:
            student: Its answer to the batch.
            teacher: What is heard; None where there is no teacher.
            batch: The samples.
            weights: Of the terms, by name.
            again: The student's answers to what `shown` gave, by term.
        """
        parts = {
            name: term(
                student._replace(again=again[name]) if again and name in again else student,
                self._heard(name, teacher),
                batch,
            ).mean()
            for name, term in self.terms.items()
        }
        weighted = (_scaled(part, weights[name]) for name, part in parts.items())
        return Losses(functools.reduce(torch.add, weighted), parts, student.logits.detach())

    def taught(self) -> list[tuple[str, Term]]:
        """The terms that read what a teacher says, and their names."""
        return [(name, term) for name, term in self._terms() if term.needs_teacher]

    def weights_at(self, progress: float) -> dict[str, float]:
        """Each term's weight at `progress`, the finished fraction of the run in [0, 1]."""
        return {name: schedule.value(weight, progress) for name, weight in self.weights.items()}

    def gradient_ratio(
        self, logits: Tensor, teacher: Outputs | None, batch: Batch, weights: Mapping[str, float]
    ) -> Tensor | None:
        """The pull of the teacher's terms on the logits over the pull of the labels' terms.

        ‖Σ w ∂(teacher terms)/∂z‖ / ‖Σ w ∂(label terms)/∂z‖ over the batch's logits z. Far from 1,
        one side decides alone. None where either side has no term of any weight on the logits.
        """
        norms: list[Tensor] = []
        for needs_teacher in (True, False):
            z = logits.detach().float().requires_grad_()
            with torch.enable_grad():
                pulls = [
                    weights[name] * term(Outputs(z), self._heard(name, teacher), batch).mean()
                    for name, term in self._terms()
                    if term.needs_teacher is needs_teacher
                    and term.reads == Reads()
                    and not term.shows
                    and weights[name] != 0
                ]
                if not pulls:
                    return None
                total = torch.stack(pulls).sum()
                norms.append(torch.autograd.grad(total, z)[0].norm())
        return norms[0] / norms[1].clamp_min(1e-12)

    def _terms(self) -> list[tuple[str, Term]]:
        return [(name, term) for name, term in self.terms.items() if isinstance(term, Term)]

    def _heard(self, name: str, teacher: Outputs | None) -> Outputs | None:
        """The teacher that a term listens to."""
        number = self.teachers.get(name)
        if teacher is None or number is None or not teacher.members:
            return teacher
        return teacher.members[number]


def _scaled(part: Tensor, weight: float | Tensor) -> Tensor:
    # Whether a tensor is 1 is known to the device alone, and nothing waits for it.
    return part if isinstance(weight, float | int) and weight == 1 else weight * part


def build(specs: Sequence[TermSpec]) -> Objective:
    """The objective that a recipe's `objective` describes.

    Raises:
        RecipeError: If a term is unknown or its arguments are wrong.
    """
    terms = {spec.key: component.build("objectives", spec.term, spec.arguments) for spec in specs}
    weights = {spec.key: spec.weight for spec in specs}
    teachers = {spec.key: spec.teacher for spec in specs if isinstance(spec.teacher, int)}
    return Objective(terms, weights, teachers)


def taps(objectives: Sequence[Objective], number: int) -> list[str]:
    """What any of several objectives reads of one of the teachers besides its logits."""
    return sorted({tap for objective in objectives for tap in objective.teacher_taps(number)})

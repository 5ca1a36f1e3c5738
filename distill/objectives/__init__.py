"""The objective: a weighted sum of terms.

Each module beside this one is a term: `kd.py` is `term: kd`. To add a method, add a module.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill import component, schedule
from distill.objectives._term import Term
from distill.recipe import TermSpec
from distill.types import Batch, Losses, Outputs


class Objective(nn.Module):
    """Σ weight(progress) · mean over the batch of each term. There is no hidden `1 − alpha`."""

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, schedule.Schedule]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)

    def forward(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Mapping[str, float]
    ) -> Losses:
        """The weighted sum and its unweighted parts, each a mean over the batch."""
        parts = {name: term(student, teacher, batch).mean() for name, term in self.terms.items()}
        weighted = (
            part if weights[name] == 1 else weights[name] * part for name, part in parts.items()
        )
        return Losses(functools.reduce(torch.add, weighted), parts, student.logits.detach())

    def taught(self) -> list[tuple[str, Term]]:
        """The terms that read what a teacher says, and their names."""
        terms = [(name, term) for name, term in self.terms.items() if isinstance(term, Term)]
        return [(name, term) for name, term in terms if term.needs_teacher]

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
                    weights[name] * term(Outputs(z), teacher, batch).mean()
                    for name, term in self.terms.items()
                    if isinstance(term, Term)
                    and term.needs_teacher is needs_teacher
                    and not (term.reads.student or term.reads.teacher)
                    and weights[name] != 0
                ]
                if not pulls:
                    return None
                total = torch.stack(pulls).sum()
                norms.append(torch.autograd.grad(total, z)[0].norm())
        return norms[0] / norms[1].clamp_min(1e-12)


def build(specs: Sequence[TermSpec]) -> Objective:
    """The objective that a recipe's `objective` describes.

    Raises:
        RecipeError: If a term is unknown or its arguments are wrong.
    """
    terms = {spec.key: component.build("objectives", spec.term, spec.arguments) for spec in specs}
    return Objective(terms, {spec.key: spec.weight for spec in specs})

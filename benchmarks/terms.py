"""What a step costs with each term, against plain KD on the same two networks, side by side.

    python benchmarks/terms.py [--rounds 7] [TERM]...

A ViT teaches a narrower one with a distillation token, so that every term has what it reads. The
teacher runs live in every step, and gives what the term asks of it; each objective is cross-entropy
and the one term. Terms take turns; ratios are of neighbours in time, in CPU time on one thread.
"""

from __future__ import annotations

import argparse

import torch
from _timing import Work, compare, inverse, report

from distill import component, models, objectives
from distill.engine import optim
from distill.engine.memory import keep_freed
from distill.engine.step import Distiller, train_step
from distill.models.network import Network
from distill.recipe import Model, Optimizer, TermSpec
from distill.teacher import Live
from distill.types import Batch

CLASSES, SIZE, IMAGES = 100, 32, 64
TEACHER = {"model": "vit", "patch_size": 4, "width": 128, "depth": 6, "heads": 4, "pool": "cls"}
STUDENT = {"model": "vit", "patch_size": 4, "width": 64, "depth": 6, "heads": 4, "pool": "distill"}


def network(section: dict[str, object]) -> Network:
    """A network with initial weights."""
    torch.manual_seed(0)
    return models.build_student(
        Model.model_validate(section),
        classes=tuple(map(str, range(CLASSES))),
        image_size=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def step(term: str) -> Work:
    """One optimizer step with cross-entropy and the term."""
    specs = [{"term": "ce"}] if term == "ce" else [{"term": "ce"}, {"term": term}]
    objective = objectives.build([TermSpec.model_validate(spec) for spec in specs])
    student, teacher = network(STUDENT), network(TEACHER)
    objective.connect(
        student.anatomy(),
        [teacher.anatomy()],
        num_classes=CLASSES,
        samples=torch.arange(50_000),
    )
    student.tap(objective.student_taps())
    teacher.tap(objective.teacher_taps(0))
    distiller = Distiller(student, objective).train()
    live = Live(teacher)
    optimizer = optim.build(distiller, Optimizer(name="adamw", lr=1e-3))  # type: ignore[call-arg]
    ids = torch.arange(IMAGES)
    labels = torch.eye(CLASSES)[ids % CLASSES]
    batch = Batch(torch.rand(IMAGES, 3, SIZE, SIZE), labels, ids, torch.zeros_like(ids))
    weights = objective.weights_at(0.5)

    def work() -> int:
        for _ in range(3):
            train_step(distiller, live, optimizer, batch, weights=weights)
        return 3

    return work


def main() -> None:
    """Time all terms and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("terms", nargs="*", default=sorted(component.find("objectives")))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    names = ["kd", *(name for name in options.terms if name != "kd")]
    rows = compare({name: step(name) for name in names}, rounds=options.rounds)
    report("time of a step, as a ratio to that with kd", inverse(rows), unit="steps")


if __name__ == "__main__":
    main()

"""`distill train`'s own loop as a variant: the recipe, the session, the engine; never its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _setting import Setting
from _turns import Turns

from distill import console
from distill.engine import machine
from distill.engine.fit import Training, fit
from distill.engine.monitor import Display
from distill.engine.run import Run
from distill.engine.session import prepare_together
from distill.recipe import Recipe


def train(
    setting: Setting,
    folder: Path,
    turns: Turns,
    *,
    how: str,
    compiled: bool = False,
    cuda_graph: bool = True,
    temperatures: Sequence[float] = (4.0,),
) -> None:
    """Train the recipe of `live`, `cached` or `alone`, with its rows of metrics; stop at turns.

    Several temperatures are students side by side in one loop, as in a sweep.
    """
    here = machine.setup(
        workers=0, compile=compiled, cuda_graph=cuda_graph, checkpoint_seconds=1e9
    )  # fmt: skip
    console.err.quiet = True
    path = Path("run").absolute()
    recipe = Recipe.load(setting.recipe(folder, how))
    recipes = [recipe]
    if how != "alone":
        recipes = [recipe.changed({"objective.1.temperature": float(t)}) for t in temperatures]
    sessions = prepare_together(recipes, path, here)
    trainings = []
    for i, session in sessions.items():
        run = Run(path / str(i))
        run.path.mkdir(parents=True)
        trainings.append(Training(recipes[i], run, session, here, quiet=True))

    class Steps(Display):
        def advance(self) -> None:
            super().advance()
            if self.done % len(trainings) == 0:  # all students have made the step
                turns.waited = trainings[0].waited
                turns.step(setting.batch)

    total = trainings[0].total * len(trainings)
    with machine.stop_request() as stop:
        display = Steps(path.name, 0, total, setting.batch)
        turns.begin()
        with display:
            fit(trainings, here, stop, display, path=path)

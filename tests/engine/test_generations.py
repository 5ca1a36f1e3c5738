"""Students that teach the next of their kind, and teachers that are heard one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import datasets
from distill.data.loader import evaluation_batches
from distill.engine.generations import last, run_of
from distill.engine.preflight import rehearse
from distill.engine.train import train
from distill.errors import IdentityError, RecipeError
from distill.models import weights
from distill.models.weights import fingerprint
from distill.recipe import Recipe

BORN_AGAIN = """
data: {name: digits, fraction: 0.2}
student: {model: resnet8}
generations: 3
objective:
  - {term: ce, weight: 0.5}
  - {term: kd, weight: 0.5, temperature: 1}
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 1, batch_size: 30, seed: 7}
"""


@pytest.fixture
def born_again(tmp_path: Path) -> Callable[..., Recipe]:
    path = tmp_path / "born-again.yaml"
    path.write_text(BORN_AGAIN)
    return lambda *changes: Recipe.load(path, changes)


def test_each_generation_is_taught_by_the_one_before(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, out = born_again(), tmp_path / "run"
    result = train(recipe, out)
    runs = [run_of(out, 1), run_of(out, 2), out]
    networks = [weights.load(run) for run in runs]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert results[0]["identity"]["teachers"] == []  # from labels alone
    for before, after in ((0, 1), (1, 2)):
        assert results[after]["identity"]["teachers"] == [fingerprint(networks[before])]
    metrics = [(run / "metrics.jsonl").read_text() for run in runs]
    assert ["kd" in json.loads(text.splitlines()[0]) for text in metrics] == [False, True, True]
    assert result.generations is not None
    assert [one["run"] for one in result.generations] == [str(run) for run in runs]
    assert [one["top1"] for one in result.generations] == [one["top1"] for one in results]
    # Each begins at weights of its own: with the same they would be taught what they know.
    assert len({fingerprint(network) for network in networks}) == 3


def test_the_ensemble_is_the_mean_of_their_probabilities(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, out = born_again(), tmp_path / "run"
    result = train(recipe, out)
    assert result.ensemble is not None
    assert result.generations is not None
    dataset = datasets.load(recipe.data)
    ids = np.arange(len(dataset.test))
    batches = evaluation_batches(
        dataset, dataset.test, ids, recipe.data, batch_size=300, device=torch.device("cpu")
    )
    networks = [weights.load(one["run"]).eval() for one in result.generations]
    likelihoods, correct = [], []
    with torch.no_grad():
        for images, labels, _ in batches:
            told = [network(images).logits.double().softmax(dim=-1) for network in networks]
            mean = torch.stack(told).mean(dim=0)
            likelihoods.append(-mean.gather(1, labels[:, None]).log())
            correct.append(mean.argmax(dim=1) == labels)
    nll, top1 = torch.cat(likelihoods).mean(), torch.cat(correct).double().mean()
    assert math.isclose(result.ensemble["nll"], float(nll), rel_tol=1e-4)
    assert math.isclose(result.ensemble["top1"], float(top1))
    # Jensen: the mean's likelihood is at least the mean likelihood.
    assert result.ensemble["nll"] <= sum(one["nll"] for one in result.generations) / 3


def test_it_goes_on_where_it_stopped_and_refuses_another_recipe(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, out = born_again(), tmp_path / "run"
    first = train(recipe, out)
    stamp = (run_of(out, 1) / "student.safetensors").stat().st_mtime_ns
    again = train(recipe, out)
    assert again == first
    assert (run_of(out, 1) / "student.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(IdentityError):
        train(born_again("optimizer.lr=0.01"), out)


def test_the_first_generation_has_the_recipes_own_teachers(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "teacher.yaml").write_text(
        BORN_AGAIN.replace("generations: 3\n", "").replace(
            "  - {term: kd, weight: 0.5, temperature: 1}\n", ""
        )
    )
    text = BORN_AGAIN.replace("student:", "teachers: [{recipe: teacher.yaml}]\nstudent:")
    (tmp_path / "taught.yaml").write_text(text.replace("generations: 3", "generations: 2"))
    recipe = Recipe.load(tmp_path / "taught.yaml")
    final = last(recipe, tmp_path / "run")
    first = final.teachers[0].recipe
    assert first is not None
    assert first.teachers == recipe.teachers
    assert first.train.seed == recipe.train.seed
    assert final.train.seed == recipe.train.seed + 1
    result = train(recipe, tmp_path / "run")
    assert result.generations is not None
    assert len(result.generations) == 2


def test_it_is_rehearsed_and_a_cache_is_refused(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    plan = rehearse(born_again(), tmp_path / "run")
    assert [teacher["trained_first"] for teacher in plan.teachers] == [True]
    assert list(tmp_path.glob("run*")) == []
    with pytest.raises(RecipeError, match="each of the generations has a teacher of its own"):
        born_again("cache={path: runs/cache}")


def test_a_term_names_a_teacher_of_the_first_generation_alone(
    born_again: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = born_again(
        "generations=2",
        "teachers=[{weights: a}, {weights: b}]",
        "objective.1.teacher=1",
    )
    final = last(recipe, tmp_path / "run")
    first = final.teachers[0].recipe
    assert first is not None
    assert [spec.teacher for spec in first.objective] == [None, 1]
    assert [spec.teacher for spec in final.objective] == [None, None]

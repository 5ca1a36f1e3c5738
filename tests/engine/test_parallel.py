"""Models in parts: the same run, whatever part of the weights a process holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill import evaluate, models, objectives
from distill.data import datasets
from distill.data.datasets import Source
from distill.engine import machine, parallel
from distill.engine.average import Average
from distill.engine.machine import Machine
from distill.engine.networks import facts
from distill.engine.session import answers, prepare
from distill.engine.train import train
from distill.errors import IncompatibleError
from distill.models.quick import halve
from distill.recipe import Model, Recipe
from distill.teacher import Live
from distill.types import Outputs
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.processes import context, free_port, largest_difference
from tests.promises import Measured

# Without dropout, whose masks follow the process; LayerNorm has no statistics of the batch.
PLAIN = STUDENT.replace("drop: 0.1", "drop: 0.0").replace("depth: 1", "depth: 2")
# A term with weights of its own, and one that shows the student other images.
TERMS = PLAIN.replace(
    "optimizer:",
    "  - {term: features, weight: 0.3, standardise: false}\n"
    "  - {term: shift_consistency, weight: 10}\noptimizer:",
)
NORMS = TEACHER.replace("sgd, lr: 0.05, momentum: 0.9", "sgd, lr: 0.01, momentum: 0.9")

ROOT = Path(__file__).parents[2]

Run = tuple[Path, Path, dict[str, Any]]  # recipe, run directory, options


def work(rank: int, world: int, port: int, runs: Sequence[Run]) -> None:
    join(rank, world, port)
    for recipe, out, options in runs:
        train(Recipe.load(recipe), out, workers=0, **options)
    if any(options.get("shard_weights") for _, _, options in runs):
        holds_parts(Recipe.load(runs[0][0]), runs[0][1])


def join(rank: int, world: int, port: int) -> None:
    """Be one of several processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)


def holds_parts(recipe: Recipe, out: Path) -> None:
    """Of two processes each holds half of all that learns and teaches, in whatever precision."""
    here = machine.setup(workers=0, shard_weights=True)
    session = prepare(recipe, out, here)
    assert isinstance(session.teacher, Live)
    network = session.teacher.network
    for module in (session.distiller, session.average, network):
        module = module.network if isinstance(module, Average) else module
        assert isinstance(module, nn.Module)
        held = total = 0
        for parameter in module.parameters():
            assert isinstance(parameter, DTensor)
            held, total = held + parameter.to_local().numel(), total + parameter.numel()
        assert 0.4 * total < held < 0.6 * total
    torch.manual_seed(0)
    plain = models.build_student(recipe.student, **facts(session.dataset))
    plain.eval().requires_grad_(False)
    cut = copy.deepcopy(plain)
    for one in (plain, cut):
        halve(one, torch.bfloat16)
    parallel.shard(cut, here)
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cut(images).logits, plain(images).logits)


def together(world: int, runs: Sequence[Run]) -> None:
    """Train one recipe after the other, in so many processes of one group."""
    in_group(world, work, runs)


def in_group(world: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call it in so many processes of one group, with their rank, the world and a port first."""
    port = free_port()
    processes = [
        context.Process(target=target, args=(rank, world, port, *arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world


def newest(run: Path) -> Path:
    return max((run / "checkpoint").glob("step-????????"))


def cut_short(run: Path, to: Path) -> Path:
    """A copy of a run as it was when its last checkpoint but one was written."""
    shutil.copytree(run, to)
    shutil.rmtree(newest(to))
    for name in ("result.json", "student.safetensors"):
        (to / name).unlink()
    return to


def test_models_in_parts_are_trained_as_one_and_go_on_as_one(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    plain, norms = recipes(student=TERMS), tmp_path / "norms.yaml"
    norms.write_text(NORMS)
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    often: dict[str, Any] = {"checkpoint_seconds": 0}
    one, two, pieces = (tmp_path / name for name in ("one", "two", "pieces"))
    train(Recipe.load(plain), one, **often)
    whole = cut_short(one, tmp_path / "begun-whole")
    in_parts = {"shard_weights": True, **often}
    runs: list[Run] = [
        (plain, two, in_parts),
        (plain, pieces, {"device_batch_size": 5, **in_parts}),
        (plain, whole, in_parts),
        (norms, tmp_path / "norms-whole", often),
        (norms, tmp_path / "norms-in-parts", in_parts),
    ]
    together(2, runs)
    parts = cut_short(two, tmp_path / "begun-in-parts")
    train(Recipe.load(plain), parts)
    for other in (two, pieces, whole, parts):
        for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
            assert largest_difference(newest(other) / file, newest(one) / file) <= 1e-5
        assert largest_difference(other / "student.safetensors", one / "student.safetensors") < 1e-5
        results = [json.loads((run / "result.json").read_text()) for run in (other, one)]
        for name in ("top1", "val_top1", "parameters", "flops", "identity"):
            assert results[0][name] == results[1][name]
    # BatchNorm follows the process, with all weights or a part of them alike.
    same = (tmp_path / name / "student.safetensors" for name in ("norms-whole", "norms-in-parts"))
    assert largest_difference(*same) <= 1e-5


STEPS = PLAIN.replace("epochs: 4, batch_size: 20", "epochs: 12, batch_size: 24")


@pytest.mark.promise("R7")
@pytest.mark.parametrize("worlds", [(2,), pytest.param((2, 3, 4), marks=pytest.mark.soak)])
def test_several_processes_train_the_same_model_as_one(
    recipes: Callable[..., Path], tmp_path: Path, worlds: tuple[int, ...], measured: Measured
) -> None:
    """LayerNorm, AdamW, 48 steps; and the same group twice ends bit for bit alike."""
    recipe = recipes(student=STEPS)
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("batch_size: 30", "batch_size: 24"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    one = tmp_path / "one"
    assert train(Recipe.load(recipe), one, workers=0).steps == 48
    files = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
    differences = []
    for world in worlds:
        first, second = (tmp_path / f"{name}-{world}" for name in ("first", "second"))
        together(world, [(recipe, first, {}), (recipe, second, {})])
        student = "student.safetensors"
        differences.append(largest_difference(first / student, one / student))
        pairs = [(newest(first) / file, newest(second) / file) for file in files]
        pairs.append((first / student, second / student))
        assert [a.read_bytes() == b.read_bytes() for a, b in pairs] == [True] * 4
    assert max(differences) <= 1e-5
    named = ", ".join(map(str, worlds))
    measured(
        "largest difference of a weight to one process, 48 steps, LayerNorm and AdamW",
        f"{max(differences):.1e} ({named} processes)",
    )
    measured("the same run in the same processes", f"4 of 4 files bit-identical ({named})")


class Mean(nn.Module):
    """Answers with a fixed map of the pixels, and has no weights to learn."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("map", torch.randn(3 * 8 * 8, 10, generator=draw))

    def forward(self, images: Tensor) -> Outputs:
        assert isinstance(self.map, Tensor)
        return Outputs(images.flatten(1) @ self.map)


CASES = [(n, size) for n in (*range(1, 20), 31, 32, 33) for size in (1, 2, 4, 5)]


def evaluated(recipe: Recipe) -> list[tuple[list[list[float]], list[float]]]:
    """Of every case: each image's answer, and the scores, through the product's evaluator."""
    here, whole = machine.setup(workers=0), datasets.load(recipe.data)
    assert whole.test.pixels is not None
    found = []
    for n, size in CASES:
        test = Source(whole.test.labels[:n], whole.test.pixels[:n], None)
        dataset = dataclasses.replace(whole, test=test)
        here = here._replace(device_batch_size=size)
        told = answers(Mean(), "test", recipe, dataset, here)
        found.append(([column.tolist() for column in told], list(evaluate.scores(told))))
    return found


def evaluate_together(rank: int, world: int, port: int, recipe: Path, folder: Path) -> None:
    join(rank, world, port)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(evaluated(Recipe.load(recipe))))


@pytest.mark.promise("R8")
@pytest.mark.parametrize("worlds", [(3,), pytest.param((2, 3, 4), marks=pytest.mark.soak)])
def test_evaluation_counts_each_image_once(
    recipes: Callable[..., Path], tmp_path: Path, worlds: tuple[int, ...], measured: Measured
) -> None:
    """All processes have all answers, and the scores of one process to the last bit."""
    recipe = recipes()
    alone, exact, apart = evaluated(Recipe.load(recipe)), 0, 0.0
    for (n, _), (columns, _) in zip(CASES, alone, strict=True):
        assert columns[0] == list(range(n))
    for world in worlds:
        in_group(world, evaluate_together, recipe, tmp_path)
        for rank in range(world):
            found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
            for (columns, scores), (expected, known) in zip(found, alone, strict=True):
                assert columns[0] == expected[0]
                exact += columns == expected and rank == 0
                apart = max(apart, *(abs(a - b) for a, b in zip(scores, known, strict=True)))
    total = len(CASES) * len(worlds)
    assert exact == total
    assert apart <= 1e-12
    measured(
        "images x batch size x processes, each image's answer and the scores",
        f"{exact} of {total} cases exact, scores {apart:.0e} apart",
    )


def test_the_tables_of_the_document_are_those_of_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling_model.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    first = document.index(lines[0])
    assert len(lines) == 21
    assert [line for line in document[first:] if line.startswith("|")] == lines


@pytest.fixture
def two() -> Machine:
    """One of two processes, as far as checks before a run are concerned."""
    return machine.setup(workers=0, shard_weights=True)._replace(world=2)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("optimizer.name=muon", "muon looks at whole matrices"),
        ("optimizer.name=lamb", "lamb looks at whole matrices"),
        ("train.precision=fp16", "fp16 scales its losses"),
        ("cache={fill: true, path: nowhere}", "cache.fill asks each process's teacher"),
    ],
)
def test_what_parts_cannot_do_is_refused(
    recipes: Callable[..., Path], two: Machine, override: str, fault: str
) -> None:
    recipe = Recipe.load(recipes(), [override])
    with pytest.raises(IncompatibleError, match=fault) as caught:
        parallel.require_shardable(recipe, objectives.build(recipe.objective), two)
    assert caught.value.hint


def test_compiled_parts_are_refused(recipes: Callable[..., Path], two: Machine) -> None:
    recipe = Recipe.load(recipes())
    with pytest.raises(IncompatibleError, match="cannot be combined with --compile"):
        parallel.require_shardable(
            recipe, objectives.build(recipe.objective), two._replace(compile=True)
        )


def test_a_number_has_no_parts(recipes: Callable[..., Path], two: Machine) -> None:
    recipe = Recipe.load(recipes(), ["objective=[{term: ce}, {term: ctkd}]"])
    objective = objectives.build(recipe.objective)
    with pytest.raises(IncompatibleError, match="ctkd learns a number that has no parts"):
        parallel.require_shardable(recipe, objective, two)
    with pytest.raises(IncompatibleError, match=r"terms\.ctkd\.theta is a single number"):
        parallel.shard(objective, two)


FACTS = {
    "classes": tuple("abcd"),
    "image_size": 32,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
}


@pytest.mark.parametrize("model", ["resnet8", "timm/mobilenetv3_small_050"])
def test_statistics_of_all_gpus_change_nothing_else(
    recipes: Callable[..., Path], two: Machine, model: str
) -> None:
    """timm's layers of BatchNorm and activation in one keep their activation."""
    recipe = Recipe.load(recipes(), ["train.sync_batchnorm=true"])
    student = models.build_student(Model(model=model), **FACTS).eval()
    images, names = torch.rand(2, 3, 32, 32), list(student.state_dict())
    expected = student(images).logits
    parallel.synchronise(student, recipe, two._replace(device=torch.device("cuda")))
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(student.state_dict()) == names
    assert torch.equal(student.eval()(images).logits, expected)


def test_statistics_of_all_processes_need_gpus_where_there_are_several(
    recipes: Callable[..., Path], two: Machine
) -> None:
    recipe = Recipe.load(recipes(), ["train.sync_batchnorm=true"])
    student = models.build_student(Model(model="resnet8"), **FACTS)
    parallel.synchronise(student, recipe, two._replace(world=1))  # which sees all anyway
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in student.modules())
    with pytest.raises(IncompatibleError, match="GPUs only, and 2 processes run on cpu"):
        parallel.synchronise(student, recipe, two)


@pytest.mark.parametrize(
    ("model", "world", "pieces", "synchronised", "seen"),
    [
        ("resnet8", 1, None, False, None),
        ("resnet8", 2, None, False, 10),
        ("resnet8", 2, 5, False, 5),
        ("resnet8", 2, None, True, None),
        ("resnet8", 2, 5, True, 10),
        ("vit", 2, 5, False, None),
    ],
)
def test_batchnorm_that_sees_pieces_is_said_with_its_numbers(
    recipes: Callable[..., Path],
    two: Machine,
    model: str,
    world: int,
    pieces: int | None,
    synchronised: bool,
    seen: int | None,
) -> None:
    recipe = Recipe.load(recipes(), [f"train.sync_batchnorm={str(synchronised).lower()}"])
    student = models.build_student(Model(model=model), **FACTS)
    here = two._replace(world=world, device_batch_size=pieces)
    said = parallel.seen_apart(student, recipe, here)
    assert len(said) == (seen is not None)
    for line in said:
        assert f"from {seen} images at a time, of a batch's 20 (devices: {world}" in line


def test_where_norms_are_synchronised_is_a_part_of_the_recipe_only_if_they_are(
    recipes: Callable[..., Path],
) -> None:
    """So that runs from before go on."""
    plain, synchronised = (
        Recipe.load(recipes(), [f"train.sync_batchnorm={value}"]) for value in ("false", "true")
    )
    assert "sync_batchnorm" not in plain.identity()["train"]
    assert plain.digest() != synchronised.digest()

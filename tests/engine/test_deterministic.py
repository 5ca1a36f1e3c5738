"""`train.deterministic`: the same bits each time, or a sentence why that cannot be."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import storage
from distill.data.loader import Loader
from distill.engine import checkpoint, machine
from distill.engine.checkpoint import Checkpoint
from distill.engine.train import train
from distill.errors import IdentityError, IncompatibleError, Stopped
from distill.recipe import Recipe, json_schema
from distill.types import Batch
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.test_parallel import cut_short, in_group, together, work
from tests.promises import Measured

SWITCH = "CUBLAS_WORKSPACE_CONFIG"


def switches() -> tuple[Any, ...]:
    return (
        torch.get_deterministic_debug_mode(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(SWITCH),
    )


@pytest.fixture
def run(recipes: Callable[..., Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """A deterministic run that was cut after its second epoch."""
    recipe = Recipe.load(recipes(), ["train.deterministic=true", "train.epochs=3"])
    train(recipe, tmp_path / "whole", workers=0, checkpoint_seconds=0)
    return recipe, cut_short(tmp_path / "whole", tmp_path / "run")


def state_of(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_it_is_on_in_the_run_and_undone_after_it(
    recipes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    fit = train.__globals__["fit"]

    def observed(*args: Any, **keywords: Any) -> None:
        seen.append(switches())
        fit(*args, **keywords)

    monkeypatch.setitem(train.__globals__, "fit", observed)
    before = switches()
    assert before == (0, False, False, True, None)
    for value in ("true", "false"):
        changes = [f"train.deterministic={value}", "train.epochs=1"]
        train(Recipe.load(recipes(), changes), tmp_path / value / "run", workers=0)
        assert switches() == before
    # The teacher's own recipe does not ask for it.
    assert seen == [before, (2, False, True, False, ":4096:8"), before, before]
    monkeypatch.setenv(SWITCH, ":16:8")
    with machine.determinism(True):
        assert os.environ[SWITCH] == ":4096:8"
    assert switches() == (*before[:4], ":16:8")


TERM = """
import torch
from distill.objectives._term import Term


class Put(Term):
    needs_teacher = False

    def forward(self, student, teacher, batch):
        kept = torch.zeros_like(student.logits)
        return kept.put_(torch.tensor([0, 0]), student.logits.flatten()[:2]).sum(dim=1)
"""


def test_an_operation_that_has_no_such_form_is_named(
    recipes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_term.py").write_text(TERM)
    monkeypatch.syspath_prepend(tmp_path)
    objective = ["objective=[{term: ce}, {term: 'own_term:Put', name: put}]", "train.epochs=1"]
    recipe = Recipe.load(recipes(), [*objective, "train.deterministic=true"])
    before = switches()
    with pytest.raises(IncompatibleError, match=r"^train\.deterministic: put_ has no form") as said:
        train(recipe, tmp_path / "run", workers=0)
    assert "--set train.deterministic=false" in said.value.hint
    assert switches() == before
    train(Recipe.load(recipes(), objective), tmp_path / "other", workers=0)


def test_what_cublas_says_is_a_sentence_too() -> None:
    said = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic "
        f"behavior in this case, you must set an environment variable: {SWITCH}=:4096:8"
    )
    told = machine.not_deterministic(said)
    assert isinstance(told, IncompatibleError)
    assert SWITCH in told.hint
    other = RuntimeError("something else")
    assert machine.not_deterministic(other) is other


def threads(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.set_num_threads(2)
    return {}


def version(package: str) -> Callable[[pytest.MonkeyPatch], dict[str, Any]]:
    def change(patch: pytest.MonkeyPatch) -> dict[str, Any]:
        known = checkpoint._version
        patch.setattr(
            checkpoint, "_version", lambda name: "0.1" if name == package else known(name)
        )
        return {}

    return change


def processor(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    return {}


def pieces(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"device_batch_size": 10}


def compiled(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"compile": True}


CHANGES = {
    "threads: 1 -> 2": threads,
    "processor: ": processor,
    "device_batch_size: None -> 10": pieces,
    "compile: False -> True": compiled,
    "timm: ": version("timm"),
    "pillow: ": version("pillow"),
}


@pytest.mark.promise("R1")
def test_a_start_that_would_give_other_bits_is_refused_and_changes_nothing(
    run: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    recipe, out = run
    before = state_of(out)
    for name, change in CHANGES.items():
        with monkeypatch.context() as patch:
            try:
                with pytest.raises(IdentityError) as refused:
                    train(recipe, out, workers=0, **change(patch))
            finally:
                torch.set_num_threads(1)
        said = str(refused.value)
        assert "train.deterministic: true, and this start would give other last bits " in said
        assert name in said
        assert " -> " in said
        assert said.count(" -> ") == 1
        assert refused.value.exit_status == 4
        assert "--set train.deterministic=false" in refused.value.hint
        assert state_of(out) == before
    train(recipe, out, workers=2)  # which decides no bit
    assert processes.traces(out) == processes.traces(out.with_name("whole"))
    measured(
        "train.deterministic, another device, threads, version or option",
        f"{len(CHANGES)} of {len(CHANGES)} refused with old -> new, nothing changed",
    )


def test_without_it_the_same_start_goes_on_and_says_what_is_lost(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Switching it off, and another number of images at a time: two changes, one sentence."""
    recipe, out = run
    plain = recipe.changed({"train.deterministic": False})
    train(plain, out, workers=0, device_batch_size=10, checkpoint_seconds=0)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "going on with another device_batch_size: None -> 10; deterministic: True -> False: same "
        "data and order, other last bits, other masks of dropout" in said
    )
    # And what went on without it is not taken for what it is not.
    (out / "result.json").unlink()
    with pytest.raises(IdentityError, match="deterministic: False -> True"):
        train(recipe, out, workers=0, device_batch_size=10)


def test_another_number_of_processes_keeps_data_and_order_and_says_what_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Checkpoint(1, {"model": {"w": torch.ones(2)}}, {})
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        checkpoint.save(tmp_path, state, identity={})
    told: list[str] = []
    assert checkpoint.load(tmp_path, identity={}, warn=told.append) is not None
    assert told == [
        "going on with another processes: 2 -> 1: same data and order, other last bits, other "
        "masks of dropout, and BatchNorm sees other groups of images"
    ]
    with pytest.raises(IdentityError, match="deterministic: False -> True"):
        checkpoint.load(tmp_path, identity={}, options={"deterministic": True}, warn=told.append)


def test_what_an_earlier_version_did_not_write_is_not_held_against_it(
    run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = run
    (newest,) = sorted((out / "checkpoint").iterdir(), reverse=True)[:1]
    files = storage.read_folder(newest)
    state = json.loads(files["state.json"])
    known = ("torch", "device", "threads", "processes")
    state["numerics"] = {key: state["numerics"][key] for key in known}
    for path in (out / "checkpoint").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    storage.write_folder(newest, {**files, "state.json": json.dumps(state).encode()})
    with pytest.raises(IdentityError, match="deterministic: False -> True"):
        train(recipe, out, workers=0)
    capsys.readouterr()
    train(recipe.changed({"train.deterministic": False}), out, workers=0)
    assert "going on with another" not in capsys.readouterr().err
    assert processes.traces(out) | {"recipe.yaml": b""} == processes.traces(
        out.with_name("whole")
    ) | {"recipe.yaml": b""}


def test_it_is_no_part_of_the_recipes_identity_and_is_described(
    recipes: Callable[..., Path],
) -> None:
    """Runs from before it go on, and a finished one is finished with it too."""
    off, on = (Recipe.load(recipes(), [f"train.deterministic={v}"]) for v in ("false", "true"))
    assert off.digest() == on.digest()
    assert "deterministic" not in off.identity()["train"]
    assert "deterministic: true" in on.to_yaml()
    keys = json_schema()["$defs"]["Train"]["properties"]
    assert "the same bits each time" in keys["deterministic"]["description"]


def stopped(rank: int, world: int, port: int, recipe: Path, out: Path, step: int) -> None:
    """Train as one of several processes; the last gets a signal in a step."""
    epoch = Loader.epoch

    def interrupted(self: Loader, number: int, *, start: int = 0) -> Iterator[Batch]:
        for i, batch in enumerate(epoch(self, number, start=start), start + 1):
            if number * self.steps_per_epoch + i == step and rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    Loader.epoch = interrupted  # type: ignore[method-assign]
    machine.ASK_SECONDS = 0  # whether another got a signal, after each step
    with suppress(Stopped):
        work(rank, world, port, [(recipe, out, {})])
        raise AssertionError


@pytest.mark.promise("R1")
@pytest.mark.parametrize("worlds", [[3], pytest.param([2, 3, 4], marks=pytest.mark.soak)])
def test_several_processes_go_on_bit_for_bit(
    recipes: Callable[..., Path], tmp_path: Path, worlds: list[int], measured: Measured
) -> None:
    """Three and more add up in the order of DDP's buckets, which must not change on the way.

    And the stop comes between two rows of metrics: each process has losses of its own.
    """
    student = STUDENT.replace("batch_size: 20", "batch_size: 24, deterministic: true")
    recipe = recipes(student=student.replace("width: 16", "width: 96"))
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("batch_size: 30", "batch_size: 24"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    for world in worlds:
        whole, cut = tmp_path / f"whole-{world}", tmp_path / f"cut-{world}"
        together(world, [(recipe, whole, {}), (recipe, tmp_path / f"again-{world}", {})])
        expected = processes.traces(whole)
        assert processes.traces(tmp_path / f"again-{world}") == expected
        in_group(world, stopped, recipe, cut, 7)
        assert [path.name for path in (cut / "checkpoint").iterdir()] == ["step-00000007"]
        together(world, [(recipe, cut, {})])
        assert processes.traces(cut) == expected
    measured(
        "train.deterministic in several processes, stopped between rows and gone on",
        f"bit-identical in {', '.join(map(str, worlds))} processes, metrics.jsonl too",
    )

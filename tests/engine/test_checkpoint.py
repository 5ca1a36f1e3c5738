"""The last good checkpoint is never lost, and damage is found, said and got over."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from distill import storage
from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.engine.run import Run
from distill.engine.train import train
from distill.errors import DamagedError, DistillError
from distill.recipe import Recipe
from tests.crashes import crash
from tests.engine import processes
from tests.promises import Measured


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((9,), float(step))}}, {"rows": step})


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    checkpoint.KEEP = keep  # in processes of their own; elsewhere it is what it is
    for step in steps:
        checkpoint.save(folder, state(step), identity={})


def loaded(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    told: list[str] = []
    return checkpoint.load(folder, identity={}, warn=told.append), told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def _begin(folder: Path, *, keep: int) -> None:
    saved(folder, *range(1, keep + 1), keep=keep)


def _go_on(folder: Path, *, keep: int) -> None:
    saved(folder, *range(keep + 1, keep + 4), keep=keep)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("most", [20, pytest.param(None, marks=pytest.mark.soak)])
@pytest.mark.parametrize("keep", [1, 2])
def test_there_is_a_whole_checkpoint_wherever_saving_and_removing_die(
    tmp_path: Path, keep: int, most: int | None, measured: Measured
) -> None:
    act, prepare = partial(_go_on, keep=keep), partial(_begin, keep=keep)
    found = crash(act, tmp_path, prepare=prepare, most=most, again=False)
    steps = []
    for death in found.deaths:
        kept, told = loaded(death.place)
        assert kept is not None
        assert not told
        assert kept.values == {"rows": kept.step}
        assert torch.equal(kept.tensors["model"]["w"], torch.full((9,), float(kept.step)))
        steps.append(kept.step)
        with storage.lock(death.place):
            assert len([name for name in names(death.place) if name != ".lock"]) <= keep + 1
    assert steps == sorted(steps)
    assert set(steps) == set(range(keep, keep + 4))
    assert names(found.whole) == [f"step-{step:08d}" for step in (keep + 2, keep + 3)[-keep:]]
    count = len(found.deaths)
    measured(
        f"death between every two steps of saving and removing, {keep} kept",
        f"{count} of {count} times a whole checkpoint",
    )


@pytest.mark.promise("R3")
def test_nothing_is_removed_before_the_new_one_was_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    write_folder = storage.write_folder

    def rotten(path: Path, files: dict[str, bytes]) -> None:
        write_folder(path, files)
        flip(path / "model.safetensors", -1)

    saved(tmp_path, 1, 2)
    monkeypatch.setattr(storage, "write_folder", rotten)
    with pytest.raises(DamagedError, match=r"step-00000003/model.safetensors: .* read back; older"):
        saved(tmp_path, 3)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    found, told = loaded(tmp_path)
    assert found is not None
    assert found.step == 2
    assert len(told) == 1
    measured("a disk that keeps another byte than was written", "said, and older ones are kept")


@pytest.mark.promise("R3")
@pytest.mark.parametrize("rotten", [(3,), (2,), (2, 3)], ids=str)
def test_damage_of_those_that_are_kept_does_not_cost_the_last_good_one(
    tmp_path: Path, rotten: tuple[int, ...], measured: Measured
) -> None:
    saved(tmp_path, 1, 2, 3)
    for step in rotten:
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors", -1)
    saved(tmp_path, 4)
    found, told = loaded(tmp_path)
    assert found is not None
    assert (found.step, told) == (4, [])
    assert len(names(tmp_path)) == 2
    measured(f"bit rot in {len(rotten)} of 2 that are kept, then a save", "a whole one is there")


def test_one_that_cannot_be_set_aside_is_never_kept_in_place_of_the_new_one(tmp_path: Path) -> None:
    """It stays, damaged, and has the higher number."""
    saved(tmp_path, 5, keep=1)
    flip(tmp_path / "step-00000005" / "model.safetensors", -1)
    saved(tmp_path, 3, keep=1)
    checkpoint.KEEP = 2
    found, _ = loaded(tmp_path)
    assert found is not None
    assert found.step == 3


def test_the_same_step_is_kept_if_it_is_whole_and_written_again_if_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "step-00000001" / "model.safetensors"
    before = file.stat().st_ino
    saved(tmp_path, 1)
    assert file.stat().st_ino == before
    flip(file, -1)
    saved(tmp_path, 1)
    assert "step-00000001 is damaged, set aside and written again: " in capsys.readouterr().err
    found, told = loaded(tmp_path)
    assert found is not None
    assert not told
    assert names(tmp_path) == ["step-00000001", "step-00000001.damaged"]


def _save_as_nobody(place: Path, said: Path) -> None:
    # Once before, for what is imported by it: nobody may not read every environment.
    before = place.with_name("before")
    before.mkdir()
    saved(before, 1)
    with said.open("w") as told:
        if os.getuid() == 0:  # whom no mode hinders
            os.setuid(65534)
        checkpoint.save(place, state(3), identity={}, warn=told.write)


@pytest.mark.promise("R3")
def test_an_older_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, measured: Measured
) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    saved(place, 1, 2)
    for folder in (*tmp_path.parents[:3], tmp_path):
        folder.chmod(folder.stat().st_mode | 0o055)
    place.chmod(0o777)
    for path in place.iterdir():
        path.chmod(0o555)
    process = processes.context.Process(target=_save_as_nobody, args=(place, tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "said").read_text() == (
        f"{place}/step-00000001: cannot be removed: permission denied; the run goes on, and it "
        "stays there"
    )
    for step in (1, 2, 3):
        storage.check_folder(place / f"step-{step:08d}")
    measured("an older one that may not be removed", "a warning, it stays whole, the run goes on")


def test_names_are_numbers_and_others_are_nobodys_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 99_999_999, 100_000_000)
    for name in ("step-mine", "step-00000001.bak", "step-"):
        (tmp_path / name).mkdir()
    saved(tmp_path, 100_000_001)
    assert names(tmp_path) == [
        *("step-", "step-00000001.bak", "step-100000000", "step-100000001", "step-mine")
    ]


def _falls_back(folder: Path) -> None:
    found, _ = loaded(folder)
    assert found is not None
    assert found.step == 1


def test_two_processes_of_a_run_may_set_the_same_one_aside(tmp_path: Path) -> None:
    for _ in range(5):
        saved(tmp_path, 1, 2)
        flip(tmp_path / "step-00000002" / "model.safetensors", -1)
        both = [processes.context.Process(target=_falls_back, args=(tmp_path,)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two checkpoints."""
    from tests.engine.conftest import STUDENT, TEACHER

    folder = tmp_path_factory.mktemp("run")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    recipe = Recipe.load(folder / "student.yaml", ["train.epochs=1"])
    train(recipe, folder / "run", checkpoint_seconds=0, workers=0)
    return folder / "run"


class Damaged:
    """A copy of a run's checkpoints, the newest of which is damaged and made whole again."""

    def __init__(self, run: Path, place: Path) -> None:
        shutil.copytree(run / "checkpoint", place)
        self.place = place
        self.older, self.newest = sorted(place.iterdir())
        self.identity = json.loads((self.newest / "state.json").read_text())["identity"]
        self.whole = {path.name: path.read_bytes() for path in self.newest.iterdir()}
        self.step = int(self.newest.name[5:])
        self.before = int(self.older.name[5:])

    def found(self, name: str, what: str) -> None:
        """That the damage of a file is said, and the checkpoint before is taken."""
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.engine.checkpoint.numerics", lambda *_: {"deterministic": False})
            loaded = checkpoint.load(self.place, identity=self.identity, warn=told.append)
        assert loaded is not None
        assert loaded.step == self.before
        first = told[0]
        assert first.startswith(f"{self.newest.name} is damaged and set aside: ")
        assert name in first
        assert what in first
        assert first.endswith(
            f"; going back to step {self.before}: {self.step - self.before} steps are trained again"
        )
        shutil.rmtree(self.place / f"{self.newest.name}.damaged")
        self.newest.mkdir()
        for each, data in self.whole.items():
            (self.newest / each).write_bytes(data)


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Damaged:
    return Damaged(run, tmp_path / "checkpoint")


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    "flips", [15, pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(
    damaged: Damaged, flips: int, measured: Measured
) -> None:
    draw = random.Random(flips)
    for name, data in damaged.whole.items():
        for _ in range(flips):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            (damaged.newest / name).write_bytes(flipped)
            if name == storage.MANIFEST:  # what it says wrongly of a file looks like damage of that
                damaged.found("", "")
            else:
                damaged.found(name, "its content changed after it was written")
    count = flips * len(damaged.whole)
    measured(
        "one flipped byte in each file of a run's checkpoint",
        f"{count} of {count} found, and the one before taken",
    )


@pytest.mark.promise("R4")
@pytest.mark.parametrize("cuts", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_a_file_that_is_cut_short_or_missing_is_found(
    damaged: Damaged, cuts: int, measured: Measured
) -> None:
    draw = random.Random(cuts)
    for name, data in damaged.whole.items():
        for size in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(cuts - 2))]:
            (damaged.newest / name).write_bytes(data[:size])
            own = name != storage.MANIFEST
            damaged.found(name, f"{size} bytes, written were {len(data)}" if own else "changed")
        (damaged.newest / name).unlink()
        damaged.found(name, "No such file")
        (damaged.newest / name).unlink()
        (damaged.newest / name).mkdir()
        damaged.found(name, "is no plain file")
        (damaged.newest / name).unlink()
        (damaged.newest / name).symlink_to(damaged.older / name)
        damaged.found(name, "is a link")
    (damaged.newest / "notes.txt").write_text("of a user")
    storage.check_folder(damaged.newest)
    files = len(damaged.whole)
    count = files * (cuts + 3)
    measured("a file cut short, missing, or a folder or link in its place", f"{count} of {count}")


@pytest.mark.promise("R4")
@pytest.mark.parametrize("flips", [25, pytest.param(500, marks=pytest.mark.soak)])
def test_a_flipped_byte_of_result_or_recipe_is_a_sentence_or_harmless(
    run: Path, tmp_path: Path, flips: int, measured: Measured
) -> None:
    from distill.report import run as report

    place = tmp_path / "run"
    shutil.copytree(run, place)

    def whole() -> None:
        found = Run(place).finished()
        assert found is not None
        found.to_json()

    def recipe() -> None:
        Recipe.load(place / "recipe.yaml").identity()

    def page() -> None:
        (place / "report.html").unlink(missing_ok=True)
        report.write(place)

    readers: dict[str, list[Callable[[], None]]] = {
        "result.json": [whole, page],
        "recipe.yaml": [recipe, page],
    }
    draw, refused = random.Random(flips), list[str]()
    for name, reads in readers.items():
        data = (place / name).read_bytes()
        for _ in range(flips):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            (place / name).write_bytes(flipped)
            for read in reads:
                try:
                    read()
                except DistillError as error:
                    refused.append(str(error))
        (place / name).write_bytes(data)
    assert all(str(place) in text for text in refused)
    assert len(refused) > flips
    measured(
        "one flipped byte in result.json and recipe.yaml",
        f"{2 * flips} of {2 * flips} without a traceback",
    )


@pytest.mark.soak
@pytest.mark.promise("R3")
def test_what_reading_back_costs(tmp_path: Path, measured: Measured) -> None:
    for megabytes in (25, 500):
        files = {"model.safetensors": os.urandom(2**20) * megabytes}
        began = time.perf_counter()
        storage.write_folder(tmp_path / "step", files)
        written = time.perf_counter()
        storage.check_folder(tmp_path / "step")
        checked = time.perf_counter()
        shutil.rmtree(tmp_path / "step")
        measured(
            f"reading a checkpoint of {megabytes} MB back before an older one is removed",
            f"{1000 * (checked - written):.0f} ms, writing it takes "
            f"{1000 * (written - began):.0f} ms",
        )

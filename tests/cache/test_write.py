"""Any number of writers, killed at any moment, leave one and the same cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from distill import storage
from distill.cache import layout, verify, write
from distill.cache.layout import CANARIES, INDEX, MANIFEST, SAMPLES, Column, Manifest, Unit
from distill.cache.store import Folder, Store
from distill.cache.write import Writer
from distill.errors import DamagedError, IdentityError, PreflightError
from tests.cache import made


def test_a_cache_begins_with_what_it_is_made_from(store: Store) -> None:
    wanted = made.manifest()
    assert write.read_manifest(store) is None
    assert made.begin(store, wanted) == wanted
    assert write.read_manifest(store) == wanted
    assert made.content(store) == {
        MANIFEST: layout.seal(wanted),
        SAMPLES: made.samples_file(5),
        CANARIES: made.CANARIES,
    }


def test_to_begin_again_from_the_same_changes_nothing(store: Store) -> None:
    there = made.complete(store, made.manifest())
    before = made.content(store)
    assert made.begin(store, made.manifest()) == there
    # What is known of a teacher, and how a cache is cut, are no part of its identity.
    other = made.manifest(unit_rows=4).model_copy(update={"about": {"model": "renamed"}})
    assert made.begin(store, other) == there
    assert made.content(store) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "fp16"}, r"codec: 'int8' -> 'fp16'"),
        ({"precision": "bf16"}, r"precision: 'fp32' -> 'bf16'"),
        ({"precision": None}, r"precision: 'fp32' -> None"),
        ({"more": 1}, r"more: None -> 1"),
        (
            {"data": {"classes": "c1", "images": "d2", "mixed": None}},
            r"data\.images: 'd1' -> 'd2'",
        ),
        (
            {"teacher": {"weights": "ab" * 8, "shapes": [[3, 4], [6]]}},
            r"teacher\.shapes\.1\.0: 5 -> 6",
        ),
        (
            {"views": {"augment": [{"name": "crop", "padding": 5}], "mixup": 0.1, "seed": 1}},
            r"views\.augment\.0\.padding: 4 -> 5; views\.seed: 0 -> 1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_another_origin_is_named_and_nothing_is_written(
    store: Store, change: dict[str, Any], named: str
) -> None:
    made.complete(store, made.manifest())
    before = made.content(store)
    with pytest.raises(IdentityError, match=f"nothing was written: {named}$") as caught:
        made.begin(store, made.manifest(views=9, identity=change))
    assert str(caught.value).startswith(f"{store.origin}: made from something else")
    assert caught.value.exit_status == 4
    assert "--out" in caught.value.hint
    assert made.content(store) == before


def test_other_images_are_refused_and_nothing_is_written(store: Store) -> None:
    made.begin(store, made.manifest())
    before = made.content(store)
    with pytest.raises(IdentityError, match="5 other training images than these 4") as caught:
        made.begin(store, made.manifest(samples=4, views=9))
    assert caught.value.exit_status == 4
    assert made.content(store) == before


def test_views_are_added_and_never_taken_away(store: Store) -> None:
    few = made.complete(store, made.manifest(views=2))
    before = made.content(store)
    more = made.begin(store, made.manifest(views=4))
    assert more == few.model_copy(update={"views": 4})
    assert write.read_manifest(store) == more
    assert {unit.part for unit in write.missing(store, more)} == {"views/v0002", "views/v0003"}
    after = made.content(store)
    assert {name for name in before if before[name] != after[name]} == {MANIFEST}

    assert made.begin(store, made.manifest(views=1)) == more
    assert made.content(store) == after

    made.complete(store, made.manifest(views=1))
    assert write.missing(store, more) == []
    assert verify.full(store, more) == []
    index = write.read_index(store, more)
    assert index is not None
    assert index.views == 4
    assert len(index.units) == 10


def test_an_altered_manifest_is_no_reason_to_begin_anew(store: Store) -> None:
    made.begin(store, made.manifest())
    store.write(MANIFEST, made.flipped(layout.seal(made.manifest()), 100, 0))
    before = made.content(store)
    with pytest.raises(DamagedError, match=MANIFEST):
        made.begin(store, made.manifest())
    assert made.content(store) == before


def test_what_a_start_of_something_else_left_is_replaced(store: Store) -> None:
    """It was killed before it wrote its manifest, so there is no cache yet."""
    store.write(SAMPLES, made.samples_file(9))
    store.write(CANARIES, b"of another teacher")
    made.begin(store, made.manifest())
    assert store.read(SAMPLES) == made.samples_file(5)
    assert store.read(CANARIES) == made.CANARIES


@pytest.mark.parametrize("harm", [None, b"", made.flipped(made.samples_file(5), 150, 3)])
def test_the_list_of_samples_is_mended_by_the_next_start(store: Store, harm: bytes | None) -> None:
    there = made.complete(store, made.manifest())
    before = made.content(store)
    store.remove(SAMPLES)
    if harm is not None:
        store.write(SAMPLES, harm)
    assert [fault.name for fault in verify.full(store, there)] == [SAMPLES]
    made.begin(store, made.manifest())
    assert made.content(store) == before


def test_only_whole_units_are_there(store: Store) -> None:
    there = made.complete(store, made.manifest())
    units = there.units()
    assert write.missing(store, there) == []
    for unit in units:
        whole = store.read(unit.name)
        assert whole is not None
        for harm in (whole[:-1], whole + b"\0", whole[:9], b""):
            store.write(unit.name, harm)
            assert write.missing(store, there) == [unit]
        store.remove(unit.name)
        assert write.missing(store, there) == [unit]
        store.write(unit.name, whole)
    for unit in units[::2]:
        store.remove(unit.name)
    assert write.missing(store, there) == units[::2]
    assert write.missing(store, there, 1) == [
        unit for unit in units[::2] if "v0001" not in unit.part
    ]
    for unit in units:
        store.remove(unit.name)
    assert write.missing(store, there, 0) == there.units(0)
    assert write.missing(store, there) == units


def test_units_hold_what_they_were_given(store: Store) -> None:
    there = made.complete(store, made.manifest(samples=20, unit_rows=6))
    for unit in there.units():
        data = store.read(unit.name)
        assert data == write.encode(there, unit, made.unit_columns(there, unit))


def test_the_order_of_memory_does_not_matter() -> None:
    wide = (Column("feature/a", "F16", (4, 2, 3)), Column("q", "U8", (3,)))
    manifest = made.manifest(columns=wide, unit_rows=5)
    unit = manifest.units()[-1]
    columns = made.unit_columns(manifest, unit)
    data = write.encode(manifest, unit, columns)
    backwards = {name: np.asfortranarray(column) for name, column in reversed(columns.items())}
    assert write.encode(manifest, unit, backwards) == data
    strided = {name: np.repeat(column, 2, axis=0)[::2] for name, column in columns.items()}
    assert write.encode(manifest, unit, strided) == data


def _put_all(writer: Writer) -> None:
    for unit in writer.manifest.units():
        writer.put(unit, made.unit_columns(writer.manifest, unit))
    writer.close()


@pytest.mark.parametrize("wrong", ["rows", "width"])
def test_columns_of_another_shape_come_up(folder: Folder, wrong: str) -> None:
    there = made.begin(folder, made.manifest())
    unit = there.units()[-1]
    columns = made.unit_columns(there, unit)
    columns["q"] = columns["q"][:1] if wrong == "rows" else columns["q"].astype(np.float32)
    writer = Writer(folder, there)
    writer.put(unit, columns)
    with pytest.raises(AssertionError, match="name='q'"):
        writer.close()
    assert unit in write.missing(folder, there)


def test_an_error_comes_up_while_more_is_put(folder: Folder) -> None:
    there = made.begin(folder, made.manifest(views=20))
    (folder.path / "views").write_text("in the way")
    writer = Writer(folder, there)
    put: list[Unit] = []

    def put_all() -> None:
        for unit in there.units():
            writer.put(unit, made.unit_columns(there, unit))
            put.append(unit)

    with pytest.raises(PreflightError, match=r"views/v0000: .*: not a directory") as caught:
        put_all()
    assert caught.value.exit_status == 6
    assert len(put) < 8  # and not after all 42
    with pytest.raises(PreflightError):
        writer.close()
    assert {unit.part for unit in write.missing(folder, there, 0)} == set()


def test_the_last_error_comes_up_at_the_end(folder: Folder) -> None:
    there = made.begin(folder, made.manifest())
    (folder.path / "views").write_text("in the way")
    writer = Writer(folder, there)
    writer.put(there.units()[-1], made.unit_columns(there, there.units()[-1]))
    with pytest.raises(PreflightError, match="views"):
        writer.close()


def test_to_wait_is_to_have_written(folder: Folder) -> None:
    there = made.begin(folder, made.manifest())
    first, second, third = there.units()[:3]
    writer = Writer(folder, there)
    writer.put(first, made.unit_columns(there, first))
    writer.wait()
    assert first not in write.missing(folder, there)
    (folder.path / "val").write_text("in the way")
    writer.put(second, made.unit_columns(there, second))
    with pytest.raises(PreflightError, match="val"):
        writer.wait()
    (folder.path / "val").unlink()
    for unit in (second, third):  # one error does not end the writer
        writer.put(unit, made.unit_columns(there, unit))
    writer.wait()
    writer.close()
    assert write.missing(folder, there) == there.units()[3:]


def test_a_full_disk_costs_no_unit_that_is_there(small_disk: Path) -> None:
    folder = Folder(small_disk / "cache")
    there = made.begin(folder, made.manifest(samples=90_000, unit_rows=20_000, test=0, val=0))
    assert sum(map(there.size_of, there.units())) > 1_200_000
    with pytest.raises(PreflightError, match=r"no room for .* nothing was replaced") as caught:
        _put_all(Writer(folder, there))
    assert "goes on where it stopped" in caught.value.hint
    assert caught.value.exit_status == 6
    left = write.missing(folder, there)
    assert 0 < len(left) < 10
    assert write.finish(folder, there, {}) == left
    assert not list(folder.path.rglob(".*"))
    assert verify.full(folder, there) == []

    roomy = Folder(small_disk.parent / "roomy")
    shutil.copytree(folder.path, roomy.path)
    assert made.fill(roomy, there) == len(left)
    assert write.finish(roomy, there, {}) == []
    assert verify.full(roomy, there) == []


def test_a_disk_that_turned_read_only_is_a_sentence(small_disk: Path) -> None:
    folder = Folder(small_disk / "cache")
    there = made.begin(folder, made.manifest())
    before = made.tree(folder.path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    actions: list[Callable[[], object]] = [
        lambda: _put_all(Writer(folder, there)),
        lambda: made.begin(folder, made.manifest(views=9)),
        lambda: made.begin(folder.below("more"), made.manifest()),
        lambda: folder.write("views/v0000/x", b""),
        lambda: verify.repair(folder, [verify.Fault(SAMPLES, "")]),
    ]
    for action in actions:
        with pytest.raises(PreflightError, match=r"(?i)read-only file system"):
            action()
    assert made.tree(folder.path) == before


def test_a_folder_that_vanished_is_not_taken_for_complete(folder: Folder) -> None:
    there = made.complete(folder, made.manifest())
    shutil.rmtree(folder.path)
    _put_all(Writer(folder, there))
    assert write.missing(folder, there) == []
    with pytest.raises(DamagedError, match=f"{MANIFEST}: is missing"):
        write.finish(folder, there, made.SCORES)
    assert folder.read(INDEX) is None
    # To begin again needs no unit again.
    made.begin(folder, there)
    assert write.finish(folder, there, made.SCORES) == []
    assert verify.full(folder, there) == []


def test_the_index_comes_when_all_else_is_there(store: Store) -> None:
    there = made.begin(store, made.manifest())
    units = there.units()
    for done, unit in enumerate(units):
        assert write.finish(store, there, made.SCORES) == units[done:]
        assert write.read_index(store, there) is None
        store.write(unit.name, write.encode(there, unit, made.unit_columns(there, unit)))
    assert write.finish(store, there, made.SCORES) == []
    index = write.read_index(store, there)
    assert index is not None
    assert index.cache == there.id
    assert index.views == there.views
    assert index.scores == made.SCORES
    assert index.files == {
        name: f"{layout.checksum(store.read(name) or b''):08x}"
        for name in (MANIFEST, SAMPLES, CANARIES)
    }
    assert index.units == {
        unit.name: {
            name: f"{layout.checksum(column.tobytes()):08x}"
            for name, column in made.unit_columns(there, unit).items()
        }
        for unit in units
    }
    before = made.content(store)
    assert write.finish(store, there, made.SCORES) == []
    assert made.content(store) == before


def test_an_altered_header_is_not_indexed(store: Store) -> None:
    there = made.begin(store, made.manifest())
    made.fill(store, there)
    for unit in there.units():
        whole = store.read(unit.name)
        assert whole is not None
        store.write(unit.name, made.flipped(whole, 60, 1))
        with pytest.raises(DamagedError, match=unit.name) as caught:
            write.finish(store, there, made.SCORES)
        assert caught.value.exit_status == 5
        assert store.read(INDEX) is None
        store.write(unit.name, whole)


def test_an_index_of_another_cache_is_refused(store: Store) -> None:
    there = made.complete(store, made.manifest())
    other = made.manifest(identity={"precision": "bf16"})
    with pytest.raises(DamagedError, match="belongs to another cache"):
        write.read_index(store, other)
    assert write.read_index(store, there) is not None


def _alone(path: Path, wanted: Manifest) -> dict[str, bytes]:
    made.cache(path, wanted)
    return made.tree(path)


@pytest.mark.parametrize("writers", [2, 6])
def test_writers_that_race_leave_the_same_bytes(tmp_path: Path, writers: int) -> None:
    wanted = made.manifest(samples=23, unit_rows=4, views=3)
    start = Barrier(writers)

    def work(number: int) -> None:
        store = Folder(tmp_path / "raced")
        start.wait()
        there = made.begin(store, wanted)
        units = there.units()
        writer = Writer(store, there)
        # Each makes all, in an order of its own.
        for unit in np.random.default_rng(number).permutation(len(units)):
            writer.put(units[unit], made.unit_columns(there, units[unit]))
        writer.close()
        assert write.finish(store, there, made.SCORES) == []

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    assert made.tree(tmp_path / "raced") == _alone(tmp_path / "alone", wanted)


def test_writers_that_share_the_work_leave_the_same_bytes(tmp_path: Path) -> None:
    """Whoever comes last marks the cache as complete."""
    wanted, store = made.manifest(samples=23, unit_rows=4, views=3), Folder(tmp_path / "shared")
    for part in (2, 0, 1):
        there = made.begin(store, wanted)
        with made.writing(store, there) as writer:
            for unit in there.units()[part::3]:
                writer.put(unit, made.unit_columns(there, unit))
        left = write.finish(store, there, made.SCORES)
        assert (left == []) == (part == 1)
    assert made.tree(store.path) == _alone(tmp_path / "alone", wanted)


def test_a_writer_sweeps_what_nobody_writes_any_more(folder: Folder) -> None:
    there = made.complete(folder, made.manifest())
    whole = made.tree(folder.path)
    view = folder.path / "views/v0000"
    orphan, young = view / ".u00000.safetensors.12.ab.tmp", view / ".u00001.safetensors.12.ab.tmp"
    begun = folder.path / ".manifest.json.12.ab.tmp"
    kept = [view / "u00000.tmp", folder.path / ".notes"]
    hour = 3600.0
    for path, age in [(orphan, hour + 60), (young, hour - 60), (begun, hour * 100)]:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    for path in kept:
        path.write_bytes(b"a user's")
        os.utime(path, (time.time() - hour * 100,) * 2)
    Writer(folder, there).close()
    assert not orphan.exists()
    assert not begun.exists()
    assert young.exists()
    for path in (young, *kept):
        path.unlink()
    assert made.tree(folder.path) == whole


def test_half_written_files_are_no_units(folder: Folder) -> None:
    there = made.begin(folder, made.manifest())
    unit = there.units()[0]
    path = folder.path / unit.name
    path.parent.mkdir()
    storage.write(path.with_name(f".{path.name}.1.ab.tmp"), bytes(there.size_of(unit)))
    assert unit in write.missing(folder, there)
    assert set(folder.sizes()) == {MANIFEST, SAMPLES, CANARIES}

"""No byte of a cache changes unseen, and what is bad is made again without the rest."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.numpy import load

from distill.cache import layout, verify, write
from distill.cache.layout import CANARIES, INDEX, MANIFEST, SAMPLES, Manifest
from distill.cache.read import Reader
from distill.cache.store import Folder, Store
from distill.cache.verify import Fault, Progress
from distill.errors import DamagedError
from tests.cache import made
from tests.promises import Measured

Look = Callable[[Store, Manifest], list[Fault]]
looks = pytest.mark.parametrize("look", [verify.quick, verify.full])

# Few bytes, for every one of them is flipped: three units of two columns.
SMALL = made.manifest(samples=3, unit_rows=2, views=1, test=1, val=0, codec="fp16", num_classes=2)


def named(faults: list[Fault]) -> list[str]:
    return [fault.name for fault in faults]


@looks
def test_a_sound_cache_has_no_faults(store: Store, look: Look) -> None:
    assert look(store, made.complete(store, made.manifest())) == []


@pytest.mark.promise("R18")
def test_every_flipped_byte_of_every_file_is_found(folder: Folder, measured: Measured) -> None:
    there = made.complete(folder, SMALL)
    names = [MANIFEST, SAMPLES, CANARIES, INDEX, *(unit.name for unit in there.units())]
    assert set(folder.sizes()) == set(names)
    found = 0
    for name in names:
        path = folder.path / name
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(made.flipped(whole, position, position % 8))
            assert set(named(verify.full(folder, there))) == {name}, position
            found += 1
        path.write_bytes(whole)
    assert verify.full(folder, there) == []
    measured("a flipped bit in each byte of a small cache", f"{found:,} of {found:,} found")


@pytest.mark.promise("R18")
@pytest.mark.parametrize("flips", [40, pytest.param(500, marks=pytest.mark.soak)])
def test_a_flipped_bit_is_found_by_verify_and_by_training(
    folder: Folder, tmp_path: Path, flips: int, measured: Measured
) -> None:
    """Anywhere in a cache of many units; what a reader gives is as it was written, or nothing."""
    there = made.complete(folder, made.manifest(samples=600, unit_rows=256, views=2))
    names = sorted(folder.sizes())
    ids = load(made.samples_file(600, there.val))["train"]
    with closing(Reader(folder, there, num_views=2, scratch=tmp_path / "s")) as reader:
        expected = [reader.rows(ids, view) for view in range(2)]
    draw, heard = random.Random(flips), 0
    for flip in range(flips):
        name = draw.choice(names)
        path = folder.path / name
        whole = path.read_bytes()
        path.write_bytes(made.flipped(whole, draw.randrange(len(whole)), draw.randrange(8)))
        assert set(named(verify.full(folder, there))) == {name}
        try:
            known = write.read_manifest(folder)
            assert known == there
            write.read_index(folder, there)
            with closing(
                Reader(folder, there, num_views=2, scratch=tmp_path / f"{flip}")
            ) as reader:
                for view in range(2):
                    assert made.same(reader.rows(ids, view), expected[view])
            assert not name.startswith(("views", MANIFEST, INDEX, SAMPLES))
        except DamagedError:
            heard += 1
        path.write_bytes(whole)
    measured("a flipped bit anywhere in a cache", f"{flips} of {flips} found; {heard} by training")


@pytest.mark.parametrize(
    "name", [MANIFEST, SAMPLES, CANARIES, INDEX, *(unit.name for unit in SMALL.units())]
)
def test_every_length_of_every_file_but_its_own_is_found(folder: Folder, name: str) -> None:
    there = made.complete(folder, SMALL)
    path = folder.path / name
    whole = path.read_bytes()
    for shown in (*(whole[:length] for length in range(len(whole))), whole + b" ", whole * 2):
        path.write_bytes(shown)
        assert named(verify.full(folder, there)) == [name], len(shown)
    path.write_bytes(whole)
    assert verify.full(folder, there) == []


def test_quick_finds_every_length_and_every_flipped_byte_of_a_header(folder: Folder) -> None:
    there = made.complete(folder, SMALL)
    unit = there.units()[-1]
    path = folder.path / unit.name
    whole = path.read_bytes()
    header = len(there.header(unit, {"lse": 0, "logp": 0}))
    for position in range(header):
        path.write_bytes(made.flipped(whole, position, position % 8))
        assert named(verify.quick(folder, there)) == [unit.name], position
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert named(verify.quick(folder, there)) == [unit.name], length


def test_units_and_samples_are_vouched_for_before_there_is_an_index(folder: Folder) -> None:
    there = made.begin(folder, SMALL)
    made.fill(folder, there)
    for name in (there.units()[-1].name, SAMPLES):
        path = folder.path / name
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(made.flipped(whole, position, position % 8))
            assert set(named(verify.full(folder, there))) == {name}, position
        path.write_bytes(whole)


@looks
def test_a_unit_that_is_still_to_be_made_is_no_fault(store: Store, look: Look) -> None:
    there = made.begin(store, made.manifest())
    assert look(store, there) == []
    made.fill(store, there)
    for unit in there.units()[::2]:
        store.remove(unit.name)
    assert look(store, there) == []


@looks
def test_a_unit_that_is_missing_from_a_complete_cache_is_a_fault(store: Store, look: Look) -> None:
    there = made.complete(store, made.manifest())
    unit = there.units()[3]
    store.remove(unit.name)
    assert look(store, there) == [Fault(unit.name, "is missing from a cache that was complete")]


@looks
def test_views_that_were_added_are_still_to_be_made(store: Store, look: Look) -> None:
    made.complete(store, made.manifest(views=1))
    there = made.begin(store, made.manifest(views=3))
    assert look(store, there) == []
    made.fill(store, there)
    assert look(store, there) == []
    store.remove(there.units()[-1].name)
    assert look(store, there) == []
    assert write.finish(store, there, made.SCORES) == [there.units()[-1]]


@looks
@pytest.mark.parametrize("name", [MANIFEST, SAMPLES, CANARIES])
def test_what_every_cache_begins_with_must_be_there(store: Store, look: Look, name: str) -> None:
    there = made.begin(store, made.manifest())
    store.remove(name)
    assert look(store, there) == [Fault(name, "is missing")]


@looks
@pytest.mark.parametrize(
    "name",
    [
        "views/v0000/u00002.safetensors",  # of a cache that was cut otherwise
        "views/v0002/u00000.safetensors",  # of a view too many
        "views/v0000/notes.txt",
        "views/notes",
        "test/u00001.safetensors",
        "val/u99999.safetensors",
    ],
)
def test_a_file_among_the_units_that_is_none_is_found(store: Store, look: Look, name: str) -> None:
    there = made.complete(store, made.manifest())
    store.write(name, b"whatever it is")
    assert look(store, there) == [Fault(name, "is no part of this cache")]


@looks
def test_a_users_own_files_beside_the_units_are_no_fault(store: Store, look: Look) -> None:
    there = made.complete(store, made.manifest())
    for name in ("README.txt", "log/slurm-1.out"):
        store.write(name, b"of mine")
    assert look(store, there) == []


@looks
@pytest.mark.promise("R18")
def test_units_of_another_cache_are_found(store: Store, look: Look, measured: Measured) -> None:
    """They have the same name and the same size, and every checksum in them is right."""
    there = made.complete(store, made.manifest())
    other = made.manifest(identity={"teacher": {"weights": "cd" * 8}})
    for unit in there.units():
        whole = store.read(unit.name)
        assert whole is not None
        store.write(unit.name, write.encode(other, unit, made.unit_columns(there, unit)))
        assert look(store, there) == [Fault(unit.name, "its header belongs to another cache")]
        store.write(unit.name, whole)
    count = len(there.units())
    measured("a unit of another teacher's cache in its place", f"{count} of {count} found")


@looks
def test_units_in_the_place_of_others_are_found(store: Store, look: Look) -> None:
    there = made.complete(store, made.manifest())
    first, second = "views/v0000/u00000.safetensors", "views/v0001/u00000.safetensors"
    one, other = store.read(first), store.read(second)
    assert one is not None
    assert other is not None
    store.write(first, other)
    store.write(second, one)
    assert look(store, there) == [Fault(name, "its header is altered") for name in (first, second)]


@looks
def test_other_answers_than_those_that_were_indexed_are_found(store: Store, look: Look) -> None:
    """A unit that is right by itself: of the same teacher, and of another day."""
    there = made.complete(store, made.manifest())
    unit = there.units()[-1]
    columns = made.unit_columns(there, unit)
    columns["q"] = columns["q"] ^ 1
    store.write(unit.name, write.encode(there, unit, columns))
    assert look(store, there) == [Fault(unit.name, "is not the one that the index names")]


@looks
def test_an_index_of_another_cache_is_found(store: Store, look: Look) -> None:
    made.complete(store, made.manifest(identity={"precision": "bf16"}))
    foreign = store.read(INDEX)
    assert foreign is not None
    for name in made.content(store):
        store.remove(name)
    there = made.complete(store, made.manifest())
    store.write(INDEX, foreign)
    assert look(store, there) == [Fault(INDEX, "index.json belongs to another cache")]
    verify.repair(store, look(store, there))
    assert write.finish(store, there, made.SCORES) == []
    assert look(store, there) == []


def test_a_fault_says_what_it_is(store: Store) -> None:
    there = made.complete(store, made.manifest())
    unit = there.units()[-1]
    whole = store.read(unit.name)
    assert whole is not None
    size = len(whole)
    for harm, what in [
        (whole[:-1], f"has {size - 1} bytes, written were {size}"),
        (b"", f"has 0 bytes, written were {size}"),
        (made.flipped(whole, size - 1, 3), "the content of q changed after it was written"),
        (bytes(size), "its header is no header of a unit"),
    ]:
        store.write(unit.name, harm)
        assert Fault(unit.name, what) in verify.full(store, there)
    store.write(unit.name, whole)
    store.write(INDEX, b"{}")
    assert verify.full(store, there) == [Fault(INDEX, "its content changed after it was written")]


@pytest.mark.parametrize("seed", range(8))
def test_what_was_repaired_is_made_again_to_the_byte(store: Store, seed: int) -> None:
    there = made.complete(store, made.manifest(samples=11, unit_rows=2, views=2))
    before, draw = made.content(store), random.Random(seed)
    units = [unit.name for unit in there.units()]
    bad = draw.sample(units, draw.randrange(1, 6))
    for name in bad:
        whole = before[name]
        harm = draw.choice([whole[: draw.randrange(len(whole))], whole * 2, None, bytes(200)])
        if harm is None:
            harm = made.flipped(whole, draw.randrange(len(whole)), draw.randrange(8))
        store.write(name, harm)
    foreign = "views/v0000/u09999.safetensors"
    store.write(foreign, b"?")
    faults = verify.full(store, there)
    assert set(named(faults)) == {*bad, foreign}

    verify.repair(store, faults)
    kept = set(before) - {*bad, INDEX}
    assert made.content(store) == {name: before[name] for name in sorted(kept)}
    assert [unit.name for unit in write.missing(store, there)] == [n for n in units if n in bad]
    assert verify.full(store, there) == []

    made.complete(store, there)
    assert made.content(store) == before


@pytest.mark.parametrize("name", [MANIFEST, SAMPLES, CANARIES, INDEX])
def test_repair_removes_what_the_next_writer_makes_again(store: Store, name: str) -> None:
    """The manifest says what that is, and the samples are put right in their place."""
    there = made.complete(store, made.manifest())
    before = made.content(store)
    store.write(name, made.flipped(before[name], 40, 4))
    verify.repair(store, verify.full(store, there))
    again = {INDEX} | ({CANARIES} & {name})
    assert set(made.content(store)) == set(before) - again


def test_to_repair_what_is_sound_changes_nothing(store: Store) -> None:
    there = made.complete(store, made.manifest())
    before = made.content(store)
    verify.repair(store, verify.full(store, there))
    assert made.content(store) == before


def test_the_manifest_is_checked_before_it_is_believed(folder: Folder) -> None:
    made.complete(folder, SMALL)
    path = folder.path / MANIFEST
    path.write_bytes(made.flipped(path.read_bytes(), 200, 2))
    with pytest.raises(DamagedError, match=MANIFEST) as caught:
        write.read_manifest(folder)
    assert caught.value.exit_status == 5
    path.write_bytes(layout.seal(made.manifest(identity={"precision": "bf16"})))
    assert MANIFEST in named(verify.full(folder, SMALL))


def test_progress_counts_whole_units(store: Store) -> None:
    there = made.begin(store, made.manifest(samples=7, unit_rows=3, views=2, test=3))
    nothing = [
        Progress("test", 0, 2),
        Progress("val", 0, 1),
        Progress("views/v0000", 0, 3),
        Progress("views/v0001", 0, 3),
    ]
    assert verify.progress(store, there) == nothing
    made.fill(store, there)
    assert verify.progress(store, there) == [each._replace(done=each.total) for each in nothing]
    store.remove("views/v0001/u00001.safetensors")
    store.write("views/v0001/u00002.safetensors", b"cut")
    assert verify.progress(store, there)[-1] == Progress("views/v0001", 1, 3)


def test_a_cache_is_read_where_it_was_copied_to(folder: Folder, tmp_path: Path) -> None:
    """Nothing in it says where it lies."""
    there = made.complete(folder, made.manifest())
    folder.path.rename(tmp_path / "elsewhere")
    assert verify.full(Folder(tmp_path / "elsewhere"), there) == []

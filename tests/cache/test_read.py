"""What training reads is what was written, or nothing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from safetensors.numpy import save

from distill.cache import read, verify, write
from distill.cache.layout import CANARIES, SAMPLES, Column, Manifest
from distill.cache.read import Reader
from distill.cache.store import Folder, Store, open_store
from distill.errors import DamagedError, IdentityError, IncompleteError
from tests.cache import made

MIXED = (  # numbers of every width
    Column("id", "I64", ()),
    Column("lse", "F32", ()),
    Column("far", "U32", (2,)),
    Column("near", "U16", (3,)),
    Column("feature/a", "F16", (2, 2, 1)),
    Column("q", "U8", (5,)),
)


@contextmanager
def reading(
    store: Store, manifest: Manifest, scratch: Path | None = None, **options: Any
) -> Iterator[Reader]:
    options = {"num_views": manifest.views} | options
    reader = Reader(store, manifest, scratch=scratch, **options)
    try:
        yield reader
    finally:
        reader.close()


def written(manifest: Manifest, positions: ndarray, view: int) -> dict[str, ndarray]:
    whole = made.view_columns(manifest, view)
    return {name: column[positions] for name, column in whole.items()}


def train_ids(manifest: Manifest) -> ndarray:
    return made.ids(manifest.samples, manifest.val)[0]


@given(
    samples=st.integers(1, 40),
    unit_rows=st.integers(1, 45),
    views=st.integers(1, 3),
    codec=st.sampled_from(["int8", "fp16", "topk:2", None]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_rows_are_those_that_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    samples: int,
    unit_rows: int,
    views: int,
    codec: str | None,
    data: st.DataObject,
) -> None:
    """In any order, more than once, or none: of one unit or of many."""
    manifest = made.manifest(
        samples=samples,
        unit_rows=unit_rows,
        views=views,
        codec=codec or "int8",
        columns=None if codec else MIXED,
    )
    store, _ = made.cache(tmp_path_factory.mktemp("cache"), manifest)
    ids = train_ids(manifest)
    with reading(store, manifest) as reader:
        assert reader.row_bytes == sum(
            column.nbytes // samples for column in made.view_columns(manifest, 0).values()
        )
        for _ in range(3):
            view = data.draw(st.integers(0, views - 1))
            batch = data.draw(st.lists(st.integers(0, samples - 1), max_size=12))
            positions = np.array(batch, np.int64)
            found = reader.rows(ids[positions], view)
            assert made.same(found, written(manifest, positions, view))


@pytest.mark.parametrize("unit_rows", [4, 100])
def test_a_whole_view_is_read_from_any_store(store: Store, tmp_path: Path, unit_rows: int) -> None:
    manifest = made.manifest(samples=30, unit_rows=unit_rows, views=5, columns=MIXED)
    made.complete(store, manifest)
    shuffled = np.random.default_rng(0).permutation(30)
    with reading(store, manifest, tmp_path / "scratch") as reader:
        for view in (0, 1, 2, 3, 4, 0, 3, 1):
            found = reader.rows(train_ids(manifest)[shuffled], view)
            assert made.same(found, written(manifest, shuffled, view))


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_views_come_in_turn(folder: Folder, num_views: int) -> None:
    """Each is read for some steps; those that are not asked for need not be there."""
    manifest = made.manifest(samples=30, unit_rows=7, views=4)
    made.complete(folder, manifest)
    for unit in manifest.units()[len(manifest.units(num_views)) :]:
        (folder.path / unit.name).write_bytes(b"not looked at")
    draw = np.random.default_rng(0)
    with reading(folder, manifest, num_views=num_views) as reader:
        for epoch in range(7):
            for _ in range(3):
                positions = draw.integers(30, size=8)
                found = reader.rows(train_ids(manifest)[positions], epoch % num_views)
                assert made.same(found, written(manifest, positions, epoch % num_views))


def test_views_that_are_not_asked_for_are_not_fetched(tmp_path: Path) -> None:
    store = open_store(f"memory://bucket-{secrets.token_hex(8)}/cache")
    manifest = made.complete(store, made.manifest(views=3))
    with reading(store, manifest, tmp_path, num_views=2) as reader:
        for view in (0, 1, 0, 1):
            reader.rows(train_ids(manifest), view)
    assert {path.name for path in (tmp_path / "views").iterdir()} == {"v0000", "v0001"}


def test_rows_are_the_callers_own(folder: Folder) -> None:
    manifest = made.manifest(unit_rows=2)
    made.complete(folder, manifest)
    ids, all_rows = train_ids(manifest), np.arange(5)
    with reading(folder, manifest) as reader:
        for column in reader.rows(ids, 0).values():
            column[:] = 0
        assert made.same(reader.rows(ids, 0), written(manifest, all_rows, 0))
    assert verify.full(folder, manifest) == []


def test_an_open_view_outlives_its_files(folder: Folder) -> None:
    """What removes and makes a unit again does not disturb who reads it."""
    manifest = made.manifest(unit_rows=2)
    made.complete(folder, manifest)
    ids = train_ids(manifest)
    with reading(folder, manifest, num_views=1) as reader:
        reader.rows(ids, 0)
        for unit in manifest.units(1):
            columns = made.unit_columns(manifest, unit)
            other = {name: np.zeros_like(column) for name, column in columns.items()}
            folder.write(unit.name, write.encode(manifest, unit, other))
        assert made.same(reader.rows(ids, 0), written(manifest, np.arange(5), 0))
        for unit in manifest.units(1):
            folder.remove(unit.name)
        assert made.same(reader.rows(ids, 0), written(manifest, np.arange(5), 0))


def _is_refused(folder: Folder, manifest: Manifest, unit_name: str) -> None:
    """View 0 is read, with view 1 opened behind the scenes; view 1 is refused, again and again."""
    ids = train_ids(manifest)
    with reading(folder, manifest) as reader:
        for _ in range(2):
            assert made.same(reader.rows(ids, 0), written(manifest, np.arange(len(ids)), 0))
        for _ in range(2):
            with pytest.raises(DamagedError, match=unit_name):
                reader.rows(ids[:1], 1)
        assert made.same(reader.rows(ids, 0), written(manifest, np.arange(len(ids)), 0))


def test_every_flipped_byte_is_refused_when_its_view_is_opened(folder: Folder) -> None:
    manifest = made.manifest(samples=3, unit_rows=2, views=2, num_classes=2)
    made.complete(folder, manifest)
    unit = manifest.units()[-1]
    path = folder.path / unit.name
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(made.flipped(whole, position, position % 8))
        _is_refused(folder, manifest, unit.name)
        if position % 40 == 0:
            with reading(folder, manifest) as reader, pytest.raises(DamagedError) as caught:
                reader.rows(train_ids(manifest), 1)  # at once, and not after view 0
            assert str(caught.value).startswith(f"{folder.path}/{unit.name}: ")
            assert "--verify full --repair" in caught.value.hint
            assert caught.value.exit_status == 5
    path.write_bytes(whole)
    with reading(folder, manifest) as reader:
        reader.rows(train_ids(manifest), 1)


def test_every_other_length_is_refused_when_its_view_is_opened(folder: Folder) -> None:
    manifest = made.manifest(samples=3, unit_rows=2, views=2, num_classes=2)
    made.complete(folder, manifest)
    unit = manifest.units()[-2]
    path = folder.path / unit.name
    whole = path.read_bytes()
    lengths = {*range(0, len(whole), 9), 1, 7, 8, len(whole) - 1}
    for shown in (*(whole[:length] for length in lengths), whole + b"\0", whole * 200):
        path.write_bytes(shown)
        _is_refused(folder, manifest, unit.name)
    path.unlink()
    _is_refused(folder, manifest, unit.name)


def test_a_unit_of_another_view_is_refused(folder: Folder) -> None:
    manifest = made.manifest(samples=3, unit_rows=2, views=2)
    made.complete(folder, manifest)
    other = folder.read("views/v0000/u00001.safetensors")
    assert other is not None
    folder.write("views/v0001/u00001.safetensors", other)
    _is_refused(folder, manifest, "views/v0001/u00001.safetensors")


def test_a_unit_that_is_bad_in_its_store_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = made.complete(store, made.manifest())
    unit = manifest.units()[-1]
    whole = store.read(unit.name)
    assert whole is not None
    ids = train_ids(manifest)
    for harm in (made.flipped(whole, len(whole) - 2, 5), whole[:-1], b"", None):
        store.remove(unit.name)
        if harm is not None:
            store.write(unit.name, harm)
        with reading(store, manifest, tmp_path / "scratch") as reader:
            reader.rows(ids, 0)
            with pytest.raises(DamagedError, match=f"{store.origin}/{unit.name}: "):
                reader.rows(ids, 1)
    store.write(unit.name, whole)
    with reading(store, manifest, tmp_path / "scratch") as reader:
        assert made.same(reader.rows(ids, 1), written(manifest, np.arange(5), 1))


def test_samples_that_the_cache_has_not_are_refused_and_not_guessed(folder: Folder) -> None:
    manifest = made.complete(folder, made.manifest(samples=9, unit_rows=2))
    ids = train_ids(manifest)
    with reading(folder, manifest) as reader:
        for stranger in (0, 5, 9, int(ids[-1]) + 1, 10**9):
            assert stranger not in ids
            with pytest.raises(IdentityError, match=f"no answers to sample {stranger}$"):
                reader.rows(np.array([ids[0], stranger, ids[1]]), 0)


def test_training_may_read_some_of_the_samples_but_no_others(folder: Folder) -> None:
    manifest = made.complete(folder, made.manifest(samples=9))
    ids = train_ids(manifest)
    strange = np.sort(np.append(ids[1:], 5))
    with reading(folder, manifest) as reader:
        for some in (ids, ids[::2], ids[:1], ids[-1:]):
            reader.require(some, exact=False)
        for some in (strange, np.array([0]), np.append(ids, 99)):
            with pytest.raises(
                IdentityError, match=r"9 training images, .* not among them"
            ) as caught:
                reader.require(some, exact=False)
            assert caught.value.exit_status == 4
            assert caught.value.hint == "mind data.fraction, data.val and data.seed"


def test_where_views_mix_samples_they_must_be_exactly_those(folder: Folder) -> None:
    manifest = made.complete(folder, made.manifest(samples=9))
    ids = train_ids(manifest)
    with reading(folder, manifest) as reader:
        reader.require(ids, exact=True)
        for some in (ids[:-1], ids[1:], np.append(ids, 99), np.append(ids[1:], 99)):
            with pytest.raises(
                IdentityError, match=f"these {len(some)} are not exactly them"
            ) as caught:
                reader.require(some, exact=True)
            assert caught.value.exit_status == 4
            assert "who is mixed with whom" in caught.value.hint


def test_ids_are_those_of_the_data(store: Store) -> None:
    manifest = made.complete(store, made.manifest(samples=9, val=3))
    train, val = made.ids(9, 3)
    assert made.same(read.samples(store), {"train": train, "val": val})
    with reading(store, manifest) as reader:
        assert np.array_equal(reader.ids, train)
    found = read.canaries(store, manifest)
    assert found["positions"].tolist() == [0, 3]
    assert found["pixels"].tolist() == [1, 2]


def test_no_altered_list_of_samples_is_read(folder: Folder) -> None:
    """One id that is another would pair a sample with the answers to its neighbour."""
    manifest = made.complete(folder, made.manifest())
    whole = made.samples_file(5)
    altered = [made.flipped(whole, position, position % 8) for position in range(len(whole))]
    altered += [whole[:length] for length in range(0, len(whole), 5)]
    altered.append(save({"train": np.arange(5), "val": np.array([7])}))
    for harm in altered:
        folder.write(SAMPLES, harm)
        with pytest.raises(DamagedError, match=SAMPLES) as caught:
            Reader(folder, manifest, num_views=2)
        assert caught.value.exit_status == 5


@pytest.mark.parametrize("name", [SAMPLES, CANARIES])
@pytest.mark.parametrize("harm", [None, b"", b"{}", made.CANARIES[:-1], b"\xff" * 99], ids=str)
def test_lists_that_are_no_lists_are_damage(store: Store, name: str, harm: bytes | None) -> None:
    manifest = made.complete(store, made.manifest())
    store.remove(name)
    if harm is not None:
        store.write(name, harm)
    look = read.samples if name == SAMPLES else partial(read.canaries, manifest=manifest)
    with pytest.raises(DamagedError, match=f"^{store.origin}/{name}: ") as caught:
        look(store)
    assert caught.value.exit_status == 5


@pytest.mark.parametrize("eval_rows", [2, 100])
def test_evaluation_logits_are_exact(store: Store, tmp_path: Path, eval_rows: int) -> None:
    logits = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    logits[:3] = [[0.1, -0.0, 1e-42], [3e38, -3e38, 1 / 3], [2**24 + 2, 1e-30, 0.0]]
    manifest = made.manifest(test=7, val=3).model_copy(update={"eval_rows": eval_rows})
    made.begin(store, manifest)
    with made.writing(store, manifest) as writer:
        for unit in manifest.units(0):
            whole = logits if unit.part == "test" else logits[2:5]
            writer.put(unit, {"logits": whole[unit.start : unit.start + unit.rows]})
    with reading(store, manifest, tmp_path / "scratch") as reader:
        test, val = reader.evaluation("test"), reader.evaluation("val")
    assert test.dtype == val.dtype == np.float32
    assert test.tobytes() == logits.tobytes()
    assert val.tobytes() == logits[2:5].tobytes()
    assert test.shape == (7, 3)
    assert val.shape == (3, 3)


def test_a_split_that_is_empty_has_no_logits(folder: Folder) -> None:
    manifest = made.complete(folder, made.manifest(val=0))
    with reading(folder, manifest) as reader:
        assert reader.evaluation("val").shape == (0, 3)
        assert reader.evaluation("val").dtype == np.float32


def test_every_flipped_byte_of_an_evaluation_unit_is_refused(folder: Folder) -> None:
    manifest = made.complete(folder, made.manifest(test=4))
    unit = manifest.units(0)[1]
    whole = folder.read(unit.name)
    assert whole is not None
    with reading(folder, manifest) as reader:
        for position in range(len(whole)):
            (folder.path / unit.name).write_bytes(made.flipped(whole, position, position % 8))
            with pytest.raises(DamagedError, match=unit.name):
                reader.evaluation("test")
        assert reader.evaluation("val").shape == (1, 3)


def test_a_view_that_is_still_being_made_is_not_touched(store: Store, tmp_path: Path) -> None:
    manifest = made.begin(store, made.manifest(views=3))
    ids = train_ids(manifest)

    def add(view: int) -> None:
        with made.writing(store, manifest) as writer:
            for unit in manifest.units():
                if unit.part == f"views/v{view:04d}":
                    writer.put(unit, made.unit_columns(manifest, unit))

    with reading(store, manifest, tmp_path / "scratch", partial=True) as reader:
        for view in range(3):
            assert not reader.complete(view)
            add(view)
            assert reader.complete(view)
            for _ in range(2):  # the next one is not there yet
                found = reader.rows(ids, view)
                assert made.same(found, written(manifest, np.arange(5), view))
        store.write(manifest.units()[-1].name, b"cut")
        assert not reader.complete(2)


def test_a_complete_cache_is_complete(store: Store) -> None:
    manifest = made.complete(store, made.manifest(views=3))
    for num_views in (1, 2, 3):
        read.require_complete(store, manifest, num_views)
        assert write.missing(store, manifest, num_views) == []


def test_too_few_views_are_a_sentence(store: Store) -> None:
    manifest = made.complete(store, made.manifest(views=3))
    with pytest.raises(IncompleteError) as caught:
        read.require_complete(store, manifest, 4)
    assert str(caught.value) == (f"{store.origin}: has 3 views of every image, the recipe reads 4")
    assert caught.value.exit_status == 3
    assert "--views 4" in caught.value.hint
    assert "cache.views=3" in caught.value.hint


def test_missing_units_are_a_sentence_that_names_the_first(store: Store) -> None:
    manifest = made.complete(store, made.manifest(views=3))
    first, second = "views/v0001/u00001.safetensors", "views/v0002/u00000.safetensors"
    store.remove(first)
    store.write(second, b"cut")
    read.require_complete(store, manifest, 1)  # enough for who reads no more
    for num_views, missing, units in ((2, 1, 6), (3, 2, 8)):
        with pytest.raises(IncompleteError) as caught:
            read.require_complete(store, manifest, num_views)
        assert str(caught.value) == (
            f"{store.origin}: {missing} of {units} units are still missing, the first is {first}"
        )
        assert caught.value.exit_status == 3
        assert "--status" in caught.value.hint
    store.remove("test/u00000.safetensors")
    with pytest.raises(IncompleteError, match="the first is test/u00000"):
        read.require_complete(store, manifest, 1)

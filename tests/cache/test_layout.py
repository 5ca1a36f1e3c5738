"""What a cache's files are called, how long they are, and how they vouch for themselves."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from distill.cache import layout, write
from distill.cache.layout import Column, Index, Manifest, Unit
from distill.errors import DamagedError, IdentityError
from tests.cache import made

CODECS = ("int8", "fp16", "topk:2", "topk:7")
MANIFEST = made.manifest()
INDEX = Index(
    cache=MANIFEST.id,
    views=2,
    files={"manifest.json": "0123abcd", "samples.safetensors": "00000000"},
    units={unit.name: {"q": "89abcdef", "top": "deadbeef"} for unit in MANIFEST.units()},
    scores=made.SCORES,
)

sealed = pytest.mark.parametrize(
    ("model", "read"),
    [(MANIFEST, layout.manifest), (INDEX, layout.index)],
    ids=["manifest", "index"],
)
Read = Callable[[bytes, str], BaseModel]


@sealed
def test_what_was_sealed_is_read_again(model: BaseModel, read: Read) -> None:
    data = layout.seal(model)
    assert read(data, "here") == model
    assert layout.seal(read(data, "here")) == data
    found = json.loads(data)  # and anyone can read it
    assert {**found, "crc32": ""} == {**model.model_dump(mode="json"), "crc32": ""}


@sealed
def test_every_flipped_bit_is_damage(model: BaseModel, read: Read) -> None:
    data = layout.seal(model)
    for position in range(len(data)):
        for bit in range(8):
            with pytest.raises(DamagedError, match=r"here/.*changed after it was written"):
                read(made.flipped(data, position, bit), "here")


@sealed
def test_every_length_but_its_own_is_damage(model: BaseModel, read: Read) -> None:
    data = layout.seal(model)
    for shown in (*(data[:length] for length in range(len(data))), data + b"\n", data * 2):
        with pytest.raises(DamagedError, match="changed after") as caught:
            read(shown, "here")
        assert caught.value.exit_status == 5


@sealed
@given(shown=st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@example(shown=b"[" * 100_000)
@example(shown=b'["crc32"]\n')
@example(shown=b'"crc32"\n')
@example(shown=b"null\n")
def test_no_other_bytes_are_taken_for_one(model: BaseModel, read: Read, shown: bytes) -> None:
    with pytest.raises(DamagedError):
        read(shown, "here")


def _resealed(data: dict[str, Any]) -> bytes:
    data.pop("crc32", None)
    whole = (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()
    data["crc32"] = f"{zlib.crc32(whole):08x}"
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()


@sealed
def test_a_newer_format_is_named_whatever_else_it_holds(model: BaseModel, read: Read) -> None:
    found = json.loads(layout.seal(model))
    assert _resealed(found) == layout.seal(model)
    newer = _resealed({**found, "format": 2, "compression": "of tomorrow"})
    with pytest.raises(IdentityError, match=r"newer version \(format 2, known is 1\)") as caught:
        read(newer, "here")
    assert caught.value.exit_status == 4
    assert caught.value.hint == "update distill: pip install --upgrade distill-kd"


@pytest.mark.parametrize(
    "change",
    [{"unit_rows": 0}, {"columns": 3}, {"columns": [["q", "U8"]]}, {"extra": 1}, {"format": "1"}],
    ids=str,
)
def test_a_sealed_manifest_of_another_shape_is_damage(change: dict[str, object]) -> None:
    found = json.loads(layout.seal(MANIFEST))
    with pytest.raises(DamagedError):
        layout.manifest(_resealed({**found, **change}), "here")


def test_a_manifest_and_an_index_are_not_taken_for_each_other() -> None:
    with pytest.raises(DamagedError):
        layout.manifest(layout.seal(INDEX), "here")
    with pytest.raises(DamagedError):
        layout.index(layout.seal(MANIFEST), "here")


def test_the_id_follows_from_the_identity_alone() -> None:
    text = json.dumps(MANIFEST.identity, sort_keys=True, indent=1) + "\n"
    assert MANIFEST.id == hashlib.sha256(text.encode()).hexdigest()
    assert made.manifest(samples=9, unit_rows=2, views=7, test=0, val=0).id == MANIFEST.id
    backwards = dict(reversed(MANIFEST.identity.items()))
    assert MANIFEST.model_copy(update={"identity": backwards}).id == MANIFEST.id
    assert made.manifest(identity={"precision": "bf16"}).id != MANIFEST.id


@given(
    samples=st.integers(1, 300),
    unit_rows=st.integers(1, 400),
    views=st.integers(1, 6),
    test=st.integers(0, 9),
    val=st.integers(0, 9),
)
@settings(deadline=None)
def test_units_cover_every_row_once(
    samples: int, unit_rows: int, views: int, test: int, val: int
) -> None:
    manifest = made.manifest(samples=samples, unit_rows=unit_rows, views=views, test=test, val=val)
    units = manifest.units()
    rows = [(unit.part, unit.start + row) for unit in units for row in range(unit.rows)]
    parts = {"test": test, "val": val, **{f"views/v{v:04d}": samples for v in range(views)}}
    assert rows == [(part, row) for part, count in parts.items() for row in range(count)]
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        of = manifest.eval_rows if unit.part in ("test", "val") else unit_rows
        assert unit.start == unit.block * of
        assert 1 <= unit.rows <= of
    # The first views of many are those of few, so that views can be added.
    for few in range(views):
        assert manifest.units(few) == units[: len(manifest.units(few))]
        assert manifest.units(few) == manifest.model_copy(update={"views": few}).units()


def test_names_never_change() -> None:
    """Caches on disk have them."""
    assert [unit.name for unit in MANIFEST.units()] == [
        "test/u00000.safetensors",
        "val/u00000.safetensors",
        "views/v0000/u00000.safetensors",
        "views/v0000/u00001.safetensors",
        "views/v0001/u00000.safetensors",
        "views/v0001/u00001.safetensors",
    ]


def test_a_unit_of_given_rows_is_a_file_of_given_bytes() -> None:
    """Writers of all versions must agree on them."""
    manifest = made.manifest(samples=1, views=1, unit_rows=1)
    unit = manifest.units()[-1]
    columns = {
        "scale": np.array([0.5], np.float16),
        "top": np.array([2.0], np.float16),
        "q": np.array([[0, 255, 7]], np.uint8),
    }
    data = write.encode(manifest, unit, columns)
    head = (
        '{"__metadata__": {"distill": "{\\"cache\\": \\"' + manifest.id + '\\", '
        '\\"crc32\\": {\\"q\\": \\"f201b1c3\\", \\"scale\\": \\"69dbaa61\\", '
        '\\"top\\": \\"3705536f\\"}, '
        '\\"unit\\": \\"views/v0000/u00000.safetensors\\"}"}, '
        '"scale": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}, '
        '"top": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}, '
        '"q": {"dtype": "U8", "shape": [1, 3], "data_offsets": [4, 7]}}'
    ).encode()
    head += b" " * (-len(head) % 8)
    assert data == len(head).to_bytes(8, "little") + head + b"\x00\x38\x00\x40\x00\xff\x07"


shapes = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 40),
        "unit_rows": st.integers(1, 50),
        "codec": st.sampled_from(CODECS),
        "num_classes": st.integers(2, 12),
    }
)


@given(shape=shapes)
@settings(deadline=None, max_examples=50)
def test_the_size_of_a_file_is_known_before_it_is_made(shape: dict[str, Any]) -> None:
    manifest = made.manifest(**shape)
    for unit in manifest.units():
        data = write.encode(manifest, unit, made.unit_columns(manifest, unit))
        assert len(data) == manifest.size_of(unit)


@given(shape=shapes)
@settings(deadline=None, max_examples=25)
def test_anyone_can_read_a_unit(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("unit") / "unit.safetensors"
    manifest = made.manifest(**shape)
    for unit in manifest.units(1):
        columns = made.unit_columns(manifest, unit)
        path.write_bytes(write.encode(manifest, unit, columns))
        with safetensors.safe_open(path, framework="numpy") as file:
            assert made.same({name: file.get_tensor(name) for name in file.keys()}, columns)  # noqa: SIM118
            about = json.loads(file.metadata()["distill"])
        assert about["cache"] == manifest.id
        assert about["unit"] == unit.name
        assert about["crc32"] == {
            name: f"{zlib.crc32(values.tobytes()):08x}" for name, values in columns.items()
        }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_classes", [2, 7, 1000, 70_000])
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_every_tensor_is_aligned(codec: str, num_classes: int, rows: int) -> None:
    manifest = made.manifest(samples=rows, unit_rows=rows, codec=codec, num_classes=num_classes)
    for unit in manifest.units():
        head = manifest.header(unit, dict.fromkeys("ab", 0))
        start = int.from_bytes(head[:8], "little") + 8
        assert start == len(head)
        tensors = json.loads(head[8:])
        del tensors["__metadata__"]
        offset = 0
        for column in manifest.columns_of(unit):
            first, end = tensors[column.name]["data_offsets"]
            assert first == offset
            assert (start + first) % column.width == 0
            assert end - first == unit.rows * column.row_bytes
            offset = end


def test_a_header_follows_from_the_checksums_alone() -> None:
    unit = MANIFEST.units()[-1]
    sums = {"scale": 1, "top": 2**32 - 1, "q": 0}
    head = MANIFEST.header(unit, sums)
    assert MANIFEST.header(unit, dict(reversed(sums.items()))) == head
    more = MANIFEST.model_copy(update={"views": 9, "about": {}})
    assert more.header(unit, sums) == head
    assert MANIFEST.checksums(unit, head) == sums
    assert MANIFEST.checksums(unit, head + b"content") == sums


def test_every_flipped_bit_of_a_header_is_damage_or_another_checksum() -> None:
    """A checksum that is altered cannot be known as such before it is compared."""
    unit = MANIFEST.units()[-1]
    sums = {"scale": 1, "top": 0xDEADBEEF, "q": 0xFEDC9876}
    head = MANIFEST.header(unit, sums)
    digits = {
        head.index(f'\\"{name}\\": \\"'.encode()) + len(name) + 8 + digit
        for name in sums
        for digit in range(8)
    }
    for position in range(len(head)):
        for bit in range(8):
            altered = made.flipped(head, position, bit)
            if position in digits and altered[position] in b"0123456789abcdef":
                found = MANIFEST.checksums(unit, altered)
                assert found.keys() == sums.keys()
                assert found != sums
                continue
            with pytest.raises(DamagedError, match=f"^{unit.name}: its header "):
                MANIFEST.checksums(unit, altered)
    for length in range(len(head)):
        with pytest.raises(DamagedError):
            MANIFEST.checksums(unit, head[:length])


@given(head=st.binary(max_size=200))
@example(head=(2**64 - 1).to_bytes(8, "little") + b"{}")
@example(head=(200_000).to_bytes(8, "little") + b"[" * 200_000)
@example(head=b"\x02" + bytes(7) + b"[]")
def test_no_other_bytes_are_taken_for_a_header(head: bytes) -> None:
    with pytest.raises(DamagedError, match="is no header of a unit"):
        MANIFEST.checksums(MANIFEST.units()[0], head)


@pytest.mark.parametrize("names", [("scale", "top"), ("scale", "top", "q", "more"), ()])
def test_a_header_without_a_checksum_of_each_column_is_damage(names: tuple[str, ...]) -> None:
    unit = MANIFEST.units()[-1]
    with pytest.raises(DamagedError, match=unit.name):
        MANIFEST.checksums(unit, MANIFEST.header(unit, dict.fromkeys(names, 5)))


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_checksum_of_another_width_is_damage(value: int) -> None:
    unit = MANIFEST.units()[-1]
    sums = {"scale": 1, "top": value, "q": 0}
    with pytest.raises(DamagedError):
        MANIFEST.checksums(unit, MANIFEST.header(unit, sums))


def test_headers_of_other_units_and_caches_are_told_apart() -> None:
    first, second = MANIFEST.units()[-2:]
    head = MANIFEST.header(second, {"scale": 1, "top": 2, "q": 3})
    with pytest.raises(DamagedError, match=f"{first.name}: its header is altered"):
        MANIFEST.checksums(first, head)
    for other in (
        made.manifest(identity={"precision": "bf16"}),
        made.manifest(num_classes=4, codec="fp16"),
    ):
        with pytest.raises(DamagedError, match="belongs to another cache"):
            other.checksums(second, head)
    recut = made.manifest(unit_rows=2).units()[-1]  # of another number of rows
    with pytest.raises(DamagedError, match="is altered"):
        made.manifest(unit_rows=2).checksums(recut, head)


@pytest.mark.parametrize(
    ("codec", "num_classes", "row_bytes"),
    [
        ("int8", 1000, 1004),
        ("int8", 2, 6),
        ("fp16", 1000, 2004),
        ("topk:100", 1000, 404),
        ("topk:10", 1000, 44),
        ("topk:100", 65_536, 404),
        ("topk:100", 65_537, 604),
        ("topk:100", 10, 44),  # of ten classes all are kept
    ],
)
def test_bytes_of_a_row(codec: str, num_classes: int, row_bytes: int) -> None:
    columns = layout.columns(codec, num_classes)
    assert sum(column.row_bytes for column in columns) == row_bytes
    assert [column.width for column in columns] == sorted(
        (column.width for column in columns), reverse=True
    )
    manifest = made.manifest(codec=codec, num_classes=num_classes)
    assert manifest.row_bytes == row_bytes
    assert manifest.codec == codec


def test_columns_never_change() -> None:
    """Caches on disk have them."""
    assert layout.columns("int8", 10) == (
        Column("scale", "F16", ()), Column("top", "F16", ()), Column("q", "U8", (10,)),
    )  # fmt: skip
    assert layout.columns("fp16", 10) == (Column("lse", "F32", ()), Column("logp", "F16", (10,)))
    assert layout.columns("topk:3", 10) == (
        Column("lse", "F32", ()), Column("ids", "U16", (3,)), Column("logp", "F16", (3,)),
    )  # fmt: skip


def test_auto_is_a_byte_a_class_up_to_4096_classes() -> None:
    assert layout.resolve("auto", 2) == layout.resolve("auto", 4096) == "int8"
    assert layout.resolve("auto", 4097) == layout.resolve("auto", 10**6) == "topk:100"
    for codec in CODECS:
        assert layout.resolve(codec, 10_000) == codec


@given(row_bytes=st.integers(1, 10**8), most=st.integers(1, 10**6))
def test_units_are_of_about_16_megabytes(row_bytes: int, most: int) -> None:
    rows = layout.rows_for(row_bytes, most)
    assert rows % 256 == 0
    assert 256 <= rows <= max(256, most)
    if rows > 256:
        assert rows * row_bytes <= 16_384_000
    # No fewer than could be.
    if rows + 256 <= min(most, 65_536):
        assert (rows + 256) * row_bytes > 16_384_000
    assert layout.rows_for(row_bytes) <= 65_536


def test_a_unit_of_imagenet_answers_has_16128_rows() -> None:
    assert layout.rows_for(1004) == 16_128
    assert layout.rows_for(4) == 65_536


def test_a_unit_names_its_file() -> None:
    assert Unit("views/v0012", 345, 0, 1).name == "views/v0012/u00345.safetensors"
    assert layout.view_part(7) == "views/v0007"
    assert layout.view_part(12_345) == "views/v12345"


def test_a_manifest_is_plain_data_whatever_its_identity_holds(tmp_path: Path) -> None:
    identity = {"none": None, "deep": {"é": ["ü", 1, 2.5, True, {"x": []}]}, "big": 2**63}
    manifest = made.manifest(identity=identity)
    (tmp_path / "manifest.json").write_bytes(layout.seal(manifest))
    found = layout.manifest((tmp_path / "manifest.json").read_bytes(), "here")
    assert isinstance(found, Manifest)
    assert found == manifest
    assert found.id == manifest.id

"""Tar shards: every image with its own class in any order, or a refusal that says where and why."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded as encode
from pictures import folder, photo
from shards import samples, shards, tar

from distill.data import datasets, encoded, images, tar_index
from distill.data._tar import Archive
from distill.data.datasets import Dataset, Source
from distill.data.loader import Loader
from distill.errors import DamagedError, DistillError, PreflightError
from distill.recipe import Data
from tests.promises import Measured

CROP = [{"name": "resized_crop"}]


def load(root: Path, **settings: object) -> Dataset:
    settings = {"name": "webdataset", "root": str(root), "image_size": 8} | settings
    return datasets.load(Data.model_validate(settings))


def listed(source: Source) -> list[str]:
    assert source.files is not None
    return [source.files.name(i) for i in range(len(source.files))]


def refusal(root: Path, **settings: object) -> str:
    with pytest.raises(DistillError) as error:
        load(root, **settings)
    return f"{type(error.value).__name__}: {error.value} {error.value.hint}"


def test_pixels_classes_and_order(tmp_path: Path) -> None:
    found = load(shards(tmp_path))
    assert found.classes == ("0", "1")
    assert found.train.labels.tolist() == [0, 1, 1, 0, 1, 0]
    assert found.test.labels.tolist() == [0, 1, 1, 0]
    names = [f"train-{i // 3}.tar/s{i:04d}" for i in range(6)]
    assert listed(found.train) == names
    expected = [images.evaluation_view(photo(20, 16, i), size=8, crop=1.0) for i in range(10)]
    assert np.array_equal(found.train.pixels, expected[:6])
    assert np.array_equal(found.test.pixels, expected[6:])
    in_files = load(tmp_path, augment=CROP)
    assert in_files.train.pixels is None
    assert in_files.train.files is not None
    for i in random.Random(0).sample(range(6), 6):
        image = encoded.decode(in_files.train.files, i, max_pixels=10**6)
        assert np.array_equal(np.array(image), np.array(photo(20, 16, i)))
    assert in_files.fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.tar", "test.tar"),
        ("train-000000.tar", "val-000000.tar"),
        ("set1k-train-0000.tar", "set1k-validation-0000.tar"),
        ("train/a.tar", "test/b.tar"),
        ("train/test-a.tar", "val/a.tar"),
        ("TRAIN_1.tar", "validation/a.tar"),
    ],
)
def test_where_shards_lie(tmp_path: Path, train: str, test: str) -> None:
    tar(tmp_path / train, samples(0, 0, 1))
    tar(tmp_path / test, samples(2, 1))
    found = load(tmp_path)
    assert listed(found.train) == [f"{train}/s0000", f"{train}/s0001"]
    assert listed(found.test) == [f"{test}/s0002"]


def test_the_test_split_comes_before_the_validation_split(tmp_path: Path) -> None:
    shards(tmp_path)
    tar(tmp_path / "val.tar", samples(90, 0, 1))
    assert listed(load(tmp_path).test)[0] == "test-0.tar/s0006"


def test_samples_are_what_shares_a_name_up_to_its_first_dot(tmp_path: Path) -> None:
    picture = encode(photo(20, 16), "JPEG")
    members = {
        "./a/x.1/one.cls": b" 1\n",
        "./a/x.1/one.JPG": picture,
        "./a/x.1/one.seg.png": b"a mask",
        "./a/x.1/one.txt": b"a caption",
        "readme": b"of nobody",
        ".hidden.jpg": b"of nobody",
        "__notes__.json": b'{"label": null}',
        "b/one.json": b'{"caption": "a cat", "label": 0}',
        "b/one.webp": encode(photo(20, 16), "WEBP"),
        "c.jpeg": picture,
        "c.cls": b"0",
        "c.json": b'{"label": 1}',
    }
    tar(tmp_path / "train.tar", members)
    tar(tmp_path / "test.tar", samples(0, 0))
    found = load(tmp_path)
    assert listed(found.train) == ["train.tar/a/x.1/one", "train.tar/b/one", "train.tar/c"]
    assert found.train.labels.tolist() == [1, 0, 0]


def test_class_names(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "classes.txt").write_text("tench, Tinca\ngreat white\n", encoding="utf-8-sig")
    assert load(tmp_path).classes == ("tench, Tinca", "great white")
    (tmp_path / "classes.txt").write_text("bee\n")
    assert "class 1, and classes.txt names 1 classes" in refusal(tmp_path)
    (tmp_path / "classes.txt").write_text("bee\ncat\ndog\n")
    assert "classes without a usable training image: 'dog'" in refusal(tmp_path)
    assert load(tmp_path, omit=["dog"]).classes == ("bee", "cat", "dog")
    (tmp_path / "classes.txt").write_text("bee\nbee\n")
    assert "a class twice" in refusal(tmp_path)
    (tmp_path / "classes.txt").unlink()
    tar(tmp_path / "test-1.tar", samples(0, 2))
    assert "the test split has class 2, and the train split has 2 classes" in refusal(tmp_path)


def long_names() -> dict[str, bytes]:
    names = ["a.png", "d/" * 60 + "b.png", "x" * 180 + ".png", "\u00e9\u732b/" * 40 + "c.png"]
    names += ["y" * 90 + "/" + "z" * 95 + ".png", "p" * 100 + ".png", "q" * 101 + ".png"]
    return {name: os.urandom(length) for name, length in zip(names, range(509, 516), strict=True)}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, kind: int) -> None:
    members = long_names()
    if kind == tarfile.USTAR_FORMAT:
        members = {name: data for name, data in members.items() if len(name) < 100}
    path = tar(tmp_path / "a.tar", members, kind)
    with path.open("rb") as file, tarfile.open(path) as theirs:
        archive = Archive(file.fileno(), "a.tar")
        ours = [(m.name, m.offset, m.size) for m in archive.members()]
        assert ours == [(m.name, m.offset_data, m.size) for m in theirs.getmembers()]
        assert [archive.read(offset, size) for _, offset, size in ours] == list(members.values())


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_members_of_archives_by_gnu_tar(tmp_path: Path, kind: str) -> None:
    long = [] if kind in ("ustar", "v7") else ["x" * 180 + ".png", "d/" * 70 + "\u00e9.png"]
    names = ["a.png", "deep/" * 12 + "b.png", *long]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(os.urandom(700))
    (tmp_path / "in/link.png").symlink_to("a.png")
    done = subprocess.run(
        ["tar", f"--format={kind}", "-cf", "../a.tar", "."], cwd=tmp_path / "in", check=False
    )
    if done.returncode:
        pytest.skip("another tar than GNU's")
    with (tmp_path / "a.tar").open("rb") as file:
        archive = Archive(file.fileno(), "a.tar")
        found = {m.name: archive.read(m.offset, m.size) for m in archive.members()}
    assert found == {f"./{name}": (tmp_path / "in" / name).read_bytes() for name in names}


def test_a_shard_cut_short_anywhere_is_refused_by_name_and_place(tmp_path: Path) -> None:
    path = tar(tmp_path / "train-0.tar", samples(0, 0, 1))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [0, 1, 511, *range(512, end + 1, 512), end - 100]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"train-0\.tar: at byte [0-9,]+: cut short"):
            tar_index.scan(path)
    path.write_bytes(whole[: end + 512])
    assert len(tar_index.scan(path).records) == 2


def test_no_altered_header_goes_unseen(tmp_path: Path) -> None:
    path = tar(tmp_path / "train-0.tar", samples(0, 0, 1))
    whole, sound = path.read_bytes(), tar_index.scan(path)
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive.getmembers()]
    for header in headers:
        for byte in [*range(0, 512, 13), *range(124, 136), *range(148, 157)]:
            altered = bytearray(whole)
            altered[header + byte] ^= 1 << byte % 7
            path.write_bytes(altered)
            try:  # the fields of a checksum may hold blanks in several ways
                assert tar_index.scan(path).to_bytes() == sound.to_bytes()
                assert byte in range(148, 156)
            except DamagedError as error:
                assert f"at byte {header:,}: " in str(error)  # noqa: PT017


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "twice": (samples(0, 0) | {"other.png": b"", "other.cls": b"0", "s0000.txt": b""}, "a second"),
    "no class": ({"a.png": b"x"}, "train.tar: a: a sample without a class"),
    "no image": ({"a.cls": b"1"}, "train.tar: a: no image in a sample"),
    "two images": ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, "a: 2 images in a sample"),
    "word": ({"a.png": b"x", "a.cls": b"cat"}, "a.cls: no class number from 0"),
    "below 0": ({"a.png": b"x", "a.cls": b"-1"}, "a.cls: no class number from 0"),
    "too large": ({"a.png": b"x", "a.cls": b"9999999999"}, "a.cls: no class number from 0"),
    "no JSON": ({"a.png": b"x", "a.json": b"{"}, "a.json: no class number from 0"),
    "list": ({"a.png": b"x", "a.json": b"[1]"}, "a.json: no class number from 0"),
    "true": ({"a.png": b"x", "a.json": b'{"label": true}'}, "a.json: no class number from 0"),
    "nothing": ({"notes": b"x"}, "no image in the shards of the train split"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_samples_that_are_refused(tmp_path: Path, which: str) -> None:
    members, what = REFUSED[which]
    tar(tmp_path / "train.tar", members)
    tar(tmp_path / "test.tar", samples(0, 0))
    assert what in refusal(tmp_path)
    assert not (tmp_path / "train.index").exists() or which == "nothing"


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no shards of the train split" in refusal(tmp_path)
    tar(tmp_path / "train.tar", samples(0, 0))
    assert "no shards of the test split" in refusal(tmp_path)
    (tmp_path / "test.tar.gz").write_bytes(b"")
    assert "unpack them with gunzip" in refusal(tmp_path)


def test_bad_images(tmp_path: Path) -> None:
    members = samples(0, 0, 1, 0, 1, 0)
    members["s0001.png"] = b"no image"
    members["s0002.png"] = b""
    members["s0003.png"] = encode(photo(40, 30), "PNG")
    tar(tmp_path / "train.tar", members)
    tar(tmp_path / "test.tar", samples(9, 0, 1))
    said = refusal(tmp_path, augment=CROP, max_pixels=1000)
    for what in ("s0001: no image", "s0002: empty", "s0003: 40 x 30 pixels", "cannot be used: 3"):
        assert what in said
    assert f"{tmp_path}/train.tar/s0001: no image" in said
    for augment in ([], CROP):
        found = load(tmp_path, augment=augment, on_bad_image="skip", max_bad=0.5)
        assert found.train_ids.tolist() == [0, 3, 4]
        assert found.bad == ("train.tar/s0001", "train.tar/s0002")


def test_shards_are_looked_through_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = load(shards(tmp_path))
    assert capsys.readouterr().err.count("looking once through") == 2
    assert load(tmp_path).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""
    tar(tmp_path / "train-0.tar", samples(0, 1, 1, 1))  # of the same size
    assert load(tmp_path).train.labels.tolist() == [1, 1, 1, 0, 1, 0]
    tar(tmp_path / "train-2.tar", samples(20, 1))
    assert len(load(tmp_path).train) == 7
    (tmp_path / "train-0.tar").unlink()
    assert len(load(tmp_path).train) == 4


def test_an_altered_index_is_made_again(tmp_path: Path) -> None:
    first = load(shards(tmp_path))
    path = tmp_path / "train.index"
    whole = path.read_bytes()
    for byte in range(0, len(whole), 5):
        altered = bytearray(whole)
        altered[byte] ^= 1 << byte % 8
        path.write_bytes(altered)
        with pytest.raises(DamagedError):
            tar_index.read(path)
    path.write_bytes(altered)
    assert load(tmp_path).fingerprint == first.fingerprint
    assert path.read_bytes() == whole
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            tar_index.read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_shards_in_a_folder_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = shards(tmp_path / "data")
    root.chmod(0o500)
    load(root)
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 2
    capsys.readouterr()
    load(root)
    assert capsys.readouterr().err == ""


def test_the_identity_knows_keys_sizes_and_labels(tmp_path: Path) -> None:
    first = load(shards(tmp_path / "a"))
    assert load(shards(tmp_path / "b")).fingerprint == first.fingerprint
    root = shards(tmp_path / "c")
    tar(root / "train-1.tar", samples(3, 0, 0, 0))
    relabelled = load(root)
    assert relabelled.content == first.content
    assert relabelled.fingerprint != first.fingerprint
    tar(root / "train-1.tar", samples(4, 0, 1, 0))
    assert load(root).content != first.content


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_same_images_in_a_folder(tmp_path: Path, workers: int) -> None:
    names = [f"train/{i % 2}/{i:02d}.png" for i in (0, 2, 4, 1, 3, 5)]
    both = {
        "folder": folder(tmp_path / "folder", *names, "test/0/a.png", "test/1/b.png"),
        "webdataset": tmp_path / "tars",
    }
    tar(both["webdataset"] / "train.tar", samples(0, 0, 0, 0, 1, 1, 1))
    tar(both["webdataset"] / "test.tar", samples(6, 0, 1))
    found = {}
    for name, root in both.items():
        data = Data.model_validate(
            {"name": name, "root": str(root), "image_size": 8, "augment": ["resized_crop", "flip"]}
        )
        loader = Loader(
            datasets.load(data),
            data,
            batch_size=2,
            train_seed=1,
            device=torch.device("cpu"),
            workers=workers,
        )
        found[name] = [*loader.epoch(0), *loader.epoch(1)]
        loader.close()
    assert len(found["folder"]) == 6
    for ours, theirs in zip(found["folder"], found["webdataset"], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_what_a_worker_gets_is_small_and_opens_files_itself(tmp_path: Path) -> None:
    found = load(shards(tmp_path), augment=CROP).train.files
    assert found is not None
    one = found.read(4)
    sent = pickle.dumps(found)
    assert len(sent) < 2000
    assert pickle.loads(sent).read(4) == one
    (tmp_path / "train-1.tar").unlink()
    assert found.read(4) == one  # it is open here
    with pytest.raises(PreflightError, match=r"train-1\.tar: No such file"):
        pickle.loads(sent).read(4)


def member(
    name: str, content: bytes = b"x", size: int | None = None, kind: bytes = tarfile.REGTYPE
) -> bytes:
    """A member as it stands in a tar, which may claim another size."""
    about = tarfile.TarInfo(name)
    about.type, about.size = kind, len(content) if size is None else size
    padding = bytes(-len(content) % 512)
    return about.tobuf(tarfile.GNU_FORMAT) + content + padding


def pax(records: bytes) -> bytes:
    return member("pax", records, kind=tarfile.XHDTYPE)


END = bytes(1024)
CLASS = member("a.cls", b"0")
HOSTILE: dict[str, bytes] = {
    "claims 10 GB": member("a.png", size=10 * 2**30) + CLASS + END,
    "claims 10 GB by PAX": pax(b"20 size=10737418240\n") + member("a.png") + CLASS + END,
    "claims a number of 5,000 digits": pax(b"5010 size=" + b"9" * 4999 + b"\n") + member("a.png"),
    "a record of 5,000 digits": pax(b"9" * 5000 + b" size=1\n") + member("a.png") + END,
    "claims less than nothing": pax(b"11 size=-1\n") + member("a.png") + END,
    "a name of 2 MB": member("name", b"n" * 2**21, kind=tarfile.GNUTYPE_LONGNAME) + END,
    "a record without an end": pax(b"999 path=x") + member("a.png") + END,
    "a sparse file": member("a.png", kind=tarfile.GNUTYPE_SPARSE) + CLASS + END,
    "a link for an image": member("a.png", b"", kind=tarfile.SYMTYPE) + CLASS + END,
    "a hard link for an image": member("a.png", b"", kind=tarfile.LNKTYPE) + CLASS + END,
    "a device for an image": member("a.png", b"", kind=tarfile.CHRTYPE) + CLASS + END,
    "a pipe for an image": member("a.png", b"", kind=tarfile.FIFOTYPE) + CLASS + END,
    "a class of 5,000 digits": member("a.png") + member("a.cls", b"9" * 5000) + END,
    "a class nested deeply": member("a.png") + member("a.json", b"[" * 100_000) + END,
    "a class that is no text": member("a.png") + member("a.cls", b"\xff\xfe") + END,
    "no end": member("a.png") + CLASS,
    "a page": b"<html>Sign in</html>".ljust(1024),
    "a zip": b"PK\3\4" + bytes(1020),
}


@pytest.mark.promise("R22")
def test_hostile_shards_are_refused(tmp_path: Path, measured: Measured) -> None:
    tar(tmp_path / "test.tar", samples(0, 0))
    for name, content in HOSTILE.items():
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises((DamagedError, PreflightError), match=r"train\.tar: "):
            load(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["test.tar", "train.tar"], name
    with (tmp_path / "train.tar").open("wb") as file:  # it has the bytes that it claims
        file.write(member("a.png", b"", size=5 * 2**30))
        file.seek(5 * 2**30, os.SEEK_CUR)
        file.write(CLASS + END)
    with pytest.raises(PreflightError, match=r"train\.tar: a: 5,368,709,120 bytes"):
        load(tmp_path)
    count = len(HOSTILE) + 1
    measured("hostile tar shards", f"{count} of {count} refused")


@pytest.mark.promise("R22")
def test_names_of_members_never_become_paths(tmp_path: Path, measured: Measured) -> None:
    names = ("../../out", "/out", "x\\out", "a/../../out", "~/out", "$HOME/out", "line\nbreak",
             "\x1b[2J", "n" * 3000, "-rf", "C:\\out", "%2e%2e/out")  # fmt: skip
    root = tmp_path / "a" / "b" / "c"
    members = {}
    for i, name in enumerate(names):
        members |= {f"{name}{i}.png": encode(photo(20, 16, i), "PNG"), f"{name}{i}.cls": b"0"}
    tar(root / "train.tar", members)
    tar(root / "test.tar", samples(0, 0))
    for augment in ([], CROP):
        found = load(root, augment=augment)
        assert len(found.train) == len(names)
    assert found.train.files is not None
    for i, name in enumerate(names):
        assert found.train.files.name(i) == f"train.tar/{name.removeprefix('./')}{i}"
        image = encoded.decode(found.train.files, i, max_pixels=10**6)
        assert np.array_equal(np.array(image), np.array(photo(20, 16, i)))
    there = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(there) == ["test.index", "test.tar", "train.index", "train.tar"]
    measured("hostile names in tar shards", f"{len(names)} of {len(names)} stay names")

"""Files in the format of CIFAR-10-C, small ones, whole and broken."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from distill.data.corruptions import official
from distill.errors import DamagedError, IncompatibleError, PreflightError

LABELS = np.array([3, 1, 4, 1])
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "fog.npy", IMAGES)
    np.save(tmp_path / "saturate.npy", IMAGES[::-1])
    np.save(tmp_path / "labels.npy", np.tile(LABELS, 5).astype(np.uint8))
    (tmp_path / "README.txt").write_text("not images")
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    assert official.available(folder) == ("fog", "saturate")
    official.require(folder, LABELS)
    for severity in range(1, 6):
        read = official.read(folder, "fog", severity)
        assert isinstance(read, np.memmap)
        assert not read.flags.writeable
        assert np.array_equal(read, IMAGES[4 * severity - 4 : 4 * severity])


def test_there_are_five_severities(folder: Path) -> None:
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"fog: severity is {severity}, and there are 1 to 5"):
            official.read(folder, "fog", severity)


def test_folders_without_files(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="nowhere: no such folder") as caught:
        official.available(tmp_path / "nowhere")
    assert "CIFAR-10-C" in caught.value.hint
    with pytest.raises(PreflightError, match="holds no corrupted images such as fog"):
        official.available(tmp_path)


def test_missing_files(folder: Path) -> None:
    with pytest.raises(PreflightError, match=r"frost\.npy: not there"):
        official.read(folder, "frost", 1)
    (folder / "labels.npy").unlink()
    with pytest.raises(PreflightError, match=r"labels\.npy: not there"):
        official.require(folder, LABELS)


def test_what_is_no_file(folder: Path) -> None:
    (folder / "labels.npy").unlink()
    (folder / "labels.npy").mkdir()
    with pytest.raises(PreflightError, match=r"labels\.npy: Is a directory"):
        official.require(folder, LABELS)


@pytest.mark.parametrize("labels", [LABELS[:3], LABELS[::-1], np.append(LABELS, 5)])
def test_labels_of_other_images(folder: Path, labels: np.ndarray) -> None:
    expected = f"4 labels for each severity, and they are not the {len(labels)} of the test split"
    with pytest.raises(IncompatibleError, match=expected) as caught:
        official.require(folder, labels)
    assert str(folder / "labels.npy") in str(caught.value)
    assert "cifar100" in caught.value.hint


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.zeros(21, np.uint8), "uint8 (21,)"),
        (np.zeros((20, 1), np.uint8), "uint8 (20, 1)"),
        (np.zeros(20, np.float32), "float32 (20,)"),
    ],
)
def test_labels_that_are_none(folder: Path, labels: np.ndarray, found: str) -> None:
    np.save(folder / "labels.npy", labels)
    with pytest.raises(DamagedError) as caught:
        official.require(folder, LABELS)
    assert f"labels.npy: {found}, expected whole numbers (5 N,)" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (IMAGES.astype(np.float32), "float32 (20, 32, 32, 3)"),
        (IMAGES[:, :28], "uint8 (20, 28, 32, 3)"),
        (IMAGES.transpose(0, 3, 1, 2), "uint8 (20, 3, 32, 32)"),
        (IMAGES[..., 0], "uint8 (20, 32, 32)"),
        (IMAGES[:18], "uint8 (18, 32, 32, 3)"),
        (np.uint8(7), "uint8 ()"),
    ],
)
def test_images_of_another_form(folder: Path, images: np.ndarray, found: str) -> None:
    np.save(folder / "fog.npy", images)
    for check in (
        lambda: official.read(folder, "fog", 1),
        lambda: official.require(folder, LABELS),
    ):
        with pytest.raises(DamagedError) as caught:
            check()
        assert f"fog.npy: {found}, expected uint8 (5 N, 32, 32, 3)" in str(caught.value)
        assert caught.value.hint


def test_fewer_images_than_labels(folder: Path) -> None:
    np.save(folder / "saturate.npy", IMAGES[:15])
    with pytest.raises(DamagedError, match=r"saturate\.npy: 15 images, labels\.npy has 20"):
        official.require(folder, LABELS)


def test_nothing_is_unpickled(folder: Path) -> None:
    np.save(folder / "fog.npy", np.array([{"a": 1}] * 5, dtype=object))
    with pytest.raises(DamagedError, match=r"fog\.npy: no whole array of NumPy"):
        official.read(folder, "fog", 1)


def test_broken_files_are_told(folder: Path) -> None:
    """Cut short, emptied, a zip file, and bytes changed in the header."""
    path = folder / "fog.npy"
    whole = path.read_bytes()
    draw = random.Random(0)
    broken = [whole[:-1], whole[:100], b"", b"PK\x03\x04" + whole[4:]]
    for _ in range(300):
        changed = bytearray(whole)
        changed[draw.randrange(90)] = draw.randrange(256)
        broken.append(bytes(changed))
    told = []
    for content in broken:
        path.write_bytes(content)
        try:
            official.read(folder, "fog", 1)
        except DamagedError as error:
            told.append(str(error))
    assert len(told) > 250  # a blank for a blank changes nothing
    assert all(text.startswith(f"{path}: ") for text in told)
    assert max(map(len, told)) < len(str(path)) + 250

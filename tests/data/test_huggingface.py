"""Hugging Face sets, by their own library, from folders that it made."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encoded as encode
from pictures import photo

from distill.data import datasets, encoded, images
from distill.errors import DistillError, PreflightError
from distill.recipe import Data

hf = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("default")  # of the library's own

CLASSES = ["bee", "cat", "dog"]


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)


def rows(first: int, *labels: int, **more: list[Any]) -> Any:
    """A split with pictures numbered from `first`."""
    pictures = [encode(photo(20, 16, i), "PNG") for i in range(first, first + len(labels))]
    columns = {"image": [{"bytes": p, "path": None} for p in pictures], "label": list(labels)}
    kinds = {"image": hf.Image(), "label": hf.ClassLabel(names=CLASSES)}
    features = hf.Features(kinds | {name: hf.ClassLabel(names=["a"]) for name in more})
    return hf.Dataset.from_dict(columns | more, features=features)


def saved(root: Path, kind: str, **splits: Any) -> Path:
    """A folder of these splits as the library writes it."""
    if kind == "disk":
        hf.DatasetDict(splits).save_to_disk(str(root))
    else:
        (root / "data").mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(str(root / f"data/{name}-00000-of-00001.parquet"))
    return root


def load(root: Path, **keys: object) -> datasets.Dataset:
    keys = {"image_size": 8, "augment": ["resized_crop"]} | keys
    return datasets.load(Data.model_validate({"name": "hf", "root": str(root), **keys}))


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_pixels_classes_and_order(tmp_path: Path, kind: str) -> None:
    root = saved(tmp_path / "set", kind, train=rows(0, 2, 0, 1, 0), test=rows(9, 1, 2))
    found = load(root)
    assert found.classes == tuple(CLASSES)
    assert found.train.labels.tolist() == [2, 0, 1, 0]
    assert found.test.labels.tolist() == [1, 2]
    assert found.train.files is not None
    for files in (found.train.files, pickle.loads(pickle.dumps(found.train.files))):
        for i in (3, 0, 2):
            assert np.array_equal(encoded.decode(files, i, max_pixels=999), photo(20, 16, i))
    assert found.train.files.name(3) == "train/3"
    in_memory = load(root, augment=[])
    expected = [images.evaluation_view(photo(20, 16, i), size=8, crop=1.0) for i in range(4)]
    assert np.array_equal(in_memory.train.pixels, expected)
    assert in_memory.fingerprint == found.fingerprint


def test_the_identity_follows_the_content(tmp_path: Path) -> None:
    test = rows(9, 1, 2)
    one = load(saved(tmp_path / "one", "disk", train=rows(0, 2, 0, 1), test=test))
    two = load(saved(tmp_path / "two", "parquet", train=rows(0, 2, 0, 1), test=test))
    assert one.fingerprint == two.fingerprint
    other = load(saved(tmp_path / "other", "disk", train=rows(1, 2, 0, 1), test=test))
    assert other.content != one.content
    labels = load(saved(tmp_path / "labels", "disk", train=rows(0, 2, 1, 0), test=test))
    assert (labels.content, labels.fingerprint != one.fingerprint) == (one.content, True)


def test_the_split_and_the_column_that_tell_classes(tmp_path: Path) -> None:
    train = rows(0, 0, 1, 2, coarse=[0, 0, 0])
    hidden = rows(5, -1, -1)
    root = saved(tmp_path / "set", "disk", train=train, test=hidden, validation=rows(7, 1))
    found = load(root)
    assert found.classes == tuple(CLASSES)
    assert found.test.labels.tolist() == [1]
    assert found.test.files is not None
    assert found.test.files.name(0) == "validation/0"
    root = saved(tmp_path / "hidden", "disk", train=train, test=hidden)
    with pytest.raises(PreflightError, match="no test or validation split whose classes are told"):
        load(root)
    with pytest.raises(PreflightError, match="no train split, it has test"):
        load(saved(tmp_path / "half", "disk", test=rows(0, 0)))
    plain = rows(0, 0, 1, 2).cast_column("label", hf.Value("int32"))
    found = load(saved(tmp_path / "plain", "disk", train=plain, test=plain))
    assert found.classes == ("0", "1", "2")
    bare = rows(0, 0, 1, 2).remove_columns("label")
    with pytest.raises(PreflightError, match="no column of classes in the test split: image"):
        load(saved(tmp_path / "bare", "disk", train=bare, test=bare))
    none = rows(0, 0).remove_columns("image")
    with pytest.raises(PreflightError, match="0 columns of images"):
        load(saved(tmp_path / "none", "disk", train=none, test=none))


def test_images_that_are_bad_or_in_files(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(encode(photo(20, 16, 1), "PNG"))
    stored = [
        {"bytes": encode(photo(20, 16, 0), "PNG"), "path": "zero.png"},
        {"bytes": None, "path": str(tmp_path / "one.png")},
        {"bytes": b"no image", "path": None},
        {"bytes": encode(photo(20, 16, 3), "PNG"), "path": None},
    ]
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["bee", "cat"])})
    train = hf.Dataset.from_dict({"image": stored, "label": [0, 1, 0, 1]}, features=features)
    root = saved(tmp_path / "set", "disk", train=train, test=train.select([0, 3]))
    with pytest.raises(DistillError, match="train/2: no image"):
        load(root)
    found = load(root, on_bad_image="skip", max_bad=0.5)
    assert found.train_ids.tolist() == [0, 1, 3]
    assert found.train.files is not None
    assert np.array_equal(encoded.decode(found.train.files, 1, max_pixels=999), photo(20, 16, 1))


def test_a_set_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreflightError, match="empty: "):
        load(tmp_path / "empty")
    data = {"name": "hf/nobody/nothing", "root": str(tmp_path / "cache")}
    with pytest.raises(PreflightError, match="hf/nobody/nothing: ") as error:
        datasets.load(Data.model_validate(data))
    assert "data.download: true" in error.value.hint

"""A folder of images: every image with its own class, or a refusal that says why."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded as encode
from pictures import fingerprint, folder, photo

from distill.data import datasets, encoded, images
from distill.data.datasets import Dataset, Source
from distill.errors import PreflightError
from distill.recipe import Data

TRAIN = ("train/bee/1.png", "train/bee/2.png", "train/cat/1.png", "train/cat/2.png")
TEST = ("test/bee/3.png", "test/cat/3.png")
CROP = [{"name": "resized_crop"}]


def load(root: Path, **settings: object) -> Dataset:
    settings = {"name": "folder", "root": str(root), "image_size": 8} | settings
    return datasets.load(Data.model_validate(settings))


def view(seed: int, size: int = 8, crop: float = 1.0) -> np.ndarray:
    """What `folder` of pictures.py wrote as its image number `seed`."""
    return images.evaluation_view(photo(20, 16, seed), size=size, crop=crop)


def listed(source: Source) -> tuple[str, ...]:
    assert source.files is not None
    return tuple(source.files.name(i) for i in range(len(source.files)))


def test_pixels_labels_and_order(tmp_path: Path) -> None:
    found = load(folder(tmp_path, *TRAIN, *TEST))
    assert found.classes == ("bee", "cat")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [0, 1]
    assert listed(found.train) == TRAIN
    assert np.array_equal(found.train.pixels, [view(i) for i in range(4)])
    assert np.array_equal(found.test.pixels, [view(4), view(5)])
    assert found.train_ids.tolist() == [0, 1, 2, 3]
    assert (found.mean[0], found.std[0], found.image_size) == (0.485, 0.229, 8)


def test_image_size_is_224_and_crop_that_of_the_recipe(tmp_path: Path) -> None:
    found = load(folder(tmp_path, *TRAIN, *TEST), image_size=None, eval_crop=0.875)
    assert np.array_equal(found.test.pixels, [view(i, 224, 0.875) for i in (4, 5)])


def test_a_crop_keeps_the_files(tmp_path: Path) -> None:
    found = load(folder(tmp_path, *TRAIN, *TEST), augment=CROP)
    assert found.train.pixels is None
    assert listed(found.train) == TRAIN
    assert listed(found.test) == TEST
    assert found.train.files is not None
    assert [found.train.files.read(i) for i in range(4)] == [tmp_path / name for name in TRAIN]


def test_a_folder_too_large_for_memory_keeps_the_files(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    assert load(root, image_size=8000).train.pixels is None  # 6 x 8000 x 8000 x 3 > 2^30


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("test/bee/a.png", "val/bee/b.png"), "test/bee/a.png"),
        (("val/bee/b.png",), "val/bee/b.png"),
        (("validation/bee/c.png",), "validation/bee/c.png"),
    ],
)
def test_evaluation_split(tmp_path: Path, names: tuple[str, ...], chosen: str) -> None:
    found = load(folder(tmp_path, *TRAIN, *names), augment=CROP)
    assert listed(found.test) == (chosen,)


# What lies in train and test, and the label of each test image by name; None is refused.
CLASSES: list[tuple[tuple[str, ...], tuple[str, ...], list[str] | None]] = [
    (("bee", "cat"), ("bee", "cat"), ["bee", "cat"]),
    (("bee", "cat"), ("cat",), ["cat"]),
    (("bee", "cat"), ("bee",), ["bee"]),
    (("cat", "bee", "ant"), ("cat", "ant"), ["ant", "cat"]),
    (("bee", "cat"), ("ant", "cat"), None),
    (("bee", "cat"), ("bee", "cat", "dog"), None),
    (("bee", "cat"), ("Bee", "cat"), None),
    (("bee", "cat"), ("bee ", "cat"), None),
    (("caf\u00e9", "bar"), ("caf\u00e9", "bar"), ["bar", "caf\u00e9"]),
    (("caf\u00e9", "bar"), ("cafe\u0301", "bar"), None),
    (("10", "9", "1"), ("9", "10"), ["10", "9"]),
    (("a b", "a", "a-b"), ("a-b", "a b"), ["a b", "a-b"]),
    (("[0]", "x\ny", "<b>", "'q\""), ("x\ny", "[0]"), ["[0]", "x\ny"]),
    (("z", "\u00e9", "\u732b", "A"), ("\u732b", "z"), ["z", "\u732b"]),
    (("0", "1"), ("2",), None),
    (("only",), ("only",), ["only"]),
]


@pytest.mark.parametrize(("train", "test", "expected"), CLASSES)
def test_classes_are_matched_by_name(
    tmp_path: Path, train: tuple[str, ...], test: tuple[str, ...], expected: list[str] | None
) -> None:
    names = [f"train/{c}/1.png" for c in train] + [f"test/{c}/2.png" for c in test]
    root = folder(tmp_path, *names)
    if expected is None:
        with pytest.raises(PreflightError, match="the training split lacks") as error:
            load(root)
        for name in set(test) - set(train):
            assert repr(name) in str(error.value)
        return
    found = load(root)
    assert found.classes == tuple(sorted(train, key=os.fsencode))
    assert [found.classes[label] for label in found.test.labels] == expected
    for i, name in enumerate(expected):
        assert np.array_equal(found.test.pixels[i], view(names.index(f"test/{name}/2.png")))


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    rest = ("z", "\u00e9", "A", "1/x", "1-x", "1", "10", "2")
    files = [f"train/{c}/{n}.png" for c in ("b", "a", "a-b", "a b") for n in rest]
    first = load(folder(tmp_path / "one", *files, "test/a/1.png"), augment=CROP)
    second = load(folder(tmp_path / "two", "test/a/1.png", *reversed(files)), augment=CROP)
    assert listed(first.train) == listed(second.train) == tuple(sorted(files, key=os.fsencode))


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        *TRAIN,
        *TEST,
        "train/.ipynb_checkpoints/1.png",
        "train/__MACOSX/1.png",
        "train/bee/._1.png",
        "train/bee/.hidden/1.png",
        "train/bee/Thumbs.db",
        "train/bee/notes.txt",
        "train/overview.png",
        ".git/x/1.png",
    )
    found = load(root)
    assert found.classes == ("bee", "cat")
    assert len(found.train) == 4


def test_folders_within_a_class_and_odd_names(tmp_path: Path) -> None:
    names = (
        "train/bee/2019/July/1.PNG",
        "train/bee/[1] 'a' \"b\" $(c).png",
        "train/bee/line\nbreak.png",
        "train/cat/\u732b \U0001f408.png",
        "train/cat/x.png/1.png",
        f"train/cat/{'n' * 251}.png",
        "test/bee/1.png",
    )
    found = load(folder(tmp_path, *names))
    order = sorted(range(6), key=lambda i: os.fsencode(names[i]))
    assert np.array_equal(found.train.pixels, [view(i) for i in order])
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    name = os.fsdecode(b"train/bee/\xff.png")
    (root / name).write_bytes(encode(photo(20, 16), "PNG"))
    assert len(load(root).train) == 5
    folder(root, os.fsdecode(b"train/\xff/1.png"))
    with pytest.raises(PreflightError, match="must be UTF-8"):
        load(root)


def test_links(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", *TRAIN, *TEST)
    elsewhere = folder(tmp_path / "elsewhere", "dog/1.png")
    (root / "train" / "dog").symlink_to(elsewhere / "dog")
    (root / "train" / "cat" / "all").symlink_to(root / "train")
    (root / "train" / "cat" / "self").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "top").symlink_to("/")
    (root / "train" / "cat" / "loop").symlink_to("loop")
    found = load(root)
    assert found.classes == ("bee", "cat", "dog")
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ((), "no such folder"),
        (("cat/1.png",), "train: no such folder"),
        (("train/cat/1.png",), "no test, val or validation folder"),
        (("train/1.png", "test/cat/1.png"), "train: no class folder with an image"),
        (("train/cat/1.png", "test/1.png"), "test: no class folder with an image"),
        (("train/cat/a.txt", "test/cat/1.png"), "train: no class folder with an image"),
        (
            ("train/cat/1.png", "train/dog/a.txt", "train/eel/.b.png", "test/cat/1.png"),
            "without an image: 'dog', 'eel'",
        ),
    ],
)
def test_layouts_that_are_refused(tmp_path: Path, names: tuple[str, ...], what: str) -> None:
    root = folder(tmp_path / "photos", *names)
    with pytest.raises(PreflightError, match=what) as error:
        load(root)
    assert str(root) in str(error.value)
    assert error.value.hint


SINGLE = ("bee/1.png", "bee/2.png", "cat/1.png", "cat/x/2, b.png", "dog/1.png")


def test_split_file(tmp_path: Path) -> None:
    root = folder(tmp_path, *SINGLE)
    lines = ["path,split", "cat/1.png,train", "./bee/2.png, train", "bee/1.png,test"]
    lines += ['"cat/x/2, b.png",test']
    (root / "split.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    found = load(root, split_file="split.csv")
    assert found.classes == ("bee", "cat")  # the dog is in neither split
    assert np.array_equal(found.train.pixels, [view(1), view(2)])
    assert np.array_equal(found.test.pixels, [view(0), view(3)])
    assert found.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "first line must be path,split"),
        ("file,part\n", "first line must be path,split"),
        ("path,split\nbee/1.png,train\n", "no image for test"),
        ("path,split\nbee/1.png,training\n", "line 2: split must be train or test"),
        ("path,split\nbee/1.png\n", "line 2: split must be train or test, got ''"),
        ("path,split\nbee/9.png,train\n", "line 2: no image 'bee/9.png'"),
        ("path,split\n../secret.png,train\n", "line 2: no image '../secret.png'"),
        ("path,split\nbee/1.png,train\nbee/1.png,test\n", "line 3: 'bee/1.png' is in both"),
        ("path,split\nbee/1.png,train\ncat/1.png,test\n", "'cat' .1 images"),
        ('path,split\n"' + "x" * 200_000 + '",train\n', "not a CSV file"),
    ],
)
def test_split_files_that_are_refused(tmp_path: Path, text: str, what: str) -> None:
    root = folder(tmp_path, *SINGLE)
    (root / "split.csv").write_text(text)
    with pytest.raises(PreflightError, match=what):
        load(root, split_file="split.csv")


def test_a_missing_split_file(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"split.csv: No such file"):
        load(folder(tmp_path, *SINGLE), split_file="split.csv")


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("augment", [[], CROP])
def test_bad_images_are_listed(tmp_path: Path, augment: list[dict[str, str]]) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    for i in range(14):
        (root / f"train/cat/bad {i}.jpg").write_text("<html>")
    (root / "test/cat/bad.jpg").write_bytes(b"")
    with pytest.raises(PreflightError, match="images that cannot be used: 15") as error:
        load(root, augment=augment)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[1].endswith("test/cat/bad.jpg: empty")
    assert lines[2].endswith("train/cat/bad 0.jpg: no image")
    assert lines[-1].strip() == "and 5 more"
    assert "on_bad_image: skip" in error.value.hint


@pytest.mark.parametrize("augment", [[], CROP])
def test_skipped_images_keep_their_ids(tmp_path: Path, augment: list[dict[str, str]]) -> None:
    names = [f"train/{c}/{i}.png" for c in ("bee", "cat") for i in range(10)]
    root = folder(tmp_path, *names, *TEST)
    whole = load(root, val=0.2, augment=augment)
    for name in (names[3], names[12]):
        (root / name).write_bytes(b"no image")
    with pytest.raises(PreflightError):
        load(root, val=0.2, augment=augment)
    found = load(root, val=0.2, augment=augment, on_bad_image="skip", max_bad=0.1)
    assert found.bad == (names[3], names[12])
    assert len(found.train) == 20
    assert np.array_equal(found.train.labels, whole.train.labels)
    assert np.array_equal(found.train_ids, np.setdiff1d(whole.train_ids, [3, 12]))
    assert np.array_equal(found.val_ids, np.setdiff1d(whole.val_ids, [3, 12]))
    if found.train.pixels is not None:
        assert (found.train.pixels[[3, 12]] == 0).all()
        assert np.array_equal(found.train.pixels[4], view(4))


def test_a_truncated_image_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    spoil(root / "train/cat/1.png")
    with pytest.raises(PreflightError, match=r"train/cat/1.png: .*truncated"):
        load(root)
    assert load(root, on_bad_image="skip", max_bad=0.5).bad == ("train/cat/1.png",)
    lazy = load(root, augment=CROP)  # only the headers are read
    assert lazy.train.files is not None
    with pytest.raises(PreflightError, match=r"train/cat/1.png: .*truncated"):
        encoded.decode(lazy.train.files, 2, max_pixels=lazy.max_pixels)


def test_bad_evaluation_images_are_never_skipped(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    spoil(root / "test/bee/3.png")
    with pytest.raises(PreflightError, match=r"test/bee/3.png") as error:
        load(root, on_bad_image="skip")
    assert "never skipped" in error.value.hint


def test_only_so_many_bad_images_are_skipped(tmp_path: Path) -> None:
    names = [f"train/{c}/{i:02d}.png" for c in ("bee", "cat") for i in range(20)]
    root = folder(tmp_path, *names, *TEST)
    for name in names[:2]:
        (root / name).write_bytes(b"no image")
    assert len(load(root, on_bad_image="skip").bad) == 2  # a twentieth, if nothing else is said
    (root / names[2]).write_bytes(b"no image")
    with pytest.raises(PreflightError, match="cannot be used: 3") as error:
        load(root, on_bad_image="skip")
    assert "data.max_bad 0.05 allows 2 of 40 training images" in error.value.hint
    assert len(load(root, on_bad_image="skip", max_bad=0.08).bad) == 3
    with pytest.raises(PreflightError, match="cannot be used: 3"):
        load(root, on_bad_image="skip", max_bad=0.0)


def test_a_class_that_loses_all_its_images(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    for name in TRAIN[2:]:
        spoil(root / name)
    with pytest.raises(PreflightError, match="without a usable training image: 'cat'"):
        load(root, on_bad_image="skip", max_bad=0.5)


def test_max_pixels_is_asked_of_every_image(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    assert len(load(root, max_pixels=320).train) == 4
    with pytest.raises(PreflightError, match="cannot be used: 6"):
        load(root, max_pixels=319, augment=CROP)


def test_nothing_in_the_folder_is_changed(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    (root / "train/bee/half.jpg").write_bytes(encode(photo(99, 99), "JPEG")[:-2])
    (root / "train/bee/animated.gif").write_bytes(
        encode(photo(9, 9), "GIF", save_all=True, append_images=[photo(9, 9, 1)])
    )
    before = fingerprint(root)
    for augment in ([], CROP):
        load(root, augment=augment, on_bad_image="skip", max_bad=0.5)
    assert fingerprint(root) == before


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    before = threading.active_count()
    load(root)
    spoil(root / TRAIN[0])
    with pytest.raises(PreflightError):
        load(root)
    assert threading.active_count() == before


def test_fingerprint_changes_with_names_and_sizes(tmp_path: Path) -> None:
    root = folder(tmp_path, *TRAIN, *TEST)
    found = [load(root).fingerprint]
    assert load(root, augment=CROP, image_size=16).fingerprint == found[0]
    (root / TRAIN[0]).rename(root / "train/bee/0.png")
    found.append(load(root).fingerprint)
    (root / "train/bee/0.png").rename(root / "train/cat/0.png")
    found.append(load(root).fingerprint)
    (root / "train/cat/0.png").write_bytes(encode(photo(21, 17), "PNG"))
    found.append(load(root).fingerprint)
    folder(root, "test/bee/4.png")
    found.append(load(root).fingerprint)
    (root / "train/bee").rename(root / "train/ape")
    (root / "test/bee").rename(root / "test/ape")
    found.append(load(root).fingerprint)
    assert len(set(found)) == 6

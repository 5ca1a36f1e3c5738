"""`distill pack`: the same images, smaller, whole whatever kills it, and every byte vouched for."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from distill import pack, storage, yamlio
from distill.data import datasets, encoded, tar_index
from distill.data.datasets import Source
from distill.errors import DamagedError, DistillError, IncompleteError, PreflightError
from distill.recipe import Data
from tests.cli.conftest import ROOT, listing, process

Command = Callable[..., Result]
SIDES = ((60, 40), (41, 67), (24, 24), (20, 90), (300, 31))
CLASSES = ("a b", "caf\u00e9", "z'\"<")
SMALL = ("--size", "32", "--shard-bytes", "30000")


def picture(number: int) -> Image.Image:
    """A smooth picture of its own, of one of five shapes."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIDES[number % 5], Image.Resampling.BICUBIC)


def photos(root: Path, each: int = 9) -> Path:
    """A folder of PNGs in three classes, with as many test images."""
    number = 0
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                picture(number).save(root / split / name / f"{i:02d}.png")
                number += 1
    return root


def recipe(path: Path, root: Path, **data: Any) -> Path:
    sections = {
        "data": {"name": "folder", "root": str(root), "image_size": 24} | data,
        "student": {"model": "resnet8"},
        "objective": [{"term": "ce"}],
        "optimizer": {"name": "sgd", "lr": 0.05},
        "train": {"epochs": 1, "batch_size": 8},
    }
    path.write_text(yamlio.dump(sections))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a recipe, `recipe.yaml`, for the photos beside it."""
    recipe(tmp_path / "recipe.yaml", photos(tmp_path / "photos"))
    return tmp_path


def load(name: str, root: Path, **keys: object) -> datasets.Dataset:
    data = {"name": name, "root": str(root), "image_size": 24, "augment": ["resized_crop"]} | keys
    return datasets.load(Data.model_validate(data))


def pixels(source: Source, number: int) -> np.ndarray:
    assert source.files is not None
    return np.array(encoded.decode(source.files, number, max_pixels=10**8))


def pack_files(out: Path) -> dict[str, bytes]:
    found = listing(out)
    found.pop(".lock")
    return found


def test_raw_images_are_those_of_the_folder_scaled_down(home: Path, distill: Command) -> None:
    done = distill("pack", "recipe.yaml", "--out", "p", *SMALL, "--format", "raw", "--workers", 0)
    assert done.exit_code == 0, done.output
    ours, theirs = load("webdataset", home / "p"), load("folder", home / "photos")
    assert ours.classes == theirs.classes == CLASSES
    for mine, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert mine.labels.tolist() == other.labels.tolist()
        for i in range(27):
            whole = Image.fromarray(pixels(other, i))
            short = min(whole.size)
            scale = 32 / short if short > 32 else 1
            sides = tuple(round(side * scale) for side in whole.size)
            expected = np.array(whole.resize(sides, Image.Resampling.BILINEAR))
            assert np.array_equal(pixels(mine, i), expected)


def test_what_is_written_and_said(home: Path, distill: Command) -> None:
    done = distill("pack", "recipe.yaml", "--out", "p", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    files = pack_files(home / "p")
    for split in ("train", "test"):
        shards = [name for name in files if name.startswith(split) and name.endswith(".tar")]
        assert len(shards) == found["splits"][split]["shards"] > 2
        sizes = sum(len(data) for name, data in files.items() if name.startswith(split))
        assert (
            found["splits"][split] | {"images": 27, "bad": 0, "bytes": sizes}
            == (found["splits"][split])
        )
    assert found["made"] == found["splits"]["train"]["shards"] + found["splits"]["test"]["shards"]
    assert found["recipe"] == {"data.name": "webdataset", "data.root": str(home / "p")}
    with tarfile.open(home / "p/train-00000.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert list(members)[:3] == ["00000000.jpg", "00000000.cls", "00000001.jpg"]
    with Image.open(io.BytesIO(members["00000001.jpg"])) as image:
        assert (image.format, image.size) == ("JPEG", (32, 52))
    assert members["00000001.cls"] == b"0"
    again = distill("pack", "recipe.yaml", "--out", "p", *SMALL)
    assert "train: 27 images" in again.stdout
    assert f"  root: {home / 'p'}" in again.stdout
    assert pack_files(home / "p") == files
    quality = distill("pack", "recipe.yaml", "--out", "q", *SMALL, "--quality", 30)
    assert quality.exit_code == 0
    assert len((home / "q/train-00000.tar").read_bytes()) != len(files["train-00000.tar"])


def test_every_split_and_subset_has_the_same_images(home: Path, distill: Command) -> None:
    (home / "photos/train/caf\u00e9/03.png").write_bytes(b"no image")
    whole = (home / "photos/train/a b/04.png").read_bytes()
    (home / "photos/train/a b/04.png").write_bytes(whole[:-40])  # only decoding tells
    refused = distill("pack", "recipe.yaml", "--out", "p", *SMALL)
    assert refused.exit_code == 6
    assert "04.png" in refused.stderr or "03.png" in refused.stderr
    assert "on_bad_image" in refused.stderr
    done = distill(
        "pack", "recipe.yaml", "--out", "p", *SMALL, "--set", "data.on_bad_image=skip", "--json"
    )
    assert json.loads(done.stdout)["splits"]["train"]["bad"] == 2
    cases: list[dict[str, object]] = [
        {"val": 0.3},
        {"fraction": 0.4, "seed": 5},
        {"val": 0.2, "omit": ["a b"]},
        {"augment": [], "val": 0.2},  # in memory: all are decoded
    ]
    for keys in cases:
        keys = {"on_bad_image": "skip", "max_bad": 0.5} | keys
        ours, theirs = (
            load("webdataset", home / "p", **keys),
            load("folder", home / "photos", **keys),
        )
        if keys.get("augment") != []:  # the header of the one that is cut short is sound
            kept = theirs.train_ids != 4
            assert ours.train_ids.tolist() == theirs.train_ids[kept].tolist()
            assert ours.val_ids.tolist() == theirs.val_ids[theirs.val_ids != 4].tolist()
        else:
            assert ours.train_ids.tolist() == theirs.train_ids.tolist()
            assert ours.val_ids.tolist() == theirs.val_ids.tolist()
    with pytest.raises(DistillError, match="images that cannot be used: 2"):
        load("webdataset", home / "p")


def test_an_image_is_upright(home: Path, distill: Command) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = home / "photos/train/a b/00.png"
    picture(1).save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()
    assert distill("pack", "recipe.yaml", "--out", "p", *SMALL).exit_code == 0
    assert pixels(load("webdataset", home / "p").train, 0).shape == (32, 52, 3)


def test_the_bytes_do_not_depend_on_the_processes(home: Path, distill: Command) -> None:
    for workers in (0, 2):
        done = distill("pack", "recipe.yaml", "--out", f"p{workers}", *SMALL, "--workers", workers)
        assert done.exit_code == 0, done.output
    assert pack_files(home / "p0") == pack_files(home / "p2")


def start(home: Path, out: str) -> subprocess.Popen[bytes]:
    options = [*SMALL, "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "pack", "recipe.yaml", "--out", out, *options],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def whole_shards(out: Path) -> int:
    """The shards that are there; each is whole."""
    paths = list(out.glob("*.tar"))
    for path in paths:
        assert len(tar_index.scan(path).records)
    return len(paths)


def wait_for_workers(out: Path) -> bool:
    """Those of a process that was killed end by themselves, and hold the folder until then."""
    for _ in range(3000):
        try:
            with storage.lock(out):
                return True
        except PreflightError:
            time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that take a second to pack, and their pack."""
    home = tmp_path_factory.mktemp("large")
    recipe(home / "recipe.yaml", photos(home / "photos", each=3))
    for path in (home / "photos").rglob("*.png"):
        with Image.open(path) as image:
            for i in range(40):
                image.resize((600, 500)).save(path.with_name(f"{path.stem}-{i}.jpg"))
    done = process("pack", "recipe.yaml", "--out", "known", *SMALL, cwd=home)
    assert done.returncode == 0, done.stderr
    return home


def test_a_kill_at_any_moment_leaves_whole_shards(large: Path) -> None:
    known = pack_files(large / "known")
    shards = sum(name.endswith(".tar") for name in known)
    for wanted in (1, shards // 3, shards * 3 // 4):
        running = start(large, "killed")
        deadline = time.monotonic() + 60
        while len(list((large / "killed").glob("*.tar"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        running.kill()
        running.wait()
        assert wanted <= whole_shards(large / "killed") < shards
        with pytest.raises(IncompleteError, match="not finished"):
            load("webdataset", large / "killed")
        with pytest.raises(IncompleteError):
            pack.verify(large / "killed", workers=0)
        assert wait_for_workers(large / "killed")
    before = {p.name: p.stat().st_mtime_ns for p in (large / "killed").glob("*.tar")}
    done = process("pack", "recipe.yaml", "--out", "killed", *SMALL, "--json", cwd=large)
    assert json.loads(done.stdout)["made"] == shards - len(before)
    after = {p.name: p.stat().st_mtime_ns for p in (large / "killed").glob("*.tar")}
    assert before.items() <= after.items()
    assert pack_files(large / "killed") == known


def test_a_signal_stops_it_and_the_same_command_goes_on(large: Path) -> None:
    running = start(large, "stopped")
    deadline = time.monotonic() + 60
    while not list((large / "stopped").glob("*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 75
    assert whole_shards(large / "stopped") < len(list((large / "known").glob("*.tar")))
    assert process("pack", "recipe.yaml", "--out", "stopped", *SMALL, cwd=large).returncode == 0
    assert pack_files(large / "stopped") == pack_files(large / "known")


def test_another_source_or_other_settings_are_refused(home: Path, distill: Command) -> None:
    assert distill("pack", "recipe.yaml", "--out", "p", *SMALL).exit_code == 0
    before = pack_files(home / "p")
    other = [
        (["--size", "31", "--shard-bytes", "30000"], "settings.size: 32 -> 31"),
        ([*SMALL, "--quality", "80"], "settings.quality: 90 -> 80"),
        ([*SMALL, "--format", "raw"], "settings.format: 'jpeg' -> 'raw'"),
    ]
    for options, what in other:
        said = distill("pack", "recipe.yaml", "--out", "p", *options)
        assert said.exit_code == 4
        assert what in said.stderr
    (home / "photos/train/a b/00.png").rename(home / "photos/train/a b/99.png")
    said = distill("pack", "recipe.yaml", "--out", "p", *SMALL)
    assert (said.exit_code, "source.images: " in said.stderr) == (4, True)
    (home / "photos/train/a b/99.png").rename(home / "photos/train/caf\u00e9/99.png")
    said = distill("pack", "recipe.yaml", "--out", "p", *SMALL)
    assert (said.exit_code, "source.train.labels: " in said.stderr) == (4, True)
    assert pack_files(home / "p") == before


def test_what_cannot_be_packed(home: Path, distill: Command) -> None:
    before = listing(home / "photos")
    said = distill("pack", "recipe.yaml", "--out", "photos", *SMALL)
    assert (said.exit_code, "photos: holds something else" in said.stderr) == (6, True)
    assert listing(home / "photos") == before
    keys = ["--set", "data.name=digits", "--set", "data.root=null"]
    said = distill("pack", "recipe.yaml", "--out", "p", *keys)
    assert (said.exit_code, "read into memory at once" in said.stderr) == (2, True)
    taught = ["teachers=[{model: resnet8, weights: run}]", "objective=[{term: kd}]"]
    keys = [part for key in (*taught, "data.transfer=photos") for part in ("--set", key)]
    said = distill("pack", "recipe.yaml", "--out", "p", *keys)
    assert (said.exit_code, "have no classes" in said.stderr) == (2, True)
    said = distill("pack", "recipe.yaml", "--out", "p", "--verify")
    assert (said.exit_code, "p: no pack" in said.stderr) == (6, True)
    (home / "photos/train/a b").rename(home / "photos/train/a\nb")
    (home / "photos/test/a b").rename(home / "photos/test/a\nb")
    said = distill("pack", "recipe.yaml", "--out", "p")
    assert (said.exit_code, "a class has two lines" in said.stderr) == (2, True)
    assert not (home / "p").exists()


def test_there_is_room_or_nothing_begins(
    home: Path, distill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    said = distill("pack", "recipe.yaml", "--out", "p", *SMALL)
    assert (said.exit_code, "20.0 KB are free" in said.stderr) == (6, True)
    assert not list((home / "p").glob("*.tar"))


def test_a_flipped_bit_is_found_by_reading_and_by_verify(home: Path, distill: Command) -> None:
    assert distill("pack", "recipe.yaml", "--out", "p", *SMALL).exit_code == 0
    sound = distill("pack", "recipe.yaml", "--out", "p", "--verify", "--json")
    assert (sound.exit_code, json.loads(sound.stdout)["images"]) == (0, 54)
    known = pack_files(home / "p")
    generator = random.Random(0)
    for name in ("train-00000.tar", "train-00001.tar", "test-00002.tar"):
        records = tar_index.scan(home / "p" / name).records
        number = generator.randrange(len(records))
        byte = int(records[number]["offset"]) + generator.randrange(int(records[number]["size"]))
        altered = bytearray(known[name])
        altered[byte] ^= 1 << generator.randrange(8)
        (home / "p" / name).write_bytes(altered)
        found = load("webdataset", home / "p")
        source = found.train if name.startswith("train") else found.test
        assert source.files is not None
        bad = []
        for i in range(len(source)):
            try:
                source.files.read(i)
            except DamagedError as error:
                bad.append(str(error))
        (said,) = bad
        assert f"p/{name}/000" in said
        verdict = distill("pack", "recipe.yaml", "--out", "p", "--verify")
        assert (verdict.exit_code, f"p/{name}: image {number} of it" in verdict.stderr) == (5, True)
        (home / "p" / name).unlink()
        with pytest.raises(DamagedError, match=f"{name}: is not there"):
            load("webdataset", home / "p")
        again = distill("pack", "recipe.yaml", "--out", "p", *SMALL, "--json")
        assert json.loads(again.stdout)["made"] == 1
        assert pack_files(home / "p") == known
    (home / "p/train-00001.tar").write_bytes(known["train-00001.tar"][:-512])
    with pytest.raises(DamagedError, match=r"train-00001\.tar: has [0-9,]+ bytes, and the pack"):
        load("webdataset", home / "p")
    altered = bytearray(known["train.index"])
    altered[50] ^= 1
    (home / "p/train.index").write_bytes(altered)
    with pytest.raises(DamagedError, match=r"train\.index: its content changed"):
        load("webdataset", home / "p")


def test_a_student_learns_from_a_pack(home: Path, distill: Command) -> None:
    assert distill("pack", "recipe.yaml", "--out", "p", *SMALL).exit_code == 0
    keys = ["--set", "data.name=webdataset", "--set", "data.root=p"]
    checked = distill("check", "recipe.yaml", *keys, "--json")
    assert json.loads(checked.stdout)["data"]["train"] == 27
    keys += ["--set", "data.augment=[resized_crop, flip]", "--out", "run", "--workers", "2"]
    done = process("train", "recipe.yaml", *keys, "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3


def test_too_small_a_size_for_the_recipe_is_said(home: Path, distill: Command) -> None:
    done = distill("pack", "recipe.yaml", "--out", "p", "--size", "20")
    assert "scales the shorter side of an image to 24 px" in done.stderr


def test_a_split_file_is_taken_out_of_the_recipe(tmp_path: Path, distill: Command) -> None:
    photos(tmp_path / "photos", each=2)
    names = [
        p.relative_to(tmp_path / "photos/train").as_posix()
        for p in (tmp_path / "photos/train").rglob("*.png")
    ]
    rows = [f'"{name}",{"train" if "00" in name else "test"}' for name in names]
    rows = [row.replace("z'\"<", 'z\'""<') for row in rows]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]))
    recipe(
        tmp_path / "recipe.yaml", tmp_path / "photos/train", split_file=str(tmp_path / "split.csv")
    )
    done = distill("pack", "recipe.yaml", "--out", "p", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    changes = json.loads(done.stdout)["recipe"]
    assert changes["data.split_file"] is None
    sets = [
        part for key, value in changes.items() for part in ("--set", f"{key}={value or 'null'}")
    ]
    assert distill("check", "recipe.yaml", *sets, "--set", "train.batch_size=2").exit_code == 0

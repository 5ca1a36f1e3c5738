"""What earlier versions wrote stays readable; what newer ones wrote is refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from typer.testing import Result

import distill as library
from distill.cache import layout, write
from distill.cache.read import Reader
from distill.cache.store import Folder
from distill.data import datasets
from distill.recipe import Recipe
from tests.cli.conftest import distill as command  # noqa: F401
from tests.cli.conftest import listing
from tests.fixtures import make
from tests.promises import Measured

Run = Callable[..., Result]
FORMATS = sorted(path.name for path in make.HERE.glob("format-*"))
r23 = pytest.mark.promise("R23")


@pytest.fixture(name="distill")
def _distill(command: Run) -> Run:  # noqa: F811
    return command


@pytest.fixture(params=FORMATS)
def old(
    request: pytest.FixtureRequest, distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What a version left behind, in the working directory."""
    name = str(request.param)
    shutil.copytree(make.HERE / name, tmp_path, dirs_exist_ok=True)
    for shard in (tmp_path / "shards").glob("*.tar"):
        os.utime(shard, (make.CHANGED, make.CHANGED))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return name


def tensors(run: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(run) / "student.safetensors")


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@r23
@pytest.mark.parametrize(("recipe", "run"), [("student", "stopped"), ("cached", "stopped-cached")])
def test_a_run_goes_on_to_what_the_recipe_gives_today(
    old: str, distill: Run, recipe: str, run: str, measured: Measured
) -> None:
    """With its teacher live, or from the cache of that time. Last bits follow torch's version."""
    before = rows(run)
    gone_on = distill("train", f"{recipe}.yaml", "--out", run)
    assert gone_on.exit_code == 0, gone_on.stderr
    assert f"{run}: going on after step" in gone_on.stderr
    assert rows(run)[: len(before)] == before
    fresh = distill("train", f"{recipe}.yaml", "--out", "fresh")
    assert fresh.exit_code == 0, fresh.stderr
    difference = far(tensors(run), tensors("fresh"))
    assert difference < 1e-3
    assert len(rows(run)) == len(rows("fresh"))
    known, told = (json.loads((Path(out) / "result.json").read_text()) for out in (run, "fresh"))
    assert known["top1"] == pytest.approx(told["top1"], abs=0.005)
    measured(f"{old}: {run} run gone on with", f"largest difference of a weight {difference:.1g}")


@r23
def test_a_finished_run_is_known_evaluated_exported_and_teaches(
    old: str, distill: Run, measured: Measured
) -> None:
    short = ("--baseline", *make.SHORT)
    again = distill("train", "student.yaml", "--out", "finished", *short, "--json")
    assert "finished: finished already" in again.stderr
    told = json.loads((make.HERE / old / "finished" / "result.json").read_text())
    assert json.loads(again.stdout) == {"format": 1, **told}  # which was not said always
    network = library.load("finished").eval()
    assert far(tensors("finished"), dict(network.backbone.state_dict())) == 0
    scored = distill("evaluate", "finished", "--suite", "clean,fidelity", "--json")
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["runs"][0]["top1"] == pytest.approx(told["top1"], abs=0.002)
    done = distill("export", "finished", "--format", "safetensors", "--no-latency")
    assert done.exit_code == 0, done.stderr
    pupil = ("--set", "teachers=[{weights: finished}]", "--set", "train.epochs=2")
    taught = distill("train", "student.yaml", "--out", "pupil", *pupil, "--json")
    assert taught.exit_code == 0, taught.stderr
    (teacher,) = json.loads(taught.stdout)["teachers"]
    assert teacher["top1"] == pytest.approx(told["top1"], abs=0.002)
    measured(f"{old}: a finished run", "known, loaded, evaluated, exported, a teacher")


@r23
def test_a_cache_is_sound_and_one_in_work_goes_on(
    old: str, distill: Run, measured: Measured
) -> None:
    answers = ("teacher-cache", "cached.yaml", "--run", "stopped-cached")
    whole, begun = Path("cache"), Path("cache-begun")
    before = listing(begun)
    for level in ("full", "replay", "teacher"):
        said = distill(*answers, "--out", "cache", "--verify", level, "--json")
        assert (said.exit_code, json.loads(said.stdout)["verdict"]) == (0, "sound"), said.stderr
    done = distill(*answers, "--out", "cache-begun")
    assert done.exit_code == 0, done.stderr
    there = listing(begun)
    assert {name: there[name] for name in before} == before
    assert there.keys() == listing(whole).keys()
    known, made = (read(path) for path in (whole, begun))
    for name, column in known.items():
        np.testing.assert_allclose(made[name].astype(float), column.astype(float), atol=1)
    figure = f"sound; the other goes on, {len(there) - len(before)} files made"
    measured(f"{old}: a cache, and one in work", figure)


def read(path: Path) -> dict[str, np.ndarray]:
    """Every row of the views of a complete cache."""
    store = Folder(path)
    manifest = write.read_manifest(store)
    assert manifest is not None
    index = write.read_index(store, manifest)
    assert index is not None
    reader = Reader(store, manifest, num_views=manifest.views)
    ids = safetensors.torch.load(store.read(layout.SAMPLES) or b"")["train"].numpy()
    parts = [reader.rows(ids, view) for view in range(manifest.views)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    reader.close()
    return found


@r23
@pytest.mark.parametrize(
    ("arguments", "out", "more"),
    [
        (("temperature-sweep", "--temperatures", "1,4"), "sweep", ("--temperatures", "1,2,4")),
        (("rank-teachers", "--proxy-epochs", "2"), "teachers", ("--seeds", "3,4")),
        (("sample-efficiency", "--sizes", "40"), "efficiency", ("--sizes", "40,80")),
    ],
)
def test_what_compares_trains_nothing_again(
    old: str,
    distill: Run,
    arguments: tuple[str, ...],
    out: str,
    more: tuple[str, ...],
    measured: Measured,
) -> None:
    """The same numbers from the same trials; more values train those that are new alone."""
    trials = Path(out) / "trials"
    before = {name: data for name, data in listing(trials).items() if not name.endswith(".lock")}
    (page,) = (path for path in Path(out).glob("*.json") if path.name != "rates.json")
    told = json.loads(page.read_text())
    whole = (arguments[0], "student.yaml", *arguments[1:], *make.SHORT, "--out", out)
    for asked in (whole, (*whole, *more)):
        done = distill(*asked)
        assert done.exit_code == 0, done.stderr
        if asked is whole:
            assert numbers(json.loads(page.read_text())) == pytest.approx(numbers(told), abs=1e-6)
        there = listing(trials)
        assert {name: there[name] for name in before} == before
    new = len(list(trials.glob("*/trial.json"))) - len(
        [name for name in before if name.endswith("trial.json")]
    )
    assert new > 0
    measured(f"{old}: {arguments[0]}", f"read again; {new} trials added, none made anew")


def numbers(found: Any) -> list[float]:
    """All numbers of a page, in order."""
    if isinstance(found, dict):
        return [number for key in sorted(found) for number in numbers(found[key])]
    if isinstance(found, list):
        return [number for each in found for number in numbers(each)]
    return [float(found)] if isinstance(found, int | float) else []


@r23
def test_an_export_says_what_the_student_says_and_is_replaced(
    old: str, distill: Run, measured: Measured
) -> None:
    import onnxruntime

    about = json.loads(Path("export/export.json").read_text())
    network = library.load("finished").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = network(images).logits.numpy()
        loaded = library.load("export/model.safetensors").eval()(images).logits.numpy()
        program = torch.export.load("export/model.pt2").module()(torch.from_numpy(pixels)).numpy()
    session = onnxruntime.InferenceSession("export/model.onnx")
    (graph,) = session.run(None, {session.get_inputs()[0].name: pixels})
    differences = [float(abs(answers - expected).max()) for answers in (loaded, program, graph)]
    assert max(differences) < 1e-4
    done = distill("export", "finished", "--out", "export", "--format", "onnx", "--no-latency")
    assert done.exit_code == 0, done.stderr
    left = {path.name for path in Path("export").iterdir() if path.name[0] != "."}
    gone = {"model.pt2", "model.safetensors"}
    assert left == {entry["file"] for entry in (*about["files"], *about["companions"])} - gone | {
        "export.json"
    }
    figure = f"largest difference {max(differences):.1g}; replaced by a new one"
    measured(f"{old}: an export as ONNX, program and safetensors", figure)


@r23
def test_a_pack_and_an_index_of_shards_are_read(old: str, distill: Run, measured: Measured) -> None:
    indexes = [*Path("pack").glob("*.index"), *Path("shards").glob("*.index")]
    before = {path: path.read_bytes() for path in indexes}
    assert len(before) == 4
    assert distill("pack", "photos.yaml", "--out", "pack", "--verify").exit_code == 0
    again = distill("pack", "photos.yaml", "--out", "pack", "--size", "8", "--json")
    assert json.loads(again.stdout)["made"] == 0
    for root in ("pack", "shards"):
        tar = ("--set", "data.name=webdataset", "--set", f"data.root={root}")
        done = distill("train", "photos.yaml", "--out", f"of-{root}", *tar)
        assert done.exit_code == 0, done.stderr
        assert "looking once through" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    measured(f"{old}: a pack, and an index of tar shards", "verified, trained on, none made anew")


@r23
def test_every_recipe_means_what_it_meant(old: str, distill: Run, measured: Measured) -> None:
    """Those that runs were made from, and those that commands wrote."""
    found = 0
    for path in sorted(Path().rglob("*.yaml")):
        Recipe.load(path)
        state = next(iter((path.parent / "checkpoint").glob("*/state.json")), None)
        if path.name == "recipe.yaml" and state is not None:
            known = json.loads(state.read_text())["identity"]
            assert Recipe.load(path).digest() == known["recipe"], path
            dataset = datasets.load(Recipe.load(path).data)
            assert dataset.fingerprint == known["data"], path
            found += 1
    assert found >= 10
    measured(f"{old}: recipes and data of runs", f"{found} of {found} with the digests of then")


def newer_checkpoint() -> tuple[str, ...]:
    (state,) = Path("stopped/checkpoint").glob("*/state.json")
    change(state, format=2)
    manifest = state.with_name("MANIFEST.json")
    data = state.read_bytes()
    import hashlib

    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest, **{"state.json": entry})
    return "train", "student.yaml", "--out", "stopped"


def newer_cache(name: str) -> tuple[str, ...]:
    path = Path("cache", name)
    found = json.loads(path.read_bytes())
    del found["crc32"]
    found |= {"format": 2, "compression": "of tomorrow"}
    stated = f"{layout.checksum(layout._canonical(found)):08x}"
    path.write_bytes(layout._canonical(found | {"crc32": stated}))
    return "train", "cached.yaml", "--out", "stopped-cached"


def newer_index(folder: str) -> tuple[str, ...]:
    path = Path(folder, "train.index")
    data = path.read_bytes()
    length, _, magic = struct.unpack("<QI4s", data[-16:])
    about = json.loads(data[-16 - length : -16])
    text = json.dumps(about | {"format": 2}).encode()
    before = data[: -16 - length] + text
    path.write_bytes(before + struct.pack("<QI4s", len(text), zlib.crc32(before), magic))
    tar = ("--set", "data.name=webdataset", "--set", f"data.root={folder}")
    return "train", "photos.yaml", "--out", "of-it", *tar


def newer_pack() -> tuple[str, ...]:
    path = Path("pack/pack.json")
    found = json.loads(path.read_text())
    found["identity"]["format"] = 2
    path.write_text(json.dumps(found | {"plans": []}))
    return "pack", "photos.yaml", "--out", "pack", "--size", "8"


def newer_student() -> tuple[str, ...]:
    path = Path("teacher/student.safetensors")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about = json.loads(metadata["distill"]) | {"format": 2, "pruning": "of tomorrow"}
    safetensors.torch.save_file(weights, path, metadata | {"distill": json.dumps(about)})
    return "train", "student.yaml", "--out", "other", "--set", "teachers=[{weights: teacher}]"


def newer_export() -> tuple[str, ...]:
    change(Path("export/export.json"), format=2, files={"model.onnx": {}})
    return "export", "finished", "--out", "export", "--format", "safetensors", "--no-latency"


def newer_result() -> tuple[str, ...]:
    change(Path("finished/result.json"), format=2, carbon=3.0)
    return "train", "student.yaml", "--out", "finished", *make.SHORT


def newer_trial() -> tuple[str, ...]:
    change(Path("sweep/trials/temperature-1_seed-3/trial.json"), format=2, correct=None)
    sweep = ("temperature-sweep", "student.yaml", "--temperatures", "1,4")
    return (*sweep, *make.SHORT, "--out", "sweep")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=1))


NEWER = {
    "checkpoint": newer_checkpoint,
    "manifest of a cache": lambda: newer_cache("manifest.json"),
    "index of a cache": lambda: newer_cache("index.json"),
    "index of a pack": lambda: newer_index("pack"),
    "plan of a pack": newer_pack,
    "student.safetensors": newer_student,
    "export.json": newer_export,
    "result.json": newer_result,
    "trial.json": newer_trial,
}


@r23
def test_what_a_newer_version_wrote_is_refused_and_left_as_it_is(
    distill: Run, tmp_path: Path, measured: Measured
) -> None:
    for kind, alter in NEWER.items():
        place = tmp_path / kind.replace(" ", "-")
        shutil.copytree(make.HERE / FORMATS[-1], place)
        os.chdir(place)
        arguments = alter()
        before = listing(place)
        said = distill(*arguments)
        assert said.exit_code == 4, (kind, said.stderr)
        assert "written by a newer version (format 2, known is 1)" in said.stderr, kind
        assert "update distill" in said.stderr, kind
        after = {name: data for name, data in listing(place).items() if before.get(name) != data}
        assert {Path(name).name for name in after} <= {".lock"}, kind
    measured(
        "a newer format of checkpoint, cache, pack, …", f"{len(NEWER)} of {len(NEWER)} refused"
    )


def test_an_index_of_shards_in_a_newer_format_is_made_again_aside(
    old: str, distill: Run, tmp_path: Path
) -> None:
    """It is nobody's only copy: the shards are looked through once more, as without it."""
    arguments = newer_index("shards")
    done = distill(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "looking once through 1 train shards" in done.stderr


def test_a_format_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make", FORMATS[-1].partition("-")[2]])
    before = listing(make.HERE / FORMATS[-1])
    with pytest.raises(SystemExit, match="does not change"):
        make.main()
    assert listing(make.HERE / FORMATS[-1]) == before


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_tells_of_the_machine_that_made_it(name: str) -> None:
    for path in (make.HERE / name).rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert b"/tmp/" not in data, path
        assert b"/home/" not in data, path
        assert b"/work/" not in data, path
        assert path.name not in (".lock", ".cache")

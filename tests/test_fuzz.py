"""Whatever a file holds, its reader says so in a sentence, at once, and in little memory."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

import pytest

from tests.engine import processes
from tests.mutation import Files, Mutator, changed, damaged, dumped
from tests.promises import Measured

ROOT = Path(__file__).parents[1]
SECONDS = 1.0  # of a processor, that reading may take
BYTES = 200 * 2**20  # that reading may take

long = [pytest.mark.soak, pytest.mark.timeout(3600)]


class Kind(NamedTuple):
    """A kind of files: how they are made, and what reads them in a folder."""

    make: Mutator
    read: Callable[[Path], object]


RECIPE: dict[str, Any] = {
    "data": {
        "name": "digits",
        "fraction": 0.1,
        "augment": [{"name": "crop", "padding": 2}, "flip"],
    },
    "teachers": [{"model": "resnet14", "weights": "t.safetensors"}, {"weights": "runs/t"}],
    "student": {"model": "vit", "width": 16, "depth": 1, "heads": 2},
    "objective": [
        {"term": "ce", "weight": 0.5},
        {"term": "kd", "temperature": 4.0, "weight": {"start": 1.0, "end": 0.0}},
    ],
    "cache": {"path": "cache", "views": 2, "codec": "topk:3"},
    "optimizer": {"name": "adamw", "lr": 1e-3, "warmup_epochs": 0.5},
    "train": {"epochs": 2, "batch_size": 30, "seed": 1},
}


def recipes(folder: Path) -> Kind:
    from distill import yamlio
    from distill.recipe import Recipe

    text = yamlio.dump(RECIPE).encode()
    outer = {**RECIPE, "teachers": [{"recipe": "other.yaml"}]}
    seeds = [{"recipe.yaml": text}]
    seeds += [{"recipe.yaml": yamlio.dump(outer).encode(), "other.yaml": text}]

    def remade(rng: Random) -> Files:
        if rng.random() < 0.7:
            return {"recipe.yaml": dumped(rng, changed(rng, RECIPE))}
        inner = dumped(rng, changed(rng, RECIPE))
        teachers = changed(rng, outer["teachers"])
        return {"recipe.yaml": dumped(rng, {**outer, "teachers": teachers}), "other.yaml": inner}

    return Kind(Mutator(seeds, [remade]), lambda at: Recipe.load(at / "recipe.yaml"))


def overrides(folder: Path) -> Kind:
    from distill import yamlio
    from distill.recipe import Recipe

    (folder / "recipe.yaml").write_text(yamlio.dump(RECIPE))
    seeds = [
        {"set": text.encode()}
        for text in ("optimizer.lr=1e-3", "teachers.0={weights: x}", "objective.1.temperature=2",
                     "student.width=32", "data.augment=[flip]", "cache.views=3")
    ]  # fmt: skip

    def read(at: Path) -> object:
        text = (at / "set").read_bytes() if (at / "set").exists() else b""
        return Recipe.load(folder / "recipe.yaml", [text.decode(errors="surrogateescape")])

    return Kind(Mutator(seeds), read)


def _tensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with another header, or another description in it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__", {})
    if "distill" in about and rng.random() < 0.7:
        about["distill"] = dumped(rng, changed(rng, json.loads(about["distill"]))).decode(
            errors="replace"
        )
        text = json.dumps(header).encode()
    else:
        text = dumped(rng, changed(rng, header))
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def weights(folder: Path) -> Kind:
    import torch

    from distill import models, recipe
    from distill.models import weights

    facts: dict[str, Any] = {
        "classes": ("a", "b", "c"), "image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    torch.manual_seed(0)
    seeds = []
    for spec in (
        {"model": "mlp", "width": 8},
        {"model": "vit", "width": 8, "depth": 1, "heads": 1},
    ):
        network = models.build_student(recipe.Model(weights=None, **spec), **facts)
        seeds.append({"student.safetensors": weights.to_bytes(network)})

    def remade(rng: Random) -> Files:
        data = _tensors(rng, rng.choice(seeds)["student.safetensors"])
        if found := weights._SEAL.search(data):  # made right, or nothing else is looked at
            start, end = found.span(1)
            data = data[:start] + weights._UNSEALED.encode() + data[end:]
            seal = hashlib.sha256(data).hexdigest().encode()
            data = data[:start] + seal + data[end:]
        return {"student.safetensors": data}

    return Kind(Mutator(seeds, [remade]), weights.load)


def checkpoints(folder: Path) -> Kind:
    import torch

    from distill.engine import checkpoint
    from distill.engine.checkpoint import Checkpoint

    identity = {"recipe": "ab" * 32, "data": {"images": "cd" * 32}, "teachers": []}
    tensors = {
        "model": {"w": torch.zeros(4, 3), "b": torch.ones(4)},
        "optimizer": {"0.step": torch.tensor(3.0)},
    }
    values = {"epoch": 1, "rng": "00ff", "warnings": ["a"], "losses": [[0.5, 0.25]], "rows": "{}\n"}
    checkpoint.save(folder, Checkpoint(7, tensors, values), identity=identity)
    made = folder / "step-00000007"
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    names = sorted(files)

    def sealed(found: Files) -> Files:
        about = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in found.items()
            if name != "MANIFEST.json"
        }
        return {**found, "MANIFEST.json": json.dumps(about).encode()}

    def remade(rng: Random) -> Files:
        found = dict(files)
        match rng.randrange(3):
            case 0:
                found["state.json"] = dumped(rng, changed(rng, json.loads(found["state.json"])))
            case 1:
                found["model.safetensors"] = _tensors(rng, found["model.safetensors"])
            case _:
                about = changed(rng, json.loads(found["MANIFEST.json"]))
                return {**found, "MANIFEST.json": dumped(rng, about)}
        return sealed(found)

    def read(at: Path) -> object:
        place = at / "step-00000007"
        place.mkdir()
        for name in names:
            if (at / name).exists():
                (at / name).rename(place / name)
        return checkpoint.load(at, identity=identity, warn=str)

    return Kind(Mutator([files], [remade]), read)


def caches(folder: Path) -> Kind:
    import numpy as np

    from distill.cache import layout, read, verify, write
    from distill.cache.store import Folder
    from tests.cache import made

    store = Folder(folder)
    manifest = made.begin(store, made.manifest())
    made.fill(store, manifest)
    write.finish(store, manifest, made.SCORES)
    files = {name: store.read(name) or b"" for name in store.sizes()}

    def resealed(rng: Random) -> Files:
        name = rng.choice(("manifest.json", "manifest.json", "index.json"))
        data = json.loads(files[name])
        del data["crc32"]
        data = changed(rng, data)
        if not isinstance(data, dict):
            return {**files, name: dumped(rng, data)}
        text = (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()
        crc = f"{zlib.crc32(text):08x}"
        text = (json.dumps({**data, "crc32": crc}, sort_keys=True, indent=1) + "\n").encode()
        return {**files, name: text}

    def tensors(rng: Random) -> Files:
        name = rng.choice(sorted(name for name in files if name.endswith(".safetensors")))
        data = _tensors(rng, files[name])
        found = {**files, name: data}
        if name == layout.SAMPLES:  # the manifest says which file it is
            about = json.loads(files["manifest.json"])
            del about["crc32"]
            about["samples_sha256"] = hashlib.sha256(data).hexdigest()
            found["manifest.json"] = layout.seal(layout.Manifest.model_validate(about))
        return found

    def look(at: Path) -> object:
        store = Folder(at)
        manifest = write.read_manifest(store)
        if manifest is None:
            return None
        verify.quick(store, manifest)
        verify.full(store, manifest)
        verify.progress(store, manifest)
        read.require_complete(store, manifest, 2)
        read.canaries(store, manifest)
        reader = read.Reader(store, manifest, num_views=2)
        try:
            reader.require(np.array([2, 3]), exact=False)
            reader.rows(reader.ids, 1)
            return reader.evaluation("test")
        finally:
            reader.close()

    return Kind(Mutator([files], [resealed, tensors]), look)


@functools.cache
def _tar() -> bytes:
    import io
    import tarfile

    from tests.cli.conftest import picture

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(3):
            parts = {"png": picture((4, 4), i), "cls": b"1", "json": b'{"label": 1}'}
            for suffix, data in parts.items():
                entry = tarfile.TarInfo(f"{'long' * 40 if i == 2 else 'a'}/é{i}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def tars(folder: Path) -> Kind:
    from distill.data import tar_index

    sound = _tar()

    def remade(rng: Random) -> Files:
        """Another header, whose checksum is right."""
        data = bytearray(sound)
        headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
        at = rng.choice(headers)
        header = bytearray(damaged(rng, bytes(data[at : at + 512]), sound)[:512].ljust(512, b"\0"))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[at : at + 512] = header
        return {"train-00000.tar": bytes(data)}

    def read(at: Path) -> object:
        return tar_index.scan(at / "train-00000.tar")

    return Kind(Mutator([{"train-00000.tar": sound}], [remade]), read)


def packs(folder: Path) -> Kind:
    """Shards with an index, as `distill pack` leaves them."""
    from distill.data import tar_index, tars
    from distill.data.shelf import File

    files: Files = {"pack.json": b"{}", "classes.txt": b"ant\nbee\n"}
    for split in ("train", "test"):
        name = f"{split}-00000.tar"
        (folder / name).write_bytes(_tar())
        section = tar_index.scan(folder / name)
        for record in section.records:
            start, end = int(record["offset"]), int(record["offset"] + record["size"])
            record["crc32"] = zlib.crc32(_tar()[start:end])
        path = folder / f"{split}.index"
        tar_index.write(path, [section], {name: File(len(_tar()), 0)}, checked=True)
        files |= {name: _tar(), path.name: path.read_bytes()}
    sound, tail = files["train.index"], tar_index._TAIL
    length = tail.unpack(sound[-tail.size :])[0]
    body, about = sound[: -tail.size - length], json.loads(sound[-tail.size - length : -tail.size])

    def remade(rng: Random) -> Files:
        records = damaged(rng, body, sound) if rng.random() < 0.5 else body
        text = (
            dumped(rng, changed(rng, about)) if rng.random() < 0.6 else json.dumps(about).encode()
        )
        end = tail.pack(len(text), zlib.crc32(records + text), b"idx\n")
        return {**files, "train.index": records + text + end}

    def read(at: Path) -> object:
        found = tars.load(str(at))
        for split in (found.train, found.test):
            images = split.files
            images.suspects(10**6)
            for i in range(len(images)):
                images.name(i)
                images.read(i)
        return found

    return Kind(Mutator([files], [remade]), read)


def results(folder: Path) -> Kind:
    from distill import yamlio
    from distill.engine.run import Result, Run
    from distill.report import run as report

    scores: dict[str, Any] = {"top1": 0.9, "top5": 1.0, "nll": 0.3, "ece": 0.02}
    own: dict[str, Any] = {**scores, "parameters": 78_042, "flops": 12_400_000}
    result = Result(
        **own,
        epochs=2, steps=6, seconds=1.5, images_per_second=200.0, student="vit",
        teachers=[{"model": "resnet8", "run": "t", "weight": 1.0, **own}], run="run",
        identity={"recipe": "ab" * 32, "data": "cd", "teachers": ["ef"]}, warnings=["mind this"],
        baseline={**own, "model": "vit"}, gain=0.01, gain_ci95=[-0.01, 0.03],
    )  # fmt: skip
    rows = [
        {"split": "train", "epoch": 1, "step": 3, "loss": 1.5, "ce": 1.0, "lr": 0.1},
        {"split": "val", "epoch": 1, "step": 3, "top1": 0.5, "nll": 1.1},
    ]
    files = {
        "result.json": json.dumps(result.to_json()).encode(),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "recipe.yaml": yamlio.dump(RECIPE).encode(),
    }

    def remade(rng: Random) -> Files:
        if rng.random() < 0.5:
            return {**files, "result.json": dumped(rng, changed(rng, result.to_json()))}
        lines = [dumped(rng, changed(rng, row)).replace(b"\n", b" ") for row in rows]
        return {**files, "metrics.jsonl": b"\n".join(lines)}

    def read(at: Path) -> object:
        if (found := Run(at).finished()) is not None:
            report.write(at)
        return found

    return Kind(Mutator([files], [remade]), read)


def trials(folder: Path) -> Kind:
    from distill.engine.trials import outcome

    kept = {
        "scores": {"top1": 0.5, "nll": 1.0}, "correct": "8A==", "images": 5, "parameters": 10,
        "flops": 20, "warnings": [], "failed": None,
    }  # fmt: skip
    seeds = [{"trial.json": json.dumps(one).encode()} for one in (kept, {"failed": "diverged"})]

    def remade(rng: Random) -> Files:
        return {"trial.json": dumped(rng, changed(rng, kept))}

    return Kind(Mutator(seeds, [remade]), outcome)


def split_files(folder: Path) -> Kind:
    from distill.data.folder import scan
    from tests.cli.conftest import images

    images(folder, "ant", "bee", count=2)
    text = b"path,split\nant/0.png,train\nant/1.png,test\nbee/0.png,train\nbee/1.png,test\n"
    seeds = [{"split.csv": text}, {"split.csv": b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")}]
    return Kind(Mutator(seeds), lambda at: scan(folder, str(at / "split.csv")))


def exports(folder: Path) -> Kind:
    from distill.export import MARK, _listed

    about = {
        "files": [{"file": "model.onnx", "bytes": 3, "sha256": "ab"}],
        "companions": [{"file": "README.md", "bytes": 3, "sha256": "ab"}],
    }

    def remade(rng: Random) -> Files:
        return {MARK: dumped(rng, changed(rng, about))}

    return Kind(Mutator([{MARK: json.dumps(about).encode()}], [remade]), _listed)


def official(folder: Path) -> Kind:
    import gzip

    from distill.data import official

    def idx(*shape: int) -> bytes:
        sizes = b"".join(n.to_bytes(4, "big") for n in shape)
        return bytes((0, 0, 8, len(shape))) + sizes + bytes(math.prod(shape))

    names = (*official.FASHION_MNIST.train, *official.FASHION_MNIST.test)
    files = {name: idx(3, 28, 28) if "images" in name else idx(3) for name in names}
    packed = {f"{name}.gz": gzip.compress(data, 1) for name, data in files.items()}

    def read(at: Path) -> object:
        return official.read("fashion-mnist", at, download=False)

    return Kind(Mutator([files, packed]), read)


def manifests(folder: Path) -> Kind:
    import numpy as np

    from distill.data import folder as folders
    from distill.data import manifest
    from distill.data.encoded import Split
    from tests.cli.conftest import images

    images(folder, "train/ant", "train/bee", "test/ant", count=2)
    found = folders.scan(folder, None)
    splits = {
        "train": Split(found.train, np.array([0, 0, 1, 1]), []),
        "test": Split(found.test, np.array([0, 0]), []),
    }
    path = folder / "images.manifest"
    counts = {name: len(split.files) for name, split in splits.items()}
    with manifest.writing(path, max_pixels=100, images=counts) as add:
        for name, split in splits.items():
            for i in range(len(split.files)):
                row = {
                    "split": name, "name": split.files.name(i), "size": split.files[i].size,
                    "label": found.classes[split.labels[i]], "sha256": "ab" * 32, "width": 20,
                    "height": 16, "format": "PNG", "mode": "RGB", "animated": False,
                    "pixels": "cd" * 8, "bad": None if i else "cut short",
                }  # fmt: skip
                add(manifest.Row.model_validate(row))
    sound = path.read_bytes()
    lines = sound.splitlines()[:-1]

    def remade(rng: Random) -> Files:
        others = list(lines)
        at = rng.randrange(len(lines))
        others[at] = dumped(rng, changed(rng, json.loads(lines[at]))).replace(b"\n", b" ")
        text = b"".join(line + b"\n" for line in others)
        end = json.dumps({"sha256": hashlib.sha256(text).hexdigest()}, separators=(",", ":"))
        return {"images.manifest": text + end.encode() + b"\n"}

    def read(at: Path) -> object:
        return manifest.recorded(at / "images.manifest", splits, found.classes, max_pixels=100)

    return Kind(Mutator([{"images.manifest": sound}], [remade]), read)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "recipes": recipes,
    "--set values": overrides,
    "weights": weights,
    "checkpoints": checkpoints,
    "caches": caches,
    "tar shards": tars,
    "packs": packs,
    "results and metrics": results,
    "trials": trials,
    "split files": split_files,
    "export folders": exports,
    "published sets": official,
    "manifests of images": manifests,
}


class TooLong(BaseException):
    """Reading took too long."""


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _read_all(kind: str, count: int, seed: int, folder: Path) -> None:
    """Read `count` mutated sets of files; leave what came of them in `folder/found.json`."""
    import torch

    from distill import console
    from distill.errors import DistillError

    torch.set_num_threads(1)
    console.err.quiet = console.out.quiet = True
    home, place = folder / "home", folder / "place"
    home.mkdir()
    make, read = KINDS[kind](home)
    faults: Counter[str] = Counter()
    refused = 0
    signal.signal(signal.SIGPROF, _too_long)
    # A mistaken size should fail to be had, not take the machine down.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    most = 0
    for number in range(count):
        rng = Random(f"{kind} {seed} {number}")
        files = make(rng)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        (folder / "number").write_text(str(number))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(place)
        except DistillError as error:
            refused += 1
            str(error).encode(errors="surrogateescape")
        except (Exception, TooLong) as error:
            last = traceback.extract_tb(error.__traceback__)
            inside = [frame for frame in last if "/distill/" in frame.filename] or last
            where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
            faults[f"{number}: {where}: {type(error).__name__}: {str(error)[:80]!r}"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if number > 20 and grown > BYTES + sum(map(len, files.values())):
            faults[f"{number}: took {grown / 2**20:.0f} MB"] += 1
        most = max(most, grown if number > 20 else 0)
    found = {"faults": list(faults), "refused": refused, "most": most}
    (folder / "found.json").write_text(json.dumps(found))


SLOW = ("caches", "results and metrics")  # to read one takes several files, or draws a page


@pytest.mark.promise("R14")
@pytest.mark.parametrize(
    ("kind", "count"),
    [(kind, 200 if kind in SLOW else 400) for kind in KINDS]
    + [pytest.param(kind, 5_000 if kind in SLOW else 20_000, marks=long) for kind in KINDS],
)
def test_no_file_makes_its_reader_fail_without_a_sentence(
    kind: str, count: int, tmp_path: Path, measured: Measured
) -> None:
    child = processes.context.Process(target=_read_all, args=(kind, count, 0, tmp_path))
    child.start()
    child.join()
    number = (tmp_path / "number").read_text() if (tmp_path / "number").exists() else "none"
    assert child.exitcode == 0, f"the process ended with {child.exitcode} at file {number}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == []
    assert found["refused"] > 0
    measured(
        f"mutated {kind}",
        f"{count:,}: {found['refused']:,} refused in a sentence, 0 crashes, 0 hangs",
    )


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_no_assertion_stands_for_a_check(kind: str, tmp_path: Path) -> None:
    """`python -O` leaves assertions out, and nothing else may change."""
    script = "import sys, pathlib; from tests import test_fuzz as fuzz; "
    script += "fuzz._read_all(sys.argv[1], 500, 1, pathlib.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-O", "-c", script, kind, str(tmp_path)], cwd=ROOT, check=True)
    assert json.loads((tmp_path / "found.json").read_text())["faults"] == []

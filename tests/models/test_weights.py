from __future__ import annotations

import hashlib
import json
import pickle
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from distill.errors import (
    DamagedError,
    IdentityError,
    IncompatibleError,
    PreflightError,
    RecipeError,
)
from distill.models import weights
from distill.models.network import Network
from tests.models.conftest import CLASSES
from tests.promises import Measured

Build = Callable[..., Network]
VIT: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "position": "conv"}


@pytest.fixture
def saved(student: Build, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    path.write_bytes(weights.to_bytes(student()))
    return path


def reworded(path: Path, **changes: Any) -> None:
    """The file at `path` with other words in its description."""
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["distill"])
    del data["sha256"]  # as a file of an earlier version
    words = {"distill": json.dumps(data | changes)}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), words))


@pytest.mark.parametrize(
    ("model", "keys"), [("resnet8", {}), ("vit", VIT), ("timm/test_resnet", {})]
)
def test_a_file_brings_back_the_very_network(
    student: Build, tmp_path: Path, model: str, keys: dict[str, Any]
) -> None:
    network = student(model, **keys)
    network(torch.rand(8, 3, 16, 16))  # running statistics that are not the initial ones
    path = tmp_path / "net.safetensors"
    path.write_bytes(weights.to_bytes(network))
    loaded = weights.load(path)
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(loaded.eval()(images).logits, network.eval()(images).logits)
    assert loaded.description == network.description
    assert loaded.classes == CLASSES
    assert weights.fingerprint(loaded) == weights.fingerprint(network)
    assert weights.to_bytes(loaded) == weights.to_bytes(network)


def test_the_file_holds_plain_names_and_every_default(student: Build, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == set(student().backbone.state_dict())
    words = json.loads(metadata["distill"])
    assert len(words.pop("sha256")) == 64
    assert words == {
        "format": 1,
        "model": "resnet8",
        "arguments": {},
        "num_classes": 4,
        "classes": list(CLASSES),
        "image_size": 16,
        "input_size": None,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.2, 0.1],
    }
    assert student("vit", **VIT).description.arguments == VIT | {
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "pool": "mean",
        "stem": "patch",
        "mixer": "attention",
        "attention": "global",
        "window": 4,
        "linear": "dense",
        "rank": None,
        "layer_scale": 0.0,
        "drop": 0.0,
        "drop_path": 0.0,
    }


def test_channels_last_and_shared_tensors_are_saved_whole(student: Build, tmp_path: Path) -> None:
    network = student()
    expected = weights.to_bytes(network)
    assert weights.to_bytes(network.to(memory_format=torch.channels_last)) == expected
    tied = student("tests.models.conftest:tied")
    path = tmp_path / "student.safetensors"
    path.write_bytes(weights.to_bytes(tied))
    images = torch.rand(2, 3, 16, 16)
    loaded = weights.load(tmp_path, vouched=["tests.models.conftest:tied"])
    assert torch.equal(loaded(images).logits, tied(images).logits)


def test_a_run_directory_is_its_student(saved: Path) -> None:
    run = saved.parent / "run"
    run.mkdir()
    saved.rename(run / "student.safetensors")
    assert weights.load(run).model == "resnet8"
    assert weights.load(str(run / "student.safetensors")).model == "resnet8"


def test_a_missing_file_says_what_weights_may_be(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="nothing: no such file or run directory") as caught:
        weights.load(tmp_path / "nothing")
    assert "hf-hub:OWNER/NAME" in caught.value.hint
    with pytest.raises(PreflightError, match=r"has no student\.safetensors") as caught:
        weights.load(tmp_path)
    assert "training is done" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 200, 5000, -1])
def test_a_truncated_file_is_damaged(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        weights.load(saved)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\xff" * 64, pickle.dumps({})])
def test_another_file_by_that_name_is_damaged(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        weights.load(saved)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt"])
def test_a_pickle_is_not_opened_and_the_hint_converts_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"net.{suffix}"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(RecipeError, match=r"only \.safetensors files are") as caught:
        weights.load(path)
    _, _, code, *names = shlex.split(caught.value.hint.partition(": ")[2])
    monkeypatch.setattr(sys, "argv", ["-c", *names])
    exec(code)  # the hint's own words
    converted = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert torch.equal(converted["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"format": 2}, IdentityError, r"written by a newer version \(format 2, known is 1\)"),
        ({"format": 2, "new": 1}, IdentityError, "written by a newer version"),
        ({"mean": [0.5]}, DamagedError, "description .* is damaged"),
        ({"other": 1}, DamagedError, "description .* is damaged"),
        ({"model": "resnet9"}, RecipeError, "unknown model 'resnet9'"),
        ({"model": "os:abort"}, RecipeError, "which is code outside distill"),
        ({"model": "resnet14"}, IncompatibleError, "belong to another network; missing: layer1.1"),
        ({"arguments": {"depth": 3}}, RecipeError, "unknown key"),
        ({"num_classes": 5}, DamagedError, "4 names for 5 classes"),
        ({"image_size": 0}, DamagedError, "greater than or equal to 1"),
    ],
)
def test_a_description_is_not_trusted(
    saved: Path, words: dict[str, Any], error: type[Exception], message: str
) -> None:
    reworded(saved, **words)
    with pytest.raises(error, match=message):
        weights.load(saved)


def test_a_description_that_is_no_json_is_damaged(saved: Path) -> None:
    state = safetensors.torch.load_file(saved)
    saved.write_bytes(safetensors.torch.save(state, {"distill": "{"}))
    with pytest.raises(DamagedError, match=r"description .* is damaged"):
        weights.load(saved)


def test_bare_tensors_need_a_name(saved: Path) -> None:
    saved.write_bytes(safetensors.torch.save(safetensors.torch.load_file(saved)))
    with pytest.raises(RecipeError, match="not the name of their network"):
        weights.load(saved)


def test_faults_are_listed_five_a_kind(student: Build, saved: Path) -> None:
    state = safetensors.torch.load_file(saved)
    del state["fc.bias"]
    state["conv1.weight"] = torch.zeros(2, 2)
    state |= {f"extra{i}": torch.zeros(1) for i in range(7)}
    network = student()
    before = weights.fingerprint(network)
    with pytest.raises(IncompatibleError) as caught:
        weights.fill(network.backbone, state, origin="it")
    assert str(caught.value) == (
        "it: the weights belong to another network; missing: fc.bias; "
        "unexpected: extra0, extra1, extra2, extra3, extra4 and 2 more; "
        "of another shape: conv1.weight is (2, 2), not (16, 3, 3, 3)"
    )
    assert weights.fingerprint(network) == before


def test_the_fingerprint_tells_all_that_decides_the_outputs(student: Build) -> None:
    torch.manual_seed(0)
    network = student()
    prints = [weights.fingerprint(network)]
    torch.manual_seed(0)
    assert weights.fingerprint(student()) == prints[0]
    assert weights.fingerprint(network.to(memory_format=torch.channels_last)) == prints[0]
    for keys in ({"mean": (0.5, 0.4, 0.2)}, {"classes": CLASSES[::-1]}, {"image_size": 24}):
        torch.manual_seed(0)
        prints.append(weights.fingerprint(student(**keys)))
    prints.append(
        weights.fingerprint(Network(network.backbone, network.description, selection=(1, 0, 2, 3)))
    )
    with torch.no_grad():
        next(network.parameters())[0, 0, 0, 0] += 1e-6
    prints.append(weights.fingerprint(network))
    assert len(set(prints)) == len(prints) == 6
    assert all(len(text) == 64 and int(text, 16) for text in prints)


class Flips:
    """A file of weights, of which single bytes are flipped."""

    def __init__(self, path: Path) -> None:
        self.path, self.whole = path, path.read_bytes()
        self.header = 8 + int.from_bytes(self.whole[:8], "little")
        self.expected = weights.load(path).description

    def found(self, at: int, flip: int) -> None:
        """That no reader takes the file for whole, not even one that needs no description."""
        flipped = bytearray(self.whole)
        flipped[at] ^= flip
        self.path.write_bytes(flipped)
        for expected in (None, self.expected):
            with pytest.raises((DamagedError, IdentityError, IncompatibleError, RecipeError)):
                weights.load(self.path, expected=expected)


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    "flips", [300, pytest.param(6_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_flipped_byte_of_a_file_of_weights_is_found(
    student: Build, saved: Path, flips: int, measured: Measured
) -> None:
    file, draw = Flips(saved), random.Random(flips)
    beginning = range(file.header) if flips > file.header else range(0, file.header, 11)
    places = [*beginning, *(draw.randrange(len(file.whole)) for _ in range(flips))]
    for at in places:
        file.found(at, draw.randrange(1, 256))
    for at, byte in enumerate(file.whole[: file.header]):
        for blank in b" \t\n\r":  # which JSON does not tell apart
            if byte in b" \t\n\r" and blank != byte:
                file.found(at, byte ^ blank)
    count = len(places)
    measured("one flipped byte of student.safetensors", f"{count:,} of {count:,} found")


def test_the_checksum_is_of_the_whole_file_with_zeros_in_its_place(saved: Path) -> None:
    data = saved.read_bytes()
    with safe_open(saved, framework="pt") as file:
        stated = json.loads(file.metadata()["distill"])["sha256"]
    assert data.count(stated.encode()) == 1
    assert hashlib.sha256(data.replace(stated.encode(), b"0" * 64)).hexdigest() == stated


def test_names_that_look_like_a_checksum_are_names(student: Build, tmp_path: Path) -> None:
    names = ("0" * 64, '"sha256":"' + "0" * 64 + '","format":', "bee", "\u00e9")
    network = student(classes=names)
    path = tmp_path / "net.safetensors"
    path.write_bytes(weights.to_bytes(network))
    assert weights.load(path).classes == names


def test_the_same_network_gives_the_same_bytes_in_every_process(
    student: Build, saved: Path
) -> None:
    """Metadata under several keys would come in any order."""
    content = saved.read_bytes()
    assert all(weights.to_bytes(weights.load(saved)) == content for _ in range(20))


def test_a_file_without_a_checksum_is_read(saved: Path) -> None:
    expected = weights.fingerprint(weights.load(saved))
    reworded(saved)
    assert weights.fingerprint(weights.load(saved)) == expected


def test_a_checksum_that_is_none_is_damage(saved: Path) -> None:
    reworded(saved, sha256="of old")
    with pytest.raises(DamagedError, match=r"description .* is damaged"):
        weights.load(saved)


@pytest.mark.soak
@pytest.mark.promise("R4")
def test_what_the_checksum_costs(tmp_path: Path, measured: Measured) -> None:
    path = tmp_path / "net.safetensors"
    words = json.dumps({"sha256": "0" * 64, "format": 1}, separators=(",", ":"))
    data = safetensors.torch.save({"w": torch.rand(25_000_000)}, {"distill": words})
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert weights._is_sealed(path)
        times.append(time.perf_counter() - began)
    measured("the checksum of 100 MB of weights", f"{1000 * min(times):.0f} ms when they are read")

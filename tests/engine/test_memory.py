"""A batch that does not fit is cut into micro-batches, and the run is the one asked for."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from distill.engine import memory
from distill.errors import PreflightError
from distill.types import Batch

CPU = torch.device("cpu")

RECIPE = """
data: {name: digits, image_size: 64, fraction: 0.45}
student: {model: vit, patch_size: 4, width: 32, depth: 4, heads: 2}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 400}
"""

LIMITED = """
import resource, sys, psutil, torch
from pathlib import Path
from distill.engine.preflight import rehearse
from distill.engine.train import train
from distill.models.zoo import vit
from distill.recipe import Recipe
torch.set_num_threads(1)
torch.nn.Linear(2, 2)(torch.ones(2, 2)).sum().backward()
room = int(sys.argv[1])
if room:
    most = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
size = int(sys.argv[2]) or None
recipe = Recipe.load("recipe.yaml")
print(*rehearse(recipe, Path(sys.argv[3])).warnings)
train(recipe, sys.argv[3], device_batch_size=size, workers=0)
"""


def batch(images: int) -> Batch:
    return Batch(
        torch.rand(images, 3, 8, 8), torch.rand(images, 5), torch.arange(images), torch.arange(1)
    )


class Keeps(nn.Module):
    """Keeps `floats` numbers an image between forward and backward, and counts images."""

    def __init__(self, floats: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(floats))
        self.register_buffer("seen", torch.zeros(()))

    def add(self, batch: Batch, pieces: int) -> None:
        for part in batch.images.flatten(1)[:, :1].chunk(pieces):
            self.seen += len(part)
            loss: Tensor = (part * self.weight).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]


def test_a_run_that_does_not_fit_adds_up_micro_batches_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(name: str, room: int, size: int) -> tuple[str, dict[str, Any], bytes]:
        arguments = [sys.executable, "-c", LIMITED, str(room), str(size), name]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
        out = tmp_path / name
        student = (out / "student.safetensors").read_bytes()
        assert ("micro-batches" in done.stdout) is bool(room)  # planned before it is found out
        return done.stderr, json.loads((out / "result.json").read_text()), student

    said, result, student = run("limited", 600 * 2**20, 0)
    found = re.search(r"400 images at once do not fit .* (\d+) micro-batches of (\d+)", said)
    assert found is not None, said
    pieces, size = map(int, found.groups())
    assert pieces > 1
    assert pieces * size == 400
    assert any("micro-batches" in warning for warning in result["warnings"])
    assert result["memory"] > 10**8
    quiet, plain, same = run("asked", 0, size)
    assert "do not fit" not in quiet
    assert student == same
    assert result["top1"] == plain["top1"]


def test_the_answer_follows_the_need_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Keeps(250_000)  # 1 MB an image
    monkeypatch.setattr(memory, "free_bytes", lambda device: 74 * 10**6)
    for images, reserve, expected in ((32, 0, 1), (48, 0, 2), (48, 20 * 10**6, 3), (96, 0, 3)):
        found = memory.pieces_that_fit(
            network, network.add, batch(images), 1, reserve=reserve, device=CPU
        )
        assert found == expected, images
    assert network.weight.grad is None
    assert network.seen == 0
    with pytest.raises(PreflightError, match="not even one image"):
        memory.pieces_that_fit(network, network.add, batch(6), 1, reserve=10**9, device=CPU)


def test_a_limit_of_the_process_counts() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = 3 * 10**9
    try:
        most = psutil.Process().memory_info().vms + room
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        assert 0.9 * room < memory.free_bytes(CPU) <= room
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_group_leaves_its_limit_less_what_gives_way_to_nobody(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    limits = {"job/step": "max", "job": "1000"}
    for name, most in limits.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("900\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 300\nactive_file 400\n")
    assert memory._free_of_groups(tmp_path / "groups", own) == [800]
    own.write_text("12:memory:/job\n")  # the older kind of groups
    assert memory._free_of_groups(tmp_path / "groups", own) == []
    assert memory._free_of_groups(tmp_path / "groups", tmp_path / "nothing") == []


def test_memory_that_runs_out_in_a_step_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    trusting = LIMITED.replace("size = int", "from distill.engine import memory\nsize = int")
    trusting = trusting.replace(
        "train(recipe,",
        "memory.PART = 1e9\nfrom distill.errors import DistillError\ntry:\n    train(recipe,",
    ).rstrip("\n")
    trusting += "\nexcept DistillError as error:\n    print(error, '|', error.hint)\n"
    arguments = [sys.executable, "-c", trusting, str(600 * 2**20), "0", "run"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "the memory of cpu is not enough for a step on 400 images" in done.stdout, done.stderr
    assert "--device-batch-size 200" in done.stdout


def test_what_the_allocator_says_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(raised.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not memory.is_out_of_memory(other.value)

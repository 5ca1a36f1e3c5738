"""What a machine can do is known before a run, not found out in it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.engine import machine
from distill.engine.train import train
from distill.errors import IncompatibleError
from distill.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({}, False),
        ({"avx2": True, "avx512_f": True, "avx512_vnni": True}, False),
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"amx_tile": True, "amx_int8": True}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "aarch64", "arm_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": False, "neon": True}, False),
    ],
)
def test_which_cpus_compute_in_bf16(capabilities: dict[str, Any], fast: bool) -> None:
    assert machine.has_fast_bf16(capabilities) is fast


def test_fp32_is_no_autocast() -> None:
    with machine.autocast("fp32", CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="fp16 needs a GPU") as caught:
        machine.autocast("fp16", CPU)
    assert caught.value.hint == "--set train.precision=fp32"


def test_bf16_on_a_cpu_without_it_is_refused() -> None:
    """In a process of its own, whose CPU reports less than it has."""
    code = """
    import torch
    torch.cpu.get_capabilities = lambda: {"avx512_f": True}
    from distill.engine import machine
    from distill.errors import IncompatibleError
    try:
        machine.autocast("bf16", torch.device("cpu"))
    except IncompatibleError as error:
        print(error, "|", error.hint)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    message, _, hint = done.stdout.partition(" | ")
    assert "bf16 is 12 to 21 times slower" in message
    assert "AVX512-BF16 nor AMX" in message
    assert hint.strip() == "--set train.precision=fp32"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_gpu_takes_both_halves(precision: str, dtype: torch.dtype) -> None:
    context = machine.autocast(precision, CUDA)
    assert isinstance(context, torch.autocast)
    assert context.device == "cuda"
    assert context.fast_dtype is dtype


@pytest.mark.parametrize(
    ("batch_size", "world", "most", "pieces"),
    [
        (64, 1, None, 1),
        (64, 1, 64, 1),
        (64, 1, 100, 1),
        (64, 1, 32, 2),
        (64, 1, 1, 64),
        (64, 2, None, 1),
        (64, 2, 32, 1),
        (64, 4, 8, 2),
        (96, 2, 16, 3),
    ],
)
def test_a_share_is_cut_into_as_many_pieces_as_needed(
    batch_size: int, world: int, most: int | None, pieces: int
) -> None:
    here = machine.setup(workers=0, device_batch_size=most)._replace(world=world)
    assert here.micro_batches(batch_size) == pieces


def test_a_share_that_cannot_be_cut_evenly_is_refused() -> None:
    here = machine.setup(workers=0, device_batch_size=5)._replace(world=2)
    with pytest.raises(IncompatibleError, match="5 does not divide the 12 images") as caught:
        here.micro_batches(24)
    assert caught.value.hint == "possible sizes: 1, 2, 3, 4, 6"


RECIPE = """
data: {name: digits, fraction: 0.1}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 2, batch_size: 30, precision: bf16}
"""


@pytest.mark.skipif(
    not machine.has_fast_bf16(torch.cpu.get_capabilities()), reason="this CPU imitates bf16"
)
def test_a_run_in_bf16_is_finite_and_keeps_its_weights_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    result = train(recipe, tmp_path / "bf16")
    assert math.isfinite(result.nll)
    weights = safetensors.torch.load_file(tmp_path / "bf16" / "student.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    plain = train(Recipe.load(tmp_path / "recipe.yaml", ["train.precision=fp32"]), tmp_path / "32")
    assert result.nll == pytest.approx(plain.nll, rel=0.05)
    assert result.nll != plain.nll  # so it was computed in another precision


def test_the_machine_is_busy_only_where_threads_can_wait(tmp_path: Path) -> None:
    """A load that no machine of this size has, in a process of its own."""
    code = """
    import os, sys
    os.getloadavg = lambda: (10_000.0, 0.0, 0.0)
    import torch
    torch.set_num_threads(int(sys.argv[1]))
    from distill.engine import machine
    machine.setup(workers=0)
    """
    for threads, warned in ((1, False), (2, True)):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(threads)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert ("this machine is busy" in done.stderr) is warned

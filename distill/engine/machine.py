"""The machine a run finds itself on: devices, processes, precision, and requests to stop."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import signal
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

from distill import console
from distill.data.workers import cores
from distill.engine import launch, memory
from distill.errors import IncompatibleError, PreflightError
from distill.signals import heard_by

# Images that a network answers at once. On a CPU larger ones fall out of its caches: 224 px run
# 1.7 times slower in batches of 128.
BATCH_SIZE = {"cuda": 512, "mps": 256, "cpu": 32}
PACKAGES = ("distill-kd", "torch", "torchvision", "timm", "numpy")  # that decide the numbers
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ASK_SECONDS = 1.0  # between two times that processes ask each other for a signal
ASK_STEPS = 50  # and never more steps, should they become slower


class Machine(NamedTuple):
    """Where a run happens. Nothing here decides its result."""

    accelerator: Accelerator
    device: torch.device
    rank: int  # this process's number, from 0
    world: int  # number of processes
    workers: int  # processes that decode images, for each training process
    device_batch_size: int | None  # most images at once on a device; None is all of its share
    compile: bool
    cuda_graph: bool  # whether a step may be launched as one
    shard_weights: bool  # whether a process holds a part of them only, where there are several
    checkpoint_seconds: float

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether models lie in parts on the processes."""
        return self.shard_weights and self.world > 1

    @property
    def options(self) -> dict[str, Any]:
        """Those of the command line that decide last bits."""
        return {
            "compile": self.compile,
            "device_batch_size": self.device_batch_size,
            "shard_weights": self.shards,
        }

    def micro_batches(self, batch_size: int) -> int:
        """Pieces of this process's share of a global batch, so that none exceeds the device's.

        Raises:
            IncompatibleError: If the share cannot be cut into equal pieces.
        """
        share = batch_size // self.world
        if self.device_batch_size is None or self.device_batch_size >= share:
            return 1
        if share % self.device_batch_size:
            sizes = [n for n in range(1, share) if share % n == 0]
            raise IncompatibleError(
                f"--device-batch-size {self.device_batch_size} does not divide the {share} images "
                f"that each of {self.world} processes gets",
                hint=f"possible sizes: {', '.join(map(str, sizes))}",
            )
        return share // self.device_batch_size


def setup(
    *,
    workers: int | None = None,
    device_batch_size: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    shard_weights: bool = False,
    checkpoint_seconds: float = 300.0,
) -> Machine:
    """Join the process group, if there is one, and choose this process's device.

    The group ends with the process, however that ends.

    Raises:
        PreflightError: If the processes of the group do not find each other.
    """
    launch.adopt()
    try:
        # Precision is the engine's own autocast: Accelerate's would wrap every forward pass.
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        )
    except dist.DistError as error:
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PreflightError(
            f"the processes of this run do not find each other at {meeting}: "
            f"{str(error).splitlines()[0]}",
            hint="is one of them missing, or the port taken? MASTER_ADDR and MASTER_PORT name "
            "another place",
        ) from error
    if accelerator.num_processes > 1:
        atexit.register(launch.leave, accelerator.device)
    console.err.quiet = not accelerator.is_main_process
    here = cores()
    if workers is None:
        workers = max(1, min(8, own_cores() - 1))
    crowded = os.getloadavg()[0] > here / 2 and torch.get_num_threads() > 1
    if accelerator.device.type == "cpu" and crowded:
        console.warn(
            f"this machine is busy (load {os.getloadavg()[0]:.1f} on {here} cores): threads that "
            "wait for each other can make training several times slower; try OMP_NUM_THREADS=1 or "
            "OMP_WAIT_POLICY=PASSIVE"
        )
    if accelerator.device.type == "cpu":
        memory.keep_freed()
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return Machine(
        accelerator=accelerator,
        device=torch.device(accelerator.device),
        rank=int(accelerator.process_index),
        world=int(accelerator.num_processes),
        workers=workers,
        device_batch_size=device_batch_size,
        compile=compile,
        cuda_graph=cuda_graph,
        shard_weights=shard_weights,
        checkpoint_seconds=checkpoint_seconds,
    )


def own_cores() -> int:
    """Of these, this process's share, where others of its run are on the machine."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_STEP_NUM_TASKS" in os.environ and given.isdecimal():
        return min(cores(), int(given))
    return cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def environment(here: Machine) -> dict[str, Any]:
    """What the times and the last bits of a number follow."""
    cuda = here.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(here.device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "processes": here.world,
    }


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which forward passes run.

    Raises:
        IncompatibleError: If the device is far slower in this precision than in fp32.
    """
    if precision == "fp32":
        return nullcontext()
    if device.type == "cpu" and precision == "fp16":
        raise IncompatibleError(
            "train.precision: fp16 needs a GPU", hint="--set train.precision=fp32"
        )
    if device.type == "cpu" and not has_fast_bf16(torch.cpu.get_capabilities()):
        raise IncompatibleError(
            "train.precision: bf16 is 12 to 21 times slower than fp32 on this CPU, which has "
            "neither AVX512-BF16 nor AMX",
            hint="--set train.precision=fp32",
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def has_fast_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU with these capabilities computes in bf16 rather than imitating it."""
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


@contextmanager
def determinism(wanted: bool) -> Generator[None]:
    """Where it is wanted, have PyTorch give the same bits each time; afterwards it is as it was.

    Raises:
        IncompatibleError: If an operation has no such form; it is named.
    """
    if not wanted:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    fill: Any = torch.utils.deterministic
    before = cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory
    mode, workspace = torch.get_deterministic_debug_mode(), os.environ.get(_WORKSPACE)
    os.environ[_WORKSPACE] = ":4096:8"  # cuBLAS reads it when it is first asked
    torch.set_deterministic_debug_mode("error")
    cudnn.benchmark, cudnn.deterministic = False, True
    fill.fill_uninitialized_memory = False  # which only finds bugs, and takes time in every step
    try:
        yield
    except RuntimeError as error:
        if (refused := not_deterministic(error)) is error:
            raise
        raise refused from error
    finally:
        cudnn.benchmark, cudnn.deterministic, fill.fill_uninitialized_memory = before
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            del os.environ[_WORKSPACE]
        else:
            os.environ[_WORKSPACE] = workspace


def not_deterministic(error: Exception) -> Exception:
    """What a user is told where PyTorch refuses what does not give the same bits; else the error.

    That is an operation without such a form, or cuBLAS where it was used before.
    """
    name, refused, _ = str(error).partition(" does not have a deterministic implementation")
    if refused:
        return IncompatibleError(
            f"train.deterministic: {name} has no form that gives the same bits each time here",
            hint="another model, term or device, or --set train.deterministic=false",
        )
    if _WORKSPACE in name:
        return IncompatibleError(
            "train.deterministic: cuBLAS has been used in this process already, with kernels that "
            "do not give the same bits each time",
            hint=f"set {_WORKSPACE}=:4096:8 before the process starts",
        )
    return error


class StopRequest:
    """Remembers a signal until the step in work is done."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._steps = self._left = 1  # from the last question to the next, and of them left
        self._asked: float | None = None

    def agreed(self, machine: Machine) -> int | None:
        """The signal that any process got, the same answer in all of them; asked in every step.

        Processes ask each other about once a second, since on a GPU the answer has to be waited
        for. How many steps that is they ask each other too.
        """
        if machine.world == 1:
            return self.signum
        self._left -= 1
        if self._left > 0:
            return None
        now = time.monotonic()
        seconds = None if self._asked is None else now - self._asked
        steps = int(self._steps * ASK_SECONDS / seconds) if seconds else 1
        told = torch.tensor([self.signum or 0, steps], device=machine.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        signum, steps = told.tolist()
        self._steps = self._left = min(max(1, steps), ASK_STEPS)
        self._asked = now
        return signum or None


@contextmanager
def stop_request() -> Generator[StopRequest]:
    """Turn signals into a request to stop after the step in work.

    A second Ctrl-C interrupts at once; the last checkpoint stays whole.
    """
    request = StopRequest()

    def remember(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with suppress(RuntimeError):  # it came in the middle of another line
                console.say("stopping after this step; Ctrl-C again stops at once")

    with heard_by(remember):
        yield request


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

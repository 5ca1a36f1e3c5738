"""The processes of a command: those that it starts, and its own place among a launcher's."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from distill.data.workers import end_with
from distill.engine import slurm
from distill.errors import PreflightError
from distill.signals import heard_by

_SHARD = "DISTILL_SHARD"  # variable that tells a process its part
_PARENT = "DISTILL_PARENT"  # and one that tells it which process waits for it
_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # as torchrun sets them
# From which a group would be read again: by `adopt`, and by Accelerate.
_SIZES = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LEAVE_SECONDS = 10.0  # that the end of a process group may take, where others hang


def adopt() -> None:
    """Take the place in a process group that `srun` gives this process, in torchrun's variables.

    What torchrun or `accelerate launch` have set stays, and so does a MASTER_ADDR or MASTER_PORT of
    the user's own. A process that another `distill` started stops when that one is killed.

    Raises:
        PreflightError: If SLURM's variables cannot be read.
    """
    if parent := os.environ.pop(_PARENT, None):
        end_with(int(parent), signal.SIGTERM)
    if "RANK" not in os.environ and _SHARD not in os.environ:
        place = slurm.place(os.environ) or {}
        os.environ.update({n: v for n, v in place.items() if n in _GROUP or n not in os.environ})


def leave(device: torch.device) -> None:
    """Leave the process group, if there is one; wait for no process that hangs or died.

    One that merely ended would now and then be aborted by a thread of its group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gc.collect()  # DDP's reducers have threads of their own

    def destroy() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.destroy_process_group()

    leaving = threading.Thread(target=destroy, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)


def is_first_to_fail() -> bool:
    """Whether no other process of the group has failed yet, and said why; or there is no group."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed", 1) == 1)
    except RuntimeError:  # it went with the process that kept it
        return True


def has_lost_another(error: RuntimeError) -> bool:
    """Whether it was raised because another process of the group ended or does not answer."""
    known = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    return known and dist.is_initialized()


def spread(arguments: Sequence[str]) -> int | None:
    """Run `distill ARGUMENTS` once on each visible GPU, and return the exit status.

    None where there is nothing to spread over: fewer than two GPUs, or a launcher such as
    torchrun, `accelerate launch` or `srun` has started this process as one of several already.

    Raises:
        PreflightError: If `srun` started several processes, but fewer on a node than it has GPUs.
    """
    adopt()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return None
    if "RANK" not in os.environ:
        return spawn(gpus, arguments)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))
    if here < gpus and "SLURM_STEP_NUM_TASKS" in os.environ:
        raise PreflightError(
            f"srun started {os.environ['WORLD_SIZE']} processes, {here} on this node, which has "
            f"{gpus} GPUs: {gpus - here} of them would be idle",
            hint=f"srun --ntasks-per-node={gpus}, or fewer GPUs: --gpus-per-node={here}",
        )
    return None


def spread_shards(arguments: Sequence[str], shard: tuple[int, int]) -> int | None:
    """Run `distill ARGUMENTS` on each visible GPU with a part of `shard`; return the exit status.

    The processes know nothing of each other: one that dies takes no other with it. None where
    there is nothing to spread over: fewer than two GPUs, or a launcher has started a process for
    each of them already. One that started a single process on each node leaves its GPUs to that.
    """
    adopt()
    gpus = torch.cuda.device_count()
    others = "RANK" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != "1"
    if gpus < 2 or others or is_spawned():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return spawn_shards(
        visible.split(",") if visible else [str(i) for i in range(gpus)], arguments, _part(shard)
    )


def spawn_shards(gpus: Sequence[str], arguments: Sequence[str], shard: tuple[int, int]) -> int:
    """Run `distill ARGUMENTS` in a process for each GPU, each with its part of `shard`."""
    number, count = shard
    environments = [
        {
            "CUDA_VISIBLE_DEVICES": name,
            _SHARD: f"{(number - 1) * len(gpus) + i + 1}/{count * len(gpus)}",
        }
        for i, name in enumerate(gpus)
    ]
    return _watched(arguments, environments, together=False)


def is_spawned() -> bool:
    """Whether `spread_shards` of another process started this one; ask before `stand_alone`."""
    return _SHARD in os.environ


def stand_alone(shard: tuple[int, int]) -> tuple[int, int]:
    """The part of `shard` that is this process's, which then belongs to no process group.

    Where a launcher such as torchrun or `srun` started several, each is one of its parts.
    """
    adopt()
    if own := os.environ.pop(_SHARD, None):
        number, _, count = own.partition("/")
        shard = int(number), int(count)
    else:
        shard = _part(shard)
        if "RANK" in os.environ and torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", 0))
            torch.cuda.set_device(local % torch.cuda.device_count())  # srun may show it just one
    for name in (*_GROUP, *_SIZES):
        os.environ.pop(name, None)
    return shard


def _part(shard: tuple[int, int]) -> tuple[int, int]:
    """The part of a part that this process has in its group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return (shard[0] - 1) * world + rank + 1, shard[1] * world


def spawn(count: int, arguments: Sequence[str]) -> int:
    """Run `distill ARGUMENTS` in `count` processes of one process group; return the exit status.

    Signals are passed on and then waited for, however long the processes take to save: torchrun
    kills its workers 30 seconds after a SIGTERM, and never tells them of a SIGUSR1. When one
    process fails, the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(count)
    ]
    return _watched(arguments, environments, together=True)


def _watched(
    arguments: Sequence[str], environments: Sequence[dict[str, str]], *, together: bool
) -> int:
    """Run `distill ARGUMENTS` in each environment; signals are passed on.

    The processes stop by themselves, as after a SIGTERM, should this one be killed.
    """
    workers: list[subprocess.Popen[bytes]] = []
    got: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        got.append(signum)
        for worker in workers:
            worker.send_signal(signum)

    with heard_by(pass_on):
        for own in environments:
            worker = subprocess.Popen(
                [sys.executable, "-m", "distill", *arguments],
                env=os.environ | own | {_PARENT: str(os.getpid())},
                process_group=0,  # or a terminal would give them Ctrl-C, and this process again
            )
            workers.append(worker)
            for signum in got:  # it came while they were started
                worker.send_signal(signum)
        return _wait(workers, together=together)


def _wait(workers: list[subprocess.Popen[bytes]], *, together: bool) -> int:
    """The exit status of a process that fails, or 0.

    Args:
        workers: The processes.
        together: Whether they wait for each other, so that one that fails ends all.
    """
    while True:
        statuses = [worker.poll() for worker in workers]
        failed = any(statuses)
        if (failed and together) or None not in statuses:
            break
        time.sleep(0.1)
    ended = []
    for worker in workers:  # the others wait for the failed one, and would wait for ever
        try:
            ended.append(worker.wait(timeout=10 if failed else None))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    # One that lost another ends with 1; what ended the other says more.
    faults = sorted((status for status in ended if status), key=lambda status: status == 1)
    first = faults[0] if faults else 0
    return 128 - first if first < 0 else first

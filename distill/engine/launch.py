"""One process a GPU, started by the command itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

_SHARD = "DISTILL_SHARD"  # variable that tells a process its part


def spread(arguments: Sequence[str]) -> int | None:
    """Run `distill ARGUMENTS` once on each visible GPU, and return the exit status.

    None where there is nothing to spread over: fewer than two GPUs, or a launcher such as
    torchrun or `accelerate launch` has started this process already.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or "RANK" in os.environ:
        return None
    return spawn(gpus, arguments)


def spread_shards(arguments: Sequence[str], shard: tuple[int, int]) -> int | None:
    """Run `distill ARGUMENTS` on each visible GPU with a part of `shard`; return the exit status.

    The processes know nothing of each other: one that dies takes no other with it. None where
    there is nothing to spread over, as for `spread`.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or "RANK" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return spawn_shards(
        visible.split(",") if visible else [str(i) for i in range(gpus)], arguments, shard
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

    Where a launcher such as torchrun started several, each is one of its parts.
    """
    if own := os.environ.pop(_SHARD, None):
        number, _, count = own.partition("/")
        return int(number), int(count)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
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
    """Run `distill ARGUMENTS` in each environment; signals are passed on."""
    workers = [
        subprocess.Popen([sys.executable, "-m", "distill", *arguments], env=os.environ | own)
        for own in environments
    ]

    def pass_on(signum: int, frame: object) -> None:
        for worker in workers:
            worker.send_signal(signum)

    before = {
        # The terminal gives Ctrl-C to the workers itself.
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, pass_on),
    }
    try:
        return _wait(workers, together=together)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(workers: list[subprocess.Popen[bytes]], *, together: bool) -> int:
    """The exit status of the first process that fails, or 0.

    Args:
        workers: The processes.
        together: Whether they wait for each other, so that one that fails ends all.
    """
    while True:
        statuses = [worker.poll() for worker in workers]
        failed = [status for status in statuses if status]
        if (failed and together) or None not in statuses:
            break
        time.sleep(0.1)
    for worker in workers:  # the others wait for the failed one, and would wait for ever
        try:
            worker.wait(timeout=10 if failed else None)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    first = failed[0] if failed else 0
    return 128 - first if first < 0 else first

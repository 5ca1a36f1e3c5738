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


def spread(arguments: Sequence[str]) -> int | None:
    """Run `distill ARGUMENTS` once on each visible GPU, and return the exit status.

    None where there is nothing to spread over: fewer than two GPUs, or a launcher such as
    torchrun or `accelerate launch` has started this process already.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or "RANK" in os.environ:
        return None
    return spawn(gpus, arguments)


def spawn(count: int, arguments: Sequence[str]) -> int:
    """Run `distill ARGUMENTS` in `count` processes of one process group; return the exit status.

    Signals are passed on and then waited for, however long the processes take to save: torchrun
    kills its workers 30 seconds after a SIGTERM, and never tells them of a SIGUSR1. When one
    process fails, the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "distill", *arguments],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(count)
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
        return _wait(workers)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    """The exit status of the first process that fails, or 0."""
    while True:
        statuses = [worker.poll() for worker in workers]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
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

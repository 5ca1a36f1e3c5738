"""A scheduler for tests: real scripts in a real bash, and SLURM's commands as this file.

`srun` starts real processes with the variables that SLURM gives them, and passes signals on to
them as SLURM does. `scontrol requeue` is written down, and `Scheduler` heeds it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]


class Scheduler:
    """Runs batch scripts, each again for as long as it asks for that.

    Args:
        folder: Where jobs run, and where the commands lie.

    Attributes:
        nodes: Of a job, in SLURM's short form.
        tasks: Of a step, on each of the nodes: `2,2`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes, self.tasks = folder, "127.0.0.1", "1"
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in ("srun", "scontrol"):
            command = self.commands / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
            command.chmod(0o755)
        self.starts = 0

    @property
    def said(self) -> str:
        """All that jobs have printed."""
        return (self.folder / "job.out").read_text()

    def sbatch(
        self,
        script: str,
        *arguments: object,
        array: tuple[int, int] | None = None,
        time_up: Callable[[], bool] | None = None,
    ) -> int:
        """Run a script of `slurm/` to its end, and return its exit status.

        Args:
            script: Its name.
            arguments: Its arguments.
            array: Which task of an array of how many this is, from 0.
            time_up: Whether the first start is to be told now that its time is nearly up.
        """
        job = _free_job()
        variables = {
            "PATH": f"{self.commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": self.nodes,
            "SLURM_NTASKS": "4",
            "SLURM_CPUS_PER_TASK": "1",
            # A batch script is no task of a step, and has these all the same.
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "FAKE_TASKS": self.tasks,
        }
        if array is not None:
            task, count = array
            variables |= {
                "SLURM_ARRAY_JOB_ID": str(job),
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": str(count - 1),
                "SLURM_ARRAY_TASK_STEP": "1",
                "SLURM_ARRAY_TASK_COUNT": str(count),
            }
        while True:
            self.starts += 1
            command = ["bash", str(ROOT / "slurm" / script), *map(str, arguments)]
            with (self.folder / "job.out").open("ab") as log:
                begun = subprocess.Popen(
                    command, cwd=self.folder, env=os.environ | variables, stdout=log, stderr=log
                )
            while begun.poll() is None and time_up is not None:
                if time_up():
                    os.kill(int((self.folder / "srun.pid").read_text()), signal.SIGUSR1)
                    time_up = None
                time.sleep(0.02)
            begun.wait()
            asked = self.folder / "requeue"
            if not asked.exists():
                return begun.returncode
            assert asked.read_text() == f"requeue {job}"
            asked.unlink()


def _free_job() -> int:
    """The number of a job that nobody else's port stands in the way of."""
    with socket.socket() as free:
        for job in range(os.getpid(), os.getpid() + 1000):
            try:
                free.bind(("127.0.0.1", 12_000 + job % 20_000))
            except OSError:
                continue
            return job
    raise AssertionError("no port is free")


def srun(arguments: list[str]) -> int:
    """Start the tasks of a step, and return the highest of their statuses, as SLURM's does."""
    command = arguments[next(i for i, word in enumerate(arguments) if word[0] != "-") :]
    assert command[0] == "distill"
    counts = [int(count) for count in os.environ["FAKE_TASKS"].split(",")]
    counted = [f"{counts[0]}(x{len(counts)})"] if len(set(counts)) == 1 < len(counts) else counts
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_STEP_NUM_NODES": str(len(counts)),
        "SLURM_STEP_NUM_TASKS": str(sum(counts)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counted)),
        "SLURM_NTASKS": str(sum(counts)),
    }
    # Imported once for all of them; each is a process of its own from here on.
    import torch._dynamo

    import distill.cli
    import distill.engine.train
    import distill.models.zoo.resnet
    import distill.models.zoo.vit
    import distill.sweep

    torch.set_num_threads(1)
    tasks: list[int] = []
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    for rank, (node, local) in enumerate(places):
        if task := os.fork():
            tasks.append(task)
            continue
        place = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local}
        os.environ.update(step | {name: str(value) for name, value in place.items()})
        sys.argv = command
        distill.cli.app(prog_name="distill")
        raise AssertionError("the command has left")

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for task in tasks:
            os.kill(task, signum)

    signal.signal(signal.SIGUSR1, pass_on)
    Path("srun.pid").write_text(str(os.getpid()))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks]
    return max(status if status >= 0 else 128 - status for status in statuses)


if __name__ == "__main__":
    if sys.argv[1] == "scontrol":
        Path("requeue").write_text(" ".join(sys.argv[2:]))
    else:
        sys.exit(srun(sys.argv[2:]))

"""What SLURM tells the tasks of a job step of each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from distill.errors import PreflightError

# Below 32,768, from where systems hand out ports for themselves.
FIRST_PORT, PORTS = 12_000, 20_000
_STEP_STRIDE = 7_919  # keeps the steps of a job apart from those of its neighbours

_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_NAME = rf"(?:[^\[\],\s]|{_RANGES})+"


def place(environment: Mapping[str, str]) -> dict[str, str] | None:
    """This process's place in the group of its step's tasks, in the variables of torchrun.

    None outside of a step with several tasks. SLURM_PROCID and SLURM_NTASKS tell nothing: a batch
    script has them too, and whatever it starts without `srun`.

    Raises:
        PreflightError: If a variable is missing or cannot be read.
    """
    if not environment.get("SLURM_STEP_NUM_TASKS", "1").isdecimal():
        raise _unreadable("SLURM_STEP_NUM_TASKS", environment)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2:
        return None

    def number(name: str) -> int:
        if not environment.get(name, "").isdecimal():
            raise _unreadable(name, environment)
        return int(environment[name])

    nodes = expanded(environment.get("SLURM_STEP_NODELIST", ""))
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    rank, node = number("SLURM_PROCID"), number("SLURM_NODEID")
    if not (rank < tasks == sum(counts) and node < len(counts) == len(nodes)):
        raise PreflightError(
            f"SLURM: task {rank} on node {node} does not fit a step of {tasks} tasks on "
            f"{', '.join(nodes)}",
            hint="start it with srun, or set RANK, WORLD_SIZE and the like yourself",
        )
    # Every task has to find the same port by itself, and two jobs on a node must not meet there.
    port = number("SLURM_JOB_ID") + _STEP_STRIDE * number("SLURM_STEP_ID")
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(number("SLURM_LOCALID")),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(FIRST_PORT + port % PORTS),
    }


def expanded(nodes: str) -> list[str]:
    """The names that SLURM's short form stands for, in its order.

    `node[01-03,7],gpu-a` are node01, node02, node03, node7 and gpu-a. Of several brackets in a
    name the last one runs first.

    Raises:
        PreflightError: If it is no list of nodes.
    """
    if not re.fullmatch(f"{_NAME}(?:,{_NAME})*", nodes):
        raise PreflightError(f"SLURM: {nodes!r} is no list of nodes, such as node[01-03],gpu-a")
    names: list[str] = []
    for name in re.findall(_NAME, nodes):
        parts = (_choices(part) for part in re.split(f"({_RANGES})", name))
        names += map("".join, itertools.product(*parts))
    return names


def tasks_per_node(counts: str) -> list[int]:
    """The number of tasks on each node: `2(x3),1` are 2, 2, 2 and 1.

    Raises:
        PreflightError: If it says something else.
    """
    found: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise PreflightError(f"SLURM: {counts!r} are no tasks per node, such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _choices(part: str) -> list[str]:
    """What stands at a place of a name: the numbers of a bracket, or the text itself."""
    if not part.startswith("["):
        return [part]
    found: list[str] = []
    for span in part[1:-1].split(","):
        first, _, last = span.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise PreflightError(f"SLURM: {part} counts down from {first} to {last}")
        found += [f"{number:0{len(first)}d}" for number in numbers]
    return found


def _unreadable(name: str, environment: Mapping[str, str]) -> PreflightError:
    told = environment.get(name)
    said = "not set" if told is None else f"{told!r}, which is no number"
    return PreflightError(
        f"SLURM: {name} is {said}, in a step of several tasks",
        hint="start it with srun, or set RANK, WORLD_SIZE and the like yourself",
    )

"""Two nodes on the loopback: the job scripts as they are, and what they rest on."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.cache import verify, write
from distill.cache.store import Folder
from distill.engine import launch, machine, slurm
from distill.engine.train import train
from distill.errors import PreflightError
from distill.recipe import Recipe
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.processes import largest_difference
from tests.engine.scheduler import ROOT, Scheduler
from tests.promises import Measured

PLAIN = STUDENT.replace("drop: 0.1", "drop: 0.0").replace("epochs: 4", "epochs: 80")
PLAIN = PLAIN.replace("batch_size: 20", "batch_size: 24")


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("gpu-a", ["gpu-a"]),
        ("a,b,c", ["a", "b", "c"]),
        ("node[01-03,7],gpu-a", ["node01", "node02", "node03", "node7", "gpu-a"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[3]", ["n3"]),
        ("n[3,1-2]", ["n3", "n1", "n2"]),
        ("[1-2]", ["1", "2"]),
        ("a[1-2]-ib", ["a1-ib", "a2-ib"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("x[1-2].site.org,y", ["x1.site.org", "x2.site.org", "y"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        ("gpu[000]", ["gpu000"]),
    ],
)
def test_names_of_nodes_are_written_out(nodes: str, names: list[str]) -> None:
    assert slurm.expanded(nodes) == names


@pytest.mark.parametrize(
    "nodes",
    [
        *("", ",", "a,", ",a", "a,,b", "n[", "n]", "n[]", "n[1", "n[1-]", "n[-1]", "n[a-b]"),
        *("n[1-2-3]", "n[1,]", "n[[1]]", "a b", "n[3-1]", "n[1;2]", "n[1 -2]", "x" * 50 + "["),
    ],
)
def test_what_is_no_list_of_nodes_is_refused(nodes: str) -> None:
    with pytest.raises(PreflightError, match=r"SLURM: .*(no list of nodes|counts down)"):
        slurm.expanded(nodes)


@st.composite
def _ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket, and the numbers that it stands for."""
    spans, numbers = [], []
    for _ in range(draw(st.integers(1, 4))):
        first, more = draw(st.integers(0, 1200)), draw(st.integers(0, 30))
        width = draw(st.integers(1, 6))
        ends = f"{first:0{width}d}", f"{first + more:0{width}d}"
        spans.append(ends[0] if more == 0 else "-".join(ends))
        # The first number's digits are the least width of all.
        numbers += [str(n).zfill(len(ends[0])) for n in range(first, first + more + 1)]
    return f"[{','.join(spans)}]", numbers


_text = st.text("abcxyz09-._", min_size=1, max_size=5)


@given(st.lists(st.tuples(_text, st.none() | _ranges(), st.just("") | _text), min_size=1))
def test_every_list_is_written_out(
    parts: list[tuple[str, tuple[str, list[str]] | None, str]],
) -> None:
    short = ",".join(a + (ranges[0] if ranges else "") + z for a, ranges, z in parts)
    names = [a + n + z for a, ranges, z in parts for n in (ranges[1] if ranges else [""])]
    assert slurm.expanded(short) == names


@given(st.text("n0123[]-,", max_size=30))
def test_no_text_takes_long_or_ends_in_a_traceback(text: str) -> None:
    with contextlib.suppress(PreflightError):
        assert all(slurm.expanded(text))


@pytest.mark.parametrize(
    ("counts", "found"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("8(x2)", [8, 8]), ("3,1", [3, 1])]
)
def test_tasks_per_node(counts: str, found: list[int]) -> None:
    assert slurm.tasks_per_node(counts) == found


@pytest.mark.parametrize("counts", ["", "a", "2(x)", "2x3", "1,,2", "-1"])
def test_what_are_no_tasks_per_node_is_refused(counts: str) -> None:
    with pytest.raises(PreflightError, match="no tasks per node"):
        slurm.tasks_per_node(counts)


STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
BATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_a_task_of_a_step_has_a_place_in_a_group() -> None:
    place = slurm.place(STEP)
    assert place is not None
    assert int(place.pop("MASTER_PORT")) in range(12_000, 32_000)
    assert place == {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node07",
    }
    other = slurm.place(STEP | {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"})
    assert other is not None
    assert (other["RANK"], other["LOCAL_RANK"], other["LOCAL_WORLD_SIZE"]) == ("1", "1", "2")


@pytest.mark.parametrize("environment", [{}, BATCH, STEP | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_what_is_no_task_of_a_group_is_alone(environment: dict[str, str]) -> None:
    assert slurm.place(environment) is None


def test_jobs_and_steps_that_share_a_node_meet_at_other_ports() -> None:
    ports = set()
    for job in range(4_000_000, 4_000_500):
        for step in ("0", "1", "2", "3"):
            place = slurm.place(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step})
            assert place is not None
            ports.add(place["MASTER_PORT"])
    assert len(ports) == 2000


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x', which is no number"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two'"),
        ({"SLURM_STEP_NODELIST": None}, "no list of nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": None}, "no tasks per node"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,2"}, "does not fit a step of 3 tasks"),
        ({"SLURM_PROCID": "3"}, "task 3 on node 1 does not fit"),
        ({"SLURM_NODEID": "2"}, "task 2 on node 2 does not fit"),
        ({"SLURM_STEP_NODELIST": "node07"}, "does not fit"),
    ],
)
def test_a_place_that_cannot_be_is_a_sentence(changed: dict[str, str | None], said: str) -> None:
    environment = {k: v for k, v in (STEP | changed).items() if v is not None}
    with pytest.raises(PreflightError, match=re.escape(said)):
        slurm.place(environment)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give this process exactly these of the variables that launchers set."""

    def set_to(variables: dict[str, str]) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        for name in (*names, "MASTER_PORT", "DISTILL_SHARD", *STEP):
            monkeypatch.setenv(name, "")  # so that what is set below is forgotten afterwards
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_what_another_launcher_says_stays(environment: Callable[..., None]) -> None:
    environment(STEP | {"RANK": "7", "WORLD_SIZE": "9"})
    launch.adopt()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("7", "9")
    assert "MASTER_ADDR" not in os.environ
    environment(STEP | {"MASTER_PORT": "4242"})
    launch.adopt()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("2", "4242")


@pytest.mark.parametrize(
    ("variables", "shard", "part"),
    [
        (STEP, (1, 1), (3, 3)),
        (STEP, (2, 4), (6, 12)),
        (BATCH, (2, 4), (2, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 3), (2, 6)),
        (STEP | {"DISTILL_SHARD": "5/6"}, (1, 1), (5, 6)),
    ],
)
def test_every_task_is_a_part_of_its_part(
    environment: Callable[..., None],
    variables: dict[str, str],
    shard: tuple[int, int],
    part: tuple[int, int],
) -> None:
    environment(variables)
    assert launch.stand_alone(shard) == part
    launch.adopt()  # and then belongs to no group, whoever asks
    assert "RANK" not in os.environ
    assert "WORLD_SIZE" not in os.environ


def test_gpus_that_would_be_idle_are_a_sentence(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    environment(STEP)
    with pytest.raises(PreflightError, match="7 of them would be idle") as caught:
        launch.spread(["train"])
    assert "--ntasks-per-node=8" in caught.value.hint
    environment(STEP | {"SLURM_STEP_TASKS_PER_NODE": "8,8", "SLURM_STEP_NUM_TASKS": "16"})
    assert launch.spread(["train"]) is None


def test_a_task_has_the_cores_that_it_was_given(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 64)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    environment(BATCH)
    assert machine.own_cores() == 64
    environment(STEP)
    assert machine.own_cores() == 6
    environment({"LOCAL_WORLD_SIZE": "8"})
    assert machine.own_cores() == 8


@pytest.mark.promise("R9")
def test_training_on_two_nodes_is_cut_requeued_and_the_same_as_alone(
    recipes: Callable[..., Path], tmp_path: Path, measured: Measured
) -> None:
    recipe = recipes(student=PLAIN)
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("batch_size: 30", "batch_size: 28"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    cluster = Scheduler(tmp_path)
    assert cluster.sbatch("train.sh", recipe, "--out", "alone") == 0  # one task is no group
    metrics = tmp_path / "run" / "metrics.jsonl"
    cluster.nodes, cluster.tasks = "127.0.0.[1-2]", "2,2"
    status = cluster.sbatch(
        "train-nodes.sh",
        *(recipe, "--out", "run", "--workers", 0),
        time_up=lambda: metrics.exists() and b'"train"' in metrics.read_bytes(),
    )
    assert status == 0, cluster.said
    assert cluster.starts == 3
    assert cluster.said.count("stopped by SIGUSR1") == 1
    assert "going on after step" in cluster.said
    students = (tmp_path / run / "student.safetensors" for run in ("alone", "run"))
    assert largest_difference(*students) <= 1e-5
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(4, 321, 4))
    measured(
        "SLURM's script on two nodes of two tasks (a scheduler of the tests), SIGUSR1",
        "saved, requeued, weights of one process to 1e-5",
    )


def test_arrays_make_a_cache_and_a_sweep(recipes: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipes()
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "runs" / "teacher")
    cluster = Scheduler(tmp_path)
    cluster.tasks = "2"
    store = Folder(tmp_path / "cache")
    for task in (1, 0):
        options = ("--out", "cache", "--views", 2, "--unit-rows", 16, "--workers", 0)
        assert cluster.sbatch("teacher-cache.sh", recipe, *options, array=(task, 2)) == 0
        manifest = write.read_manifest(store)
        assert manifest is not None
        assert (write.read_index(store, manifest) is None) == (task == 1)
    assert verify.full(store, manifest) == []
    cluster.tasks = "1"
    options = ("--out", "runs/sweep", "--temperatures", "1,4", "--set", "cache={path: cache}")
    for task in (0, 1):
        assert not (tmp_path / "runs" / "sweep" / "sweep.json").exists()
        assert cluster.sbatch("temperature-sweep.sh", recipe, *options, array=(task, 2)) == 0
    found = json.loads((tmp_path / "runs" / "sweep" / "sweep.json").read_text())
    assert [row["temperature"] for row in found["settings"]] == [1, 4]


@pytest.mark.parametrize(
    "script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name
)
def test_every_script_asks_for_what_it_rests_on(script: Path) -> None:
    text = script.read_text()
    for option in ("--requeue", "--signal=USR1@120", "--open-mode=append", "--time="):
        assert f"#SBATCH {option}" in text
    assert '[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"' in text

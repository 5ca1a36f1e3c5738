"""`distill teacher-cache` as its users call it: in processes, by signals, from a scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from distill.cli import app
from tests.cli.conftest import ROOT, listing, process

DATA = {"name": "digits", "fraction": 0.2, "val": 0.1, "augment": ["crop", "flip"], "mixup": 0.4}
STUDENT: dict[str, Any] = {
    "data": DATA,
    "teachers": [{"recipe": "teacher.yaml"}],
    "student": {"model": "vit", "width": 16, "depth": 1, "heads": 2},
    "objective": [{"term": "kd", "temperature": 2}],
    "cache": {"path": "tc", "views": 4},
}
UNITS = ("--unit-rows", "32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe of a student and the finished run of its teacher."""
    from distill import yamlio

    folder = tmp_path_factory.mktemp("trained")
    shared = {"optimizer": {"name": "sgd", "lr": 0.1}, "train": {"epochs": 3, "batch_size": 16}}
    teacher = {"data": DATA, "student": {"model": "resnet8"}, "objective": [{"term": "ce"}]}
    (folder / "teacher.yaml").write_text(yamlio.dump(teacher | shared))
    (folder / "student.yaml").write_text(yamlio.dump(STUDENT | shared))
    done = process("train", "teacher.yaml", "--out", "runs/teacher", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which is the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "there"))


def start(
    folder: Path, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Begin `distill teacher-cache student.yaml ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "teacher-cache", "student.yaml", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(folder: Path, *arguments: object, env: dict[str, str] | None = None) -> Result:
    """Run `distill ARGUMENTS` in this process, in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(
            app, [str(argument) for argument in arguments], env=env
        )
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def cache(folder: Path, *arguments: object, env: dict[str, str] | None = None) -> tuple[int, Any]:
    """Run `teacher-cache` with --json; return its exit status and what it printed."""
    done = command(folder, "teacher-cache", "student.yaml", *arguments, "--json", env=env)
    assert done.stdout.count("\n") == (1 if done.stdout else 0)
    said = done.stderr.replace("\n", " ")
    return done.exit_code, json.loads(done.stdout) if done.stdout else said


def test_the_whole_life_of_a_cache(there: Path) -> None:
    status, plan = cache(there, "--dry-run", *UNITS)
    assert status == 0
    assert not (there / "tc").exists()
    assert plan["teachers"][0]["missing"] == plan["teachers"][0]["units"] > 4 * 5
    status, built = cache(there, *UNITS)
    [teacher] = built["teachers"]
    assert (status, built["complete"], teacher["missing"]) == (0, True, 0)
    assert teacher["bytes"] == sum(
        len(content) for name, content in listing(there / "tc").items() if "/" in name
    )
    assert plan["teachers"][0]["bytes"] == teacher["bytes"]
    assert set(teacher["scores"]) == {"test", "val"}
    result = json.loads((there / "runs" / "teacher" / "result.json").read_text())
    assert teacher["scores"]["test"] == {k: result[k] for k in ("top1", "top5", "nll", "ece")}
    status, again = cache(there)
    assert (status, again["units"], again["images"]) == (0, 0, 0)
    for level in ("quick", "full", "replay", "teacher"):
        status, found = cache(there, "--verify", level)
        assert (status, found["verdict"]) == (0, "sound")
        if level == "teacher":
            assert found["caches"][0]["kl"]["mean"] < 1e-4
    assert cache(there, "--status")[0] == 0
    done = command(there, "train", "student.yaml", "--json")
    assert done.exit_code == 0
    taught = json.loads(done.stdout)["teachers"][0]
    assert (taught["top1"], taught["nll"]) == (result["top1"], result["nll"])


def test_what_is_bad_is_found_removed_and_made_again(there: Path) -> None:
    assert cache(there, *UNITS)[0] == 0
    sound = listing(there / "tc")
    unit = there / "tc" / "views" / "v0001" / "u00002.safetensors"
    content = bytearray(unit.read_bytes())
    content[-1] ^= 8
    unit.write_bytes(content)
    (there / "tc" / "views" / "v0003" / "u00000.safetensors").unlink()
    assert cache(there, "--verify", "quick")[0] == 5  # one is missing that the index names
    status, found = cache(there, "--verify", "full")
    assert status == 5
    assert {fault["name"] for fault in found["caches"][0]["faults"]} == {
        "views/v0001/u00002.safetensors",
        "views/v0003/u00000.safetensors",
    }
    assert cache(there, "--verify", "full", "--repair")[0] == 5
    assert not unit.exists()
    assert cache(there, "--verify", "full")[0] == 3
    status, shown = cache(there, "--status")
    assert (status, shown["caches"][0]["missing"]) == (3, 2)
    status, built = cache(there)
    assert (status, built["units"]) == (0, 2)
    assert listing(there / "tc") == sound


def test_another_recipe_is_refused_and_nothing_written(there: Path) -> None:
    assert cache(there)[0] == 0
    before = listing(there / "tc")
    status, said = cache(there, "--set", "data.mixup=0.9")
    assert status == 4
    assert "views.mixup: 0.4 -> 0.9" in said
    assert cache(there, "--set", "data.mixup=0.9", "--dry-run")[0] == 4
    done = command(there, "train", "student.yaml", "--set", "data.mixup=0.9")
    assert (done.exit_code, "views.mixup" in done.stderr) == (4, True)
    assert listing(there / "tc") == before
    assert not (there / "runs" / "student" / "checkpoint").exists()


def test_the_tasks_of_a_slurm_array_make_it_together(there: Path) -> None:
    assert cache(there, "--out", "whole", *UNITS)[0] == 0
    for task in (7, 3, 5):
        slurm = {
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "3",
            "SLURM_ARRAY_TASK_MAX": "7",
            "SLURM_ARRAY_TASK_STEP": "2",
            "SLURM_ARRAY_TASK_COUNT": "3",
        }
        status, built = cache(there, *UNITS, env=slurm)
        assert status == 0
        assert built["complete"] == (task == 5)
        if not built["complete"]:
            status, said = cache(there, "--status")
            assert status == 3
            assert 0 < said["caches"][0]["missing"] < said["caches"][0]["units"]
            assert command(there, "train", "student.yaml").exit_code == 3
    assert listing(there / "tc") == listing(there / "whole")


def test_torchrun_gives_each_process_a_part(there: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "distill", "teacher-cache", "student.yaml"],
        cwd=there,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert cache(there, "--verify", "full")[0] == 0


SLOW = ("--views", "1000", "--views-per-read", "1", "--batch-size", "8")


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_stops_it_and_it_goes_on(there: Path, signum: int, status: int) -> None:
    running = start(there, *SLOW)
    deadline = time.monotonic() + 60
    while not (there / "tc" / "views" / "v0002").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signum)
    _, said = running.communicate(timeout=60)
    assert running.returncode == status
    assert "all units that were made are kept" in said
    assert "Traceback" not in said
    made = len(list((there / "tc").rglob("u*.safetensors")))
    assert made >= 3
    assert not list((there / "tc").rglob("*.tmp"))
    # Two units are evaluation's, so two more views than were made are asked for.
    status, built = cache(there, "--views", made, "--batch-size", "8")
    assert status == 0
    whole = len(list((there / "tc").rglob("u*.safetensors")))
    assert built["units"] == whole - made > 0


def test_a_time_limit_that_is_over_stops_before_the_work(there: Path) -> None:
    status, said = cache(there, "--time-limit", "0s")
    assert status == 75
    assert "the time is up" in said
    for text in ("", "soon", "3h50", "-1s", "1:2:3:4"):
        assert cache(there, f"--time-limit={text}")[0] == 2


def test_status_needs_no_torch(there: Path) -> None:
    assert cache(there)[0] == 0
    script = (
        "import sys; sys.argv = ['distill', 'teacher-cache', 'student.yaml', '--status']\n"
        "from distill.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, [name for name in ('torch', 'timm', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=there,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "complete" in done.stdout


def test_who_has_the_cache_alone_can_look_at_it(there: Path) -> None:
    assert cache(there)[0] == 0
    shutil.rmtree(there / "runs")
    alone = ("--set", "teachers=[]")
    assert cache(there, "--status", *alone)[0] == 0
    for level in ("quick", "full", "replay"):
        status, found = cache(there, "--verify", level, *alone)
        assert (status, found["verdict"]) == (0, "sound")
    status, said = cache(there, "--verify", "teacher", *alone)
    assert (status, "nobody to ask" in said) == (2, True)


def test_a_teacher_that_must_be_better_is_refused(there: Path) -> None:
    status, said = cache(there, "--min-teacher-top1", "0.999")
    assert status == 6
    assert "asks for 99.9%" in said
    assert cache(there, "--min-teacher-top1", "0.1")[0] == 0


def test_parts_of_a_job_do_not_train_the_teacher(there: Path) -> None:
    shutil.rmtree(there / "runs")
    status, said = cache(there, "--shard", "2/3")
    assert status == 6
    assert "distill train its recipe with --out runs/teacher first" in said
    assert cache(there)[0] == 0  # alone it is trained first
    assert (there / "runs" / "teacher" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--shard", "0/3"], 2, "--shard 0/3: must be I/N"),
        (["--shard", "4/3"], 2, "must be I/N"),
        (["--codec", "int4"], 2, "must be auto, int8, fp16 or topk:K"),
        (["--set", "teachers=[]", "--set", "objective=[{term: ce}]"], 2, "nobody to ask"),
        (["--status"], 3, "tc: there is no cache"),
        (["--verify", "full"], 3, "there is no cache"),
        (["--out", "student.yaml"], 6, "student.yaml"),
        (["--out", "foo://x/y"], 2, "foo"),
        (["--set", "cache.features=[nowhere]"], 2, "no module 'nowhere'"),
    ],
)
def test_bad_input_is_a_sentence(there: Path, arguments: list[str], status: int, said: str) -> None:
    found, text = cache(there, *arguments)
    assert (found, said in text) == (status, True), text
    assert not (there / "tc").exists()


def test_a_damaged_manifest_is_a_sentence(there: Path) -> None:
    assert cache(there)[0] == 0
    manifest = there / "tc" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"views": 4', b'"views": 5'))
    for arguments in ((), ("--status",), ("--verify", "quick")):
        status, said = cache(there, *arguments)
        assert status == 5
        assert "manifest.json: its content changed after it was written" in said
    assert command(there, "train", "student.yaml").exit_code == 5


def test_several_gpus_share_a_part_and_one_that_dies_takes_no_other_with_it(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.engine import launch

    monkeypatch.chdir(there)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for part in ((1, 2), (2, 2)):
        arguments = ["teacher-cache", "student.yaml", *UNITS, "--shard", f"{part[0]}/{part[1]}"]
        assert launch.spawn_shards(["0", "1"], arguments, part) == 0
        assert cache(there, "--status")[0] == (3 if part == (1, 2) else 0)
    refused = ["teacher-cache", "student.yaml", "--set", "data.mixup=0.9"]
    assert launch.spawn_shards(["0", "1"], refused, (1, 1)) == 4

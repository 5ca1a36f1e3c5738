"""What is around a run decides nothing of it: clock, locale, hash seed, umask, terminal, home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.conftest import ROOT, images
from tests.engine import processes
from tests.promises import Measured

# Names that locales sort and write in different ways.
CLASSES = ("Zebra", "apfel", "Äpfel", "iI", "ınce")

TEACHER = """
data: {{name: folder, root: "{root}", image_size: 16, augment: [flip]}}
student: {{model: resnet8}}
objective: [{{term: ce}}]
optimizer: {{name: sgd, lr: 0.05}}
train: {{epochs: 1, batch_size: 16}}
"""
STUDENT = """
data: {{name: folder, root: "{root}", image_size: 16, augment: [crop, flip], mixup: 0.4, val: 0.2}}
teachers: [{{recipe: teacher.yaml}}]
student: {{model: vit, patch_size: 4, width: 16, depth: 1, heads: 2, drop: 0.1}}
objective: [{{term: ce, weight: 0.5}}, {{term: kd, weight: 0.5}}]
optimizer: {{name: adamw, lr: 2e-3}}
train: {{epochs: 2, batch_size: 16, ema: 0.9}}
"""

# Loaded by Python before anything else, where its folder is on the path.
CLOCK = """
import datetime
import time

AHEAD = 10 * 365 * 86400 + 12345

seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + AHEAD
time.time_ns = lambda: nanoseconds() + AHEAD * 10**9


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def today(cls):
        return cls.now()


datetime.datetime = Later
"""


class Surroundings(NamedTuple):
    """How a command is run."""

    env: dict[str, str | None] = {}  # noqa: RUF012 (never changed); None takes a variable away
    umask: int = 0o022
    elsewhere: bool = False  # in another folder
    options: tuple[str, ...] = ()  # of Python
    before: tuple[str, ...] = ()  # the command that runs it
    streams: str = ""  # what stdout and stderr are, as a shell says it
    status: int = 0  # of the end; another where stdout, and so the result, is lost


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}
FAR = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}
NARROW = {"COLUMNS": "1", "LINES": "1", "TERM": "dumb", "NO_COLOR": "1"}
HOMELESS = {"HOME": "/nowhere", "XDG_CACHE_HOME": None, "TMPDIR": None}
SHORT = {
    "clock, zone, locale, hash seed, umask, folder": Surroundings(
        {**FAR, "PYTHONHASHSEED": "1", "PYTHONPATH": "clock"}, 0o077, elsewhere=True
    ),
    "ASCII, python -O, no home, one column, stderr full": Surroundings(
        {**ASCII, **NARROW, **HOMELESS, "PYTHONHASHSEED": "4294967295"},
        options=("-O",),
        streams="2> /dev/full",
    ),
}
LONG = {
    "clock": Surroundings({"PYTHONPATH": "clock"}),
    "zone and locale": Surroundings({**FAR, "PYTHONHASHSEED": "77"}),
    "ASCII locale": Surroundings({**ASCII}),
    "umask 077": Surroundings(umask=0o077),
    "another folder": Surroundings(elsewhere=True),
    "python -O": Surroundings(options=("-O",)),
    "no home": Surroundings(HOMELESS),
    "one column": Surroundings(NARROW),
    "a full disk behind stdout and stderr": Surroundings(
        streams="> /dev/full 2> /dev/full", status=6
    ),
    "stdin and stderr closed": Surroundings(streams="<&- 2>&-"),
    "readers that have gone": Surroundings(streams="2>&1 | true", status=1),
}
if shutil.which("faketime"):  # the clock of the whole process, its libraries included
    LONG["libfaketime"] = Surroundings(
        {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}, before=("faketime", "-f", "+3650d")
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes and their images."""
    folder = tmp_path_factory.mktemp("home")
    for split, count in (("train", 10), ("test", 4)):
        images(folder / "images", *(f"{split}/{name}" for name in CLASSES), count=count)
    (folder / "teacher.yaml").write_text(TEACHER.format(root=folder / "images"))
    (folder / "student.yaml").write_text(STUDENT.format(root=folder / "images"))
    (folder / "clock").mkdir()
    (folder / "clock" / "sitecustomize.py").write_text(CLOCK)
    (folder / "other").mkdir()
    return folder


def traces(home: Path, name: str, around: Surroundings) -> Iterator[tuple[str, bytes]]:
    """Run the command there; all that it leaves behind and that must be the same."""
    out = home / name / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    for key, value in around.env.items():
        if value is None:
            env.pop(key, None)
        else:
            env[key] = value
    clock = str(home / "clock") + os.pathsep if env["PYTHONPATH"] else ""
    env["PYTHONPATH"] = clock + str(ROOT)
    command = [*around.before, sys.executable, *around.options, "-m", "distill", "train"]
    command += [str(home / "student.yaml"), "--out", str(out), "--workers", "1"]
    # A shell, for streams that are not there at all.
    line = f'umask {around.umask:03o}; "$@" {around.streams}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *command],
        cwd=home / "other" if around.elsewhere else home,
        env=env,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == around.status, done.stderr.decode(errors="replace")
    assert (out / "report.html").exists()
    assert (out / "result.json").stat().st_mode & 0o777 == 0o666 & ~around.umask
    yield from processes.traces(out).items()
    yield "teacher", (home / name / "teacher" / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[str, bytes]:
    return dict(traces(home, "plain", Surroundings({"PYTHONHASHSEED": "0"})))


@pytest.mark.promise("R24")
@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(n, marks=pytest.mark.soak) for n in LONG)])
def test_surroundings_decide_nothing(
    home: Path, expected: dict[str, bytes], name: str, measured: Measured
) -> None:
    around = {**SHORT, **LONG}[name]
    folder = f"run-{[*SHORT, *LONG].index(name)}"
    found = dict(traces(home, folder, around))
    assert found.keys() == expected.keys()
    same = [key for key, content in expected.items() if found[key] == content]
    assert [key for key in expected if key not in same] == []
    measured(f"`distill train`: {name}", f"{len(same)} of {len(expected)} files byte for byte")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(
    said: dict[str, str], expected: str | None
) -> None:
    """Beside a busy program they would keep cores from the thread that they wait for."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | said
    # What a process that the command starts would see, when the command is through.
    code = (
        "import atexit, os; from distill.__main__ import main; "
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'))); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == str(expected)

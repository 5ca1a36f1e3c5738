"""The benchmarks run, whatever they find: processes, tables, the document, limits, meters."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DOCUMENT = "before\n<!-- speed-cpu: begin -->\nold\n<!-- speed-cpu: end -->\nafter\n"
ROW = {
    "name": "a|b", "rate": 1234.5, "ratio": 2.0, "least": 1.9, "most": 2.1, "share": 0.25,
    "memory": None, "waited": None, "joules": None, "failed": None,
}  # fmt: skip
FIGURES = ("rate", "ratio", "least", "most")
LOST = ROW | dict.fromkeys(FIGURES, 0.0) | {"name": "c", "share": None, "failed": "it broke"}
HERE = {
    "device": "a GPU", "processor": "a CPU", "cores": 2, "memory": 2**34, "system": "Linux",
    "python": "3.11", "torch": "2.14",
}  # fmt: skip

# Speaks as a variant does, and needs no torch.
SPEAKER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from _turns import Turns
turns = Turns(10, "cpu")
print("libraries print")
turns.begin()
while True:
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
    turns.waited += {waited}
    turns.step(5)
    turns.step(5)
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark by its name, as they import each other; forgets them all afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def comparison(name: str, **keys: Any) -> dict[str, Any]:
    found = {
        "name": name, "about": f"About {name}", "command": f"python {name}", "when": "2026-11-27",
        "seconds": 3.2, "load": [0.5, 1.0], "failed": None, "goals": [], "printed": "",
        "tables": [{"title": "t", "unit": "images/s", "note": "n", "rows": [ROW, LOST]}],
    }  # fmt: skip
    return found | keys


def results(*comparisons: dict[str, Any], machine: dict[str, Any] = HERE) -> dict[str, Any]:
    return {
        "device": "cpu", "command": "python all.py", "machine": machine,
        "comparisons": list(comparisons),
    }  # fmt: skip


def test_one_command_runs_compares_and_writes(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(DOCUMENT)
    command = [sys.executable, str(BENCHMARKS / "all.py"), "--device", "cpu", "--quick"]
    command += ["--only", "training-64", "--out", str(tmp_path), "--document", str(document)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed-cpu-quick.json").read_text())
    assert found["machine"]["cores"] >= 1
    (one,) = found["comparisons"]
    assert one["failed"] is None, one["failed"]
    rows = {row["name"]: row for row in one["tables"][0]["rows"]}
    assert {"loop by hand", "distill, teacher live", "distill, cached"} <= set(rows)
    assert rows["loop by hand"]["ratio"] == 1
    for row in rows.values():
        assert row["failed"] is None, row
        assert row["rate"] > 0
        assert 0 < row["share"] < 2
        assert row["memory"] > 2**27
        assert 0 <= row["waited"] < 1
    assert len(one["goals"]) == 2
    written = document.read_text()
    assert written.startswith("before\n<!-- speed-cpu: begin -->\n")
    assert written.endswith("\n<!-- speed-cpu: end -->\nafter\n")
    assert "old" not in written
    assert "| distill, cached |" in written
    assert "distill, cached" in done.stdout


def test_networks_of_timm_on_larger_images_take_the_same_path(tmp_path: Path) -> None:
    kept = tmp_path / "rows"
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--rounds", "1"]
    command += ["--pair", "timm/resnet18:timm/resnet10t", "--size", "40", "--batch", "4"]
    command += ["--images", "8", "--limits", "A100", "--no-compile", "--variants", "cached"]
    environment = os.environ | {"DISTILL_BENCHMARK_ROWS": str(kept)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = json.loads(kept.read_text().splitlines()[0])
    assert "A100" in table["note"]
    names = [row["name"] for row in table["rows"]]
    assert names == ["loop by hand", "loop by hand, cached logits", "distill, cached"]
    assert all(row["failed"] is None and row["rate"] > 0 for row in table["rows"]), table


@pytest.mark.soak
@pytest.mark.skipif("DISTILL_PEERS" not in os.environ, reason="where benchmarks/peers.py put them")
def test_the_peers_run_from_their_checkouts(tmp_path: Path) -> None:
    kept = tmp_path / "rows"
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--rounds", "1", "--no-compile"]
    command += ["--pair", "resnet14:resnet8", "--batch", "16", "--images", "64"]
    command += ["--peers", os.environ["DISTILL_PEERS"], "--variants", "shipped,alone"]
    environment = os.environ | {"DISTILL_BENCHMARK_ROWS": str(kept)}
    subprocess.run(command, check=True, env=environment)
    rows = {row["name"]: row for row in json.loads(kept.read_text().splitlines()[0])["rows"]}
    for peer in ("timm", "torchdistill", "mdistiller", "RepDistiller"):
        for what in ("as shipped", "loop alone"):
            assert rows[f"{peer}, {what}"]["failed"] is None, rows[f"{peer}, {what}"]


@pytest.mark.soak
@pytest.mark.skipif("DISTILL_PEERS" not in os.environ, reason="where benchmarks/peers.py put them")
def test_the_peers_train_the_same_student(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = modules("accuracy")
    rows = compared(accuracy, tmp_path, monkeypatch, "--peers", os.environ["DISTILL_PEERS"])
    assert {row["toolkit"] for row in rows} == {*accuracy.TEACHER, *accuracy.SIDES}
    agreement = {row["toolkit"]: row["agreement"] for row in rows}
    for name, how in accuracy.SIDES.items():
        if "name" in how:  # from labels alone it is 0.17, and between those that are taught 0.02
            assert agreement[name] == pytest.approx(agreement["distill"], abs=0.1), name


def compared(
    accuracy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> list[dict[str, Any]]:
    """What accuracy.py writes about one seed on a few images of noise."""
    root, threads = folder / "cifar-10-batches-bin", torch.get_num_threads()
    if not root.exists():
        root.mkdir()
        for i, name in enumerate((*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")):
            rows = np.random.default_rng(i).integers(0, 256, (600, 3073), dtype=np.uint8)
            rows[:, 0] %= 10
            rows.tofile(root / f"{name}.bin")
    out = folder / "out"
    words = ("--quick", "--seeds", "1", "--root", str(folder), "--out", str(out), *words)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words])
    try:
        accuracy.main()
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in (out / "accuracy.jsonl").read_text().splitlines()]


def test_accuracies_are_compared_from_the_same_start_and_no_run_is_made_twice(
    modules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accuracy = modules("accuracy")
    rows = compared(accuracy, tmp_path, monkeypatch)
    own = [name for name, how in accuracy.SIDES.items() if "recipe" in how]
    assert [row["toolkit"] for row in rows] == [*accuracy.TEACHER, *own]
    teacher, in_train_mode, taught, alone, classical = rows
    assert teacher["agreement"] == 1 > in_train_mode["agreement"]
    assert len({row["nll"] for row in rows}) == 5  # each has trained in its own way
    assert taught["steps"] == alone["steps"] == classical["steps"] == 10
    assert len({row["teacher"] for row in rows}) == 1
    assert "| distill, labels alone | 1 |" in capsys.readouterr().out
    # the student begins where its seed says, for us and for the peers
    folder = tmp_path / "out" / "seed-0"
    ours = modules("_setting").state(folder, "student")
    theirs = torch.load(folder / "student.pth")["model"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = sorted(tmp_path.glob("out/*/log/*.log"))
    assert len(logs) == 4
    before = [log.stat().st_mtime_ns for log in logs]
    assert compared(accuracy, tmp_path, monkeypatch) == rows
    assert [log.stat().st_mtime_ns for log in logs] == before
    # a run that is gone is made again, but not beside those of another teacher
    place = tmp_path / "out" / "accuracy.jsonl"
    others = [row | {"teacher": "another"} for row in rows[:-1]]
    place.write_text("".join(json.dumps(row) + "\n" for row in others))
    with pytest.raises(SystemExit, match="rows of the teacher another"):
        compared(accuracy, tmp_path, monkeypatch)


def test_a_rate_that_falls_in_stages_follows_the_cosine(modules: Any) -> None:
    peers = modules("_peers")
    for epochs in (1, 2, 8, 240):
        stages = peers.stages(epochs)
        for epoch in range(1, epochs + 1):  # as the programs count them
            rate = peers.STAGE ** sum(epoch > stage for stage in stages)
            wanted = (1 + math.cos(math.pi * (epoch - 0.5) / epochs)) / 2
            assert rate == pytest.approx(wanted, rel=0.006)


def test_all_programs_are_told_the_same(modules: Any) -> None:
    setting = modules("_setting").Setting(
        teacher="resnet20", student="resnet8", size=32, batch=64, precision="fp32", device="cpu",
        images=640, turn=640, workers=1, data="cifar10", epochs=3,
    )  # fmt: skip
    config = modules("_peers")._config(setting)
    assert '"alpha": 0.1, "beta": 0.9' in config  # its alpha is the weight of the labels
    assert '"T_max": 30' in config
    assert "CIFAR10'" in config
    forever = modules("_peers")._config(dataclasses.replace(setting, epochs=None))
    assert "scheduler: {}" in forever


def test_what_a_program_trained_is_kept_after_its_last_epoch(modules: Any, tmp_path: Path) -> None:
    kept = modules("_watch").Kept(tmp_path / "student.pth")
    student = torch.nn.Linear(2, 2)
    loader = [1, 2]
    assert kept.over(loader) is loader
    for value in (1.0, 2.0):
        kept.begin()
        torch.nn.init.constant_(student.weight, value)
        kept.end(student)
    torch.nn.init.constant_(student.weight, 3.0)  # a program may go back to its best epoch
    found = torch.load(tmp_path / "student.pth")
    assert found["epochs"] == 2
    assert (found["model"]["weight"] == 2).all()


def test_classes_are_balanced_and_intervals_are_over_seeds(modules: Any) -> None:
    accuracy = modules("accuracy")
    rows = np.zeros((200, 3073), np.uint8)
    rows[:, 0] = np.repeat(np.arange(10), 20)[::-1]
    rows[:, 1] = np.arange(200)
    chosen = accuracy.balanced(rows, 90)
    assert (np.bincount(chosen[:, 0]) == 9).all()
    assert chosen[:10, 1].tolist() == [*range(9), 20]
    assert accuracy.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    common = {"nll": 1.0, "agreement": 0.5, "seconds": 9.0}
    tables = accuracy.tables(
        [
            {"toolkit": name, "seed": seed, "top1": top1, **common}
            for name, values in (("distill", (0.5, 0.6)), ("timm", (0.51, 0.61, 0.9)))
            for seed, top1 in enumerate(values)
        ]
    )
    assert "| distill | 2 | 55.00% | ± 63.53 | | | 1.000 | 50.0% | 9 |" in tables
    assert "| timm | 3 | 67.33% | ± 50.32 | +1.00 | ± 0.00 |" in tables  # of the seeds of both
    assert "| timm | distill | toolkit | +1.00 | ± 0.00 |" in tables


def test_processes_take_turns_and_one_that_fails_is_a_row(modules: Any, tmp_path: Path) -> None:
    turns = modules("_turns")

    def variant(name: str, code: str, limit: float | None = None) -> Any:
        return turns.Variant(name, [sys.executable, "-c", code], limit)

    def speaker(seconds: float, waited: float = 0.0) -> str:
        return SPEAKER.format(benchmarks=str(BENCHMARKS), seconds=seconds, waited=waited)

    rows = turns.interleave(
        [
            variant("slow", speaker(0.2), limit=100.0),
            variant("quick", speaker(0.05, waited=0.02)),
            variant("lost", "import sys\nsys.stdin.readline()\nraise ValueError('no weights')"),
            variant("silent", "import os\nos._exit(3)"),
        ],
        rounds=3,
        wall=False,
        folder=tmp_path,
        environment=os.environ,
    )
    slow, quick, lost, silent = rows
    assert slow.ratio == 1
    assert 30 < slow.rate < 55  # 10 in 0.2 s and a little more
    assert slow.share == pytest.approx(slow.rate / 100)
    assert 2.5 < quick.ratio < 5
    assert quick.waited > 0 == slow.waited
    assert lost.failed == "ValueError: no weights"
    assert silent.failed == "it ended without a word"


def test_a_process_that_does_not_answer_is_given_up(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = modules("_turns")
    monkeypatch.setattr(turns, "BEGINNING", 0.5)
    code = "import time\ntime.sleep(600)"
    began = time.monotonic()
    (row,) = turns.interleave(
        [turns.Variant("asleep", [sys.executable, "-c", code])],
        rounds=1, wall=True, folder=tmp_path, environment=os.environ,
    )  # fmt: skip
    assert row.failed == "no turn within 0 s"
    assert time.monotonic() - began < 60


def test_the_wait_for_a_loader_is_counted(modules: Any, tmp_path: Path) -> None:
    turns = modules("_turns")

    class Slow:
        mixup_enabled = False

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            for i in range(3):
                time.sleep(0.02)
                yield i

    counting = turns.Turns.__new__(turns.Turns)
    counting.waited = 0.0
    loader = counting.over(Slow())
    began = time.perf_counter()
    for _ in loader:
        time.sleep(0.05)
    assert len(loader) == 3
    assert loader.mixup_enabled is False
    assert 0.06 <= counting.waited <= time.perf_counter() - began - 0.15


def test_results_stand_between_the_markers(modules: Any) -> None:
    document = modules("_document")
    goal = {"goal": "ours, goal 1.05", "value": 1.2, "reached": False}
    text = document.regenerated(
        DOCUMENT,
        results(comparison("one", goals=[goal]), comparison("two", tables=[], printed="as it is")),
    )
    assert text.startswith("before\n<!-- speed-cpu: begin -->\n\n")
    assert text.endswith("\n<!-- speed-cpu: end -->\nafter\n")
    assert "old" not in text
    assert "a GPU, 2 cores of a CPU, 16 GB; Python 3.11, torch 2.14" in text
    assert "|  | images/s | ratio | least to most | of the limit |" in text
    assert "| a\\|b | 1,234 | 2.00 | 1.90 to 2.10 | 25% |" in text
    assert "| c | – | – | it broke | – |" in text
    assert "- ours, goal 1.05: 1.2, **missed**" in text
    assert "```\nas it is\n```" in text
    assert document.regenerated(text, results(comparison("one"))).count("### About") == 1


def test_a_document_without_markers_is_refused(modules: Any) -> None:
    with pytest.raises(ValueError, match="has no lines <!-- speed-cpu: begin -->"):
        modules("_document").regenerated("nothing", results())


def test_what_is_not_run_again_is_kept_on_the_same_machine(modules: Any, tmp_path: Path) -> None:
    every = modules("all")
    place = tmp_path / "speed-cpu.json"
    old = results(comparison("engine"), comparison("startup", seconds=1.0))
    place.write_text(json.dumps(old))
    new = results(comparison("startup", seconds=2.0))
    both = every.merged(place, new)["comparisons"]
    assert [(one["name"], one["seconds"]) for one in both] == [("engine", 3.2), ("startup", 2.0)]
    other = results(comparison("startup"), machine=HERE | {"torch": "2.15"})
    assert len(every.merged(place, other)["comparisons"]) == 1
    place.write_text("damaged")
    assert every.merged(place, new) == new


def test_limits_are_those_of_the_arithmetic(modules: Any) -> None:
    roofline = modules("roofline")
    h100 = roofline.limits_of("cuda", "bf16", "H100")
    # ResNet-50 to ResNet-18 at 224 px: 8.18 GFLOP and 42.7 MB forwards, 10.65 and 70 MB to train
    cost = roofline.count("timm/resnet18", 224)
    assert cost.training == pytest.approx(10.65e9, rel=0.01)
    live, cached = (
        roofline.images_a_second(teacher, "timm/resnet18", 224, h100, "bf16")
        for teacher in ("timm/resnet50", None)
    )
    assert live == pytest.approx(26_600, rel=0.01)
    assert cached == pytest.approx(42_950, rel=0.01)
    slower = roofline.images_a_second(None, "timm/resnet18", 224, h100, "bf16", fused=False)
    assert slower < cached
    # attention is counted: 35.1 GFLOP of ViT-B/16
    vit = roofline.count("timm/vit_base_patch16_224", 224)
    assert vit.forward == pytest.approx(35.1e9, rel=0.01)
    assert vit.attention
    assert not cost.attention


def test_energy_counters_may_begin_again(modules: Any, tmp_path: Path) -> None:
    meters = modules("_meters")
    package = tmp_path / "intel-rapl:0"
    part = tmp_path / "intel-rapl:0:0"
    for place, value in ((package, 9_000_000), (part, 1)):
        place.mkdir()
        (place / "energy_uj").write_text(f"{value}\n")
        (place / "max_energy_range_uj").write_text("10000000\n")
    joules = meters.Joules(cuda=False)
    joules._packages = meters._packages(tmp_path)
    before = joules.read()
    assert list(before) == ["intel-rapl:0"]
    (package / "energy_uj").write_text("9500000\n")
    assert joules.since(before) == pytest.approx(0.5)
    (package / "energy_uj").write_text("250000\n")
    assert joules.since(before) == pytest.approx(1.25)
    joules._packages = {}
    assert joules.since(joules.read()) is None


def test_our_loader_is_measured_as_it_is(modules: Any) -> None:
    data = modules("data")
    assert data.ours(2, augment=["crop", "flip"])() == 2 * data.BATCH


def test_ratios_are_of_neighbours(modules: Any) -> None:
    timing = modules("_timing")
    base, other = timing.rows({"base": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 12.0]})
    assert (base.rate, base.ratio) == (2.0, 1.0)
    assert (other.ratio, other.least, other.most) == (2.0, 1.0, 3.0)
    failed = timing.Row("lost", 0.0, 0.0, 0.0, 0.0, failed="why")
    turned = timing.inverse([other, failed])
    assert (turned[0].ratio, turned[0].least, turned[0].most) == (0.5, pytest.approx(1 / 3), 1.0)
    assert turned[1] == failed


def test_processes_of_loaders_count(modules: Any) -> None:
    timing = modules("_timing")
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = timing.cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    alive = timing.cpu_seconds() - before  # it still runs
    child.communicate(b"\n")
    ended = timing.cpu_seconds() - before
    assert 0.28 <= alive <= ended < 2

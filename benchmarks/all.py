"""Every comparison of speed, one after the other, as tables, JSON and a page of the documents.

    python benchmarks/all.py [--device cpu|cuda] [--peers DIR] [--only NAME,...] [--rounds 3]

Takes about twenty minutes on two cores. Each comparison is a process of its own: one that fails is
a line that says why. `--peers` names what peers.py has fetched; without it we are held to loops by
hand only. Results go to benchmarks/results/speed-DEVICE.json and from there between the markers of
docs/benchmarks.md; with `--only`, results of the same machine that are not asked for again are
kept. `--quick` runs each in a small setting, whose figures mean nothing: it shows that all works.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from _document import regenerated, terminal
from _meters import machine
from _timing import KEPT
from rich.console import Console

HERE = Path(__file__).parent
LIMIT = 1_800.0  # seconds after which a comparison is given up
SCREEN = Console(stderr=True)


class Comparison(NamedTuple):
    """One script and what it is called with; `quick` takes the place of all arguments."""

    about: str
    script: str
    arguments: str
    quick: str
    devices: tuple[str, ...] = ("cpu", "cuda")


SMALL = (
    "--pair resnet8:resnet8 --batch 16 --images 32 --no-compile --rounds 1 --device {device} "
    "--variants distill"
)
TINY = "--pair timm/resnet18:timm/resnet18 --size 40 --batch 4 --images 8 --rounds 1 {slow}"
TRAINING = "--device {device} --rounds {rounds} {peers}"
BIG = "--size 224 --precision bf16 --device {device} --rounds {rounds} --batch"
VIT = "timm/vit_base_patch16_224:timm/vit"
COMPARISONS = {
    "training-64": Comparison(
        "Distillation, batches of 64", "training.py", f"--batch 64 {TRAINING}", SMALL
    ),
    "training-512": Comparison(
        "Distillation, batches of 512", "training.py",
        f"--batch 512 {{slow}} {TRAINING}", SMALL
    ),
    "training-512-bf16": Comparison(
        "Distillation, batches of 512, bf16", "training.py",
        f"--batch 512 --precision bf16 {TRAINING}", SMALL, ("cuda",),
    ),
    "large-resnet": Comparison(
        "ResNet-50 to ResNet-18 at 224 px", "training.py",
        f"{BIG} 256 --pair timm/resnet50:timm/resnet18", f"{TINY} --device {{device}}", ("cuda",),
    ),
    "large-vit-tiny": Comparison(
        "ViT-B to ViT-Ti at 224 px", "training.py",
        f"{BIG} 256 --pair {VIT}_tiny_patch16_224", f"{TINY} --device {{device}}", ("cuda",),
    ),
    "large-vit-small": Comparison(
        "ViT-B to ViT-S at 224 px", "training.py",
        f"{BIG} 256 --pair {VIT}_small_patch16_224", f"{TINY} --device {{device}}", ("cuda",),
    ),
    "engine": Comparison(
        "Our loop beside a bare one", "engine.py", "--rounds {rounds}", "--rounds 1 --steps 200"
    ),
    "cache": Comparison(
        "A step from the cache", "cache.py", "step --rounds 1", "step --rounds 1", ("cpu",)
    ),
    "sweep-loop": Comparison(
        "Eight temperatures in one loop", "sweep.py", "side-by-side --rounds {rounds}",
        "side-by-side --rounds 1",
    ),
    "sweep": Comparison(
        "Eight temperatures from a shell", "sweep.py", "sweep --rounds 1 --images 1000",
        "sweep --rounds 1 --images 500",
    ),
    "data": Comparison("Loaders", "data.py", "--rounds {rounds}", "--rounds 1", ("cpu",)),
    "decode": Comparison(
        "Files of images", "decode.py", "--rounds {rounds}", "--rounds 1", ("cpu",)
    ),
    "startup": Comparison("Starts", "startup.py", "--rounds 7", "--rounds 1"),
    "busy": Comparison(
        "Beside other programs", "busy.py", "--rounds 3", "--rounds 1 --epochs 1 --beside 1",
        ("cpu",),
    ),
    "scaling": Comparison("Several processes", "scaling.py", "", ""),
    "scale": Comparison("Large sets of images", "scale.py", "10000 100000 1000000", "1000"),
    "limits": Comparison(
        "What the device allows", "roofline.py", "--device {device}", "--device {device}"
    ),
}  # fmt: skip


def chosen(options: argparse.Namespace) -> dict[str, Comparison]:
    """Those that are asked for, of those that are there."""
    names = [name for name, one in COMPARISONS.items() if options.device in one.devices]
    if options.only:
        names = options.only.split(",")
        if unknown := sorted(set(names) - set(COMPARISONS)):
            known = ", ".join(COMPARISONS)
            raise SystemExit(
                f"--only: no comparison is named {', '.join(unknown)}; there are {known}"
            )
    found = {name: COMPARISONS[name] for name in names}
    return {name: one for name, one in found.items() if (HERE / one.script).exists()}


def run(name: str, one: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """What a comparison found, as plain data."""
    peers = f"--peers {shlex.quote(str(options.peers.resolve()))}" if options.peers else ""
    template = one.quick if options.quick else one.arguments
    slow = "--no-compile" if options.device == "cpu" else ""  # a minute, told once
    arguments = template.format(
        device=options.device, rounds=options.rounds, peers=peers, slow=slow
    )
    command = [one.script, *shlex.split(arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    load, began = os.getloadavg()[0], time.monotonic()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as place:
        kept, printed = Path(place) / "rows.jsonl", Path(place) / "printed"
        kept.touch()
        with printed.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, str(HERE / command[0]), *command[1:]],
                stdout=out, stderr=subprocess.PIPE, text=True, start_new_session=True,
                env=environment | {KEPT: str(kept)}, cwd=HERE.parent,
            )  # fmt: skip
            failed = _watched(process, name, LIMIT)
        entries = [json.loads(line) for line in kept.read_text().splitlines()]
        text = printed.read_text()
    written = " ".join(["python", f"benchmarks/{one.script}", *command[1:]])
    if options.peers:
        written = written.replace(str(options.peers.resolve()), "DIR")
    return {
        "name": name,
        "about": one.about,
        "command": written.strip(),
        "when": when,
        "seconds": time.monotonic() - began,
        "load": [load, os.getloadavg()[0]],
        "failed": failed,
        "tables": [entry for entry in entries if "rows" in entry],
        "goals": [entry for entry in entries if "goal" in entry],
        "printed": text,
    }


def _watched(process: subprocess.Popen[str], name: str, limit: float) -> str | None:
    """Show what the process says until it ends; return why it failed."""
    assert process.stderr is not None
    last, end = "", time.monotonic() + limit
    timer = threading.Timer(limit, _kill, [process])
    timer.daemon = True
    timer.start()
    try:
        with SCREEN.status(f"{name} …", spinner="line") as status:
            for line in process.stderr:
                if line := line.strip():
                    last = line
                    status.update(f"{name}: {line[:100]}")
    except KeyboardInterrupt:
        _kill(process)
        raise
    finally:
        timer.cancel()
    code = process.wait()
    if time.monotonic() >= end:
        return f"no end within {limit:.0f} s"
    return None if code == 0 else f"status {code}: {last}"


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def merged(place: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The results with those of the same machine that were there and were not asked for again."""
    try:
        old = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    if old.get("machine") != found["machine"]:
        return found
    new = {one["name"]: one for one in found["comparisons"]}
    both = {one["name"]: one for one in old["comparisons"]} | new
    order = [name for name in COMPARISONS if name in both]
    return {**found, "comparisons": [both[name] for name in order]}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--peers", type=Path, metavar="DIR")
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(COMPARISONS))
    parser.add_argument("--quick", action="store_true", help="small settings, no document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--document", type=Path, help="left out: docs/benchmarks.md")
    options = parser.parse_args()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here")
    document = options.document
    if document is None and not options.quick:
        document = HERE.parent / "docs" / "benchmarks.md"
    words = [f"--device {options.device}", "--peers DIR" if options.peers else ""]
    words += [f"--rounds {options.rounds}", "--quick" if options.quick else ""]
    results: dict[str, Any] = {
        "device": options.device,
        "command": " ".join(["python benchmarks/all.py", *filter(None, words)]),
        "machine": machine(options.device),
        "comparisons": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / f"speed-{options.device}{'-quick' if options.quick else ''}.json"
    out = Console()
    if not out.is_terminal:  # whose width is not known
        out = Console(width=140)
    for name, one in chosen(options).items():
        found = run(name, one, options)
        results["comparisons"].append(found)
        for table in found["tables"]:
            out.print(terminal(table))
        for goal in found["goals"]:
            reached = "reached" if goal["reached"] else "[bold]MISSED[/]"
            out.print(f"  {goal['goal']}: {goal['value']:,.3g} {reached}")
        if not found["tables"]:
            out.print(found["printed"], markup=False, highlight=False)
        if found["failed"]:
            out.print(f"{name}: failed: {found['failed']}", style="bold red", markup=False)
        out.print(f"  {name}: {found['seconds']:.0f} s\n", highlight=False)
        whole = merged(place, results)
        place.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        if document is not None:
            text = document.read_text(encoding="utf-8")
            document.write_text(regenerated(text, whole), encoding="utf-8")
    out.print(f"{place}" + (f" and {document}" if document else ""), highlight=False)


if __name__ == "__main__":
    main()

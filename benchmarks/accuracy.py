"""Does KD by other toolkits reach what ours does: the same pair, images, epochs and weights.

    python benchmarks/peers.py DIR
    python benchmarks/accuracy.py --peers DIR [--root ~/data] [--out runs/accuracy] [--seeds 3]

A ResNet-20 that our toolkit has trained on 10,000 images of CIFAR-10 teaches a ResNet-8 with 2,560
of them, in each toolkit by its own script, loader, loop and loss. All have the teacher's weights,
the student's initial weights of a seed, the images (as many of each class), epochs, batches of 64,
crops with a border of 4 and flips, the normalisation, SGD at 0.1 with momentum 0.9 and weight decay
5e-4 on all weights, a rate that falls as a cosine to nought, and 0.1 of cross-entropy and 0.9 of KD
at T = 4. A seed decides the initial weights and the toolkit's own order and views. The weights
after the last epoch are scored on the 10,000 test images, all by the same code. `_peers.py` says
what had to be changed of the programs.

What their options leave different: mdistiller and RepDistiller have no Nesterov momentum and no
cosine, which they get as stages, epoch by epoch; timm has no crop with a border; torchdistill
leaves the teacher in train mode. Each of these is measured: the side beside it has it otherwise.

What stands in benchmarks/results/accuracy.jsonl is not run again, and goes into docs/results.md.
`--quick` shows on a few images that all works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _setting
import numpy as np
import torch
from _document import put
from _intervals import interval
from _meters import machine
from _peers import PEERS
from _setting import TEST, Setting
from _timing import cpu_seconds
from torch import Tensor, nn

from distill.data import official
from distill.evaluate import of_logits, scores
from distill.models import weights
from distill.models.network import Network

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accuracy.jsonl"
DOCUMENT = HERE.parent / "docs" / "results.md"
PAIR = ("resnet20", "resnet8")
BATCH = 64
FULL = {
    "images": 2_560, "epochs": 8, "teacher_images": 10_000, "teacher_epochs": 8, "test": 10_000,
}  # fmt: skip
OURS = "distill"
SIDES: dict[str, dict[str, Any]] = {  # what _variant.py is told of a peer, or how ours is started
    OURS: {"recipe": "live"},
    "distill, labels alone": {"recipe": "alone"},
    "timm": {"name": "timm", "cropped": True},
    "torchdistill": {"name": "torchdistill", "settled": False},
    "mdistiller": {"name": "mdistiller"},
    "RepDistiller": {"name": "RepDistiller"},
    "distill, without Nesterov": {"recipe": "live", "set": "optimizer.nesterov=false"},
    "torchdistill, teacher in eval mode": {"name": "torchdistill", "settled": True},
    "timm, without the crop": {"name": "timm", "cropped": False},
}
ALIKE = (  # sides between which nothing differs but the toolkit, or but the one thing that is named
    ("timm", OURS, "toolkit"),
    ("torchdistill, teacher in eval mode", OURS, "toolkit"),
    ("mdistiller", "distill, without Nesterov", "toolkit"),
    ("RepDistiller", "distill, without Nesterov", "toolkit"),
    ("mdistiller", "RepDistiller", "toolkit"),
    (OURS, "distill, without Nesterov", "Nesterov momentum"),
    ("torchdistill", "torchdistill, teacher in eval mode", "teacher in train mode"),
    ("timm, without the crop", "timm", "no crop"),
    (OURS, "distill, labels alone", "teacher"),
)
TEACHER = ("teacher", "teacher, in train mode")

Row = dict[str, Any]


def balanced(rows: np.ndarray, count: int) -> np.ndarray:
    """The first `count` / 10 rows of each class, in their order."""
    chosen = [np.flatnonzero(rows[:, 0] == label)[: count // 10] for label in range(10)]
    return rows[np.sort(np.concatenate(chosen))]


def written(setting: Setting, folder: Path, root: Path, teacher: nn.Module | None = None) -> None:
    """Write what the runs of a seed read, unless it is there.

    What they validate on is a few test images, and decides nothing.
    """
    if (folder / "setting.json").exists():
        return
    (folder / "log").mkdir(parents=True)
    found = official.locate(official.CIFAR10, root, download=False)
    train, test = (
        np.concatenate([np.fromfile(found[name], np.uint8) for name in names]).reshape(-1, 3073)
        for names in (official.CIFAR10.train, official.CIFAR10.test)
    )
    _setting.write_images(setting, folder, balanced(train, setting.images), test[:TEST])
    if teacher is not None:
        _setting.write_network(setting, folder, "teacher", teacher)
    student = _setting.initial(setting, "student", setting.seed)
    _setting.write_network(setting, folder, "student", student)
    _setting.write_recipes(setting, folder)


def run(command: Sequence[str], folder: Path, name: str, path: str = "") -> float:
    """Seconds of processors that a training takes.

    Args:
        path: Where it finds its libraries first.

    Raises:
        RuntimeError: If it fails, with its last word.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    log, place = folder / "log" / f"{name}.log", folder / "work" / name  # some write where they are
    place.mkdir(parents=True, exist_ok=True)
    before = cpu_seconds()
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=place, env=environment)
    if done.returncode:
        last = log.read_text(errors="replace").split("\n")[-2:]
        raise RuntimeError(f"{name}: status {done.returncode}, {log}: {' '.join(last).strip()}")
    return cpu_seconds() - before


def ours(setting: Setting, folder: Path, name: str) -> tuple[Network, float]:
    """What `distill train` makes of a recipe, and the seconds that it takes."""
    how = SIDES.get(name, {"recipe": "alone"})
    out = folder / "runs" / name
    recipe = setting.recipe(folder, how["recipe"])
    words = [sys.executable, "-m", "distill", "train", str(recipe), "--out", str(out)]
    words += ["--workers", "0", *(("--set", how["set"]) if "set" in how else ())]
    seconds = run(words, folder, name)
    return weights.load(out), seconds


def theirs(setting: Setting, folder: Path, name: str, peers: Path) -> tuple[Network, float]:
    """What a peer makes of the student, and the seconds that it takes."""
    kept = folder / f"{name}.pth"
    keys = json.dumps({**SIDES[name], "peers": str(peers), "keep": str(kept)})
    words = [sys.executable, str(HERE / "_variant.py"), "peer", str(folder), keys]
    seconds = run(words, folder, name, path=str(peers / "site"))
    found = torch.load(kept)
    assert found["epochs"] == setting.epochs, found["epochs"]
    network = weights.load(folder / "student.safetensors")
    network.backbone.load_state_dict(found["model"])
    return network, seconds


def answers(network: Network, images: np.ndarray, *, training: bool = False) -> Tensor:
    """Logits (N, 10) of images (N, 32, 32, 3), in batches as the students are trained with."""
    network.train(training)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.cat([network(part.float() / 255).logits for part in planes.split(BATCH)])


def figures(logits: Tensor, labels: np.ndarray, told: Tensor) -> dict[str, float]:
    """How good answers are, and the part of the images where the teacher's top answer is theirs."""
    found = scores(of_logits(logits.numpy(), labels))
    agreement = (logits.argmax(1) == told.argmax(1)).double().mean()
    return {"top1": found.top1, "nll": found.nll, "agreement": float(agreement)}


def commit(name: str, peers: Path) -> str | None:
    """Of the checkout that a side ran from, where it is one."""
    peer = SIDES.get(name, {}).get("name")
    place = HERE if peer is None else peers / PEERS[peer][0]
    command = ["git", "-C", str(place), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def made(options: argparse.Namespace, rows: Sequence[Row]) -> Iterator[Row]:
    """The rows that are not there yet, seed by seed; of the peers only where they are.

    Raises:
        SystemExit: If those that are there had another teacher, or runs have failed: at the end.
    """
    done = {(row["toolkit"], row["seed"]) for row in rows}
    sides = [name for name, how in SIDES.items() if options.peers or "name" not in how]
    wanted = [(name, 0) for name in TEACHER]
    wanted += [(name, seed) for seed in range(options.seeds) for name in sides]
    left = [one for one in wanted if one not in done]
    if not left:
        return
    setting = Setting(
        teacher=PAIR[0], student=PAIR[0], size=32, batch=BATCH, precision="fp32", device="cpu",
        images=options.teacher_images, turn=options.teacher_images, workers=1, data="cifar10",
        epochs=options.teacher_epochs,
    )  # fmt: skip
    home = options.out / "teacher"
    written(setting, home, options.root)
    teacher, seconds = ours(setting, home, "teacher")
    digest = hashlib.sha256(weights.to_bytes(teacher)).hexdigest()[:12]
    if others := {row["teacher"] for row in rows} - {digest}:
        raise SystemExit(
            f"{options.results}: has rows of the teacher {', '.join(others)}, and {home} has "
            f"{digest}: take these rows out, or --out of the other one"
        )
    tested = official.read("cifar10", options.root, download=False).test
    images, labels = (part[: options.test] for part in tested)
    told, failed = answers(teacher, images), []
    where = {"teacher": digest, "device": machine("cpu")["device"], "torch": torch.__version__}
    for name, seed in left:
        network = teacher
        if name in SIDES:
            folder = options.out / f"seed-{seed}"
            setting = replace(
                setting, student=PAIR[1], images=options.images, turn=options.images,
                epochs=options.epochs, seed=seed,
            )  # fmt: skip
            written(setting, folder, options.root, teacher.backbone)
            try:
                network, seconds = (
                    theirs(setting, folder, name, options.peers) if "name" in SIDES[name]
                    else ours(setting, folder, name)
                )  # fmt: skip
            except RuntimeError as error:  # the others still have their turn
                failed.append(str(error))
                continue
        found = figures(answers(network, images, training=name == TEACHER[1]), labels, told)
        yield {
            "toolkit": name, "seed": seed, **found, "seconds": round(seconds, 1),
            "steps": setting.epochs * (setting.images // BATCH), **same(options), **where,
            "commit": commit(name, options.peers),
        }  # fmt: skip
    if failed:
        raise SystemExit("\n".join(failed))


def same(options: argparse.Namespace) -> Row:
    """What rows that are compared have in common."""
    return {
        "pair": "→".join(PAIR), "images": options.images, "epochs": options.epochs,
        "test": options.test,
    }  # fmt: skip


def ahead(one: Mapping[int, Row], other: Mapping[int, Row]) -> str:
    """By how many points of top-1 one side is ahead of another, paired by seed, as two cells."""
    both = sorted(one.keys() & other.keys())
    if not both:
        return "| |"
    mean, half = interval([100 * (one[seed]["top1"] - other[seed]["top1"]) for seed in both])
    return f"{mean:+.2f} | {'one seed' if half is None else f'± {half:.2f}'} |"


def tables(rows: Sequence[Row]) -> str:
    """All sides in Markdown, and those that are alike against each other."""
    sides: dict[str, dict[int, Row]] = {name: {} for name in (*TEACHER, *SIDES)}
    for row in rows:
        sides[row["toolkit"]][row["seed"]] = row
    lines = [
        "| | seeds | test top-1 | 95 % | against `distill`, points | 95 % | NLL "
        "| says what the teacher says | CPU seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in sides.items():
        if not runs:
            continue
        nll, agreement, seconds = (
            statistics.mean(run[key] for run in runs.values())
            for key in ("nll", "agreement", "seconds")
        )
        top1, half = interval([100 * run["top1"] for run in runs.values()])
        against = {} if name in (*TEACHER, OURS) else sides[OURS]
        lines.append(
            f"| {name} | {len(runs)} | {top1:.2f}% | {'' if half is None else f'± {half:.2f}'} "
            f"| {ahead(runs, against)} {nll:.3f} | {agreement:.1%} | {seconds:.0f} |"
        )
    lines += [
        "",
        "Sides between which nothing differs but the toolkit, or but the one thing that is named:",
        "",
        "| | against | what differs | points | 95 % |",
        "|---|---|---|---:|---:|",
    ]
    for one, other, what in ALIKE:
        if sides[one] and sides[other]:
            lines.append(f"| {one} | {other} | {what} | {ahead(sides[one], sides[other])}")
    return "\n".join(lines) + "\n"


def read(options: argparse.Namespace) -> list[Row]:
    """The rows of this setting that are there."""
    if not options.results.exists():
        return []
    lines = options.results.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [row for row in found if same(options).items() <= row.items()]


def main() -> None:
    """Make what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("~/data"))
    parser.add_argument("--peers", type=Path, help="where peers.py has put them")
    parser.add_argument("--out", type=Path, help="default: runs/accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out = options.out or Path("runs") / ("accuracy-quick" if options.quick else "accuracy")
    options.out = options.out.resolve()
    options.root = options.root.expanduser()
    options.peers = options.peers and options.peers.resolve()
    quick = {"images": 320, "epochs": 2, "teacher_images": 320, "teacher_epochs": 1, "test": 500}
    vars(options).update(quick if options.quick else FULL)
    options.results = options.out / "accuracy.jsonl" if options.quick else RESULTS
    torch.set_num_threads(1)
    rows = read(options)
    try:
        for row in made(options, rows):
            rows.append(row)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['toolkit']}, seed {row['seed']}: {row['top1']:.2%}", file=sys.stderr)
    finally:
        print(tables(rows), end="")
        if not options.quick:
            page = DOCUMENT.read_text(encoding="utf-8")
            DOCUMENT.write_text(put(page, "accuracy", tables(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()

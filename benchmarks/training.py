"""One step of distillation in every way: loops by hand, `distill train`, and other toolkits.

    python benchmarks/training.py [--pair resnet56:resnet20] [--batch 64] [--peers DIR] [--rounds 3]

All do the same work: the same teacher and student with the same weights, images of noise that are
cropped and flipped, SGD at 0.1 with momentum 0.9 and weight decay 5e-4, 0.1 of cross-entropy and
0.9 of KD at T = 4. Each is a process of its own; they take turns of one epoch, and ratios are of
neighbours in time. The first turn of each, with compilation and whatever else is done once, is not
counted, nor start-up, validation and checkpoints. Seconds are the clock's on a GPU, and those of
processors on a CPU, on one thread, where the workers of loaders count too.

`--peers` is where peers.py has put the other toolkits. They run as their authors ship them ("as
shipped": their own script, loader and workers, as many of these as the machine has processors) and
with their loader replaced by batches made in memory ("loop alone").
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import roofline
from _setting import Setting, write, write_cache
from _timing import Row, report, verdict
from _turns import Variant, interleave

from distill.data.workers import cores

HERE = Path(__file__).parent
BASE = "loop by hand"
OURS = "distill, cached"
PEERS = ("timm", "torchdistill", "mdistiller", "RepDistiller")
FP32_ONLY = ("torchdistill", "mdistiller", "RepDistiller")
# Images of a turn that is long enough to count: seconds of a CPU, hundreds of steps of a GPU; and
# of the whole set, which is an epoch of ours. Small ones have as many steps in it as there are
# between two rows of metrics, if asking the teacher about them takes no minutes.
TURN = {("cpu", False): 1_024, ("cuda", False): 20_480, ("cuda", True): 10_240, ("cpu", True): 32}
EPOCH = {("cpu", False): 4_096, ("cuda", False): 20_480, ("cuda", True): 2_048, ("cpu", True): 32}


def loops(setting: Setting) -> dict[str, dict[str, Any]]:
    """The loops by hand."""
    if setting.size > 32:  # as anyone would write them for such images
        compiled = setting.device == "cuda"
        how = {"compiled": compiled}
        after = ", compiled" if compiled else ""
        return {
            f"{BASE}{after}": how,
            f"loop by hand{after}, cached logits": {"told": "cached", **how},
            f"loop by hand{after}, labels alone": {"told": "none", **how},
            "loop by hand, eager": {},
        }
    found: dict[str, dict[str, Any]] = {
        BASE: {"channels_last": False},
        "loop by hand, channels last": {},
        "loop by hand, cached logits": {"told": "cached"},
        "loop by hand, labels alone": {"told": "none"},
    }
    if setting.device == "cuda":
        found["CUDA graph by hand"] = {"graph": True}
        found["CUDA graph by hand, cached logits"] = {"graph": True, "told": "cached"}
    return found


def ours(setting: Setting, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """`distill train`."""
    found: dict[str, dict[str, Any]] = {
        "distill, teacher live": {"how": "live"},
        OURS: {"how": "cached"},
        "distill, labels alone": {"how": "alone"},
    }
    if setting.device == "cuda":
        found["distill, live, --no-cuda-graph"] = {"how": "live", "cuda_graph": False}
        found["distill, cached, --no-cuda-graph"] = {"how": "cached", "cuda_graph": False}
    if compiled:
        found["distill, live, --compile"] = {"how": "live", "compiled": True}
        found["distill, cached, --compile"] = {"how": "cached", "compiled": True}
    return found


def others(setting: Setting, peers: Path | None) -> dict[str, dict[str, Any]]:
    """The peers that can do this work."""
    if peers is None or setting.size > 32:
        return {}
    found = {}
    for memory, what in ((False, "as shipped"), (True, "loop alone")):
        for name in PEERS:
            if setting.precision == "fp32" or name not in FP32_ONLY:
                found[f"{name}, {what}"] = {"name": name, "peers": str(peers), "memory": memory}
    return found


def variants(
    setting: Setting, folder: Path, peers: Path | None, *, compiled: bool, limits: roofline.Limits
) -> list[Variant]:
    """All of them; the first is what the others are held to."""
    program = [sys.executable, str(HERE / "_variant.py")]
    found = []
    for kind, named in (
        ("loop", loops(setting)),
        ("ours", ours(setting, compiled=compiled)),
        ("peer", others(setting, peers)),
    ):
        for name, keys in named.items():
            taught = keys.get("how", keys.get("told", "live")) == "live"
            limit = roofline.images_a_second(
                setting.teacher if taught else None, setting.student, setting.size, limits,
                setting.precision,
            )  # fmt: skip
            path = [peers / "site"] if kind == "peer" and peers else []
            command = [*program, kind, str(folder), json.dumps(keys)]
            found.append(Variant(name, command, limit, path))
    return found


def compare(setting: Setting, options: argparse.Namespace) -> list[Row]:
    """Rows of all variants."""
    limits = roofline.limits_of(setting.device, setting.precision, options.limits)
    wall = setting.device == "cuda"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        write(setting, folder)
        write_cache(setting, folder)
        chosen = variants(
            setting, folder, options.peers, compiled=not options.no_compile, limits=limits
        )
        if options.variants:
            words = options.variants.split(",")
            chosen = chosen[:1] + [v for v in chosen[1:] if any(w in v.name for w in words)]
        found = interleave(
            chosen,
            rounds=options.rounds,
            wall=wall,
            folder=folder,
            environment=os.environ,
            say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        )
    report(
        setting.title,
        found,
        unit="images",
        per="s" if wall else "CPU-s",
        note=f"Limit: {limits.name}, {limits.flops / 1e12:,.3g} TFLOP/s and "
        f"{limits.bandwidth / 1e9:,.0f} GB/s in {setting.precision}.",
    )
    _verdicts(setting, found)
    return found


def _verdicts(setting: Setting, found: list[Row]) -> None:
    rows = {row.name: row for row in found if row.failed is None}
    alone, cached = rows.get("distill, labels alone"), rows.get(OURS)
    if alone and cached:
        ratio = alone.ratio / cached.ratio
        verdict("time of a cached step over one from labels alone, goal 1.05", ratio, ratio <= 1.05)
    ours = [row for name, row in rows.items() if name.startswith("distill, live") or
            name == "distill, teacher live"]  # fmt: skip
    hand = [row for name, row in rows.items() if "by hand" in name and "cached" not in name
            and "alone" not in name]  # fmt: skip
    if ours and hand:
        ratio = max(row.ratio for row in hand) / max(row.ratio for row in ours)
        verdict("time of our best live step over the best by hand, goal 1.05", ratio, ratio <= 1.05)
    shares = [row.share for name, row in rows.items() if name.startswith("distill") and row.share]
    if setting.size > 32 and setting.device == "cuda" and shares:
        verdict("our best share of the limit, goal 0.4", max(shares), max(shares) >= 0.4)


def main() -> None:
    """Compare what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pair", help="TEACHER:STUDENT, as a recipe names them")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, help="of a turn, a multiple of the batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--limits", choices=roofline.KNOWN, help="of the device; else measured")
    parser.add_argument("--peers", type=Path)
    parser.add_argument(
        "--variants", metavar="PART,...", help="those whose names have one of these"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.peers = options.peers and options.peers.resolve()
    if options.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        roofline.torch.set_num_threads(1)
    usual = "resnet56:resnet20" if options.device == "cpu" else "resnet32x4:resnet8x4"
    teacher, _, student = (options.pair or usual).partition(":")
    kind = options.device, options.size > 32
    turn = max((options.images or TURN[kind]) // options.batch, 1) * options.batch
    images = options.images or (EPOCH[kind] if kind[1] else min(50 * options.batch, EPOCH[kind]))
    images = max(images, turn) if not kind[1] else max(images, options.batch)
    setting = Setting(
        teacher=teacher, student=student, size=options.size, batch=options.batch,
        precision=options.precision, device=options.device, images=images, turn=turn,
        workers=max(1, cores()),
    )  # fmt: skip
    compare(setting, options)


if __name__ == "__main__":
    main()

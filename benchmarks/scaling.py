"""Training on 1, 2, 4 ... processes: images a second, and the part of a step that waits for others.

    python benchmarks/scaling.py [--processes 1,2,4] [--json scaling.json]

On GPUs each process has one, elsewhere one thread: more processes than cores share them, and the
ratio then says what a core gives. Every process trains on `--images` images a step, so the global
batch grows with their number. The wait is a second measurement of the same steps without the
all-reduce (DDP's no_sync): what they take less. Rounds of all numbers of processes take turns, and
medians are given. The student is a network of the zoo on random images of CIFAR's shape, which
lie on the device; the teacher's logits are random too, as from a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from distill import models, objectives
from distill.data.workers import cores
from distill.engine import machine, parallel
from distill.engine.networks import placed
from distill.engine.step import Distiller, train_step
from distill.recipe import Model, TermSpec
from distill.types import Batch, Outputs

FACTS = {
    "classes": tuple(map(str, range(100))),
    "image_size": 32,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}


def measured(model: str, images: int, steps: int) -> dict[str, float]:
    """Seconds of a step here, with and without the others."""
    here = machine.setup(workers=0)
    torch.manual_seed(0)
    student = placed(models.build_student(Model(model=model), **FACTS), here)
    specs = [TermSpec(term="ce"), TermSpec(term="kd")]
    distiller = Distiller(student, objectives.build(specs).to(here.device))
    wrapped = parallel.wrap(distiller, here)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
    batch = Batch(
        torch.rand(images, 3, 32, 32, device=here.device),
        torch.rand(images, 100, device=here.device).softmax(dim=1),
        torch.arange(images, device=here.device),
        torch.zeros(images, dtype=torch.long, device=here.device),
    )
    told = Outputs(torch.randn(images, 100, device=here.device))

    def seconds(*, local: bool) -> float:
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        with wrapped.no_sync() if local and here.world > 1 else nullcontext():  # type: ignore[operator]
            for _ in range(steps):
                train_step(
                    wrapped, None, optimizer, batch, weights={"ce": 0.1, "kd": 0.9}, told=told
                )
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    seconds(local=False)  # kernels are chosen, buckets built
    both = [(seconds(local=False), seconds(local=True)) for _ in range(3)]
    together, alone = (statistics.median(times) for times in zip(*both, strict=True))
    gradients = sum(p.numel() * p.element_size() for p in distiller.parameters())
    return {"seconds": together, "alone": alone, "gradient_bytes": gradients}


def run(processes: int, arguments: list[str]) -> dict[str, float]:
    """One measurement in so many processes; rank 0's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", *arguments],
            env=os.environ
            | {name: str(value) for name, value in shared.items()}
            | {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{processes} processes: one of them failed")
    found: dict[str, float] = json.loads(told[0])
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=64, help="a step, for each process")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        told = measured(asked.model, asked.images, asked.steps)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(told))
        return
    counts = [int(count) for count in asked.processes.split(",")]
    arguments = ["--model", asked.model, "--images", str(asked.images), "--steps", str(asked.steps)]
    rounds = [{count: run(count, arguments) for count in counts} for _ in range(asked.rounds)]
    gpus = torch.cuda.device_count()
    rows = []
    for count in counts:
        rates = [count * asked.images / told[count]["seconds"] for told in rounds]
        ratios = [told[counts[0]]["seconds"] / told[count]["seconds"] for told in rounds]
        waits = [max(0.0, 1 - told[count]["alone"] / told[count]["seconds"]) for told in rounds]
        rows.append(
            {
                "processes": count,
                "images_per_second": statistics.median(rates),
                "per_process_ratio": statistics.median(ratios),
                "all_reduce_share": statistics.median(waits),
            }
        )
    found = {
        "model": asked.model,
        "images_per_process": asked.images,
        "device": torch.cuda.get_device_name() if gpus else "one CPU thread a process",
        "cores": cores(),
        "load": os.getloadavg()[0],
        "gradient_bytes": rounds[0][counts[0]]["gradient_bytes"],
        "torch": torch.__version__,
        "rows": rows,
    }
    print(f"{asked.model}, {asked.images} images a process and step, {found['device']}, ", end="")
    print(f"{found['cores']} cores, load {found['load']:.1f}")
    print(f"{'processes':>9} {'images/s':>9} {'ratio a process':>16} {'in all-reduce':>14}")
    for row in rows:
        print(
            f"{row['processes']:9} {row['images_per_second']:9,.0f} "
            f"{row['per_process_ratio']:16.2f} {row['all_reduce_share']:14.0%}"
        )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

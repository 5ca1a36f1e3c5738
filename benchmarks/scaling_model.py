"""What training on many GPUs should cost, on paper: the tables of docs/scaling.md.

    python benchmarks/scaling_model.py

Nothing here is measured. Rooflines and the shares of them that engines reach are those of an H100:
3 TB/s of memory, 790 TFLOP/s; the numbers of a network's work are counted, not estimated.
"""

from __future__ import annotations

from typing import NamedTuple

GPUS_PER_NODE = 8
COUNTS = (1, 8, 64, 512)  # GPUs
REACHED = 0.8  # of a link's rate
NVLINK = 450e9 * REACHED  # bytes/s, one way, each GPU
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time
DISK = 1e9  # bytes/s
# Bytes, and images/s a core with `data.decoder: fast` and its extra (benchmarks/decode.py).
DECODED = {"JPEG, 500 x 375": (110e3, 1100), "pack, 256 px": (27e3, 3000)}


class Network(NamedTuple):
    """What connects the nodes."""

    name: str
    rate: float  # bytes/s each GPU, while all of a node send
    latency: float  # seconds a hop


INSIDE = Network("NVLink", NVLINK, 3e-6)
NETWORKS = (
    Network("InfiniBand, 400 Gb/s a GPU", 400e9 / 8 * REACHED, 5e-6),
    Network("Ethernet, 100 Gb/s a node", 100e9 / 8 / GPUS_PER_NODE * REACHED, 20e-6),
)


class Pair(NamedTuple):
    """A teacher and a student on one H100."""

    name: str
    parameters: int  # of the student
    images: int  # a GPU and step
    live: float  # images/s of the roofline, the teacher asked in each step
    cached: float  # the same, its answers read
    share: float  # of the roofline that an engine reaches
    classes: int
    train_images: int
    pixels: int

    @property
    def gradient_bytes(self) -> int:
        """In float32."""
        return 4 * self.parameters


PAIRS = (
    Pair("ResNet-50 → ResNet-18", 11_689_512, 256, 26_601, 42_954, 0.45, 1000, 1_281_167, 224),
    Pair("ViT-B → ViT-S", 22_050_664, 256, 10_345, 19_157, 0.45, 1000, 1_281_167, 224),
    Pair("resnet32x4 → resnet8x4", 1_233_540, 512, 194_806, 426_127, 0.15, 100, 50_000, 32),
)


def ring(size: float, members: int, network: Network) -> float:
    """Seconds of an all-reduce: 2 (N − 1) / N · bytes / rate + 2 (N − 1) · latency."""
    hops = 2 * (members - 1)
    return hops / members * size / network.rate + hops * network.latency


def all_reduce(size: float, gpus: int, network: Network) -> float:
    """Seconds among the GPUs of a node, then of each one's eighth among the nodes."""
    inside = ring(size, min(gpus, GPUS_PER_NODE), INSIDE)
    nodes = gpus // GPUS_PER_NODE
    return inside + (ring(size / GPUS_PER_NODE, nodes, network) if nodes > 1 else 0.0)


def step(pair: Pair, *, live: bool) -> float:
    """Seconds of a step's computation."""
    return pair.images / (pair.share * (pair.live if live else pair.cached))


def exposed(pair: Pair, gpus: int, network: Network) -> float:
    """Seconds of the all-reduce that no computation hides.

    Buckets are reduced while the rest of the backward pass, two thirds of the student's step, goes
    on; the last one is full when nothing is left to do.
    """
    if gpus == 1:
        return 0.0
    whole = all_reduce(pair.gradient_bytes, gpus, network)
    last = all_reduce(min(BUCKET, pair.gradient_bytes), gpus, network)
    return max(last, whole - 2 / 3 * step(pair, live=False))


def efficiency(pair: Pair, gpus: int, network: Network, *, live: bool) -> float:
    """Images a second of each GPU, over those of one alone."""
    alone = step(pair, live=live)
    return alone / (alone + exposed(pair, gpus, network))


def table(head: list[str], rows: list[list[str]]) -> str:
    """The rows in Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaling(network: Network) -> str:
    """Time and efficiency of every pair over a network."""
    rows = []
    for pair in PAIRS:
        for live in (False, True):
            waits = [1e3 * all_reduce(pair.gradient_bytes, n, network) for n in COUNTS[1:]]
            parts = [efficiency(pair, n, network, live=live) for n in COUNTS]
            rate = pair.images / step(pair, live=live) * COUNTS[-1] * parts[-1]
            rows.append(
                [
                    f"{pair.name}, {'live' if live else 'cached'}",
                    f"{pair.gradient_bytes / 1e6:.1f}",
                    f"{1e3 * step(pair, live=live):.1f}",
                    *(f"{wait:.2f}" for wait in waits),
                    *(f"{part:.0%}" for part in parts),
                    f"{rate / 1e6:.2f} M",
                ]
            )
    head = ["pair", "gradients, MB", "step, ms", *(f"all-reduce at {n}, ms" for n in COUNTS[1:])]
    head += [*(f"at {n}" for n in COUNTS), f"images/s at {COUNTS[-1]}"]
    return table(head, rows)


def feeding() -> str:
    """What data, caches and checkpoints ask for, where answers are cached."""
    rows = []
    for pair in PAIRS:
        rate = pair.images / step(pair, live=False)
        small = pair.pixels < 64
        answers = rate * (pair.classes + 4)
        whole = rate * COUNTS[-1] * efficiency(pair, COUNTS[-1], NETWORKS[0], live=False)
        decoding = (
            ["on the GPU"] * 2
            if small
            else [f"{rate * size / 1e6:,.0f} MB/s, {rate / c:.0f}" for size, c in DECODED.values()]
        )
        state = 4 * pair.gradient_bytes
        rows.append(
            [
                pair.name,
                f"{rate:,.0f}",
                *decoding,
                f"{answers / 1e6:.1f}",
                f"{whole * (pair.classes + 4) / 1e9:.2f}",
                f"{state / 1e6:.0f} MB, {state / DISK:.2f} s",
                f"{COUNTS[-1] * pair.images:,}",
                f"{pair.train_images / (COUNTS[-1] * pair.images):.1f}",
            ]
        )
    head = ["pair, cached", "images/s a GPU", *(f"{name}: read, cores a GPU" for name in DECODED)]
    head += ["answers, MB/s a GPU", f"answers, GB/s at {COUNTS[-1]}", "checkpoint"]
    head += [f"global batch at {COUNTS[-1]}", "steps an epoch"]
    return table(head, rows)


def tables() -> dict[str, str]:
    """All tables, by what stands above them."""
    return {network.name: scaling(network) for network in NETWORKS} | {"feeding": feeding()}


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")

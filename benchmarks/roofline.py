"""How many images a second a device allows, and in what part of it we are.

    python benchmarks/roofline.py [--device cpu|cuda] [--limits H100] [--precision bf16]

A network's pass over an image takes at least its operations over the rate of matrix products, and
at least its traffic over the bandwidth of memory; the limit is the slower of both, and those of
teacher and student add up. Operations are counted on meta tensors, a multiply-add as two. Traffic
is that of the outputs of the network's leaves, each read and written some times: so often as
kernels do that fuse what PyTorch's compiler fuses ("fused"), or as kernels do that fuse nothing.
The optimizer's own traffic, residual sums and activations that are calls and no modules are left
out: where memory binds, the limit is 5 to 20 % too high, and our share of it as much too low.
`--limits` takes rates from a table in place of measuring.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any, NamedTuple

import torch
from _timing import Row, report
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.models import backbones

PAIRS = (
    ("resnet56", "resnet20", 32),
    ("resnet32x4", "resnet8x4", 32),
    ("timm/resnet50", "timm/resnet18", 224),
    ("timm/vit_base_patch16_224", "timm/vit_tiny_patch16_224", 224),
    ("timm/vit_base_patch16_224", "timm/vit_small_patch16_224", 224),
)
BYTES = {"fp32": 4, "bf16": 2}
CLASSES = 100
IDLE = (nn.Identity, nn.Dropout)  # timm's networks have many of them, which do nothing


class Limits(NamedTuple):
    """What a device can do at most."""

    name: str
    flops: float  # a second, in products of matrices or in convolutions
    bandwidth: float  # bytes a second, read or written


# What matrix products and copies reach there in bf16; TF32, which fp32 convolutions run in, makes
# half as many operations.
KNOWN = {
    "H100": Limits("H100", 790e12, 3.0e12),
    "H200": Limits("H200", 790e12, 4.4e12),
    "A100": Limits("A100", 250e12, 1.8e12),
    "RTX3090": Limits("RTX3090", 71e12, 0.85e12),
}


class Pass(NamedTuple):
    """What one image costs."""

    forward: float  # operations
    training: float  # forward and backward
    values: float  # that the leaves of the network give
    attention: bool


# Reads and writes of each output of a leaf, by kind of network and by what is fused. A triple of
# convolution, BatchNorm and ReLU takes 6 passes forwards and 12 backwards where each is a kernel,
# 5 and 9 where ReLU joins BatchNorm, 2 where BatchNorm is folded away as well: over 3 outputs.
PASSES = {
    ("training", False): (6.0, 7.0),
    ("training", True): (14 / 3, 5.0),
    ("forward", False): (2.0, 2.5),
    ("forward", True): (2 / 3, 1.5),
}


@functools.lru_cache
def count(model: str, size: int, num_classes: int = CLASSES) -> Pass:
    """What an image costs a network, counted without running it."""
    with torch.device("meta"):
        network = backbones.build(model, {}, num_classes=num_classes, image_size=size)
        images = torch.zeros(2, 3, size, size)
    values = 0

    def add(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if not list(module.children()) and not isinstance(module, IDLE)
    ]
    # The counter sees no fused attention on this device.
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        network.train()(images).sum().backward()
    attention = any("attn" in name.lower() for name, _ in network.named_modules())
    flops = (counter.get_total_flops() / 2 for counter in (forward, both))
    return Pass(*flops, values / 2, attention)


def seconds(cost: Pass, limits: Limits, precision: str, what: str, *, fused: bool = True) -> float:
    """The least time of a `forward` or `training` pass over an image."""
    flops = cost.training if what == "training" else cost.forward
    passes = PASSES[what, fused][cost.attention]
    traffic = cost.values * passes * BYTES[precision]
    return max(flops / limits.flops, traffic / limits.bandwidth)


def images_a_second(
    teacher: str | None, student: str, size: int, limits: Limits, precision: str, *,
    fused: bool = True,
) -> float:  # fmt: skip
    """The most images that distillation can see in a second; without a teacher, or from a cache."""
    least = seconds(count(student, size), limits, precision, "training", fused=fused)
    if teacher is not None:
        least += seconds(count(teacher, size), limits, precision, "forward", fused=fused)
    return 1 / least


def measured(device: str, precision: str, name: str) -> Limits:
    """What products and copies reach on this device now, the best of several tries.

    Products are those of matrices or a convolution's, whichever are quicker: on CPUs different
    libraries make them, not all of which use the processor whole. On a CPU that is one thread, in
    seconds of its own time, as all else is measured there.
    """
    cuda = device == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side, size = (8192, 2**28) if cuda else (1024, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    maps, channels, pixels = (64, 256, 56) if cuda else (16, 256, 16)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    layer.to(memory_format=torch.channels_last).requires_grad_(False)
    image = torch.randn(maps, channels, pixels, pixels, device=device, dtype=dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    out = torch.empty_like(a)

    def best(call: Any, units: float, times: int) -> float:
        rates = []
        for _ in range(6):
            began = clock()
            for _ in range(times):
                call()
            if cuda:
                torch.cuda.synchronize()
            rates.append(units * times / (clock() - began))
        return max(rates[1:])

    flops = max(
        best(lambda: torch.mm(a, b, out=out), 2.0 * side**3, 20 if cuda else 2),
        best(lambda: layer(image), 2.0 * maps * 9 * (channels * pixels) ** 2, 20 if cuda else 4),
    )
    bandwidth = best(lambda: target.copy_(source), 2.0 * size * 4, 20 if cuda else 4)
    torch.backends.cuda.matmul.allow_tf32 = before
    del a, b, out, source, target, layer, image
    if cuda:
        torch.cuda.empty_cache()
    return Limits(f"{name}, measured", flops, bandwidth)


def limits_of(device: str, precision: str, name: str | None) -> Limits:
    """Those of the table by name, or measured."""
    if name is None:
        return measured(device, precision, device)
    known = KNOWN[name]
    return known if precision == "bf16" else known._replace(flops=known.flops / 2)


def table(limits: Limits, precision: str) -> list[Row]:
    """The limits of all pairs, live and cached; ratios are to the same with nothing fused."""
    found = []
    for teacher, student, size in PAIRS:
        for who, how in ((teacher, "live"), (None, "cached")):
            fused, plain = (
                images_a_second(who, student, size, limits, precision, fused=fused)
                for fused in (True, False)
            )
            name = f"{teacher} → {student}, {how}".replace("timm/", "").replace("_patch16_224", "")
            ratio = fused / plain
            found.append(Row(name, fused, ratio, ratio, ratio))
    return found


def main() -> None:
    """Print what the device allows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limits", choices=KNOWN)
    parser.add_argument("--precision", choices=BYTES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    limits = limits_of(options.device, precision, options.limits)
    report(
        f"what {limits.name} allows in {precision}: {limits.flops / 1e12:,.3g} TFLOP/s, "
        f"{limits.bandwidth / 1e12:,.3g} TB/s",
        table(limits, precision),
        unit="images",
        per="s" if options.device == "cuda" else "CPU-s",
        note="Ratios are to the limit with nothing fused.",
    )


if __name__ == "__main__":
    main()

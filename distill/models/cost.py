"""What a network costs, counted without running it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.models.network import Network, on_meta


def parameters(network: nn.Module) -> int:
    """The number of learned values."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: Network, image_size: int) -> int:
    """Floating-point operations of one image's forward pass; a multiply-add counts as two.

    Counted on meta tensors, with attention written out: the counter sees neither PyTorch's fused
    attention on a CPU nor its fast path for encoder layers (22.5 instead of 35.1 GFLOP for
    ViT-B/16).

    Args:
        network: The network; it is not run.
        image_size: Side of the images in pixels.
    """
    meta = on_meta(network).eval().requires_grad_(False)
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            meta(images)
        return int(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

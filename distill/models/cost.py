"""What a network costs, counted without running it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from distill.models import weights
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
    counter = FlopCounterMode(display=False)
    _pass(network, image_size, counter, sdpa_kernel(SDPBackend.MATH))
    return int(counter.get_total_flops())


def macs(network: Network, image_size: int) -> int:
    """Multiply-adds of one image's forward pass: those of convolutions and matrix products.

    Half of `flops`, which counts the same operations. Papers often call these FLOPs.

    Args:
        network: The network; it is not run.
        image_size: Side of the images in pixels.
    """
    return flops(network, image_size) // 2


def activation_bytes(network: Network, image_size: int) -> int:
    """The most memory that activations take at once in one image's forward pass, in bytes.

    max over operations of Σ size of the tensors that operations have made until then and that
    Python still holds: views and results in place take nothing, and neither the weights nor the
    image is counted. It is what eager inference allocates, in float32 where the weights are, but
    for the scratch memory of kernels, such as a convolution's. Fused attention is one operation:
    it never holds its map.

    Args:
        network: The network; it is not run.
        image_size: Side of the images in pixels.
    """
    alive = _Alive()
    # Only in inference mode are fused operations seen before they are taken apart.
    _pass(network, image_size, torch.inference_mode(), alive)
    return alive.peak


def file_bytes(network: Network) -> int:
    """The size of the network's safetensors file, description and all.

    The file is made for that, in memory: it takes several times its size for a moment.
    """
    return len(weights.to_bytes(network))


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the memory of what operations return, as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}  # by address of the memory's owner
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and look at what it made."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            query, value = args[0], args[2]
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
        elif func is torch.ops.aten.batch_norm.default:  # returns its statistics on meta alone
            out = torch.empty_like(args[0])
        else:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is NotImplemented:
                out = func(*args, **kwargs)
        given = {memory._cdata for memory in _memory((args, kwargs))}
        for memory in _memory(out):
            place = memory._cdata
            if place not in given and place not in self.sizes:
                self.sizes[place] = memory.nbytes()
                weakref.finalize(memory, self.sizes.pop, place)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def _memory(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, Tensor)]


def _pass(network: Network, image_size: int, *watching: AbstractContextManager[Any]) -> None:
    """One image's forward pass on meta tensors."""
    meta = on_meta(network).eval().requires_grad_(False)
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            for watch in watching:
                stack.enter_context(watch)
            meta(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

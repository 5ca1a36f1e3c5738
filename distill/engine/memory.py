"""Memory of a training step: how much there is, how much a step needs, and in how many pieces."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distill.engine.capture import forget_gradients
from distill.errors import DistillError, PreflightError
from distill.models.network import normalises_batches
from distill.objectives import apart_from_others
from distill.types import Batch

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
PART = 0.5  # of what is free, for what a step keeps; gradients of it and workspaces take the rest
# Of want, in what PyTorch and its libraries say.
_SIGNS = ("DefaultCPUAllocator", "could not create a primitive", "ALLOC_FAILED")


def free_bytes(device: torch.device) -> int:
    """What this process may still take on the device, limits of its container included."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [int(psutil.virtual_memory().available), *_free_of_groups(_GROUPS, _OWN_GROUP)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    return max(min(free), 0)


def _free_of_groups(root: Path, own: Path) -> list[int]:
    """What the groups that limit this process's memory leave: a container's, a batch system's.

    Files that are kept in memory count into a group, and give way to whoever needs it.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for name in (line[3:] for line in lines if line.startswith("0::")):
        below = Path(*(part for part in name.split("/") if part != ".."))
        for folder in (root / group for group in (below, *below.parents)):
            with suppress(OSError, ValueError):  # where there is no limit it says "max"
                most, used = (
                    int((folder / f"memory.{what}").read_text()) for what in ("max", "current")
                )
                told = (folder / "memory.stat").read_text().splitlines()
                parts = dict(line.split() for line in told)
                found.append(most - used + sum(int(parts[f"{a}active_file"]) for a in ("", "in")))
    return found


def keep_freed() -> None:
    """Let the C library keep what PyTorch frees on a CPU, for the next step to use again.

    glibc gives blocks of more than 32 MB back to the system, which zeroes the pages of every new
    one: a third of the time of a ResNet-20's steps on 512 images, and no memory is won by it.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held at once: on a GPU its tensors, else all of it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kept_bytes(step: Callable[[], object], network: nn.Module) -> int:
    """Bytes that a step keeps between its forward and backward pass, the weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    found: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        step()
    return sum(found.values())


def grown(few: int, more: int, images: int) -> int:
    """Bytes for so many images, told from those for two and for four.

    Not all that is kept grows with the batch: autocast keeps cast weights.
    """
    return max(round(few + max(more - few, 0) / 2 * (images - 2)), 0)


def pieces_that_fit(
    network: nn.Module,
    add: Callable[[Batch, int], object],
    batch: Batch,
    pieces: int,
    *,
    reserve: int,
    device: torch.device,
) -> int:
    """The fewest equal pieces, from `pieces` on, whose steps fit on the device one by one.

    On a GPU they are tried; elsewhere, where a system gives more memory than it has and then kills,
    they are told from the need of a few images. Nothing of what is tried stays, and all processes
    get the same answer.

    Args:
        network: All that learns, not wrapped.
        add: Adds up the gradients of a batch in so many pieces.
        batch: This process's share of a global batch.
        pieces: The fewest that come into question.
        reserve: Bytes that the first update will take besides.
        device: Where.

    Raises:
        PreflightError: If not even single images fit.
    """
    images = len(batch.ids)
    fitting = pieces
    with _rehearsed(network):
        need = None if device.type == "cuda" else _need(network, add, batch)

        def fits(pieces: int) -> bool:
            return _fits(network, add, batch, pieces, reserve, need, device)

        while _any(not fits(fitting), device):
            if fitting == images:
                raise PreflightError(
                    f"not even one image at a time fits into the memory of {device}",
                    hint="a smaller student or teacher, a smaller image, or precision: bf16",
                )
            fitting = next(n for n in range(fitting + 1, images + 1) if images % n == 0)
    return fitting


def in_pieces(network: nn.Module, images: int, pieces: int, device: torch.device) -> str:
    """What a user is told of a batch that was cut because it does not fit."""
    return (
        f"{images:,} images at once do not fit into the memory of {device}: the gradients of "
        f"{pieces} micro-batches of {images // pieces:,} are added up, for the same global batch"
        + (", and BatchNorm sees each by itself" if normalises_batches(network) else "")
    )


@contextmanager
def wanted(images: int, device: torch.device) -> Generator[None]:
    """Say in a sentence that memory was not enough for a step on so many images.

    Raises:
        DistillError: If it was not.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()
        raise DistillError(
            f"the memory of {device} is not enough for a step on {images:,} images: "
            f"{reason[0] if reason else type(error).__name__}",
            hint=f"--device-batch-size {max(images // 2, 1)} adds up gradients of smaller pieces; "
            "the same command goes on from the last checkpoint",
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether it was raised for want of memory, by a GPU's allocator or the CPU's."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS)
    )


@contextmanager
def _rehearsed(network: nn.Module) -> Generator[None]:
    """Leave the network as it was: without gradients, and its running statistics put back."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with apart_from_others():
            yield
    finally:
        forget_gradients(network)
        for buffer, value in before:
            buffer.copy_(value)


def _need(
    network: nn.Module, add: Callable[[Batch, int], object], batch: Batch
) -> Callable[[int], int]:
    """Bytes that a step keeps, by its images."""
    if len(batch.ids) <= 4:
        return lambda images: 0
    with torch.compiler.set_stance("force_eager"):  # else it would compile for these sizes
        few, more = (
            kept_bytes(lambda: add(batch.rows(slice(count)), 1), network)  # noqa: B023
            for count in (2, 4)
        )
    return lambda images: grown(few, more, images)


def _fits(
    network: nn.Module,
    add: Callable[[Batch, int], object],
    batch: Batch,
    pieces: int,
    reserve: int,
    need: Callable[[int], int] | None,
    device: torch.device,
) -> bool:
    if need is not None:
        return need(len(batch.ids) // pieces) + reserve <= PART * free_bytes(device)
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        add(batch, pieces)
        del held
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        forget_gradients(network)
        torch.cuda.empty_cache()
    return True


def _any(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process; the same answer in all of them."""
    if not dist.is_initialized():
        return here
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)

"""One model on several processes: what they share of its gradients, weights and statistics."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distill.engine.machine import Machine
from distill.engine.step import Distiller
from distill.errors import IncompatibleError
from distill.models import backbones
from distill.models.network import Network, normalises_batches
from distill.models.weights import fill
from distill.objectives import Objective
from distill.recipe import Recipe

ELEMENTWISE = ("sgd", "adamw")  # optimizers that need no more of a matrix than a part


def wrap(distiller: Distiller, here: Machine) -> nn.Module:
    """What a step calls so that all processes move their weights alike.

    The gradients are means over the processes. Each process holds all weights, or with
    `--shard-weights` a part of them, of their gradients and of the optimizer's moments.
    """
    if here.shards:
        shard(distiller.student, here)
        if any(True for _ in distiller.objective.parameters()):
            shard(distiller.objective, here)
        return distiller
    if here.world == 1:
        return distiller
    devices = [here.device] if here.device.type == "cuda" else None
    wrapped = DistributedDataParallel(distiller, device_ids=devices, gradient_as_bucket_view=True)
    if torch.are_deterministic_algorithms_enabled():
        # Else it sorts its buckets after the first step, and three processes or more then add up
        # in another order: the last bits of a run that goes on would be others.
        wrapped.reducer._push_all_rebuilt_params()
    return wrapped


def shard(module: nn.Module, here: Machine) -> None:
    """Leave this process a part of the module's weights, on its device.

    The others' parts are fetched for each block when its turn comes, and let go of after it: blocks
    of a transformer, stages of another network. What is left, its ends, is a block too.

    Raises:
        IncompatibleError: If a weight is a scalar.
    """
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise IncompatibleError(
            f"--shard-weights: {scalars[0]} is a single number, which has no parts",
            hint=f"another model or term, or without --shard-weights ({_plenty()})",
        )
    # Gradients of micro-batches are handed out one by one. Were they added up first, each process
    # would hold those of all weights.
    module.to(memory_format=torch.contiguous_format)
    # Features are often views. No term writes into what it is given.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    split = functools.partial(
        fully_shard, mesh=_mesh(here.device.type, here.world), reshard_after_forward=True
    )
    if isinstance(module, Network):
        found = module.anatomy()
        for block in found.blocks or found.stages:
            split(module.backbone.get_submodule(block.name))
    split(module)


@functools.cache
def _mesh(kind: str, world: int) -> DeviceMesh:
    return init_device_mesh(kind, (world,))


def synchronise(student: Network, recipe: Recipe, here: Machine) -> None:
    """Let BatchNorm see the images of all processes, where the recipe says so.

    Raises:
        IncompatibleError: If there are several processes, and none of them has a GPU.
    """
    if not recipe.train.sync_batchnorm or here.world == 1 or not normalises_batches(student):
        return
    if here.device.type != "cuda":
        raise IncompatibleError(
            f"train.sync_batchnorm: PyTorch has it on GPUs only, and {here.world} processes run on "
            f"{here.device.type}",
            hint="one process with --device-batch-size, or a student without BatchNorm",
        )
    # It knows timm's own layers of BatchNorm and activation in one.
    from timm.layers.norm_act import convert_sync_batchnorm

    student.backbone = convert_sync_batchnorm(student.backbone)  # type: ignore[no-untyped-call]


def seen_apart(student: Network, recipe: Recipe, here: Machine) -> list[str]:
    """What a user is told of BatchNorm that sees each batch in pieces."""
    whole, synchronised = recipe.train.batch_size, recipe.train.sync_batchnorm
    pieces = here.micro_batches(whole)
    seen = whole // pieces if synchronised else whole // here.world // pieces
    if seen == whole or not normalises_batches(student):
        return []
    said = (
        f"BatchNorm takes its statistics from {seen:,} images at a time, of a batch's {whole:,} "
        f"(devices: {here.world}, micro-batches: {pieces}): other numbers give another result"
    )
    if here.world > 1 and not synchronised:
        said += "; with train.sync_batchnorm: true it sees those of all GPUs"
    return [said]


def require_shardable(recipe: Recipe, objective: Objective, here: Machine) -> None:
    """Find what `--shard-weights` cannot be combined with.

    Raises:
        IncompatibleError: If there is something.
    """
    if here.compile:
        raise IncompatibleError("--shard-weights cannot be combined with --compile yet")
    if recipe.optimizer.name not in ELEMENTWISE:
        raise IncompatibleError(
            f"--shard-weights: optimizer.name: {recipe.optimizer.name} looks at whole matrices, "
            "and each process has a part",
            hint=f"--set optimizer.name=adamw, or without --shard-weights ({_plenty()})",
        )
    if recipe.train.precision == "fp16":
        raise IncompatibleError(
            "--shard-weights: train.precision: fp16 scales its losses by what all gradients are",
            hint="--set train.precision=bf16",
        )
    if recipe.cache is not None and recipe.cache.fill:
        raise IncompatibleError(
            "--shard-weights: cache.fill asks each process's teacher about images of its own",
            hint="distill teacher-cache makes the cache, in as many processes as you like",
        )
    for name, term in objective.terms.items():
        learns = any(True for _ in term.parameters())
        if learns and name not in objective.reads():  # and so is asked between two steps too
            raise IncompatibleError(
                f"--shard-weights: {name} learns a number that has no parts",
                hint=f"leave the term out, or --shard-weights ({_plenty()})",
            )


def _plenty() -> str:
    return "it is for models whose weights, gradients and moments do not fit on a device"


def saves(due: bool, must: bool, here: Machine, *, agreed: bool) -> bool:
    """Whether this process takes part in a checkpoint now.

    Several processes make one with a row of metrics: until then each has losses of its own, which
    only all of them together can save.

    Args:
        due: It is time for one, by this process's clock.
        must: It is to be made now whatever the time; the same in all processes.
        here: Where.
        agreed: Whether a row was written in this step, and the processes may ask each other.
    """
    if must or here.world == 1:
        return due or must
    if not agreed:
        return False
    if not here.shards:
        return here.main and due  # it holds all that is saved
    flag = torch.tensor(int(due), device=here.device)
    dist.broadcast(flag, src=0)  # the main one's clock counts
    return bool(flag)


def share_buffers(network: nn.Module, here: Machine) -> None:
    """Give all processes the main one's running statistics, which are the ones that are saved."""
    if here.world > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def in_step(
    batches: Iterable[Any], network: nn.Module, total: int, image_size: int, here: Machine
) -> Iterator[Any]:
    """The batches; a network in parts makes as many passes as where there is one batch more.

    That process waits for this one's part of the weights.

    Args:
        batches: Every `world`-th of all.
        network: That is asked about them.
        total: Number of all batches.
        image_size: Pixels.
        here: Where.
    """
    yield from batches
    if isinstance(network, FSDPModule) and 0 < total % here.world <= here.rank:
        images = torch.zeros(1, 3, image_size, image_size, device=here.device)
        network(images)


def whole(tensors: Mapping[str, Tensor], here: Machine) -> dict[str, Tensor]:
    """The tensors with all of their parts, in the main process; what others get means nothing.

    All processes have to ask, and none holds more than one of them on its device.
    """
    found = dict(tensors)
    for name, tensor in sorted(tensors.items()):  # a state that was read has an order by chance
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach()
            found[name] = full.cpu() if here.main else full.new_empty(0)
    return found


def joined(network: Network, here: Machine) -> Network:
    """The network in one piece and on the host, with its weights in the main process.

    As it is where it has no parts.
    """
    if not isinstance(network, FSDPModule):
        return network
    state = whole(network.backbone.state_dict(), here)
    known = network.description
    backbone = backbones.build(
        known.model, known.arguments, num_classes=known.num_classes, image_size=known.image_size
    )
    if here.main:
        fill(backbone, state, origin=known.model)
    return Network(backbone, known, reinitialised=network.reinitialised)


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a module's whole tensors into as much as this process has of them."""
    own = module.state_dict()
    module.load_state_dict({name: _part(tensor, own.get(name)) for name, tensor in tensors.items()})


def parts(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole tensors of an optimizer's state, each as its parameter is: `number.key` names them."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = {str(number): parameter for number, parameter in enumerate(own)}
    return {name: _part(x, owners.get(name.partition(".")[0])) for name, x in tensors.items()}


def _part(tensor: Tensor, of: Tensor | None) -> Tensor:
    if not isinstance(of, DTensor) or tensor.shape != of.shape:
        return tensor
    # Every process has read the whole: nothing is sent.
    tensor = tensor.to(of.device)
    return distribute_tensor(tensor, of.device_mesh, of.placements, src_data_rank=None)

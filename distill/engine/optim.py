"""Optimizers by recipe, and their state as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.recipe import Optimizer

RECORDABLE = ("sgd", "adamw")  # keep nothing that changes outside of tensors


def build(module: nn.Module, spec: Optimizer, *, recordable: bool = False) -> torch.optim.Optimizer:
    """The optimizer that a recipe's `optimizer` describes, over all parameters of `module`.

    With `decay: matrices`, biases, normalisation scales, tokens and position embeddings (every
    parameter of fewer than two dimensions, or whose name says so) are left out of weight decay.

    Args:
        module: What it moves.
        spec: How.
        recordable: Keep the learning rate in a tensor where a CUDA graph has to find it: that of
            SGD and AdamW on a GPU.
    """
    decay = spec.decay or ("all" if spec.name == "sgd" else "matrices")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = _is_matrix(name, parameter)
            orthogonal = matrix and spec.name == "muon"
            groups.setdefault((matrix or decay == "all", orthogonal), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": spec.weight_decay if decays else 0.0}
        | ({"use_fallback": not orthogonal} if spec.name == "muon" else {})
        for (decays, orthogonal), parameters in groups.items()
    ]
    devices = {p.device for group in groups.values() for p in group}
    fused = {device.type for device in devices} == {"cuda"}
    recordable = recordable and fused
    lr = torch.tensor(spec.lr, device=devices.pop()) if recordable else spec.lr
    match spec.name:
        case "sgd":
            nesterov = spec.nesterov and spec.momentum > 0
            return torch.optim.SGD(
                settings, lr=lr, momentum=spec.momentum, nesterov=nesterov, fused=fused
            )
        case "adamw":
            adamw = torch.optim.AdamW(settings, lr=lr, fused=fused, capturable=recordable)
            # The first steps are not recorded, and that is no reason for a warning.
            adamw._warned_capturable_if_run_uncaptured = True
            return adamw
        case "lamb":
            from timm.optim.lamb import Lamb

            # It would clip at a norm of 1 by itself; the recipe's clip_norm says what is clipped.
            return Lamb(settings, lr=spec.lr, max_grad_norm=None)
        case "muon":  # makes matrices and kernels orthogonal; all else moves by NAdamW or AdamW
            from timm.optim.muon import Muon

            return Muon(settings, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _is_matrix(name: str, parameter: Tensor) -> bool:
    last = name.rpartition(".")[2]
    tokens = ("cls", "dist", "token", "pos_embed", "position", "_table")
    return parameter.ndim >= 2 and not last.endswith(tokens)


def missing_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of moments that the first update will make; 0 once it has."""
    if optimizer.state:
        return 0
    moments = 1 if isinstance(optimizer, torch.optim.SGD) else 2
    sizes = [p.nbytes for group in optimizer.param_groups for p in group["params"]]
    return moments * int(sum(sizes))


def state_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state: tensors by `number.key`, and every other value by the same names.

    `group0.key` is what the parameters of a group share, as LAMB's count of steps; the settings
    of a group follow from the recipe and the step, and are no part of the state.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    whole = optimizer.state_dict()
    for index, state in whole["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else others)[f"{index}.{key}"] = value
    for index, group in enumerate(whole["param_groups"]):
        shared = {k: v for k, v in group.items() if isinstance(v, Tensor) and k != "lr"}
        tensors |= {f"group{index}.{key}": value for key, value in shared.items()}
    return tensors, others


def load_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], others: dict[str, Any]
) -> None:
    """Put back what `state_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for name, value in (tensors | others).items():
        owner, _, key = name.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = value
        else:
            state.setdefault(int(owner), {})[key] = value
    optimizer.load_state_dict({"param_groups": groups, "state": state})

"""What a backbone computes on its way to the logits, without a line of its own code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.component import suggestion
from distill.errors import IncompatibleError

POOLED = "pooled"


def attach(backbone: nn.Module, name: str, seen: dict[str, Tensor], num_classes: int) -> None:
    """Put the feature `name` into `seen` in every forward pass.

    `pooled` is what the classifier reads, (B, D): for any network the one vector that stands for
    the image. Any other name is a module's of the backbone, for what that returns.

    Raises:
        IncompatibleError: If there is no such module, or no classifier.
    """
    if name == POOLED:
        _classifier(backbone, num_classes).register_forward_pre_hook(_Read(seen, name))
        return
    modules = dict(backbone.named_modules())
    if name not in modules or not name:
        known = [known for known in modules if known and known.count(".") < 2]
        raise IncompatibleError(
            f"cache.features: no module {name!r} in {type(backbone).__name__}"
            + suggestion(name, known[:30]),
            hint="pooled is the vector that the classifier reads, in every network",
        )
    modules[name].register_forward_hook(_Keep(seen, name))


class _Hook:
    """An object, not a closure: a deep copy of a network has hooks that write into the copy."""

    def __init__(self, seen: dict[str, Tensor], name: str) -> None:
        self.seen, self.name = seen, name


class _Read(_Hook):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        vector = arguments[0]
        self.seen[self.name] = vector.flatten(2).mean(dim=2) if vector.ndim == 4 else vector


class _Keep(_Hook):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.seen[self.name] = output[0] if isinstance(output, tuple | list) else output


def _classifier(backbone: nn.Module, num_classes: int) -> nn.Module:
    """The last layer that has a weight row for each class."""
    layers = [
        module
        for module in backbone.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == num_classes
    ]
    if not layers:
        raise IncompatibleError(
            f"{type(backbone).__name__}: has no classifier with {num_classes} outputs",
            hint="features of such a network are named by module",
        )
    return layers[-1]

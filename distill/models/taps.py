"""What a backbone computes on its way to the logits, without a line of its own code.

A tap is `pooled`, the vector that the classifier reads, (B, D); `token`, the logits of a
distillation token's head, (B, K); a module's name, for the grid (B, C, h, w) that it gives, or with
`@prefix` for the tokens in front of it, (B, P, C); or with `@attention` for the map that is made in
it, (B, A, P + h*w, P + h*w), every row of which sums to 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.component import suggestion
from distill.errors import IncompatibleError
from distill.models.anatomy import ATTENTION, PREFIX, Examined, Maps
from distill.models.attention import Watch, spread
from distill.models.grids import Layout, Size, to_grid

POOLED = "pooled"
TOKEN = "token"
TOKEN_HEAD = "head_dist"  # its name in timm's networks, and in ours


def attach(
    backbone: nn.Module, name: str, seen: dict[str, Any], num_classes: int, examined: Examined
) -> None:
    """Put what the tap `name` gives into `seen` in every forward pass.

    Raises:
        IncompatibleError: If there is no such tap; the known ones are named.
    """
    modules = dict(backbone.named_modules())
    module = name.removesuffix(ATTENTION).removesuffix(PREFIX)
    if name == POOLED:
        classifier(backbone, num_classes).register_forward_pre_hook(_Vector(seen, name))
    elif name == TOKEN:
        if not has_token(backbone):
            raise IncompatibleError(
                f"{type(backbone).__name__}: has no distillation token",
                hint="student: {model: vit, pool: distill}, or one of timm's distilled networks",
            )
        backbone.set_distilled_training(True)  # type: ignore[operator]
        modules[TOKEN_HEAD].register_forward_hook(_Whole(seen, name))
    elif name in examined.maps:
        made = _Map(seen, name, examined.maps[name])
        modules[module].register_forward_pre_hook(made.enter)
        modules[module].register_forward_hook(made.leave, always_call=True)
    elif module in examined.layouts and name == module:
        modules[module].register_forward_hook(_Grid(seen, name, examined.layouts[module]))
    elif module in examined.layouts and name.endswith(PREFIX) and examined.layouts[module].prefix:
        modules[module].register_forward_hook(_Front(seen, name, examined.layouts[module]))
    elif module in modules and module and name == module:
        modules[module].register_forward_hook(_Whole(seen, name))
    else:
        known = [*examined.sites, *examined.maps]
        raise IncompatibleError(
            f"no module {name!r} in {type(backbone).__name__}" + suggestion(name, known),
            hint="pooled is the vector that the classifier reads, in every network",
        )


def classifier(backbone: nn.Module, num_classes: int) -> nn.Linear | nn.Conv2d:
    """The last layer that has a weight row for each class, and is not a distillation token's.

    Raises:
        IncompatibleError: If there is none.
    """
    layers = [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and module.weight.shape[0] == num_classes
        and TOKEN_HEAD not in name.split(".")
    ]
    if not layers:
        raise IncompatibleError(
            f"{type(backbone).__name__}: has no classifier with {num_classes} outputs",
            hint="features of such a network are named by module",
        )
    return layers[-1]


def has_token(backbone: nn.Module) -> bool:
    """Whether it has a token with a head of its own, for what a teacher says."""
    return hasattr(backbone, TOKEN_HEAD) and hasattr(backbone, "set_distilled_training")


class _Hook:
    """An object, not a closure: a deep copy of a network has hooks that write into the copy."""

    def __init__(self, seen: dict[str, Any], name: str) -> None:
        self.seen, self.name = seen, name


class _Vector(_Hook):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        vector = arguments[0]
        self.seen[self.name] = vector.flatten(2).mean(dim=2) if vector.ndim == 4 else vector


class _Whole(_Hook):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.seen[self.name] = _first(output)


class _Grid(_Hook):
    def __init__(self, seen: dict[str, Any], name: str, layout: Layout) -> None:
        super().__init__(seen, name)
        self.layout = layout

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        image: Size = self.seen["image"]
        self.seen[self.name] = to_grid(_first(output), self.layout, image)


class _Front(_Grid):
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.seen[self.name] = _first(output)[:, : self.layout.prefix]


class _Map(_Hook):
    def __init__(self, seen: dict[str, Any], name: str, maps: Maps) -> None:
        super().__init__(seen, name)
        cells = maps.grid[0] * maps.grid[1]
        self.cells = None if maps.windows is None else (maps.windows.cells(maps.grid), cells)
        self.mixed = maps.mixed
        self.watch = Watch(self.made, self.dropped)

    def made(self, rows: Tensor) -> None:
        if not self.mixed:
            if self.cells is not None:
                cells, count = self.cells
                self.cells = (cells.to(rows.device), count)  # once; then it is there
                rows = spread(rows, self.cells[0], count)
            self.seen[self.name] = rows

    def dropped(self, rows: Tensor) -> None:
        if self.mixed:
            self.seen[self.name] = rows

    def enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.watch.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output

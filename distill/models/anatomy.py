"""What a network computes on its way to the logits, found by running it once without values.

No library's convention is asked and no layer's name is known: every module whose output is a grid
over the image is a site, and the few that matter are told by their sizes and their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.models import attention
from distill.models.attention import Watch, Windows
from distill.models.grids import Layout, Size, layouts, token_grid
from distill.types import AttentionSite, Site

BATCH = 3  # of the pass without values: odd, so that windows are not taken for samples
FEWEST_BLOCKS = 3  # equal modules in a row that make a network isotropic,
LEAST_SHARE = 2 / 3  # if they have this part of its layers
ATTENTION = "@attention"  # ends the tap of a map
PREFIX = "@prefix"  # ends the tap of the tokens in front of a grid


class Maps(NamedTuple):
    """How the maps that a module makes become one over the whole grid."""

    grid: Size
    windows: Windows | None
    mixed: bool  # the layer mixes several maps: what its dropout gets is the one


class Examined(NamedTuple):
    """What `Anatomy` says of a backbone, and what its taps have to know besides."""

    image: Size
    sites: dict[str, Site]
    stages: tuple[Site, ...]
    blocks: tuple[Site, ...]
    attention: tuple[AttentionSite, ...]
    layouts: dict[str, Layout]  # by module
    maps: dict[str, Maps]  # by tap


class _Call(NamedTuple):
    """A module's call that gave a grid."""

    name: str
    module: nn.Module
    entered: Size | None  # the grid that it was given
    left: Layout
    begun: int  # layers with weights that were through before it
    done: int  # and after it


class _Map(NamedTuple):
    """A map that was computed, or went through a dropout."""

    owner: str  # the module that is made for attention
    shape: tuple[int, ...]
    done: int


class _Trace(NamedTuple):
    calls: list[_Call]
    entered: dict[str, Size]  # by module, the grid that it was given
    maps: list[_Map]
    dropped: list[_Map]
    layers: int


def examine(backbone: nn.Module, image: Size) -> Examined:
    """The anatomy of a backbone.

    Args:
        backbone: On the meta device; a copy that is not needed any more.
        image: Rows and columns of its images in pixels.
    """
    trace = _run(backbone, image)
    sites = {call.name: _site(call, trace, image) for call in trace.calls}
    stages = [sites[call.name] for call in _stages(trace)]
    blocks = [sites[call.name] for call in _blocks(backbone, trace)]
    if stages and blocks and blocks[-1].grid == stages[-1].grid:
        stages = [blocks[-1]]
    else:
        blocks = []
    found = dict(_attention(backbone, trace, sites, image))
    return Examined(
        image=image,
        sites=sites,
        stages=tuple(stages),
        blocks=tuple(blocks),
        attention=tuple(site for site, _ in found.values()),
        layouts={call.name: call.left for call in trace.calls},
        maps={tap: maps for tap, (_, maps) in found.items()},
    )


def _run(backbone: nn.Module, image: Size) -> _Trace:
    """One forward pass, every module watched."""
    shapes: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...], int, int]] = []
    maps: list[_Map] = []
    dropped: list[_Map] = []
    stack: list[tuple[str, nn.Module, int]] = []
    layers = 0

    def enter(name: str, module: nn.Module) -> None:
        stack.append((name, module, layers))

    def leave(module: nn.Module, given: tuple[Any, ...], gave: Any) -> None:
        nonlocal layers
        name, _, begun = stack.pop()
        layers += bool(module._parameters)
        shapes.append((name, module, _shape(given), _shape(gave), begun, layers))

    def map_in(record: list[_Map], x: Tensor) -> None:
        name, module, _ = stack[-1] if stack else ("", backbone, 0)
        owner = name if next(module.children(), None) else name.rpartition(".")[0]
        record.append(_Map(owner, tuple(x.shape), layers))

    for name, module in backbone.named_modules():
        module.register_forward_pre_hook(lambda module, _, name=name: enter(name, module))
        module.register_forward_hook(leave)
    images = torch.empty(BATCH, 3, *image, device="meta")
    watch = Watch(lambda x: map_in(maps, x), lambda x: map_in(dropped, x))
    with torch.no_grad(), watch:
        backbone.eval()(images)
    if hasattr(backbone, "reroll"):  # Hiera's tokens are not in the order of the image
        return _Trace([], {}, [], [], layers)
    usual = {}  # the layout of each class of modules, where it is beyond doubt
    candidates = [layouts(gave, image) if gave[:1] == (BATCH,) else [] for *_, gave, _, _ in shapes]
    for (_, module, *_), found in zip(shapes, candidates, strict=True):
        if len(found) == 1:
            usual[type(module)] = found[0].kind
    calls, entered = {}, {}
    for (name, module, given, _, begun, done), found in zip(shapes, candidates, strict=True):
        kind = usual.get(type(module))
        left = next(
            (layout for layout in found if layout.kind == kind), found[0] if found else None
        )
        came = layouts(given, image) if given[:1] == (BATCH,) else []
        same = [layout for layout in came if left and layout.kind == left.kind]
        if came:
            entered[name] = (same or came)[0].grid
        if left and name and done:  # before the first layer there are but pixels
            calls[name] = _Call(name, module, entered.get(name), left, begun, done)
    return _Trace(list(calls.values()), entered, maps, dropped, layers)


def _shape(value: Any) -> tuple[int, ...]:
    """Of the first tensor."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _site(call: _Call, trace: _Trace, image: Size) -> Site:
    grid = call.left.grid
    stride = math.sqrt(image[0] * image[1] / (grid[0] * grid[1]))
    return Site(
        call.name,
        call.left.channels,
        grid,
        stride,
        call.done / max(trace.layers, 1),
        call.left.prefix,
    )


def _stages(trace: _Trace) -> list[_Call]:
    """For each grid the module that ends there with most of the network in it.

    That is the stage, and not what normalises, widens or halves its output for the next. A grid of
    one cell is what is left after pooling, unless there is no other.
    """
    inside = _inside(trace)
    outside = [call for call in trace.calls if call.name not in inside]
    wide = [call for call in outside if math.prod(call.left.grid) > 1]
    between = _between(trace.calls)
    best: dict[Size, tuple[bool, int]] = {}
    chosen: dict[Size, _Call] = {}
    for call in wide or outside:
        rank = (call.name not in between, _weights(call.module))
        if rank >= best.get(call.left.grid, (False, 0)):
            best[call.left.grid], chosen[call.left.grid] = rank, call
    return sorted(chosen.values(), key=lambda call: call.done)


def _between(calls: list[_Call]) -> set[str]:
    """Modules inside of one that goes from their grid to another: on the way, and no end."""
    goes = {
        call.name: call.entered
        for call in calls
        if call.entered != call.left.grid and not isinstance(call.module, nn.Sequential)
    }
    return {
        call.name
        for call in calls
        for holder in _around(call.name)
        if goes.get(holder) == call.left.grid
    }


def _inside(trace: _Trace) -> set[str]:
    """Modules that compute on another grid inside of one that leaves its own as it was.

    Or on a finer one than that was given, which are rather the tokens of each head.
    """
    keeps = {call.name: call.left.grid for call in trace.calls if call.entered == call.left.grid}
    return {
        call.name
        for call in trace.calls
        for holder in _around(call.name)
        if keeps.get(holder, call.left.grid) != call.left.grid
        or math.prod(trace.entered.get(holder, call.left.grid)) < math.prod(call.left.grid)
    }


def _around(name: str) -> Iterator[str]:
    """The names of the modules around a module, innermost first; not the whole network's."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _blocks(backbone: nn.Module, trace: _Trace) -> list[_Call]:
    """Equal modules in a row that are most of the network; none where there are stages."""
    calls = {call.name: call for call in trace.calls}
    best: list[_Call] = []
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or len(module) < FEWEST_BLOCKS:
            continue
        children = [child for child, _ in module.named_children()]
        row = [calls.get(f"{name}.{child}" if name else child) for child in children]
        found = [call for call in row if call is not None]
        kinds = {(type(c.module), c.left.channels, c.left.grid) for c in found}
        share = found[-1].done - found[0].begun if found else 0
        if len(found) == len(row) and len(kinds) == 1 and share > LEAST_SHARE * trace.layers:
            best = found
    return best


def _attention(
    backbone: nn.Module, trace: _Trace, sites: dict[str, Site], image: Size
) -> Iterator[tuple[str, tuple[AttentionSite, Maps]]]:
    """The modules that make maps between the cells of a grid, by tap."""
    modules = dict(backbone.named_modules())
    made: dict[str, list[_Map]] = {}
    for each in trace.maps:
        made.setdefault(each.owner, []).append(each)
    for owner, several in made.items():
        last = several[-1]
        same = [each for each in several if each.shape == last.shape]
        dropped = any(d.owner == owner and d.shape == last.shape for d in trace.dropped)
        chain = [modules[name] for name in (owner, *_around(owner))]
        # Its own output is often that of its windows alone.
        around = next((sites[name] for name in (*_around(owner), owner) if name in sites), None)
        dealt = attention.windows(chain, last.shape[-1])
        place = _place(last.shape, dealt, around, image)
        if place is None:
            continue
        prefix, queries, keys, dealt = place
        if 1 in (math.prod(queries), math.prod(keys)):  # of one cell it says nothing
            continue
        tap = owner + ATTENTION
        depth = last.done / max(trace.layers, 1)
        site = AttentionSite(tap, last.shape[-3], queries, keys, prefix, depth)
        yield tap, (site, Maps(queries, dealt, mixed=len(same) > 1 and dropped))


def _place(
    shape: tuple[int, ...], dealt: Windows | None, around: Site | None, image: Size
) -> tuple[int, Size, Size, Windows | None] | None:
    """Tokens in front, grids of queries and keys, and windows; None where it is not understood."""
    if dealt is not None and around is not None:
        count, tokens = dealt.cells(around.grid).shape
        if (math.prod(shape[:-3]), *shape[-2:]) == (BATCH * count, tokens, tokens):
            return 0, around.grid, around.grid, dealt
    if len(shape) != 4 or shape[0] != BATCH or around is None:
        return None
    keys = token_grid(shape[-1] - around.prefix, image)
    # Else it is not of the cells: some layers let channels attend to each other.
    if keys == (0, keys[1]) and keys[1] and shape[-2] == around.prefix + math.prod(around.grid):
        return around.prefix, around.grid, keys[1], None
    return None

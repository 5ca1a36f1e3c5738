"""Backbones by name: our own, timm's, torchvision's, and a user's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from distill import component
from distill.errors import RecipeError
from distill.models import timm_models, torchvision_models
from distill.models.outside import building

_ZOO = "models.zoo"


def build(
    model: str, arguments: Mapping[str, Any], *, num_classes: int, image_size: int
) -> nn.Module:
    """The backbone that `model` names, with initial weights.

    Args:
        model: `timm/NAME`, `torchvision/NAME`, the name of one of our own, or `module:function`.
        arguments: The model's own keys of the recipe.
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.

    Raises:
        RecipeError: If the name is unknown or an argument is wrong.
        IncompatibleError: If the model cannot take images of that size.
    """
    source, slash, name = model.partition("/")
    if slash and source == "timm":
        return timm_models.build(name, arguments, num_classes=num_classes, image_size=image_size)
    if slash and source == "torchvision":
        return torchvision_models.build(
            name, arguments, num_classes=num_classes, image_size=image_size
        )
    known = sorted(component.find(_ZOO))
    if ":" not in model and model not in known:
        raise RecipeError(
            f"unknown model {model!r}" + component.suggestion(model, known),
            hint="`distill list models` shows them; others are timm/NAME and torchvision/NAME",
        )
    # An error of a user's own code is shown whole.
    with building(model, image_size) if model in known else nullcontext():
        backbone = component.build(_ZOO, model, arguments, num_classes, image_size)
    if not isinstance(backbone, nn.Module):
        raise RecipeError(
            f"{model}: returns {type(backbone).__name__}, not a torch.nn.Module",
            hint="a user's own model is a function (num_classes, image_size, *, ...) -> nn.Module",
        )
    return backbone


def published(model: str) -> bool:
    """Whether `weights: pretrained` names weights of the model.

    Raises:
        RecipeError: If timm or torchvision has no such model.
    """
    source, slash, name = model.partition("/")
    if slash and source == "timm":
        return timm_models.published(name)
    return bool(slash and source == "torchvision") and torchvision_models.published(name)


def complete(model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the defaults of our own models spelled out.

    A file of weights records these, so that a later change of a default does not change what the
    file holds.
    """
    known = component.find(_ZOO)
    if model not in known or component.check(known[model].keys, dict(arguments)):
        return dict(arguments)  # wrong ones are for `build` to refuse
    return known[model].keys.model_validate(dict(arguments)).model_dump()


def head(model: str, arguments: Mapping[str, Any], *, image_size: int) -> dict[str, int]:
    """The parameters whose shape follows the number of classes, and which axis of it does.

    Found by building the model twice, for 2 and for 3 classes, so that it holds for any model.
    """
    two, three = (
        build(model, arguments, num_classes=n, image_size=image_size).state_dict() for n in (2, 3)
    )
    axes = {name: _difference(two[name].shape, three[name].shape) for name in two}
    return {name: axis for name, axis in axes.items() if axis is not None}


def _difference(a: torch.Size, b: torch.Size) -> int | None:
    return next((axis for axis, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), None)

"""Backbones and pretrained weights of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distill.errors import DamagedError, PreflightError
from distill.models.network import Description, Network
from distill.models.outside import building, check_arguments, check_name

# Weights of classifiers that only take part in these models' own training.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def build(
    name: str, arguments: Mapping[str, Any], *, num_classes: int, image_size: int
) -> nn.Module:
    """The model `name` of torchvision with initial weights.

    Raises:
        RecipeError: If torchvision has no such model or refuses an argument.
        IncompatibleError: If the model cannot be built for images of that size.
    """
    import torchvision

    _check(name)
    settings: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        settings["image_size"] = image_size
    if name.startswith("maxvit_"):
        settings["input_size"] = (image_size, image_size)
    if name in _AUXILIARY:
        settings |= {"aux_logits": False, "init_weights": True}
    check_arguments(f"torchvision/{name}", arguments, {*settings, "weights", "progress"})
    with building(f"torchvision/{name}", image_size):
        model: nn.Module = torchvision.models.get_model(name, **settings, **arguments)
    return model


def pretrained(name: str, arguments: Mapping[str, Any], *, image_size: int) -> Network:
    """The model `name` of torchvision with its best published weights, and their own classes.

    Models built for one size of image keep that size, and images are resized to it.

    Raises:
        RecipeError: If torchvision has no such model.
        PreflightError: If the weights are not on this machine and cannot be fetched.
    """
    import torchvision

    _check(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise PreflightError(
            f"torchvision/{name}: the weights are not on this machine and cannot be fetched: "
            f"{error}",
            hint="fetch them once with a network, or give a .safetensors file",
        ) from error
    except Exception as error:  # a pickle can be broken in as many ways
        raise DamagedError(
            f"torchvision/{name}: the fetched weights are damaged: {error}",
            hint=f"remove them from {torch.hub.get_dir()} and run again",
        ) from error
    size = image_size
    if name.startswith(("vit_", "maxvit_")):
        size = weights.meta["min_size"][0]
    if name in _AUXILIARY:
        state = {k: v for k, v in state.items() if not k.startswith(_AUXILIARY[name])}
        arguments = {"transform_input": True, **arguments}  # these two expect other mean and std
    classes = _class_names(weights.meta["categories"])
    backbone = build(name, arguments, num_classes=len(classes), image_size=size)
    backbone.load_state_dict(state)
    transforms = weights.transforms()
    description = Description(
        model=f"torchvision/{name}",
        arguments=dict(arguments),
        num_classes=len(classes),
        classes=classes,
        image_size=size,
        input_size=None if size == image_size else size,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    return Network(backbone, description)


def published(name: str) -> bool:
    """Whether torchvision has weights for its model `name`.

    Raises:
        RecipeError: If torchvision has no such model.
    """
    import torchvision

    _check(name)
    return len(torchvision.models.get_model_weights(name)) > 0


def _check(name: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    check_name("torchvision", name, known)


def _class_names(categories: list[str]) -> tuple[str, ...]:
    """ImageNet's synsets, which unlike the categories' titles are unique."""
    from timm.data.imagenet_info import ImageNetInfo

    synsets = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return tuple(synsets if len(categories) == len(synsets) else categories)

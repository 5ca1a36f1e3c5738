"""Backbones and pretrained weights of timm, and of the Hugging Face hub in timm's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from torch import nn

from distill.errors import DamagedError, IncompatibleError, PreflightError, RecipeError
from distill.models.network import Channels, Description, Network, probe
from distill.models.outside import building, check_arguments, check_name

# Arguments that the data or another key of the recipe decide.
_DECIDED = (
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "img_size",
    "in_chans",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


def build(
    name: str, arguments: Mapping[str, Any], *, num_classes: int, image_size: int
) -> nn.Module:
    """The model `name` of timm with initial weights.

    Raises:
        RecipeError: If timm has no such model or refuses an argument.
        IncompatibleError: If the model cannot be built for images of that size.
    """
    _check(name, arguments)
    return _create(name, arguments, num_classes=num_classes, image_size=image_size)


def pretrained(name: str, arguments: Mapping[str, Any], *, image_size: int) -> Network:
    """The model `name` of timm with the weights published for it, and their own classes.

    Raises:
        RecipeError: If timm has no such model or no weights for it.
        PreflightError: If the weights are not on this machine and cannot be fetched.
    """
    import timm

    config: Any = timm.get_pretrained_cfg(name) if published(name, arguments) else None
    if config is None:
        tagged = timm.list_pretrained(f"{without_tag(name)}.*")
        raise RecipeError(
            f"timm/{name}: timm publishes no such weights",
            hint=f"it has {', '.join(tagged[:5])}" if tagged else "leave weights out",
        )
    return _pretrained(name, arguments, config, image_size, origin=f"timm/{name}")


def published(name: str, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether timm has weights for its model `name`.

    Raises:
        RecipeError: If timm has no such model or refuses an argument.
    """
    import timm

    _check(name, arguments or {})
    return bool(timm.models.is_model_pretrained(name))


def normalisation(name: str, num_classes: int) -> tuple[Channels, Channels] | None:
    """Mean and deviation of images as timm's weights of that many classes for `name` want them."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None or config.num_classes != num_classes:
        return None
    return tuple(config.mean), tuple(config.std)


def from_hub(
    name: str, arguments: Mapping[str, Any], *, repository: str, image_size: int
) -> Network:
    """The model `name` of timm with safetensors weights from the Hugging Face hub.

    Args:
        name: Architecture, which must be the one that the repository names.
        arguments: The model's own keys of the recipe; they come before the repository's.
        repository: OWNER/NAME, or OWNER/NAME@REVISION.
        image_size: Side of the images in pixels.

    Raises:
        RecipeError: If the repository is not in timm's format or has no safetensors file.
        IncompatibleError: If it holds another model.
        PreflightError: If it is not on this machine and cannot be fetched.
    """
    import timm

    _check(name, arguments)
    origin = f"hf-hub:{repository}"
    with _fetching(origin):
        read, architecture, stored = timm.models.load_model_config_from_hf(repository)
        read |= {"hf_hub_filename": "model.safetensors", "custom_load": False}
        config = timm.models.PretrainedCfg(**read)
    if architecture != without_tag(name):
        raise IncompatibleError(
            f"{origin} holds timm/{architecture}, the recipe says timm/{name}",
            hint=f"set model: timm/{architecture}",
        )
    kept = {key: value for key, value in stored.items() if key not in _DECIDED}
    return _pretrained(architecture, {**kept, **arguments}, config, image_size, origin=origin)


def without_tag(model: str) -> str:
    """The architecture: the tag after a dot tells weights apart, and a few defaults."""
    return model.partition(".")[0]


def _pretrained(
    name: str, arguments: Mapping[str, Any], config: Any, image_size: int, *, origin: str
) -> Network:
    """At the size of the data's images if the model can be built so, else at its own."""

    def built_for(size: int) -> Network:
        with _fetching(origin):
            backbone = _create(
                name,
                arguments,
                num_classes=config.num_classes,
                image_size=size,
                pretrained=True,
                pretrained_cfg=config,
            )
        description = Description(
            model=f"timm/{name}",
            arguments=dict(arguments),
            num_classes=config.num_classes,
            classes=_class_names(config),
            image_size=size,
            input_size=None if size == image_size else size,
            mean=tuple(config.mean),
            std=tuple(config.std),
        )
        network = Network(backbone, description)
        probe(network, image_size)
        return network

    try:
        return built_for(image_size)
    except IncompatibleError:
        own_size = config.input_size[-1]
        if own_size == image_size:
            raise
        return built_for(own_size)


def _create(
    name: str,
    arguments: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    **settings: Any,
) -> nn.Module:
    """Call timm; models that are built for one size of image are told which."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    size: dict[str, Any] = {"img_size": image_size} if fixed else {}
    with building(f"timm/{name}", image_size):
        return timm.create_model(name, num_classes=num_classes, **size, **settings, **arguments)


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    import timm

    architecture = without_tag(name)
    check_name("timm", architecture, timm.list_models())
    tagged = timm.list_pretrained(f"{architecture}.*")
    if name not in (architecture, *tagged):
        raise RecipeError(
            f"timm has no weights {name!r}",
            hint=f"it has {', '.join(tagged[:5])}" if tagged else "leave out what follows the dot",
        )
    check_arguments(f"timm/{name}", arguments, _DECIDED)


def _class_names(config: Any) -> tuple[str, ...] | None:
    """The recorded names, or ImageNet's synsets where the number of classes is ImageNet's."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    names = config.label_names
    if isinstance(names, dict):  # by index
        names = [names[index] for index in sorted(names, key=int)]
    if names is None and config.source != "hf-hub":
        subset = infer_imagenet_subset({"num_classes": config.num_classes})
        names = ImageNetInfo(subset).label_names() if subset else None  # type: ignore[no-untyped-call]
    return tuple(names) if names and len(names) == config.num_classes else None


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Turn the ways in which weights fail to arrive into errors of one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"{what}: {error}", hint="name it hf-hub:OWNER/NAME") from error
    except RepositoryNotFoundError as error:
        raise RecipeError(
            f"{what}: the hub has no such repository, or it is private",
            hint="check the name; for a private one, log in with `hf auth login`",
        ) from error
    except (EntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise RecipeError(
                f"{what}: lacks config.json or model.safetensors",
                hint="only repositories in timm's format with safetensors weights are read",
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PreflightError(
            f"{what}: the weights are not on this machine and cannot be fetched: {reason}",
            hint="fetch them once with a network, or give a .safetensors file",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{what}: its config.json is not in timm's format: {error!r}") from error
    except SafetensorError as error:
        raise DamagedError(
            f"{what}: the fetched weights are damaged: {error}",
            hint="remove them from the cache of the Hugging Face hub and run again",
        ) from error

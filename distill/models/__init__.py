"""Students and teachers, built from their sections of the recipe."""

from __future__ import annotations

from torch import nn

from distill import recipe
from distill.errors import IncompatibleError, RecipeError
from distill.models import backbones, timm_models, torchvision_models, weights
from distill.models.network import Channels, Description, Network, probe


def build_student(
    spec: recipe.Model, *, classes: tuple[str, ...], image_size: int, mean: Channels, std: Channels
) -> Network:
    """The network that learns: with initial weights, or those that `spec.weights` names.

    Weights of other classes, or of the same in another order, give all but the classifier;
    `Network.reinitialised` names what was drawn anew.

    Args:
        spec: The recipe's `student`.
        classes: Names of the data's classes, in the order of its labels.
        image_size: Side of the data's images in pixels.
        mean: Of each channel of the training images in [0, 1]; weights may bring their own.
        std: Likewise.

    Raises:
        RecipeError: If the model or an argument is unknown.
        IncompatibleError: If model, weights and data do not fit each other.
        PreflightError: If the weights are not there and cannot be fetched.
        DamagedError: If their file is damaged.
    """
    fresh = _describe(spec.model, spec, classes, image_size, mean, std)
    if spec.weights is None:
        network = Network(_backbone(fresh), fresh)
        probe(network, image_size)
        return network
    trained = _trained(spec.weights, fresh)
    own = trained.description
    description = own.model_copy(
        update={
            "arguments": {**own.arguments, **spec.arguments},
            "num_classes": len(classes),
            "classes": classes,
            "image_size": image_size if own.input_size is None else own.image_size,
        }
    )
    same = own.classes == classes or (own.classes is None and own.num_classes == len(classes))
    head: tuple[str, ...] = ()
    if not same:
        size = description.image_size
        head = tuple(backbones.head(own.model, description.arguments, image_size=size))
    backbone = _backbone(description)
    weights.fill(backbone, trained.backbone.state_dict(), origin=spec.weights, but=head)
    network = Network(backbone, description, reinitialised=head)
    probe(network, image_size)
    return network


def build_teacher(
    spec: recipe.Teacher,
    *,
    classes: tuple[str, ...],
    image_size: int,
    mean: Channels,
    std: Channels,
) -> Network:
    """A trained network that answers for the data's classes in their order, frozen.

    Its classes are matched by name: they may stand in another order, or be more than the data's.
    Where no names were recorded, an equal number is taken for the same classes. Images are
    resized to those that it was trained on.

    Args:
        spec: One of the recipe's `teachers`, which has weights.
        classes: Names of the data's classes, in the order of its labels.
        image_size: Side of the data's images in pixels.
        mean: Of each channel of the training images in [0, 1]; used where weights bring none.
        std: Likewise.

    Raises:
        RecipeError: If the model or an argument is unknown.
        IncompatibleError: If model, weights and data do not fit each other.
        PreflightError: If the weights are not there and cannot be fetched.
        DamagedError: If their file is damaged.
    """
    assert spec.weights is not None
    expected = None
    if spec.model is not None:
        size = spec.input_size or image_size
        expected = _describe(spec.model, spec, classes, size, mean, std)
    trained = _trained(spec.weights, expected)
    own = trained.description
    for key, value in spec.arguments.items():
        if own.arguments.get(key) != value:
            raise IncompatibleError(
                f"{spec.weights}: trained with {key}: {own.arguments.get(key)}, "
                f"the recipe says {value}",
                hint="leave the model's arguments out: the weights' file knows them",
            )
    selection = _selection(own, classes, origin=spec.weights)
    resized = own.input_size is not None or own.image_size == image_size
    description = own.model_copy(
        update={
            "classes": own.classes or classes,
            "input_size": spec.input_size or (own.input_size if resized else own.image_size),
        }
    )
    network = Network(trained.backbone, description, selection=selection)
    probe(network, image_size)
    return network.eval().requires_grad_(False)


def _describe(
    model: str,
    spec: recipe.Model | recipe.Teacher,
    classes: tuple[str, ...],
    image_size: int,
    mean: Channels,
    std: Channels,
) -> Description:
    """What the recipe and the data say of a network."""
    return Description(
        model=model,
        arguments=backbones.complete(model, spec.arguments),
        num_classes=len(classes),
        classes=classes,
        image_size=image_size,
        input_size=None,
        mean=mean,
        std=std,
    )


def _backbone(description: Description) -> nn.Module:
    return backbones.build(
        description.model,
        description.arguments,
        num_classes=description.num_classes,
        image_size=description.image_size,
    )


def _trained(source: str, expected: Description | None) -> Network:
    """The network with the weights of `source`, for the classes that those know."""
    hub = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None
    if source != "pretrained" and hub is None:
        return weights.load(source, expected=expected)
    assert expected is not None  # the recipe is refused otherwise
    library, _, name = expected.model.partition("/")
    arguments, size = expected.arguments, expected.image_size
    if library == "timm" and hub is not None:
        return timm_models.from_hub(name, arguments, repository=hub, image_size=size)
    if library == "timm":
        return timm_models.pretrained(name, arguments, image_size=size)
    if library == "torchvision" and hub is None:
        return torchvision_models.pretrained(name, arguments, image_size=size)
    raise RecipeError(
        f"{expected.model}: has no weights {source}",
        hint="pretrained goes with timm/NAME and torchvision/NAME, hf-hub:NAME with timm/NAME",
    )


def _selection(
    description: Description, classes: tuple[str, ...], *, origin: str
) -> tuple[int, ...] | None:
    """Which logits are the data's classes; None if they are all of them in the same order."""
    own, count = description.classes, description.num_classes
    if own == classes or (own is None and count == len(classes)):
        return None
    place = {name: i for i, name in enumerate(own or ())}
    if own and len(place) < len(own) and (twice := [n for n in classes if own.count(n) > 1]):
        raise IncompatibleError(
            f"{origin}: has {weights.listed(twice)} more than once: which is the data's?",
            hint="use weights whose classes have names of their own",
        )
    unknown = [name for name in classes if name not in place]
    if not unknown:
        return tuple(place[name] for name in classes)
    if own is None:
        what = f"knows {count} classes, and not by name; the data has {len(classes)}"
    else:
        what = f"does not know the data's {weights.listed(unknown)}"
        spare = [name for name in own if name not in classes]
        what += f"; it knows {weights.listed(spare)} instead" if spare else ""
    raise IncompatibleError(
        f"{origin}: {what if count else 'has no classifier'}",
        hint="train this teacher on the data first: teachers take `recipe:` too",
    )

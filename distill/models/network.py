"""A network as the rest of the package sees it: images in [0, 1] in, `Outputs` out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal, final

import torch
import torch.nn.functional as F
from annotated_types import Ge
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.component import Count
from distill.errors import IncompatibleError
from distill.models import taps
from distill.models.anatomy import Examined, examine
from distill.models.grids import Size
from distill.types import Anatomy, Outputs

Channels = tuple[float, float, float]  # one value each for red, green and blue


class Description(BaseModel):
    """What rebuilds a network, apart from its weights. A file of weights records it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    model: str  # as a recipe names it
    arguments: dict[str, Any]
    num_classes: Annotated[int, Ge(0)]  # of the backbone; 0: it has no classifier
    classes: tuple[str, ...] | None  # in the order of the backbone's logits; None: not recorded
    image_size: Count  # pixels; what the backbone was built for
    input_size: Count | None  # pixels; what images are resized to, None: they come as they are
    mean: Channels
    std: Channels

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Description:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names for {self.num_classes} classes")
        return self


@final
class Network(nn.Module):
    """A backbone with its own resizing, normalisation and order of classes.

    Teacher and student may differ in all three, and a saved network is complete.

    Attributes:
        backbone: Takes normalised images, returns logits.
        description: What rebuilds the network.
        classes: Names in the order of the logits, or None where no file recorded them.
        reinitialised: Parameters that were not loaded but drawn anew, because the weights the
            network started from know other classes.
    """

    mean: Tensor
    std: Tensor
    selection: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        description: Description,
        *,
        selection: Sequence[int] | None = None,
        reinitialised: Sequence[str] = (),
    ) -> None:
        """Wrap `backbone`.

        Args:
            backbone: Takes normalised images (B, 3, H, W), returns logits.
            description: What rebuilds the network.
            selection: Which of the backbone's logits to give, in this order; all if left out.
            reinitialised: Parameters that were drawn anew rather than loaded.
        """
        super().__init__()
        self.backbone = backbone
        self.description = description
        self.input_size = description.input_size
        self.reinitialised = tuple(reinitialised)
        self._tapped: tuple[str, ...] = ()
        self._seen = _Seen()  # by the backbone's hooks, in the pass in work
        self._examined: Examined | None = None
        self.classes = description.classes
        if selection is not None and self.classes is not None:
            self.classes = tuple(self.classes[i] for i in selection)
        buffers = {
            "mean": torch.tensor(description.mean).view(3, 1, 1),
            "std": torch.tensor(description.std).view(3, 1, 1),
            "selection": None if selection is None else torch.tensor(list(selection)),
        }
        for name, value in buffers.items():  # the description has them: no part of the weights
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Outputs:
        """Logits of images in [0, 1]: backbone((resize(images) − mean) / std)."""
        return self.answered(self.normalised(self.resized(images)))

    def resized(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 S S"]:
        """The images at the size that the backbone takes; as they come where it takes any."""
        size = None if self.input_size is None else (self.input_size, self.input_size)
        if size is None or images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    def normalised(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [0, 1] as the backbone reads them."""
        return (images - self.mean) / self.std

    def answered(self, normalised: Float[Tensor, "B 3 S S"]) -> Outputs:
        """What the backbone says, logits in the order of the classes."""
        self._seen["image"] = normalised.shape[-2:]
        logits: Any = self.backbone(normalised)
        if taps.TOKEN in self._tapped and isinstance(logits, tuple):  # the class token's is first
            logits = logits[0]
        if self.selection is not None:
            logits = logits.index_select(1, self.selection)
        if not self._tapped:
            return Outputs(logits)
        return Outputs(logits, {name: self._seen.pop(name) for name in self._tapped})

    def tap(self, names: Sequence[str]) -> None:
        """Give these features with every answer from now on.

        Args:
            names: Taps, as `distill.models.taps` describes them. Those that are given already stay.

        Raises:
            IncompatibleError: If there is no such tap; the known ones are named.
        """
        for name in names:
            if name not in self._tapped:
                classes = self.description.num_classes
                taps.attach(self.backbone, name, self._seen, classes, self._examine())
                self._tapped = (*self._tapped, name)

    def anatomy(self, image: Size | None = None) -> Anatomy:
        """What there is to tap.

        Args:
            image: Rows and columns of the images in pixels; left out: as the network was built for.
        """
        found = self._examine(image)
        try:
            layer = taps.classifier(self.backbone, self.description.num_classes)
            width = int(layer.weight.shape[1])
        except IncompatibleError:
            width = 0
        return Anatomy(
            model=self.model,
            width=width,
            token=taps.has_token(self.backbone),
            sites=found.sites,
            stages=found.stages,
            blocks=found.blocks,
            attention=found.attention,
        )

    def _examine(self, image: Size | None = None) -> Examined:
        if self._examined is None or (image and image != self._examined.image):
            side = self.input_size or self.description.image_size
            alike = on_meta(self).float()  # weights may be kept in the precision of an autocast
            self._examined = examine(alike.backbone, image or (side, side))
        return self._examined

    @property
    def model(self) -> str:
        """The backbone's name, as a recipe writes it."""
        return self.description.model

    @property
    def is_convolutional(self) -> bool:
        """Whether channels-last memory pays: more than one convolution wider than 1 x 1.

        A single one is the patch embedding of a transformer.
        """
        kernels = [m.kernel_size for m in self.modules() if isinstance(m, nn.Conv2d)]
        return sum(max(kernel) > 1 for kernel in kernels) > 1


class _Seen(dict[str, Any]):
    """A dict that `torch.export` does not take apart: hooks and network go on to share it."""


def probe(network: Network, image_size: int) -> None:
    """Push one image's shape through the network, on meta tensors: nothing is computed.

    Raises:
        IncompatibleError: If the network does not take images of that size, or does not return
            logits (B, K).
    """
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        with torch.no_grad():
            logits = on_meta(network).eval()(images).logits
    except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise IncompatibleError(
            f"{network.model}: does not take images of {image_size} px: {reason:.300}",
            hint="set data.image_size to a size it takes, or choose another model",
        ) from error
    expected = network.description.num_classes
    if network.selection is not None:
        expected = len(network.selection)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if expected and got != (1, expected):  # 0: pretrained without a classifier
        raise IncompatibleError(
            f"{network.model}: returns {got} for one image, expected logits (1, {expected})",
            hint="a backbone returns one tensor with a logit for each class",
        )


def normalises_batches(module: nn.Module) -> bool:
    """Whether statistics of a batch decide what it computes in training."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def on_meta(network: Network) -> Network:
    """A copy without values. The original is not run: some models cache what they compute."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in network.buffers()}
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)

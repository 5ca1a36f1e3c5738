"""How far the weights by which a layer mixes the cells of its grid follow the image.

Park, Kim: How Do Vision Transformers Work?, 2022, arXiv:2202.06709, call it data specificity: a
convolution has the same weights for every image, attention and dynamic convolutions have not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.diagnostics import UndefinedError
from distill.diagnostics.attention import at_once, between
from distill.diagnostics.tapped import examined
from distill.models.attention import Watch
from distill.models.network import Network
from distill.types import Anatomy

_FEW = 2  # images that tell which layers there are, and which have kernels by image


class Layer(NamedTuple):
    """A layer that mixes cells, and its weights w_n for each of N images."""

    name: str
    kind: Literal["attention", "kernels", "fixed"]  # maps; kernels by image; the same for all
    depth: float  # part of the network's layers that are done, in (0, 1]
    varied: Float[Tensor, " N"]  # N / (N − 1) · Σ (w_n − mean w)², in float64
    square: Float[Tensor, " N"]  # Σ w_n²

    @property
    def value(self) -> float:
        """The variance of w over images, over its mean square.

        0 where w is the same for all images; 1 where the mean is 0 or, of weights that are not
        negative, where no two images have any in common.
        """
        below = float(self.square.mean())
        return float(self.varied.mean()) / below if below else 0.0


def specificity(
    network: Network, images: Float[Tensor, "N 3 H W"], *, batch_size: int = 64
) -> tuple[Layer, ...]:
    """What part of its weights each layer that mixes cells has of the image.

    The weights of attention are its maps, as in `attention.locality`: tokens in front left out,
    rows divided by what is left. Images are compared at the same head, query and key. Those of a
    convolution are its kernels. One that does not reach beyond its stride, as in a patch embedding,
    mixes no cells and is left out; so is what scales cells or channels without mixing cells.

    It costs two forward passes an image; some 100 images are plenty.

    Args:
        network: Any.
        images: In [0, 1], on its device.
        batch_size: Images at once; another size changes nothing but the rounding. Fewer are taken
            where maps are large.

    Returns:
        In the order they are computed, on the CPU.

    Raises:
        UndefinedError: If no layer mixes cells in either way, or attention does that is not
            understood; or of a single image.
    """
    if len(images) < _FEW:
        raise UndefinedError("of one image nothing can vary")
    copied, anatomy = examined(network, images)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        watch, layers = _layers(copied, anatomy, images)
        copied.tap([site.name for site in anatomy.attention])
        own = [layer.name for layer in layers if layer.kind == "kernels"]
        batches = torch.split(images, at_once(anatomy.attention, batch_size))
        if all(layer.kind == "fixed" for layer in layers):
            batches = ()
        means: dict[str, Tensor] = {}
        for batch in batches:
            for name, weights in _weights(copied, anatomy, watch, own, batch):
                part = weights.sum(dim=0) / len(images)
                means[name] = means[name] + part if name in means else part
        found: dict[str, list[Tensor]] = {name: [] for name in means}
        for batch in batches:
            for name, weights in _weights(copied, anatomy, watch, own, batch):
                pair = torch.stack([weights - means[name], weights])
                found[name].append(pair.square().flatten(2).sum(dim=2).cpu())
    unbiased = len(images) / (len(images) - 1)
    for i, layer in enumerate(layers):
        if layer.name in found:
            varied, square = torch.cat(found[layer.name], dim=1)
            layers[i] = layer._replace(varied=varied * unbiased, square=square)
    return tuple(layers)


def _layers(
    network: Network, anatomy: Anatomy, images: Float[Tensor, "N 3 H W"]
) -> tuple[_Kernels, list[Layer]]:
    """The layers that mix cells, of which those that are fixed are known from now on.

    Raises:
        UndefinedError: If there is none, or attention that is not understood.
    """
    watch, maps = _Kernels(network.backbone), list[int]()
    with Watch(lambda rows: maps.append(rows.ndim), lambda _: None), watch:
        network(images[:_FEW])
    if maps and not anatomy.attention:
        raise UndefinedError("its attention is not between the cells of a grid")
    nothing = torch.zeros(len(images), dtype=torch.float64)
    layers = [Layer(s.name, "attention", s.depth, nothing, nothing) for s in anatomy.attention]
    for name, (kernels, by_image) in watch.seen.items():
        if name in anatomy.sites:
            square = kernels.double().square().sum().cpu().expand(len(images))
            kind: Literal["kernels", "fixed"] = "kernels" if by_image else "fixed"
            layers.append(Layer(name, kind, anatomy.sites[name].depth, nothing, square))
    if not layers:
        raise UndefinedError("it has neither attention nor convolutions between cells of a grid")
    return watch, sorted(layers, key=lambda layer: layer.depth)


def _weights(
    network: Network,
    anatomy: Anatomy,
    watch: _Kernels,
    own: Sequence[str],
    images: Float[Tensor, "B 3 H W"],
) -> Iterator[tuple[str, Float[Tensor, "B ..."]]]:
    """The weights of each image, layer by layer, in float64; those that are fixed are left out."""
    with watch:
        maps = network(images).features or {}
    for site in anatomy.attention:
        # A cell that looks at nothing but tokens in front looks at no cell.
        grids = math.prod(site.queries), math.prod(site.keys)
        yield site.name, between(maps.pop(site.name), *grids).nan_to_num()
    for name in own:
        yield name, torch.unflatten(watch.seen[name][0].double(), 0, (len(images), -1))


class _Kernels(TorchFunctionMode):
    """Keep the kernels of every convolution that reaches beyond its stride while this is on.

    Kernels by image come as groups of one image's convolution, all images' channels side by side.

    Args:
        backbone: Whose modules are named.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Tensor, bool]] = {}  # by module; whether they are by image
        self._inside: list[str] = []
        for name, module in backbone.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._inside.pop()

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and look at what it was given."""
        if func is F.conv2d:
            self._look(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(
        self, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, *_: Any, **__: Any
    ) -> None:
        steps = (stride, stride) if isinstance(stride, int) else tuple(stride)
        if self._inside and any(k > s for k, s in zip(weight.shape[2:], steps, strict=True)):
            self.seen[self._inside[-1]] = weight, input.shape[0] == 1

"""How far a network's answer moves when its image does: Lie derivatives and shifted copies.

Gruver, Finzi, Goldblum, Wilson: The Lie Derivative for Measuring Learned Equivariance, 2022,
arXiv:2210.02984.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.diagnostics.tapped import shared

Kind = Literal["translate_x", "translate_y", "rotate", "scale", "shear"]
Edge = Literal["reflect", "wrap"]
Method = Literal["jvp", "differences"]

_DEGREE = math.pi / 180
_PERCENT = 0.01
_STEP = 0.02  # pixels: few ReLUs bend within it, and float32 rounds far less than it changes


class LieDerivative(NamedTuple):
    """How fast the class probabilities p change as the image begins to move."""

    error: Float[Tensor, " N"]  # root mean square of dp/dt over the classes
    relative: Float[Tensor, " N"]  # that over the root mean square of p − E p over all images
    official: Float[Tensor, " N"]  # mean of |dp/dt| over the classes, in the published code's t
    method: Method  # how dp/dt was found


def lie_derivative(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    kind: Kind,
    *,
    edge: Edge = "reflect",
    batch_size: int = 64,
) -> LieDerivative:
    """The derivative of the class probabilities along a movement of the image, at rest.

    d/dt p(x_t) at t = 0, where x_t is the image x moved by t: the network's Jacobian times
    v = `tangent`, by forward-mode differentiation and so exact. Where an operation of the network
    has none, (p(x + s v) − p(x − s v)) / 2s with s such that the fastest pixel moves by 0.02
    pixels, which is right to about 1 %.

    The published code counts t in half images, radians or multiples of the size, and moves images
    by linear interpolation, whose derivative is one-sided: `official` has its units, not its
    values.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1], on its device and of its precision.
        kind: The movement. t counts pixels to the right or down, degrees of rotation from the
            x axis to the y axis, per cent of enlargement, or degrees of shear, by which lower rows
            go to the right. All but translations leave the middle of the image where it is.
        edge: What comes in over the border, as `tangent` takes it.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        One value an image. `relative` is infinite where all images get the same probabilities, and
        0 where they do not change.
    """
    # LeViT's layers keep what they computed, which in forward mode is no plain tensor.
    copied = shared(network)

    def answer(images: Tensor) -> Tensor:
        probabilities: Tensor = copied(images).logits.softmax(dim=-1)
        return probabilities

    batches = torch.split(images, batch_size)
    move = partial(tangent, kind=kind, edge=edge)
    method: Method = "jvp"
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        try:
            with _forward_mode():
                pairs = [torch.func.jvp(answer, (x,), (move(x),)) for x in batches]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no forward mode; what else is wrong is so without it as well
            method = "differences"
            step = _STEP / float(_velocity(kind, images).norm(dim=0).max())
            pairs = [_differences(answer, x, move(x), step) for x in batches]
    probabilities, change = (torch.cat(column) for column in zip(*pairs, strict=True))
    spread = (probabilities - probabilities.mean(dim=0)).square().mean().sqrt()
    error = change.square().mean(dim=1).sqrt()
    relative = torch.where(error > 0, error / spread, 0)
    official = change.abs().mean(dim=1) * _published(kind, images)
    return LieDerivative(error, relative, official, method)


def tangent(
    images: Float[Tensor, "B C H W"], kind: Kind, *, edge: Edge = "reflect"
) -> Float[Tensor, "B C H W"]:
    """How each pixel begins to change as the image moves: −(V · ∇) x.

    V is the velocity at the pixel, and ∇ x the exact slope of the trigonometric polynomial through
    the pixels of a row or column, continued until it repeats. The Nyquist frequency, whose slope
    is not real, is left out.

    Args:
        images: Of any channels.
        kind: The movement, as `lie_derivative` takes it.
        edge: Beyond its outermost pixels an image goes on as its mirror image, or comes in again
            from the other side.

    Returns:
        By pixel, degree or per cent.
    """
    right, down = _velocity(kind, images)
    change: Tensor = right * _slope(images, edge) + down * _slope(images.mT, edge).mT
    return -change.contiguous()


def consistency(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    *,
    shifts: Iterable[int] = range(1, 8),
    edge: Edge = "reflect",
    batch_size: int = 64,
) -> Bool[Tensor, "N 2 S"]:
    """Whether a shifted image keeps the class that is predicted for it.

    argmax f(shift_d x) = argmax f(x). The published code rolls images around: edge `wrap`.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1], on its device and of its precision.
        shifts: The S shifts d in whole pixels; negative ones go to the left or up.
        edge: What comes in over the border, as `tangent` takes it.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        By image, axis (to the right, down) and shift.
    """

    def predicted(images: Tensor) -> Tensor:
        classes: Tensor = network(images.contiguous()).logits.argmax(dim=-1)
        return classes

    distances, kept = list(shifts), []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for batch in torch.split(images, batch_size):
            right = [predicted(_shifted(batch, d, edge)) for d in distances]
            down = [predicted(_shifted(batch.mT, d, edge).mT) for d in distances]
            moved = torch.stack([*right, *down]).reshape(2, -1, len(batch))
            kept.append(moved == predicted(batch))
    return torch.cat(kept, dim=2).permute(2, 0, 1)


def _velocity(kind: Kind, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "2 H W"]:
    """Pixels to the right and down by which each pixel moves in a unit of `kind`."""
    height, width = images.shape[-2:]
    down, right = torch.meshgrid(
        *(
            torch.arange(n, dtype=images.dtype, device=images.device) - (n - 1) / 2
            for n in (height, width)
        ),
        indexing="ij",
    )
    still, one = torch.zeros_like(right), torch.ones_like(right)
    fields = {
        "translate_x": (one, still),
        "translate_y": (still, one),
        "rotate": (-_DEGREE * down, _DEGREE * right),
        "scale": (_PERCENT * right, _PERCENT * down),
        "shear": (_DEGREE * down, still),
    }
    return torch.stack(fields[kind])


def _published(kind: Kind, images: Float[Tensor, "B C H W"]) -> float:
    """How many of our units one of the published code's is."""
    height, width = images.shape[-2:]
    half_images = {"translate_x": (width - 1) / 2, "translate_y": (height - 1) / 2}
    return {**half_images, "rotate": 1 / _DEGREE, "scale": 1 / _PERCENT, "shear": 1 / _DEGREE}[kind]


def _differences(
    answer: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """The value at x, and the derivative along v by central differences."""
    return answer(x), (answer(x + step * v) - answer(x - step * v)) / (2 * step)


def _slope(images: Float[Tensor, "B C H W"], edge: Edge) -> Float[Tensor, "B C H W"]:
    """The derivative along the rows, by pixel."""
    canvas = _continued(images, edge)
    size = canvas.shape[-1]
    frequency = torch.fft.rfftfreq(size, dtype=images.dtype, device=images.device)
    if size % 2 == 0:
        frequency[-1] = 0
    spectrum = 2j * math.pi * frequency * torch.fft.rfft(canvas)
    slope: Tensor = torch.fft.irfft(spectrum, n=size)
    return slope[..., : images.shape[-1]]


def _shifted(images: Float[Tensor, "B C H W"], pixels: int, edge: Edge) -> Float[Tensor, "B C H W"]:
    """The images moved along their rows."""
    return _continued(images, edge).roll(pixels, dims=-1)[..., : images.shape[-1]]


def _continued(images: Float[Tensor, "B C H W"], edge: Edge) -> Float[Tensor, "B C H L"]:
    """One period of the rows: a mirror image that repeats neither of the outermost pixels."""
    return images if edge == "wrap" else torch.cat([images, images[..., 1:-1].flip(-1)], dim=-1)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention by plain operations: the fused ones have no forward-mode derivative."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            # With the first derivative PyTorch compiles some of its own, in a way it deprecates.
            warnings.filterwarnings("ignore", r".*torch\.jit\.script")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)

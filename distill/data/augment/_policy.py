"""What RandAugment and TrivialAugment choose from: operations of a common strength."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from distill.data.augment import _ops

BINS = 31  # strengths go from 0 to BINS − 1

# The choice, and the operation that carries it out.
_CHOICES = {
    "identity": _ops.identity,
    "shear_x": _ops.affine,
    "shear_y": _ops.affine,
    "translate_x": _ops.affine,
    "translate_y": _ops.affine,
    "rotate": _ops.affine,
    "brightness": _ops.brightness,
    "color": _ops.saturation,
    "contrast": _ops.contrast,
    "sharpness": _ops.sharpness,
    "posterize": _ops.posterize,
    "solarize": _ops.solarize,
    "autocontrast": _ops.autocontrast,
    "equalize": _ops.equalize,
}
NAMES = tuple(_CHOICES)
_NUMBERS = np.array([_ops.OPERATIONS.index(operation) for operation in _CHOICES.values()])


class Limits(NamedTuple):
    """The arguments of the operations at the greatest strength."""

    shear: float  # tangent of the angle
    translate_x: float  # pixels
    translate_y: float  # pixels
    rotate: float  # degrees
    enhance: float  # distance of a factor from 1
    posterize: float  # bits that are dropped


def plan(
    choices: Int[ndarray, " n"],
    strengths: Int[ndarray, " n"] | int,
    signs: Int[ndarray, " n"],
    *,
    limits: Limits,
    height: int,
    width: int,
) -> dict[str, ndarray]:
    """One round of operations with their arguments, as `_ops.apply` takes them.

    Args:
        choices: Positions in `NAMES`.
        strengths: In 0 … BINS − 1.
        signs: 1 or −1, for the operations that go two ways.
        limits: Arguments at the greatest strength.
        height: Rows of the images.
        width: Columns of the images.
    """
    part = np.broadcast_to(np.asarray(strengths) / (BINS - 1), choices.shape)
    signed = signs * part
    angle = np.radians(signed * limits.rotate)
    one, zero = np.ones(len(choices)), np.zeros(len(choices))
    shear = signed * limits.shear
    factor = 1 + signed * limits.enhance
    mask = 256 - 2.0 ** np.rint(part * limits.posterize)
    arguments = {
        # Sheared from the first row or column on, which stays where it is.
        "shear_x": (one, shear, shear * height / 2, zero, one, zero),
        "shear_y": (one, zero, zero, shear, one, shear * width / 2),
        "translate_x": (one, zero, -np.trunc(signed * limits.translate_x), zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, -np.trunc(signed * limits.translate_y)),
        "rotate": (np.cos(angle), -np.sin(angle), zero, np.sin(angle), np.cos(angle), zero),
        "posterize": (mask,),
        "solarize": (255 * (1 - part),),
    } | dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (factor,))
    values = np.zeros((len(choices), 6))
    for name, columns in arguments.items():
        rows = choices == NAMES.index(name)
        for number, column in enumerate(columns):
            values[rows, number] = column[rows]
    return {"operation": _NUMBERS[choices, None], "arguments": values[:, None]}


def choose(uniforms: Float[ndarray, " n"], num: int) -> Int[ndarray, " n"]:
    """Whole numbers below `num`, equally likely."""
    chosen: ndarray = np.floor(uniforms * num).astype(np.int64)
    return chosen

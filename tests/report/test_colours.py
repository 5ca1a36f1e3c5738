"""Colours stand out on light and dark pages, for colour-blind people, and on paper in black."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import ImageColor

from distill.report import colours
from distill.report.colours import COLOURS, STEPS

SCALES = ("amount", "difference")
# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision
# Deficiency, 2009: what who lacks one of the three cones sees, in linear light.
BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}

both_pages = pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])


def linear(colour: str) -> np.ndarray:
    values = np.array(ImageColor.getrgb(colour)) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """Of two colours (WCAG 2.2)."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lightness(light: np.ndarray) -> float:
    """CIE L*, from the luminance of linear light."""
    y = float(light @ [0.2126, 0.7152, 0.0722])
    return 116 * y ** (1 / 3) - 16 if y > (6 / 29) ** 3 else y * (29 / 3) ** 3


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear light."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.array(to_xyz) @ np.clip(light, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def steps(scale: str, which: int) -> list[str]:
    return [COLOURS[f"{scale}-{i}"][which] for i in range(STEPS)]


@both_pages
def test_text_stands_out_from_its_page(which: int) -> None:
    for colour in ("ink", "muted", "series-1"):  # series-1 is the page's links
        for ground in ("paper", "shade"):
            assert contrast(COLOURS[colour][which], COLOURS[ground][which]) >= 4.5  # WCAG 2.2, AA


@both_pages
@pytest.mark.parametrize("scale", SCALES)
def test_text_stands_out_from_every_step_of_a_scale(scale: str, which: int) -> None:
    for i, ground in enumerate(steps(scale, which)):
        letters = COLOURS[colours.over(f"{scale}-{i}")][which]
        assert contrast(letters, ground) >= 4.5, (i, ground, letters)


@both_pages
@pytest.mark.parametrize("scale", SCALES)
def test_steps_are_even(scale: str, which: int) -> None:
    distances = [
        math.dist(colours._oklab(a), colours._oklab(b)) for a, b in pairwise(steps(scale, which))
    ]
    assert max(distances) < 1.3 * min(distances)
    middle = [colours._oklab(c)[0] for c in steps(scale, which)]
    jumps = [abs(a - b) for a, b in pairwise(middle)]
    assert min(jumps) > 0.4 * max(jumps)  # each is lighter or darker than the one before


def test_oklab_has_the_values_that_its_author_gives() -> None:
    for colour, expected in (
        ("#ffffff", (1.0, 0.0, 0.0)),
        ("#000000", (0.0, 0.0, 0.0)),
        ("#ff0000", (0.62796, 0.22486, 0.12585)),
        ("#0000ff", (0.45201, -0.03246, -0.31153)),
    ):
        assert colours._oklab(colour) == pytest.approx(expected, abs=2e-4)
    for name, pair in COLOURS.items():
        for colour in pair:
            assert colours._colour(colours._oklab(colour)) == colour, name


@both_pages
def test_what_is_more_stands_out_more(which: int) -> None:
    paper = lightness(linear(COLOURS["paper"][which]))
    amount, difference = (
        [abs(lightness(linear(c)) - paper) for c in steps(scale, which)] for scale in SCALES
    )
    assert amount == sorted(amount)
    half = STEPS // 2
    assert difference[half:] == sorted(difference[half:])
    assert difference[: half + 1] == sorted(difference[: half + 1], reverse=True)


@both_pages
@pytest.mark.parametrize("kind", BLIND)
def test_colour_blind_people_tell_less_from_more_and_an_amount_from_the_next(
    kind: str, which: int
) -> None:
    seen = np.array(BLIND[kind])
    for i in range(3, STEPS // 2):
        less, more = (
            lab(seen @ linear(COLOURS[f"difference-{STEPS // 2 + k}"][which])) for k in (-i, i)
        )
        assert math.dist(less, more) > 10, i  # 2.3 is just noticeable
    amount = [lightness(seen @ linear(c)) for c in steps("amount", which)]
    assert amount == sorted(amount, reverse=not which)


def test_an_svg_tells_colours_apart_by_what_they_are_on_a_light_page() -> None:
    assert not [a for a, b in combinations(COLOURS.values(), 2) if a[0] == b[0]]


def test_a_value_has_the_nearest_step() -> None:
    assert colours.step("amount", 0.0) == "amount-0"
    assert colours.step("amount", 1.0) == f"amount-{STEPS - 1}"
    assert colours.step("difference", 0.5) == f"difference-{STEPS // 2}"
    assert colours.step("amount", 0.49 / (STEPS - 1)) == "amount-0"
    assert colours.step("amount", -3.0) == "amount-0"
    assert colours.step("amount", 3.0) == f"amount-{STEPS - 1}"

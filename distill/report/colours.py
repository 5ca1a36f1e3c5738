"""The colours of pages and plots: a palette, and scales of even steps, for light and dark pages.

Scales are straight lines in Oklab (Björn Ottosson: A perceptual color space for image processing,
2020), in which equal distances look equally far apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Lab = tuple[float, ...]

STEPS = 33  # of a scale: an odd number, so that one is the middle
# Ends and corners of the scales, on a light and on a dark page: least is what is like the paper.
# Blue and orange are told apart by colour-blind people; on paper in black only the amounts are.
_AMOUNT = (
    ("#f1f5f6", "#86c5c9", "#1f78b4", "#14234f"),
    ("#20272d", "#1c5d85", "#37a3b5", "#e4f6d8"),
)
_LESS = (("#f3f4f5", "#ee9c5f", "#8a3500"), ("#23282d", "#c4601f", "#ffcf9f"))
_MORE = (("#f3f4f5", "#74add6", "#0a4a80"), ("#23282d", "#2c7cb8", "#b4dcf8"))


def scale(corners: Sequence[str], steps: int = STEPS) -> list[str]:
    """Colours at equal distances in Oklab on the line through some corners."""
    points = [_oklab(corner) for corner in corners]
    lengths = [math.dist(a, b) for a, b in pairwise(points)]
    found, total = [], sum(lengths)
    for i in range(steps):
        along, k = total * i / (steps - 1), 0
        while k < len(lengths) - 1 and along > lengths[k]:
            along, k = along - lengths[k], k + 1
        part = along / lengths[k]
        found.append(_colour([a + part * (b - a) for a, b in zip(*points[k : k + 2], strict=True)]))
    return found


def _oklab(colour: str) -> Lab:
    r, g, b = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    long, middle, short = (
        math.cbrt(x * r + y * g + z * b)
        for x, y, z in (
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        )
    )
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _colour(lab: Sequence[float]) -> str:
    lightness, a, b = lab
    long, middle, short = (
        (lightness + x * a + y * b) ** 3
        for x, y in (
            (0.3963377774, 0.2158037573),
            (-0.1055613458, -0.0638541728),
            (-0.0894841775, -1.2914855480),
        )
    )
    rgb = (
        x * long + y * middle + z * short
        for x, y, z in (
            (4.0767416621, -3.3077115913, 0.2309699292),
            (-1.2684380046, 2.6097574011, -0.3413193965),
            (-0.0041960863, -0.7034186147, 1.7076147010),
        )
    )
    return "#" + "".join(f"{round(255 * _coded(min(max(c, 0.0), 1.0))):02x}" for c in rgb)


def _linear(value: float) -> float:
    """Light of a coded value, both from 0 to 1 (IEC 61966-2-1, sRGB)."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _coded(light: float) -> float:
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, from 0 (black) to 1 (white) (WCAG 2.2)."""
    r, g, b = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _scales() -> dict[str, tuple[str, str]]:
    """Both scales by the names of their steps."""
    half = STEPS // 2 + 1
    amount = zip(*map(scale, _AMOUNT), strict=True)
    less, more = (zip(*(scale(ends, half) for ends in arm), strict=True) for arm in (_LESS, _MORE))
    difference = [*reversed(list(less)), *list(more)[1:]]
    return {
        **{f"amount-{i}": pair for i, pair in enumerate(amount)},
        **{f"difference-{i}": pair for i, pair in enumerate(difference)},
    }


# Name of a colour -> on a light and on a dark page. The series are the palette of Okabe and Ito
# (Color Universal Design, 2008), which colour-blind people can tell apart; brighter on dark.
# No two are the same on a light page: there an SVG tells them apart.
COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#59626b", "#a4adb6"),
    "grid": ("#e4e7ea", "#2c3238"),
    "shade": ("#eef2f5", "#1e242a"),
    "series-1": ("#0072b2", "#3f9bd9"),
    "series-2": ("#d55e00", "#e8702a"),
    "series-3": ("#009e73", "#1fb58a"),
    "series-4": ("#cc79a7", "#d98ab8"),
    "series-5": ("#e69f00", "#e6a817"),
    "series-6": ("#56b4e9", "#8fd0f5"),
    # Of letters on a step of a scale: black or white, on a light page and on a dark one.
    "black-black": ("#000000", "#000000"),
    "black-white": ("#010101", "#ffffff"),
    "white-black": ("#fdfdfd", "#000000"),
    "white-white": ("#fefefe", "#ffffff"),
    **_scales(),
}


def over(colour: str) -> str:
    """Name of the colour of letters that stand out from a named one, on both pages."""
    # Black and white stand out equally from (L + 0.05)² = 1.05 · 0.05.
    return "-".join("black" if luminance(c) > 0.179 else "white" for c in COLOURS[colour])


def step(scale_name: str, part: float) -> str:
    """Name of the colour at a part, 0 to 1, of the scale `amount` or `difference`."""
    return f"{scale_name}-{round(min(max(part, 0.0), 1.0) * (STEPS - 1))}"

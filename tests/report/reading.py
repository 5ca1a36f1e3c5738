"""What is on a drawing, read from its SVG and its PNG."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageColor

from distill.report.drawing import COLOURS

HEAD = "{http://www.w3.org/2000/svg}"


def pixels(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


def rgb(colour: str) -> tuple[int, ...]:
    return ImageColor.getrgb(COLOURS[colour][0])


def elements(text: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(text).iter(HEAD + tag))

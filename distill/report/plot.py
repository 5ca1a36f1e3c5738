"""What a plot can be; one layout of each, as SVG for pages and as PNG for papers."""

from __future__ import annotations

from distill.report import bars, confusion, curves, drawing, heatmap, reliability
from distill.report.bars import Bars, BarSeries
from distill.report.confusion import Confusion
from distill.report.curves import Figure, Series
from distill.report.drawing import Sheet
from distill.report.heatmap import Heatmap
from distill.report.reliability import Calibration, Reliability

__all__ = [
    "BarSeries",
    "Bars",
    "Calibration",
    "Confusion",
    "Figure",
    "Heatmap",
    "Plot",
    "Reliability",
    "Series",
    "layout",
    "png",
    "svg",
]

Plot = Figure | Bars | Heatmap | Confusion | Reliability


def svg(plot: Plot) -> str:
    """The plot as SVG: whole as a file and within a page, light or dark as its reader is.

    Raises:
        ValueError: If there is nothing to draw, or a value that has no place.
    """
    return drawing.svg(layout(plot))


def png(plot: Plot) -> bytes:
    """The same plot as PNG on white, 1600 pixels wide and more, fewer where it is very high.

    Raises:
        ValueError: If there is nothing to draw, or a value that has no place.
    """
    return drawing.png(layout(plot))


def layout(plot: Plot) -> Sheet:
    """All shapes of a plot, in the order they are drawn.

    Raises:
        ValueError: If there is nothing to draw, or a value that has no place.
    """
    match plot:
        case Figure():
            return curves.layout(plot)
        case Bars():
            return bars.layout(plot)
        case Heatmap():
            return heatmap.layout(plot)
        case Confusion():
            return confusion.layout(plot)
        case Reliability():
            return reliability.layout(plot)

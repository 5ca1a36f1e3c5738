"""The student as it is shipped: pictures to logits, as a graph that needs no toolkit to run."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distill.diagnostics.tapped import tapped
from distill.errors import IncompatibleError
from distill.models import pyramid
from distill.models.grids import Size
from distill.models.network import Channels, Network

Precision = Literal["fp32", "fp16", "int8"]
# What is put into a file. Pictures: of any size, if it is to have the preprocessing, else squares.
# Squares: in [0, 1] if it is to have the preprocessing, else normalised. Images: always in [0, 1].
Takes = Literal["pictures", "squares", "images"]
INPUT, OUTPUT = "images", "logits"
STAGE = "stage"  # and a number from 0: a map besides the logits
Pixels = UInt8[np.ndarray, "b S S 3"]  # squares of the student's size, ready for evaluation
Logits = Float[np.ndarray, "b K"]
Answer = Tensor | dict[str, Tensor]  # logits, or those and maps by name
# On nodes of a program: modules and functions, source lines, paths, addresses in memory.
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class Preprocessing(NamedTuple):
    """How a picture becomes what the network reads; the evaluation view of `data.images`."""

    size: int  # pixels of the square that is kept
    shorter: int  # pixels to which the picture's shorter side is scaled first
    mean: Channels  # of pixels in [0, 1]
    std: Channels

    def to_json(self) -> dict[str, Any]:
        """The steps in their order, for whoever takes them."""
        return {
            "resize_shorter_side": self.shorter,
            "interpolation": "bilinear, antialiased",
            "center_crop": self.size,
            "divide_by": 255,
            "mean": list(self.mean),
            "std": list(self.std),
        }


class Stage(NamedTuple):
    """A map of features that a graph gives besides the logits, (batch, channels, rows, columns)."""

    name: str  # of the output; stage0 is the finest
    module: str  # of the network, whose output it is
    channels: int
    grid: Size
    stride: float  # pixels of the squares between two cells

    def to_json(self) -> dict[str, Any]:
        """What it is, for whoever builds on it."""
        shape = ["batch", self.channels, *self.grid]
        about = {"name": self.name, "dtype": "float32", "shape": shape}
        return about | {"stride": self.stride, "module": self.module}


def stages(network: Network, size: int) -> tuple[Stage, ...]:
    """The maps that a detector reads: the ends of the network's stages, or its single grid.

    Args:
        network: Any.
        size: Side in pixels of the squares that it is shown.

    Raises:
        IncompatibleError: If it has none.
    """
    image = (size, size)
    try:
        sites = pyramid.stages(tapped(network, ()), image)
    except IncompatibleError as error:
        raise IncompatibleError(f"--features: {error}", hint=error.hint) from None
    return tuple(
        Stage(f"{STAGE}{i}", site.name, site.channels, site.grid, pyramid.stride(site, image))
        for i, site in enumerate(sites)
    )


class Student(NamedTuple):
    """What is exported."""

    network: Network  # in eval mode, on the CPU, in float32
    classes: tuple[str, ...]  # in the order of the logits
    preprocessing: Preprocessing
    inside: bool  # whether the graph does the preprocessing
    calibration: Sequence[Pixels] = ()  # training images, by which int8 sets its ranges
    stages: tuple[Stage, ...] = ()  # whose maps graphs give too

    @property
    def outputs(self) -> list[str]:
        """What graphs give, in this order."""
        return [OUTPUT, *(stage.name for stage in self.stages)]

    def input(self, takes: Takes) -> dict[str, Any]:
        """What a file takes, as people and programs read it."""
        size = self.preprocessing.size
        if takes == "pictures" and self.inside:
            shape, dtype, values = ["batch", "height", "width", 3], "uint8", "bytes, RGB"
        else:
            shape, dtype = ["batch", 3, size, size], "float32"
            values = "RGB in [0, 1]" if self.inside or takes == "images" else "RGB, normalised"
        return {"name": INPUT, "dtype": dtype, "shape": shape, "values": values}

    @property
    def example(self) -> Tensor:
        """A batch of what an exported graph takes."""
        size = self.preprocessing.size
        if self.inside:  # sizes that no other dimension has: equal ones would be taken for one
            return torch.zeros(2, size + 3, size + 8, 3, dtype=torch.uint8)
        return torch.zeros(2, 3, size, size)

    def shown(self, pixels: Pixels, takes: Takes) -> np.ndarray:
        """Squares as a file takes them: where it cuts the centre of pictures, with a rim around."""
        if takes == "images":
            return in_unit(pixels)
        if takes == "squares" or not self.inside:
            return self.squares(pixels)
        rim = self.preprocessing.shorter - self.preprocessing.size
        before = round(rim / 2)
        return np.pad(pixels, ((0, 0), *2 * [(before, rim - before)], (0, 0)))

    def squares(self, pixels: Pixels) -> Float[np.ndarray, "b 3 S S"]:
        """Squares as the network's part of the graph takes them."""
        return in_unit(pixels) if self.inside else self.normalised(pixels)

    def normalised(self, pixels: Pixels) -> Float[np.ndarray, "b 3 S S"]:
        """Squares as the backbone reads them."""
        steps = self.preprocessing
        mean, std = (np.array(c, np.float32).reshape(3, 1, 1) for c in (steps.mean, steps.std))
        normalised: np.ndarray = (in_unit(pixels) - mean) / std
        return normalised


def in_unit(pixels: Pixels) -> Float[np.ndarray, "b 3 S S"]:
    """Squares as images in [0, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) / np.float32(255)


class Resize(nn.Module):
    """Pictures of any size as squares in [0, 1]: shorter side scaled, centre cut.

    Bilinear with antialias, as a product with two matrices of triangles. A graph can hold that for
    any size of picture, and no runtime has to have an operator for it. Rounded to whole levels
    after each direction, as Pillow does: one in a hundred values is a level off, more in pictures
    that are taller than wide, which Pillow (from 13 on) scales in the other order.

    Args:
        preprocessing: Its sizes are read.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size, self.shorter = preprocessing.size, preprocessing.shorter

    def forward(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 S S"]:
        """Images in [0, 1]."""
        height, width = images.shape[1:3]
        shorter = torch.sym_min(height, width)
        x = images.permute(0, 3, 1, 2).float()
        x = torch.floor(x @ self._triangles(width, shorter).T + 0.5)
        x = torch.floor(self._triangles(height, shorter) @ x + 0.5)
        return x / 255

    def _triangles(self, length: int, shorter: int | torch.SymInt) -> Float[Tensor, "S length"]:
        """What each pixel that is kept takes of those along one side; rows add up to 1."""
        scaled = self.shorter * length // shorter
        beyond = scaled - self.size
        start = (beyond + beyond // 2 % 2) // 2  # half of it, rounded as Python does: to even
        scale = torch.ones(()).mul(length / scaled)
        centres = (torch.arange(self.size) + start + 0.5) * scale
        distance = (torch.arange(length) + 0.5 - centres.unsqueeze(1)).abs()
        weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)


@final
class Classify(nn.Module):
    """Squares to logits: images in [0, 1], or normalised ones where the graph has no preprocessing.

    Args:
        student: What answers.
        half: Whether all but input and output is in float16.
    """

    def __init__(self, student: Student, *, half: bool) -> None:
        super().__init__()
        self.taps = {stage.name: stage.module for stage in student.stages}
        network = student.network
        if self.taps:
            network = tapped(network, list(self.taps.values()))
        self.network = copy.deepcopy(network) if half else network
        if half:
            self.network.backbone.half()
        self.normalised, self.half_precision = not student.inside, half

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Answer:
        """Logits in float32, and maps."""
        x = self.network.resized(images)
        if not self.normalised:
            x = self.network.normalised(x)
        told = self.network.answered(x.half() if self.half_precision else x)
        logits = told.logits.float()
        if not self.taps:
            return logits
        return {OUTPUT: logits} | {name: told.read(tap) for name, tap in self.taps.items()}


class Whole(nn.Module):
    """Pictures of any size to logits."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.resize = Resize(student.preprocessing)
        self.classify = Classify(student, half=False)

    def forward(self, images: UInt8[Tensor, "B H W 3"]) -> Answer:
        """Logits, and maps."""
        answer: Answer = self.classify(self.resize(images))
        return answer


def whole(student: Student) -> ExportedProgram:
    """The student as one program, from what the exported file takes to logits and maps."""
    if student.inside:
        module = Whole(student).eval()
        return traced(module, student.example, student.network.model, any_size=True)
    return classifier(student)


def classifier(
    student: Student,
    precision: Precision = "fp32",
    *,
    most: int | None = None,
    notes: bool = False,
) -> ExportedProgram:
    """The student as a program, from squares to logits and maps.

    Args:
        student: What answers.
        precision: In float16 all but input and output is.
        most: Images that it takes at once; None: any number.
        notes: Whether nodes say where they come from, which a quantiser goes by.
    """
    size = student.preprocessing.size
    module = Classify(student, half=precision == "fp16")
    # As many as may be: of an example below 16 some compilers plan memory for fewer than 16 only,
    # for PyTorch computes larger batches in another way.
    example = torch.zeros(most or 2, 3, size, size)
    return traced(module.eval(), example, student.network.model, most=most, notes=notes)


def resize(student: Student) -> ExportedProgram:
    """The preprocessing alone, from pictures of any size to squares in [0, 1]."""
    module = Resize(student.preprocessing).eval()
    return traced(module, student.example, student.network.model, any_size=True)


def traced(
    module: nn.Module,
    example: Tensor,
    model: str,
    *,
    any_size: bool = False,
    most: int | None = None,
    notes: bool = False,
) -> ExportedProgram:
    """The module as a program that takes any number of images, or up to so many.

    Without notes it holds nothing of the machine that it was made on: no source lines, no paths.

    Args:
        module: Takes one tensor, returns one or several by name; in eval mode.
        example: A batch of two or more.
        model: Its name, for an error.
        any_size: Whether the second and third dimension are free as well.
        most: Images at once; None: no bound.
        notes: Whether nodes say where they come from.

    Raises:
        IncompatibleError: If torch.export cannot follow the module; its reason is quoted.
    """
    shapes: dict[int, Any] = dict.fromkeys([0, 1, 2] if any_size else [0], Dim.DYNAMIC)
    if most is not None:
        shapes[0] = Dim("batch", min=1, max=most)
    hint = "the safetensors format needs no graph"
    with attempt(f"{model}: torch.export cannot follow it", hint=hint), torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)
    for part in () if notes else program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                for key in _NOTES:
                    node.meta.pop(key, None)
    program.example_inputs = None
    return program


@contextmanager
def attempt(failed: str, *, hint: str) -> Iterator[None]:
    """Try an exporter, quietly. Its ways to fail are many, and none of them is a bug of ours.

    Args:
        failed: What a failure means.
        hint: What to do then.

    Raises:
        IncompatibleError: If it fails; its reason is quoted.
    """
    try:
        with quiet():
            yield
    except Exception as error:
        raise IncompatibleError(
            f"{failed}: {reason(error.__cause__ or error)}", hint=hint
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print: what matters of it shows when answers are compared."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def reason(error: BaseException) -> str:
    """An exporter's error in a line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"

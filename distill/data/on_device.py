"""JPEG files that are decoded on the training device: worker processes read them, no more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from distill.data import images, jpeg
from distill.data.jpeg import Box
from distill.data.workers import Decoder, Request
from distill.errors import PreflightError

_MOST_PIXELS = 1 << 26  # decoded at once, unless a single image has more: 200 MB
_MOST_SHRINK = 32  # times; CUDA's antialias ends somewhat above


class _File(NamedTuple):
    """A JPEG file and what is made of it."""

    length: int  # bytes
    area: int  # pixels, at most
    parts: list[tuple[int, Box]]  # row of the batch, and what is shown there


class _Begun(NamedTuple):
    """A batch of which the JPEG files are still to be decoded."""

    request: Request
    odd: list[int]  # rows that are decoded already
    pixels: UInt8[Tensor, "odd S S 3"]  # theirs
    coded: UInt8[Tensor, " bytes"]  # the JPEG files, one after the other
    files: list[_File]


class DeviceDecoder:
    """Turns a request for resized crops into pixels, on the device that they are delivered to.

    A file that has anything unusual, or that the device refuses, has the pixels of `exact`.
    """

    def __init__(self, exact: Decoder, device: torch.device) -> None:
        self._exact = exact
        _require_decoder(_place(device))

    def __call__(self, request: Request) -> _Begun:
        """Read the files; decode what is not for the device. Done in a worker process."""
        crop, draws = self._exact.draws(request)
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(request.ids.tolist()):
            rows_of.setdefault(number, []).append(row)
        odd: list[int] = []
        coded: list[bytes] = []
        files: list[_File] = []
        for number, rows in rows_of.items():
            header = jpeg.parse(images.stored(self._exact.files.read(number)))
            area = header.width * header.height if header else 0
            if not header or area > self._exact.max_pixels or not jpeg.is_common(header):
                odd += rows
                continue
            boxes = [crop.box(draws[row], header.width, header.height) for row in rows]
            longest = max(max(b.right - b.left, b.bottom - b.top) for b in boxes)
            if longest > _MOST_SHRINK * self._exact.size:
                odd += rows
                continue
            # A file that is shown several times is sent whole.
            window = jpeg.window(header, boxes[0]) if len(boxes) == 1 else None
            data, left, top = window or (header.data, 0, 0)
            coded.append(data)
            moved = [box.moved(-left, -top) for box in boxes]
            files.append(_File(len(data), area, list(zip(rows, moved, strict=True))))
        joined = np.frombuffer(bytearray().join(coded), np.uint8)
        pixels = self._exact(request.of(odd))
        return _Begun(request, odd, pixels, torch.from_numpy(joined), files)

    def finish(self, made: _Begun, device: torch.device) -> UInt8[Tensor, "b 3 S S"]:
        """The batch, in channels_last memory; the exact decoder is asked for what is refused."""
        place, size = _place(device), self._exact.size
        shape = (len(made.request.ids), size, size, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, device=place)
        pixels[made.odd] = made.pixels.to(place)
        refused: list[int] = []
        coded = torch.split(made.coded, [file.length for file in made.files])
        for turn in _turns(made.files):
            found = _decode(coded[turn], place)
            for file, picture in zip(made.files[turn], found, strict=True):
                high, wide = picture.shape[1:]
                for row, box in file.parts:
                    if box.bottom > high or box.right > wide:
                        refused.append(row)
                    else:
                        pixels[row] = _scaled(picture, box, size)
        if refused:
            pixels[refused] = self._exact(made.request.of(refused)).to(place)
        return pixels.to(device).permute(0, 3, 1, 2)


def slow(decoder: str, device: torch.device) -> list[str]:
    """What to be warned of where `data.decoder` is this one and training runs on the device."""
    if decoder != "gpu" or device.type == "cuda":
        return []
    return [
        "data.decoder: gpu decodes in the training process where there is no CUDA device, one "
        "image after the other: fast is meant for this machine"
    ]


def _place(device: torch.device) -> torch.device:
    """Where JPEG files are decoded for a device."""
    return device if device.type == "cuda" else torch.device("cpu")


def _turns(files: Sequence[_File]) -> Iterator[slice]:
    """Files that are decoded together."""
    first, area = 0, 0
    for number, file in enumerate(files):
        if number > first and area + file.area > _MOST_PIXELS:
            yield slice(first, number)
            first, area = number, 0
        area += file.area
    if first < len(files):
        yield slice(first, len(files))


def _decode(
    files: Sequence[UInt8[Tensor, " n"]], place: torch.device
) -> list[UInt8[Tensor, "3 H W"]]:
    """The whole pictures; one without pixels where the device's decoder refuses a file."""
    try:
        return list(_together(files, place))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of any of them: it does not say of which
        if len(files) == 1:
            return [torch.empty((3, 0, 0), dtype=torch.uint8)]
        return [picture for file in files for picture in _decode([file], place)]


def _together(
    files: Sequence[UInt8[Tensor, " n"]], place: torch.device
) -> Sequence[UInt8[Tensor, "3 H W"]]:
    from torchvision.io import ImageReadMode, decode_jpeg  # a second, which few need

    if place.type == "cuda":
        # nvJPEG writes where the caller's stream has freed memory, and may do so before kernels
        # that are still queued there have read it.
        torch.cuda.current_stream(place).synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The image decoding and encoding capabilities", DeprecationWarning
        )
        found: list[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=place)
    return found


def _scaled(picture: UInt8[Tensor, "3 H W"], box: Box, size: int) -> UInt8[Tensor, "size size 3"]:
    """A box at full size, as `resized_crop.scaled` does it, but for its rounding."""
    part = picture[None, :, box.top : box.bottom, box.left : box.right].float()
    found = functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return found[0].round_().permute(1, 2, 0)  # its place converts it


def _require_decoder(place: torch.device) -> None:
    """Raise PreflightError where the installed torchvision decodes nothing there."""
    image = jpeg.encode(Image.new("RGB", (16, 16)), quality=90)
    try:
        _together([torch.frombuffer(bytearray(image), dtype=torch.uint8)], place)
    except (ImportError, RuntimeError) as error:
        raise PreflightError(
            f"data.decoder: gpu: torchvision decodes no JPEG on {place}: "
            f"{str(error).splitlines()[0]}",
            hint="--set data.decoder=fast",
        ) from None

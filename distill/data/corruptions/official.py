"""The published files of CIFAR-10-C and CIFAR-100-C.

A folder has `NAME.npy` for each corruption, images (5 N, 32, 32, 3) of bytes, all N of severity 1
before those of severity 2, in the order of the test split; and `labels.npy`, their 5 N classes.
"""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from distill.data.corruptions import COMMON, EXTRA, SEVERITIES
from distill.errors import DamagedError, IncompatibleError, PreflightError

_IMAGE = (32, 32, 3)
_HINT = "unpack CIFAR-10-C.tar or CIFAR-100-C.tar and give the folder with labels.npy"


def available(folder: Path) -> tuple[str, ...]:
    """The corruptions that have a file in `folder`, in the order of the paper.

    Raises:
        PreflightError: If there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise PreflightError(f"{folder}: no such folder", hint=_HINT)
    found = tuple(name for name in (*COMMON, *EXTRA) if _path(folder, name).is_file())
    if not found:
        raise PreflightError(f"{folder}: holds no corrupted images such as fog.npy", hint=_HINT)
    return found


def require(folder: Path, labels: Int[np.ndarray, " N"]) -> None:
    """Check that every file there is whole, and of the images that have these labels.

    Args:
        folder: Holds the files.
        labels: Of the test split, in its order.

    Raises:
        PreflightError: If a file is missing or cannot be read.
        DamagedError: If a file is not in its format, or has more or fewer images than labels.
        IncompatibleError: If the labels are others.
    """
    path = folder / "labels.npy"
    theirs = _open(path)
    levels = len(SEVERITIES)
    if theirs.ndim != 1 or theirs.dtype.kind not in "iu" or len(theirs) % levels:
        raise DamagedError(
            f"{path}: {_form(theirs)}, expected whole numbers (5 N,), a label for each image",
            hint=_HINT,
        )
    if len(theirs) != levels * len(labels) or (theirs != np.tile(labels, levels)).any():
        raise IncompatibleError(
            f"{path}: {len(theirs) // levels:,} labels for each severity, and they are not the "
            f"{len(labels):,} of the test split",
            hint="CIFAR-10-C belongs to cifar10 and CIFAR-100-C to cifar100, whole and in order",
        )
    for name in available(folder):
        images = _images(folder, name)
        if len(images) != len(theirs):
            raise DamagedError(
                f"{_path(folder, name)}: {len(images):,} images, labels.npy has {len(theirs):,}",
                hint=_HINT,
            )


def read(folder: Path, name: str, severity: int) -> UInt8[np.ndarray, "N 32 32 3"]:
    """The images of a corruption and a severity, mapped: what is not looked at is not read.

    Args:
        folder: Holds the files.
        name: Of the corruption.
        severity: 1 to 5.

    Raises:
        PreflightError: If the file is missing or cannot be read.
        DamagedError: If it is not in its format.
        ValueError: If there is no such severity.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"{name}: severity is {severity}, and there are 1 to 5")
    images = _images(folder, name)
    count = len(images) // len(SEVERITIES)
    return images[(severity - 1) * count : severity * count]


def _images(folder: Path, name: str) -> UInt8[np.ndarray, "M 32 32 3"]:
    path = _path(folder, name)
    images = _open(path)
    if images.shape[1:] != _IMAGE or images.dtype != np.uint8 or len(images) % len(SEVERITIES):
        raise DamagedError(
            f"{path}: {_form(images)}, expected uint8 (5 N, 32, 32, 3), images of five severities",
            hint=_HINT,
        )
    return images


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _open(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # which never unpickles
    except FileNotFoundError:
        raise PreflightError(f"{path}: not there", hint=_HINT) from None
    except OSError as error:
        raise PreflightError(f"{path}: {error.strerror or error}") from None
    except (ValueError, OverflowError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: no whole array of NumPy: {reason:.200}", hint=_HINT) from None


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"

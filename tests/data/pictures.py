"""Images and folders of images, made on the spot."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image that no lossy format changes much."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def folder(root: Path, *names: str) -> Path:
    """Write `names` as PNGs of 20 x 16 pixels below `root`, each with its own pixels."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(20, 16, seed), "PNG"))
    return root


def fingerprint(root: Path) -> str:
    """SHA-256 over the names, times and bytes of all that lies below `root`."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path}{path.lstat().st_mtime_ns}".encode(errors="surrogateescape"))
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()

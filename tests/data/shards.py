"""Tar shards of images, made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pictures import encoded, photo


def tar(path: Path, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of these members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def samples(first: int, *labels: int, suffix: str = "png") -> dict[str, bytes]:
    """Members of samples numbered from `first`, with pictures of 20 x 16 pixels of that seed."""
    found = {}
    for number, label in enumerate(labels, first):
        found[f"s{number:04d}.{suffix}"] = encoded(photo(20, 16, number), "PNG")
        found[f"s{number:04d}.cls"] = str(label).encode()
    return found


def shards(root: Path) -> Path:
    """Two training shards and a test shard of two classes, with pictures number 0 to 9."""
    tar(root / "train-0.tar", samples(0, 0, 1, 1))
    tar(root / "train-1.tar", samples(3, 0, 1, 0))
    tar(root / "test-0.tar", samples(6, 0, 1, 1, 0))
    return root

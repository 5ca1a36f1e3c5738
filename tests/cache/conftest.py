"""Places for caches."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.cache.store import Bucket, Folder, Store


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder that is not there yet."""
    return Folder(tmp_path / "cache")


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, folder: Folder) -> Iterator[Store]:
    """An empty place of each kind."""
    if request.param == "folder":
        yield folder
        return
    found = Bucket(f"memory://bucket-{secrets.token_hex(8)}/cache")
    yield found
    for name in found.sizes():
        found.remove(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)

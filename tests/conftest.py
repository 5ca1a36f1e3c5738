"""Settings of the whole test session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch, here or in a child process: more threads would only wait for each
# other on a machine that runs several tests at once, and the last bits of a result follow them.
os.environ["OMP_NUM_THREADS"] = "1"

# readline, which pytest loads, leaves the width of a terminal to child processes, workers of xdist
# among them, and tables would be cut to it.
os.environ["COLUMNS"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers, or none for the tests of one file: a worker begins with imports of its own.

    No more on a larger machine unless `-n` says so: each holds up to 3 GB of networks.
    """
    return 0 if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file() else 2

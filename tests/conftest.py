"""Settings of the whole test session."""

from __future__ import annotations

import os

# Before anything imports torch, here or in a child process: more threads would only wait for each
# other on a machine that runs several tests at once, and the last bits of a result follow them.
os.environ["OMP_NUM_THREADS"] = "1"

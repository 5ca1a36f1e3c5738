"""The `distill` command; and as `python -m distill`, for launchers that start modules."""

import os
import signal
import sys
from pathlib import Path

# The working directory may be a folder of data that anybody made: no module is looked for there,
# unless it is the source itself.
APART = Path.cwd() != Path(__file__).parents[1]


def main() -> None:
    """Run the command."""
    # Until it begins there is nothing to lose, and Ctrl-C has no traceback to show.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if APART:
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # in the processes that are started either
    # Threads of PyTorch wait for each other many times a step. Where one lost its core to another
    # program, the rest would spin for milliseconds each time (300,000 turns) on what it could have.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as fast where nothing else runs
    from distill.cli import app

    app(prog_name="distill")


if __name__ == "__main__":
    # With `python -m` it stands first, but with PYTHONSAFEPATH the user's own PYTHONPATH does.
    if APART and not sys.flags.safe_path and sys.path[0] == str(Path.cwd()):
        del sys.path[0]
    main()

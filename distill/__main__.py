"""The `distill` command; and as `python -m distill`, for launchers that start modules."""

import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the command."""
    # Until it begins there is nothing to lose, and Ctrl-C has no traceback to show.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from distill.cli import app

    app(prog_name="distill")


# `python -m` looks for every module in the working directory first, and that may be a folder of
# data that anybody made.
if __name__ == "__main__":
    put = not sys.flags.safe_path  # else what stands first is the user's own PYTHONPATH
    if put and sys.path[0] == str(Path.cwd()) != str(Path(__file__).parents[1]):
        del sys.path[0]
    main()

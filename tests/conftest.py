"""Settings of the whole test session."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import promises
from tests.promises import Finding, Measured

# Before anything imports torch, here or in a child process: more threads would only wait for each
# other on a machine that runs several tests at once, and the last bits of a result follow them.
os.environ["OMP_NUM_THREADS"] = "1"

# readline, which pytest loads, leaves the width of a terminal to child processes, workers of xdist
# among them, and tables would be cut to it.
os.environ["COLUMNS"] = ""

# A shell lets what runs in its background ignore Ctrl-C, nohup a closed terminal; both are handed
# down to every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers, or none for the tests of one file: a worker begins with imports of its own.

    No more on a larger machine unless `-n` says so: each holds up to 3 GB of networks.
    """
    return 0 if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file() else 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one command that measures the promises."""
    what = "run the tests that measure promises, {}, and write docs/reliability.md"
    for option, marked, which in (
        ("--promises", "promise", "long ones too"),
        ("--promises-short", "promise and not soak", "but no long ones"),
    ):
        parser.addoption(
            option, dest="promises", action="store_const", const=marked, help=what.format(which)
        )


def pytest_configure(config: pytest.Config) -> None:
    """The promises' tests are chosen by their own mark."""
    if marked := config.getoption("promises"):
        config.option.markexpr = marked


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Files that should be the same are named, and not shown: their bytes say nothing."""
    if op != "==" or not (_is_files(left) and _is_files(right)):
        return None
    assert isinstance(left, dict)
    assert isinstance(right, dict)
    lines = ["the files differ"]
    for name in sorted(left.keys() | right.keys()):
        found, expected = left.get(name), right.get(name)
        if found is None or expected is None:
            lines.append(f"{name}: {'missing' if found is None else 'not expected'}")
        elif found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            others = [at for at, (one, other) in pairs if one != other]
            at = others[0] if others else min(len(found), len(expected))
            lines.append(
                f"{name}: {len(found):,} bytes, expected {len(expected):,}; {len(others):,} differ,"
                f" from {at:,} on: {found[at : at + 40]!r}, expected {expected[at : at + 40]!r}"
            )
    return lines


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(data, bytes) for data in value.values())


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Says what a test with `@pytest.mark.promise` found."""
    (mark,) = request.node.iter_markers("promise")
    (name,) = mark.args
    assert name in promises.PROMISES

    def note(what: str, figure: str) -> None:
        test = request.node.nodeid.partition("[")[0]
        long = request.node.get_closest_marker("soak") is not None
        request.node.user_properties.append(("promise", [name, what, figure, test, long]))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured, and put it into the page when all of it was."""
    reporter = terminalreporter
    if not reporter.config.getoption("promises"):
        return
    found = [
        Finding(*values)
        for report in reporter.stats.get("passed", [])
        for name, values in report.user_properties
        if name == "promise"
    ]
    reporter.section("promises")
    for one in promises.joined(found):
        reporter.write_line(f"{one.promise:4} {one.what}: {one.figure}")
    if any(reporter.stats.get(kind) for kind in ("failed", "error")):
        reporter.write_line("not all hold: docs/reliability.md stays as it is")
    elif reporter.config.args == reporter.config.getini("testpaths"):
        promises.write(found)

"""The `distill` command. One file a subcommand; each calls one public function of the library.

Nothing here imports torch while it is being loaded: help and recipe errors must come at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer
from typer.core import TyperGroup

from distill import console
from distill.cli.check import check
from distill.cli.env import env
from distill.cli.evaluate import evaluate
from distill.cli.export import export
from distill.cli.init import init
from distill.cli.list import list_
from distill.cli.pack import pack
from distill.cli.rank_teachers import rank_teachers
from distill.cli.sample_efficiency import sample_efficiency
from distill.cli.teacher_cache import teacher_cache
from distill.cli.temperature_sweep import temperature_sweep
from distill.cli.train import train
from distill.errors import PreflightError


class _Commands(TyperGroup):
    """Takes care that what a command says in the end is heard, or its status tells."""

    def main(self, *arguments: Any, **keys: Any) -> Any:
        """Run the command line."""
        _open_streams()
        stdout = sys.stdout
        try:
            if stdout is None:
                raise PreflightError("stdout: is closed", hint="`> /dev/null` throws results away")
            sys.stdout = cast("TextIO", console.Stdout(stdout))
            try:
                return super().main(*arguments, **keys)
            finally:
                sys.stdout.flush()
        except PreflightError as error:
            console.fail(str(error), hint=error.hint)
            sys.exit(error.exit_status)
        finally:
            sys.stdout = stdout


def _open_streams() -> None:
    """Let no file that is opened later be taken for a stream that was closed from the start."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)


app = typer.Typer(
    cls=_Commands,
    help="Knowledge distillation for image classifiers: any CNN or ViT on either side.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train)
app.command("distill", help="The same as `distill train`.")(train)
app.command("teacher-cache")(teacher_cache)
app.command("temperature-sweep")(temperature_sweep)
app.command("rank-teachers")(rank_teachers)
app.command("sample-efficiency")(sample_efficiency)
app.command("evaluate")(evaluate)
app.command("export")(export)
app.command("check")(check)
app.command("init")(init)
app.command("pack")(pack)
app.command("list")(list_)
app.command("env")(env)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {importlib.metadata.version('distill-kd')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Knowledge distillation for image classifiers: any CNN or ViT on either side."""

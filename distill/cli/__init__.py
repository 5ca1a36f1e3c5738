"""The `distill` command. One file a subcommand; each calls one public function of the library.

Nothing here imports torch while it is being loaded: help and recipe errors must come at once.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from distill.cli import check, env, evaluate, init, train
from distill.cli import list as listing

app = typer.Typer(
    help="Knowledge distillation for image classifiers: any CNN or ViT on either side.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("distill", help="The same as `distill train`.")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("check")(check.check)
app.command("init")(init.init)
app.command("list")(listing.list_)
app.command("env")(env.env)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distill {importlib.metadata.version('distill-kd')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Knowledge distillation for image classifiers: any CNN or ViT on either side."""

"""`python -m distill`, for launchers that start modules."""

from distill.cli import app

app(prog_name="distill")

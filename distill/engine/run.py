"""The run directory: what a run leaves behind, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from distill import jsonio, storage
from distill.errors import DamagedError, IdentityError, PreflightError
from distill.identity import require_known

FORMAT = 1  # of result.json


class Result(NamedTuple):
    """What `train` returns and `--json` prints. Rates are fractions in [0, 1].

    Scores are those of the test split, read once, after the last epoch.
    """

    top1: float
    top5: float
    nll: float
    ece: float
    epochs: int
    steps: int
    seconds: float  # in the training loop, over all starts of the run
    images_per_second: float
    student: str
    teachers: list[dict[str, Any]]  # model, run, weight, parameters, flops, top1, ...
    parameters: int
    flops: int  # of one image's forward pass; a multiply-add counts as two
    run: str
    identity: dict[str, Any]  # digest of the recipe, fingerprints of data and teachers
    warnings: list[str]
    data_wait: float | None = None  # fraction of `seconds` in which the device had no batch
    memory: int | None = None  # most bytes held at once: a GPU's tensors, else the whole process
    val_top1: float | None = None  # where a validation split is held out
    baseline: dict[str, Any] | None = None  # the same student from labels alone
    gain: float | None = None  # top1 less the baseline's
    gain_ci95: list[float] | None = None  # paired bootstrap over the test images
    generations: list[dict[str, Any]] | None = None  # run and scores of each, the last one's last
    ensemble: dict[str, float] | None = None  # scores of all generations as one classifier

    def to_json(self) -> dict[str, Any]:
        """The result as plain data; keys that do not apply to the run are left out."""
        return {key: value for key, value in self._asdict().items() if value is not None}

    def document(self) -> dict[str, Any]:
        """What result.json holds, and `--json` prints."""
        return {"format": FORMAT, **self.to_json()}


class Counter(NamedTuple):
    """How far a run is."""

    step: int  # optimizer steps done
    seconds: float  # spent on them, over all starts
    waited: float  # of these, without a batch to work on
    warnings: list[str]  # said so far, for the result


class Run:
    """A directory, nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.student = path / "student.safetensors"
        self.result = path / "result.json"
        self.checkpoints = path / "checkpoint"

    def finished(self) -> Result | None:
        """The result, if the run has one.

        Raises:
            DamagedError: If there is one and it cannot be read.
            IdentityError: If a newer version wrote it.
        """
        try:
            found = jsonio.mapping(self.result.read_text(encoding="utf-8"))
            require_known(found.pop("format", 1), FORMAT, str(self.result))
            return jsonio.checked(Result, found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IdentityError:
            raise
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"{self.result}: cannot be read: {error}",
                hint="delete it and run the same command again: the result is computed anew",
            ) from None

    def finish(self, result: Result) -> None:
        """Write the result, the mark of a complete run."""
        storage.sync(self.metrics)  # whose rows were appended
        storage.write(self.result, (json.dumps(result.document(), indent=1) + "\n").encode())

    def place(self) -> tuple[int, int] | None:
        """What the directory is to its disk, whatever its name; None where it is not there."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def require_place(self, before: tuple[int, int] | None) -> None:
        """Refuse to write where another directory is by now: it would be half a run.

        Raises:
            PreflightError: If `place` says something else.
        """
        if self.place() != before:
            raise PreflightError(
                f"{self.path}: was moved or removed while the run went on; nothing more is saved",
                hint="put it back, and the same command goes on from its last checkpoint",
            )

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        storage.remove(self.result, self.student, self.metrics, self.recipe)
        storage.remove_folder(self.checkpoints)

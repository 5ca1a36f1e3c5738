"""What belongs to the exported files: how to feed them, a program that does, and a card."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from distill import jsonio
from distill.engine.finished import Finished
from distill.engine.run import Run
from distill.export.card import About, Data, card
from distill.export.program import Student

SIDECAR, PROGRAM, CARD = "preprocessing.json", "serve.py", "README.md"


def write(
    aside: Path, about: dict[str, Any], one: Finished, student: Student
) -> list[dict[str, Any]]:
    """Write them into the folder of the exported files.

    Returns:
        Name, size and SHA-256 of every file there that `about` does not list.
    """
    formats = {file["format"] for file in about["files"]}
    if not student.inside:
        steps = student.preprocessing.to_json() | {"classes": list(student.classes)}
        (aside / SIDECAR).write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
    if "onnx" in formats:
        kind = "graph" if student.inside else "sidecar"
        program = resources.files("distill.export.serving") / f"{kind}.py"
        (aside / PROGRAM).write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    text = card(_about(one, about))
    (aside / CARD).write_text(text, encoding="utf-8", errors="replace")
    listed = {file["file"] for file in about["files"]}
    return [entry(path) for path in sorted(aside.iterdir()) if path.name not in listed]


def _about(one: Finished, exported: dict[str, Any]) -> About:
    """All that a card tells of; an evaluation that is older than the result is another's."""
    dataset, evaluation = one.dataset, one.path / "evaluation.json"
    data = Data(
        name=dataset.name,
        classes=dataset.classes,
        image_size=dataset.image_size,
        train=len(dataset.train_ids),
        val=len(dataset.val_ids),
        test=len(dataset.test),
        fingerprint=dataset.fingerprint,
    )
    found = None
    with suppress(OSError, ValueError):
        if evaluation.stat().st_mtime_ns >= Run(one.path).result.stat().st_mtime_ns:
            found = jsonio.mapping(evaluation.read_text(encoding="utf-8"))
    return About(one.recipe, one.result, data, one.network.description, found, exported)


def entry(path: Path) -> dict[str, Any]:
    """What identifies a file."""
    data = path.read_bytes()
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

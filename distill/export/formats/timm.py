"""A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` and the hub load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import jsonio
from distill.export.formats import safetensors
from distill.export.program import Logits, Precision, Student, Takes

PACKAGES: tuple[str, ...] = ()
PRECISIONS: tuple[Precision, ...] = ("fp32",)
TAKES: Takes = "images"
_PREFIX = "timm/"
# What timm knows of the weights that it publishes for this architecture, and not of these.
_OF_OTHERS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes")


def file(precision: Precision) -> str:
    """The configuration's name; the weights beside it are those of the safetensors format."""
    return "config.json"


def refusal(student: Student) -> str:
    """Why this student cannot be written; empty if it may."""
    model = student.network.model
    return "" if model.startswith(_PREFIX) else f"timm has no model {model}"


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write configuration and weights; the preprocessing in it is that of the evaluation."""
    import timm

    network, steps = student.network, student.preprocessing
    description = network.description
    size, arguments = description.image_size, dict(description.arguments)
    published = timm.get_pretrained_cfg(description.model.removeprefix(_PREFIX))
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = size
    timm.models.save_for_hf(
        network.backbone,
        str(path.parent),
        model_config={
            "label_names": list(student.classes),
            "pretrained_cfg": {
                "input_size": (3, size, size),
                "mean": steps.mean,
                "std": steps.std,
                "interpolation": "bilinear",
                "crop_pct": steps.size / steps.shorter,
                "crop_mode": "center",
                "num_classes": len(student.classes),
            },
        },
        model_args=arguments,
        safe_serialization=True,
    )
    config = jsonio.load(path.read_text(encoding="utf-8"))
    for key in _OF_OTHERS:
        config["pretrained_cfg"].pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # The same tensors again, with the description that `distill.load` reads.
    weights = safetensors.file(precision)
    safetensors.write(student, path.with_name(weights), precision)


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What timm makes of the folder says of each batch of images in [0, 1]; it normalises them."""
    import timm

    model = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        resized = [student.network.resized(torch.from_numpy(batch)) for batch in batches]
        return [model((images - mean) / std).numpy() for images in resized]

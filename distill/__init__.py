"""Knowledge distillation for image classifiers.

The public names are loaded on first use, so that `import distill` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.engine.run import Result
    from distill.engine.train import train
    from distill.models.weights import load
    from distill.recipe import Recipe

_HOMES = {
    "Recipe": "distill.recipe",
    "Result": "distill.engine.run",
    "load": "distill.models.weights",
    "train": "distill.engine.train",
}

__all__ = ["Recipe", "Result", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

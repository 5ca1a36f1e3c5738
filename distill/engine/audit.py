"""A cache held against the images and the teachers of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import models
from distill.cache import write
from distill.cache.layout import Manifest
from distill.cache.read import Reader
from distill.cache.store import Store, places
from distill.data import datasets
from distill.data.datasets import Dataset
from distill.data.views import uniform
from distill.engine import machine
from distill.engine.cached import require_identity
from distill.engine.canaries import KL_NEAR, KL_SAME, answers, check_canaries, divergences
from distill.engine.machine import Machine
from distill.engine.networks import facts, placed, trained
from distill.errors import IdentityError
from distill.models.network import Network
from distill.recipe import Recipe
from distill.teacher import unpack

_SAMPLE = int.from_bytes(b"audit", "big")  # stream of random numbers


def audit(
    recipe: Recipe, path: str, run: Path, *, teacher: bool, sample: int
) -> list[dict[str, Any]]:
    """Make some views of each teacher's cache again, and compare.

    Args:
        recipe: Has a `cache` section, and teachers if they are asked.
        path: Where the caches lie.
        run: The run directory beside which teachers that are recipes have theirs.
        teacher: Whether the teachers are asked again; else pixels alone are compared.
        sample: Views that they are asked about.

    Returns:
        For each cache its `faults`, `notes` and, of teachers, the divergence of their answers.

    Raises:
        IdentityError: If a cache was made from something else.
    """
    here = machine.setup()
    dataset = datasets.load(recipe.data)
    found = []
    for i, place in enumerate(places(recipe.teachers, path)):
        manifest = write.read_manifest(place.store)
        assert manifest is not None, "the caller has read it"
        network = None
        if teacher:
            spec = trained(recipe.teachers[i], run, i)
            network = placed(models.build_teacher(spec, **facts(dataset)), here)
        require_identity(recipe, dataset, network, manifest, place.store)
        verdict: dict[str, Any] = {"faults": [], "notes": []}
        try:
            verdict["notes"] += check_canaries(
                place.store, manifest, recipe, dataset, network, here.device
            )
        except IdentityError as error:
            verdict["faults"].append({"name": "canaries", "what": str(error)})
        if network is not None:
            verdict |= _asked_again(recipe, dataset, network, manifest, place.store, here, sample)
            _judge(verdict)
        found.append(verdict)
    return found


def _asked_again(
    recipe: Recipe,
    dataset: Dataset,
    network: Network,
    manifest: Manifest,
    store: Store,
    here: Machine,
    sample: int,
) -> dict[str, Any]:
    """The teacher's answers of today to views drawn from all that are whole."""
    reader = Reader(store, manifest, num_views=manifest.views, partial=True)
    whole = [view for view in range(manifest.views) if reader.complete(view)]
    if not whole:
        return {"sample": 0, "kl": {"mean": 0.0, "median": 0.0, "max": 0.0}, "top1_agreement": 1.0}
    draws = uniform(recipe.data.seed, np.arange(sample), 0, stream=_SAMPLE, num=2)
    number = (draws[:, 0] * len(dataset.train_ids)).astype(np.int64)
    number = np.unique(number * len(whole) + (draws[:, 1] * len(whole)).astype(np.int64))
    positions, chosen = number // len(whole), np.array(whole)[number % len(whole)]
    told = answers(recipe, dataset, network, positions, chosen, here.device)
    kept = np.empty_like(told)
    for view in np.unique(chosen):
        rows = chosen == view
        columns = reader.rows(dataset.train_ids[positions[rows]], int(view))
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        kept[rows] = unpack(manifest.codec, tensors, manifest.num_classes).logits.numpy()
    reader.close()
    kl = divergences(told, kept)
    return {
        "sample": len(number),
        "kl": {"mean": float(kl.mean()), "median": float(np.median(kl)), "max": float(kl.max())},
        "top1_agreement": float((told.argmax(1) == kept.argmax(1)).mean()),
    }


def _judge(verdict: dict[str, Any]) -> None:
    """Bad above the limit that another pixel path stays below, a note above that of the same."""
    mean = verdict["kl"]["mean"]
    if mean > KL_NEAR:
        what = f"the teacher says something else today: KL {mean:.2g} nats"
        verdict["faults"].append({"name": "teacher", "what": what})
    elif mean > KL_SAME:
        verdict["notes"].append(f"the pixel path or the codec costs KL {mean:.2g} nats")

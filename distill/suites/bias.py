"""Inductive biases: how a network behaves by its make, whatever its accuracy.

Every part is asked of every network; where it has no meaning, the answer says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from distill.definitions import Number
from distill.diagnostics import (
    UndefinedError,
    attention,
    equivariance,
    permutation,
    rank,
    receptive_field,
    rollout,
    sharpness,
    similarity,
    specificity,
    spectrum,
)
from distill.diagnostics.rollout import overlay
from distill.engine.canaries import numerics
from distill.engine.machine import Machine
from distill.models.network import Network
from distill.statistics import resampled
from distill.suites import Found, Image, as_bytes, interval, mean, merged, nothing, png, spread
from distill.suites.subjects import Sample, Subject, Tested, sample, training_views

IMAGES = 256
FELT = 64  # images by which the receptive field is measured
SHOWN = 8  # images on which it is drawn where a network looks
BENT = 128  # augmented training images, of which second derivatives are taken
SHUFFLED = 1000  # images whose parts are rearranged: what is left is an accuracy


class Asked(NamedTuple):
    """A network, and what it is shown."""

    tested: Tested
    few: Sample
    many: Sample
    teacher: Tested | None
    here: Machine

    @property
    def network(self) -> Network:
        """The one network that it is.

        Raises:
            UndefinedError: If there is none, or several.
        """
        if isinstance(self.tested.network, Network):
            return self.tested.network
        reason = (
            "a cache stands for it" if self.tested.network is None else "it is several networks"
        )
        raise UndefinedError(reason)


Part = Callable[[Asked], Found]


def measure(subjects: Sequence[Subject], here: Machine) -> dict[str, Found]:
    """All parts of the first network of each."""
    by_name = {subject.name: subject for subject in subjects}
    found: dict[str, Found] = {}
    shown: dict[tuple[int, float], Sample] = {}
    for subject in subjects:
        tested = subject.first
        if tested.view not in shown:
            shown[tested.view] = sample(tested, here, SHUFFLED)
        many = shown[tested.view]
        few = Sample(*(column[:IMAGES] for column in many))
        teacher = by_name[subject.teacher].first if subject.teacher else None
        asked = Asked(tested, few, many, teacher, here)
        parts = []
        for part, names in _PARTS.items():
            try:
                with numerics("fp32", here.device):
                    parts.append(part(asked))
            except UndefinedError as error:
                parts.append(nothing(str(error), *names))
        found[subject.name] = merged(parts)
    return found


def _equivariance(asked: Asked) -> Found:
    network, images = asked.network, asked.few.images
    lie = {
        kind: equivariance.lie_derivative(network, images, kind)
        for kind in ("translate_x", "translate_y", "rotate", "scale", "shear")
    }

    def both(column: str) -> Number:
        x, y = (getattr(lie[kind], column) for kind in ("translate_x", "translate_y"))
        return mean([((x + y) / 2).double().cpu().numpy()])

    numbers = {
        "lie_translation": both("error"),
        "lie_translation_relative": both("relative"),
        "lie_translation_official": both("official"),
        **{
            name: mean([lie[kind].error.double().cpu().numpy()])
            for name, kind in (
                ("lie_rotation", "rotate"),
                ("lie_scale", "scale"),
                ("lie_shear", "shear"),
            )
        },
    }
    table: dict[str, list[float]] = {}
    edges: dict[str, equivariance.Edge] = {"consistency": "reflect", "consistency_roll": "wrap"}
    for name, edge in edges.items():
        kept = equivariance.consistency(network, images, edge=edge).double()
        numbers[name] = mean([kept.mean(dim=(1, 2)).cpu().numpy()])
        table[name] = kept.mean(dim=(0, 1)).tolist()
    return Found(numbers, {"consistency": table, "lie_method": lie["rotate"].method}, {})


def _permutations(asked: Asked) -> Found:
    grids = {"patches_2": 2, "patches_4": 4, "patches_8": 8, "permuted_pixels": None}
    numbers: dict[str, Number] = {}
    for name, grid in grids.items():
        try:
            right = permutation.correct(asked.network, *asked.many, grid=grid)
            numbers[name] = mean([right.cpu().numpy()])
        except UndefinedError as error:
            numbers[name] = Number(None, reason=str(error))
    return Found(numbers, {}, {})


def _attention(asked: Asked) -> Found:
    found = attention.attention(asked.network, asked.few.images)
    columns = {
        "attention_distance": found.overall.distance,
        "attention_distance_relative": found.overall.relative,
        "attention_mass_3x3": found.overall.near,
        "attention_entropy_relative": found.overall.spread,
    }
    table = {
        "layers": [layer.site.name for layer in found.layers],
        "depth": [layer.site.depth for layer in found.layers],
        "relative": [float(layer.heads.relative.mean()) for layer in found.layers],
        "heads": [layer.heads.relative.mean(dim=0).tolist() for layer in found.layers],
    }
    numbers = {name: mean([column.numpy()]) for name, column in columns.items()}
    return Found(numbers, {"attention": table}, {})


def _specificity(asked: Asked) -> Found:
    """Of a plain convolutional network it is 0, and no question without meaning."""
    layers, n = specificity.specificity(asked.network, asked.few.images), len(asked.few.images)
    columns = [layer.varied for layer in layers] + [layer.square for layer in layers]

    def of(means: Float[np.ndarray, "k S R"]) -> Float[np.ndarray, "S R"]:
        varied, square = np.split(means, 2)
        found: np.ndarray = (varied / np.maximum(square, 1e-300)).mean(axis=0)
        return found

    values = [layer.value for layer in layers]
    number = Number(0.0, n=n)  # exactly
    if any(layer.kind != "fixed" for layer in layers):
        draws = resampled([column.numpy()[None] for column in columns], of)
        number = interval(float(np.mean(values)), draws, n=n, seeds=1)
    table = {
        "layers": [layer.name for layer in layers],
        "kinds": [layer.kind for layer in layers],
        "depth": [layer.depth for layer in layers],
        "values": values,
    }
    return Found({"data_specificity": number}, {"specificity": table}, {})


def _receptive_field(asked: Asked) -> Found:
    images = asked.few.images[:FELT]
    found = receptive_field.receptive_fields(asked.network, images)
    last = found[-1]
    numbers = {"erf_radius": mean([last.radius.numpy()])}
    numbers["erf_radius_relative"] = mean([last.relative.numpy()])
    table = {
        "sites": [one.site.name for one in found],
        "depth": [one.site.depth for one in found],
        "relative": [float(one.relative.nanmean()) for one in found],
        "share": [one.share for one in found],
    }
    under = as_bytes(images.mean(dim=0))
    drawn = [
        Image(png(overlay(under, one.field.numpy())), (one.site.name, f"{one.share:.0%} of pixels"))
        for one in found
    ]
    return Found(numbers, {"receptive_field": table}, {"receptive_field": drawn})


def _pictures(asked: Asked) -> Found:
    """Where it looks, on some images; rollout is for transformers alone."""
    network, few = asked.network, Sample(*(column[:SHOWN] for column in asked.few))
    classes = asked.tested.dataset.classes
    with torch.no_grad():
        predicted = network(few.images).logits.argmax(dim=1).tolist()
    ways = {"rollout": rollout.rollout, "saliency": rollout.saliency}
    drawn: dict[str, list[Image]] = {}
    for name, way in ways.items():
        try:
            heats = way(network, few.images)
        except UndefinedError:
            continue
        drawn[name] = [
            Image(
                png(overlay(as_bytes(image), heat.numpy())),
                (f"label: {classes[label]}", f"predicted: {classes[said]}"),
            )
            for image, heat, label, said in zip(
                few.images, heats, few.labels.tolist(), predicted, strict=True
            )
        ]
    return Found({}, {}, drawn)


def _similarity(asked: Asked) -> Found:
    teacher = asked.teacher.network if asked.teacher else None
    if not isinstance(teacher, Network):
        raise UndefinedError("it has no teacher that is one network")
    images = asked.many.images[: 2 * similarity.BATCH]
    found = similarity.cka(teacher, asked.network, torch.split(images, similarity.BATCH))
    number = Number(found.pooled, n=len(images))
    if found.pooled is None:
        number = Number(None, reason="one of the two has no vector that its classifier reads")
    table = {
        "teacher": [site.name for site in found.teacher_sites],
        "student": [site.name for site in found.student_sites],
        "means": found.matrix.tolist(),
        "grids": found.grids.tolist(),
    }
    return Found({"cka": number}, {"cka": table}, {})


def _rank(asked: Asked) -> Found:
    found = rank.ranks(asked.network, asked.many.images)
    if found.pooled is None:
        raise UndefinedError("it has no vector that a classifier reads")
    n = len(asked.many.images)
    numbers = {
        "effective_rank": Number(found.pooled.effective, n=n),
        "participation_ratio": Number(found.pooled.participation, n=n),
        "components_90": Number(found.pooled.k90, n=n),
        "components_95": Number(found.pooled.k95, n=n),
        "components_99": Number(found.pooled.k99, n=n),
        "coding_rate": Number(found.pooled.coding_rate, n=n),
    }
    table = {
        "sites": [site.name for site in found.sites],
        "depth": [site.depth for site in found.sites],
        "effective": [one.effective for one in found.cells],
        "most": [one.most for one in found.cells],
    }
    return Found(numbers, {"rank": table}, {})


def _sharpness(asked: Asked) -> Found:
    """Of the loss that the run was trained with: NLL on its views, and its optimizer's L2."""
    if not asked.tested.dataset.labelled:
        raise UndefinedError("the training images have no labels")
    batches = list(training_views(asked.tested, asked.here, images=BENT))
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    optimizer, network, n = asked.tested.recipe.optimizer, asked.network, len(images)
    decay = optimizer.weight_decay if optimizer.name == "sgd" else 0.0  # else it is decoupled
    bent = sharpness.curvature(network, images, labels, weight_decay=decay)
    traces = sharpness.trace(network, images, labels, weight_decay=decay)
    noise = sharpness.perturbation(network, images, labels, weight_decay=decay)
    numbers = {
        "hessian_max": Number(bent.largest, n=n),
        "hessian_min": Number(bent.smallest, n=n),
        "hessian_trace": spread(traces.tolist(), n=n),
        "sharpness": spread(noise.tolist(), n=n),
        "sharpness_sam": Number(sharpness.sam(network, images, labels, weight_decay=decay), n=n),
    }
    table = {"values": bent.values.tolist(), "shares": bent.shares.tolist()}
    return Found(numbers, {"hessian": table | {"negative": bent.negative}}, {})


def _spectrum(asked: Asked) -> Found:
    found = spectrum.spectra(asked.network, asked.few.images)
    last = found[-1]
    numbers = {
        "feature_variance": mean([last.variance.numpy()]),
        "high_frequency": mean([last.amplitude[:, -1].numpy()]),
    }
    table = {
        "sites": [one.site.name for one in found],
        "depth": [one.site.depth for one in found],
        "variance": [float(one.variance.mean()) for one in found],
        "frequency": [one.frequency.tolist() for one in found],
        "high": [float(one.amplitude[:, -1].mean()) for one in found],
        "amplitude": [one.amplitude.mean(dim=0).tolist() for one in found],
    }
    return Found(numbers, {"spectrum": table}, {})


_PARTS: dict[Part, tuple[str, ...]] = {
    _equivariance: (
        "lie_translation", "lie_translation_relative", "lie_translation_official", "lie_rotation",
        "lie_scale", "lie_shear", "consistency", "consistency_roll",
    ),
    _permutations: ("patches_2", "patches_4", "patches_8", "permuted_pixels"),
    _attention: (
        "attention_distance", "attention_distance_relative", "attention_mass_3x3",
        "attention_entropy_relative",
    ),
    _specificity: ("data_specificity",),
    _receptive_field: ("erf_radius", "erf_radius_relative"),
    _pictures: (),
    _similarity: ("cka",),
    _rank: (
        "effective_rank", "participation_ratio", "components_90", "components_95", "components_99",
        "coding_rate",
    ),
    _sharpness: ("hessian_max", "hessian_min", "hessian_trace", "sharpness", "sharpness_sam"),
    _spectrum: ("feature_variance", "high_frequency"),
}  # fmt: skip

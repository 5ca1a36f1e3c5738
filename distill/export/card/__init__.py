"""The model card: what an exported student is, how good it is, how to use it, what is not known."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from distill import yamlio
from distill.definitions import Number, shown
from distill.export.card import facts, markdown
from distill.export.card.facts import About, Data
from distill.export.card.markdown import Markdown, listed, name, table
from distill.recipe import Recipe, is_published
from distill.report.exhibits import number
from distill.schedule import Ramp

__all__ = ["About", "Data", "card"]

MOST_CLASSES = 10  # that are named
# Published sets: what people and what the hub call them.
SETS = {
    "digits": ("UCI handwritten digits", "digits"),
    "fashion-mnist": ("Fashion-MNIST", "fashion_mnist"),
    "cifar10": ("CIFAR-10", "cifar10"),
    "cifar100": ("CIFAR-100", "cifar100"),
}
PICTURES = ("onnx", "torch-export", "openvino")  # formats that may have the preprocessing inside
SQUARES = ("executorch", "coreml")  # formats that have not
TAGS = ("onnx", "openvino", "executorch", "coreml", "safetensors")  # formats that the hub knows
HUB = "hf-hub:"
VERSIONS = ("python", "torch", "onnxruntime")  # of an environment, that times depend on
_PLACES = ("root", "split_file", "transfer", "path", "weights")  # keys of a recipe
_ABSOLUTE = re.compile(r"[~/\\]|[A-Za-z]:[\\/]|\w+://")
_PLACE_IN_TEXT = re.compile(r"(?<![\w.:/])~?/(?:[^\s:,;'\"()]*/)*([^\s:,;'\"()/]*)")


def card(about: About) -> str:
    """The README.md of an export folder and of its repository on the hub: YAML, then Markdown.

    The same facts give the same text. Names and messages are shown as they are written, whatever
    is in them; of places on this machine only the last part is shown.
    """
    recipe, result, exported = about.recipe, about.result, about.exported
    files, timed, size = exported["files"], exported["latency"], about.data.image_size
    environment = exported["environment"]
    inside = exported["preprocessing"] == "graph"
    taking = PICTURES if inside else PICTURES + SQUARES
    graphs = [name(one["file"]) for one in files if one["format"] in taking]
    compared = next((one["parity"] for one in files if one["parity"]), None)  # the same for all
    return _template().render(
        about._asdict(),
        front_matter=_front_matter(about),
        teachers=listed(_teachers(about)),
        taught=listed(_taught(result.teachers) if result else []),
        began=recipe.student.weights and _portable(recipe.student.weights, "weights"),
        set=_set(about),
        classes=_classes(about.data.classes),
        more_classes=len(about.data.classes) > MOST_CLASSES,
        scores=facts.scores(about),
        evaluated=bool(facts.measured(about)),
        verdict=Markdown(" ".join(facts.verdict(about))),
        results=facts.results(about),
        measures=facts.measures(about),
        meanings=facts.meanings(about),
        size=size,
        shorter=round(size / recipe.data.eval_crop),
        square=_square(size, recipe.data.eval_crop),
        inside=inside,
        stages=_stages(files),
        mapped=listed([name(one["file"]) for one in files if one.get("stages")]),
        squares=listed([name(one["file"]) for one in files if one["format"] in SQUARES]),
        names=[one["file"] for one in files],
        graphs=listed(graphs),
        files={one["format"]: one["file"] for one in reversed(files)},
        artefacts=_artefacts(files),
        compared=compared,
        whole=[(one["file"], one["files"]) for one in files if one.get("files")],
        percent=facts.percent,
        batches=listed(compared["batches"] if compared else []),
        left_out=[(one["format"], _without_places(one["reason"])) for one in exported["left_out"]],
        latency=_latency(timed),
        untimed=[(r["what"], _without_places(r["reason"])) for r in timed if r["reason"]],
        versions=[f"{k} {environment[k]}" for k in VERSIONS if k in environment],
        objective=_objective(recipe),
        augmentations=listed([name(spec.name) for spec in recipe.data.augment]),
        milestones=listed([Markdown(f"{one:g}") for one in recipe.optimizer.milestones]),
        duration=result and _duration(result.seconds),
        warnings=[_without_places(warning) for warning in result.warnings] if result else [],
        mean=_triple(about.weights.mean),
        std=_triple(about.weights.std),
        limits=list(_limits(about)),
        binding=listed(_binding(recipe)),
        recipe_block=markdown.fenced(yamlio.dump(_portable(recipe.model_dump())), "yaml"),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # would be for HTML; `finalize` does it for Markdown
        finalize=markdown.text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"name": name, "code": lambda told: Markdown(json.dumps(told))}
    return environment.get_template("card.md.jinja")


def _front_matter(about: About) -> Markdown:
    """What the hub reads. It holds what is known and no more: of the licence, that it is not."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, run = about.recipe, _last(about.exported["run"])
    formats = {one["format"] for one in about.exported["files"]}
    tags = [tag for tag in TAGS if tag in formats]
    set_name, set_id = _known_set(about)
    kinds = {"top1": "accuracy", "top5": "accuracy", "nll": "nll", "ece": "ece"}
    found = [
        EvalResult(
            task_type="image-classification",
            dataset_type=set_id,
            dataset_name=markdown.line(set_name),
            dataset_split="test",
            metric_type=kinds[key],
            metric_name={"top1": "top-1", "top5": "top-5"}.get(key, key.upper()),
            metric_value=round(one.value, 6),
        )
        for key, one in facts.scores(about).items()
        if one.value is not None
    ]
    began, _, _ = (recipe.student.weights or "").partition("@")  # of its revision
    data = ModelCardData(
        library_name="timm" if "timm" in formats else None,
        license="unknown",
        base_model=markdown.line(began[len(HUB) :]) if began.startswith(HUB) else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "knowledge-distillation", "distill-kd", *tags],
        metrics=["accuracy"],
        model_name=markdown.line(f"{about.exported['student']} ({run})"),
        eval_results=found or None,
    )
    return Markdown(f"---\n{data.to_yaml()}\n---")


def _classes(classes: Sequence[str]) -> Markdown:
    """The first classes, and how many more there are."""
    first = [name(one) for one in classes[:MOST_CLASSES]]
    if len(classes) <= MOST_CLASSES:
        return listed(first)
    return Markdown(f"{', '.join(first)} and {len(classes) - MOST_CLASSES:,} more")


def _set(about: About) -> Markdown:
    """The data set, as a sentence names it."""
    if about.data.name in SETS:
        return Markdown(SETS[about.data.name][0])
    kind, place = _kind(about)
    return Markdown(f"the {kind} {name(place)}")


def _known_set(about: About) -> tuple[str, str]:
    """The name of the data set, and its name on the hub or that of its kind there."""
    kind, place = _kind(about)
    ids = {"image folder": "imagefolder", "image shards": "webdataset", "set": place}
    return SETS.get(about.data.name, (f"{kind} {place}", ids[kind]))


def _kind(about: About) -> tuple[str, str]:
    """What the images lie in, and its name, without where it lies on this machine."""
    data = about.recipe.data
    if data.name.startswith("hf/"):
        return "set", data.name.removeprefix("hf/")
    kind = "image shards" if data.name == "webdataset" else "image folder"
    return kind, _last(data.root or data.name)


def _teachers(about: About) -> list[Markdown]:
    """The models of the teachers."""
    if about.result is not None:
        return [name(str(one["model"])) for one in about.result.teachers]
    return [
        name(one.recipe.student.model if one.recipe else one.model or _last(str(one.weights)))
        for one in about.recipe.teachers
    ]


def _square(size: int, crop: float) -> Markdown:
    """Python that makes of an image what the network is shown: `data.images.evaluation_view`."""
    return Markdown(
        f"scaled = [{round(size / crop)} * side // min(image.size) for side in image.size]\n"
        f"left, top = (round((side - {size}) / 2) for side in scaled)\n"
        "square = image.resize(scaled, Image.Resampling.BILINEAR)\n"
        f"square = square.crop((left, top, left + {size}, top + {size}))"
    )


def _taught(teachers: Sequence[Mapping[str, Any]]) -> list[Markdown]:
    """The teachers, and where each had its weights."""
    found = []
    for one in teachers:
        told = name(str(one["model"]))
        if one["run"]:
            told = Markdown(f"{told} ({name(_portable(str(one['run']), 'weights'))})")
        share = f" × {one['weight']:g}" if len(teachers) > 1 else ""
        found.append(Markdown(f"{told}{share}"))
    return found


def _objective(recipe: Recipe) -> Markdown:
    """The loss, as a sum."""
    parts = []
    for spec in recipe.objective:
        weight = spec.weight
        told = f"({weight.start:g} → {weight.end:g})" if isinstance(weight, Ramp) else f"{weight:g}"
        parts.append(f"{told} × {name(spec.term)}")
    return Markdown(" + ".join(parts))


def _artefacts(files: Sequence[Mapping[str, Any]]) -> Markdown:
    """The files, each with how near it is to the student."""
    rows = []
    for one in files:
        told, parity = ["–"] * 4, one["parity"]
        if parity:
            told = [
                f"{parity['max_abs']:.1e}",
                facts.percent(parity["agreement"]),
                facts.percent(parity["accuracy"]),
                Markdown(f"{100 * parity['drop']:+.2f} [{_interval(parity, ', ')}]"),
            ]
        size = shown("file_bytes", Number(one["bytes"]))
        rows.append((name(one["file"]), one["format"], one["precision"], size, *told))
    heads = ("file", "format", "precision", "size", "largest difference of a logit", "same class",
             "top-1", "points lost")  # fmt: skip
    return table(heads, rows, left=3)


def _stages(files: Sequence[Mapping[str, Any]]) -> Markdown:
    """The maps that graphs give, each with how near it is to the student's; empty without any."""
    told: dict[str, list[Mapping[str, Any]]] = {}
    for one in files:
        for stage in one.get("stages", ()):
            told.setdefault(stage["name"], []).append(stage)
    rows = [
        (
            name(key),
            f"(batch, {', '.join(map(str, several[0]['shape'][1:]))})",
            f"{several[0]['stride']:g} px",
            name(several[0]["module"]),
            ", ".join(f"{stage['max_abs']:.1e}" for stage in several),
        )
        for key, several in told.items()
    ]
    heads = ("output", "shape", "stride", "module", "largest difference of a value")
    return table(heads, rows, left=2) if rows else Markdown()


def _interval(parity: Mapping[str, Any], between: str) -> str:
    """What a file loses of top-1 at least and at most, in points."""
    return between.join(f"{100 * end:+.2f}" for end in parity["drop_ci95"])


def _latency(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """How long an answer takes, and what is on disk; empty where nothing was timed."""
    cells = []
    for row in rows:
        times = (row[key] for key in ("batch_1_ms", "batch_32_ms"))
        size = "–" if row["bytes"] is None else shown("file_bytes", Number(row["bytes"]))
        cells.append((row["what"], *("–" if t is None else f"{t:.3g} ms" for t in times), size))
    return table(("", "one image", "batch of 32", "size"), cells) if cells else Markdown()


def _limits(about: About) -> Iterator[str]:
    """What the student is not for, and what nobody looked at."""
    data, recipe = about.data, about.recipe
    yield (
        f"It gives every image one of its {len(data.classes):,} classes, also an image that shows "
        "none of them."
    )
    yield Markdown(
        f"It was trained and tested on images of {_set(about)}, {data.image_size} × "
        f"{data.image_size} px. How it does on images from elsewhere was not measured."
    )
    yield from _training_limits(recipe)
    student = facts.measured(about).get("student")
    mca = None if student is None else number(student, "corruptions", "mca")
    if mca is None or mca.value is None:
        yield "How it does on noisy, blurred or otherwise corrupted images was not measured."
    else:
        yield Markdown(
            f"On {mca.n or 0:,} test images, corrupted in 15 ways at 5 severities, it is right on "
            f"{facts.told_of('mca', mca)}."
        )
    yield from _calibration(about, student)
    for one in about.exported["files"]:
        if one["precision"] != "fp32" and one["parity"]:
            drop = one["parity"]["drop"]
            yield Markdown(
                f"{name(one['file'])} {'gains' if drop < 0 else 'loses'} {abs(100 * drop):.2f} "
                "points of top-1 against float32 (95 % interval of what is lost: "
                f"{_interval(one['parity'], ' to ')})."
            )
    yield (
        "Nothing was measured of fairness between groups of people, of attacks or of misuse. Where "
        "a wrong answer can do harm, that has to come first."
    )


def _training_limits(recipe: Recipe) -> Iterator[str]:
    """What was taken away in training."""
    data = recipe.data
    if data.control == "permuted-labels":
        yield "It is a control: its training labels were dealt out at random. It knows nothing."
    if data.omit:
        yield Markdown(f"No image of {listed([name(c) for c in data.omit])} was trained on.")
    if data.fraction < 1:
        yield f"It was trained on {100 * data.fraction:.3g} % of the set's training images."


def _binding(recipe: Recipe) -> list[str]:
    """Whose terms the student may be under."""
    kept = recipe.cache is not None and recipe.cache.path is not None
    return [
        "the training images",
        *(["the teachers' weights"] if recipe.teachers or kept else []),
        *(["the weights that it began with"] if recipe.student.weights else []),
    ]


def _calibration(about: About, student: Mapping[str, Any] | None) -> Iterator[str]:
    """How far its confidence can be taken at its word."""
    ece = facts.scores(about).get("ece")
    if ece is None:
        return
    told = (
        "Its probabilities are as it learned them: confidence and accuracy differ by "
        f"{facts.told_of('ece', ece)} in the mean (ECE)."
    )
    temperature, scaled = (
        None if student is None else number(student, "clean", key)
        for key in ("temperature", "ece_scaled")
    )
    if temperature and temperature.value and temperature.ci95 and scaled and scaled.value:
        low, high = temperature.ci95
        manner = "too sure" if low > 1 else "not sure enough" if high < 1 else ""
        if manner:
            told += (
                f" It is {manner}: dividing the logits by {temperature.value:.3g} would make that "
                f"{facts.told_of('ece_scaled', scaled)}."
            )
    yield Markdown(told)


def _portable(told: Any, key: str = "") -> Any:
    """Data of a recipe without the machine's own paths: their last part says what it was."""
    if isinstance(told, dict):
        return {key: _portable(below, key) for key, below in told.items()}
    if isinstance(told, list):
        return [_portable(below, key) for below in told]
    if isinstance(told, str) and not is_published(told):
        return _last(told) if key in _PLACES or _ABSOLUTE.match(told) else told
    return told


def _last(place: str) -> str:
    return re.split(r"[\\/]+", place.rstrip("\\/"))[-1]


def _triple(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _without_places(text: str) -> str:
    return _PLACE_IN_TEXT.sub(r"\1", text)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

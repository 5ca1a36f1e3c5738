"""What the plan asks of the runs, and what they reached.

The bars are of CIFAR-10 on a GPU, but for the omitted class and the first epochs of Fashion-MNIST.
On a CPU the same questions are asked of 2,000 images, and answered by the same bars.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from _sides import Side, gain, sides

Found = Mapping[str, Any]


class Bar(NamedTuple):
    """One thing that is asked for."""

    experiment: str
    asked: str
    measured: str
    reached: bool


def bars(found: Found) -> list[Bar]:
    """All that these runs can answer, in the order of the plan."""
    questions = (_teacher, _views, _features, _directions, _temperature, _images, _likeness,
                 _omitted, _first_epoch)  # fmt: skip
    return [bar for question in questions for bar in question(found)]


def _ahead(
    found: Found,
    experiment: str,
    words: str,
    names: tuple[str, str],
    least: float,
    ends: float = -1e9,
) -> Iterator[Bar]:
    """One condition ahead of another by so many points, and its interval above `ends`."""
    all_sides = sides(found)
    if not all(name in all_sides for name in names):
        return
    mean, interval = gain(*(all_sides[name] for name in names))
    told = f"{mean:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")
    low = interval[0] if interval else 0.0
    yield Bar(experiment, words, told, mean > least - 1e-9 and low > ends)


def _teacher(found: Found) -> Iterator[Bar]:
    run = found.get("teacher-cnn")
    if run and "cifar10" in run["command"]:
        top1 = run["found"]["top1"]
        yield Bar("E0", "teacher at 94.8 % or more", f"{top1:.2%}", top1 >= 0.948)


def _views(found: Found) -> Iterator[Bar]:
    yield from _ahead(
        found, "E2a", "ViT, weak views: KD is 3.0 points ahead", ("weak-kd", "weak-alone"), 3.0
    )
    yield from _ahead(found, "E2a", "the same, twice as long", ("long-kd", "long-alone"), 3.0)
    longer = "ViT, weak views, eight times as long: KD is 3.0 points ahead"
    yield from _ahead(found, "E2a", longer, ("far-kd", "far-alone"), 3.0)
    yield from _ahead(
        found, "E2b", "ViT, strong views: KD is 1.0 ahead", ("strong-kd", "strong-alone"), 1.0
    )
    run = found.get("strong-kd-0")
    if run and "cifar10" in run["command"]:
        top1 = run["found"]["top1"]
        yield Bar("E2b", "ViT, strong views, with KD: 93.3 % or more", f"{top1:.2%}", top1 >= 0.933)
    yield from _ahead(
        found, "E2c", "from a cache of 16 views: at most 0.5 behind live",
        ("strong-cached", "strong-kd"), -0.5,
    )  # fmt: skip
    all_sides = sides(found)
    if "strong-cached" in all_sides:
        live, cached = (_seconds(all_sides[name]) for name in ("strong-kd", "strong-cached"))
        told = f"{live / cached:.2f}"
        made = [one["wall"] for one in found.values() if one["condition"] == "cache"]
        if made and all(made):
            whole = cached + statistics.median(made)
            told += f"; {live / whole:.2f} with a cache for it alone"
        asked = "from a cache: a training is 1.3 times as fast as live"
        yield Bar("E2c", asked, told, live / cached >= 1.3)


def _seconds(side: Side) -> float:
    return statistics.median(run["found"]["seconds"] for run in side.values())


def _features(found: Found) -> Iterator[Bar]:
    for kind in ("weak", "strong"):
        yield from _ahead(
            found, "E3", "features beside logits: at most 0.3 behind logits alone",
            (f"{kind}-features", f"{kind}-kd"), -0.3,
        )  # fmt: skip


def _directions(found: Found) -> Iterator[Bar]:
    yield from _ahead(found, "E4", "CNN to CNN: KD is 0.3 ahead", ("cnn-kd", "cnn-alone"), 0.3)
    yield from _ahead(
        found, "E4", "ViT to CNN, with guidance: 0.1 ahead, all of the interval above -0.1",
        ("cnn-vit-guidance", "cnn-alone"), 0.1, -0.1,
    )  # fmt: skip


def _temperature(found: Found) -> Iterator[Bar]:
    if not (run := found.get("temperatures")):
        return
    settings = run["found"]["settings"]
    levels = [one["val_top1"] for one in settings]
    spread = 100 * (max(levels) - min(levels))
    yield Bar(
        "E5", "temperatures 1 to 16: a spread of 1 point at most", f"{spread:.2f}", spread <= 1
    )


def _images(found: Found) -> Iterator[Bar]:
    for name, seen, least in (("far-kd", "all", 8.0), ("far-same", "the same", 3.0)):
        words = f"2,000 images, as long, a teacher that has seen {seen}: {least:.0f} points ahead"
        yield from _ahead(found, "E6", words, (name, "far-alone"), least)
    if not (run := found.get("efficiency")):
        return
    document = run["found"]
    curves = {curve["name"]: curve for curve in document["curves"]}
    given = next(name for name in curves if name.endswith("teacher as given"))
    same = next(name for name in curves if name.endswith("on the same images"))
    cnn = next(name for name, curve in curves.items() if curve["recipe"].endswith("alone"))
    sizes: Sequence[int] = document["sizes"]
    middle = sizes[len(sizes) // 2]

    def top1(name: str) -> float:
        return next(one["top1"] for one in curves[name]["points"] if one["size"] == middle)

    for name, asked in (
        (given, "a teacher that has seen all"),
        (same, "one that has seen the same"),
    ):
        ahead = 100 * (top1(name) - top1("student alone"))
        least = 8.0 if name is given else 3.0
        words = f"{middle:,} images, {asked}: {least:.0f} points ahead of none"
        yield Bar("E6", words, f"{ahead:+.2f}", ahead >= least)
    for of, words, least in (
        (given, "the ViT alone needs 2 times the images of the ViT with teacher", 2.0),
        (cnn, "the ViT alone needs 1.5 times the images of the CNN alone", 1.5),
    ):
        one = next(
            one for one in document["multipliers"]
            if (one["of"], one["over"]) == (of, "student alone")
        )  # fmt: skip
        if one["value"] is None:
            yield Bar("E6", words, "no accuracy in common", reached=False)
            continue
        ends = f" ({one['ci95'][0]:.2f} to {one['ci95'][1]:.2f})" if one["ci95"] else ""
        yield Bar("E6", words, f"{one['value']:.2f}{ends}", one["value"] >= least)


def _likeness(found: Found) -> Iterator[Bar]:
    if not (run := found.get("evaluation")):
        return
    numbers = {one["name"]: one["numbers"] for one in run["found"]["subjects"]}
    for kind in ("weak", "strong"):
        names = f"{kind}-kd-0", f"{kind}-alone-0"
        if not all("fidelity" in numbers.get(name, {}) for name in names):
            continue
        agreement, corrupted = (
            100 * (numbers[names[0]][suite][key]["value"] - numbers[names[1]][suite][key]["value"])
            for suite, key in (("fidelity", "agreement"), ("corruptions", "mca"))
        )
        yield Bar(
            "E7", f"ViT, {kind} views: KD agrees with the teacher on 1.5 points more",
            f"{agreement:+.2f}", agreement >= 1.5,
        )  # fmt: skip
        yield Bar(
            "E7", f"ViT, {kind} views: KD loses 0.5 points at most on corrupted images",
            f"{corrupted:+.2f}", corrupted >= -0.5,
        )  # fmt: skip
    if run := found.get("robust"):
        mca = {
            one["name"]: 100 * one["numbers"]["corruptions"]["mca"]["value"]
            for one in run["found"]["subjects"]
        }
        ahead = mca["strong-known-0"] - mca["strong-alone-0"]
        words = "the same, with a teacher that has seen such views"
        yield Bar("E7", words, f"{ahead:+.2f}", ahead >= -0.5)


def _omitted(found: Found) -> Iterator[Bar]:
    if not (run := found.get("omitted")):
        return
    recall = {one["name"]: one["recall"] for one in run["found"]["subjects"] if "recall" in one}
    for name, label, least in (
        ("boot", "Ankle boot", 0.5), ("dress", "Dress", 0.5), ("cat", "cat", 0.15),
    ):  # fmt: skip
        if f"{name}-kd" not in recall:
            continue
        taught, alone = (recall[f"{name}-{side}"][label] for side in ("kd", "alone"))
        yield Bar(
            "E8", f"{label}, never shown: found {least:.0%} of the time by KD, never from labels",
            f"{taught:.1%} and {alone:.1%}", taught >= least and alone == 0,
        )  # fmt: skip


def _first_epoch(found: Found) -> Iterator[Bar]:
    for name, words, least in (
        ("first-cnn", "ResNet-8 after one epoch of Fashion-MNIST: 85 %", 0.85),
        ("first-vit", "ViT of width 64 after one epoch: 78 %", 0.78),
    ):
        if run := found.get(name):
            top1 = run["found"]["top1"]
            yield Bar("first epoch", words, f"{top1:.2%}", top1 >= least)

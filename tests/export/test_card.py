"""A card says what is known, with its uncertainty, and no name can break it."""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import re
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest

from distill import yamlio
from distill.data.images import evaluation_view
from distill.engine.run import Result
from distill.export.card import About, Data, card, facts
from distill.models.network import Description
from distill.recipe import Recipe
from tests.export.test_markdown import inlines, parsed, words

RECIPE = """
data: {name: folder, root: /home/adele/pets, eval_crop: 0.875, augment: [crop, flip], mixup: 0.2}
teachers:
  - {model: resnet56, weights: /home/adele/runs/big}
student: {model: resnet8}
objective:
  - {term: ce, weight: 0.1}
  - {term: kd, weight: {start: 0.9, end: 0.5}, temperature: 4.0}
optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.05, warmup_epochs: 5.0}
train: {epochs: 100, batch_size: 64, seed: 3}
"""
RESULT = Result(
    top1=0.87, top5=0.99, nll=0.49, ece=0.0744, epochs=100, steps=3200, seconds=18.063,
    images_per_second=3543.2, student="resnet8",
    teachers=[{"model": "resnet56", "run": "/home/adele/runs/big", "weight": 1.0,
               "parameters": 855_770, "flops": 251_000_000, "top1": 0.94, "top5": 1.0,
               "nll": 0.157, "ece": 0.0112}],
    parameters=78_042, flops=25_000_000, run="runs/pets", identity={}, warnings=[],
    baseline={"top1": 0.85, "top5": 0.98, "nll": 0.6, "ece": 0.03, "parameters": 78_042,
              "flops": 25_000_000},
    gain=0.02, gain_ci95=[0.004, 0.036],
)  # fmt: skip
PARITY = {
    "images": 64, "batches": [1, 2, 7], "max_abs": 1.9e-6, "agreement": 1.0, "accuracy": 0.87,
    "student_accuracy": 0.87, "accuracy_images": 1000, "drop": 0.0, "drop_ci95": [0.0, 0.0],
}  # fmt: skip
ROUNDED = {**PARITY, "max_abs": 0.31, "agreement": 0.985, "accuracy": 0.866, "drop": 0.004}
ROUNDED["drop_ci95"] = [-0.001, 0.009]
CLASSES = ("cat", "dog", "newt", "owl", "pig", "rat")
DATA = Data("folder", CLASSES, 32, 5000, 0, 1000, "f" * 64)
# What a file of each format is called, and how exact it is.
FILES = {
    "onnx": "model.onnx", "torch-export": "model.pt2", "safetensors": "model.safetensors",
    "timm": "config.json", "openvino": "model.xml", "executorch": "model.pte",
    "coreml": "model.mlpackage",
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>", "a | b", "c \\| d", "e\\", "``", "a `b` c", "`", "two\nlines",
    "\n---\nlicense: mit\n---\n", "\x1b[2J", "](http://x)", "![x](http://x/y.png)", "{{7*7}}",
    "{% raw %}", "a: b #", "--- x", "# x", "<!--", "</details>", "&lt;b&gt;", "*a* _b_ ~c~",
    "$$x$$",
    "\u202eturned", "\ud800", "", " ", "x" * 255, "中文 😀", "'\"", "1e-3", "no", "@ada", "[^1]",
]  # fmt: skip


def file(kind: str, name: str = "", precision: str = "fp32", parity: Any = PARITY) -> Any:
    return {
        "file": name or FILES[kind], "format": kind, "precision": precision, "bytes": 265_121,
        "sha256": "a" * 64, "parity": parity,
    }  # fmt: skip


def made(text: str = RECIPE, **changes: Any) -> About:
    """A made run, with other values for some of its parts."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    weights = Description(
        model="resnet8", arguments={}, num_classes=6, classes=CLASSES, image_size=32,
        input_size=None, mean=mean, std=std,
    )  # fmt: skip
    exported = {
        "format": 1, "run": "/home/adele/runs/pets", "student": "resnet8", "weights": "last epoch",
        "preprocessing": "graph", "opset": 20, "classes": list(CLASSES),
        "files": [
            file("onnx"), file("onnx", "model.int8.onnx", "int8", ROUNDED), file("torch-export"),
            file("safetensors"),
        ],
        "left_out": [{"format": "timm", "reason": "timm has no model resnet8"}],
        "latency": [
            {"what": "student, PyTorch eager", "batch_1_ms": 1.21, "batch_32_ms": 4.92,
             "bytes": 239_608, "reason": ""},
            {"what": "student, PyTorch compiled", "batch_1_ms": None, "batch_32_ms": None,
             "bytes": 239_608, "reason": "no compiler at /usr/local/bin/g++"},
        ],
        "environment": {"python": "3.11.7", "torch": "2.14.1", "device": "EPYC", "threads": 1},
    }  # fmt: skip
    recipe = Recipe.model_validate(yamlio.load(text)[0])
    changes["exported"] = exported | changes.get("exported", {})
    return About(recipe, RESULT, DATA, weights, None, exported)._replace(**changes)


def estimate(value: float, low: float, high: float, seeds: int = 1) -> dict[str, Any]:
    return {"value": value, "ci95": [low, high], "n": 1000, "seeds": seeds, "definition_version": 1}


def evaluation(seeds: int = 1) -> dict[str, Any]:
    """What `distill evaluate` found of the made run."""

    def subject(name: str, role: str, top1: float, **numbers: Any) -> dict[str, Any]:
        clean = {
            "top1": estimate(top1, top1 - 0.02, top1 + 0.02, seeds),
            "top5": estimate(0.99, 0.98, 1.0, seeds),
            "nll": estimate(0.49, 0.4, 0.6, seeds),
            "ece": estimate(0.0744, 0.06, 0.09, seeds),
            "temperature": estimate(1.64, 1.53, 1.76, seeds),
            "ece_scaled": estimate(0.0396, 0.03, 0.05, seeds),
        }
        return {
            "name": name, "role": role, "model": "m", "runs": [f"elsewhere/{name}"],
            "seeds": list(range(seeds)), "teacher": None, "control": None,
            "numbers": {"clean": clean, **numbers},
        }  # fmt: skip

    own = subject(
        "pets", "run", 0.87,
        fidelity={"agreement": estimate(0.9, 0.88, 0.92)},
        corruptions={"mca": estimate(0.61, 0.59, 0.63)},
    )  # fmt: skip
    own |= {"teacher": "teacher big", "control": "student alone"}
    others = [subject("teacher big", "teacher", 0.94), subject("student alone", "alone", 0.85)]
    data = {"name": "folder", "fingerprint": DATA.fingerprint, "classes": 6, "test_images": 1000}
    return {"format": 1, "data": data, "subjects": [own, *others], "comparisons": []}


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def body(text: str) -> str:
    return re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)[2]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of all tables."""
    found: list[list[list[str]]] = []
    tokens = parsed(body(text))
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open":
            found[-1].append([])
        if before.type in ("th_open", "td_open"):
            found[-1][-1].append(words(token))
    return found


def row(text: str, first: str) -> list[str]:
    return next(cells for table in tables(text) for cells in table if cells[0] == first)


def test_the_front_matter_says_what_the_hub_asks_for() -> None:
    found = front_matter(card(made()))
    assert found["license"] == "unknown"
    assert found["pipeline_tag"] == "image-classification"
    assert {"knowledge-distillation", "onnx", "safetensors"} <= set(found["tags"])
    assert "library_name" not in found
    (index,) = found["model-index"]
    assert index["name"] == "resnet8 (pets)"
    (result,) = index["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {
        "name": "image folder pets", "type": "imagefolder", "split": "test"
    }  # fmt: skip
    assert {one["name"]: one["value"] for one in result["metrics"]} == {
        "top-1": 0.87, "top-5": 0.99, "NLL": 0.49, "ECE": 0.0744
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "title", "kind", "sentence"),
    [
        ("name: webdataset, root: /home/adele/pets", "image shards pets", "webdataset", "`pets`"),
        ("name: webdataset, root: 's3://b/pets', shuffle_shards: 4", "image shards pets",
         "webdataset", "`pets`"),
        ("name: hf/adele/pets", "set adele/pets", "adele/pets", "the set `adele/pets`"),
    ],
)  # fmt: skip
def test_other_sets_are_named_as_what_they_are(
    data: str, title: str, kind: str, sentence: str
) -> None:
    text = RECIPE.replace("name: folder, root: /home/adele/pets", data)
    name = data.partition(",")[0].removeprefix("name: ")
    found = card(made(text, data=DATA._replace(name=name)))
    ((result,),) = (index["results"] for index in front_matter(found)["model-index"])
    assert result["dataset"] == {"name": title, "type": kind, "split": "test"}
    assert sentence in found
    assert "/home/adele" not in found


def test_timm_is_the_library_where_timm_can_load_it() -> None:
    exported = {"files": [file("safetensors"), file("timm")]}
    text = card(made(exported=exported))
    assert front_matter(text)["library_name"] == "timm"
    assert 'timm.create_model("hf-hub:OWNER/NAME", pretrained=True)' in text


def test_a_student_that_began_with_published_weights_says_with_which() -> None:
    text = RECIPE.replace("{model: resnet8}", "{model: timm/vit, weights: 'hf-hub:timm/vit.x@v2'}")
    text = card(made(text))
    assert front_matter(text)["base_model"] == "timm/vit.x"
    assert "It began with the weights `hf-hub:timm/vit.x@v2`." in text
    assert "and the weights that it began with.\nThe toolkit knows of no terms" in text


@pytest.mark.parametrize("images", [1, 7, 897, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.995, 1.0])
def test_the_interval_of_a_share_is_wilsons(share: float, images: int) -> None:
    right = round(share * images)
    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    found = facts.wilson(right / images, images)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_results_have_intervals_without_an_evaluation() -> None:
    text = card(made())
    low, high = (f"{100 * end:.2f}" for end in facts.wilson(0.87, 1000))
    student = row(text, "student")
    assert student[1:3] == ["resnet8", f"87.00 % [{low}, {high}]"]
    assert student[4:] == ["0.49", "7.44 %", "78,042", "25.0"]
    assert row(text, "teacher")[1] == "resnet56"
    assert row(text, "student alone")[2].startswith("85.00 % [")
    assert f"right on **87.00 %** of 1,000 test images (95 % interval {low} to {high} %)" in text
    assert "The teacher helped: +2.00 points (95 %, paired by test image: +0.40 to +3.60" in text
    assert "this is one run, of seed 3" in text
    assert "corrupted images was not measured" in text


def test_an_evaluation_gives_its_intervals_and_what_else_it_found() -> None:
    text = card(made(evaluation=evaluation()))
    assert row(text, "student")[2:6] == [
        "87.00 % [85.00, 89.00]", "99.00 % [98.00, 100.00]", "0.49 [0.4, 0.6]",
        "7.44 % [6.00, 9.00]",
    ]  # fmt: skip
    assert row(text, "teacher")[2] == "94.00 % [92.00, 96.00]"
    assert row(text, "agreement") == ["agreement", "90.00 % [88.00, 92.00]", "–", "–"]
    assert (
        "On 1,000 test images, corrupted in 15 ways at 5 severities, it is right on 61.00 %" in text
    )
    assert "It is too sure: dividing the logits by 1.64 would make that 3.96 % [3.00, 5.00]" in text
    assert "Wilson" not in text


def test_a_measure_that_only_another_version_has_is_passed_over() -> None:
    told = evaluation()
    told["subjects"][0]["numbers"]["corruptions"]["mca_seed5"] = estimate(0.5, 0.4, 0.6)
    assert card(made(evaluation=told)) == card(made(evaluation=evaluation()))


def test_the_mean_over_seeds_is_not_taken_for_this_student() -> None:
    text = card(made(evaluation=evaluation(seeds=3)))
    assert row(text, "student") == row(card(made()), "student")
    assert "Over seeds 0, 1, 2 the same training reaches 87.00 % [85.00, 89.00] in the mean" in text


def test_an_evaluation_of_other_images_or_of_other_runs_is_no_evidence() -> None:
    other = evaluation()
    other["data"]["fingerprint"] = "0" * 64
    assert card(made(evaluation=other)) == card(made())
    others = evaluation()
    others["subjects"] += [copy.deepcopy(others["subjects"][0])]
    for name, subject in zip("ab", [others["subjects"][0], others["subjects"][-1]], strict=True):
        subject |= {"name": name, "runs": [name]}
    assert card(made(evaluation=others)) == card(made())


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ([-0.036, -0.004], "The teacher hurt: +2.00"),
        ([-0.01, 0.03], "No difference is shown: +2.00"),
    ],
)
def test_the_verdict_follows_the_interval(interval: list[float], sentence: str) -> None:
    assert sentence in card(made(result=RESULT._replace(gain_ci95=interval)))


def test_without_a_baseline_nobody_claims_a_gain() -> None:
    result = RESULT._replace(baseline=None, gain=None, gain_ci95=None)
    text = card(made(result=result))
    assert "Whether the teacher helped was not measured" in text
    assert "student alone" not in text


def test_weights_without_a_result_have_a_card() -> None:
    text = card(made(result=None))
    assert "It is not recorded how good these weights are." in text
    assert "model-index" not in front_matter(text)
    assert "distilled from `resnet56`" in text


def test_the_optimiser_is_told_with_its_steps() -> None:
    assert "adamw, peak learning rate 0.001 (cosine, 5 epochs of warm-up)," in card(made())
    steps = "name: sgd, nesterov: false, schedule: step, milestones: [30, 60, 90]"
    text = card(made(RECIPE.replace("name: adamw", steps).replace("5.0}", "0}")))
    assert "- Optimiser: sgd without Nesterov momentum, peak learning rate 0.001 " in text
    assert "(step, times 0.1 after epochs 30, 60 and 90, 0 epochs of warm-up), weight" in text


def test_several_teachers_are_listed_with_their_shares() -> None:
    second = RESULT.teachers[0] | {"model": "vit", "run": "pretrained", "weight": 2.0}
    del second["top1"]
    text = card(made(result=RESULT._replace(teachers=[*RESULT.teachers, second])))
    assert "distilled from `resnet56` and `vit`" in text
    assert "- Teachers: `resnet56` (`big`) × 1 and `vit` (`pretrained`) × 2." in text
    assert [cells[2][:2] for cells in tables(text)[0][1:3]] == ["94", "–"]


def test_a_run_without_the_teacher_that_was_evaluated_too_is_the_baseline() -> None:
    found = evaluation()
    numbers = {"gain": estimate(0.02, -0.001, 0.04)}
    found["comparisons"] = [{"subject": "pets", "reference": "student alone", "numbers": numbers}]
    result = RESULT._replace(baseline=None, gain=None, gain_ci95=None)
    text = card(made(result=result, evaluation=found))
    assert "it is right on 85.00 %. No difference is shown: +2.00 points" in text
    assert "paired by test image: -0.10 to +4.00 points" in text
    assert row(text, "student alone")[2] == "85.00 % [83.00, 87.00]"


def test_two_classes_have_no_top5() -> None:
    text = card(made(data=DATA._replace(classes=("cat", "dog"))))
    assert tables(text)[0][0][2:5] == ["top-1", "NLL", "ECE"]
    assert "top-5" not in text


def test_files_are_told_with_size_and_parity() -> None:
    text = card(made(exported={"files": [file("onnx"), file("openvino", parity=None)]}))
    assert row(text, "model.onnx") == [
        "model.onnx", "onnx", "fp32", "265.1 kB", "1.9e-06", "100.00 %", "87.00 %",
        "+0.00 [+0.00, +0.00]",
    ]  # fmt: skip
    assert row(text, "model.xml")[4:] == ["–"] * 4
    assert "on 64 test images in batches of 1, 2 and 7, and on 1,000 for top-1" in text
    whole = {"images": 64, "max_abs": 0.021, "agreement": 1.0}
    text = card(made(exported={"files": [file("onnx") | {"files": whole}]}))
    assert "`model.onnx` names the student's class for 100.00 % (largest difference" in text


def test_latency_names_the_device_and_what_could_not_be_timed() -> None:
    text = card(made())
    assert row(text, "student, PyTorch eager") == [
        "student, PyTorch eager", "1.21 ms", "4.92 ms", "239.6 kB"
    ]  # fmt: skip
    assert row(text, "student, PyTorch compiled")[1:3] == ["–", "–"]
    assert "Medians on EPYC with 1 thread, python 3.11.7, torch 2.14.1." in text
    assert "Not timed: student, PyTorch compiled (no compiler at g++)." in text
    assert "Medians" not in card(made(exported={"latency": []}))


def test_limits_follow_from_the_facts() -> None:
    text = card(made())
    assert "one of its 6 classes, also an image that shows none of them" in text
    assert "`model.int8.onnx` loses 0.40 points of top-1 against float32" in text
    assert "differ by 7.44 % in the mean (ECE)" in text
    changed = RECIPE.replace(
        "mixup: 0.2", "fraction: 0.1, omit: [cat], control: permuted-labels, transfer: /x/photos"
    )
    text = card(made(changed))
    assert "trained on 10 % of the set's training images" in text
    assert "No image of `cat` was trained on." in text
    assert "its training labels were dealt out at random" in text
    assert "images without labels in place of the set's own" in text


def blocks(text: str) -> list[str]:
    return [token.content for token in parsed(body(text)) if token.info == "python"]


@pytest.mark.parametrize("preprocessing", ["graph", "sidecar"])
def test_every_format_has_a_snippet_that_is_python(preprocessing: str) -> None:
    exported = {"files": [file(kind) for kind in FILES], "preprocessing": preprocessing}
    found = blocks(card(made(exported=exported)))
    for block in found:
        ast.parse(block)
    # The image, the input, and one each; squares for those that resize no pictures, if others do.
    assert len(found) == (10 if preprocessing == "graph" else 9)
    for kind in set(FILES) - {"timm"}:
        assert any(f'"{FILES[kind]}"' in block for block in found), kind


def test_code_outside_the_toolkit_is_not_promised_to_load() -> None:
    weights = made().weights.model_copy(update={"model": "mine:network"})
    text = card(made(weights=weights))
    assert "distill.load" not in text
    assert "belong to `mine:network`, code that is not in this folder" in text


@pytest.mark.parametrize("sides", [(97, 61), (61, 97), (32, 32), (500, 333)])
def test_the_snippet_shows_the_network_what_an_evaluation_does(sides: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
    scope: dict[str, Any] = {"image": Image.fromarray(pixels), "Image": Image, "np": np}
    (block,) = [one for one in blocks(card(made(exported={"preprocessing": "sidecar"})))
                if "normalised =" in one]  # fmt: skip
    exec(block, scope)
    expected = evaluation_view(scope["image"], size=32, crop=0.875).astype(int)
    assert abs(np.asarray(scope["square"]).astype(int) - expected).max() <= 1
    assert scope["images"].shape == (1, 3, 32, 32)
    assert scope["images"].dtype == np.float32
    back = scope["images"][0].transpose(1, 2, 0) * (0.2, 0.25, 0.3) + (0.5, 0.4, 0.3)
    np.testing.assert_allclose(255 * back, np.asarray(scope["square"]), atol=1e-4)


def test_places_on_this_machine_are_not_told() -> None:
    changed = RECIPE.replace(
        "student:", "cache: {path: 's3://bucket/adele/kept', views: 2}\nstudent:"
    )
    nested = changed.replace(
        "{model: resnet56, weights: /home/adele/runs/big}",
        "{recipe: {data: {name: cifar10, root: ~/adele/data}, student: {model: resnet56, weights: "
        "'C:\\adele\\w.safetensors'}, objective: [{term: ce}], optimizer: {lr: 0.1}, "
        "train: {epochs: 1, batch_size: 8}}}",
    )
    warned = RESULT._replace(warnings=["/home/adele/runs/big: its accuracy is low"])
    for text in (card(made(changed, result=warned)), card(made(nested))):
        assert "adele" not in text
        assert "bucket" not in text
    assert "- Warning of the run: big: its accuracy is low" in card(made(changed, result=warned))


def test_the_recipe_in_the_card_is_the_recipe() -> None:
    about = made()
    (block,) = [t.content for t in parsed(body(card(about))) if t.info == "yaml"]
    found = Recipe.model_validate(yamlio.load(block)[0])
    assert found.identity() == about.recipe.identity()
    assert found.data.root == "pets"
    assert found.teachers[0].weights == "big"


def test_a_thousand_classes_are_ten_and_a_number() -> None:
    few, many = (
        card(made()),
        card(made(data=DATA._replace(classes=tuple(f"class {i}" for i in range(1000))))),
    )
    assert len(many.splitlines()) == len(few.splitlines())
    assert "`class 9` and 990 more (all of them, in the order of the logits" in many
    assert "into 1,000 classes" in many


def test_the_same_facts_give_the_same_text() -> None:
    text = card(made(evaluation=evaluation()))
    assert text == card(made(evaluation=evaluation()))
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@functools.cache
def tame() -> str:
    return card(named("tame"))


def structure(text: str) -> list[tuple[str, str]]:
    return [(token.type, token.tag) for token in parsed(body(text))]


def named(name: str) -> About:
    """The made run with a name in every place where there can be one."""
    about = made(evaluation=evaluation())
    recipe = about.recipe.model_dump()
    recipe["data"] |= {"root": f"/home/adele/{name}", "omit": [name]}
    recipe["teachers"][0] |= {"weights": name, "name": name}
    recipe["student"] |= {"model": f"mine:{name}"}
    recipe["objective"][1] |= {"term": f"mine:{name}", "name": name}
    teacher = RESULT.teachers[0] | {"model": name, "run": name}
    result = RESULT._replace(student=name, teachers=[teacher], warnings=[name], run=name)
    exported: dict[str, Any] = copy.deepcopy(dict(about.exported))
    exported |= {"run": f"runs/{name}", "student": name, "weights": name}
    exported["files"][0] |= {"file": name}
    exported["left_out"][0] |= {"reason": name}
    exported["latency"][1] |= {"what": name, "reason": name or "x"}
    exported["environment"] |= {"device": name, "torch": name}
    found = copy.deepcopy(evaluation())
    found["subjects"][0] |= {"runs": [name]}
    return about._replace(
        recipe=Recipe.model_validate(recipe),
        result=result,
        data=DATA._replace(classes=(name, *CLASSES[1:]), fingerprint=DATA.fingerprint),
        exported=exported,
        evaluation=found,
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_a_card(name: str) -> None:
    text = card(named(name))
    text.encode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert structure(text) == structure(tame())
    tokens = parsed(body(text))
    assert {t.content.strip() for t in tokens if t.type == "html_block"} == {
        t.content.strip() for t in parsed(body(tame())) if t.type == "html_block"
    }
    kinds = {child.type for child in inlines(tokens)}
    assert kinds <= {"text", "code_inline", "softbreak", "strong_open", "strong_close"}
    for before, table in zip(tables(tame()), tables(text), strict=True):
        assert [len(cells) for cells in table] == [len(cells) for cells in before]
    head, plain = front_matter(text), front_matter(tame())
    assert head.keys() == plain.keys()
    assert head["license"] == "unknown"
    assert isinstance(head["model-index"][0]["name"], str)
    for block in blocks(text):
        ast.parse(block)


def test_the_card_is_of_details_and_no_other_html() -> None:
    found = {t.content.strip() for t in parsed(body(card(made()))) if t.type == "html_block"}
    assert found == {
        "<details>\n<summary>What these numbers mean</summary>",
        "<details>\n<summary>The recipe, complete</summary>",
        "</details>",
    }

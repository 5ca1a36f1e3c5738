from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import RecipeError
from distill.recipe import Data, Optimizer, Recipe, Train, json_schema

READY = Path(__file__).parents[1] / "recipes"

TEACHER = """\
data: {name: digits}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 2, batch_size: 32}
"""
STUDENT = """\
data:
  name: digits
  augment: [crop, {name: flip, probability: 0.25}]
teachers:
  - recipe: teacher.yaml
  - model: resnet20
    weights: runs/big
    weight: 2
student: {model: vit, patch_size: 2}
objective:
  - {term: ce, weight: 0.1}
  - {term: kd, weight: {start: 0.9, end: 0.5, shape: cosine}, temperature: 4}
optimizer: {lr: 1e-3, weight_decay: 0.05}
train: {epochs: 3, batch_size: 16, seed: 1}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write the student's recipe, or another text, and its teacher's; return the first's path."""

    def put(text: str = STUDENT, teacher: str = TEACHER) -> Path:
        (tmp_path / "teacher.yaml").write_text(teacher)
        path = tmp_path / "student.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return put


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that loading ends in, without the folder."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    assert caught.value.exit_status == 2
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_sound_recipe(write: Callable[..., Path]) -> None:
    recipe = Recipe.load(write())
    assert recipe.optimizer.lr == 0.001
    assert recipe.data.augment[0].arguments == {"padding": None}
    assert recipe.data.augment[1].arguments == {"probability": 0.25}
    first, second = recipe.teachers
    assert first.recipe is not None
    assert (first.name, first.recipe.train.epochs) == ("teacher", 2)
    assert (second.model, second.weights, second.weight) == ("resnet20", "runs/big", 2.0)
    assert recipe.student.arguments["patch_size"] == 2
    assert recipe.student.arguments["position"] == "learned"  # defaults are spelled out
    assert [spec.key for spec in recipe.objective] == ["ce", "kd"]


def test_every_fault_at_once_with_its_file_line_and_key(write: Callable[..., Path]) -> None:
    path = write(
        """\
        data:
          name: digitz
          augment: [crop, flap, {name: flip, probability: 2}]
          mixup: -1
        teachers:
          - recipe: teacher.yaml
          - model: resnet20
        student: {model: vitt, patch_size: 2}
        objective:
          - {term: ce, smothing: 0.1}
          - {term: kd, temperature: 0}
        optimiser: {lr: 1e-3}
        train: {epochs: three, batch_size: 16}
        """,
        teacher=TEACHER.replace("lr: 0.1", "lr: -0.1").replace("resnet8", "resnet9"),
    )
    found = faults(path)
    for start, *parts in [
        ("student.yaml:2: data.name: ", "got 'digitz'", "did you mean 'digits'?"),
        ("student.yaml:4: data.mixup: ", "got -1"),
        ("student.yaml:7: teachers.1: ", "needs weights, or a recipe"),
        ("student.yaml:12: optimiser: ", "unknown key", "did you mean 'optimizer'?"),
        ("student.yaml:1: optimizer: ", "required"),
        ("student.yaml:13: train.epochs: ", "got 'three'"),
        ("teacher.yaml:4: teachers.0.recipe.optimizer.lr: ", "greater than 0", "got -0.1"),
        ("teacher.yaml:2: teachers.0.recipe.student.model: ", "did you mean 'resnet8'?"),
        ("student.yaml:3: data.augment.1.name: ", "unknown name 'flap'", "did you mean 'flip'?"),
        ("student.yaml:3: data.augment.2.probability: ", "got 2"),
        ("student.yaml:8: student.model: ", "unknown model 'vitt'", "did you mean 'vit'?"),
        ("student.yaml:10: objective.0.smothing: ", "did you mean 'smoothing'?"),
        ("student.yaml:11: objective.1.temperature: ", "greater than 0"),
    ]:
        (line,) = [line for line in found if line.startswith(start)]
        assert all(part in line for part in parts), line
    assert len(found) == 13


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            ("seed: 1", "seed: 1}\ntrain: {epochs: 1"),
            "student.yaml:15: train: the key stands",
        ),
        (("lr: 1e-3", "lr: fast"), "optimizer.lr: should be a valid number, got 'fast'"),
        (("lr: 1e-3", "lr: 1e999"), "1e999: too large"),
        (("lr: 1e-3", "lr: yes"), "optimizer.lr: should be a valid number, got 'yes'"),
        (("epochs: 3", "epochs: 3.0"), "train.epochs: should be a valid integer, got 3.0"),
        (("epochs: 3", "epochs: true"), "train.epochs: should be a valid integer, got True"),
        (("seed: 1", "seed: -1"), "train.seed: should be greater than or equal to 0"),
        (("model: vit,", ""), "student.model: required"),
        (("{term: ce, weight: 0.1}", "ce"), "objective.0: should be a mapping of keys"),
        (("shape: cosine", "shape: cosinus"), "objective.1.weight.shape: "),
        (("end: 0.5, ", ""), "objective.1.weight.end: required"),
        (("weight: 0.1", "weight: big"), "objective.0.weight: "),
        (("patch_size: 2", "3: 2"), "student.yaml:9: a key must be a word"),
        (("patch_size: 2", "name: 2"), "student.name: unknown key"),
        (("patch_size: 2", "weight: 2"), "student.weight: unknown key"),
        (("{term: ce, weight: 0.1}", "{term: kd}"), "a second term 'kd': give one a `name:`"),
        (("lr: 1e-3", "lr: 1e-3, warmup_epochs: 4"), "longer than the run's 3 epochs"),
        (
            ("lr: 1e-3", "lr: 1e-3, nesterov: false"),
            "student.yaml:13: optimizer.nesterov: only sgd and muon have it, and adamw has none",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step"),
            "student.yaml:13: optimizer.milestones: required for schedule: step, such as",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, milestones: [1]"),
            "student.yaml:13: optimizer.milestones: only schedule: step has them",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, gamma: 0.2"),
            "student.yaml:13: optimizer.gamma: only schedule: step has it, and this is cosine",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step, milestones: [2, 1]"),
            "optimizer.milestones.1: must be greater than the one before it, 2, got 1",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step, milestones: [1, 1]"),
            "optimizer.milestones.1: must be greater than the one before it, 1, got 1",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step, milestones: [1, 3]"),
            "optimizer.milestones.1: must be less than the run's 3 epochs, got 3",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step, milestones: [0, 1]"),
            "optimizer.milestones.0: should be greater than 0",
        ),
        (
            ("lr: 1e-3", "lr: 1e-3, schedule: step, milestones: [1], gamma: 1"),
            "optimizer.gamma: should be less than 1",
        ),
        (("name: digits", "name: cifar10"), "data.root: required for cifar10"),
        (("name: digits", "name: folder"), "data.root: required for folder"),
        (("name: digits", "name: digits\n  split_file: a"), "only a folder of images has one"),
        (("batch_size: 16", "batch_size: 15"), ""),
        (("recipe: teacher.yaml", "recipe: student.yaml"), "teachers.0.recipe: names itself"),
        (("recipe: teacher.yaml", "recipe: no.yaml"), "no.yaml: no such file"),
        (("recipe: teacher.yaml", "recipe: ."), ": is a directory"),
        (("recipe: teacher.yaml", "recipe: 3"), "teachers.0.recipe: "),
        (("recipe: teacher.yaml", "recipe: teacher.yaml\n    model: vit"), "recipe stands alone"),
        (("model: resnet20\n    weights: runs/big", "weights: pretrained"), "model is required"),
    ],
)
def test_single_faults(write: Callable[..., Path], change: tuple[str, str], fault: str) -> None:
    assert change[0] in STUDENT
    path = write(STUDENT.replace(*change))
    if not fault:
        Recipe.load(path)  # odd batches are fine while nothing is mixed
        fault, path = (
            "batch_size: must be even",
            write(STUDENT.replace(*change).replace("  augment", "  cutmix: 1.0\n  augment")),
        )
    found = faults(path)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "3", "data: 3", "teachers: {}", "objective: 3\nstudent: [1]", "a: ["]
)
def test_no_shape_of_data_ends_in_a_traceback(write: Callable[..., Path], text: str) -> None:
    assert faults(write(text))[0].startswith("student.yaml:1: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in faults(tmp_path / "none.yaml")[0]
    (tmp_path / "latin.yaml").write_bytes("data: é".encode("latin-1"))
    assert "not a text file in UTF-8" in faults(tmp_path / "latin.yaml")[0]


def test_a_term_that_needs_a_teacher_without_one(write: Callable[..., Path]) -> None:
    path = write(TEACHER.replace("term: ce", "term: kd"))
    assert faults(path) == [
        "student.yaml:3: objective.0.term: kd needs a teacher, and teachers is empty"
    ]


def test_two_teachers_in_one_run_directory(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/teacher.yaml").write_text(TEACHER.replace("epochs: 2", "epochs: 9"))
    twice = "  - recipe: teacher.yaml\n  - recipe: SECOND\n"
    text = STUDENT.replace("  - recipe: teacher.yaml\n", twice)
    found = faults(write(text.replace("SECOND", "more/teacher.yaml")))
    assert len(found) == 1
    assert "another recipe has its run in 'teacher'" in found[0]
    Recipe.load(write(text.replace("SECOND", "teacher.yaml")))  # the same one twice is one run
    Recipe.load(write(text.replace("SECOND", "more/teacher.yaml\n    name: other")))


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optimizer.lr=0.1", lambda r: r.optimizer.lr, 0.1),
        ("optimizer.lr=1e-4", lambda r: r.optimizer.lr, 1e-4),
        ("train.precision=bf16", lambda r: r.train.precision, "bf16"),
        ("data.root=~/my data", lambda r: r.data.root, "~/my data"),
        ("data.root=a=b", lambda r: r.data.root, "a=b"),
        ("optimizer.clip_norm=", lambda r: r.optimizer.clip_norm, None),
        ("objective.1.temperature=2", lambda r: r.objective[1].arguments, {"temperature": 2.0}),
        ("objective.1.weight.end=0.25", lambda r: r.objective[1].weight.end, 0.25),
        ("student.depth=3", lambda r: r.student.arguments["depth"], 3),
        ("data.augment=[flip]", lambda r: [a.name for a in r.data.augment], ["flip"]),
        ("data.augment.0=flip", lambda r: [a.name for a in r.data.augment], ["flip", "flip"]),
        ("teachers.1.weight=0.5", lambda r: r.teachers[1].weight, 0.5),
        ("teachers.0.recipe.train.epochs=7", lambda r: r.teachers[0].recipe.train.epochs, 7),
        ("teachers.0.recipe=other.yaml", lambda r: r.teachers[0].recipe.train.epochs, 9),
        ("teachers=[{recipe: other.yaml}]", lambda r: r.teachers[0].name, "other"),
        ("teachers.0.recipe=other.yaml", lambda r: r.teachers[0].name, "other"),
        ("student={model: resnet8}", lambda r: r.student.model, "resnet8"),
    ],
)
def test_set_changes_one_key(
    write: Callable[..., Path],
    tmp_path: Path,
    override: str,
    read: Callable[[Recipe], Any],
    value: Any,
) -> None:
    (tmp_path / "other.yaml").write_text(TEACHER.replace("epochs: 2", "epochs: 9"))
    assert read(Recipe.load(write(), [override])) == value


def test_changed_values_are_checked_as_those_of_a_file_are(write: Callable[..., Path]) -> None:
    recipe = Recipe.load(write())
    again = recipe.changed({"objective.1.temperature": 2.0, "optimizer.lr": 1e-4})
    assert again.objective[1].arguments["temperature"] == 2.0
    assert again.optimizer.lr == 1e-4
    assert recipe.optimizer.lr == 1e-3  # as it was
    assert recipe.changed({}) == recipe
    for change, fault in (
        ({"optimizer.lrr": 1.0}, "--set optimizer.lrr=1.0: unknown key; did you mean 'lr'?"),
        ({"objective.1.temperature": -1.0}, "--set objective.1.temperature=-1.0: "),
        ({"objective.7.weight": 1.0}, "--set objective.7.weight=1.0: objective is a list of 2"),
    ):
        with pytest.raises(RecipeError) as found:
            recipe.changed(change)
        assert str(found.value).startswith(fault)


def test_set_is_applied_in_order(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(TEACHER)
    overrides = ["teachers.0.recipe=other.yaml", "teachers.0.recipe.train.epochs=5"]
    recipe = Recipe.load(write(), overrides)
    assert recipe.teachers[0].recipe is not None
    assert recipe.teachers[0].recipe.train.epochs == 5


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("optimizer.lr", "must be KEY=VALUE"),
        ("=3", "must be KEY=VALUE"),
        ("optimizer.lr=fast", "should be a valid number, got 'fast'"),
        ("optimizer.learning_rate=1", "unknown key"),
        ("optimiser.lr=1", "unknown key; did you mean 'optimizer'?"),
        ("optimizer.lr.x=1", "optimizer.lr has no keys below it"),
        ("objective.2.weight=1", "objective is a list of 2, counted from 0; got 2"),
        ("objective.-1.weight=1", "objective is a list of 2"),
        ("objective.kd.weight=1", "objective is a list of 2, counted from 0; got 'kd'"),
        ("objective.².weight=1", "objective is a list of 2"),
        ("student.2=1", "student.2"),
        ("train.epochs=[", "--set train.epochs=["),
        ("train.epochs=!!python/name:os.system", "not allowed"),
        ("train.epochs=\udcff", "not allowed"),
        ("teachers.0.recipe=none.yaml", "none.yaml: no such file"),
        ("teachers.0.recipe=student.yaml", "names itself"),
        ("student.model=resnet_20", "did you mean 'resnet20'?"),
    ],
)
def test_set_that_is_wrong_says_so(write: Callable[..., Path], override: str, fault: str) -> None:
    found = faults(write(), override)
    assert fault in found[0]


def test_the_complete_recipe_is_loaded_again(write: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.load(write())
    copy = tmp_path / "elsewhere" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(recipe.to_yaml())  # the teacher's recipe is inside, no second file is needed
    assert Recipe.load(copy) == recipe
    assert Recipe.load(copy).digest() == recipe.digest()
    assert Recipe.load(copy).to_yaml() == recipe.to_yaml()


def test_the_digest_knows_no_places(write: Callable[..., Path], tmp_path: Path) -> None:
    text = STUDENT.replace("name: digits", "name: folder\n  root: here\n  split_file: a.csv", 1)
    text = text.replace("model: vit,", "model: vit, weights: runs/start,")
    one = Recipe.load(write(text)).digest()
    (tmp_path / "moved.yaml").write_text(TEACHER)
    moved = [
        "data.root=there",
        "data.split_file=b.csv",
        "data.download=true",
        "train.deterministic=true",
        "teachers.0.recipe=moved.yaml",
        "teachers.0.recipe.data.root=there",
        "teachers.1.weights=copy/big",
        "student.weights=copy/start",
    ]
    for i in range(len(moved)):
        assert Recipe.load(write(text), moved[i : i + 1]).digest() == one
    assert Recipe.load(write(text), moved).digest() == one


CHANGES = [
    "data.name=fashion-mnist",
    "data.image_size=16",
    "data.eval_crop=0.9",
    "data.augment=[crop]",
    "data.decoder=fast",
    "data.augment.1.probability=0.5",
    "data.mixup=0.1",
    "data.cutmix=0.1",
    "data.fraction=0.5",
    "data.omit=['3']",
    "data.val=0.1",
    "data.on_bad_image=skip",
    "data.shuffle_shards=2",
    "data.control=permuted-labels",
    "data.max_pixels=7",
    "data.seed=1",
    "teachers=[]",
    "teachers.0.weight=2",
    "teachers.0.recipe.train.epochs=3",
    "teachers.0.recipe.data.seed=3",
    "teachers.1.model=resnet32",
    "teachers.1.weights=pretrained",
    "teachers.1.weights=hf-hub:a/b",
    "teachers.1.weight=1",
    "teachers.1.input_size=48",
    "generations=2",
    "student={model: resnet8}",
    "student.patch_size=4",
    "student.weights=runs/a",
    "student.weights=pretrained",
    "objective=[{term: ce}, {term: hard}]",
    "objective.0.smoothing=0.1",
    "objective.0.weight=0.2",
    "objective.1.weight.shape=linear",
    "objective.1.temperature=5",
    "objective.1.name=soft",
    "objective.1.teacher=1",
    "optimizer.name=sgd",
    "optimizer.lr=0.2",
    "optimizer.momentum=0.8",
    "optimizer.nesterov=false",
    "optimizer.weight_decay=0",
    "optimizer.decay=all",
    "optimizer.warmup_epochs=1",
    "optimizer.schedule=linear",
    "optimizer.milestones=[1]",
    "optimizer.gamma=0.5",
    "optimizer.clip_norm=1",
    "train.epochs=4",
    "train.batch_size=8",
    "train.precision=bf16",
    "train.ema=0.5",
    "train.sync_batchnorm=true",
    "train.eval_epochs=2",
    "train.seed=2",
]


def test_the_digest_knows_everything_else(write: Callable[..., Path]) -> None:
    base = ["data.root=here", "objective.1.weight.shape=cosine"]
    path = write()
    needs_no_teacher = ["objective=[{term: ce}]"]
    needs = {
        "optimizer.nesterov=false": ["optimizer.name=sgd"],
        "optimizer.milestones=[1]": ["optimizer.schedule=step"],
        "optimizer.gamma=0.5": ["optimizer.schedule=step", "optimizer.milestones=[1]"],
    }
    digests = {Recipe.load(path, base).digest()}
    for change in CHANGES:
        more = needs_no_teacher if change == "teachers=[]" else needs.get(change, [])
        if "pretrained" in change and change.startswith("student"):
            more = ["student={model: timm/vit_tiny_patch16_224}"]
            digests.add(Recipe.load(path, [*base, *more]).digest())
        if change == "data.shuffle_shards=2":
            more = ["data.name=webdataset"]
            digests.add(Recipe.load(path, [*base, *more]).digest())
        digests.add(Recipe.load(path, [*base, *more, change]).digest())
    assert len(digests) == len(CHANGES) + 3
    places = {"root", "download", "split_file", "transfer", "manifest", "max_bad"}
    places.add("deterministic")  # of last bits, which checkpoints compare
    for name, section in {"data": Data, "optimizer": Optimizer, "train": Train}.items():
        touched = {c.partition("=")[0].split(".")[1] for c in CHANGES if c.startswith(f"{name}.")}
        assert touched == set(section.model_fields) - places


def test_a_key_of_a_later_version_that_says_nothing_new_leaves_the_digest(
    write: Callable[..., Path],
) -> None:
    path = write()
    assert Recipe.load(path).digest() == (
        "d37481f0f3bb79224bb741661a2919f2811d8d342e73a8dc28fe26efe6ea9c0e"
    )
    for change in ("optimizer.nesterov=true", "optimizer.milestones=[]", "optimizer.gamma=0.1"):
        spelled = [change, f"teachers.0.recipe.{change}"]
        assert Recipe.load(path, spelled).digest() == Recipe.load(path).digest()


@settings(deadline=None, max_examples=50)
@given(st.permutations(sorted(["data", "teachers", "student", "objective", "optimizer", "train"])))
def test_the_digest_does_not_depend_on_the_order_of_keys(
    tmp_path_factory: pytest.TempPathFactory, order: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "a.yaml").write_text(STUDENT)
    sections: dict[str, list[str]] = {}
    for line in STUDENT.splitlines(keepends=True):
        if not line.startswith(" "):
            sections[line.partition(":")[0]] = []
        sections[list(sections)[-1]].append(line)
    (folder / "b.yaml").write_text("".join("".join(sections[key]) for key in order))
    assert Recipe.load(folder / "b.yaml").digest() == Recipe.load(folder / "a.yaml").digest()


def test_a_whole_number_is_the_same_as_its_float(write: Callable[..., Path]) -> None:
    path = write()
    one, two = (
        Recipe.load(path, [f"optimizer.lr={x}", f"objective.1.temperature={x}"]).digest()
        for x in ("1", "1.0")
    )
    assert one == two


def test_the_run_without_teacher(write: Callable[..., Path]) -> None:
    recipe = Recipe.load(write())
    alone = recipe.without_teacher()
    assert alone.teachers == []
    assert [(spec.term, spec.weight) for spec in alone.objective] == [("ce", 1.0)]
    assert (alone.student, alone.data, alone.train) == (recipe.student, recipe.data, recipe.train)
    only_teacher = Recipe.load(write(), ["objective=[{term: kd}]"])
    assert [spec.term for spec in only_teacher.without_teacher().objective] == ["ce"]


def test_the_schema_knows_every_key(write: Callable[..., Path]) -> None:
    schema = json_schema()
    json.dumps(schema)
    definitions = schema["$defs"]
    assert set(definitions["Recipe"]["properties"]) == set(Recipe.model_fields)
    for section, key, name, argument in [
        ("TermSpec", "term", "kd", "temperature"),
        ("Model", "model", "vit", "patch_size"),
        ("Teacher", "model", "vit", "patch_size"),
    ]:
        (rule,) = [
            branch["then"]
            for branch in definitions[section]["allOf"]
            if branch["if"]["properties"][key] == {"const": name}
        ]
        assert argument in rule["properties"]
    crop = definitions["Augmentation"]["anyOf"][1]["allOf"]
    assert {b["if"]["properties"]["name"]["const"] for b in crop} >= {"crop", "flip"}

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if "$ref" in node else set()
            return own.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    assert references(schema) <= {f"#/$defs/{name}" for name in definitions}


@pytest.mark.parametrize("path", sorted(READY.rglob("*.yaml")), ids=lambda p: p.stem)
def test_ready_recipes_are_sound_and_say_what_they_are(path: Path) -> None:
    recipe = Recipe.load(path)
    assert len(recipe.digest()) == 64
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_a_term_names_one_of_several_teachers(write: Callable[..., Path]) -> None:
    path = write()
    named = "teachers.0.name=first"
    by_name = Recipe.load(path, [named, "objective.1.teacher=first"])
    by_number = Recipe.load(path, [named, "objective.1.teacher=0"])
    assert by_name.objective[1].teacher == by_number.objective[1].teacher == 0
    with pytest.raises(RecipeError, match=r"no teacher is named 'fist'; did you mean 'first'\?"):
        Recipe.load(path, [named, "objective.1.teacher=fist"])
    with pytest.raises(RecipeError, match="there are 2 teachers, counted from 0"):
        Recipe.load(path, ["objective.1.teacher=2"])

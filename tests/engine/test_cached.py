"""Training from a cache is training with the live teacher on the same views."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill import yamlio
from distill.cache import read, verify, write
from distill.cache.store import Folder
from distill.data import datasets
from distill.engine import machine
from distill.engine.jobs import Settings, build_jobs
from distill.engine.precompute import Built, precompute
from distill.engine.session import prepare
from distill.engine.step import train_step
from distill.engine.train import train, train_teachers
from distill.errors import (
    DamagedError,
    DivergedError,
    IdentityError,
    IncompatibleError,
    IncompleteError,
    RecipeError,
)
from distill.recipe import Recipe

EVERYTHING = [{"name": name} for name in ("crop", "flip", "color_jitter", "randaugment", "erase")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sections(**keys: Any) -> dict[str, Any]:
    """A student's recipe with a trained teacher, as plain data."""
    recipe = {
        "data": {
            "name": "digits",
            "fraction": 0.3,
            "augment": EVERYTHING,
            "mixup": 0.5,
            "cutmix": 1.0,
        },
        "teachers": [{"recipe": "teacher.yaml"}],
        "student": {"model": "vit", "width": 16, "depth": 1, "heads": 2},
        "objective": [
            {"term": "ce", "weight": 0.3},
            {"term": "kd", "weight": 0.7, "temperature": 3},
        ],
        "cache": {"views": 3},
        "optimizer": {"lr": 2e-3},
        "train": {"epochs": 5, "batch_size": 32},
    }
    return recipe | keys


TEACHER = {
    "data": {"name": "digits", "fraction": 0.3},
    "student": {"model": "resnet8"},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 3, "batch_size": 16},
}


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the teacher's recipe."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "teacher.yaml").write_text(yamlio.dump(TEACHER))
    train(Recipe.load(folder / "teacher.yaml"), folder / "teacher")
    return folder / "teacher"


@pytest.fixture
def load(tmp_path: Path, teacher_run: Path) -> Callable[..., Recipe]:
    """Write the recipe, its teacher's run beside it, and load it."""
    shutil.copytree(teacher_run, tmp_path / "teacher", dirs_exist_ok=True)
    (tmp_path / "teacher.yaml").write_text(yamlio.dump(TEACHER))

    def put(*overrides: str, **keys: Any) -> Recipe:
        path = tmp_path / "student.yaml"
        path.write_text(yamlio.dump(sections(**keys)))
        return Recipe.load(path, overrides)

    return put


def build(recipe: Recipe, path: Path, **settings: Any) -> Built:
    """Make the caches of the recipe at `path`, whose teachers' runs lie beside it."""
    here = machine.setup(workers=0)
    with machine.stop_request() as stop:
        train_teachers(recipe, path.parent / "student", here, parts=1)
        dataset = datasets.load(recipe.data)
        jobs = build_jobs(recipe, str(path), path.parent / "student", dataset, here)
        return precompute(recipe, jobs, dataset, here, stop, Settings(**settings))


def losses(recipe: Recipe, run: Path, steps: int = 20) -> tuple[list[float], list[torch.Tensor]]:
    """The loss of the first steps, and what the teacher said in each."""
    here = machine.setup(workers=0)
    session = prepare(recipe, run, here)
    found, told = [], []
    for epoch in range(recipe.train.epochs):
        for batch in session.loader.epoch(epoch):
            if len(found) == steps:
                break
            done = train_step(
                session.model,
                session.teacher,
                session.optimizer,
                batch,
                weights=session.distiller.objective.weights_at(0.5),
            )
            found.append(float(done.losses.total))
            assert done.told is not None
            told.append(done.told.logits)
    session.close()
    return found, told


def kl(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    log_p, log_q = (torch.cat(z).double().log_softmax(dim=-1) for z in (one, other))
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def require_alike(live: Recipe, cached: Recipe, folder: Path, limit: float = 1e-4) -> None:
    expected, said = losses(live, folder / "student")
    found, told = losses(cached, folder / "student")
    assert len(expected) == 20
    assert kl(said, told) <= limit
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_a_cache_says_what_the_live_teacher_says_of_every_view(
    load: Callable[..., Recipe], tmp_path: Path, codec: str
) -> None:
    """Crop, flip, colour, RandAugment, mixup and cutmix; what is erased the student alone sees."""
    recipe = load(f"cache.codec={codec}", f"cache.path={tmp_path / 'tc'}")
    built = build(recipe, tmp_path / "tc")
    assert built.complete
    require_alike(load(), recipe, tmp_path, 1e-4 if codec == "int8" else 1e-7)


def photographs(root: Path, classes: int = 4, count: int = 20) -> Path:
    """A folder of JPEGs of many shapes, smooth enough to be compressed, in train and test."""
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 5)):
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(images):
                height, width = generator.integers(40, 90, 2)
                coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((int(width), int(height)), 3)
                image.save(root / split / f"class{label}" / f"{i}.jpg", quality=85)
    return root


def test_an_image_folder_is_answered_view_by_view(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    root = photographs(tmp_path / "photos")
    data = {
        "name": "folder",
        "root": str(root),
        "image_size": 32,
        "augment": ["resized_crop", "flip", "randaugment", "erase"],
        "mixup": 0.8,
    }
    teacher = TEACHER | {"data": {"name": "folder", "root": str(root), "image_size": 48}}
    (tmp_path / "photo-teacher.yaml").write_text(yamlio.dump(teacher))
    keys = {
        "data": data,
        "teachers": [{"recipe": "photo-teacher.yaml"}],
        "train": {"epochs": 10, "batch_size": 32},
    }
    recipe = load(f"cache.path={tmp_path / 'tc'}", **keys)
    build(recipe, tmp_path / "tc", views_per_read=2, batch_size=7)
    require_alike(load(**keys), recipe, tmp_path)
    again = tmp_path / "again"
    build(load(f"cache.path={again}", **keys), again, views_per_read=3, batch_size=7)
    for name, content in listing(tmp_path / "tc").items():
        # Other views in a batch change the last bits of a float, and by them a code by one step.
        if not name.startswith("views"):
            assert listing(again)[name] == content or name == "index.json"


def test_parts_and_repetition_leave_no_trace(load: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    build(load(), whole, unit_rows=64, views_per_read=2)
    expected = listing(whole)
    for parts in (2, 5):
        path = tmp_path / f"parts{parts}"
        for number in [*range(parts, 0, -1), 1]:
            built = build(load(), path, unit_rows=64, views_per_read=2, shard=(number, parts))
        assert built.complete
        assert built.units == 0  # the last one found its part done
        assert listing(path) == expected


@pytest.mark.parametrize("batch_size", [1, 10, 77])
def test_any_batch_size_gives_the_same_answers(
    load: Callable[..., Recipe], tmp_path: Path, batch_size: int
) -> None:
    answers = []
    for size, name in ((128, "one"), (batch_size, "other")):
        recipe = load(f"cache.path={tmp_path / name}")
        build(recipe, tmp_path / name, batch_size=size)
        answers.append(losses(recipe, tmp_path / "student"))
    np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-4)
    assert kl(answers[0][1], answers[1][1]) < 1e-6


def test_another_temperature_or_student_reads_the_same_cache(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path), tmp_path / "tc")
    before = listing(tmp_path / "tc")
    known = write.read_manifest(Folder(tmp_path / "tc"))
    assert known is not None
    for change in (
        "objective.1.temperature=1",
        "objective.1.temperature=12",
        "student={model: resnet8}",
        "optimizer.lr=0.1",
        "train.seed=4",
        "train.batch_size=24",
        "train.epochs=2",
        "data.augment.4.probability=0.9",  # of erasing, which the teacher does not see
        "data.augment=[crop, flip, color_jitter, randaugment]",
    ):
        session = prepare(load(path, change), tmp_path / "student", machine.setup(workers=0))
        assert session.identity["cache"] == [known.id]
        batch = next(session.loader.epoch(0))
        assert batch.cached is not None
        assert {tutor.network for tutor in session.tutors} == {None}  # nobody is asked live
        session.close()
    assert listing(tmp_path / "tc") == before


def test_a_cache_of_other_images_is_refused(load: Callable[..., Recipe], tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", classes=3, count=6)
    data = {"name": "folder", "root": str(root), "image_size": 24, "augment": ["flip"]}
    teacher = TEACHER | {"data": data}
    (tmp_path / "photo-teacher.yaml").write_text(yamlio.dump(teacher))
    keys = {
        "data": data,
        "teachers": [{"recipe": "photo-teacher.yaml"}],
        "train": {"epochs": 2, "batch_size": 9},
    }
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path, **keys), tmp_path / "tc")
    other = tmp_path / "other"

    def refused(change: Callable[[Path], Any], field: str, *more: str) -> None:
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(root, other)
        change(other)
        recipe = load(path, f"data.root={other}", *more, **keys)
        with pytest.raises(IdentityError, match=field) as caught:
            prepare(recipe, tmp_path / "student", machine.setup(workers=0))
        assert caught.value.exit_status == 4

    shutil.copytree(root, other)
    prepare(
        load(path, f"data.root={other}", **keys), tmp_path / "student", machine.setup(workers=0)
    ).close()
    first = "train/class0/0.jpg"
    refused(lambda o: (o / first).rename(o / "train/class0/00.jpg"), r"data\.images")
    refused(lambda o: (o / first).write_bytes((o / first).read_bytes() + b"\0"), r"data\.images")
    refused(lambda o: (o / "test/class0/9.jpg").write_bytes((o / first).read_bytes()), "images")

    def replace_all(o: Path) -> None:
        """Other pictures under the same names and of the same sizes: no setting tells."""
        for file in sorted((o / "train").rglob("*.jpg")):
            size = file.stat().st_size
            stream = io.BytesIO()
            with Image.open(file) as image:
                Image.new("RGB", image.size, "red").save(stream, "JPEG", quality=20)
            assert len(stream.getvalue()) < size
            file.write_bytes(stream.getvalue().ljust(size, b"\0"))

    refused(replace_all, "the teacher would say something else today")

    def rename_class(o: Path) -> None:
        for split in ("train", "test"):
            (o / split / "class0").rename(o / split / "zero")

    # The teacher itself would refuse other classes; without it the cache does.
    refused(rename_class, r"data\.classes.*data\.images", "teachers=[]")


def test_without_the_teacher_a_cache_stands_for_it(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Who has the cache and the images needs neither the teacher nor its recipe."""
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path), tmp_path / "tc")
    expected = train(load(path), tmp_path / "student")
    shutil.rmtree(tmp_path / "teacher")
    alone = train(load(path, "teachers=[]"), tmp_path / "alone")
    assert (tmp_path / "alone" / "student.safetensors").read_bytes() == (
        tmp_path / "student" / "student.safetensors"
    ).read_bytes()
    assert alone.top1 == expected.top1
    told, known = alone.teachers[0], expected.teachers[0]
    assert told["run"] is None
    assert {key: told[key] for key in ("model", "parameters", "flops", "top1", "nll")} == {
        key: known[key] for key in ("model", "parameters", "flops", "top1", "nll")
    }
    with pytest.raises(IdentityError, match=r"views\.seed"):
        train(load(path, "teachers=[]", "data.seed=2"), tmp_path / "other")
    with pytest.raises(RecipeError, match="kd needs a teacher"):
        load("teachers=[]")


def test_pixels_that_changed_are_refused_where_no_teacher_can_be_asked(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    build(load(path), tmp_path / "tc")
    from distill.data.augment.flip import Flip

    # Another version of the views whose author forgot to count it.
    monkeypatch.setattr(Flip, "plan", lambda self, u, **_: {"flip": u[:, 0] >= self.probability})
    for teachers in ("teachers=[]", "train.epochs=4"):
        with pytest.raises(IdentityError, match="other pixels"):
            prepare(load(path, teachers), tmp_path / "student", machine.setup(workers=0))


def test_a_smaller_training_set_is_served_where_nothing_is_mixed(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    plain = ["data.mixup=0", "data.cutmix=0"]
    build(load(path, *plain), tmp_path / "tc")
    less = [*plain, "data.fraction=0.15", "train.epochs=8"]
    require_alike(load(*less), load(path, *less), tmp_path)
    with pytest.raises(IdentityError, match="not among them"):
        prepare(
            load(path, *plain, "data.fraction=0.4"), tmp_path / "student", machine.setup(workers=0)
        )


def test_a_codec_that_cuts_the_tail_is_refused_by_terms_that_read_it(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    with pytest.raises(IncompatibleError, match="keeps 3 of them"):  # before the long work
        build(load(path, "cache.codec=topk:3"), tmp_path / "tc")
    assert not (tmp_path / "tc").exists()
    sharp = ["cache.codec=topk:3", "objective.1.temperature=1"]
    assert build(load(path, *sharp), tmp_path / "tc").complete
    with pytest.raises(IncompatibleError, match="keeps 3 of them: above temperature 1") as caught:
        prepare(load(path), tmp_path / "student", machine.setup(workers=0))
    assert "int8" in caught.value.hint
    for term in ("{term: kd, temperature: 1}", "{term: hard}"):
        recipe = load(path, f"objective.1={term}")
        prepare(recipe, tmp_path / "student", machine.setup(workers=0)).close()
    # A K of all classes cuts nothing.
    other = f"cache.path={tmp_path / 'all'}"
    build(load(other, "cache.codec=topk:10"), tmp_path / "all")
    require_alike(load(), load(other, "cache.codec=topk:10"), tmp_path)


def test_views_that_are_not_there_are_said_to_be_missing(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = f"cache.path={tmp_path / 'tc'}"
    here = machine.setup(workers=0)
    with pytest.raises(IncompleteError, match="there is no cache") as caught:
        prepare(load(path), tmp_path / "student", here)
    assert caught.value.exit_status == 3
    build(load(path), tmp_path / "tc")
    with pytest.raises(IncompleteError, match=r"has 3 views .* reads 4") as caught:
        prepare(load(path, "cache.views=4"), tmp_path / "student", here)
    assert "--views 4" in caught.value.hint
    unit = tmp_path / "tc" / "views" / "v0001" / "u00000.safetensors"
    content = unit.read_bytes()
    unit.unlink()
    with pytest.raises(IncompleteError, match=r"1 of 4 units are still missing.*v0001"):
        prepare(load(path), tmp_path / "student", here)
    # More views are added to those that are there.
    before = listing(tmp_path / "tc")
    built = build(load(path, "cache.views=5"), tmp_path / "tc")
    assert built.units == 3
    after = listing(tmp_path / "tc")
    assert after["views/v0001/u00000.safetensors"] == content
    assert {n: after[n] for n in before if n.startswith("views")} == {
        n: before[n] for n in before if n.startswith("views")
    }


def test_what_was_altered_is_not_trained_on(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load(f"cache.path={tmp_path / 'tc'}")
    build(recipe, tmp_path / "tc")
    unit = tmp_path / "tc" / "views" / "v0002" / "u00000.safetensors"
    content = bytearray(unit.read_bytes())
    content[-5] ^= 1
    unit.write_bytes(content)
    with pytest.raises(DamagedError, match=r"v0002.*changed after it was written") as caught:
        train(recipe, tmp_path / "student")
    assert caught.value.exit_status == 5
    text = (tmp_path / "student" / "metrics.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert max(row["epoch"] for row in rows) == 2  # the views before it were sound


@pytest.mark.parametrize("mean", ["probability", "logit"])
def test_an_ensemble_has_a_cache_for_each_teacher(
    load: Callable[..., Recipe], tmp_path: Path, mean: str
) -> None:
    """Each with its own input size and normalisation; weights are no part of any."""
    other = TEACHER | {
        "data": {"name": "digits", "fraction": 0.3, "image_size": 16},
        "student": {"model": "vgg8"},
        "train": {"epochs": 1, "batch_size": 32},
    }
    (tmp_path / "wide.yaml").write_text(yamlio.dump(other))
    keys = {
        "teachers": [{"recipe": "teacher.yaml"}, {"recipe": "wide.yaml", "weight": 2}],
        "ensemble": mean,
    }
    recipe = load(f"cache.path={tmp_path / 'tc'}", **keys)
    built = build(recipe, tmp_path / "tc")
    assert [teacher["name"] for teacher in built.teachers] == ["teacher", "wide"]
    assert {path.name for path in (tmp_path / "tc").iterdir()} == {"teacher", "wide"}
    require_alike(load(**keys), recipe, tmp_path)
    weighted = load(f"cache.path={tmp_path / 'tc'}", "teachers.1.weight=0.1", **keys)
    require_alike(load("teachers.1.weight=0.1", **keys), weighted, tmp_path)
    # One of the two alone is a cache like any other.
    one = load(f"cache.path={tmp_path / 'tc' / 'teacher'}")
    require_alike(load(), one, tmp_path)


RELATION = [{"term": "similarity", "weight": 50}, {"term": "kd", "temperature": 2}]


def test_features_come_from_the_cache_or_from_the_live_teacher(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    live = load(objective=RELATION)
    kept = load(
        f"cache.path={tmp_path / 'tc'}", "cache.features=[pooled, layer1]", objective=RELATION
    )
    built = build(kept, tmp_path / "tc")
    manifest = write.read_manifest(Folder(tmp_path / "tc"))
    assert manifest is not None
    shapes = manifest.identity["features"]
    assert shapes["pooled"] == [64]
    assert len(shapes["layer1"]) == 3
    assert built.complete
    require_alike(live, kept, tmp_path)
    bare = load(f"cache.path={tmp_path / 'bare'}", objective=RELATION)
    build(bare, tmp_path / "bare")
    require_alike(live, bare, tmp_path)
    with pytest.raises(IncompatibleError, match="which the cache does not hold"):
        prepare(
            load(f"cache.path={tmp_path / 'bare'}", "teachers=[]", objective=RELATION),
            tmp_path / "student",
            machine.setup(workers=0),
        )
    with pytest.raises(IncompatibleError, match="no module 'layer9'"):
        build(load("cache.features=[layer9]"), tmp_path / "none")


def test_features_that_are_too_large_are_left_to_the_live_teacher(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.engine.cached.FEATURE_BYTES", 100)
    monkeypatch.setattr("distill.engine.cached.FEATURES_BYTES", 1000)
    with pytest.raises(IncompatibleError, match="pooled takes 128 bytes") as caught:
        build(load("cache.features=[pooled]"), tmp_path / "tc")
    assert "runs live" in caught.value.hint
    assert not (tmp_path / "tc").exists()


def test_training_fills_the_cache_that_a_job_would_have_made(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    built = load(f"cache.path={tmp_path / 'tc'}")
    build(built, tmp_path / "tc")
    filled = load("cache.fill=true")
    train(filled, tmp_path / "filled")
    train(built, tmp_path / "read")
    weights = [(tmp_path / run / "student.safetensors").read_bytes() for run in ("filled", "read")]
    cache = tmp_path / "filled" / "cache"
    manifests = [(path / "manifest.json").read_bytes() for path in (cache, tmp_path / "tc")]
    assert manifests[0] == manifests[1]
    # The batches differ, and with them now and then the last bit of a float.
    require_alike(built, load(f"cache.path={cache}"), tmp_path, 1e-6)
    assert (
        read.samples(Folder(cache))["train"].tolist()
        == datasets.load(filled.data).train_ids.tolist()
    )
    assert weights[0] == weights[1] or listing(cache) != listing(tmp_path / "tc")


def test_a_cache_that_was_half_filled_is_gone_on_with(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = load("cache.fill=true", f"cache.path={tmp_path / 'whole'}")
    train(whole, tmp_path / "student")
    part = load("cache.fill=true", f"cache.path={tmp_path / 'part'}", "train.epochs=2")
    train(part, tmp_path / "first")
    store = Folder(tmp_path / "part")
    manifest = write.read_manifest(store)
    assert manifest is not None
    assert [unit.part for unit in write.missing(store, manifest)] == ["test", "views/v0002"]
    again = load("cache.fill=true", f"cache.path={tmp_path / 'part'}")
    train(again, tmp_path / "second")
    assert not write.missing(store, manifest)
    assert read.Reader(store, manifest, num_views=3).complete(2)


def test_images_without_labels_teach_by_the_cache_alone(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Training knows no label: the same images under other folders train the same student."""
    root = photographs(tmp_path / "photos", classes=3, count=8)
    loose = tmp_path / "loose"
    (loose / "deeper").mkdir(parents=True)
    for i, file in enumerate(sorted((root / "train").rglob("*.jpg"))):
        shutil.copy(file, loose / "deeper" / f"{i:03d}.jpg")
    data = {"name": "folder", "root": str(root), "image_size": 24, "augment": ["flip"]}
    (tmp_path / "photo-teacher.yaml").write_text(yamlio.dump(TEACHER | {"data": data}))
    keys = {
        "data": data | {"transfer": str(loose), "mixup": 0.3},
        "teachers": [{"recipe": "photo-teacher.yaml"}],
        "objective": [{"term": "kd", "temperature": 2}],
        "train": {"epochs": 10, "batch_size": 12},
    }
    recipe = load(f"cache.path={tmp_path / 'tc'}", **keys)
    build(recipe, tmp_path / "tc")
    require_alike(load(**keys), recipe, tmp_path)
    shutil.rmtree(root / "train")  # the classes are known by the test split
    shutil.rmtree(tmp_path / "photo-teacher")
    result = train(
        load(f"cache.path={tmp_path / 'tc'}", "teachers=[]", **keys), tmp_path / "unlabelled"
    )
    assert result.top1 >= 0
    with pytest.raises(RecipeError, match="ce needs labels"):
        load(**(keys | {"objective": [{"term": "ce"}, {"term": "kd"}]}))
    with pytest.raises(RecipeError, match="nothing to learn from"):
        train(recipe, tmp_path / "student", baseline=True)


def test_answers_that_are_not_finite_are_not_kept(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(f"cache.path={tmp_path / 'tc'}")
    from distill.engine import precompute as module

    tell, calls = module.tell, []

    def broken(*arguments: Any) -> Any:
        outputs = tell(*arguments)
        calls.append(1)
        if len(calls) == 9:
            outputs.logits[3, 0] = torch.nan
        return outputs

    monkeypatch.setattr(module, "tell", broken)
    with pytest.raises(DivergedError, match="1 images are not finite"):
        build(recipe, tmp_path / "tc", views_per_read=1)
    store = Folder(tmp_path / "tc")
    manifest = write.read_manifest(store)
    assert manifest is not None
    assert verify.full(store, manifest) == []
    assert write.missing(store, manifest)


def test_a_code_too_coarse_for_the_teacher_is_refused(
    load: Callable[..., Recipe], tmp_path: Path, teacher_run: Path
) -> None:
    """One class that is all but impossible takes the range that the others need."""
    from distill.models import weights

    network = weights.load(teacher_run)
    with torch.no_grad():
        network.backbone.fc.bias[4] -= 3000  # type: ignore[union-attr, operator]
    file = tmp_path / "wide.safetensors"
    file.write_bytes(weights.to_bytes(network))
    keys = {"teachers": [{"weights": str(file)}]}
    with pytest.raises(
        IncompatibleError, match="int8 would change this teacher's answers"
    ) as caught:
        build(load(f"cache.path={tmp_path / 'tc'}", **keys), tmp_path / "tc")
    assert caught.value.hint == "--codec fp16"
    assert not (tmp_path / "tc").exists()
    recipe = load(f"cache.path={tmp_path / 'tc'}", "cache.codec=fp16", **keys)
    build(recipe, tmp_path / "tc")
    require_alike(load(**keys), recipe, tmp_path)


def test_lost_canaries_are_made_again(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load(f"cache.path={tmp_path / 'tc'}")
    build(recipe, tmp_path / "tc")
    before = listing(tmp_path / "tc")
    file = tmp_path / "tc" / "canaries.safetensors"
    for at in (3, 100, len(file.read_bytes()) // 2, -1):  # a byte of the header, of a position, ...
        content = bytearray(before[file.name])
        content[at] ^= 64
        file.write_bytes(content)
        with pytest.raises(DamagedError, match="canaries"):
            prepare(recipe, tmp_path / "student", machine.setup(workers=0))
    file.unlink()
    (tmp_path / "tc" / "index.json").unlink()
    build(recipe, tmp_path / "tc")
    assert listing(tmp_path / "tc") == before

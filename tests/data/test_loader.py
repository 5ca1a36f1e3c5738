from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shards import samples, tar

from distill.data import augment, datasets, encoded, images, mixing, views
from distill.data.datasets import Dataset, Source
from distill.data.folder import Entry, Images
from distill.data.loader import Loader, evaluation_batches
from distill.errors import IncompatibleError, PreflightError
from distill.recipe import Data
from distill.types import Batch
from tests.promises import Measured

CPU = torch.device("cpu")
EVERYTHING = ["crop", "flip", "randaugment", "color_jitter", "erase"]


def dataset(source: Source, size: int, *, left_out: int = 5) -> Dataset:
    ids = np.arange(len(source))
    return Dataset(
        name="test",
        classes=("ant", "bee", "cat", "dog"),
        train=source,
        test=source,
        train_ids=ids[left_out:],
        val_ids=ids[:left_out],
        image_size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        max_pixels=10**6,
        bad=(),
        content="",
        fingerprint="",
    )


def in_memory(num: int = 131, size: int = 16, channels: int = 3) -> Dataset:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return dataset(Source(generator.integers(0, 4, num), pixels, None), size)


def in_folder(folder: Path, files: Sequence[Path]) -> Source:
    """Pictures of one class that lie in `folder`."""
    found = Images(folder, (Entry(path.name, "", 0) for path in files))
    return Source(np.zeros(len(files), dtype=np.int64), None, found)


@pytest.fixture(scope="module")
def in_files(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """45 pictures of many shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    files = []
    for number in range(45):
        height, width = generator.integers(15, 60, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        files.append(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
        Image.fromarray(pixels).save(files[-1])
    return dataset(replace(in_folder(folder, files), labels=generator.integers(0, 4, 45)), 16)


def data(**keys: Any) -> Data:
    return Data(name="folder", root="unused", **keys)


def loader(source: Dataset, recipe: Data, **keys: Any) -> Loader:
    arguments = {"batch_size": 24, "train_seed": 3, "device": CPU} | keys
    return Loader(source, recipe, **arguments)


def digest(batch: Batch) -> str:
    content = b"".join(part.contiguous().numpy().tobytes() for part in batch[:4])
    return hashlib.sha256(content).hexdigest()


def digests(*loaders: Loader, start: int = 0) -> list[str]:
    """One for every global batch of two epochs, the ranks' rows put together."""
    found = []
    for epoch in range(2):
        ranks = [each.epoch(epoch, start=start) for each in loaders]
        for parts in zip(*ranks, strict=True):
            rows = zip(*(part[:4] for part in parts), strict=True)
            found.append(digest(Batch(*(torch.cat(columns) for columns in rows))))
    for each in loaders:
        each.close()
    return found


MEMORY_RECIPES = [
    {"augment": ["crop", "flip"]},
    {"augment": EVERYTHING, "mixup": 0.8, "cutmix": 1.0},
    {"augment": ["flip", "resized_crop", "trivialaugment", "crop"], "cutmix": 1.0},
    {"augment": [], "mixup": 0.2},
]


@pytest.mark.parametrize("keys", MEMORY_RECIPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_in_memory_are_the_same_in_any_world_and_after_a_restart(
    keys: dict[str, Any], channels: int
) -> None:
    source, recipe = in_memory(channels=channels), data(**keys)
    whole = digests(loader(source, recipe))
    assert len(whole) == len(set(whole)) == 2 * (126 // 24)
    for world in (2, 3, 4):
        ranks = [loader(source, recipe, rank=rank, world=world) for rank in range(world)]
        assert digests(*ranks) == whole
    assert digests(loader(source, recipe), start=3) == whole[3:5] + whole[8:]


FILE_RECIPES = [
    {"augment": ["resized_crop", "flip", "color_jitter", "erase"], "mixup": 0.8, "cutmix": 1.0},
    {"augment": ["crop", "flip"], "eval_crop": 0.8},
]


@pytest.mark.parametrize("keys", FILE_RECIPES)
def test_pixels_in_files_are_the_same_for_any_workers_and_world_and_after_a_restart(
    in_files: Dataset, keys: dict[str, Any]
) -> None:
    recipe = data(**keys)
    whole = digests(loader(in_files, recipe, batch_size=8))
    assert len(whole) == len(set(whole)) == 10
    for workers in (1, 2):
        assert digests(loader(in_files, recipe, batch_size=8, workers=workers)) == whole
    ranks = [
        loader(in_files, recipe, batch_size=8, rank=rank, world=4, workers=rank % 2)
        for rank in range(4)
    ]
    assert digests(*ranks) == whole
    resumed = loader(in_files, recipe, batch_size=8, workers=2)
    assert digests(resumed, start=2) == whole[2:5] + whole[7:]


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """36 pictures in five shards."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(5):
        labels = [1, 0, 2, 3, 0, 1, 2, 0][: 8 if number else 4]
        tar(root / f"train-{number}.tar", samples(8 * number, *labels))
    tar(root / "test-0.tar", samples(100, 0, 1, 2, 3))
    crop = [{"name": "resized_crop"}]  # so that they stay where they are
    return datasets.load(
        Data.model_validate(
            {"name": "webdataset", "root": str(root), "image_size": 8, "augment": crop}
        )
    )


def fingerprints(loaders: Sequence[Loader], *, start: int = 0) -> tuple[str, str]:
    """Of the ids of two epochs' global batches, in their order, and of all else in them."""
    ids, rest = hashlib.sha256(), hashlib.sha256()
    for epoch in range(2):
        for parts in zip(*(each.epoch(epoch, start=start) for each in loaders), strict=True):
            whole = Batch(
                *(torch.cat(columns) for columns in zip(*(p[:4] for p in parts), strict=True))
            )
            ids.update(whole.ids.numpy().tobytes())
            rest.update(digest(whole).encode())
    for each in loaders:
        each.close()
    return ids.hexdigest(), rest.hexdigest()


SOURCES = {
    "in_memory": ({"augment": EVERYTHING, "mixup": 0.8}, 24),
    "in_files": ({"augment": ["resized_crop", "flip", "erase"]}, 12),
    "in_shards": ({"augment": ["resized_crop"]}, 12),
    "in_shards, mixed by two": ({"augment": ["resized_crop"], "shuffle_shards": 2}, 12),
}
CELLS = [(world, workers) for world in (1, 2, 3, 4) for workers in (0, 1, 2, 4)]


def grid(
    request: pytest.FixtureRequest, kind: str, cells: Sequence[tuple[int, int]], *, start: int = 0
) -> list[tuple[str, str]]:
    """The fingerprints of a kind of source for (world, workers)."""
    keys, batch_size = SOURCES[kind]
    fixture = kind.partition(",")[0]
    source = in_memory() if fixture == "in_memory" else request.getfixturevalue(fixture)
    recipe = data(**keys)
    return [
        fingerprints(
            [
                loader(source, recipe, batch_size=batch_size, rank=r, world=world, workers=workers)
                for r in range(world)
            ],
            start=start,
        )
        for world, workers in cells
    ]


more_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")
some_or_all = pytest.mark.parametrize(
    "cells", [[(1, 0), (2, 1), (3, 2), (4, 0)], pytest.param(CELLS, marks=pytest.mark.soak)]
)


@pytest.mark.promise("R5")
@pytest.mark.parametrize("kind", SOURCES)
@some_or_all
@more_than_cores
def test_ids_and_pixels_of_a_step_are_the_same_for_any_world_and_workers(
    request: pytest.FixtureRequest,
    kind: str,
    cells: list[tuple[int, int]],
    measured: Measured,
) -> None:
    found = grid(request, kind, cells)
    assert found == [found[0]] * len(cells)
    orders = {ids for ids, _ in found}
    measured(
        f"ids of every step, processes x workers ({kind.replace('_', ' ')})",
        f"{len(cells) if len(orders) == 1 else 0} of {len(cells)} hashes equal",
    )


@pytest.mark.promise("R5")
@pytest.mark.parametrize("kind", SOURCES)
def test_a_run_that_goes_on_in_another_world_goes_on_in_the_same_order(
    request: pytest.FixtureRequest, kind: str, measured: Measured
) -> None:
    cells = [(1, 0), (2, 0), (3, 0), (4, 1)]
    found = grid(request, kind, cells, start=1)
    assert found == [found[0]] * len(cells)
    assert found[0] != grid(request, kind, cells[:1])[0]
    measured(
        f"ids after going on with other processes ({kind.replace('_', ' ')})",
        f"{len(cells)} of {len(cells)} hashes equal",
    )


@pytest.mark.promise("R6")
@pytest.mark.parametrize("kind", ["in_files", "in_shards"])
@more_than_cores
def test_pixels_are_the_same_for_any_workers_and_after_going_on(
    request: pytest.FixtureRequest, kind: str, measured: Measured
) -> None:
    workers = [(1, number) for number in (0, 1, 2, 4)]
    for start in (0, 1):
        found = grid(request, kind, workers, start=start)
        assert found == [found[0]] * len(workers)
    measured(
        f"pixels of two epochs, 0, 1, 2 and 4 workers, whole and gone on ({kind[3:]})",
        f"{2 * len(workers)} of {2 * len(workers)} hashes equal",
    )


def test_a_view_is_what_its_seeds_say() -> None:
    """The fused path in memory against the definition, one sample at a time."""
    source = in_memory()
    recipe = data(augment=["crop", "flip"], seed=9)
    assert source.train.pixels is not None
    crop, flip = augment.build(recipe.augment, seed=9)
    seen = []
    for batch in loader(source, recipe).epoch(4):
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.views.tolist() == [4] * 24
        for image, label, number in zip(batch.images, batch.labels, batch.ids, strict=True):
            sample = int(number)
            key = np.array([sample])
            top, left = (int(value[0]) for value in crop.plan(key, 4, size=16).values())
            pixels = np.pad(source.train.pixels[sample], ((2, 2), (2, 2), (0, 0)))
            pixels = pixels[top : top + 16, left : left + 16]
            if flip.plan(key, 4, size=16)["flip"][0]:
                pixels = pixels[:, ::-1]
            expected = torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(255))
            assert torch.equal(image, expected)
            assert label.tolist() == np.eye(4)[source.train.labels[sample]].tolist()
            seen.append(sample)
    order = views.epoch_order(126, data_seed=9, train_seed=3, epoch=4, view=4)
    assert seen == source.train_ids[order[:120]].tolist()


def test_a_mixed_view_is_what_its_seeds_say() -> None:
    source, recipe = in_memory(), data(mixup=0.8, cutmix=1.0, seed=9)
    alone = loader(source, data(seed=9)).epoch(2)
    for plain, mixed in zip(alone, loader(source, recipe).epoch(2), strict=True):
        assert torch.equal(plain.ids, mixed.ids)
        draws = views.uniform(9, plain.ids[::2].numpy(), 2, stream=0, num=mixing.NUM_DRAWS)
        plan = mixing.plan(draws, mixup=0.8, cutmix=1.0, height=16, width=16)
        for pair in range(12):
            first, second = plain.images[2 * pair], plain.images[2 * pair + 1]
            weight = torch.full((1, 16, 16), float(plan["weight"][pair]))
            top, bottom, left, right = plan["box"][pair]
            weight[:, top:bottom, left:right] = 0
            expected = first * weight + second * (1 - weight)
            torch.testing.assert_close(mixed.images[2 * pair], expected, rtol=0, atol=1e-6)
            share = float(plan["share"][pair])
            labels = plain.labels[2 * pair] * share + plain.labels[2 * pair + 1] * (1 - share)
            torch.testing.assert_close(mixed.labels[2 * pair], labels)


def test_every_value_is_exactly_its_255th() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    source = Source(np.zeros(1, dtype=np.int64), pixels, None)
    [batch] = loader(dataset(source, 16, left_out=0), data(), batch_size=1).epoch(0)
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    for channel in batch.images[0]:
        assert np.array_equal(channel.numpy().ravel(), expected)


def test_an_epoch_leaves_out_another_rest_each_time() -> None:
    source = in_memory()
    batches = loader(source, data(), batch_size=50)
    assert batches.steps_per_epoch == 2
    rests = []
    for epoch in range(3):
        ids = torch.cat([batch.ids for batch in batches.epoch(epoch)]).tolist()
        assert len(ids) == len(set(ids)) == 100
        assert set(ids) <= set(source.train_ids.tolist())
        rests.append(frozenset(source.train_ids.tolist()) - set(ids))
    assert len(set(rests)) == 3


def test_a_chunk_boundary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = in_memory(), data(augment=EVERYTHING, mixup=0.8)
    whole = digests(loader(source, recipe))
    monkeypatch.setattr("distill.data.pixels.CHUNK", 50)
    assert digests(loader(source, recipe)) == whole


def test_no_global_random_state_is_read_or_moved(in_files: Dataset) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for source in (in_memory(), in_files):
        recipe = data(augment=["resized_crop", "randaugment"], mixup=0.8)
        first = digests(loader(source, recipe, batch_size=8, workers=1))
        assert torch.equal(torch.get_rng_state(), before)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            assert digests(loader(source, recipe, batch_size=8)) == first


@pytest.mark.parametrize(
    ("keys", "mixes", "message", "hint"),
    [
        ({"batch_size": 127}, False, "127.*126 training images", "126 or less"),
        ({"batch_size": 24, "world": 5}, False, "24 cannot be divided over 5", "20 or 25"),
        ({"batch_size": 6, "world": 2}, True, "6 cannot be divided over 2.*pair", "4 or 8"),
        ({"batch_size": 1}, True, "1 cannot be divided over 1", "such as 2$"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    keys: dict[str, int], mixes: bool, message: str, hint: str
) -> None:
    recipe = data(mixup=0.8 if mixes else 0.0)
    with pytest.raises(IncompatibleError, match=message) as caught:
        loader(in_memory(), recipe, **keys)
    assert np.char.find(caught.value.hint, hint.rstrip("$")) >= 0
    assert not hint.endswith("$") or caught.value.hint.endswith(hint[:-1])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_has_each_id_once(in_files: Dataset, world: int, workers: int) -> None:
    recipe = data(augment=EVERYTHING, mixup=1.0, eval_crop=0.8)
    assert in_files.test.files is not None
    ids = np.arange(44, 7, -3)
    whole = [ids[first : first + 4].tolist() for first in range(0, len(ids), 4)]
    seen: list[int] = []
    for rank in range(world):
        mine: list[list[int]] = []
        for pixels, labels, numbers in evaluation_batches(
            in_files, in_files.test, ids, recipe,
            batch_size=4, device=CPU, rank=rank, world=world, workers=workers,
        ):  # fmt: skip
            assert labels.tolist() == in_files.test.labels[numbers.numpy()].tolist()
            for image, number in zip(pixels, numbers.tolist(), strict=True):
                decoded = encoded.decode(in_files.test.files, number, max_pixels=10**6)
                expected = images.evaluation_view(decoded, size=16, crop=0.8)
                assert torch.equal(image, torch.tensor(expected).permute(2, 0, 1) / 255)
            mine.append(numbers.tolist())
        assert mine == whole[rank::world]  # so a batch is the same for every number of ranks
        seen += [number for batch in mine for number in batch]
    assert sorted(seen) == sorted(ids.tolist())


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_in_memory(channels: int) -> None:
    source = in_memory(channels=channels)
    assert source.test.pixels is not None
    batches = list(
        evaluation_batches(source, source.test, source.val_ids, data(), batch_size=3, device=CPU)
    )
    assert [len(ids) for _, _, ids in batches] == [3, 2]
    pixels = torch.cat([images for images, _, _ in batches])
    expected = torch.from_numpy(source.test.pixels[:5]).permute(0, 3, 1, 2) / 255
    assert torch.equal(pixels, expected.expand(-1, 3, -1, -1))
    none = evaluation_batches(source, source.test, np.arange(0), data(), batch_size=3, device=CPU)
    assert list(none) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_the_error_that_names_it(tmp_path: Path, workers: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    files = tuple(tmp_path / f"{number}.png" for number in range(8))
    for file in files:
        Image.fromarray(pixels).save(file)
    files[5].write_bytes(files[5].read_bytes()[:600])
    source = dataset(in_folder(tmp_path, files), 16, left_out=0)
    batches = loader(source, data(augment=["resized_crop"]), batch_size=2, workers=workers)
    with pytest.raises(PreflightError, match=r"5\.png") as caught:
        list(batches.epoch(0))
    assert "Traceback" not in str(caught.value)
    assert caught.value.__cause__ is None
    batches.close()


def children() -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def gone(processes: set[int]) -> bool:
    deadline = time.monotonic() + 20
    while processes & children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes & children()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="processes are listed in /proc"
)


@needs_proc
def test_workers_stay_between_epochs_and_end_with_the_loader(in_files: Dataset) -> None:
    before = children()
    batches = loader(in_files, data(), batch_size=8, workers=2)
    list(batches.epoch(0))
    workers = children() - before
    assert len(workers) >= 2
    next(batches.epoch(1))  # left in the middle
    whole = [digest(batch) for batch in batches.epoch(1)]
    assert children() - before == workers
    assert whole == [digest(batch) for batch in loader(in_files, data(), batch_size=8).epoch(1)]
    batches.close()
    gc.collect()
    assert gone(workers)


@needs_proc
def test_a_killed_worker_is_an_error_that_says_so(in_files: Dataset) -> None:
    before = children()
    batches = loader(in_files, data(), batch_size=2, workers=1)
    running: Iterator[Batch] = batches.epoch(0)
    next(running)
    [worker] = [pid for pid in children() - before if b"resource" not in cmdline(pid)]
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(PreflightError, match="died") as caught:
        list(running)
    assert "/dev/shm" in caught.value.hint
    batches.close()


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


SCRIPT = """
    import signal, sys
    import numpy as np, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_loader import data, dataset, in_folder, loader

    if __name__ == "__main__":
        source = in_folder(Path({folder!r}), sorted(Path({folder!r}).iterdir()))
        batches = loader(dataset(source, 16), data(), batch_size=8, workers=2)
        caught = []
        signal.signal(signal.SIGINT, lambda *_: caught.append(1))
        signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
        running = batches.epoch(0)
        next(running), next(running)  # one from each worker: both have begun
        print("ready", flush=True)
        sys.stdin.readline()
        num = 2 + len(list(running))
        print(num, len(caught), flush=True)
        {end}
"""


@pytest.mark.parametrize("end", ["", "raise KeyError('of its own')"])
def test_signals_to_the_group_leave_the_workers_to_the_main_process(
    in_files: Dataset, end: str
) -> None:
    assert in_files.train.files is not None
    folder = in_files.train.files.origin
    script = textwrap.dedent(SCRIPT).format(
        tests=str(Path(__file__).parent), folder=folder, end=end
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate("\n", timeout=60)
    assert out == "5 2\n"
    assert ("KeyError" in err) == bool(end)
    assert process.returncode == (1 if end else 0)


def test_no_torchvision_is_imported() -> None:
    """It takes seconds, and nothing here is its."""
    code = "import distill.data.loader, sys; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A control takes away one thing, for good and for all, and leaves the rest as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distill.data import controls, datasets
from distill.data.datasets import Dataset
from distill.engine import cached
from distill.errors import IncompatibleError, RecipeError
from distill.models.zoo.mlp import mlp
from distill.recipe import Data, Recipe

REST: dict[str, Any] = {
    "student": {"model": "mlp"},
    "objective": [{"term": "ce"}],
    "optimizer": {"lr": 0.1},
    "train": {"epochs": 1, "batch_size": 32},
}


def load(**settings: Any) -> Dataset:
    return datasets.load(Data.model_validate({"name": "digits"} | settings))


def recipe(**data: Any) -> Recipe:
    return Recipe.model_validate({"data": {"name": "digits"} | data} | REST)


def pixels_of(dataset: Dataset, split: str) -> np.ndarray:
    pixels = getattr(dataset, split).pixels
    assert pixels is not None
    return pixels


@pytest.mark.parametrize("count", [1, 2, 64, 50_176])
def test_a_permutation_has_every_place_once(count: int) -> None:
    order = controls.pixel_order(count, seed=3)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, controls.pixel_order(count, seed=3))
    if count > 2:
        assert not np.array_equal(order, controls.pixel_order(count, seed=4))
        assert (order == np.arange(count)).mean() < 0.1


def test_pixels_are_rearranged_in_all_images_alike() -> None:
    plain, found = load(seed=5, val=0.1), load(seed=5, val=0.1, control="permuted-pixels")
    order = controls.pixel_order(64, seed=5)
    for split in ("train", "test"):
        before, after = pixels_of(plain, split), pixels_of(found, split)
        assert after.shape == before.shape
        assert np.array_equal(
            after.reshape(len(after), 64), before.reshape(len(before), 64)[:, order]
        )
        assert after.flags.c_contiguous
    assert np.array_equal(found.train.labels, plain.train.labels)
    assert np.array_equal(found.test.labels, plain.test.labels)
    assert np.array_equal(found.train_ids, plain.train_ids)
    assert np.array_equal(found.val_ids, plain.val_ids)
    assert (found.mean, found.std, found.image_size) == (plain.mean, plain.std, plain.image_size)


def test_channels_of_a_pixel_stay_together() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    found = controls.permuted_pixels(colours, seed=0)
    for before, after in zip(colours, found, strict=True):
        assert sorted(map(tuple, before.reshape(-1, 3))) == sorted(map(tuple, after.reshape(-1, 3)))


def test_labels_are_dealt_out_again_among_those_trained_on() -> None:
    keys: dict[str, Any] = {"val": 0.2, "fraction": 0.5, "omit": ["3"], "seed": 2}
    plain, found = load(**keys), load(**keys, control="permuted-labels")
    before, after, ids = plain.train.labels, found.train.labels, plain.train_ids
    assert np.array_equal(found.train_ids, ids)
    assert np.array_equal(np.bincount(after[ids]), np.bincount(before[ids]))
    same = (after[ids] == before[ids]).mean()
    assert abs(same - 1 / 9) < 4 * np.sqrt(1 / 9 * 8 / 9 / len(ids))
    rest = np.setdiff1d(np.arange(len(before)), ids)
    assert np.array_equal(after[rest], before[rest])  # those held out among them
    assert np.array_equal(found.test.labels, plain.test.labels)
    for split in ("train", "test"):
        assert np.array_equal(pixels_of(found, split), pixels_of(plain, split))
    other = load(**(keys | {"seed": 3}), control="permuted-labels")
    assert not np.array_equal(other.train.labels, after)
    assert np.array_equal(load(**keys, control="permuted-labels").train.labels, after)


def test_a_control_is_another_data_set_to_runs_and_caches() -> None:
    settings: list[dict[str, Any]] = [
        {},
        *(
            {"control": c, "seed": s}
            for c in ("permuted-pixels", "permuted-labels")
            for s in (0, 1)
        ),
    ]
    found = [load(**keys) for keys in settings]
    assert len({dataset.fingerprint for dataset in found}) == 5
    assert len({dataset.content for dataset in found}) == 5
    again = load(control="permuted-pixels", val=0.3, fraction=0.5)
    assert again.fingerprint == found[1].fingerprint
    assert len({recipe(**keys).digest() for keys in settings}) == 5
    identities = [cached.identity(recipe(), dataset, None)["data"]["images"] for dataset in found]
    assert len(set(identities)) == 5


def test_a_recipe_without_control_is_what_it_was() -> None:
    """Runs that began before there was such a key are gone on with."""
    assert "control" not in recipe().identity()["data"]
    assert recipe(control=None).digest() == recipe().digest()
    assert recipe(control="permuted-labels").identity()["data"]["control"] == "permuted-labels"


def write(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(colour).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_images_that_stay_in_their_files_keep_their_pixels(tmp_path: Path) -> None:
    for i in range(8):
        write(tmp_path / ("train" if i < 4 else "test") / "ab"[i % 2] / f"{i}.png", i)
    keys: dict[str, Any] = {"name": "folder", "root": str(tmp_path), "image_size": 12}
    in_files = keys | {"augment": [{"name": "resized_crop"}]}
    plain, found = load(**keys), load(**keys, control="permuted-pixels")
    order = controls.pixel_order(144, seed=0)
    flat = pixels_of(plain, "test").reshape(4, 144, 3)
    assert np.array_equal(pixels_of(found, "test").reshape(4, 144, 3), flat[:, order])
    with pytest.raises(IncompatibleError, match=r"data.control: permuted-pixels needs") as error:
        load(**in_files, control="permuted-pixels")
    assert "resized_crop" in error.value.hint
    assert load(**in_files, control="permuted-labels").train.pixels is None


def test_images_without_labels(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / "photos" / f"{i}.png", i)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    keys = [f"data.transfer={tmp_path / 'photos'}", "objective=[{term: kd}]"]
    teacher = ["teachers=[{model: mlp, weights: run}]"]
    with pytest.raises(RecipeError, match=r"control.*: the images of data.transfer have no labels"):
        Recipe.load(path, [*keys, *teacher, "data.control=permuted-labels"])
    data = Recipe.load(path, [*keys, *teacher, "data.control=permuted-pixels"]).data
    plain = datasets.load(data.model_copy(update={"control": None}))
    found = datasets.load(data)
    order = controls.pixel_order(64, seed=0)
    flat = pixels_of(plain, "train").reshape(4, 64, -1)
    assert np.array_equal(pixels_of(found, "train").reshape(4, 64, -1), flat[:, order])


def tensors(dataset: Dataset, split: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    source = getattr(dataset, split)
    pixels = torch.from_numpy(source.pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    return pixels.to(dtype) / 255 / 0.3759, torch.from_numpy(source.labels)


def trained(network: nn.Module, x: Tensor, y: Tensor, *, steps: int, lr: float) -> list[float]:
    """The losses on the way."""
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_control_network_learns_rearranged_images_as_others() -> None:
    """With the columns of its first layer rearranged likewise, in each step."""
    torch.manual_seed(0)
    plain = mlp(10, 8, width=32, depth=1).double()
    moved = copy.deepcopy(plain)
    order = torch.from_numpy(controls.pixel_order(64, seed=0))
    with torch.no_grad():
        first = moved.layers[0][0].weight
        first.copy_(first.unflatten(1, (3, 64))[..., order].flatten(1))
    losses = [
        trained(network, *tensors(load(**keys), "train", torch.float64), steps=20, lr=0.1)
        for network, keys in ((plain, {}), (moved, {"control": "permuted-pixels"}))
    ]
    assert losses[0][-1] < losses[0][0] / 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-10)
    tests = [
        tensors(load(**keys), "test", torch.float64)[0]
        for keys in ({}, {"control": "permuted-pixels"})
    ]
    with torch.no_grad():
        assert torch.allclose(plain(tests[0]), moved(tests[1]), rtol=1e-8)


def test_what_is_learned_of_random_labels_is_of_no_use() -> None:
    """Images of a class err alike: how far chance goes is seen from seed to seed."""
    right = []
    for seed in range(8):
        torch.manual_seed(seed)
        network, data = mlp(10, 8, width=128, depth=1), load(control="permuted-labels", seed=seed)
        losses = trained(network, *tensors(data, "train"), steps=150, lr=0.3)
        assert losses[-1] < np.log(10) - 0.3  # better than guessing
        x, y = tensors(data, "test")
        right.append((network(x).argmax(dim=1) == y).double().mean().item())
    se = np.std(right, ddof=1) / np.sqrt(len(right))
    assert se < 0.015
    assert abs(np.mean(right) - 0.1) <= 3 * se

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy import stats
from torchvision.transforms import v2

from distill.data import mixing


def draws(num: int, seed: int = 0) -> ndarray:
    return np.random.default_rng(seed).random((num, mixing.NUM_DRAWS))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 2.0, 8.0, 100.0])
def test_beta_has_the_distribution(alpha: float) -> None:
    u, v = np.random.default_rng(1).random((2, 100_000))
    drawn = mixing.beta(u, v, alpha=alpha)
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    variance = 1 / (4 * (2 * alpha + 1))
    assert drawn.mean() == pytest.approx(0.5, abs=4 * np.sqrt(variance / 100_000))
    assert drawn.var() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.1])
def test_beta_of_a_small_alpha_keeps_its_tail(alpha: float) -> None:
    """Near 0 there are numbers that a sum with 1 would round away; half lies at either end."""
    u, v = np.random.default_rng(2).random((2, 100_000))
    drawn = mixing.beta(u, v, alpha=alpha)
    assert np.isfinite(drawn).all()
    for place in (1e-100, 1e-20, 1e-3, 0.3):
        expected = stats.beta(alpha, alpha).cdf(place)
        assert (drawn <= place).mean() == pytest.approx(expected, abs=0.007)


def test_beta_at_the_ends_of_its_numbers() -> None:
    ends = np.array([0.0, 0.0, np.nextafter(1, 0), np.nextafter(1, 0), 0.5])
    drawn = mixing.beta(ends, np.array([0.0, 0.5, 0.0, 0.5, 0.25]), alpha=0.3)
    assert drawn == pytest.approx([1, 0, 0.5, 0.5, 0.5], abs=1e-7)


def test_mixup_is_torchvisions() -> None:
    """torchvision mixes each image with the one before it: within a pair, row 1 with row 0."""
    images, labels = torch.rand(2, 3, 9, 9), torch.eye(5)[[1, 4]]
    share = float(mixing.plan(draws(1), mixup=0.8, cutmix=0, height=9, width=9)["share"][0])
    reference = v2.MixUp(num_classes=5)
    params = {"lam": share, "labels": labels, "batch_size": 2}
    mixed = mixing.blend(images, torch.tensor([share]))
    torch.testing.assert_close(mixed, reference.transform(images, params), rtol=0, atol=1e-6)
    classes = torch.tensor([1, 4])
    expected = reference.transform(classes, params | {"labels": classes})
    torch.testing.assert_close(mixing.blend(labels, torch.tensor([share])), expected)


@pytest.mark.parametrize("size", [(9, 9), (32, 32), (8, 13)])
def test_cutmix_is_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    uniforms = draws(200)
    plan = mixing.plan(uniforms, mixup=0, cutmix=1.0, height=height, width=width)
    images = torch.randint(0, 256, (400, 3, height, width), dtype=torch.uint8)
    mixed = mixing.cut(images, torch.from_numpy(plan["box"]))
    drawn = mixing.beta(uniforms[:, 1], uniforms[:, 2], alpha=1.0)
    reference = v2.CutMix(num_classes=2)
    for pair in range(200):
        # The box as torchvision makes it from the same numbers.
        row, column = int(uniforms[pair, 3] * height), int(uniforms[pair, 4] * width)
        reach = 0.5 * np.sqrt(1 - drawn[pair])
        top, bottom = max(row - int(reach * height), 0), min(row + int(reach * height), height)
        left, right = max(column - int(reach * width), 0), min(column + int(reach * width), width)
        share = 1 - (right - left) * (bottom - top) / (width * height)
        labels = torch.tensor([0, 1])
        params = {
            "labels": labels,
            "batch_size": 2,
            "box": (left, top, right, bottom),
            "lam_adjusted": share,
        }
        rows = slice(2 * pair, 2 * pair + 2)
        assert torch.equal(mixed[rows], reference.transform(images[rows], params))
        assert float(plan["share"][pair]) == pytest.approx(share, abs=1e-7)
        expected = reference.transform(labels, params)
        got = mixing.blend(torch.eye(2), torch.from_numpy(plan["share"][pair : pair + 1]))
        torch.testing.assert_close(got, expected)
    assert plan["share"].min() < 0.4 < 0.99 < plan["share"].max()


def test_where_both_are_on_each_pair_has_one() -> None:
    plan = mixing.plan(draws(20_000), mixup=0.8, cutmix=1.0, height=32, width=32)
    cut = plan["weight"] == 1
    assert cut.mean() == pytest.approx(0.5, abs=0.015)
    box, share = plan["box"], plan["share"]
    assert not box[~cut].any()
    assert np.array_equal(share[~cut], plan["weight"][~cut])
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    assert np.array_equal(share[cut], (1 - area[cut] / 1024).astype(np.float32))
    assert stats.kstest(share[~cut], stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_labels_stay_probabilities_and_pairs_are_mirror_images() -> None:
    share = torch.rand(50)
    labels = mixing.blend(torch.eye(7)[torch.randint(0, 7, (100,))], share)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(100))
    assert labels.min() >= 0
    images = torch.rand(100, 3, 8, 8)
    mixed = mixing.blend(images, share)
    sums = images.unflatten(0, (50, 2)).sum(dim=1), mixed.unflatten(0, (50, 2)).sum(dim=1)
    torch.testing.assert_close(*sums)


def test_a_pair_is_mixed_the_same_in_any_batch_and_layout() -> None:
    plan = mixing.plan(draws(16), mixup=0, cutmix=1.0, height=11, width=11)
    box, share = torch.from_numpy(plan["box"]), torch.from_numpy(plan["share"])
    images = torch.randint(0, 256, (32, 3, 11, 11), dtype=torch.uint8)
    whole = mixing.cut(images, box)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixing.cut(last, box), whole)
    values = images / 255
    blended = mixing.blend(values, share)
    assert torch.equal(mixing.blend(last / 255, share), blended)
    for pair in range(16):
        rows = slice(2 * pair, 2 * pair + 2)
        assert torch.equal(mixing.cut(images[rows], box[pair : pair + 1]), whole[rows])
        assert torch.equal(mixing.blend(values[rows], share[pair : pair + 1]), blended[rows])

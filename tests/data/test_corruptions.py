"""Corrupted images are a pure function of the image, its id, the corruption and the seed."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from photographs import images, photographs, psnr
from torch import Tensor

from distill.data import corruptions, official
from distill.data.corruptions import tables
from distill.data.pixels import to_float

every = pytest.mark.parametrize("name", corruptions.names())


def faded(clean: Tensor, name: str) -> list[float]:
    """The mean PSNR to the images as they are, by severity; each image has an id of its own."""
    ids = torch.arange(len(clean))
    return [
        float(psnr(clean, corruptions.corrupt(clean, ids, name, severity)).mean())
        for severity in corruptions.SEVERITIES
    ]


def test_groups() -> None:
    assert len(corruptions.COMMON) == 15
    assert corruptions.EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert corruptions.AFFINE == ("translate", "rotate", "scale")
    assert len(corruptions.names()) == 22
    assert set(corruptions.BASIC) <= set(corruptions.names())
    assert set(corruptions.APPROXIMATED) == {"frost"}
    both = corruptions.names("basic", "affine")
    assert both == ("gaussian_noise", "gaussian_blur", "contrast", "translate", "rotate", "scale")
    with pytest.raises(ValueError, match="no group 'comon' of corruptions; did you mean 'common'"):
        corruptions.names("comon")


def test_unknown_names_and_severities_are_refused() -> None:
    clean, ids = torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="no corruption 'fogg'; did you mean 'fog'"):
        corruptions.corrupt(clean, ids, "fogg", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"fog: severity is {severity}, and there are 1 to 5"):
            corruptions.corrupt(clean, ids, "fog", severity)


@every
def test_the_batch_does_not_show(name: str) -> None:
    clean = photographs(32).repeat(3, 1, 1, 1)
    ids = torch.tensor([7, 0, 3, 49_999, 12, 5, 8, 1, 2, 4, 6, 9])
    kept = clean.clone()
    for severity in (1, 5):
        whole = corruptions.corrupt(clean, ids, name, severity)
        assert torch.equal(whole, corruptions.corrupt(clean, ids, name, severity))
        order = torch.tensor([11, 3, 4, 0, 8])
        some = corruptions.corrupt(clean[order], ids[order].int(), name, severity)
        assert torch.equal(some, whole[order])
        single = corruptions.corrupt(clean[3:4], ids[3:4], name, severity)
        assert torch.equal(single, whole[3:4])
    assert torch.equal(clean, kept)


def test_parts_of_a_large_batch_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, ids = photographs(32), torch.arange(4)
    whole = corruptions.corrupt(clean, ids, "snow", 3)
    monkeypatch.setattr(corruptions, "_AT_ONCE", 1)
    assert torch.equal(corruptions.corrupt(clean, ids, "snow", 3), whole)


FIXED = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}


@every
def test_seed_and_id_decide_what_is_random(name: str) -> None:
    clean = photographs(32)[:1].expand(8, -1, -1, -1)
    ids = torch.arange(8)
    first = corruptions.corrupt(clean, ids, name, 4)
    other_ids = corruptions.corrupt(clean, ids + 8, name, 4)
    other_seed = corruptions.corrupt(clean, ids, name, 4, seed=1)
    if name in FIXED:
        assert (first == first[0]).all()
        assert torch.equal(first, other_ids)
        assert torch.equal(first, other_seed)
    else:
        assert not torch.equal(first, other_ids)
        assert not torch.equal(first, other_seed)
        assert len(first.flatten(1).unique(dim=0)) >= (2 if name in corruptions.AFFINE else 5)


def test_corruptions_and_severities_have_numbers_of_their_own() -> None:
    grey, ids = torch.full((1, 3, 32, 32), 128 / 255), torch.zeros(1, dtype=torch.long)
    drawn = [
        corruptions.corrupt(grey, ids, name, severity).flatten() - 128 / 255
        for name in ("gaussian_noise", "speckle_noise", "shot_noise")
        for severity in corruptions.SEVERITIES
    ]
    alike = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert alike.abs().max() < 0.08  # 4.4 standard errors of 3072 numbers


@every
@pytest.mark.parametrize("shape", [(8, 8), (9, 14), (33, 70), (64, 96), (128, 131)])
def test_images_of_any_shape_become_levels(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, *shape, generator=generator)
    clean[1] = 0  # black
    for severity in corruptions.SEVERITIES[:: 1 if shape[0] < 64 else 2]:
        spoilt = corruptions.corrupt(clean, torch.arange(2), name, severity)
        assert spoilt.shape == clean.shape
        assert spoilt.dtype == torch.float32
        assert torch.equal(spoilt, to_float((spoilt * 255).round().to(torch.uint8)))


def test_no_images_are_no_images() -> None:
    none = corruptions.corrupt(torch.rand(0, 3, 16, 16), torch.arange(0), "fog", 1)
    assert none.shape == (0, 3, 16, 16)


@every
def test_autocast_and_gradients_change_nothing(name: str) -> None:
    clean, ids = photographs(32), torch.arange(4)
    plain = corruptions.corrupt(clean, ids, name, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = corruptions.corrupt(clean.clone().requires_grad_(), ids, name, 3)
    assert torch.equal(cast, plain)
    assert not cast.requires_grad


# Where the published constants do not take more and more from these photographs. Elastic distortion
# trades its shear for finer waves, frost its dimming for ice, glass blur its reach for rounds, snow
# its number of flakes for their size; saturation begins with less and goes on to more; mud covers
# less than water brightens; and motion blur has (6, 2) and (8, 2), whose tails are nothing.
UNEVEN = {
    32: {"elastic_transform", "frost", "glass_blur", "motion_blur", "saturate", "spatter"},
    64: {"elastic_transform", "glass_blur", "saturate", "spatter"},
    224: {"elastic_transform", "frost", "glass_blur", "saturate", "snow"},
}
REPEATS = {32: 25, 64: 50, 224: 5}  # of which the mean is clear
SPREAD = {("fog", 224): 48, ("frost", 224): 48}  # whose draws differ more


@every
@pytest.mark.parametrize("side", [32, 64, 224])
def test_severities_rise(name: str, side: int) -> None:
    repeats = 1 if name in FIXED else SPREAD.get((name, side), REPEATS[side])
    found = faded(photographs(side).repeat(repeats, 1, 1, 1), name)
    falls = all(b < a for a, b in pairwise(found))
    assert falls == (name not in UNEVEN[side]), found


@pytest.mark.parametrize(
    "name", [name for name in corruptions.names() if name not in UNEVEN[32] | {"pixelate"}]
)
def test_severities_rise_on_drawings(name: str) -> None:
    """At 8 pixels, as they come, boxes of whole pixels and moves of most of the side do not."""
    pixels = images(official.read("digits", None, download=False).test.pixels[:150])
    large = to_float((F.interpolate(pixels, 32, mode="bilinear") * 255).round().to(torch.uint8))
    for digits in (pixels, large) if name != "translate" else (large,):
        found = faded(digits, name)
        assert all(b < a for a, b in pairwise(found)), found


# Once more from the scripts, in the order of the paper; a row is a corruption, blanks by two.
CIFAR = """
    .04  0.06  .08  .09  .10
    500  250  100  75  50
    .01  .02  .03  .05  .07
    (0.3, 0.4)  (0.4, 0.5)  (0.5, 0.6)  (1, 0.2)  (1.5, 0.1)
    (0.05,1,1)  (0.25,1,1)  (0.4,1,1)  (0.25,1,2)  (0.4,1,2)
    (6,1)  (6,1.5)  (6,2)  (8,2)  (9,2.5)
    (1.06, .01)  (1.11, .01)  (1.16, .01)  (1.21, .01)  (1.26, .01)
    (.1,.2,1,.6,8,3,.95)  (.1,.2,1,.5,10,4,.9)  (.15,.3,1.75,.55,10,4,.9)  \
        (.25,.3,2.25,.6,12,6,.85)  (.3,.3,1.25,.65,14,12,.8)
    (1, 0.2)  (1, 0.3)  (0.9, 0.4)  (0.85, 0.4)  (0.75, 0.45)
    (.2,3)  (.5,3)  (0.75,2.5)  (1,2)  (1.5,1.75)
    .05  .1  .15  .2  .3
    .75  .5  .4  .3  0.15
    (0, 0, 0.08)  (0.05, 0.2, 0.07)  (0.08, 0.06, 0.06)  (0.1, 0.04, 0.05)  (0.1, 0.03, 0.03)
    0.95  0.9  0.85  0.75  0.65
    80  65  58  50  40
    .06  .1  .12  .16  .2
    .4  .6  0.7  .8  1
    (.62,.1,.7,.7,.5,0)  (.65,.1,.8,.7,.5,0)  (.65,.3,1,.69,.5,0)  (.65,.1,.7,.69,.6,1)  \
        (.65,.1,.5,.68,.6,1)
    (0.3, 0)  (0.1, 0)  (1.5, 0)  (2, 0.1)  (2.5, 0.2)
"""
TINY = """
    0.04  0.08  .12  .15  .18
    250  100  50  30  15
    .01  .02  .05  .08  .14
    (0.5, 0.6)  (1, 0.1)  (1.5, 0.1)  (2.5, 0.01)  (3, 0.1)
    (0.1,1,1)  (0.5,1,1)  (0.6,1,2)  (0.7,2,1)  (0.9,2,2)
    (10,1)  (10,1.5)  (10,2)  (10,2.5)  (12,3)
    (1.06, .01)  (1.11, .01)  (1.16, .01)  (1.21, .01)  (1.26, .01)
    (.1,.2,1,.6,8,3,.8)  (.1,.2,1,.5,10,4,.8)  (.15,.3,1.75,.55,10,4,.7)  \
        (.25,.3,2.25,.6,12,6,.65)  (.3,.3,1.25,.65,14,12,.6)
    (1, 0.3)  (0.9, 0.4)  (0.8, 0.45)  (0.75, 0.5)  (0.7, 0.55)
    (.4,3)  (.7,3)  (1,2.5)  (1.5,2)  (2,1.75)
    .1  .2  .3  .4  .5
    .4  .3  .2  .1  0.05
    (0, 0, 0.08)  (0.05, 0.3, 0.06)  (0.1, 0.08, 0.06)  (0.1, 0.03, 0.03)  (0.16, 0.03, 0.02)
    0.9  0.8  0.7  0.6  0.5
    65  58  50  40  25
    .15  .2  0.25  0.3  0.35
    .5  .75  1  1.25  1.5
    (.62,.1,.7,.7,.6,0)  (.65,.1,.8,.7,.6,0)  (.65,.3,1,.69,.6,0)  (.65,.1,.7,.68,.6,1)  \
        (.65,.1,.5,.67,.6,1)
    (0.3, 0)  (0.1, 0)  (2, 0)  (5, 0.1)  (30, 0.2)
"""
IMAGENET = """
    .08  .12  0.18  0.26  0.38
    60  25  12  5  3
    .03  .06  .09  0.17  0.27
    (3, 0.1)  (4, 0.5)  (6, 0.5)  (8, 0.5)  (10, 0.5)
    (0.7, 1, 2)  (0.9, 2, 1)  (1, 2, 3)  (1.1, 3, 2)  (1.5, 4, 2)
    (10, 3)  (15, 5)  (15, 8)  (15, 12)  (20, 15)
    (1.11, .01)  (1.16, .01)  (1.21, .02)  (1.26, .02)  (1.31, .03)
    (.1,.3,3,.5,10,4,.8)  (.2,.3,2,.5,12,4,.7)  (.55,.3,4,.9,12,8,.7)  \
        (.55,.3,4.5,.85,12,8,.65)  (.55,.3,2.5,.85,12,12,.55)
    (1, 0.4)  (0.8, 0.6)  (0.7, 0.7)  (0.65, 0.7)  (0.6, 0.75)
    (1.5, 2)  (2, 2)  (2.5, 1.7)  (2.5, 1.5)  (3, 1.4)
    .1  .2  .3  .4  .5
    0.4  .3  .2  .1  .05
    (2, 0.7, 0.1)  (2, 0.08, 0.2)  (0.05, 0.01, 0.02)  (0.07, 0.01, 0.02)  (0.12, 0.01, 0.02)
    0.6  0.5  0.4  0.3  0.25
    25  18  15  10  7
    .15  .2  0.35  0.45  0.6
    1  2  3  4  6
    (.65,.3,4,.69,.6,0)  (.65,.3,3,.68,.6,0)  (.65,.3,2,.68,.5,0)  (.65,.3,1,.65,1.5,1)  \
        (.67,.4,1,.65,1.5,1)
    (0.3, 0)  (0.1, 0)  (2, 0)  (5, 0.1)  (20, 0.2)
"""


@pytest.mark.parametrize(
    ("sides", "published", "elastic"),
    [
        ((8, 32, 63), CIFAR, 1),
        ((64, 127), TINY, 1),
        ((128, 224, 500), IMAGENET, 244 / 224),  # the script takes 244 px for the side
    ],
)
def test_constants_are_the_published_ones(
    sides: Sequence[int], published: str, elastic: float
) -> None:
    names = (*corruptions.COMMON, *corruptions.EXTRA)
    rows = published.replace("\\\n", "").strip().splitlines()
    for name, row in zip(names, rows, strict=True):
        values = [ast.literal_eval(cell) for cell in row.split("  ") if cell.strip()]
        assert len(values) == 5
        for severity, value in enumerate(values, start=1):
            expected = value if isinstance(value, tuple) else (value,)
            if name == "elastic_transform":
                expected = tuple(part * elastic for part in expected)
            for side in sides:
                assert tables.constants(name, severity, side) == pytest.approx(expected, rel=1e-12)


def test_constants_of_moves() -> None:
    for side in (8, 32, 224):
        rows = [
            [tables.constants(name, severity, side) for severity in corruptions.SEVERITIES]
            for name in corruptions.AFFINE
        ]
        assert rows == [
            [(1,), (2,), (3,), (4,), (6,)],
            [(3,), (6,), (10,), (15,), (20,)],
            [(1.05,), (1.10,), (1.15,), (1.20,), (1.25,)],
        ]

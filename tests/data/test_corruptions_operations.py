"""The operations against their formulas, plain loops and SciPy."""

from __future__ import annotations

import colorsys
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from photographs import photographs, psnr
from PIL import Image
from scipy import ndimage
from torch import Tensor

from distill.data import corruptions
from distill.data.corruptions import affine, blur, digital, draws, filters, noise, spatter, weather

KEY = draws.keys(0, "test", 1, torch.arange(4))
PHOTOS = photographs(32).double()


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_nothing_happens_at_no_strength() -> None:
    for done in (
        noise.gaussian_noise(PHOTOS, KEY, 0.0),
        noise.speckle_noise(PHOTOS, KEY, 0.0),
        noise.impulse_noise(PHOTOS, KEY, 0.0),
        blur.gaussian_blur(PHOTOS, KEY, 0.1),
        blur.defocus_blur(PHOTOS, KEY, 0.3, 0.01),
        blur.glass_blur(PHOTOS, KEY, 0.05, 1, 0),
        blur.motion_blur(PHOTOS, KEY, 0, 1.0),
        blur.zoom_blur(PHOTOS, KEY, 1.01, 0.01),
        weather.snow(PHOTOS, KEY, 0.0, 0.0, 1, 0.5, 2, 1.0, 1.0),
        weather.frost(PHOTOS, KEY, 1.0, 0.0),
        weather.fog(PHOTOS, KEY, 0.0, 2.0),
        digital.brightness(PHOTOS, KEY, 0.0),
        digital.contrast(PHOTOS, KEY, 1.0),
        digital.saturate(PHOTOS, KEY, 1.0, 0.0),
        digital.pixelate(PHOTOS, KEY, 1.0),
        digital.elastic_transform(PHOTOS, KEY, 0.0, 0.1, 0.0),
        spatter.spatter(PHOTOS, KEY, 0.0, 0.1, 1.0, 0.9, 0.6, 0),
        spatter.spatter(PHOTOS, KEY, 0.0, 0.1, 1.0, 0.9, 0.6, 1),
        affine.translate(PHOTOS, KEY, 0),
        affine.rotate(PHOTOS, KEY, 0.0),
        affine.scale(PHOTOS, KEY, 1.0),
    ):
        assert torch.allclose(done, PHOTOS[: len(done)], atol=1e-12)


@pytest.mark.parametrize(
    ("border", "mode"), [("edge", "nearest"), ("mirror", "mirror"), ("reflect", "reflect")]
)
def test_filters_are_those_of_scipy(border: filters.Border, mode: str) -> None:
    planes = random(2, 3, 12, 17)
    for sigma, truncate in ((0.4, 4.0), (2.5, 3.0), (20.0, 3.0)):
        smooth = filters.gaussian(planes, sigma, border=border, truncate=truncate)
        expected = ndimage.gaussian_filter(
            planes.numpy(), (0, 0, sigma, sigma), mode=mode, truncate=truncate
        )
        np.testing.assert_allclose(smooth, expected, atol=1e-13)
    kernels = random(2, 1, 9, 9)
    filtered = filters.correlate(planes, kernels, border=border)
    y, x = random(2, 12, 17) * 60 - 25, random(2, 12, 17).flip(0) * 60 - 20
    moved = filters.warp(planes, y, x, border=border)
    for i in range(2):
        for c in range(3):
            plane = planes[i, c].numpy()
            expected = ndimage.correlate(plane, kernels[i, 0].numpy(), mode=mode)
            np.testing.assert_allclose(filtered[i, c], expected, atol=1e-12)
            expected = ndimage.map_coordinates(
                plane, [y[i].numpy(), x[i].numpy()], order=1, mode=mode
            )
            np.testing.assert_allclose(moved[i, c], expected, atol=1e-12)


def test_motion_goes_along_its_path() -> None:
    planes, angle = random(3, 1, 10, 14), torch.tensor([0.0, 30.0, -120.0], dtype=torch.float64)
    smeared = filters.motion(planes, angle, 3, 2.0)
    weights = np.exp(-0.5 * (np.arange(7) / 2.0) ** 2)
    for i, degrees in enumerate(angle.tolist()):
        expected = np.zeros((10, 14))
        for step, weight in enumerate(weights / weights.sum()):
            down = math.ceil(step * math.sin(math.radians(degrees)) - 0.5)
            right = math.ceil(step * math.cos(math.radians(degrees)) - 0.5)
            rows = (np.arange(10) + down).clip(0, 9)
            columns = (np.arange(14) + right).clip(0, 13)
            expected += weight * planes[i, 0].numpy()[rows[:, None], columns]
        np.testing.assert_allclose(smeared[i, 0], expected, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.07, 1.3, 2.5])
def test_zoom_is_that_of_scipy(factor: float) -> None:
    planes = random(1, 1, 15, 15)
    cut = math.ceil(15 / factor)
    first = (15 - cut) // 2
    part = planes[0, 0, first : first + cut, first : first + cut].numpy()
    large = ndimage.zoom(part, factor, order=1)
    first = (len(large) - 15) // 2
    expected = large[first : first + 15, first : first + 15]
    np.testing.assert_allclose(blur.zoomed(planes, factor)[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_takes_one_pixel_after_the_other(reach: int) -> None:
    """The chains of sources against the loop that they replace."""
    planes, keys = random(3, 1, 21, 26), KEY[:3]
    source = blur._sources(planes, keys, reach, stream=5)
    shifts = (draws.uniform(keys, 2, 21, 26, stream=5) * (2 * reach)).floor().long() - reach
    chains = 0
    for i in range(3):
        values, filled = planes[i, 0].numpy().copy(), set()
        for row in range(21 - reach, reach, -1):
            for column in range(26 - reach, reach, -1):
                dy, dx = shifts[i, :, row, column].tolist()
                values[row, column] = values[row + dy, column + dx]
                chains += (row + dy, column + dx) in filled
                filled.add((row, column))
        assert np.array_equal(planes[i, 0].flatten()[source[i]].view(21, 26), values)
    assert (chains > 0) == (reach > 1)


def test_the_landscape_is_that_of_midpoints() -> None:
    """Point by point, on a torus."""
    keys, size, decay = KEY[:1], 16, 1.7
    drawn = (2 * draws.uniform(keys, size, size) - 1)[0].numpy()
    land, step, wobble = np.zeros((size, size)), size, 100.0
    while step > 1:
        half = step // 2
        for kind in ("middle", "side"):
            before = land.copy()
            for row in range(0, size, half):
                for column in range(0, size, half):
                    odd = (row // half % 2) + (column // half % 2)
                    if kind == "middle" and odd == 2:
                        around = [(-half, -half), (-half, half), (half, -half), (half, half)]
                    elif kind == "side" and odd == 1:
                        around = [(-half, 0), (half, 0), (0, -half), (0, half)]
                    else:
                        continue
                    near = [before[(row + y) % size, (column + x) % size] for y, x in around]
                    land[row, column] = np.mean(near) + wobble**2 * drawn[row, column]
        step, wobble = half, wobble / decay
    land = (land - land.min()) / (land.max() - land.min())
    found = weather._landscape(torch.zeros(1, 3, 9, 16), keys, decay)
    np.testing.assert_allclose(found[0], land[:9], atol=1e-12)


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    images = random(1, 3, 8, 8)
    images[..., 0, 0], images[..., 0, 1], images[..., 0, 2] = 0, 1, 0.4
    lit = digital.brightness(images, KEY[:1], 0.3)
    vivid = digital.saturate(images, KEY[:1], 2.0, 0.1)
    for row in range(8):
        for column in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.3))
            np.testing.assert_allclose(lit[0, :, row, column], expected, atol=1e-12)
            expected = colorsys.hsv_to_rgb(hue, min(1.0, 2 * saturation + 0.1), value)
            np.testing.assert_allclose(vivid[0, :, row, column], expected, atol=1e-12)


def test_contrast_keeps_the_mean_of_each_channel() -> None:
    flat = digital.contrast(PHOTOS, KEY, 0.4)
    assert torch.allclose(flat.mean(dim=(2, 3)), PHOTOS.mean(dim=(2, 3)))
    assert torch.allclose(flat.std(dim=(2, 3)), 0.4 * PHOTOS.std(dim=(2, 3)))


@pytest.mark.parametrize("shape", [(32, 32), (19, 50)])
@pytest.mark.parametrize("factor", [0.95, 0.6, 0.25])
def test_pixels_are_those_of_pillow(shape: tuple[int, int], factor: float) -> None:
    images = (random(2, 3, *shape) * 255).round() / 255
    found = (digital.pixelate(images, KEY[:2], factor) * 255).round()
    height, width = shape
    for image, one in zip(images, found, strict=True):
        pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        small = pixels.resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
        large = small.resize((width, height), Image.Resampling.BOX)
        assert np.array_equal(one.permute(1, 2, 0), np.asarray(large))


def test_jpeg_is_that_of_pillow() -> None:
    coded = corruptions.corrupt(PHOTOS.float(), torch.arange(4), "jpeg_compression", 5)
    file = BytesIO()
    first = Image.fromarray((PHOTOS[0] * 255).round().byte().permute(1, 2, 0).numpy())
    first.save(file, "JPEG", quality=40)
    with Image.open(file) as image:
        assert np.array_equal((coded[0] * 255).round().permute(1, 2, 0), np.asarray(image))


def test_a_shear_takes_corners_to_corners() -> None:
    """Without waves, the corners of the middle square are where they were moved to."""
    y, x = (torch.arange(n, dtype=torch.float64) for n in (40, 60))
    images = torch.stack([y[:, None].expand(40, 60), x.expand(40, 60), 0 * x.expand(40, 60)])[None]
    keys = KEY[:1]
    moved = (2 * draws.uniform(keys, 2, 3) - 1)[0] * 0.1 * 40
    sheared = digital.elastic_transform(images, keys, 0.0, 0.1, 0.1)[0, :2]
    corners = torch.tensor([[33, 7, 7], [43, 43, 17]])  # ± 40 // 3 about (20, 30)
    for corner, to in zip(corners.T.double(), (corners + moved).T, strict=True):
        row, column = (int(n) for n in to.floor())
        part = sheared[:, row : row + 2, column : column + 2]  # linear in between
        down, right = to - to.floor()
        top = part[:, 0, 0] * (1 - right) + part[:, 0, 1] * right
        bottom = part[:, 1, 0] * (1 - right) + part[:, 1, 1] * right
        assert torch.allclose(top * (1 - down) + bottom * down, corner, atol=1e-9)


def test_moves_are_exact() -> None:
    images = random(40, 3, 11, 15)
    keys = draws.keys(0, "test", 2, torch.arange(40))
    found = set()
    for image, moved in zip(images, affine.translate(images, keys, 3), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (3, 3), (3, 3)), mode="reflect")
        for top, left in ((0, 3), (6, 3), (3, 0), (3, 6)):
            if np.allclose(padded[:, top : top + 11, left : left + 15], moved, atol=1e-12):
                found.add((top, left))
                break
        else:
            raise AssertionError("no move of 3 pixels")
    assert len(found) == 4
    # From 64 pixels on, of 32nds of the side.
    large = random(1, 3, 96, 128)
    padded = np.pad(large[0].numpy(), ((0, 0), (9, 9), (9, 9)), mode="reflect")
    moved = affine.translate(large, KEY[:1], 3)[0]
    assert any(
        np.allclose(padded[:, top : top + 96, left : left + 128], moved, atol=1e-12)
        for top, left in ((0, 9), (18, 9), (9, 0), (9, 18))
    )


def test_turns_and_scales_are_about_the_middle() -> None:
    keys = draws.keys(0, "test", 2, torch.arange(20))
    images = random(1, 3, 21, 21).expand(20, -1, -1, -1)
    quarter = affine.rotate(images, keys, 90.0)
    turned = {
        turns
        for image in quarter
        for turns in (1, -1)
        if torch.allclose(image, images[0].rot90(turns, (1, 2)), atol=1e-9)
    }
    assert turned == {1, -1}
    scaled = affine.scale(images, keys, 2.0)
    small, large = 0, 0
    for image in scaled:
        assert torch.allclose(image[:, 10, 10], images[0, :, 10, 10])
        small += torch.allclose(image[:, 5:16, 5:16], images[0, :, ::2, ::2], atol=1e-9)
        large += torch.allclose(image[:, ::2, ::2], images[0, :, 5:16, 5:16], atol=1e-9)
    assert small + large == 20
    assert min(small, large) > 2


def test_snow_brightens_and_fog_lowers_contrast() -> None:
    keys = draws.keys(0, "test", 3, torch.arange(4))
    snowed = weather.snow(PHOTOS, keys, 0.1, 0.3, 3, 0.5, 10, 4, 0.8)
    assert (snowed >= PHOTOS - 1e-9).all()
    layer = weather.snow(torch.zeros_like(PHOTOS), keys, 0.3, 0.3, 1, 0.5, 4, 2.0, 1.0)
    assert torch.allclose(layer, layer.flip(-2, -1))  # flakes, and again turned by 180 degrees
    assert torch.allclose(layer[:, :1].expand_as(layer), layer)
    fogged = weather.fog(PHOTOS, keys, 2.0, 2.0)
    assert (fogged.amax(dim=(1, 2, 3)) <= PHOTOS.amax(dim=(1, 2, 3)) + 1e-12).all()
    assert (fogged.std(dim=(2, 3)) < PHOTOS.std(dim=(2, 3))).all()


def test_drops_have_the_edges_of_canny() -> None:
    """Ridges and what hangs together, pixel by pixel."""
    liquid = filters.gaussian(0.65 + 0.3 * draws.normal(KEY[:2], 1, 26, 31), 1.0)
    depth = (torch.where(liquid < 0.69, 0.0, liquid) * 255).floor() % 256
    for plane, found in zip(depth[:, 0].numpy(), spatter._edges(depth)[:, 0].numpy(), strict=True):
        wide = np.pad(plane, 1, mode="edge")
        along = ndimage.sobel(wide, axis=1)[1:-1, 1:-1]
        down = ndimage.sobel(wide, axis=0)[1:-1, 1:-1]
        height = np.pad(np.abs(along) + np.abs(down), 1)
        weak = np.zeros(plane.shape, bool)
        for row in range(26):
            for column in range(31):
                x, y, here = along[row, column], down[row, column], height[row + 1, column + 1]
                near = height[row : row + 3, column : column + 3]
                if abs(y) < math.tan(math.pi / 8) * abs(x):
                    ridge = here > near[1, 0] and here >= near[1, 2]
                elif abs(y) > math.tan(3 * math.pi / 8) * abs(x):
                    ridge = here > near[0, 1] and here >= near[2, 1]
                elif x * y < 0:
                    ridge = here > near[0, 2] and here > near[2, 0]
                else:
                    ridge = here > near[0, 0] and here > near[2, 2]
                weak[row, column] = ridge and here > 50
        areas, _ = ndimage.label(weak, np.ones((3, 3)))
        strong = weak & (height[1:-1, 1:-1] > 150)
        assert np.array_equal(found, weak & np.isin(areas, areas[strong]))
        assert strong.any()
        assert (found != strong).any()


def test_distances_are_euclidean_and_spread_evenly() -> None:
    edges = random(2, 1, 40, 70) < 0.002
    edges[0, 0, 20, 30] = True
    found = spatter._distance(edges)
    for plane, one in zip(edges[:, 0].numpy(), found[:, 0].numpy(), strict=True):
        far = ndimage.distance_transform_edt(~plane) if plane.any() else np.full(plane.shape, 99)
        np.testing.assert_allclose(one, np.minimum(far, 20), atol=1e-12)
    values = found.floor()
    even = spatter._equalised(values)
    for before, after in zip(values[:, 0].numpy(), even[:, 0].numpy(), strict=True):
        least = (before == before.min()).sum()
        for level in np.unique(before):
            share = ((before <= level).sum() - least) / (before.size - least)
            assert (after[before == level] == np.round(255 * share)).all()
    same = torch.full((1, 1, 5, 5), 7.0)
    assert torch.equal(spatter._equalised(same), same)


def test_water_brightens_and_mud_covers() -> None:
    black = torch.zeros(4, 3, 64, 64, dtype=torch.float64)
    water = spatter.spatter(black, KEY, 0.65, 0.3, 2.0, 0.68, 0.5, 0)
    colour = torch.tensor([175, 238, 238]).double() / 255
    assert torch.allclose(water.amax(dim=(2, 3)), 0.5 * colour.expand(4, 3))
    mud = spatter.spatter(black + 1, KEY, 0.65, 0.3, 1.0, 0.65, 1.5, 1)
    colour = torch.tensor([63, 42, 20]).double() / 255
    assert torch.allclose(mud.amin(dim=(2, 3)), colour.expand(4, 3), atol=0.015)
    assert ((mud == 1).double().mean(dim=(1, 2, 3)) > 0.2).all()


def test_frost_has_the_strength_of_the_photographs() -> None:
    """Mean colour 0.56, 0.65, 0.69; deviation of the brightness between them 0.15, within 0.1."""
    keys = draws.keys(0, "test", 1, torch.arange(400))
    ice = weather.frost(torch.zeros(400, 3, 32, 32, dtype=torch.float64), keys, 1.0, 1.0)
    colours = torch.tensor([0.56, 0.65, 0.69]).double()
    assert torch.allclose(ice.mean(dim=(0, 2, 3)), colours, atol=0.03)
    grey = ice.mean(dim=1)
    assert 0.13 < grey.mean(dim=(1, 2)).std() < 0.17
    assert 0.08 < grey.std(dim=(1, 2)).mean() < 0.1


def test_every_severity_differs() -> None:
    ids = torch.arange(4)
    for name in corruptions.names():
        made = [corruptions.corrupt(PHOTOS.float(), ids, name, s) for s in corruptions.SEVERITIES]
        for i in range(5):
            for j in range(i):
                assert psnr(made[i], made[j]).max() < 60, name

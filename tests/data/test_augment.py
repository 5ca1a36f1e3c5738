"""Every augmentation against torchvision, or against the paper's definition written out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from distill import component
from distill.data import augment
from distill.data.augment import _ops, _policy
from distill.data.augment._augmentation import Augmentation, Plan, to_device
from distill.data.augment._canvas import Canvas
from distill.data.augment.color_jitter import ColorJitter
from distill.data.augment.crop import Crop
from distill.data.augment.erase import Erase
from distill.data.augment.flip import Flip
from distill.data.augment.randaugment import RandAugment
from distill.data.augment.resized_crop import ResizedCrop
from distill.data.augment.trivialaugment import TrivialAugment
from distill.errors import RecipeError
from distill.recipe import Data

CPU = torch.device("cpu")
ALL = (Crop, Flip, ResizedCrop, ColorJitter, RandAugment, TrivialAugment, Erase)
TORCHVISION = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "autocontrast": "AutoContrast",
}


def pictures(num: int, height: int = 32, width: int = 32) -> Tensor:
    """Noise, soft pictures, flat ones, and ones of few values: histograms of every kind."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(num, 3, height, width, generator=generator)
    coarse = torch.rand(num, 3, 4, 4, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = torch.where(torch.arange(num)[:, None, None, None] % 2 == 0, noise, soft)
    images = (images * 255.999).to(torch.uint8)
    images[0::7] = images[0::7] // 100 * 100
    images[1::13] = images[1::13, :, :1, :1]
    images[2::11] = images[2::11] // 8 + 60
    return images


def drawn(augmentation: Augmentation, num: int, height: int = 32, width: int = 32) -> Plan:
    uniforms = np.random.default_rng(3).random((num, augmentation.num_draws))
    return to_device(augmentation.plan(uniforms, height=height, width=width), CPU)


def difference(first: Tensor, second: Tensor) -> tuple[int, float]:
    """The greatest difference in levels, and the part of all values that differ."""
    levels = (first.int() - second.int()).abs()
    return int(levels.max()), float((levels > 0).float().mean())


@pytest.mark.parametrize("kind", ALL)
def test_an_image_is_changed_the_same_in_any_batch_and_layout(kind: type[Augmentation]) -> None:
    augmentation = kind()
    images, plan = pictures(24), drawn(augmentation, 24)
    before = images.clone()
    whole = augmentation.apply(images, plan)
    assert torch.equal(images, before)
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    assert not torch.equal(whole, images)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augmentation.apply(last, plan), whole)
    for row in range(24):
        rows = slice(row, row + 1)
        assert torch.equal(augmentation.apply(images[rows], plan.rows(rows)), whole[rows])
    gray = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(augmentation.apply(gray, plan), augmentation.apply(gray.clone(), plan))


@pytest.mark.parametrize("kind", ALL)
def test_the_same_numbers_always_draw_the_same(kind: type[Augmentation]) -> None:
    augmentation = kind()
    uniforms = np.random.default_rng(0).random((100, augmentation.num_draws))
    whole = augmentation.plan(uniforms, height=30, width=30)
    part = augmentation.plan(uniforms[40:41], height=30, width=30)
    assert all(np.array_equal(part[name], values[40:41]) for name, values in whole.items())


def test_crop_is_a_window_of_the_padded_image() -> None:
    images = pictures(200)
    plan = drawn(Crop(), 200)
    padded = F.pad(images, [4, 4, 4, 4])
    tops, lefts = plan.host["top"], plan.host["left"]
    assert set(tops) == set(lefts) == set(range(9))
    cropped = Crop().apply(images, plan)
    for row, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        assert torch.equal(cropped[row], padded[row, :, top : top + 32, left : left + 32])


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (28, 3), (32, 4), (224, 28), (7, 0)])
def test_crop_pads_an_eighth(size: int, padding: int) -> None:
    assert Crop().padding(size) == padding
    assert Crop(padding=2).padding(size) == 2
    uniforms = np.array([[0.0, 0.0], [np.nextafter(1, 0)] * 2])
    plan = Crop().plan(uniforms, height=size, width=size)
    assert plan["top"].tolist() == plan["left"].tolist() == [0, 2 * padding]


def test_flip_mirrors_its_part() -> None:
    images, plan = pictures(4000, 4, 4), drawn(Flip(probability=0.3), 4000)
    flipped = Flip().apply(images, plan)
    chosen = torch.from_numpy(plan.host["flip"])
    assert torch.equal(flipped[chosen], F.horizontal_flip(images[chosen]))
    assert torch.equal(flipped[~chosen], images[~chosen])
    assert chosen.float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_every_window_of_a_canvas(padding: int) -> None:
    images = torch.randint(0, 256, (3, 5, 6, 2), dtype=torch.uint8)
    canvas = Canvas(images, padding=padding, mirrored=True)
    for flip in (0, 1):
        padded = F.pad((images.flip(2) if flip else images).permute(0, 3, 1, 2), [padding] * 4)
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                offsets = canvas.offsets(torch.arange(3), top, left, flip)
                expected = padded[..., top : top + 5, left : left + 6]
                assert torch.equal(canvas.windows(offsets), expected)


def boxes_one_by_one(
    uniforms: ndarray, height: int, width: int, scale: tuple[float, float], ratio: ndarray
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop, reading its random numbers from `uniforms`."""
    for number in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * number])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * uniforms[2 * number + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniforms[20] * (height - h + 1))
            return top, int(uniforms[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (20, 400), (400, 20), (1, 1)])
def test_resized_crop_draws_torchvisions_boxes(size: tuple[int, int]) -> None:
    height, width = size
    uniforms = np.random.default_rng(0).random((300, 22))
    plan = ResizedCrop().plan(uniforms, height=height, width=width)
    ratio = np.array([3 / 4, 4 / 3])
    for row in range(300):
        expected = boxes_one_by_one(uniforms[row], height, width, (0.08, 1.0), ratio)
        got = tuple(int(plan[key][row]) for key in ("top", "left", "height", "width"))
        assert got == expected


@pytest.mark.parametrize("size", [8, 32, 45])
def test_resized_crop_of_pixels_in_memory_is_torchvisions(size: int) -> None:
    images, plan = pictures(100, size, size), drawn(ResizedCrop(), 100, size, size)
    cropped = ResizedCrop().apply(images, plan)
    boxes = [[int(plan.host[key][row]) for key in plan.host] for row in range(100)]
    expected = [F.resized_crop(images[row], *box, [size, size]) for row, box in enumerate(boxes)]
    # torchvision rounds once more, between the rows and the columns.
    assert difference(cropped, torch.stack(expected))[0] <= 1
    in_float = [
        F.resized_crop(images[row].double(), *box, [size, size]) for row, box in enumerate(boxes)
    ]
    assert (cropped - torch.stack(in_float)).abs().max() < 0.65


def test_resized_crop_of_a_file_is_torchvisions() -> None:
    uniforms = np.random.default_rng(0).random((20, 22))
    picture = pictures(3, 90, 120)[1]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    plan = ResizedCrop().plan(uniforms, height=90, width=120)
    for row in range(20):
        box = [int(plan[key][row]) for key in plan]
        expected = F.resized_crop(picture, *box, [32, 32], antialias=True)
        got = torch.tensor(ResizedCrop().cut(image, uniforms[row], size=32)).permute(2, 0, 1)
        assert difference(got, expected)[0] <= 1


def table(signed: bool, low: float, high: float) -> Tensor:
    values = torch.linspace(low, high, 31, dtype=torch.float64)
    return torch.cat((values, -values)) if signed else values


MASKS = 256 - 2.0 ** torch.arange(9)
Reference = Callable[[Tensor, float], Tensor]
# Ours, torchvision's, the arguments, and the part of all values that may differ by one level.
PARITY: list[tuple[_ops.Operation, Reference, Tensor, float]] = [
    (_ops.brightness, F.adjust_brightness, 1 + table(True, 0, 0.99), 0),
    (_ops.contrast, F.adjust_contrast, 1 + table(True, 0, 0.99), 0.002),
    (_ops.saturation, F.adjust_saturation, 1 + table(True, 0, 0.99), 0.004),
    (_ops.sharpness, F.adjust_sharpness, 1 + table(True, 0, 0.99), 0.001),
    (_ops.posterize, lambda x, mask: F.posterize(x, int(mask).bit_count()), MASKS, 0),
    (_ops.solarize, F.solarize, table(False, 0, 255), 0),
    (_ops.autocontrast, lambda x, _: F.autocontrast(x), torch.zeros(31), 0),
    (_ops.equalize, lambda x, _: F.equalize(x), torch.zeros(31), 0),
    (_ops.hue, F.adjust_hue, table(True, 0, 0.5), 0.001),
]


@pytest.mark.parametrize(
    ("operation", "reference", "arguments", "part"), PARITY, ids=[row[0].__name__ for row in PARITY]
)
@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_an_operation_is_torchvisions(
    operation: _ops.Operation,
    reference: Reference,
    arguments: Tensor,
    part: float,
    size: tuple[int, int],
) -> None:
    images = pictures(3 * len(arguments), *size)
    arguments = arguments.repeat(3)
    got = operation(images, arguments[:, None].double())
    expected = [reference(x, float(value)) for x, value in zip(images, arguments, strict=True)]
    greatest, differing = difference(got, torch.stack(expected))
    assert greatest <= (1 if part else 0)
    assert differing <= part


def test_sharpness_leaves_images_without_an_inside() -> None:
    images = pictures(4, 2, 9)
    assert torch.equal(_ops.sharpness(images, torch.zeros(4, 1)), images)


GEOMETRY: dict[str, Reference] = {
    "shear_x": lambda x, m: F.affine(
        x, 0, [0, 0], 1, [math.degrees(math.atan(m)), 0], center=[0, 0]
    ),
    "shear_y": lambda x, m: F.affine(
        x, 0, [0, 0], 1, [0, math.degrees(math.atan(m))], center=[0, 0]
    ),
    "translate_x": lambda x, m: F.affine(x, 0, [int(m), 0], 1, [0, 0]),
    "translate_y": lambda x, m: F.affine(x, 0, [0, int(m)], 1, [0, 0]),
    "rotate": lambda x, m: F.rotate(x, m),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_geometry_is_torchvisions(name: str, size: tuple[int, int]) -> None:
    limits = {"shear_x": 0.99, "shear_y": 0.99, "rotate": 135}
    images = pictures(62, *size)
    strengths, signs = np.tile(np.arange(31), 2), np.repeat([1, -1], 31)
    plan = policy(name, strengths, signs, *size)
    got = _ops.apply(images, to_device(plan, CPU))
    exact = signs * strengths / 30 * limits.get(name, 32)
    expected = [GEOMETRY[name](x, float(value)) for x, value in zip(images, exact, strict=True)]
    assert difference(got, torch.stack(expected))[1] < 1e-4  # places half-way between two pixels


def policy(
    name: str, strengths: ndarray, signs: ndarray, height: int, width: int
) -> dict[str, ndarray]:
    choices = np.full(len(strengths), _policy.NAMES.index(name))
    limits = _policy.Limits(0.99, 32, 32, 135, 0.99, 6)
    return _policy.plan(choices, strengths, signs, limits=limits, height=height, width=width)


def test_trivialaugment_has_torchvisions_operations_and_strengths() -> None:
    reference = v2.TrivialAugmentWide()
    space = reference._AUGMENTATION_SPACE
    names = [TORCHVISION.get(name, name.capitalize()) for name in _policy.NAMES]
    assert set(names) == set(space)
    images = pictures(31)
    for number, name in enumerate(names):
        magnitudes = space[name][0](31, 32, 32)
        uniforms = np.column_stack(
            (np.full(31, (number + 0.5) / 14), (np.arange(31) + 0.5) / 31, np.full(31, 0.75))
        )
        plan = to_device(TrivialAugment().plan(uniforms, height=32, width=32), CPU)
        got = TrivialAugment().apply(images, plan)
        expected = [
            reference._apply_image_or_video_transform(
                x,
                name,
                # In float32 the table falls a hair short of whole pixels.
                0.0 if magnitudes is None else round(float(magnitudes[row]), 5),
                interpolation=InterpolationMode.NEAREST,
                fill={Tensor: None, "others": None},
            )
            for row, x in enumerate(images)
        ]
        greatest, differing = difference(got, torch.stack(expected))
        assert differing < (0.02 if name == "Solarize" else 0.005), name
        assert greatest <= 1 or name in ("Solarize", "Rotate", "ShearX", "ShearY"), name


def test_randaugment_has_torchvisions_operations_and_strengths() -> None:
    reference = v2.RandAugment(num_ops=1, magnitude=9)
    images = pictures(28)
    uniforms = np.column_stack(
        (np.repeat((np.arange(14) + 0.5) / 14, 2), np.tile([0.25, 0.75], 14))
    )
    got = RandAugment(num_ops=1).apply(
        images, to_device(RandAugment(num_ops=1).plan(uniforms, height=32, width=32), CPU)
    )
    for row, image in enumerate(images):
        name = _policy.NAMES[row // 2]
        name = TORCHVISION.get(name, name.capitalize())
        make, signed = reference._AUGMENTATION_SPACE[name]
        magnitudes = make(31, 32, 32)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[9])
        expected = reference._apply_image_or_video_transform(
            image,
            name,
            -magnitude if signed and row % 2 == 0 else magnitude,
            interpolation=InterpolationMode.NEAREST,
            fill={Tensor: None, "others": None},
        )
        greatest, differing = difference(got[row], expected)
        assert greatest <= 1, name
        assert differing < 0.005, name


def test_rounds_follow_each_other_and_choices_are_even() -> None:
    plan = drawn(RandAugment(num_ops=3), 14_000)
    assert plan.host["operation"].shape == (14_000, 3)
    images = pictures(50)
    few = plan.rows(slice(50))
    one_by_one = images
    for turn in range(3):
        single = {name: values[:, turn : turn + 1] for name, values in few.host.items()}
        one_by_one = _ops.apply(one_by_one, to_device(single, CPU))
    assert torch.equal(RandAugment(num_ops=3).apply(images, few), one_by_one)
    choices = _policy.choose(np.random.default_rng(0).random(14_000), 14)
    assert np.abs(np.bincount(choices, minlength=14) - 1000).max() < 150


def test_color_jitter_applies_its_factors_in_the_drawn_order() -> None:
    jitter = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)
    images, plan = pictures(40), drawn(jitter, 40)
    got = jitter.apply(images, plan)
    references = {
        _ops.brightness: F.adjust_brightness,
        _ops.contrast: F.adjust_contrast,
        _ops.saturation: F.adjust_saturation,
        _ops.hue: F.adjust_hue,
    }
    orders = set()
    for row, image in enumerate(images):
        expected = image[None]
        numbers = plan.host["operation"][row]
        orders.add(tuple(numbers))
        for number, argument in zip(numbers, plan.host["arguments"][row, :, 0], strict=True):
            expected = references[_ops.OPERATIONS[number]](expected, float(argument))
        assert difference(got[row], expected[0])[1] < 0.05
    assert len(orders) > 15
    assert all(len(set(order)) == 4 for order in orders)


def test_color_jitter_keeps_to_its_ranges_and_skips_what_is_off() -> None:
    jitter = ColorJitter(brightness=0.4, contrast=0.0, saturation=1.5, hue=0.1)
    plan = jitter.plan(np.random.default_rng(0).random((5000, 8)), height=9, width=9)
    ranges = {_ops.brightness: (0.6, 1.4), _ops.saturation: (0, 2.5), _ops.hue: (-0.1, 0.1)}
    for operation, (low, high) in ranges.items():
        values = plan["arguments"][plan["operation"] == _ops.OPERATIONS.index(operation)]
        assert len(values) == 5000
        assert values.min() == pytest.approx(low, abs=0.01)
        assert values.max() == pytest.approx(high, abs=0.01)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.04)
    assert (plan["operation"] != _ops.OPERATIONS.index(_ops.contrast)).all()


def test_erase_fills_a_box_with_the_mean() -> None:
    images, plan = pictures(300), drawn(Erase(probability=0.6), 300)
    erased = Erase().apply(images, plan)
    hits = 0
    for row, (top, bottom, left, right) in enumerate(plan.host["box"]):
        expected = images[row].clone()
        mean = images[row].double().mean(dim=(1, 2)).floor().to(torch.uint8)
        expected[:, top:bottom, left:right] = mean[:, None, None]
        assert torch.equal(erased[row], expected)
        area, hit = (bottom - top) * (right - left) / 1024, bottom > top
        hits += hit
        assert not hit or 0.01 < area < 0.36
    assert hits == pytest.approx(180, abs=35)


def test_a_box_that_cannot_fit_erases_nothing() -> None:
    plan = Erase(probability=1, min_scale=0.9, max_scale=1, min_ratio=3, max_ratio=4).plan(
        np.random.default_rng(0).random((50, 23)), height=32, width=32
    )
    assert not plan["box"].any()


def test_teachers_need_not_see_what_was_erased() -> None:
    student_only = {
        name
        for name, definition in component.find("data.augment").items()
        if definition.constants.get("student_only", False)
    }
    assert student_only == {"erase"}


def test_all_augmentations_are_components_with_the_keys_of_their_constructors() -> None:
    found = component.find("data.augment")
    assert {definition.attribute for definition in found.values()} == {k.__name__ for k in ALL}
    for kind in ALL:
        name = next(name for name, d in found.items() if d.attribute == kind.__name__)
        parameters = inspect.signature(kind).parameters
        assert list(found[name].keys.model_fields) == list(parameters)
        assert found[name].summary


def test_build_gives_each_place_numbers_of_its_own() -> None:
    data = Data(name="digits", augment=["flip", {"name": "crop", "padding": 1}, "flip"])
    stages = augment.build(data.augment, seed=5)
    assert [type(stage.augmentation) for stage in stages] == [Flip, Crop, Flip]
    ids = np.arange(1000)
    first, second = stages[0].uniforms(ids, 0), stages[2].uniforms(ids, 0)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.12
    again = augment.build(data.augment, seed=5)[0]
    assert np.array_equal(again.uniforms(ids[3:4], 0), first[3:4])


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "randaugment", "magnitude": 31},
        {"name": "erase", "min_scale": 0.5, "max_scale": 0.4},
        {"name": "resized_crop", "min_ratio": 2.0},
        {"name": "flip", "probability": 1.5},
    ],
)
def test_arguments_without_a_meaning_are_refused(spec: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        augment.build(Data(name="digits", augment=[spec]).augment, seed=0)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distill.data.images import evaluation_view
from distill.errors import IncompatibleError
from distill.export import program
from distill.export.program import Preprocessing, Resize, Student
from tests.export.conftest import pixels

UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.6])
@pytest.mark.parametrize(
    "size",
    [(32, 32), (64, 64), (20, 20), (33, 47), (150, 90), (31, 200), (7, 5), (200, 31), (1, 1)],
)
def test_pictures_become_what_the_student_was_evaluated_on(
    size: tuple[int, int], crop: float
) -> None:
    height, width = size
    rng = np.random.default_rng(height * width)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = evaluation_view(Image.fromarray(picture), size=32, crop=crop)
    resize = Resize(Preprocessing(32, round(32 / crop), *UNIT))
    found = resize(torch.from_numpy(picture[None]))[0].permute(1, 2, 0).numpy() * 255
    levels = abs(found - expected)
    # Ties between two levels fall either way; from 13 on Pillow scales tall ones upright first.
    assert levels.max() < 2.01
    assert levels.mean() < (0.03 if width >= height else 0.3)


def test_pictures_of_the_size_are_not_touched() -> None:
    picture = torch.from_numpy(pixels(32, 3))
    found = Resize(Preprocessing(32, 32, *UNIT))(picture)
    assert torch.equal(found, picture.permute(0, 3, 1, 2) / 255)


def test_a_picture_is_resized_alone(student: Callable[..., Student]) -> None:
    resize = Resize(student().preprocessing)
    batch = torch.from_numpy(pixels(50, 5))
    alone = torch.cat([resize(picture[None]) for picture in batch])
    assert torch.equal(resize(batch), alone)


@pytest.mark.parametrize("inside", [True, False])
def test_the_program_says_what_the_network_says(
    student: Callable[..., Student], inside: bool
) -> None:
    given = student(inside=inside)
    shown = pixels(32, 9)
    expected = given.network(torch.from_numpy(program.in_unit(shown))).logits
    found = program.classifier(given).module()(torch.from_numpy(given.squares(shown)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if inside:  # the whole is asked for pictures that have to be resized
        large = torch.from_numpy(pixels(77, 3))
        expected = given.network(Resize(given.preprocessing)(large)).logits
        found = program.whole(given).module()(large)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_network_that_is_shown_another_size(student: Callable[..., Student]) -> None:
    given = student()
    given.network.input_size = 40
    images = torch.from_numpy(program.in_unit(pixels(32, 3)))
    found = program.classifier(given).module()(images)
    torch.testing.assert_close(found, given.network(images).logits, atol=1e-5, rtol=0)


class _Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3)) if images.sum() > 0 else images.amax(dim=(1, 2, 3))


def test_what_cannot_be_followed_is_said_with_the_reason() -> None:
    with pytest.raises(IncompatibleError, match=r"mine: torch.export cannot follow it: .*data-dep"):
        program.traced(_Branches(), torch.zeros(2, 3, 4, 4), "mine")


def test_the_program_holds_nothing_of_this_machine(student: Callable[..., Student]) -> None:
    exported = program.whole(student())
    assert exported.example_inputs is None
    kept = {key for node in exported.graph.nodes for key in node.meta}
    assert not kept & {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"}

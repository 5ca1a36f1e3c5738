from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.models.grids import Layout, Size, layouts, to_grid, token_grid

FIRST, LAST, TOKENS = "channels_first", "channels_last", "tokens"


@pytest.mark.parametrize(
    ("shape", "image", "expected"),
    [
        ((2, 64, 56, 56), (224, 224), (FIRST, 64, (56, 56), 0)),
        ((2, 56, 56, 64), (224, 224), (LAST, 64, (56, 56), 0)),
        ((2, 7, 7, 768), (224, 224), (LAST, 768, (7, 7), 0)),
        ((2, 512, 1, 1), (32, 32), (FIRST, 512, (1, 1), 0)),
        ((2, 24, 8, 12), (64, 96), (FIRST, 24, (8, 12), 0)),
        ((2, 12, 8, 24), (96, 64), (LAST, 24, (12, 8), 0)),
        ((2, 8, 8, 12), (64, 96), (FIRST, 8, (8, 12), 0)),  # as a grid, 8 x 8 is of no such image
        # Strides that do not divide the image.
        ((2, 16, 111, 111), (224, 224), (FIRST, 16, (111, 111), 0)),
        ((2, 64, 7, 5), (100, 66), (FIRST, 64, (7, 5), 0)),
        ((2, 7, 5, 64), (100, 66), (LAST, 64, (7, 5), 0)),
        ((2, 8, 24, 15), (100, 66), (FIRST, 8, (24, 15), 0)),  # 7 x 7 kernels at stride 4
        ((2, 35, 64), (100, 66), (TOKENS, 64, (7, 5), 0)),
        # Tokens of a grid alone, and behind a class token, a distillation token and registers.
        ((2, 196, 192), (224, 224), (TOKENS, 192, (14, 14), 0)),
        ((2, 197, 192), (224, 224), (TOKENS, 192, (14, 14), 1)),
        ((2, 198, 192), (224, 224), (TOKENS, 192, (14, 14), 2)),
        ((2, 201, 384), (224, 224), (TOKENS, 384, (14, 14), 5)),
        ((2, 205, 384), (224, 224), (TOKENS, 384, (14, 14), 9)),
        ((2, 1374, 384), (518, 518), (TOKENS, 384, (37, 37), 5)),
        ((2, 730, 64), (224, 224), (TOKENS, 64, (27, 27), 1)),
        ((2, 25, 192), (64, 96), (TOKENS, 192, (4, 6), 1)),
        ((2, 50, 16), (224, 224), (TOKENS, 16, (7, 7), 1)),
    ],
)
def test_the_layout_follows_from_the_size_of_the_image(
    shape: tuple[int, ...], image: Size, expected: tuple[str, int, Size, int]
) -> None:
    assert layouts(shape, image) == [expected]


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((2, 64), (32, 32)),  # a vector
        ((2, 3, 4, 8, 8), (32, 32)),
        ((2, 64, 40, 40), (32, 32)),  # finer than pixels
        ((2, 64, 8, 4), (32, 32)),  # of no square image
        ((2, 12, 8, 64), (64, 96)),  # 12 rows and 8 columns, of an image that lies on its side
        ((2, 768, 384), (224, 224)),  # 27 x 28 with 12 in front would not be square
    ],
)
def test_what_is_no_grid_of_the_image(shape: tuple[int, ...], image: Size) -> None:
    assert layouts(shape, image) == []


@pytest.mark.parametrize("side", [32, 96])
def test_a_cube_may_lie_either_way(side: int) -> None:
    """Its neighbours tell, and they are not known here."""
    found = layouts((2, side, side, side), (384, 384))
    assert found == [(FIRST, side, (side, side), 0), (LAST, side, (side, side), 0)]


def test_of_two_that_are_possible_the_exact_one_is_meant() -> None:
    """6 x 5 might be 96 x 64 pixels at stride 15, but 9 x 6 is so to the last cell."""
    assert layouts((2, 9, 6, 5), (96, 64)) == [(LAST, 5, (9, 6), 0)]
    both = layouts((2, 7, 7, 6), (100, 92))
    assert [layout.kind for layout in both] == [FIRST, LAST]  # neither is exact


def as_channels_first(x: Tensor, prefix: int) -> Tensor:
    return x


def as_channels_last(x: Tensor, prefix: int) -> Tensor:
    return x.permute(0, 2, 3, 1)


def as_tokens(x: Tensor, prefix: int) -> Tensor:
    front = torch.full((len(x), prefix, x.shape[1]), torch.nan)
    return torch.cat([front, x.flatten(2).transpose(1, 2)], dim=1)


FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    FIRST: as_channels_first,
    LAST: as_channels_last,
    TOKENS: as_tokens,
}


def numbered(channels: int, grid: Size) -> Tensor:
    """Every number another one, so that nothing can change places unseen."""
    return torch.arange(2.0 * channels * math.prod(grid)).reshape(2, channels, *grid)


@settings(deadline=None, max_examples=300)
@given(
    image=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    stride=st.sampled_from([1, 2, 3, 4, 7, 8, 14, 16, 32]),
    up=st.booleans(),
    channels=st.sampled_from([1, 3, 64, 96, 301]),
    kind=st.sampled_from([FIRST, LAST]),
)
def test_to_grid_undoes_any_layout_of_any_image(
    image: Size, stride: int, up: bool, channels: int, kind: str
) -> None:
    grid = tuple(-(-n // stride) if up else n // stride for n in image)
    assume(0 < math.prod(grid) <= 2500)
    x = numbered(channels, (grid[0], grid[1]))
    activation = FORMS[kind](x, 0)
    found = layouts(tuple(activation.shape), image)
    (right,) = [layout for layout in found if layout.kind == kind]
    assert (right.channels, right.grid, right.prefix) == (channels, grid, 0)
    assert torch.equal(to_grid(activation, right, image), x)
    if channels > max(image):  # there are no two ways to see it
        assert found == [right]


@settings(deadline=None, max_examples=300)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    stride=st.integers(4, 32),
    prefix=st.integers(0, 9),
)
def test_tokens_of_a_grid_are_never_mistaken(
    rows: int, columns: int, stride: int, prefix: int
) -> None:
    """A class token, a distillation token and registers in front, of an image of any shape.

    Of the grids with the image's shape the next larger one has (2 k + 1) a b cells more, where
    a : b is the shape in lowest terms and k times that the grid; as many tokens in front could be
    cells of it. Grids of 5 x 5 and more are beyond any doubt.
    """
    image = (rows * stride, columns * stride)
    times = math.gcd(rows, columns)
    assume(prefix < (2 * times + 1) * rows * columns / times**2)
    x = numbered(3, (rows, columns))
    activation = as_tokens(x, prefix)
    (found,) = layouts(tuple(activation.shape), image)
    assert found == Layout("tokens", 3, (rows, columns), prefix)
    assert torch.equal(to_grid(activation, found, image), x)


@settings(deadline=None, max_examples=200)
@given(side=st.integers(5, 40), prefix=st.integers(0, 9), pixels=st.integers(40, 640))
def test_nor_those_of_a_square_image_at_any_stride(side: int, prefix: int, pixels: int) -> None:
    assert token_grid(side**2 + prefix, (pixels, pixels)) == (prefix, (side, side))


def test_tokens_of_another_image_are_another_grid() -> None:
    """A layout that was found at one size reads images of any other."""
    (layout,) = layouts((2, 17, 8), (64, 64))
    for image, grid in (((64, 64), (4, 4)), ((96, 64), (6, 4)), ((64, 96), (4, 6))):
        x = numbered(8, grid)
        assert torch.equal(to_grid(as_tokens(x, 1), layout, image), x)


def test_tokens_in_front_are_left_out_and_nothing_is_copied_of_others() -> None:
    x = numbered(4, (3, 5))
    for kind, make in FORMS.items():
        activation = make(x, 2)
        layout = Layout(kind, 4, (3, 5), 2)  # type: ignore[arg-type]
        grid = to_grid(activation, layout, (30, 50))
        assert grid.isfinite().all()
        assert torch.equal(grid, x)
        if kind != TOKENS:
            assert grid.data_ptr() == activation.data_ptr()


def test_as_many_cells_of_another_shape_are_told_by_the_image() -> None:
    layout = Layout("tokens", 3, (4, 4), 1)
    x = torch.arange(2 * 3 * 16.0).reshape(2, 3, 2, 8)
    assert torch.equal(to_grid(as_tokens(x, 1), layout, (32, 128)), x)

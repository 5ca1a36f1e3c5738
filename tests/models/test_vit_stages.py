from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.models import backbones
from distill.models.network import Network
from distill.models.zoo._stages import PatchMerging

SWIN: dict[str, Any] = {
    "width": 8,
    "depth": [1, 2, 1, 1],
    "heads": 1,
    "patch_size": 1,
    "attention": "window",
}


@pytest.mark.parametrize("size", [28, 32])
def test_strides_and_widths_double(student: Callable[..., Network], size: int) -> None:
    anatomy = student("vit", image_size=size, **SWIN).anatomy()
    assert [site.name for site in anatomy.stages] == [f"stages.{i}" for i in range(4)]
    assert [site.channels for site in anatomy.stages] == [8, 16, 32, 64]
    sides = [-(-size // stride) for stride in (1, 2, 4, 8)]  # the 7 x 7 of 28 px becomes 4 x 4
    assert [site.grid for site in anatomy.stages] == [(side, side) for side in sides]


def test_a_head_has_as_many_channels_in_every_stage() -> None:
    model: Any = backbones.build("vit", SWIN, num_classes=3, image_size=16)
    heads = [stage.blocks[0].attention.heads for stage in model.stages]
    assert heads == [1, 2, 4, 8]
    # The last stages hold no more than one window, and the second has a block to shift.
    windows = [stage.blocks[-1].attention for stage in model.stages]
    assert [w.window_size for w in windows] == [(4, 4), (4, 4), (4, 4), (2, 2)]
    assert [w.shift_size for w in windows] == [(0, 0), (2, 2), (0, 0), (0, 0)]


def test_merging_joins_neighbours() -> None:
    merge = PatchMerging(3).double()
    tokens = torch.randn(2, 24, 3, dtype=torch.float64)
    grid = tokens.view(2, 4, 6, 3)
    out, size = merge(tokens, (4, 6))
    assert size == (2, 3)
    four = [grid[:, 2:4, 4:6][:, i, j] for j in (0, 1) for i in (0, 1)]
    expected = merge.reduction(merge.norm(torch.cat(four, dim=-1)))
    torch.testing.assert_close(out[:, 5], expected)


def test_merging_pads_an_odd_grid_by_zeros() -> None:
    merge = PatchMerging(3)
    tokens = torch.randn(2, 5, 3, 3)
    out, size = merge(tokens.flatten(1, 2), (5, 3))
    padded = torch.zeros(2, 6, 4, 3)
    padded[:, :5, :3] = tokens
    assert size == (3, 2)
    torch.testing.assert_close(out, merge(padded.flatten(1, 2), (6, 4))[0])


def test_drop_path_grows_over_all_stages() -> None:
    keys = SWIN | {"drop_path": 0.4}
    model: Any = backbones.build("vit", keys, num_classes=3, image_size=16)
    rates = [block.drop[1].rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_conv_positions_stand_behind_the_first_block_of_every_stage() -> None:
    keys = SWIN | {"position": "conv"}
    model: Any = backbones.build("vit", keys, num_classes=3, image_size=16)
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("merge", "local", "blocks.0", "blocks.1")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.rand(1, 3, 16, 16))
    stage = ["merge", "blocks.0", "local"]
    expected = [f"stages.{i}.{part}" for i in range(4) for part in stage]
    expected.remove("stages.0.merge")
    expected.insert(expected.index("stages.1.local") + 1, "stages.1.blocks.1")
    assert seen == expected

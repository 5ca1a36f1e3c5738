"""What docs/tutorial-errors.md says of common tutorials, shown in a few lines each."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import models, recipe, schedule
from distill.models import backbones
from distill.objectives.kd import kd_loss
from distill.objectives.relations import relations_loss
from distill.objectives.similarity import similarity_loss

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial-errors.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_cites_exists() -> None:
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(cited) > 30
    assert PAGE.count("`tests/") == len(cited)
    missing = [f"{path}::{name}" for path, name in cited if name not in functions(ROOT / path)]
    assert missing == []


def test_every_error_has_its_four_parts() -> None:
    errors = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(errors) > 20
    for error in errors:
        title, _, text = error.partition("\n")
        parts = re.findall(r"^- (Written|True|Because|Shown by): \S", text, flags=re.MULTILINE)
        assert parts == ["Written", "True", "Because", "Shown by"], title


def test_the_page_cites_all_of_this_file() -> None:
    here = {name for name in functions(Path(__file__)) if name.startswith("test_")}
    of_the_page = {name for name in here if "page" in name or "four_parts" in name}
    cited = re.findall(r"`tests/test_tutorial_errors\.py::(\w+)`", PAGE)
    assert set(cited) == here - of_the_page


def test_softened_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.1])
    assert [round(p, 3) for p in logits.softmax(dim=0).tolist()] == [0.659, 0.242, 0.099]
    softened = (logits / 4).softmax(dim=0).tolist()
    assert softened == pytest.approx([0.4165, 0.3244, 0.2590], abs=1e-4)
    temperatures = torch.linspace(1, 10, 901)[:, None]
    wrong = (logits / temperatures).softmax(dim=1) - torch.tensor([0.420, 0.328, 0.252])
    assert wrong.abs().amax(dim=1).min() > 0.004


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("temperature", [2.0, 4.0, 8.0])
def test_without_t_squared_the_soft_part_all_but_vanishes(temperature: float) -> None:
    student, teacher = torch.randn(2, 16, 10)
    student.requires_grad_()
    log_q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    plain = gradient(F.kl_div(log_q, p, reduction="batchmean"), student)
    whole = gradient(kd_loss(student, teacher, temperature=temperature).mean(), student)
    torch.testing.assert_close(plain * temperature**2, whole)


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_mean_over_classes_is_smaller_by_their_number(classes: int) -> None:
    student, teacher = torch.randn(2, 16, classes)
    log_q, p = student.log_softmax(1), teacher.softmax(1)
    with pytest.warns(UserWarning, match="batchmean"):  # PyTorch's default, and it knows
        mean = F.kl_div(log_q, p)
    torch.testing.assert_close(mean * classes, kd_loss(student, teacher, temperature=1).mean())


def test_the_logarithm_of_a_softmax_in_half_precision_is_infinite() -> None:
    logits = torch.tensor([[0.0, -40.0]], dtype=torch.float16)
    assert logits.softmax(dim=1).log()[0, 1] == -math.inf
    assert logits.log_softmax(dim=1)[0, 1] == -40
    assert kd_loss(logits, logits.flip(1), temperature=1).item() == pytest.approx(40)


def entropy(maps: Tensor) -> float:
    return float(-(maps * maps.log()).sum(dim=-1).mean())


def test_a_second_softmax_wipes_an_attention_map_out() -> None:
    student, teacher = (3 * torch.randn(2, 2, 4, 65, 65)).softmax(dim=-1)
    assert entropy(teacher) < 0.5 * math.log(65)
    assert entropy(teacher.softmax(dim=-1)) > 0.999 * math.log(65)
    true = F.kl_div(student.log(), teacher, reduction="sum")
    again = F.kl_div(student.log_softmax(dim=-1), teacher.softmax(dim=-1), reduction="sum")
    assert again < 0.01 * true


@pytest.mark.parametrize("tokens", [65, 197])
def test_attention_maps_cannot_be_far_apart_in_squares(tokens: int) -> None:
    one, other = torch.eye(tokens), torch.eye(tokens).roll(1, dims=1)  # as far as can be
    assert F.mse_loss(one, other).item() == pytest.approx(2 / tokens)


def test_features_of_unlike_networks_have_no_difference() -> None:
    patches, grid = torch.rand(2, 196, 192), torch.rand(2, 512, 7, 7)
    with pytest.raises(RuntimeError, match="must match"), pytest.warns(UserWarning, match="size"):
        F.mse_loss(patches, grid.flatten(2).transpose(1, 2))


def test_attention_without_batch_first_looks_at_other_samples() -> None:
    windows = torch.rand(8, 16, 32)  # windows of all samples, their tokens, channels
    for batch_first, leaks in ((False, True), (True, False)):
        attention = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
        before, _ = attention(windows, windows, windows)
        others = torch.cat([windows[:7], windows[7:] + 1])
        after, _ = attention(others, others, others)
        assert (not torch.equal(before[0], after[0])) == leaks


def pairs(groups: int, tokens: int) -> int:
    """How many pairs of tokens attention compares, counted from what is computed."""
    q = torch.empty(groups, tokens, 1, device="meta")
    return (q @ q.mT).numel()


def test_what_attention_costs() -> None:
    tokens, window = 56 * 56, 7 * 7
    assert pairs(1, tokens) == tokens**2 == 9_834_496
    assert pairs(tokens // window, window) == tokens * window == 153_664  # and not tokens * 7
    assert pairs(1, 224**2) * 2 > 5e9  # bytes of one map at full resolution, in half precision


def test_a_stem_of_two_halvings_leaves_most_of_the_tokens() -> None:
    with torch.device("meta"):
        halved_twice = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.Conv2d(64, 128, 3, stride=2, padding=1)
        )
        keys = {"stem": "conv", "patch_size": 16}
        ours: Any = backbones.build("vit", keys, num_classes=10, image_size=224)
        images = torch.empty(1, 3, 224, 224)
        counts = [stem(images).flatten(2).shape[2] for stem in (halved_twice, ours.stem)]
    assert counts == [3136, 196]
    assert pairs(1, counts[0]) == 256 * pairs(1, counts[1])


def test_without_a_last_norm_the_scale_of_the_features_is_that_of_the_depth() -> None:
    scales = {}
    for depth in (3, 24):
        model: Any = backbones.build("vit", {"depth": depth}, num_classes=10, image_size=32)
        seen: list[tuple[float, float]] = []
        model.norm.register_forward_hook(
            lambda _, given, out, seen=seen: seen.append((given[0].std().item(), out.std().item()))
        )
        model(torch.randn(4, 3, 32, 32))
        scales[depth] = seen[0]
    assert scales[24][0] > 2 * scales[3][0]
    assert scales[24][1] == pytest.approx(scales[3][1], rel=0.01)


def test_a_convnext_attends_to_nothing() -> None:
    data: dict[str, Any] = {
        "classes": ("ant", "bee"),
        "image_size": 32,
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    for name, layers in (("convnext_atto", 0), ("alternet_18", 3)):
        network = models.build_student(recipe.Model(model=name), **data)
        assert len(network.anatomy().attention) == layers


@pytest.mark.parametrize(
    ("keys", "equivariant"),
    [
        ({"padding": 1, "padding_mode": "circular"}, True),
        ({"padding": 1}, False),
        ({"padding": 1, "padding_mode": "circular", "stride": 2}, False),
    ],
)
def test_convolutions_are_equivariant_without_borders_and_strides(
    keys: dict[str, Any], equivariant: bool
) -> None:
    conv = nn.Conv2d(3, 8, 3, **keys).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    moved = conv(image.roll(1, dims=3))
    candidates = [conv(image).roll(cells, dims=3) for cells in (0, 1)]
    assert any(torch.allclose(moved, other) for other in candidates) == equivariant


def test_a_teacher_in_train_mode_learns_under_no_grad() -> None:
    images = torch.randn(8, 3, 8, 8) + 2
    for training in (True, False):
        teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(training)
        before = teacher[1].running_mean.clone()
        with torch.no_grad():
            teacher(images)
        assert torch.equal(teacher[1].running_mean, before) != training


def test_gradients_add_up_until_they_are_set_to_zero() -> None:
    layer = nn.Linear(4, 1)
    images = torch.rand(8, 4)
    once = torch.autograd.grad(layer(images).mean(), layer.weight)[0]
    for _ in range(3):
        layer(images).mean().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 3 * once)


def test_a_second_forward_pass_is_another_step_of_the_statistics() -> None:
    student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    images = torch.rand(16, 8)
    logits, features = student(images), student(images)
    assert student[1].num_batches_tracked == 2
    assert not torch.equal(logits, features)  # two masks of dropout


def test_the_diagonal_of_a_relation_matrix_is_always_right() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 9)
    own, other = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (student, teacher))
    torch.testing.assert_close((own - other).diagonal(), torch.zeros(8), rtol=0, atol=1e-6)
    whole = relations_loss(student, teacher).mean()
    torch.testing.assert_close(F.mse_loss(own, other), whole * 7 / 8)


def test_relations_of_half_a_batch_are_half_of_the_relations() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 9)
    for loss in (relations_loss, similarity_loss):
        halves = torch.cat([loss(student[i : i + 4], teacher[i : i + 4]) for i in (0, 4)])
        assert not torch.isclose(halves.mean(), loss(student, teacher).mean(), rtol=0.05)


def test_a_decay_by_epochs_does_not_reach_its_end() -> None:
    epochs = 100
    usual = [0.9 * (1 - epoch / epochs) for epoch in range(epochs)]
    assert usual[-1] == pytest.approx(0.009)
    ramp = schedule.Ramp(start=0.9, end=0.0, until=0.9)
    ours = [schedule.value(ramp, epoch / epochs) for epoch in range(epochs)]
    assert ours[0] == 0.9
    assert ours[90:] == [0.0] * 10
    assert schedule.value(0.9, 0.99) == 0.9  # a number stays


def test_at_temperature_one_the_teacher_still_says_more_than_the_label() -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 2.0, 0.0]])
    student.requires_grad_()
    soft = gradient(kd_loss(student, teacher, temperature=1).mean(), student)[0]
    hard = gradient(F.cross_entropy(student, torch.tensor([0])), student)[0]
    assert hard[1] == hard[2]
    assert soft[1] < soft[2]  # the second class is pushed down less


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0, 100.0])
def test_no_temperature_changes_the_order_of_the_classes(temperature: float) -> None:
    logits = torch.randn(64, 10)
    softened = (logits.double() / temperature).softmax(dim=1)
    assert torch.equal(softened.argsort(dim=1), logits.argsort(dim=1))


def test_of_two_curves_the_flatter_has_the_stronger_bias() -> None:
    images = torch.logspace(3, 6, 7)

    def accuracy(images: Tensor) -> Tensor:
        return 0.95 - 0.5 * (images / 1000) ** -0.3

    weak, strong = accuracy(images), accuracy(4 * images)  # as if it had seen four times as many
    assert (strong > weak).all()
    assert strong[-1] - strong[0] < weak[-1] - weak[0]

"""Each optimizer moves what it should, and goes on bit for bit from its saved state."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.optim.muon import Muon
from torch import Tensor, nn

from distill.engine import optim
from distill.recipe import Optimizer

NAMES = ("sgd", "adamw", "lamb", "muon")
LR = {"sgd": 0.05, "adamw": 0.01, "lamb": 0.02, "muon": 0.02}


class Small(nn.Module):
    """A parameter of every kind that weight decay tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x)).relu().flatten(2).mT[:, :4]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        bias = self.relative_position_bias_table.mean()
        logits: Tensor = self.head(tokens.mean(dim=1) * self.scale + bias)
        return logits


MATRICES = {"conv.weight", "head.weight"}
ALL = {name for name, p in Small().named_parameters() if p.requires_grad}


def spec(name: str, **keys: Any) -> Optimizer:
    return Optimizer(**{"name": name, "lr": LR[name], "weight_decay": 0.1, **keys})


def fit(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> float:
    """Train on one fixed batch, the learning rate set at each step; the loss of the last step."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8, generator=draw), torch.arange(16) % 4
    loss = torch.tensor(0.0)
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if step == 0 else group["lr"] * 0.99
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.mark.parametrize("name", NAMES)
def test_it_reduces_the_loss_of_a_small_net(small: Small, name: str) -> None:
    optimizer = optim.build(small, spec(name, weight_decay=0.01))
    first = fit(small, optimizer, 1)
    assert fit(small, optimizer, 60, start=1) < 0.5 * first


@pytest.mark.parametrize("name", NAMES)
def test_six_steps_are_three_and_three_through_a_file(small: Small, name: str) -> None:
    straight, cut = small, copy.deepcopy(small)
    optimizer = optim.build(straight, spec(name))
    fit(straight, optimizer, 6)
    before = optim.build(cut, spec(name))
    fit(cut, before, 3)
    tensors, others = optim.state_tensors(before)
    stored = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
    rest = json.dumps(others)
    resumed = Small()
    resumed.load_state_dict(cut.state_dict())
    after = optim.build(resumed, spec(name))
    optim.load_state(after, safetensors.torch.load(stored), json.loads(rest))
    for group, old in zip(after.param_groups, before.param_groups, strict=True):
        group["lr"] = old["lr"]  # the run sets it at every step
    fit(resumed, after, 3, start=3)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    one, two = (optim.state_tensors(o)[0] for o in (optimizer, after))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def decayed(module: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> set[str]:
    """Names of the parameters that decay; checks that every other learns without."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["weight_decay"], set()).update(names[p] for p in group["params"])
    assert set(found) <= {decay, 0.0}
    assert set().union(*found.values()) == ALL
    return found.get(decay, set())


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        ("sgd", None, ALL),
        ("adamw", None, MATRICES),
        ("lamb", None, MATRICES),
        ("muon", None, MATRICES),
        ("sgd", "matrices", MATRICES),
        ("adamw", "all", ALL),
        ("muon", "all", ALL),
    ],
)
def test_decay_spares_scales_biases_and_tokens(
    small: Small, name: str, decay: str | None, expected: set[str]
) -> None:
    optimizer = optim.build(small, spec(name, decay=decay))
    assert decayed(small, optimizer, 0.1) == expected


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_only_what_decays(small: Small, name: str) -> None:
    """With gradients of zero, decay is all that moves a weight."""
    optimizer = optim.build(small, spec(name, decay="matrices", momentum=0.0))
    before = {key: value.clone() for key, value in small.named_parameters()}
    for parameter in small.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in small.named_parameters():
        if key in MATRICES:
            assert value.norm() < before[key].norm(), key
        else:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_has_the_momentum_of_torch(small: Small, nesterov: bool) -> None:
    plain = copy.deepcopy(small)
    keys = {} if nesterov else {"nesterov": False}
    optimizer = optim.build(small, spec("sgd", momentum=0.8, **keys))
    reference = torch.optim.SGD(
        [p for p in plain.parameters() if p.requires_grad],
        lr=LR["sgd"], momentum=0.8, weight_decay=0.1, nesterov=nesterov,
    )  # fmt: skip
    fit(small, optimizer, 3)
    fit(plain, reference, 3)
    for one, two in zip(small.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def test_sgd_without_momentum_is_plain(small: Small) -> None:
    before = small.head.weight.detach().clone()
    optimizer = optim.build(small, spec("sgd", momentum=0.0, weight_decay=0.0))
    small.head.weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(small.head.weight.detach(), before - LR["sgd"])


def test_muon_has_nesterov_momentum_unless_it_is_told_not_to(small: Small) -> None:
    plain, timms = copy.deepcopy(small), copy.deepcopy(small)
    fit(small, optim.build(small, spec("muon")), 3)
    fit(plain, optim.build(plain, spec("muon", nesterov=False)), 3)
    groups = optim.build(timms, spec("muon")).param_groups
    keys = ("params", "weight_decay", "use_fallback")
    groups = [{key: group[key] for key in keys} for group in groups]
    fit(timms, Muon(groups, lr=LR["muon"], momentum=0.9, nesterov=False), 3)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, timms.get_parameter(name))
        assert torch.equal(parameter, small.get_parameter(name)) is ("frozen" in name)


def test_lamb_is_the_formula_of_its_paper_and_clips_nothing() -> None:
    """You et al. 2019, arXiv:1904.00962, algorithm 2, with bias correction."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    w = layer.weight.detach().double()
    m, v, lr, decay = torch.zeros_like(w), torch.zeros_like(w), 0.02, 0.1
    optimizer = optim.build(layer, spec("lamb"))
    for step in range(1, 6):
        gradient = 10.0**step * torch.randn(5, 6, generator=draw)  # far above a norm of 1
        layer.weight.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double() ** 2
        adam = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
        move = adam + decay * w
        w = w - lr * w.norm() / move.norm() * move
    torch.testing.assert_close(layer.weight.detach().double(), w, atol=1e-5, rtol=1e-5)


def test_muon_makes_the_updates_of_matrices_orthogonal(small: Small) -> None:
    before = {key: value.detach().clone() for key, value in small.named_parameters()}
    optimizer = optim.build(small, spec("muon", weight_decay=0.0))
    fit(small, optimizer, 1)
    for key, value in small.named_parameters():
        if key in MATRICES:
            move = (value.detach() - before[key]).flatten(1)
            sizes = torch.linalg.svdvals(move)
            assert sizes.min() > 0.4 * sizes.max(), key

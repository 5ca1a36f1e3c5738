from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from distill import component
from distill.errors import IncompatibleError
from distill.models import backbones, cost

# Parameters and multiply-adds of the literature's definitions (RepDistiller, mdistiller, AlterNet's
# authors), for 100 classes and images of 32 px.
KNOWN = {
    "resnet8": (83_892, 12_507_392),
    "resnet14": (181_108, 26_663_168),
    "resnet20": (278_324, 40_818_944),
    "resnet32": (472_756, 69_130_496),
    "resnet44": (667_188, 97_442_048),
    "resnet56": (861_620, 125_753_600),
    "resnet110": (1_736_564, 253_155_584),
    "resnet8x4": (1_233_540, 177_071_104),
    "resnet32x4": (7_433_860, 1_083_040_768),
    "wrn_16_2": (703_284, 101_118_464),
    "wrn_40_1": (569_780, 83_286_272),
    "wrn_40_2": (2_255_156, 327_610_880),
    "vgg8": (3_965_028, 96_192_512),
    "vgg13": (9_462_180, 284_936_192),
    "mobilenetv2_half": (812_836, 6_523_648),
    "shufflenetv1": (949_258, 38_691_456),
    "shufflenetv2": (1_355_528, 44_504_448),
    "alternet_18": (9_499_063, 498_059_264),
}
# The first two of ten logits of the same definitions' own networks, in float64, with the weights of
# `wavy` and the image sin(0.1 n), n = 0, 1, ... over channels, rows and columns.
LOGITS = {
    ("resnet8", 32): (0.020568, 0.0447849),
    ("resnet14", 32): (-0.27366, -0.238973),
    ("resnet20", 32): (-0.211892, 0.536888),
    ("resnet32", 32): (-4.54638, -7.19451),
    ("resnet44", 32): (48.9571, 15.6151),
    ("resnet56", 32): (2.21682, 2.22604),
    ("resnet110", 32): (-7081.65, -10049.6),
    ("resnet8x4", 32): (-3.13275, 6.0427),
    ("resnet32x4", 32): (-1.34688, 4.85945),
    ("wrn_16_2", 32): (0.10064, 0.661741),
    ("wrn_40_1", 32): (-0.101223, 0.219224),
    ("wrn_40_2", 32): (0.0362807, 6.46016),
    ("vgg8", 32): (0.090676, 0.0479852),
    ("vgg8", 64): (0.0912176, 0.0473552),
    ("vgg13", 32): (0.0389598, 0.22725),
    ("vgg13", 64): (0.0424031, 0.234042),
    ("mobilenetv2_half", 32): (0.0596372, 0.0660792),
    ("shufflenetv1", 32): (-11.6418, 32.5647),
    ("shufflenetv2", 32): (0.077463, 0.231373),
    ("alternet_18", 32): (0.426009, 0.326862),
    ("alternet_18", 224): (2.75126, 1.87769),
}
CONTROLS = {"convnext_atto", "convnext_femto", "row_gru", "mlp"}
TRANSFORMERS = {"vit", "vit_tiny", "vit_small", "convit_tiny", "crate_tiny", "swin_tiny"}
ZOO = sorted(component.find("models.zoo"))


def test_every_network_is_known_to_the_recipe() -> None:
    assert set(ZOO) == {*KNOWN, *TRANSFORMERS, *CONTROLS}
    assert all(definition.summary for definition in component.find("models.zoo").values())


@pytest.mark.parametrize("name", KNOWN)
def test_costs_what_the_literature_s_costs(name: str) -> None:
    network = backbones.build(name, {}, num_classes=100, image_size=32)
    parameters, multiply_adds = KNOWN[name]
    assert cost.parameters(network) == parameters
    assert cost.flops(network, 32) == 2 * multiply_adds


def wavy(network: nn.Module) -> nn.Module:
    """Weights that any implementation with the same names in the same order can be given."""
    for k, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            n = torch.arange(tensor.numel(), dtype=torch.float64) + 1
            waves = torch.sin(n * (0.37 + 0.01 * (k % 13))).view(tensor.shape)
            if tensor.ndim > 1:
                waves = waves * (4 / tensor[0].numel()) ** 0.5
            elif name.endswith(("weight", "running_var")):
                waves = 1 + 0.3 * waves
            else:
                waves = 0.1 * waves
            tensor.copy_(waves)
    return network


@pytest.mark.parametrize(("name", "size"), LOGITS)
def test_computes_what_the_literature_s_computes(name: str, size: int) -> None:
    network = backbones.build(name, {}, num_classes=10, image_size=size).double().eval()
    image = torch.sin(torch.arange(3 * size**2, dtype=torch.float64) * 0.1)
    with torch.no_grad():
        logits = wavy(network)(image.view(1, 3, size, size))
    assert logits[0, :2].tolist() == pytest.approx(LOGITS[name, size], rel=1e-4)


@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize("name", ZOO)
def test_runs_and_learns_at_every_size(name: str, size: int) -> None:
    torch.manual_seed(0)
    network = backbones.build(name, {}, num_classes=3, image_size=size)
    logits = network(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    unused = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A ReLU in front of a 1 x 1 grid may be dead for all of two samples, but most are not.
    assert len(unused) <= len(list(network.parameters())) // 4


@pytest.mark.parametrize("name", ["vgg8", "vgg13"])
def test_an_image_too_small_for_the_strides_is_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match="8 px or more, got 4 px"):
        backbones.build(name, {}, num_classes=3, image_size=4)


@pytest.mark.parametrize("name", ZOO)
def test_the_same_seed_gives_the_same_weights_and_touches_nothing_else(name: str) -> None:
    settings = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(backbones.build(name, {}, num_classes=3, image_size=32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert settings == (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )


def test_shuffle_deals_channels_out_over_the_groups() -> None:
    from distill.models.zoo.shufflenet import _shuffle

    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert _shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_our_own_networks_need_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys\n"
        "from distill.models import backbones\n"
        "backbones.build('vit', {}, num_classes=2, image_size=8)\n"
        "assert not {'timm', 'torchvision'} & set(sys.modules), 'imported'\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

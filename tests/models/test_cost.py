"""Costs equal the published ones, and memory the one counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from distill import models, recipe
from distill.models import cost, weights
from distill.models.network import Network
from tests.models import made

# Multiply-adds of one image at 224 px, by 10⁹, which torchvision gives with its weights.
TORCHVISION = {
    "resnet18": 1.814,
    "resnet50": 4.089,
    "mobilenet_v2": 0.301,
    "mobilenet_v3_small": 0.057,
    "efficientnet_b0": 0.386,
    "vit_b_16": 17.564,
    "swin_t": 4.491,
    "convnext_tiny": 4.456,
}
# And those that timm measured: results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv.
TIMM = {"deit_tiny_patch16_224": (5.72, 1.26)}  # with 10⁶ parameters


def build(name: str, image_size: int = 224, classes: int = 1000) -> Network:
    return models.build_student(
        recipe.Model(model=name, weights=None),
        classes=tuple(map(str, range(classes))),
        image_size=image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameters_and_macs_are_those_that_torchvision_publishes(name: str) -> None:
    network = build(f"torchvision/{name}")
    published = next(iter(torchvision.models.get_model_weights(name))).meta
    assert published["_ops"] == TORCHVISION[name]
    assert cost.parameters(network) == published["num_params"]
    macs = cost.macs(network, 224)
    assert macs == pytest.approx(TORCHVISION[name] * 1e9, rel=0.01)
    assert cost.flops(network, 224) == 2 * macs


@pytest.mark.parametrize("name", TIMM)
def test_parameters_and_macs_are_those_that_timm_publishes(name: str) -> None:
    network = build(f"timm/{name}")
    millions, billions = TIMM[name]
    assert cost.parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)
    assert cost.macs(network, 224) / 1e9 == pytest.approx(billions, rel=0.01)


SIDE = 16
IMAGE = 3 * SIDE * SIDE * 4  # bytes of the normalised image, which its caller holds to the end
MAP = 8 * SIDE * SIDE * 4  # bytes of eight channels


class Small(nn.Module):
    """A convolution, whatever is to be counted, and a classifier."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        match self.kind:
            case "relu":
                x = F.relu(x)
            case "relu in place":
                x = F.relu_(x)
            case "views":
                x = x.flatten(2).transpose(1, 2).unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
            case "norm":
                x = self.norm(x)
            case "chain":
                x = self.second(x)
                x = self.second(x)
            case "residual":
                x = x + self.second(x)
            case "residual in place":
                x += self.second(x)
            case "all kept":
                x = torch.cat([x, self.second(x), self.norm(x)], dim=1)[:, :8]
            case "attention":
                tokens = x.flatten(2).transpose(1, 2)
                x = F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)
                x = x.unflatten(2, (SIDE, SIDE))
            case "attention written out":
                tokens = x.flatten(2).transpose(1, 2)
                shares = (tokens @ tokens.transpose(1, 2)).softmax(dim=-1)
                x = (shares @ tokens).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


HEAD = (8 + 5) * 4  # bytes of the mean and of the logits, which come on top
SQUARE = SIDE**4 * 4  # bytes of a map between all cells
PEAKS = {
    "nothing": IMAGE + MAP + HEAD,
    "relu": IMAGE + 2 * MAP,
    "relu in place": IMAGE + MAP + HEAD,
    "views": IMAGE + MAP + HEAD,
    "norm": IMAGE + 2 * MAP,
    "chain": IMAGE + 2 * MAP,  # what a name no longer means is freed
    "residual": IMAGE + 3 * MAP,
    "residual in place": IMAGE + 2 * MAP,
    "all kept": IMAGE + 6 * MAP,  # three maps, and all of them once more
    "attention": IMAGE + 2 * MAP + HEAD,  # the tokens still have a name
    "attention written out": IMAGE + MAP + 2 * SQUARE,  # before the softmax and after it
}


@pytest.mark.parametrize("kind", PEAKS)
@pytest.mark.parametrize("training", [True, False])
def test_memory_of_activations_is_the_one_counted_by_hand(kind: str, training: bool) -> None:
    network = made.wrapped(Small(kind), kind, (SIDE, SIDE)).train(training)
    assert cost.activation_bytes(network, SIDE) == PEAKS[kind]


def test_normalising_an_image_takes_two_of_it() -> None:
    class Mean(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.mean(dim=(2, 3))

    assert cost.activation_bytes(made.wrapped(Mean(), "mean", (SIDE, SIDE)), SIDE) == 2 * IMAGE


def test_an_encoder_never_holds_its_attention_maps() -> None:
    # 196 patches and a class token. The widest moment is the GELU of an MLP: four times as wide
    # before and after it, beside the image and four states of the tokens that have a name or wait
    # for a call to return: as they came to the blocks, to the block, after its attention, and
    # normalised. So much is allocated on a CPU too, as its profiler says.
    network = build("timm/deit_tiny_patch16_224", classes=10)
    tokens = 197 * 192 * 4
    assert cost.activation_bytes(network, 224) == 3 * 224 * 224 * 4 + (4 + 4 + 4) * tokens


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/swin_t", "torchvision/vit_b_16"])
def test_counting_leaves_the_network_as_it_was(name: str) -> None:
    network = made.network(name).train()
    before = weights.fingerprint(network)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counts = [(cost.macs(network, 64), cost.activation_bytes(network, 64)) for _ in range(2)]
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0
    assert cost.file_bytes(network) == len(weights.to_bytes(network))
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
    assert not any(p.is_inference() for p in network.parameters())
    assert weights.fingerprint(network) == before
    assert torch.backends.mha.get_fastpath_enabled() == fast_path

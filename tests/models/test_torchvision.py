from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from distill.errors import DamagedError, IncompatibleError, PreflightError, RecipeError
from distill.models import weights
from distill.models.network import Network

Build = Callable[..., Network]
SYNSETS = ("n01484850", "n01440764", "n01443537")  # ImageNet's classes 2, 0 and 1


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, nn.Module], None]:
    """Puts a model's weights where torch.hub keeps what it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def write(name: str, model: nn.Module) -> None:
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        path = tmp_path / "hub" / "checkpoints" / Path(url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)

    return write


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("squeezenet1_1", 64),
        ("shufflenet_v2_x0_5", 64),
        ("mobilenet_v3_small", 64),
        ("googlenet", 64),
        ("inception_v3", 80),
        ("swin_t", 64),
        ("vit_b_32", 64),
    ],
)
def test_every_family_learns(student: Build, name: str, size: int) -> None:
    network = student(f"torchvision/{name}", image_size=size)
    logits = network(torch.rand(2, 3, size, size)).logits
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("model", "keys", "words", "hint"),
    [
        ("torchvision/resnt18", {}, "torchvision has no classifier 'resnt18'", "resnet18"),
        ("torchvision/fcn_resnet50", {}, "no classifier 'fcn_resnet50'", "resnet50"),
        ("torchvision/resnet18", {"colour": 1}, "unexpected keyword argument 'colour'", ""),
        ("torchvision/resnet18", {"progress": True}, "progress: decided by data", "leave it out"),
    ],
)
def test_what_torchvision_does_not_know_is_refused(
    student: Build, model: str, keys: dict[str, object], words: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        student(model, **keys)
    assert hint in caught.value.hint


def test_a_size_that_cannot_be_built_is_refused(student: Build) -> None:
    with pytest.raises(IncompatibleError, match="cannot be built for images of 33 px"):
        student("torchvision/vit_b_32", image_size=33)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_imagenet_s_classes_are_matched_by_synset(
    teacher: Build, publish: Callable[[str, nn.Module], None], name: str
) -> None:
    settings = {"init_weights": True, "transform_input": True} if name == "googlenet" else {}
    reference = torchvision.models.get_model(name, **settings).eval()
    for parameter in reference.parameters():  # far from the small initial weights
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    publish(name, reference)
    network = teacher(
        model=f"torchvision/{name}", weights="pretrained", classes=SYNSETS, image_size=64
    )
    images = torch.rand(2, 3, 64, 64)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    ready = torchvision.transforms.functional.normalize(images, transform.mean, transform.std)
    expected = reference(ready)[:, [2, 0, 1]]
    torch.testing.assert_close(network(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pretrained_student_keeps_all_but_the_head(
    student: Build, publish: Callable[[str, nn.Module], None], tmp_path: Path
) -> None:
    reference = torchvision.models.squeezenet1_1()
    publish("squeezenet1_1", reference)
    network = student("torchvision/squeezenet1_1", weights="pretrained", image_size=64)
    assert network.reinitialised == ("classifier.1.weight", "classifier.1.bias")
    for name, tensor in reference.features.state_dict().items():
        assert torch.equal(network.backbone.features.state_dict()[name], tensor)
    path = tmp_path / "student.safetensors"
    path.write_bytes(weights.to_bytes(network))
    assert weights.fingerprint(weights.load(path)) == weights.fingerprint(network)


def test_a_vision_transformer_keeps_the_size_it_was_trained_on(
    student: Build, publish: Callable[[str, nn.Module], None]
) -> None:
    publish("vit_b_32", torchvision.models.vit_b_32())
    network = student("torchvision/vit_b_32", weights="pretrained", image_size=64)
    assert (network.input_size, network.description.image_size) == (224, 224)
    assert network(torch.rand(1, 3, 64, 64)).logits.shape == (1, 4)


def test_without_the_network_one_sentence_says_so(
    student: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(PreflightError, match="cannot be fetched") as caught:
        student("torchvision/resnet18", weights="pretrained")
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_told_from_missing_ones(
    student: Build, publish: Callable[[str, nn.Module], None], tmp_path: Path
) -> None:
    publish("squeezenet1_1", torchvision.models.squeezenet1_1())
    (path,) = tmp_path.rglob("*.pth")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html></html>"):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="the fetched weights are damaged"):
            student("torchvision/squeezenet1_1", weights="pretrained", image_size=64)

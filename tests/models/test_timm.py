from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from distill.errors import DamagedError, IncompatibleError, PreflightError, RecipeError
from distill.models import weights
from distill.models.network import Network

Build = Callable[..., Network]
Publish = Callable[[str, dict[str, bytes]], None]
SYNSETS = ("n01484850", "n01440764", "n01443537")  # ImageNet's classes 2, 0 and 1
RESNET, VIT = "timm/test_resnet.r160_in1k", "timm/test_vit.r160_in1k"


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Puts files into the hub's cache on disk, as if fetched before the network went away."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def write(repository: str, files: dict[str, bytes]) -> None:
        folder = cache / f"models--{repository.replace('/', '--')}"
        for name, content in {"refs/main": b"c0ffee", **files}.items():
            place = folder / (name if "/" in name else f"snapshots/c0ffee/{name}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    return write


def exported(model: nn.Module, folder: Path, **config: object) -> dict[str, bytes]:
    """The files that timm publishes for a model."""
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def normalised(images: Tensor, model: nn.Module) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
        "mobilenetv3_small_050",
        "efficientnet_lite0",
        "mixer_s32_224",
        "levit_128s",
        "mobilevit_xxs",
        "test_maxvit",
        "test_coatnet",
        "vit_small_patch14_dinov2",
        "coat_tiny",
    ],
)
def test_every_family_learns_at_64_pixels(student: Build, name: str) -> None:
    network = student(f"timm/{name}", image_size=64)
    assert network.input_size is None
    logits = network(torch.rand(2, 3, 64, 64)).logits
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    parameters = list(network.parameters())
    learning = [p for p in parameters if p.grad is not None and p.grad.isfinite().all()]
    assert len(learning) == len(parameters)


def test_arguments_are_timm_s(student: Build) -> None:
    network = student("timm/test_vit", depth=1, image_size=32)
    assert len(network.backbone.blocks) == 1
    assert network.description.arguments == {"depth": 1}


@pytest.mark.parametrize(
    ("model", "keys", "words", "hint"),
    [
        ("timm/resnt18", {}, "timm has no classifier 'resnt18'", "resnet18"),
        ("timm/resnet18.nope", {}, "timm has no weights 'resnet18.nope'", "resnet18.a1_in1k"),
        ("timm/test_vit", {"colour": 1}, "unexpected keyword argument 'colour'", ""),
        ("timm/test_vit", {"num_classes": 3}, "num_classes: decided by data", "leave it out"),
        ("timm/test_vit", {"checkpoint_path": "x.pth"}, "checkpoint_path: decided", "leave it"),
        ("timm/test_mambaout", {"weights": "pretrained"}, "no such weights", "leave weights out"),
    ],
)
def test_what_timm_does_not_know_is_refused(
    student: Build, model: str, keys: dict[str, object], words: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        student(model, **keys)
    assert hint in caught.value.hint


def test_an_image_too_small_for_a_model_is_refused(student: Build) -> None:
    with pytest.raises(IncompatibleError, match="timm/inception_v3: does not take images of 32 px"):
        student("timm/inception_v3", image_size=32)


def test_imagenet_s_classes_are_matched_by_synset(teacher: Build, publish: Publish) -> None:
    reference = timm.create_model("test_resnet").eval()
    publish(RESNET, {"model.safetensors": safetensors.torch.save(reference.state_dict())})
    network = teacher(model=RESNET, weights="pretrained", classes=SYNSETS, image_size=64)
    images = torch.rand(2, 3, 64, 64)
    expected = reference(normalised(images, reference))[:, [2, 0, 1]]
    torch.testing.assert_close(network(images).logits, expected)
    assert network.classes == SYNSETS
    with pytest.raises(IncompatibleError, match="pretrained: does not know the data's ant, bee"):
        teacher(model=RESNET, weights="pretrained", image_size=64)


def test_a_pretrained_student_keeps_the_body_and_its_normalisation(
    student: Build, publish: Publish
) -> None:
    reference = timm.create_model("test_resnet")
    publish(RESNET, {"model.safetensors": safetensors.torch.save(reference.state_dict())})
    network = student(RESNET, weights="pretrained", image_size=64)
    assert network.reinitialised == ("fc.weight", "fc.bias")
    for name, tensor in network.backbone.state_dict().items():
        if name in network.reinitialised:
            assert len(tensor) == 4
        else:
            assert torch.equal(tensor, reference.state_dict()[name])
    assert network.mean.flatten().tolist() == pytest.approx(reference.pretrained_cfg["mean"])


def test_positions_are_resampled_to_the_data_s_size(teacher: Build, publish: Publish) -> None:
    trained = timm.create_model("test_vit")
    publish(VIT, {"model.safetensors": safetensors.torch.save(trained.state_dict())})
    reference = timm.create_model(VIT.partition("/")[2], pretrained=True, img_size=64).eval()
    network = teacher(model=VIT, weights="pretrained", classes=SYNSETS, image_size=64)
    assert network.input_size is None
    images = torch.rand(2, 3, 64, 64)
    expected = reference(normalised(images, reference))[:, [2, 0, 1]]
    torch.testing.assert_close(network(images).logits, expected)


def test_images_are_resized_where_the_model_cannot_take_them(
    student: Build, publish: Publish, tmp_path: Path
) -> None:
    trained = timm.create_model("test_vit")
    publish(VIT, {"model.safetensors": safetensors.torch.save(trained.state_dict())})
    network = student(VIT, weights="pretrained", image_size=8)  # patches of 16 px
    assert (network.input_size, network.description.image_size) == (160, 160)
    images = torch.rand(2, 3, 8, 8)
    logits = network.eval()(images).logits
    path = tmp_path / "student.safetensors"
    path.write_bytes(weights.to_bytes(network))
    assert torch.equal(weights.load(path).eval()(images).logits, logits)
    again = student(VIT.partition(".")[0], weights=str(path), image_size=8)
    assert again.input_size == 160
    with pytest.raises(IncompatibleError, match="images of 8 px"):
        student("timm/test_vit", image_size=8)


def test_without_the_network_one_sentence_says_so(teacher: Build, publish: Publish) -> None:
    for source in ("pretrained", "hf-hub:someone/something"):
        with pytest.raises(PreflightError, match="cannot be fetched") as caught:
            teacher(model=RESNET, weights=source, classes=SYNSETS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, lambda names: {str(i): n for i, n in enumerate(names)}])
def test_weights_from_the_hub_know_their_classes(
    teacher: Build, publish: Publish, tmp_path: Path, kind: Callable[[list[str]], object]
) -> None:
    names = kind(["bee", "ant", "eel", "dog", "cat"])
    trained = timm.create_model("test_resnet", num_classes=5).eval()
    publish("someone/net", exported(trained, tmp_path / "net", label_names=names))
    network = teacher(model="timm/test_resnet", weights="hf-hub:someone/net", image_size=64)
    images = torch.rand(2, 3, 64, 64)
    expected = trained(normalised(images, trained))[:, [1, 0, 4, 3]]
    torch.testing.assert_close(network(images).logits, expected)
    with pytest.raises(IncompatibleError, match="holds timm/test_resnet, the recipe says") as error:
        teacher(model="timm/resnet18", weights="hf-hub:someone/net")
    assert error.value.hint == "set model: timm/test_resnet"


def test_the_hub_s_arguments_rebuild_the_network(
    student: Build, publish: Publish, tmp_path: Path
) -> None:
    trained = timm.create_model("test_vit", num_classes=4, depth=2, img_size=32)
    publish("someone/vit", exported(trained, tmp_path / "vit"))
    network = student("timm/test_vit", weights="hf-hub:someone/vit", image_size=32)
    assert network.reinitialised == ()
    assert network.description.arguments["depth"] == 2
    path = tmp_path / "student.safetensors"
    path.write_bytes(weights.to_bytes(network))
    assert weights.fingerprint(weights.load(path)) == weights.fingerprint(network)


def test_weights_without_a_classifier_start_a_student_but_make_no_teacher(
    student: Build, teacher: Build, publish: Publish, tmp_path: Path
) -> None:
    trained = timm.create_model("test_vit", num_classes=0, img_size=32)
    publish("someone/body", exported(trained, tmp_path / "body"))
    keys = {"model": "timm/test_vit", "weights": "hf-hub:someone/body", "image_size": 32}
    network = student(**keys)
    assert network.reinitialised == ("head.weight", "head.bias")
    assert torch.equal(network.backbone.pos_embed, trained.pos_embed)
    with pytest.raises(IncompatibleError, match="has no classifier"):
        teacher(**keys)


def test_only_whole_safetensors_come_from_the_hub(
    teacher: Build, publish: Publish, tmp_path: Path
) -> None:
    files = exported(timm.create_model("test_resnet", num_classes=4), tmp_path / "net")
    whole = files.pop("model.safetensors")
    torch.save(safetensors.torch.load(whole), tmp_path / "pickle")
    keys = {"model": "timm/test_resnet", "weights": "hf-hub:someone/net", "image_size": 64}
    publish("someone/net", files | {"pytorch_model.bin": (tmp_path / "pickle").read_bytes()})
    with pytest.raises(PreflightError, match="cannot be fetched"):
        teacher(**keys)
    publish("someone/net", {"model.safetensors": whole[:-7]})
    with pytest.raises(DamagedError, match="damaged"):
        teacher(**keys)
    publish("someone/net", {"model.safetensors": whole})
    assert teacher(**keys).model == "timm/test_resnet"
    publish("someone/net", {"config.json": b"{"})
    with pytest.raises(RecipeError, match=r"config\.json is not in timm's format"):
        teacher(**keys)


@pytest.mark.parametrize(
    ("code", "words"),
    [("RepoNotFound", "no such repository"), ("EntryNotFound", "lacks config.json")],
)
def test_what_the_hub_does_not_have_is_told(
    teacher: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        template = home + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": home,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        with pytest.raises(RecipeError, match=words):
            teacher(model="timm/test_resnet", weights="hf-hub:someone/net")
        server.shutdown()


@pytest.mark.parametrize("name", ["", "a/b/c", "sp ace/x"])
def test_a_wrong_repository_name_is_refused(teacher: Build, publish: Publish, name: str) -> None:
    with pytest.raises(RecipeError, match="hf-hub:"):
        teacher(model="timm/test_resnet", weights=f"hf-hub:{name}")


def test_building_is_quiet(student: Build) -> None:
    with warnings.catch_warnings(record=True) as seen:
        student("timm/test_vit", image_size=32)
    assert seen == []

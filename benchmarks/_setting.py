"""What all variants of a training comparison share: images, weights, a cache, recipes.

Everything lies in one folder that is written once: pictures of noise in CIFAR-100's binary format
(two of the peers know no other set), a teacher and a student with initial weights in our format and
as PyTorch's state dicts, the teacher's cache, and the recipes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.models import backbones, weights
from distill.models.network import Description, Network

CLASSES, TEST = 100, 256
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # CIFAR-100's
MOMENTUM, DECAY = 0.9, 5e-4
TEMPERATURE, CE, KD = 4.0, 0.1, 0.9
VIEWS = 2  # of every image in the cache; epochs take turns

RECIPE = """
data: {{name: cifar100, root: "{root}", augment: [crop, flip], image_size: {size}}}
{teachers}
student: {{model: "{student}", weights: "{root}/student.safetensors"}}
objective: {objective}
{cache}
optimizer: {{name: sgd, lr: {lr}, momentum: {momentum}, weight_decay: {decay}, schedule: constant}}
train: {{epochs: 1000000, batch_size: {batch}, precision: {precision}}}
"""
BOTH = f"[{{term: ce, weight: {CE}}}, {{term: kd, weight: {KD}, temperature: {TEMPERATURE:g}}}]"


@dataclass(frozen=True)
class Setting:
    """One pair of networks on one kind of batch.

    Attributes:
        images: Of the training set.
        turn: Images of a turn, a multiple of `batch`, and all that a peer sees in an epoch.
        workers: Most processes that a peer's loader may start.
    """

    teacher: str
    student: str
    size: int  # pixels
    batch: int
    precision: str  # fp32 or bf16
    device: str  # cpu or cuda
    images: int
    turn: int
    workers: int

    @property
    def title(self) -> str:
        """The pair and the batch in words."""
        pair = f"{self.teacher} → {self.student}".replace("timm/", "")
        return f"{pair}, {self.size} px, batch {self.batch}, {self.precision}"

    @property
    def lr(self) -> float:
        """The learning rate: CIFAR's, or one at which a ViT stays finite."""
        return 0.1 if self.size <= 32 else 1e-3

    def recipe(self, folder: Path, how: str) -> Path:
        """The recipe file of `live`, `cached` or `alone`."""
        return folder / f"{how}.yaml"


def load(folder: Path) -> Setting:
    """The setting that `write` left in a folder."""
    return Setting(**json.loads((folder / "setting.json").read_text(encoding="utf-8")))


def write(setting: Setting, folder: Path) -> None:
    """Write all that the variants share, but for the cache."""
    _write_images(folder, setting.images)
    for i, role in enumerate(("teacher", "student")):
        torch.manual_seed(i)
        backbone = backbones.build(
            getattr(setting, role), {}, num_classes=CLASSES, image_size=setting.size
        )
        if role == "teacher":
            _settle(backbone, setting.size)
        description = Description(
            model=getattr(setting, role), arguments={}, num_classes=CLASSES, classes=None,
            image_size=setting.size, input_size=None, mean=MEAN, std=STD,
        )  # fmt: skip
        found = weights.to_bytes(Network(backbone, description))
        (folder / f"{role}.safetensors").write_bytes(found)
        place = folder / f"{setting.teacher.replace('/', '-')}_vanilla" / "teacher.pth"
        place = place if role == "teacher" else folder / "student.pth"
        place.parent.mkdir(exist_ok=True)
        torch.save({"model": backbone.state_dict()}, place)
    taught = f'teachers: [{{weights: "{folder}/teacher.safetensors"}}]'
    kept = f'cache: {{path: "{folder}/cache", views: {VIEWS}}}'
    for how, teachers, objective, cache in (
        ("alone", "", "[{term: ce}]", ""),
        ("live", taught, BOTH, ""),
        ("cached", taught, BOTH, kept),
    ):
        text = RECIPE.format(
            root=folder, size=setting.size, teachers=teachers, student=setting.student,
            objective=objective, cache=cache, lr=setting.lr, momentum=MOMENTUM, decay=DECAY,
            batch=setting.batch, precision=setting.precision,
        )  # fmt: skip
        setting.recipe(folder, how).write_text(text)
    (folder / "setting.json").write_text(json.dumps(asdict(setting)))


def write_cache(setting: Setting, folder: Path) -> None:
    """Ask the teacher once about every view: `distill teacher-cache`."""
    recipe = setting.recipe(folder, "cached")
    command = [sys.executable, "-m", "distill", "teacher-cache", str(recipe)]
    command += ["--out", str(folder / "cache"), "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"distill teacher-cache: {done.stderr.strip()[-500:]}")


def pixels(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) as uint8 and labels (N,) of `train` or `test`."""
    rows = np.fromfile(folder / "cifar-100-binary" / f"{part}.bin", np.uint8).reshape(-1, 3074)
    planes = rows[:, 2:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), rows[:, 1].astype(np.int64)


def backbone(setting: Setting, folder: Path, role: str) -> nn.Module:
    """The bare network of `teacher` or `student`, which takes normalised images."""
    network = weights.load(folder / f"{role}.safetensors").backbone
    if role == "teacher":
        network.eval().requires_grad_(False)
    return network.to(setting.device)


def state(folder: Path, role: str) -> dict[str, Tensor]:
    """The weights of a bare network."""
    return weights.load(folder / f"{role}.safetensors").backbone.state_dict()


def _settle(network: nn.Module, size: int) -> None:
    """Give BatchNorm statistics of noise, so that what the teacher says is finite and varied."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(64, 3, size, size))
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


def _write_images(folder: Path, count: int) -> None:
    place = folder / "cifar-100-binary"
    place.mkdir()
    rng = np.random.default_rng(0)
    for part, images in (("train", count), ("test", TEST)):
        rows = rng.integers(0, 256, (images, 3074), dtype=np.uint8)
        rows[:, 1] = np.arange(images) % CLASSES
        rows.tofile(place / f"{part}.bin")

"""What all variants of a training comparison share: images, weights, a cache, recipes.

Everything lies in one folder that is written once: images in one of CIFAR's binary formats, a
teacher and a student with initial weights in our format and as PyTorch's state dicts, the teacher's
cache, and the recipes. Where speed is compared the images are noise.
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

from distill.data import official
from distill.models import backbones, weights
from distill.models.network import Description, Network

CLASSES = {"cifar10": 10, "cifar100": 100}
TEST = 256  # images of the test set; what validation is made on decides nothing
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # two of the peers know no others
MOMENTUM, DECAY = 0.9, 5e-4
TEMPERATURE, CE, KD = 4.0, 0.1, 0.9
FILES = {"cifar10": official.CIFAR10, "cifar100": official.CIFAR100}
VIEWS = 2  # of every image in the cache; epochs take turns

RECIPE = """
data: {{name: {data}, root: "{root}", augment: [crop, flip], image_size: {size}, seed: {seed}}}
{teachers}
student: {{model: "{student}", weights: "{root}/student.safetensors"}}
objective: {objective}
{cache}
optimizer:
  {{name: sgd, lr: {lr}, momentum: {momentum}, weight_decay: {decay}, schedule: {schedule}}}
train: {{epochs: {epochs}, batch_size: {batch}, precision: {precision}, seed: {seed}}}
"""
BOTH = f"[{{term: ce, weight: {CE}}}, {{term: kd, weight: {KD}, temperature: {TEMPERATURE:g}}}]"


@dataclass(frozen=True)
class Setting:
    """One pair of networks on one kind of batch.

    Attributes:
        images: Of the training set.
        turn: Images of a turn, a multiple of `batch`, and all that a peer sees in an epoch.
        workers: Most processes that a peer's loader may start.
        data: The set whose form the images have.
        epochs: Over which the learning rate falls to nought as a cosine; None: it stays as it is,
            and there is no end.
        seed: Of initial weights, order and views.
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
    data: str = "cifar100"
    epochs: int | None = None
    seed: int = 0

    @property
    def title(self) -> str:
        """The pair and the batch in words."""
        pair = f"{self.teacher} → {self.student}".replace("timm/", "")
        return f"{pair}, {self.size} px, batch {self.batch}, {self.precision}"

    @property
    def lr(self) -> float:
        """The learning rate: CIFAR's, or one at which a ViT stays finite."""
        return 0.1 if self.size <= 32 else 1e-3

    @property
    def classes(self) -> int:
        """Their number."""
        return CLASSES[self.data]

    def recipe(self, folder: Path, how: str) -> Path:
        """The recipe file of `live`, `cached` or `alone`."""
        return folder / f"{how}.yaml"


def load(folder: Path) -> Setting:
    """The setting that `write` left in a folder."""
    return Setting(**json.loads((folder / "setting.json").read_text(encoding="utf-8")))


def write(setting: Setting, folder: Path) -> None:
    """Write all that the variants of a comparison of speeds share, but for the cache."""
    write_images(setting, folder, *(_noise(setting, n) for n in (setting.images, TEST)))
    for i, role in enumerate(("teacher", "student")):
        network = initial(setting, role, seed=i)
        if role == "teacher":
            _settle(network, setting.size)
        write_network(setting, folder, role, network)
    write_recipes(setting, folder)


def write_images(setting: Setting, folder: Path, train: np.ndarray, test: np.ndarray) -> None:
    """Write images as the set's own files have them: rows of bytes, labels first."""
    files = FILES[setting.data]
    (folder / files.folder).mkdir()
    for names, rows in ((files.train, train), (files.test, test)):
        for i, name in enumerate(names):
            rows[i :: len(names)].tofile(folder / files.folder / name)


def initial(setting: Setting, role: str, seed: int) -> nn.Module:
    """The bare network of a role with the weights that a seed gives it."""
    torch.manual_seed(seed)
    return backbones.build(
        getattr(setting, role), {}, num_classes=setting.classes, image_size=setting.size
    )


def write_network(setting: Setting, folder: Path, role: str, network: nn.Module) -> None:
    """Write a role's weights in our format and as the peers read them."""
    description = Description(
        model=getattr(setting, role), arguments={}, num_classes=setting.classes, classes=None,
        image_size=setting.size, input_size=None, mean=MEAN, std=STD,
    )  # fmt: skip
    found = weights.to_bytes(Network(network, description))
    (folder / f"{role}.safetensors").write_bytes(found)
    place = pickled(setting, folder) if role == "teacher" else folder / "student.pth"
    place.parent.mkdir(exist_ok=True)
    torch.save({"model": network.state_dict()}, place)


def pickled(setting: Setting, folder: Path) -> Path:
    """The teacher's weights, under a path that tells one of the peers which network it is."""
    return folder / f"{setting.teacher.replace('/', '-')}_vanilla" / "teacher.pth"


def write_recipes(setting: Setting, folder: Path) -> None:
    """Write the recipes, and the setting itself, which `load` reads."""
    taught = f'teachers: [{{weights: "{folder}/teacher.safetensors"}}]'
    kept = f'cache: {{path: "{folder}/cache", views: {VIEWS}}}'
    for how, teachers, objective, cache in (
        ("alone", "", "[{term: ce}]", ""),
        ("live", taught, BOTH, ""),
        ("cached", taught, BOTH, kept),
    ):
        text = RECIPE.format(
            data=setting.data, root=folder, size=setting.size, teachers=teachers,
            student=setting.student, objective=objective, cache=cache, lr=setting.lr,
            momentum=MOMENTUM, decay=DECAY, schedule="cosine" if setting.epochs else "constant",
            epochs=setting.epochs or 1_000_000, batch=setting.batch, precision=setting.precision,
            seed=setting.seed,
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


def pixels(setting: Setting, folder: Path, part: str) -> official.Split:
    """Images (N, 32, 32, 3) as uint8 and labels (N,) of `train` or `test`."""
    found = official.read(setting.data, folder, download=False)
    return found.train if part == "train" else found.test


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


def _noise(setting: Setting, count: int) -> np.ndarray:
    rows = np.random.default_rng(count).integers(0, 256, (count, 3074), dtype=np.uint8)
    rows[:, 1] = np.arange(count) % setting.classes
    return rows

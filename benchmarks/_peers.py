"""Other people's programs: their own scripts, from a checkout, on our images and from our weights.

Each is started as its authors start it, with its own models' code, loader, loop and loss. Its
function that trains an epoch is watched: for speeds it waits for its turn, so that neither start-up
nor validation counts, and "loop alone" has its loader replaced by batches that are made in memory,
the same that the loop by hand gets; for accuracies the student's weights are kept after it.

What is changed besides: torchvision's CIFAR classes read our files; the two that know CIFAR-100
alone build their networks with as many outputs as there are classes, and are seeded here, as they
have no option for it; timm has no crop with a border, so that its images come cropped; and
mdistiller, which knows GPUs only, is told on a CPU that `cuda()` stays where it is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchvision
from _loops import Give, Memory
from _setting import (
    CE,
    DECAY,
    KD,
    MEAN,
    MOMENTUM,
    STD,
    TEMPERATURE,
    Setting,
    backbone,
    pickled,
    pixels,
    state,
)
from _turns import Turns
from _watch import Kept, Timed, Watch
from PIL import Image
from torch import nn
from torchvision import transforms

NEVER = 10**6  # epochs
STAGE = 0.99  # what a stage leaves of the learning rate


def stages(epochs: int) -> list[int]:
    """Epochs after each of which a rate is multiplied by `STAGE`, so that it falls as a cosine.

    For programs that have no other schedule. An epoch has the rate of the cosine at its middle, to
    half a stage; where it falls by several stages at once, its number is there as often.
    """
    found: list[int] = []
    for done in range(epochs):
        factor = (1 + math.cos(math.pi * (done + 0.5) / epochs)) / 2
        found += [done] * (round(math.log(factor) / math.log(STAGE)) - len(found))
    return found


def _falling(setting: Setting) -> list[int]:
    """The stages of a setting; without an end the rate stays as it is."""
    return stages(setting.epochs) if setting.epochs else [NEVER]


def _sow(seed: int) -> None:
    """Seed what draws, for programs that have no option for it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _script(place: Path, name: str) -> ModuleType:
    """A program's file as a module, with its folder first on the path, as when it is run."""
    sys.path.insert(0, str(place.parent))
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _read_ours(setting: Setting, folder: Path) -> None:
    """Let torchvision's CIFAR read our images, as many as an epoch takes; the rest is its own."""

    def init(
        self: Any, root: object, train: bool = True, transform: Any = None,
        target_transform: Any = None, download: bool = False,
    ) -> None:  # fmt: skip
        images, labels = pixels(setting, folder, "train" if train else "test")
        self.data, self.targets = images[: setting.turn], labels[: setting.turn].tolist()
        self.train = train
        self.transform, self.target_transform = transform, target_transform
        self.classes = [str(i) for i in range(setting.classes)]

    torchvision.datasets.CIFAR10.__init__ = init  # type: ignore[method-assign]


def _crop(setting: Setting) -> None:
    """Let torchvision's CIFAR crop its training images, as the other programs' transforms do."""
    crop = transforms.RandomCrop(setting.size, padding=setting.size // 8)

    def item(self: Any, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return self.transform(crop(image) if self.train else image), self.targets[index]

    torchvision.datasets.CIFAR10.__getitem__ = item  # type: ignore[method-assign]


def _workers(setting: Setting, shipped: int) -> int:
    """What its authors set, as far as the machine has processors."""
    return min(shipped, setting.workers)


def _with_classes(models: dict[str, Any], names: Iterable[str], classes: int) -> None:
    """Let a table of networks build these with so many outputs, whatever is asked for."""
    for name in names:
        entry = models[name]
        build, *rest = entry if isinstance(entry, tuple) else (entry,)

        def made(build: Any = build, **_: Any) -> nn.Module:
            network: nn.Module = build(num_classes=classes)
            return network

        models[name] = (made, *rest) if rest else made


def repdistiller(setting: Setting, folder: Path, watch: Watch, checkout: Path) -> None:
    """RepDistiller's `train_student.py --distill kd`."""
    os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # its logger's are of 2017
    _read_ours(setting, folder)
    _sow(setting.seed)
    script = _script(checkout / "train_student.py", "train_student")
    _with_classes(script.model_dict, {setting.teacher, setting.student}, setting.classes)
    sys.argv = [
        "train_student.py", "--path_t", str(pickled(setting, folder)), "--distill", "kd",
        "--model_s", setting.student, "-r", str(CE), "-a", str(KD), "-b", "0",
        "--kd_T", str(TEMPERATURE), "--batch_size", str(setting.batch),
        "--epochs", str(setting.epochs or NEVER), "--num_workers", str(_workers(setting, 8)),
        "--learning_rate", str(setting.lr), "--momentum", str(MOMENTUM),
        "--weight_decay", str(DECAY), "--lr_decay_rate", str(STAGE),
        "--lr_decay_epochs", ",".join(map(str, _falling(setting))),
    ]  # fmt: skip
    epoch = script.train

    def train(number: int, loader: Any, modules: Any, *rest: Any) -> Any:
        if number == 1:
            modules[0].load_state_dict(state(folder, "student"))
        watch.begin()
        found = epoch(number, watch.over(loader), modules, *rest)
        watch.end(modules[0])
        return found

    script.train = train
    script.main()


def mdistiller(setting: Setting, folder: Path, watch: Watch, checkout: Path) -> None:
    """mdistiller's `tools/train.py --cfg configs/cifar100/kd.yaml`."""
    if setting.device == "cpu":
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore
    _read_ours(setting, folder)
    _sow(setting.seed)
    sys.path.insert(0, str(checkout))
    script = _script(checkout / "tools" / "train.py", "mdistiller_train")
    models = script.cifar_model_dict
    models[setting.teacher] = models[setting.teacher][0], str(pickled(setting, folder))
    _with_classes(models, {setting.teacher, setting.student}, setting.classes)
    cfg = script.cfg
    cfg.merge_from_file(str(checkout / "configs" / "cifar100" / "kd.yaml"))
    values = {
        "DISTILLER.TEACHER": setting.teacher, "DISTILLER.STUDENT": setting.student,
        "SOLVER.BATCH_SIZE": setting.batch, "SOLVER.EPOCHS": setting.epochs or NEVER,
        "SOLVER.LR": setting.lr, "SOLVER.LR_DECAY_STAGES": _falling(setting),
        "SOLVER.LR_DECAY_RATE": STAGE, "SOLVER.MOMENTUM": MOMENTUM, "SOLVER.WEIGHT_DECAY": DECAY,
        "LOG.WANDB": False, "DATASET.NUM_WORKERS": _workers(setting, 2),
        "KD.TEMPERATURE": int(TEMPERATURE), "KD.LOSS.CE_WEIGHT": CE, "KD.LOSS.KD_WEIGHT": KD,
    }  # fmt: skip
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    base = script.trainer_dict["base"]
    whole, validate = base.train_epoch, sys.modules[base.__module__].validate

    def train_epoch(self: Any, epoch: int) -> None:
        if epoch == 1:
            self.distiller.module.student.load_state_dict(state(folder, "student"))
            self.train_loader = watch.over(self.train_loader)
        watch.begin()
        whole(self, epoch)

    def validated(loader: Any, distiller: Any) -> Any:  # after the last batch, in the same function
        watch.end(distiller.module.student)
        return validate(loader, distiller)

    base.train_epoch, sys.modules[base.__module__].validate = train_epoch, validated  # type: ignore
    script.main(cfg, False, [])


def timm(
    setting: Setting, folder: Path, watch: Watch, checkout: Path, *, cropped: bool = False
) -> None:
    """timm's `train.py --kd-model-name`.

    Args:
        cropped: Whether its images come cropped with a border, which it has no option for.
    """
    _read_ours(setting, folder)
    if cropped:
        _crop(setting)
    sys.path.insert(0, str(checkout))
    from timm.models import register_model

    def named(role: str) -> Callable[..., nn.Module]:
        def build(pretrained: bool = False, **_: Any) -> nn.Module:
            network = backbone(setting, folder, role)
            statistics = {"input_size": (3, setting.size, setting.size), "mean": MEAN, "std": STD}
            network.pretrained_cfg = network.default_cfg = {  # type: ignore[assignment]
                **statistics, "num_classes": setting.classes, "interpolation": "bilinear",
                "crop_pct": 1.0,
            }  # fmt: skip
            network.num_classes, network.in_chans = setting.classes, 3  # type: ignore[assignment]
            return network

        build.__name__ = f"our_{role}"
        return build

    for role in ("teacher", "student"):
        register_model(named(role))
    script = _script(checkout / "train.py", "timm_train")
    sys.argv = [
        "train.py", "--dataset", f"torch/{setting.data}", "--data-dir", str(folder),
        "--val-split", "", "--model", "our_student", "--num-classes", str(setting.classes),
        "--input-size", "3", *(str(setting.size),) * 2, "--kd-model-name", "our_teacher",
        "--kd-distill-type", "logit", "--kd-temperature", str(TEMPERATURE),
        "--distill-loss-weight", str(KD), "--task-loss-weight", str(CE), "--smoothing", "0",
        "--opt", "sgd", "--lr", str(setting.lr), "--momentum", str(MOMENTUM),
        "--weight-decay", str(DECAY), "--opt-kwargs", "filter_bias_and_bn=False",
        "--epochs", str(setting.epochs or NEVER), "--warmup-epochs", "0",
        "--seed", str(setting.seed), "--batch-size", str(setting.batch),
        "--workers", str(_workers(setting, 4)), "--device", setting.device, "--color-jitter", "0",
        "--scale", "1", "1", "--ratio", "1", "1", "--output", str(Path("out").absolute()),
    ]  # fmt: skip
    if setting.epochs:
        sys.argv += ["--sched", "cosine", "--sched-on-updates"]
    if setting.precision == "bf16":
        sys.argv += ["--amp", "--amp-dtype", "bfloat16"]
    if watch.memory or setting.device == "cpu":
        sys.argv += ["--no-prefetcher"]
    epoch = script.train_one_epoch

    def train_one_epoch(number: int, model: Any, loader: Any, *rest: Any, **keys: Any) -> Any:
        watch.begin()
        found = epoch(number, model, watch.over(loader), *rest, **keys)
        watch.end(model)
        return found

    script.train_one_epoch = train_one_epoch
    script.main()


def torchdistill(
    setting: Setting, folder: Path, watch: Watch, checkout: Path, *, settled: bool = True
) -> None:
    """torchdistill's `examples/torchvision/image_classification.py` with a config of its own form.

    Args:
        settled: Whether the teacher comes in eval mode. The package leaves it as it comes, and the
            networks that it builds itself come in train mode.
    """
    _read_ours(setting, folder)
    script = _script(
        checkout / "examples" / "torchvision" / "image_classification.py", "image_classification"
    )
    from torchdistill.models.registry import register_model

    for role, training in (("teacher", not settled), ("student", True)):
        register_model(key=f"our_{role}")(
            lambda role=role, training=training: backbone(setting, folder, role).train(training)
        )
    config = Path("config.yaml").absolute()
    config.write_text(_config(setting))
    sys.argv = ["image_classification.py", "--config", str(config), "--device", setting.device]
    sys.argv += ["--seed", str(setting.seed)]
    epoch = script.train_one_epoch

    def train_one_epoch(box: Any, *rest: Any) -> None:
        loader = box.train_data_loader
        box.train_data_loader = watch.over(loader)
        watch.begin()
        epoch(box, *rest)
        watch.end(box.student_model)
        box.train_data_loader = loader

    script.train_one_epoch = train_one_epoch
    script.main(script.get_args())


def _config(setting: Setting) -> str:
    """torchdistill's YAML, after its `configs/sample/cifar10/kd`; JSON but for its tags."""
    normalise = {"mean": list(MEAN), "std": list(STD)}

    def call(key: str, **kwargs: Any) -> str:
        inner = ", ".join(f"{name}: {value}" for name, value in kwargs.items())
        return f"!import_call {{key: '{key}', init: {{kwargs: {{{inner}}}}}}}"

    to_tensor = [
        call("torchvision.transforms.ToTensor"),
        call("torchvision.transforms.Normalize", **normalise),
    ]
    augment = [
        call("torchvision.transforms.RandomCrop", size=setting.size, padding=setting.size // 8),
        call("torchvision.transforms.RandomHorizontalFlip", p=0.5),
    ]
    cifar = f"torchvision.datasets.{setting.data.upper()}"

    def dataset(train: bool, transforms: list[str]) -> str:
        composed = call("torchvision.transforms.Compose", transforms=f"[{', '.join(transforms)}]")
        return call(cifar, root="here", train=str(train).lower(), transform=composed)

    def loader(which: str, sampler: str, drop: bool) -> str:
        sampling = f"{{class_or_func: !import_get {{key: 'torch.utils.data.{sampler}'}}, kwargs: }}"
        keys = {
            "batch_size": setting.batch, "num_workers": _workers(setting, 16),
            "pin_memory": setting.device == "cuda", "drop_last": drop,
        }  # fmt: skip
        return f"{{dataset_id: {which}, sampler: {sampling}, kwargs: {json.dumps(keys)}}}"

    network = {"forward_proc": "forward_batch_only", "sequential": [], "frozen_modules": []}
    optimizer = {"lr": setting.lr, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}
    steps = (setting.epochs or 0) * setting.turn // setting.batch
    cosine = {"key": "CosineAnnealingLR", "kwargs": {"T_max": steps}, "scheduling_step": 1}
    kd = {
        "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
        "teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": CE,
        "beta": KD, "reduction": "batchmean",
    }  # fmt: skip
    loss = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    return f"""
datasets:
  train: {dataset(True, augment + to_tensor)}
  test: {dataset(False, to_tensor)}
models:
  teacher_model: {{key: our_teacher, kwargs: {{}}, src_ckpt: }}
  student_model: {{key: our_student, kwargs: {{}}, src_ckpt: , dst_ckpt: ./student.pt}}
train:
  log_freq: 100
  num_epochs: {setting.epochs or NEVER}
  train_data_loader: {loader("train", "RandomSampler", False)}
  val_data_loader: {loader("test", "SequentialSampler", False)}
  teacher: {json.dumps(network | {"requires_grad": False})}
  student: {json.dumps(network | {"requires_grad": True})}
  optimizer: {{key: SGD, kwargs: {json.dumps(optimizer)}}}
  scheduler: {json.dumps(cosine if steps else {})}
  criterion: {{key: WeightedSumLoss, kwargs: {{sub_terms: {json.dumps(loss)}}}}}
test:
  test_data_loader: {loader("test", "SequentialSampler", False)}
"""


# Where each lies, what runs it, and what its loop takes of a batch.
PEERS: dict[str, tuple[str, Callable[..., None], Give]] = {
    "timm": ("pytorch-image-models", timm, lambda images, labels, ids: (images, labels)),
    "torchdistill": (
        "torchdistill",
        torchdistill,
        lambda images, labels, ids: (images, labels, {}),
    ),
    "mdistiller": ("mdistiller", mdistiller, lambda *batch: batch),
    "RepDistiller": ("RepDistiller", repdistiller, lambda *batch: batch),
}


def run(
    name: str,
    setting: Setting,
    folder: Path,
    peers: Path,
    *,
    memory: bool = False,
    keep: str | None = None,
    **how: Any,
) -> None:
    """Be one of the peers, in the current folder.

    Args:
        memory: Replace its loader.
        keep: The file for its student; left out: its epochs are turns.
        how: What its function takes besides.
    """
    os.environ["WANDB_MODE"] = "disabled"
    checkout, program, give = PEERS[name]
    if keep is not None:
        watch: Watch = Kept(Path(keep))
    else:
        own = Memory(setting, folder, give=give) if memory else None
        watch = Timed(Turns(setting.turn, setting.device), own)
    program(setting, folder, watch, peers / checkout, **how)

"""Other people's programs as variants: their own scripts, stopped at the bounds of their epochs.

Each is started as its authors start it, from a checkout, with its own models' shapes, loader and
loop, on our images and from our weights. Its function that trains an epoch is made to wait for its
turn, so that neither start-up nor validation counts. `memory` replaces its loader by batches that
are made in memory, the same that the loop by hand gets: what is left is the loop itself.

What is changed besides: torchvision's CIFAR classes read our file of noise, and mdistiller, which
knows GPUs only, is told on a CPU that `cuda()` stays where it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from _loops import Give, Memory
from _setting import (
    CE,
    CLASSES,
    DECAY,
    KD,
    MEAN,
    MOMENTUM,
    STD,
    TEMPERATURE,
    Setting,
    backbone,
    pixels,
    state,
)
from _turns import Turns
from torch import nn

NEVER = 10**6  # epochs


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
    """Let torchvision's CIFAR read our images, as many as a turn takes; all else stays its own."""

    def init(
        self: Any, root: object, train: bool = True, transform: Any = None,
        target_transform: Any = None, download: bool = False,
    ) -> None:  # fmt: skip
        images, labels = pixels(folder, "train" if train else "test")
        self.data, self.targets = images[: setting.turn], labels[: setting.turn].tolist()
        self.train = train
        self.transform, self.target_transform = transform, target_transform
        self.classes = [str(i) for i in range(CLASSES)]

    torchvision.datasets.CIFAR10.__init__ = init  # type: ignore[method-assign]


def _workers(setting: Setting, shipped: int) -> int:
    """What its authors set, as far as the machine has processors."""
    return min(shipped, setting.workers)


def _pickle(setting: Setting, folder: Path) -> Path:
    return folder / f"{setting.teacher.replace('/', '-')}_vanilla" / "teacher.pth"


def repdistiller(
    setting: Setting, folder: Path, turns: Turns, checkout: Path, *, memory: bool
) -> None:
    """RepDistiller's `train_student.py --distill kd`."""
    os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # its logger's are of 2017
    _read_ours(setting, folder)
    script = _script(checkout / "train_student.py", "train_student")
    sys.argv = [
        "train_student.py", "--path_t", str(_pickle(setting, folder)), "--distill", "kd",
        "--model_s", setting.student, "-r", str(CE), "-a", str(KD), "-b", "0",
        "--kd_T", str(TEMPERATURE), "--batch_size", str(setting.batch), "--epochs", str(NEVER),
        "--num_workers", str(_workers(setting, 8)), "--learning_rate", str(setting.lr),
        "--momentum", str(MOMENTUM), "--weight_decay", str(DECAY),
    ]  # fmt: skip
    epoch = script.train
    own = Memory(setting, folder) if memory else None

    def train(number: int, loader: Any, modules: Any, *rest: Any) -> Any:
        if number == 1:
            modules[0].load_state_dict(state(folder, "student"))
        return turns.whole(epoch)(number, turns.over(own or loader), modules, *rest)

    script.train = train
    script.main()


def mdistiller(
    setting: Setting, folder: Path, turns: Turns, checkout: Path, *, memory: bool
) -> None:
    """mdistiller's `tools/train.py --cfg configs/cifar100/kd.yaml`."""
    if setting.device == "cpu":
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore
    _read_ours(setting, folder)
    sys.path.insert(0, str(checkout))
    script = _script(checkout / "tools" / "train.py", "mdistiller_train")
    models = script.cifar_model_dict
    models[setting.teacher] = models[setting.teacher][0], str(_pickle(setting, folder))
    cfg = script.cfg
    cfg.merge_from_file(str(checkout / "configs" / "cifar100" / "kd.yaml"))
    values = {
        "DISTILLER.TEACHER": setting.teacher, "DISTILLER.STUDENT": setting.student,
        "SOLVER.BATCH_SIZE": setting.batch, "SOLVER.EPOCHS": NEVER, "SOLVER.LR": setting.lr,
        "SOLVER.MOMENTUM": MOMENTUM, "SOLVER.WEIGHT_DECAY": DECAY, "LOG.WANDB": False,
        "DATASET.NUM_WORKERS": _workers(setting, 2), "KD.TEMPERATURE": int(TEMPERATURE),
        "KD.LOSS.CE_WEIGHT": CE, "KD.LOSS.KD_WEIGHT": KD,
    }  # fmt: skip
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    base = script.trainer_dict["base"]
    whole, validate = base.train_epoch, sys.modules[base.__module__].validate
    own = Memory(setting, folder) if memory else None

    def train_epoch(self: Any, epoch: int) -> None:
        if epoch == 1:
            self.distiller.module.student.load_state_dict(state(folder, "student"))
            self.train_loader = turns.over(own or self.train_loader)
        turns.begin()
        whole(self, epoch)

    def validated(*args: Any) -> Any:  # which comes after the last batch, in the same function
        turns.end()
        return validate(*args)

    base.train_epoch, sys.modules[base.__module__].validate = train_epoch, validated  # type: ignore
    script.main(cfg, False, [])


def timm(setting: Setting, folder: Path, turns: Turns, checkout: Path, *, memory: bool) -> None:
    """timm's `train.py --kd-model-name`."""
    _read_ours(setting, folder)
    sys.path.insert(0, str(checkout))
    from timm.models import register_model

    def named(role: str) -> Callable[..., nn.Module]:
        def build(pretrained: bool = False, **_: Any) -> nn.Module:
            network = backbone(setting, folder, role)
            statistics = {"input_size": (3, setting.size, setting.size), "mean": MEAN, "std": STD}
            network.pretrained_cfg = network.default_cfg = {  # type: ignore[assignment]
                **statistics, "num_classes": CLASSES, "interpolation": "bilinear", "crop_pct": 1.0,
            }  # fmt: skip
            network.num_classes, network.in_chans = CLASSES, 3  # type: ignore[assignment]
            return network

        build.__name__ = f"our_{role}"
        return build

    for role in ("teacher", "student"):
        register_model(named(role))
    script = _script(checkout / "train.py", "timm_train")
    sys.argv = [
        "train.py", "--dataset", "torch/cifar100", "--data-dir", str(folder), "--val-split", "",
        "--model", "our_student", "--num-classes", str(CLASSES), "--input-size", "3",
        str(setting.size), str(setting.size), "--kd-model-name", "our_teacher",
        "--kd-distill-type", "logit", "--kd-temperature", str(TEMPERATURE),
        "--distill-loss-weight", str(KD), "--task-loss-weight", str(CE), "--smoothing", "0",
        "--opt", "sgd", "--lr", str(setting.lr), "--momentum", str(MOMENTUM),
        "--weight-decay", str(DECAY), "--epochs", str(NEVER), "--warmup-epochs", "0",
        "--batch-size", str(setting.batch),
        "--workers", str(_workers(setting, 4)), "--device", setting.device, "--color-jitter", "0",
        "--scale", "1", "1", "--ratio", "1", "1", "--output", str(Path("out").absolute()),
    ]  # fmt: skip
    if setting.precision == "bf16":
        sys.argv += ["--amp", "--amp-dtype", "bfloat16"]
    if memory or setting.device == "cpu":
        sys.argv += ["--no-prefetcher"]
    epoch = script.train_one_epoch
    own = Memory(setting, folder, give=lambda *batch: batch[:2]) if memory else None

    def train_one_epoch(number: int, model: Any, loader: Any, *rest: Any, **keys: Any) -> Any:
        return turns.whole(epoch)(number, model, turns.over(own or loader), *rest, **keys)

    script.train_one_epoch = train_one_epoch
    script.main()


def torchdistill(
    setting: Setting, folder: Path, turns: Turns, checkout: Path, *, memory: bool
) -> None:
    """torchdistill's `examples/torchvision/image_classification.py` with a config of its own form.

    The teacher stays in train mode, as the package leaves it.
    """
    _read_ours(setting, folder)
    script = _script(
        checkout / "examples" / "torchvision" / "image_classification.py", "image_classification"
    )
    from torchdistill.models.registry import register_model

    for role in ("teacher", "student"):
        register_model(key=f"our_{role}")(lambda role=role: backbone(setting, folder, role))
    config = Path("config.yaml").absolute()
    config.write_text(_config(setting))
    sys.argv = ["image_classification.py", "--config", str(config), "--device", setting.device]
    epoch = script.train_one_epoch
    give: Give = lambda images, labels, ids: (images, labels, {})  # noqa: E731
    own = Memory(setting, folder, give=give) if memory else None

    def train_one_epoch(box: Any, *rest: Any) -> None:
        loader = box.train_data_loader
        box.train_data_loader = turns.over(own or loader)
        turns.whole(epoch)(box, *rest)
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
    cifar = "torchvision.datasets.CIFAR100"

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
    optimizer = {"lr": setting.lr, "momentum": MOMENTUM, "weight_decay": DECAY}
    kd = {
        "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
        "teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": KD,
        "reduction": "batchmean",
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
  num_epochs: {NEVER}
  train_data_loader: {loader("train", "RandomSampler", False)}
  val_data_loader: {loader("test", "SequentialSampler", False)}
  teacher: {json.dumps(network | {"requires_grad": False})}
  student: {json.dumps(network | {"requires_grad": True})}
  optimizer: {{key: SGD, kwargs: {json.dumps(optimizer)}}}
  criterion: {{key: WeightedSumLoss, kwargs: {{sub_terms: {json.dumps(loss)}}}}}
test:
  test_data_loader: {loader("test", "SequentialSampler", False)}
"""


PEERS = {
    "timm": ("pytorch-image-models", timm),
    "torchdistill": ("torchdistill", torchdistill),
    "mdistiller": ("mdistiller", mdistiller),
    "RepDistiller": ("RepDistiller", repdistiller),
}


def run(name: str, setting: Setting, folder: Path, peers: Path, *, memory: bool) -> None:
    """Be a variant: one of the peers, in the current folder."""
    os.environ["WANDB_MODE"] = "disabled"
    turns = Turns(setting.turn, setting.device)
    checkout, program = PEERS[name]
    program(setting, folder, turns, peers / checkout, memory=memory)

"""Images a CPU second of the training loader beside torchvision's pipelines, one thread.

    python benchmarks/data.py [--rounds 5]

Pictures of CIFAR's shape in memory, batches of 128. Every pipeline delivers float images in [0, 1];
torchvision's work on one image at a time, in a DataLoader without workers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
import torch
from _timing import Work, compare, report
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from distill.data.datasets import Dataset, Source
from distill.data.loader import Loader
from distill.recipe import Data

BATCH = 128
NUM = 50_000
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 32, 32, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, NUM)


def ours(steps: int, **keys: object) -> Work:
    """Batches of our loader, mixing and one-hot labels included where the recipe has them."""
    source = Source(LABELS, PIXELS, None)
    dataset = Dataset(
        name="random", classes=tuple("0123456789"), train=source, test=source,
        train_ids=np.arange(NUM), val_ids=np.arange(0), image_size=32, mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25), max_pixels=10**6, bad=(), content="", fingerprint="",
    )  # fmt: skip
    loader = Loader(
        dataset, Data(name="cifar10", **keys), batch_size=BATCH, train_seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    epochs = itertools.count()
    steps = min(steps, loader.steps_per_epoch)
    return lambda: BATCH * _take(loader.epoch(next(epochs)), steps)


def torchvisions(steps: int, transform: Callable[[object], Tensor], images: object) -> Work:
    """Batches of a DataLoader that applies `transform` to one image after the other."""
    loader = DataLoader(_Images(images, transform), batch_size=BATCH, shuffle=True, drop_last=True)
    return lambda: BATCH * _take(loader, steps)


class _Images(TorchDataset[tuple[Tensor, int]]):
    def __init__(self, images: object, transform: Callable[[object], Tensor]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image = self._images[number]  # type: ignore[index]
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return self._transform(image), int(LABELS[number])


def _take(batches: object, steps: int) -> int:
    return sum(1 for _ in itertools.islice(batches, steps))  # type: ignore[call-overload]


def main(rounds: int) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    tensors = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    crop_flip = [v1.RandomCrop(32, 4), v1.RandomHorizontalFlip()]
    crop_flip_v2 = [v2.RandomCrop(32, 4), v2.RandomHorizontalFlip()]
    to_float = v2.ToDtype(torch.float32, scale=True)
    rows = compare(
        {
            "PIL + torchvision v1": torchvisions(
                15, v1.Compose([*crop_flip, v1.ToTensor()]), PIXELS
            ),
            "uint8 tensors + torchvision v2": torchvisions(
                25, v2.Compose([*crop_flip_v2, to_float]), tensors
            ),
            "ours": ours(390, augment=["crop", "flip"]),
            "ours, with mixup and cutmix": ours(
                390, augment=["crop", "flip"], mixup=0.8, cutmix=1.0
            ),
        },
        rounds=rounds,
    )
    report("crop + flip", rows, unit="images")
    rows = compare(
        {
            "PIL + torchvision v1": torchvisions(
                10, v1.Compose([*crop_flip, v1.RandAugment(), v1.ToTensor()]), PIXELS
            ),
            "uint8 tensors + torchvision v2": torchvisions(
                8, v2.Compose([*crop_flip_v2, v2.RandAugment(), to_float]), tensors
            ),
            "ours": ours(100, augment=["crop", "flip", "randaugment"]),
        },
        rounds=rounds,
    )
    report("crop + flip + RandAugment(2, 9)", rows, unit="images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)

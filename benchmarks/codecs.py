"""How far the codecs of the teacher cache bend what a real teacher of 1,000 classes says.

    python benchmarks/codecs.py [--views 54] [--augment resized_crop flip] [--teacher lite2]

The teacher is an EfficientNet-Lite with ImageNet's weights, asked about random views of photographs
(see efficientnet.py for what to install). Two regimes: its logits as they are, which spread much
over the classes it thinks least of, and times 2.2, as sharp as those of a teacher on its own
training images. For each temperature T, with the teacher's classes p and those q that a codec
leaves of them, and a student's s on the same view (another EfficientNet-Lite):

    error   the median of |q − p| / |s − p|, how far the gradient of KD at the logits is off
    KL      the mean of KL(p ‖ q), in nats
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import efficientnet
import numpy as np
import torch
from torch import Tensor

from distill.cache import codec as codecs
from distill.cache import layout
from distill.data import datasets
from distill.data.pixels import Views
from distill.engine.memory import keep_freed
from distill.recipe import Augmentation, Data
from distill.types import Batch

CODECS = ("fp16", "int8", "topk:100", "topk:32", "topk:10")
TEMPERATURES = (1, 2, 4, 8)
SHARPER = 2.2


def views(augment: list[str], number: int, size: int) -> Iterator[Batch]:
    """So many views of every photograph, through the loader's own way from JPEG to pixels."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for place, file in enumerate(efficientnet.photographs()):
            for split in ("train", "test"):
                path = root / split / f"photograph_{place:02d}"
                path.mkdir(parents=True)
                efficientnet.picture(file).save(path / "0.jpg", quality=95)
        data = Data(
            name="folder",
            root=folder,
            image_size=size,
            augment=[Augmentation(name=name) for name in augment],
        )
        dataset = datasets.load(data)
        source = Views(dataset, data, device=torch.device("cpu"), audience="teacher")
        positions = np.arange(len(dataset.train_ids)).repeat(number)
        numbers = np.tile(np.arange(number), len(dataset.train_ids))
        for batch, _ in source.single(positions, numbers, batch_size=16):
            yield batch


def answers(augment: list[str], number: int, names: tuple[str, ...]) -> list[Tensor]:
    """What some networks say of the views, which have the size that the first one takes."""
    networks = [efficientnet.trained(name) for name in names]
    told: list[list[Tensor]] = [[] for _ in names]
    with torch.no_grad():
        for batch in views(augment, number, efficientnet.SIZES[names[0]]):
            for network, said in zip(networks, told, strict=True):
                said.append(network(batch.images).logits)
    return [torch.cat(said) for said in told]


def table(title: str, teacher: Tensor, student: Tensor) -> None:
    """Print one regime's errors."""
    p = teacher.softmax(dim=1)
    outside = 1 - p.topk(100, dim=1).values.sum(dim=1)
    print(
        f"\n{title}: mean confidence {p.amax(dim=1).mean():.2f}, "
        f"{outside.mean():.1%} outside the first 100 classes"
    )
    print("| codec | bytes a view |" + "".join(f" T={t}, error (KL) |" for t in TEMPERATURES))
    print("|---|---|" + "---|" * len(TEMPERATURES))
    for codec in CODECS:
        kept = codecs.decode(codec, codecs.encode(codec, teacher), teacher.shape[1])
        size = sum(column.row_bytes for column in layout.columns(codec, teacher.shape[1]))
        cells = [f"{error:.1%} ({kl:.1e})" for error, kl in _errors(teacher, kept, student)]
        print(f"| {codec} | {size:,} | {' | '.join(cells)} |")


def _errors(teacher: Tensor, kept: Tensor, student: Tensor) -> Iterator[tuple[float, float]]:
    """The error and the divergence at each temperature."""
    for temperature in TEMPERATURES:
        p, q, s = (
            (logits.double() / temperature).log_softmax(dim=1)
            for logits in (teacher, kept, student)
        )
        kl = (p.exp() * (p - q)).sum(dim=1).mean()
        off = (q.exp() - p.exp()).norm(dim=1) / (s.exp() - p.exp()).norm(dim=1)
        yield float(off.median()), float(kl)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--views", type=int, default=54, help="of every photograph")
    parser.add_argument("--augment", nargs="*", default=["resized_crop", "flip"])
    parser.add_argument("--teacher", choices=sorted(efficientnet.SIZES), default="lite0")
    parser.add_argument("--student", choices=sorted(efficientnet.SIZES), default="lite1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    names = (options.teacher, options.student)
    teacher, student = answers(options.augment, options.views, names)
    print(
        f"{options.teacher}, {len(teacher):,} views of {len(efficientnet.photographs())} "
        f"photographs ({' + '.join(options.augment)}); the student is {options.student}"
    )
    table("as it is", teacher, student)
    table(f"logits x {SHARPER}", SHARPER * teacher, SHARPER * student)


if __name__ == "__main__":
    main()

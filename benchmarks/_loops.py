"""The loops by hand that all else is held to, on batches that are made in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
    pixels,
)
from _turns import Turns
from torch import Tensor, nn

Give = Callable[[Tensor, Tensor, Tensor], Any]


class Memory:
    """Batches of images that lie on the device as uint8, cropped and flipped by one gather.

    Args:
        channels_last: The format of the images; else rows of whole planes, as peers have them.
        give: Makes of images (B, 3, H, W), labels and ids what a loop takes.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        *,
        channels_last: bool = False,
        give: Give = lambda images, labels, ids: (images, labels, ids),
    ) -> None:
        device, size = torch.device(setting.device), setting.size
        images, labels = pixels(setting, folder, "train")
        planes = torch.from_numpy(images).permute(0, 3, 1, 2)
        if size != planes.shape[-1]:
            parts = planes.split(64)
            planes = torch.cat([F.interpolate(p.float(), size).to(torch.uint8) for p in parts])
        pad = size // 8
        canvas = F.pad(planes, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        self._canvas = canvas.contiguous().to(device)
        self._labels = torch.from_numpy(labels).to(device)
        self._around = torch.arange(size, device=device)
        self._places, self._batch, self._turn = 2 * pad + 1, setting.batch, setting.turn
        self._scale = 1 / (255 * torch.tensor(STD, device=device).view(3, 1, 1))
        self._shift = -torch.tensor(MEAN, device=device).view(3, 1, 1) * 255 * self._scale
        self._channels_last, self._give = channels_last, give
        self.dataset = range(setting.turn)

    def __len__(self) -> int:
        return min(self._turn, len(self._labels)) // self._batch

    def __iter__(self) -> Iterator[Any]:
        for ids in self.order():
            yield self._give(*self.batch(ids), ids)

    def order(self) -> Iterator[Tensor]:
        """Ids of the images of each batch of an epoch that is no longer than a turn."""
        order = torch.randperm(len(self._labels), device=self._labels.device)
        for i in range(len(self)):
            yield order[i * self._batch : (i + 1) * self._batch]

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images and labels."""
        corner = torch.randint(self._places, (2, len(ids), 1), device=ids.device)
        columns = corner[1] + self._around
        flipped = torch.rand(len(ids), 1, device=ids.device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        rows = corner[0] + self._around
        found = self._canvas[ids[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = found.permute(0, 3, 1, 2).float() * self._scale + self._shift
        return images if self._channels_last else images.contiguous(), self._labels[ids]


def distillation(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """0.1 of cross-entropy and 0.9 of KD."""
    told = (F.log_softmax(z.float() / TEMPERATURE, dim=1) for z in (student, teacher))
    kl = F.kl_div(*told, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return KD * kl + CE * F.cross_entropy(student.float(), labels)


def loop(
    setting: Setting,
    folder: Path,
    turns: Turns,
    *,
    told: str = "live",
    channels_last: bool = True,
    compiled: bool = False,
    graph: bool = False,
) -> None:
    """Forward, backward, step, without end.

    Args:
        told: What the teacher's answers are: `live`, `cached` logits at hand, or `none`.
        channels_last: The networks' and the images' format.
        compiled: With `torch.compile`.
        graph: Batch, both passes and update as one CUDA graph: what small kernels leave possible.
    """
    torch.backends.cudnn.benchmark = True
    device = torch.device(setting.device)
    memory = Memory(setting, folder, channels_last=channels_last)
    student, teacher = (backbone(setting, folder, role) for role in ("student", "teacher"))
    student.train()
    for network in (student, teacher):
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compiled:
            network.compile()
    kept = torch.randn(setting.images, setting.classes, device=device)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=setting.lr,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        nesterov=True,
        **fused,
    )
    half = setting.precision == "bf16"
    cast: Any = torch.autocast(device.type, torch.bfloat16, cache_enabled=not graph)

    def step(ids: Tensor) -> None:
        images, labels = memory.batch(ids)
        with cast if half else nullcontext():
            if told == "live":
                with torch.no_grad():
                    answer = teacher(images)
            logits = student(images)
        if told == "none":
            loss = F.cross_entropy(logits.float(), labels)
        else:
            loss = distillation(logits, answer if told == "live" else kept[ids], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    make = _recorded(step, setting.batch, student) if graph else step
    turns.begin()
    while True:
        for ids in memory.order():
            make(ids)
            turns.step(setting.batch)


def _recorded(
    step: Callable[[Tensor], None], batch: int, student: nn.Module
) -> Callable[[Tensor], None]:
    """The step as one CUDA graph, after a few that choose kernels and allocate moments."""
    ids = torch.arange(batch, device="cuda")
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step(ids)
    torch.cuda.current_stream().wait_stream(side)
    for parameter in student.parameters():
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ids)

    def make(given: Tensor) -> None:
        ids.copy_(given)
        graph.replay()

    return make

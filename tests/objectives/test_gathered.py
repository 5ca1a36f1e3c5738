"""Terms that compare the images of a batch see all of it, in two processes as in one."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill import component
from distill.objectives._term import Term
from distill.types import Batch
from tests.objectives.test_terms import batch, build, logits, loss

NAMES = [
    name
    for name, definition in component.find("objectives").items()
    if definition.constants.get("needs_batch")
]
SIZE, WIDTH, CLASSES, PROCESSES = 12, 6, 5, 2

Found = dict[str, Tensor]


class Small(nn.Module):
    """A student of one layer, and a term with what it learns."""

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.term = term

    def forward(self, inputs: Tensor, teacher: Tensor, data: Batch) -> Tensor:
        return loss(self.term, self.layer(inputs), teacher, data).mean()


def train(name: str, rank: int, processes: int) -> Found:
    """Two steps of this process on its rows: losses, gradients, and the state they end in."""
    torch.manual_seed(0)
    small = Small(build(name, CLASSES))
    model = DistributedDataParallel(small) if processes > 1 else small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    per = SIZE // processes
    rows = slice(rank * per, (rank + 1) * per)
    found: Found = {}
    for step in range(2):  # the second hears what a term kept of the first
        inputs, teacher = torch.randn(SIZE, WIDTH), logits(SIZE, CLASSES)
        data = batch(SIZE, CLASSES, "mixed")
        small.term.set_progress((step + 0.5) / 2)
        optimizer.zero_grad()
        value = model(inputs[rows], teacher[rows], data.rows(rows))
        value.backward()
        optimizer.step()
        mean = value.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        found[f"loss {step}"] = mean
        for key, parameter in small.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} of {key}"] = parameter.grad.clone()
    return found | small.state_dict()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    for name in NAMES:
        torch.save(train(name, rank, PROCESSES), folder / f"{name}-{rank}.pt")
    dist.barrier()  # a process that leaves while another still talks to it may be aborted
    gc.collect()  # DDP's reducers have threads of their own
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, one file a term and process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_what_one_does(name: str, folder: Path) -> None:
    expected = train(name, 0, 1)
    assert any(key.startswith("gradient 1 of layer") for key in expected)
    for rank in range(PROCESSES):
        found = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_a_batch_by_itself_says_something_else(name: str) -> None:
    torch.manual_seed(0)
    term, data = build(name, CLASSES), batch(SIZE, CLASSES)
    student, teacher = logits(SIZE, CLASSES), logits(SIZE, CLASSES)
    halves = [slice(0, SIZE // 2), slice(SIZE // 2, SIZE)]
    apart = [loss(term, student[rows], teacher[rows], data.rows(rows)).mean() for rows in halves]
    together = loss(term, student, teacher, data).mean()
    assert not torch.allclose(torch.stack(apart).mean(), together, rtol=1e-3)


def test_they_are_found() -> None:
    assert {"dist", "similarity"} <= set(NAMES)

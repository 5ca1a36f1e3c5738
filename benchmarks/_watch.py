"""What is done around the epochs of other people's programs, for speeds and for accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from _loops import Memory
from _turns import Turns
from torch import nn


class Watch(Protocol):
    """What is done around a program's epochs.

    Attributes:
        memory: Whether its loader is replaced by one that needs no worker.
    """

    memory: bool

    def over(self, loader: Any) -> Any:
        """What the epoch reads in place of its loader."""

    def begin(self) -> None:
        """Before an epoch."""

    def end(self, student: nn.Module) -> None:
        """After its last batch."""


class Timed:
    """Epochs are turns.

    Args:
        turns: Which are asked for from outside.
        own: In place of their loader, where that is not to count.
    """

    def __init__(self, turns: Turns, own: Memory | None) -> None:
        self.memory, self._turns, self._own = own is not None, turns, own

    def over(self, loader: Any) -> Any:
        return self._turns.over(self._own or loader)

    def begin(self) -> None:
        self._turns.begin()

    def end(self, student: nn.Module) -> None:
        self._turns.end()


class Kept:
    """Epochs go by, and the student's weights are kept after each: the last ones count.

    Args:
        place: The file of weights; it says after how many epochs.
    """

    memory = False

    def __init__(self, place: Path) -> None:
        self._place, self._epochs = place, 0

    def over(self, loader: Any) -> Any:
        return loader

    def begin(self) -> None:
        pass

    def end(self, student: nn.Module) -> None:
        self._epochs += 1
        torch.save({"model": student.state_dict(), "epochs": self._epochs}, self._place)

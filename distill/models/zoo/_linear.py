"""Linear maps whose matrix has a structure, so that they cost less than a dense one.

Qiu, Potapczynski, Finzi, Goldblum, Wilson: Compute Better Spent: Replacing Dense Layers with
Structured Matrices, ICML 2024, arXiv:2406.06248. Monarch matrices: Dao et al., ICML 2022,
arXiv:2204.00595. Every matrix is the product of two cores. The paper also gives each core a
learning rate of its own, d_in / (2 core d_in) times the dense one; here all share the optimizer's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

MONARCH_BLOCKS = 4  # on either diagonal, as in the paper's experiments


def linear(
    d_in: int, d_out: int, *, structure: str, rank: int | None, bias: bool = True
) -> nn.Module:
    """A linear map over the last axis.

    Args:
        d_in: Channels that come in.
        d_out: Channels that go out.
        structure: dense, low_rank, kron, monarch or btt.
        rank: Of low_rank and btt. None: 1 for btt, and √min(d_in, d_out) for low_rank, which then
            costs as much.
        bias: Whether a learned vector, zero at first, is added.
    """
    match structure:
        case "low_rank":
            return LowRank(d_in, d_out, rank or math.isqrt(min(d_in, d_out)), bias)
        case "kron":
            return Kronecker(d_in, d_out, bias)
        case "monarch":
            return Monarch(d_in, d_out, bias)
        case "btt":
            return BlockTensorTrain(d_in, d_out, rank or 1, bias)
        case _:
            return nn.Linear(d_in, d_out, bias=bias)


class Structured(nn.Module, ABC):
    """x Wᵀ + b, computed without W."""

    def __init__(self, d_out: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Return x Wᵀ + b."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Return x Wᵀ."""

    @abstractmethod
    def materialise(self) -> Float[Tensor, "O I"]:
        """W itself."""


class LowRank(Structured):
    """W = V U, with `rank` channels in between."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__(d_out, bias)
        self.u = _core(rank, d_in, d_in=d_in, d_out=rank)
        self.v = _core(d_out, rank, d_in=rank, d_out=d_out)

    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return x @ self.u.T @ self.v.T

    def materialise(self) -> Float[Tensor, "O I"]:
        return self.v @ self.u


class Kronecker(Structured):
    """W = U ⊗ V: channels lie in a table, U acts on its rows and V on its columns."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_out, bias)
        (a, b), (c, d) = _table(d_in), _table(d_out)
        self.u = _core(c, a, d_in=a, d_out=c)
        self.v = _core(d, b, d_in=b, d_out=d)

    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        table = torch.unflatten(x, -1, (self.u.shape[1], self.v.shape[1]))
        return torch.einsum("...ab,ca,db->...cd", table, self.u, self.v).flatten(-2)

    def materialise(self) -> Float[Tensor, "O I"]:
        return torch.kron(self.u, self.v)


class Monarch(Structured):
    """W = Pᵀ V P U with block-diagonal U and V; P deals each block's channels out to all blocks."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(d_out, bias)
        a, c = d_in // MONARCH_BLOCKS, d_out // MONARCH_BLOCKS
        inner = min(a, c)
        self.u = _core(MONARCH_BLOCKS, inner, a, d_in=a, d_out=inner)
        self.v = _core(MONARCH_BLOCKS, c, inner, d_in=inner, d_out=c)

    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        blocks = torch.unflatten(x, -1, (MONARCH_BLOCKS, -1))
        inner = torch.einsum("...ka,kra->...kr", blocks, self.u).flatten(-2)
        dealt = torch.unflatten(inner, -1, (-1, MONARCH_BLOCKS))
        return torch.einsum("...rk,kcr->...ck", dealt, self.v).flatten(-2)

    def materialise(self) -> Float[Tensor, "O I"]:
        u, v = (torch.block_diag(*core) for core in (self.u, self.v))  # type: ignore[no-untyped-call]
        return _deal(v @ _deal(u, (-1, MONARCH_BLOCKS)), (MONARCH_BLOCKS, -1))


class BlockTensorTrain(Structured):
    """W[cd, ab] = Σ_r U[b, r, c, a] V[c, d, r, b]: a Kronecker product whose factors vary.

    Channels lie in a table; U is a matrix of its own for every column b of the input, V for every
    row c of the output. For d channels in and out it has 2 rank d^1.5 parameters.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__(d_out, bias)
        (a, b), (c, d) = _table(d_in), _table(d_out)
        self.u = _core(b, rank, c, a, d_in=a, d_out=rank * c)
        self.v = _core(c, d, rank, b, d_in=rank * b, d_out=d)

    def product(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        table = torch.unflatten(x, -1, (self.u.shape[3], self.u.shape[0]))
        inner = torch.einsum("...ab,brca->...crb", table, self.u)
        return torch.einsum("...crb,cdrb->...cd", inner, self.v).flatten(-2)

    def materialise(self) -> Float[Tensor, "O I"]:
        return torch.einsum("brca,cdrb->cdab", self.u, self.v).flatten(2).flatten(0, 1)


def _deal(x: Float[Tensor, "N I"], table: tuple[int, int]) -> Float[Tensor, "N I"]:
    """Rows written into a table row by row, read column by column."""
    return torch.unflatten(x, 0, table).transpose(0, 1).flatten(0, 1)


def _core(*shape: int, d_in: int, d_out: int) -> nn.Parameter:
    """From N(0, 1 / d_in), and narrower where channels get fewer: by √(d_out / d_in).

    The core's largest singular value then is about √(d_out / d_in), whatever its shape, and what it
    learns in a step has the same effect.
    """
    std = d_in**-0.5 * min(1, (d_out / d_in) ** 0.5)
    return nn.Parameter(torch.randn(shape) * std)


def _table(channels: int) -> tuple[int, int]:
    """Rows and columns, rows ≤ columns, as close to a square as they come."""
    rows = next(n for n in range(math.isqrt(channels), 0, -1) if channels % n == 0)
    return rows, channels // rows

"""A block that compresses its tokens against subspaces, then makes them sparse.

Yu et al.: White-Box Transformers via Sparse Rate Reduction, NeurIPS 2023, arXiv:2306.01129.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.grids import Size
from distill.models.zoo._attention import join, split
from distill.models.zoo._layers import EPS, DropPath


class SubspaceAttention(nn.Module):
    """MSSA: U softmax(Uᵀx (Uᵀx)ᵀ / √d) Uᵀx over all heads; one map Uᵀ is query, key and value.

    The U in front is a linear map of its own, as in the paper's experiments.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.u = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        (u,) = split(self.u(x), self.heads, 1)
        x = self.proj(join(F.scaled_dot_product_attention(u, u, u)))
        return x


class Ista(nn.Module):
    """One step of iterative shrinkage towards a sparse code of x in the dictionary D.

    ReLU(x + η Dᵀ(x − D x) − η λ), with the step η and the sparsity λ that the paper uses.
    """

    def __init__(self, width: int, *, eta: float = 0.1, lam: float = 0.1) -> None:
        super().__init__()
        self.eta, self.lam = eta, lam
        self.d = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.d)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        rest = x - x @ self.d.T
        return F.relu(x + self.eta * (rest @ self.d) - self.eta * self.lam)


class CrateBlock(nn.Module):
    """z = x + MSSA(norm(x)), then ISTA(norm(z)), which is not added to z but takes its place."""

    def __init__(self, width: int, heads: int, *, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = SubspaceAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.ista = Ista(width)
        self.drop = nn.Sequential(nn.Dropout(drop), DropPath(drop_path))

    def forward(self, x: Float[Tensor, "B N D"], grid: Size) -> Float[Tensor, "B N D"]:
        z = x + self.drop(self.attention(self.norm1(x)))
        x = self.ista(self.norm2(z))
        return x

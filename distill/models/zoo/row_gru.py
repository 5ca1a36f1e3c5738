"""A recurrent network that reads an image row by row: the control that knows order and no columns.

Cho et al.: Learning Phrase Representations using RNN Encoder-Decoder, EMNLP 2014, arXiv:1406.1078.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count


class _RowGRU(nn.Module):
    """The classifier reads the state behind the last row.

    Maps from state to state begin orthogonal, as in the paper: over all of the rows they neither
    shrink what was seen nor let it grow. Maps from the input begin by Xavier's uniform, each gate
    for itself, since its sigmoid or tanh is nearly linear at first.
    """

    def __init__(self, num_classes: int, row: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.gru = nn.GRU(row, width, depth)
        self.head = nn.Linear(width, num_classes)
        for name, parameter in self.gru.named_parameters():
            for gate in parameter.chunk(3):
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                elif name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(gate)
                else:
                    nn.init.zeros_(gate)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        # Time first, samples second: states are no grid over the image, and look like none.
        rows = x.permute(2, 0, 1, 3).flatten(2)
        _, last = self.gru(rows)
        logits: Tensor = self.head(last[-1])
        return logits


def row_gru(
    num_classes: int, image_size: int, *, width: Count = 128, depth: Count = 1
) -> nn.Module:
    """A GRU over the rows of the image: 0.10 M parameters at 32 px and 100 classes.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels; they may have more rows or fewer, not columns.
        width: Channels of the state.
        depth: Layers, each over the states of the one before.
    """
    return _RowGRU(num_classes, 3 * image_size, width=width, depth=depth)

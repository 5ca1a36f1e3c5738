"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

RecipeFile = Annotated[Path, Argument(metavar="RECIPE", help="Recipe file, YAML.")]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable."),
]
Workers = Annotated[
    int | None, Option(min=0, help="Image-decoding processes for each training process.")
]
DeviceBatchSize = Annotated[
    int | None, Option(min=1, help="Most images at once on a device; gradients add up.")
]
Compile = Annotated[
    bool, Option("--compile", help="Compile student and teacher with torch.compile.")
]
CudaGraph = Annotated[
    bool,
    Option(
        "--cuda-graph/--no-cuda-graph",
        help="Launch a step as one CUDA graph where a GPU would wait for its kernels.",
    ),
]
ShardWeights = Annotated[
    bool,
    Option("--shard-weights", help="Cut models that fit on no device in parts, one a process."),
]
CheckpointSeconds = Annotated[float, Option(min=0, help="Seconds between two checkpoints.")]
DataRoot = Annotated[
    Path | None,
    Option(metavar="DIR", help="Where the data lie now; left out: as the recipe says."),
]
AsJson = Annotated[bool, Option("--json", help="Print the result as one line of JSON on stdout.")]
Seeds = Annotated[
    str | None,
    Option(metavar="S,S,...", help="Of training.", show_default="the recipe's train.seed"),
]
Live = Annotated[
    bool, Option("--live", help="Ask the teachers in every step; make no cache of them.")
]

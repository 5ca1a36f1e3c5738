"""Everything a run needs to go on as if it had never stopped, in one folder a checkpoint."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from distill import storage
from distill.errors import DamagedError, DivergedError, IdentityError
from distill.identity import require_same

FORMAT = 1
KEEP = 2  # the newest, and one to fall back on should the disk damage it


class Checkpoint(NamedTuple):
    """The state of a run between two optimizer steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors: model, optimizer, ...
    values: dict[str, Any]  # everything that is not a tensor, as JSON


def save(folder: Path, checkpoint: Checkpoint, *, identity: Mapping[str, Any]) -> None:
    """Write the checkpoint as `folder/step-N/`, then remove all but the newest two.

    Raises:
        DivergedError: If a tensor holds a number that is not finite; nothing is written.
        PreflightError: If the disk is full; older checkpoints stay as they were.
    """
    _require_finite(checkpoint)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "identity": identity,
        "numerics": numerics(),
        "values": checkpoint.values,
    }
    files = {
        f"{stem}.safetensors": safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        for stem, tensors in checkpoint.tensors.items()
    }
    files["state.json"] = json.dumps(state, indent=1).encode()
    path = folder / f"step-{checkpoint.step:08d}"
    if not path.exists():  # a second Ctrl-C can ask for the same step twice
        storage.write_folder(path, files)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old)


def load(
    folder: Path, *, identity: Mapping[str, Any], warn: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is no checkpoint at all.

    A damaged one is set aside as `step-N.damaged` and said aloud; the one before it is taken.

    Raises:
        DamagedError: If there are checkpoints, and none is whole.
        IdentityError: If the checkpoint belongs to another recipe, teacher or data set.
    """
    found = _newest_first(folder)
    faults = []
    for path in found:
        try:
            files = storage.read_folder(path)
            state = json.loads(files.pop("state.json"))
            tensors = {Path(name).stem: safetensors.torch.load(b) for name, b in files.items()}
        except (DamagedError, KeyError, ValueError, safetensors.SafetensorError) as error:
            faults.append(str(error))
            warn(f"{path.name} is damaged and set aside ({error}); the one before it is taken")
            _set_aside(path)
            continue
        _compare(state, identity, path)
        if state["numerics"] != numerics():
            changed = [k for k, v in numerics().items() if state["numerics"].get(k) != v]
            warn(
                f"going on with another {', '.join(changed)}: same data and order, other last bits"
            )
        return Checkpoint(state["step"], tensors, state["values"])
    if faults or any(folder.glob("step-*.damaged")):
        raise DamagedError(
            f"{folder}: no checkpoint is whole ({'; '.join(faults) or 'all were set aside'})",
            hint="`--restart` trains from the beginning; the damaged ones are kept beside it",
        )
    return None


def numerics() -> dict[str, Any]:
    """What decides the last bits of a result besides the recipe."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _require_finite(checkpoint: Checkpoint) -> None:
    """The last step's loss may be sound, and its update ruin the weights."""
    for stem, tensors in checkpoint.tensors.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DivergedError(
                    f"{stem}: {name} is not finite after step {checkpoint.step}; checkpoints from "
                    "before it are kept",
                    hint="a lower optimizer.lr, a longer warmup_epochs, or a clip_norm",
                )


def _compare(state: dict[str, Any], identity: Mapping[str, Any], path: Path) -> None:
    if state["format"] > FORMAT:
        raise IdentityError(
            f"{path}: written by a newer version (format {state['format']}, known is {FORMAT})",
            hint="update distill, or give another --out",
        )
    require_same(
        state["identity"],
        dict(identity),
        origin=f"{path.parent.parent}: holds another run",
        hint="give another --out, or `--restart` to replace it",
    )


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.suffix != ".damaged"), reverse=True)


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)

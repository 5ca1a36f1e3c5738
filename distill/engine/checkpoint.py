"""Everything a run needs to go on as if it had never stopped, in one folder a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
from annotated_types import Ge
from pydantic import BaseModel
from torch import Tensor

from distill import console, jsonio, storage
from distill.engine.machine import PACKAGES, processor
from distill.errors import DamagedError, DivergedError, IdentityError, PreflightError
from distill.identity import differences, require_known, require_same

FORMAT = 1
KEEP = 2  # the newest, and one to fall back on should the disk damage it
FILES = 8 * (KEEP + 1) + 8  # that a run directory holds at most, folders counted too
_ROW_BYTES = 400  # of metrics.jsonl
_NAME = re.compile(r"step-[0-9]+")


class Checkpoint(NamedTuple):
    """The state of a run between two optimizer steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors: model, optimizer, ...
    values: dict[str, Any]  # everything that is not a tensor, as JSON


class _State(BaseModel):
    """What `state.json` holds."""

    step: Annotated[int, Ge(0)]
    identity: dict[str, Any]
    numerics: dict[str, Any]
    values: dict[str, Any]


def save(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    identity: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = console.warn,
) -> None:
    """Write the checkpoint as `folder/step-N/`, then remove all but the newest two.

    Nothing is removed before the new one was read back as it was written.

    Args:
        folder: Of all checkpoints of a run.
        checkpoint: What is kept.
        identity: What a run that goes on with it must have in common with this one.
        options: Of this start, that decide last bits.
        warn: Says what the user should know.

    Raises:
        DivergedError: If a tensor holds a number that is not finite; nothing is written.
        PreflightError: If the disk is full; older checkpoints stay as they were.
        DamagedError: If what is read back is not what was written; likewise.
    """
    _require_finite(checkpoint)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "identity": identity,
        "numerics": numerics(options),
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
    if not _is_whole(path, warn):
        storage.write_folder(path, files)
        try:
            storage.check_folder(path)
        except DamagedError as error:
            if not path.exists():
                raise PreflightError(f"{path}: was removed as soon as it was written") from None
            raise DamagedError(
                f"{error}, as it is read back; older checkpoints are kept",
                hint="the disk or the memory is at fault: the same command with another --out",
            ) from None
    others = [other for other in _newest_first(folder) if other != path]
    for old in others[KEEP - 1 :]:
        try:
            storage.remove_folder(old)
        except PreflightError as error:
            warn(f"{error}; the run goes on, and it stays there")


def load(
    folder: Path,
    *,
    identity: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    warn: Callable[[str], None],
) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is no checkpoint at all.

    A damaged one is set aside as `step-N.damaged`, and the one before it is taken: said aloud, with
    what is wrong in which file, and how many steps are trained again.

    Args:
        folder: Of all checkpoints of a run.
        identity: What the run must have in common with the one that wrote it.
        options: Of this start, that decide last bits. With `deterministic` a start that would give
            others is refused, without it warned of.
        warn: Says what the user should know.

    Raises:
        DamagedError: If there are checkpoints, and none is whole.
        IdentityError: If the checkpoint belongs to another recipe, teacher or data set, a newer
            version wrote it, or its last bits could not be kept and have to be.
    """
    faults = dict[Path, str]()
    for path in _newest_first(folder):
        try:
            state, tensors = _read(path)
        except DamagedError as error:
            faults[path] = str(error)
            _set_aside(path)
            continue
        step = state["step"]
        for damaged, what in faults.items():
            warn(
                f"{damaged.name} is damaged and set aside: {what}; going back to step {step}: "
                f"{_step(damaged) - step} steps are trained again"
            )
        _compare(state, identity, path)
        _compare_numerics(state["numerics"], numerics(options), path, warn)
        return Checkpoint(step, tensors, state["values"])
    if faults or any(folder.glob("step-*.damaged")):
        what = "; ".join(faults.values()) or "all were set aside"
        raise DamagedError(
            f"{folder}: no checkpoint is whole ({what})",
            hint="`--restart` trains from the beginning; the damaged ones are kept beside it",
        )
    return None


def room(folder: Path, model: int, rows: int) -> int:
    """Bytes that a run will still need: for checkpoints, one in work, its metrics and its student.

    Args:
        folder: Of its checkpoints, those that are there already.
        model: Bytes of the weights that are trained.
        rows: Of its metrics, which every checkpoint holds too.
    """
    there = min(KEEP, len(_newest_first(folder)))
    kept = 4 * model + _ROW_BYTES * rows  # weights, their average and two moments
    return (KEEP + 1 - there) * kept + model + _ROW_BYTES * rows


def numerics(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides the last bits of a result besides the recipe.

    Args:
        options: Of a start that do so too.
    """
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        **{name: _version(name) for name in (*PACKAGES, "pillow") if name != "torch"},
        "deterministic": False,
        **(options or {}),
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return None


def _compare_numerics(
    before: Mapping[str, Any], now: Mapping[str, Any], path: Path, warn: Callable[[str], None]
) -> None:
    # What an older version did not write is not known.
    then = {key: value for key, value in now.items() if key != "deterministic"}
    then |= {"deterministic": False, **before}
    changed = differences(then, now)
    if not changed:
        return
    if now["deterministic"]:
        raise IdentityError(
            f"{path}: train.deterministic: true, and this start would give other last bits than "
            f"the one that wrote it: {'; '.join(changed)}",
            hint="start it as it was (OMP_NUM_THREADS sets the threads), go on all the same with "
            "--set train.deterministic=false, or --restart",
        )
    lost = "other last bits"
    if any(then[key] != now[key] for key in ("processes", "device_batch_size") if key in now):
        lost += ", other masks of dropout, and BatchNorm sees other groups of images"
    warn(f"going on with another {'; '.join(changed)}: same data and order, {lost}")


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
    require_same(
        state["identity"],
        dict(identity),
        origin=f"{path.parent.parent}: holds another run",
        hint="give another --out, or `--restart` to replace it",
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """State and tensors of a checkpoint.

    Raises:
        DamagedError: If it is not what was written.
        IdentityError: If a newer version wrote it.
    """
    files = storage.read_folder(path)
    try:
        state = jsonio.mapping(files.pop("state.json"))
        require_known(state["format"], FORMAT, str(path))
        state = jsonio.checked(_State, state).model_dump()
        tensors = {Path(name).stem: safetensors.torch.load(b) for name, b in files.items()}
    except IdentityError:
        raise
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path}: holds no checkpoint: {error}") from None
    return state, tensors


def _is_whole(path: Path, warn: Callable[[str], None]) -> bool:
    """Whether a step is there already: a second Ctrl-C can ask for it twice."""
    if not path.exists():
        return False
    try:
        storage.check_folder(path)
    except DamagedError as error:
        warn(f"{path.name} is damaged, set aside and written again: {error}")
        _set_aside(path)
        return False
    return True


def _newest_first(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    with suppress(OSError):  # another process of the run was first; or it stays, and is not read
        try:
            storage.move(path, target)
        except OSError:
            if path.exists():  # an earlier one has that name
                storage.remove_folder(target)
                storage.move(path, target)

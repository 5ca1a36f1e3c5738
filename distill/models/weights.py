"""Files of weights: safetensors with a description of the network they belong to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill import component, console, jsonio
from distill.errors import (
    DamagedError,
    IdentityError,
    IncompatibleError,
    PreflightError,
    RecipeError,
)
from distill.identity import require_known
from distill.models import backbones, timm_models
from distill.models.bounds import Bounded
from distill.models.network import Description, Network

FORMAT = 1  # of the description in the file's metadata
_KEY = "distill"  # under which it stands there
_FILE = "student.safetensors"  # in a run directory
# A checksum of the file in which it counts as so many zeros: first in what the description says.
_UNSEALED = "0" * 64
_SEAL = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\",\\"format\\":')
_AGAIN = "copy it again from where it came, or train again"
_CHUNK = 2**20  # bytes read at once
_MOST_HEADER = 10**8  # bytes; the format allows no more
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")


def to_bytes(network: Network) -> bytes:
    """A safetensors file of the backbone's weights, complete with what rebuilds the network.

    The names are the backbone's own, without a prefix; projectors and the order in which a teacher
    gives its logits are no part of it. A checksum covers every byte of it, beginning and metadata
    too, for the format has none.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.backbone.state_dict().items()
    }
    # All under one key: several would come in any order.
    words = f'{{"sha256":"{_UNSEALED}",' + network.description.model_dump_json()[1:]
    data = safetensors.torch.save(tensors, {_KEY: words})
    return data.replace(_UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def load(
    path: str | Path, *, expected: Description | None = None, vouched: Collection[str] = ()
) -> Network:
    """The network that a file or a run directory holds, as it was saved.

    A `module:function` model is imported if `expected` or `vouched` names it: a file or a folder
    may come from anywhere, and its own word is not enough to run code.

    Args:
        path: A `.safetensors` file or a run directory.
        expected: What the caller knows of it. The model must be the file's; a file of bare tensors
            takes it whole, except that it has as many classes as the tensors say, without names.
        vouched: Code outside of distill that the user named as a model.

    Raises:
        PreflightError: If there is no such file.
        RecipeError: If it is a pickle, or does not say which network it holds.
        DamagedError: If it is not safetensors, or not whole.
        IncompatibleError: If the weights belong to another network.
        IdentityError: If a newer version wrote them.
    """
    path = Path(path).expanduser()
    state, description = _read(path)
    if description is None and expected is None:
        raise RecipeError(
            f"{path}: holds weights, but not the name of their network",
            hint="name it in a recipe: model: NAME beside weights: FILE",
        )
    if description is None:
        assert expected is not None
        description = _bare(state, expected, path)
    elif expected is not None and not _same_model(expected.model, description.model):
        raise IncompatibleError(
            f"{path}: holds {description.model}, the recipe says {expected.model}",
            hint=f"set model: {description.model}",
        )
    elif expected is None:
        component.require_vouched(description.model, path, vouched)
    with Bounded(str(path), list(state.values())):
        backbone = backbones.build(
            description.model,
            description.arguments,
            num_classes=description.num_classes,
            image_size=description.image_size,
        )
    fill(backbone, state, origin=str(path))
    return Network(backbone, description)


def fill(
    backbone: nn.Module, state: Mapping[str, Tensor], *, origin: str, but: Collection[str] = ()
) -> None:
    """Load `state` into `backbone`, every tensor of it except the names `but`.

    Raises:
        IncompatibleError: If names or shapes differ, with the first five of each kind.
    """
    own = {name: tensor for name, tensor in backbone.state_dict().items() if name not in but}
    given = {name: tensor for name, tensor in state.items() if name not in but}
    shapes = [
        f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    faults = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": shapes,
    }
    found = [f"{kind}: {listed(names)}" for kind, names in faults.items() if names]
    if found:
        raise IncompatibleError(
            f"{origin}: the weights belong to another network; {'; '.join(found)}",
            hint="check model and its arguments, data.image_size, and the number of classes",
        )
    backbone.load_state_dict(given, strict=False)


def fingerprint(network: Network) -> str:
    """SHA-256 of all that decides the network's outputs, as 64 hex digits.

    Covers the description, the order of classes, and name, type, shape and bytes of every tensor
    of the backbone, sorted by name.
    """
    digest = hashlib.sha256()
    selection = None if network.selection is None else network.selection.tolist()
    digest.update(network.description.model_dump_json().encode())
    digest.update(json.dumps(selection).encode())
    _add_tensors(digest, network.backbone)
    return digest.hexdigest()


def identity(network: Network) -> dict[str, Any]:
    """What `fingerprint` covers, part by part, so that a difference can be named."""
    digest = hashlib.sha256()
    _add_tensors(digest, network.backbone)
    description = network.description.model_dump(mode="json", exclude={"format", "classes"})
    selection = None if network.selection is None else network.selection.tolist()
    return {
        **description,
        "classes": names_fingerprint(network.classes),
        "selection": selection and names_fingerprint(map(str, selection)),
        "weights": digest.hexdigest(),
    }


def names_fingerprint(names: Iterable[str] | None) -> str | None:
    """SHA-256 of names in their order; None where there are none."""
    if names is None:
        return None
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def listed(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _add_tensors(digest: hashlib._Hash, backbone: nn.Module) -> None:
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy())


def _read(path: Path) -> tuple[dict[str, Tensor], Description | None]:
    """The tensors of a safetensors file or run directory, and their description if it has one."""
    file = _resolve(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        sealed = _is_sealed(file)
    except SafetensorError as error:
        raise DamagedError(f"{file}: not a whole safetensors file: {error}", hint=_AGAIN) from error
    except OSError as error:
        raise PreflightError(f"{file}: {error.strerror or error}") from error
    recorded = metadata.get(_KEY)
    return state, None if recorded is None else _describe(recorded, file, sealed=sealed)


def _is_sealed(file: Path) -> bool:
    """Whether a file has a checksum: those of others and of earlier versions have none.

    Raises:
        DamagedError: If a byte changed since it was made.
    """
    with file.open("rb") as opened:
        start = opened.read(8)
        start += opened.read(min(int.from_bytes(start, "little"), _MOST_HEADER))
        found = _SEAL.search(start)
        if found is None:
            return False
        digest = hashlib.sha256(start[: found.start(1)] + _UNSEALED.encode())
        digest.update(start[found.end(1) :])
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest().encode() != found[1]:
        raise DamagedError(f"{file}: its content changed after it was written", hint=_AGAIN)
    return True


def _same_model(one: str, other: str) -> bool:
    if one.startswith("timm/"):
        return timm_models.without_tag(one) == timm_models.without_tag(other)
    return one == other


def _bare(state: Mapping[str, Tensor], expected: Description, origin: Path) -> Description:
    """`expected`, with the number of classes that the classifier's shape tells.

    Published weights want images as they were trained on, whatever the data's are.
    """
    axes = backbones.head(expected.model, expected.arguments, image_size=expected.image_size)
    counts = [
        state[name].shape[axis]
        for name, axis in axes.items()
        if name in state and state[name].ndim > axis
    ]
    count = counts[0] if counts else expected.num_classes
    update: dict[str, Any] = {"num_classes": count, "classes": None}
    library, _, name = expected.model.partition("/")
    own = timm_models.normalisation(name, count) if library == "timm" else None
    if own and own != (expected.mean, expected.std):
        console.warn(
            f"{origin}: does not say how its images are normalised: by mean {own[0]} and deviation "
            f"{own[1]}, as those of timm's weights for {expected.model}"
        )
        update |= {"mean": own[0], "std": own[1]}
    return expected.model_copy(update=update)


def _resolve(path: Path) -> Path:
    """The file that a recipe's `weights` means."""
    if path.suffix in _PICKLES:
        raise RecipeError(
            f"{path}: a pickle can run code when it is read, so only .safetensors files are",
            hint='convert it once: python -c "import sys, torch, safetensors.torch as s; '
            's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            f"{console.typed(path)} {console.typed(path.with_suffix('.safetensors'))}",
        )
    if path.is_dir():
        path = path / _FILE
        if not path.exists():
            raise PreflightError(
                f"{path.parent}: has no {_FILE}",
                hint="a run directory has one when its training is done; run it to the end first",
            )
    if not path.exists():
        raise PreflightError(
            f"{path}: no such file or run directory",
            hint="weights is a run directory, a .safetensors file, pretrained or hf-hub:OWNER/NAME",
        )
    return path


def _describe(recorded: str, file: Path, *, sealed: bool) -> Description:
    try:
        words = jsonio.mapping(recorded)
        require_known(words.get("format"), FORMAT, str(file))
        if sealed:
            words.pop("sha256", None)
        return Description.model_validate_json(json.dumps(words))
    except IdentityError:
        raise
    except ValueError as error:  # pydantic's errors are too
        raise DamagedError(
            f"{file}: its description of the network is damaged: {error}", hint=_AGAIN
        ) from error

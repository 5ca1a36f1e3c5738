"""An export folder as a repository of the Hugging Face hub: what would be sent, and sending it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from distill.definitions import Number, shown
from distill.errors import DistillError, IdentityError, PreflightError, RecipeError

_CHUNK = 2**20  # bytes that are read at once
_LONGEST = 4096  # bytes of a secret
# Tokens as the hub issues them.
_TOKEN = re.compile(
    rb"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9._-]{30,})"
)
# Variables of the environment whose values are nobody's business; short ones are no secrets.
_SECRET = re.compile(r"(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
_SHORTEST = 12
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class File(NamedTuple):
    """A file that is sent."""

    name: str  # in the folder and in the repository, with / between its parts
    size: int  # bytes
    sha256: str


class Plan(NamedTuple):
    """A push before it is done."""

    folder: Path
    repository: str  # OWNER/NAME
    files: tuple[File, ...]
    private: bool  # whether the repository is, if it is made now; one that is there stays as it is


def plan(folder: Path, repository: str, files: Sequence[str], *, private: bool = True) -> Plan:
    """What `push` would send; the network is not touched.

    Args:
        folder: Where the files are.
        repository: OWNER/NAME.
        files: Their names in it; a folder stands for all files below it.
        private: Whether a repository that is made for them is.

    Raises:
        RecipeError: If that is no name of a repository, or a file is one that is never sent:
            hidden, a link, a lock or a checkpoint.
        PreflightError: If a file is not there, or holds what looks like a secret.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(f"{repository}: {error}", hint="name it OWNER/NAME") from None
    if "/" not in repository:
        raise RecipeError(f"{repository}: whose is it?", hint=f"name it OWNER/{repository}")
    names = dict.fromkeys(name for given in files for name in _below(folder, given))
    return Plan(folder, repository, tuple(_looked_at(folder, name) for name in names), private)


def lines(plan: Plan) -> list[str]:
    """The plan for a terminal, a line a file."""
    kind = "private" if plan.private else "public"
    sizes = [shown("file_bytes", Number(file.size)) for file in plan.files]
    width = max((len(file.name) for file in plan.files), default=0)
    total = shown("file_bytes", Number(sum(file.size for file in plan.files)))
    return [
        f"{plan.repository} on the Hugging Face hub ({kind}, if it is new):",
        *(
            f"  {file.name:{width}}  {size:>9}  sha256 {file.sha256[:16]}"
            for file, size in zip(plan.files, sizes, strict=True)
        ),
        f"{len(plan.files)} files, {total}",
    ]


def push(planned: Plan) -> str:
    """Make the repository if there is none, and send the files in one commit; returns its address.

    Files of the repository that are not sent stay as they are.

    Raises:
        IdentityError: If a file is not what it was when it was planned.
        PreflightError: If nobody is logged in or may write there, or the hub cannot be reached.
        RecipeError: If there is no such owner.
        DistillError: If the hub refuses for another reason.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    folder, repository, files, private = planned
    if plan(folder, repository, [file.name for file in files], private=private) != planned:
        raise IdentityError(f"{folder}: its files changed since they were looked at")
    with _talking(repository):
        token = get_token()
        if token is None:
            raise PreflightError(f"{repository}: nobody is logged in to the hub", hint=_LOGIN)
        hub = HfApi(token=token, library_name="distill-kd")
        address = hub.create_repo(repository, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=folder / file.name)
            for file in files
        ]
        hub.create_commit(repository, operations, commit_message="Export by distill")
    return str(address)


def _below(folder: Path, given: str) -> Iterator[str]:
    """The names of the file, or of all files in a folder."""
    path = folder / given
    if not path.is_dir() or path.is_symlink():
        yield given
        return
    for below in sorted(path.rglob("*")):
        if not below.is_dir():
            yield below.relative_to(folder).as_posix()


def _looked_at(folder: Path, name: str) -> File:
    """Size and digest of a file that may be sent."""
    path, parts = folder / name, PurePosixPath(name).parts
    if (
        any(part.startswith(".") for part in parts)
        or Path(name).is_absolute()
        or path.resolve() != folder.resolve() / name
        or "checkpoint" in parts
        or path.suffix in (".lock", ".ckpt")
        or path.name == "token"
    ):
        raise RecipeError(
            f"{name}: is never sent",
            hint="hidden files, links, locks, checkpoints and what lies elsewhere stay here",
        )
    try:
        return _read(path, name)
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        raise PreflightError(f"{path}: {error.strerror}") from None


def _read(path: Path, name: str) -> File:
    """Read a file once, for its digest and for secrets in it."""
    digest, size, tail = hashlib.sha256(), 0, b""
    secrets = _secrets()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            seen = tail + chunk
            held = [kind for kind, secret in secrets.items() if secret in seen]
            if _TOKEN.search(seen):
                held.append("what looks like a token of the hub")
            if held:
                raise PreflightError(
                    f"{name}: holds {held[0]}; nothing was sent",
                    hint="remove it there; what was ever published has to be revoked as well",
                )
            tail = seen[-_LONGEST:]
    return File(name, size, digest.hexdigest())


def _secrets() -> dict[str, bytes]:
    """What must not be published, by what it is."""
    return {
        f"the value of ${key}": os.fsencode(value.strip())
        for key, value in os.environ.items()
        if _SECRET.search(key) and _SHORTEST <= len(value.strip()) <= _LONGEST
    }


@contextmanager
def _talking(repository: str) -> Iterator[None]:
    """Give every failure of the hub's client one sentence, in which there is no token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Those of the HTTP library that the client was built on, whichever it is.
    network: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        yield
    except DistillError:
        raise
    except OfflineModeIsEnabled:
        raise PreflightError(
            f"{repository}: the hub is switched off by HF_HUB_OFFLINE", hint="unset it"
        ) from None
    except HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except (RuntimeError, ValueError, KeyError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # of one file's upload
        if isinstance(cause, HfHubHTTPError):
            raise _refused(repository, cause) from None
        raise DistillError(f"{repository}: the push failed: {_said(cause or error)}") from None
    except network as error:
        raise PreflightError(
            f"{repository}: the hub cannot be reached: {_said(error)}",
            hint="check the network and HF_ENDPOINT; the same command begins anew",
        ) from None


def _refused(repository: str, error: Any) -> DistillError:
    """The hub's answer as an error of ours."""
    owner, status = repository.partition("/")[0], error.response.status_code
    said = _said(error.server_message or error)
    match status:
        case 401:
            return PreflightError(
                f"{repository}: the hub does not know the token: {said}", hint=_LOGIN
            )
        case 403:
            return PreflightError(
                f"{repository}: this token may not write there: {said}",
                hint=f"check that {owner} is you or an organisation of yours, and that the token "
                "may write to it",
            )
        case 404:
            return RecipeError(
                f"{repository}: the hub has no such place: {said}", hint=f"check the name {owner}"
            )
        case 409 | 412:
            return PreflightError(
                f"{repository}: another commit came in between: {said}",
                hint="run the same command again",
            )
        case 429:
            return PreflightError(
                f"{repository}: the hub wants fewer requests: {said}", hint="try again later"
            )
        case _ if status >= 500:
            return PreflightError(
                f"{repository}: the hub failed ({status}): {said}",
                hint="no commit was made; run the same command again later",
            )
        case _:
            return DistillError(f"{repository}: the hub refused ({status}): {said}")


def _said(told: object) -> str:
    """What was said, in one line and without a token, whoever repeats it."""
    text = (" ".join(str(told).split()) or type(told).__name__).encode(errors="replace")
    for secret in _secrets().values():
        text = text.replace(secret, b"***")
    return f"{_TOKEN.sub(b'***', text).decode(errors='replace'):.300}"

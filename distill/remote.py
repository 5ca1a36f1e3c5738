"""Object stores that fsspec reaches, such as s3://bucket/folder, with errors a user can act on."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from distill.errors import PreflightError, RecipeError

KNOWN = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https", "memory")


def is_remote(place: str) -> bool:
    """Whether a place is an address and no path on this machine."""
    return "://" in place and not place.startswith("file://")


def tells_a_secret(place: str) -> bool:
    """Whether an address has credentials in it: `user:password@`, or a signature after a `?`."""
    return bool(re.search(r"://(?:[^/?#]*@|[^#]*\?)", place))


def open_files(url: str, **options: Any) -> tuple[Any, str]:
    """The file system of an address, and the path there.

    Args:
        url: The address.
        options: Passed on to fsspec.

    Raises:
        PreflightError: If a package for it is not installed.
        RecipeError: If there is no such kind of address.
    """
    import fsspec

    protocol = url.partition("://")[0]
    # The others of fsspec open archives, run commands on other machines or read templates.
    if protocol not in KNOWN or "::" in url:
        raise RecipeError(
            f"{url}: Protocol not known: {protocol}", hint=f"known are {', '.join(KNOWN)}"
        )
    if tells_a_secret(url):
        raise RecipeError(
            f"{url}: an address with a password or a signature in it",
            hint="give credentials in the environment, in ~/.netrc or in the store's own settings",
        )
    try:
        # Others are at work: what was listed a moment ago says nothing.
        files, root = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False, **options)
    except ImportError:
        extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(protocol)
        package = f'".[{extra}]"' if extra else f"the fsspec implementation of {protocol}"
        raise PreflightError(
            f"{url}: needs a package that is not installed", hint=f"pip install {package}"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{url}: {error}") from None
    return files, str(root)


@contextmanager
def refusals(origin: str, name: str = "") -> Generator[None]:
    """Turn what the client of a store raises into an error that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        place = f"{origin}/{name}".rstrip("/")
        raise PreflightError(f"{place}: not there: {error}") from None
    # Each object store's client has exceptions of its own, without a common parent.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise PreflightError(
            f"{origin}/{name}: {text:.300}",
            hint="mind the address, the credentials and the network, and run again",
        ) from None

"""Image sets of the Hugging Face hub, or in its formats, through its own library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from distill.data.encoded import Ids, Split, Stored
from distill.errors import PreflightError

TRAIN, TESTS = "train", ("test", "validation", "val")

_BATCH = 1000  # rows that are looked at at once


class Rows:
    """The images of a split: an `Encoded` whose rows lie in memory-mapped files.

    Attributes:
        origin: The name of the set, or its folder.
        checked: False.

    Args:
        origin: The same.
        split: The split's name.
        rows: A `datasets.Dataset` that does not decode.
        column: The one that holds the images.
    """

    checked = False

    def __init__(self, origin: str, split: str, rows: Any, column: str) -> None:
        self.origin, self._split, self._rows, self._column = origin, split, rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, number: int) -> str:
        """Split and row of an image."""
        return f"{self._split}/{number}"

    def read(self, number: int) -> Path | bytes:
        """The image, or the file that the row names."""
        try:
            stored = self._rows[int(number)][self._column] or {}
        except Exception as error:  # pyarrow's, and those of the file system
            raise PreflightError(f"{self.origin}/{self.name(number)}: {error}") from None
        data: bytes | None = stored.get("bytes")
        return Path(stored["path"]) if data is None and stored.get("path") else data or b""

    def ahead(self, batches: Iterable[Ids]) -> Iterable[Ids]:
        """The batches as they are: rows are read where they lie."""
        return batches

    def suspects(self, max_pixels: int) -> Sequence[int]:
        """All: nothing is known of an image before it is opened."""
        return range(len(self))

    def sizes(self) -> Int64[ndarray, " N"]:
        """Bytes of every image; −1 where the row names a file."""
        import pyarrow.compute as pc

        found = [np.empty(0, np.int64)]
        for batch in self._rows.with_format("arrow").iter(_BATCH):
            data = pc.struct_field(batch[self._column], "bytes")
            found.append(np.asarray(pc.fill_null(pc.binary_length(data), -1)).astype(np.int64))
        return np.concatenate(found)


def load(name: str, root: str | None, *, download: bool, labelled: bool = True) -> Stored:
    """The images of a set of the hub, or of a folder.

    Splits are `train` and `test`, or `validation` where there is no test or its classes are not
    told. Of several columns of classes the one with the most counts.

    Args:
        name: `hf/OWNER/NAME`, or `hf/OWNER/NAME/CONFIG`, or `hf` for the folder `root`.
        root: A folder that `save_to_disk` or parquet files made; or where the hub's are kept.
        download: Whether the set may be fetched.
        labelled: Whether a training split is looked for.

    Raises:
        PreflightError: If the library or the set is not there, or has no images with classes.
    """
    origin = root if name == "hf" else name
    found = _opened(name, root, download=download)
    if labelled and TRAIN not in found:
        raise PreflightError(f"{origin}: no train split, it has {', '.join(found) or 'none'}")
    splits = {TRAIN: found[TRAIN]} if labelled else {}
    tests = {split: found[split] for split in TESTS if split in found}
    for split in tests:
        rows, classes = _split(str(origin), split, tests[split])
        if (rows.labels >= 0).all():
            break
    else:
        raise PreflightError(
            f"{origin}: no test or validation split whose classes are told, it has "
            f"{', '.join(found) or 'none'}"
        )
    if not labelled:
        nothing = Split(rows.files, rows.labels[:0], ())
        return Stored(str(origin), classes, nothing, rows)
    train, own = _split(str(origin), TRAIN, splits[TRAIN])
    if (train.labels < 0).any():
        raise PreflightError(f"{origin}: training images whose class is not told")
    if not set(classes) <= set(own):
        raise PreflightError(f"{origin}: classes of the {split} split that train lacks")
    return Stored(str(origin), own, train, rows)


def _opened(name: str, root: str | None, *, download: bool) -> Mapping[str, Any]:
    """The splits of the set by name."""
    try:
        import datasets
    except ImportError:
        raise PreflightError(
            f"data.name: {name}: needs a package that is not installed",
            hint='pip install ".[hf]"',
        ) from None
    owner, _, config = name.removeprefix("hf/").partition("/")
    title, _, config = config.partition("/")
    try:
        if name != "hf":
            found = datasets.load_dataset(
                f"{owner}/{title}" if title else owner,
                config or None,
                cache_dir=root,
                download_config=datasets.DownloadConfig(local_files_only=not download),
            )
        elif (Path(str(root)) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(root))
        elif Path(str(root)).is_dir():
            found = datasets.load_dataset(str(root))
        else:
            raise PreflightError(f"{root}: no such folder", hint="see data.root in the recipe")
    except PreflightError:
        raise
    except Exception as error:  # of the hub, the network, the file system and pyarrow
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if download or name == "hf" else "`data.download: true` fetches it"
        raise PreflightError(f"{root if name == 'hf' else name}: {text:.300}", hint=hint) from None
    return dict(found)


def _split(origin: str, split: str, rows: Any) -> tuple[Split, tuple[str, ...]]:
    """A split, and the names of its classes."""
    import datasets

    features = rows.features
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = next((name for name in ("image", "img") if name in pictures), "".join(pictures[:1]))
    if not pictures or (len(pictures) > 1 and image not in ("image", "img")):
        raise PreflightError(f"{origin}: {len(pictures)} columns of images in the {split} split")
    kinds = {n: kind for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    label = max(kinds, key=lambda name: len(kinds[name].names), default=None)
    if label is None and "label" not in features:
        columns = ", ".join(features)
        raise PreflightError(f"{origin}: no column of classes in the {split} split: {columns}")
    values = rows.select_columns([label or "label"]).with_format("numpy")[:][label or "label"]
    try:
        labels: Int64[ndarray, " N"] = np.asarray(values).astype(np.int64, casting="same_kind")
    except (TypeError, ValueError):
        raise PreflightError(f"{origin}: the column label of {split} holds no numbers") from None
    classes = kinds[label].names if label else map(str, range(int(labels.max(initial=-1)) + 1))
    files = Rows(origin, split, rows.cast_column(image, datasets.Image(decode=False)), image)
    sizes = hashlib.sha256(files.sizes().astype("<i8").tobytes()).hexdigest()
    return Split(files, labels, [sizes]), tuple(classes)

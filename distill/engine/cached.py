"""The caches of a recipe: where they lie, what they are made from, and what training reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from numpy import ndarray
from safetensors.numpy import save as save_tensors

from distill import component, console
from distill.cache import layout, read, write
from distill.cache.layout import Column, Manifest
from distill.cache.read import Reader
from distill.cache.store import Store, places
from distill.data import images, views
from distill.data.datasets import Dataset
from distill.engine.canaries import canaries_file, check_canaries, precision, require_exact
from distill.errors import IdentityError, IncompatibleError, IncompleteError
from distill.models import cost, weights
from distill.models.network import Network, on_meta
from distill.objectives import Objective, taps
from distill.recipe import Recipe
from distill.teacher import FEATURE, Cached, Live, Teacher
from distill.types import Anatomy, Site

FEATURE_BYTES = 16_384  # a row, up to which features are kept for any number of images
FEATURES_BYTES = 20_000_000_000  # in all, up to which larger ones are


def identity(recipe: Recipe, dataset: Dataset, network: Network | None) -> dict[str, Any]:
    """All that decides a teacher's answers, as plain data; without what is not known of it."""
    data = recipe.data
    mixes = data.mixup > 0 or data.cutmix > 0
    shared = [
        spec.model_dump()
        for spec in data.augment
        if not getattr(component.load("data.augment", spec.name), "student_only", False)
    ]
    found: dict[str, Any] = {
        "data": {
            "images": dataset.content,
            "classes": weights.names_fingerprint(dataset.classes),
            # Who is mixed with whom follows from who takes part.
            "mixed": _samples_fingerprint(dataset) if mixes else None,
        },
        "pixels": {
            "version": images.VERSION,
            "image_size": dataset.image_size,
            "eval_crop": data.eval_crop,
            **({} if data.decoder == "exact" else {"decoder": data.decoder}),
        },
        "views": {
            "version": views.VERSION,
            "seed": data.seed,
            "augment": shared,
            "mixup": data.mixup,
            "cutmix": data.cutmix,
        },
    }
    if network is not None:
        found["teacher"] = weights.identity(network)
        found["precision"] = precision(recipe)
    return found


def manifest(
    recipe: Recipe, dataset: Dataset, network: Network, *, num_views: int, unit_rows: int | None
) -> Manifest:
    """What a cache of this teacher would be.

    Raises:
        IncompatibleError: If a feature is too large to be kept for so many images.
    """
    assert recipe.cache is not None
    num_classes = len(dataset.classes)
    codec = layout.resolve(recipe.cache.codec, num_classes)
    network.tap(recipe.cache.features)
    features = _features(network, dataset, num_views)
    columns = sorted(
        (*layout.columns(codec, num_classes), *features),
        key=lambda column: column.width,
        reverse=True,
    )
    kept = {column.name.removeprefix(FEATURE): list(column.shape) for column in features}
    row_bytes = sum(column.row_bytes for column in columns)
    flops = cost.flops(network, dataset.image_size)
    eval_columns = (Column("logits", "F32", (num_classes,)),)
    return Manifest(
        identity={
            **identity(recipe, dataset, network),
            "codec": codec,
            "features": kept,
        },
        about={
            "model": network.model,
            "parameters": cost.parameters(network),
            "flops": flops,
        },
        num_classes=num_classes,
        views=num_views,
        samples=len(dataset.train_ids),
        samples_sha256=_samples_fingerprint(dataset),
        test=len(dataset.test),
        val=len(dataset.val_ids),
        unit_rows=unit_rows or layout.rows_for(row_bytes, most=_rows_a_minute(flops)),
        columns=tuple(columns),
        eval_rows=unit_rows or layout.rows_for(eval_columns[0].row_bytes),
        eval_columns=eval_columns,
    )


def start(
    recipe: Recipe,
    dataset: Dataset,
    network: Network,
    store: Store,
    *,
    num_views: int,
    device: torch.device,
    unit_rows: int | None = None,
) -> tuple[Manifest, list[str]]:
    """Begin a teacher's cache, or find that it was begun from the same things.

    Returns:
        Its manifest, and what should be known of it.

    Raises:
        IdentityError: If it was begun from something else; nothing is written.
        IncompatibleError: If a feature is too large to be kept for so many images.
        DamagedError: If its manifest was altered.
    """
    wanted = manifest(recipe, dataset, network, num_views=num_views, unit_rows=unit_rows)
    canaries = store.read(layout.CANARIES)
    made = write.read_manifest(store) is None or canaries is None
    if made or canaries is None:
        canaries = canaries_file(recipe, dataset, network, num_views=num_views, device=device)
        require_exact(wanted.codec, canaries, store.origin)
    found = write.begin(store, wanted, samples=samples_file(dataset), canaries=canaries)
    if unit_rows and found.unit_rows != unit_rows:
        raise IdentityError(
            f"{store.origin}: has units of {found.unit_rows:,} rows, not {unit_rows:,}",
            hint="leave --unit-rows out, or give another --out",
        )
    if made and store.read(layout.CANARIES) == canaries:  # none of another writer's
        return found, []
    return found, check_canaries(store, found, recipe, dataset, network, device)


def samples_file(dataset: Dataset) -> bytes:
    """Which sample each row is."""
    train, val = dataset.train_ids.astype("<i8"), dataset.val_ids.astype("<i8")
    return save_tensors({"train": train, "val": val})


class Caches:
    """The rows of several caches as one, with the names of each after its own prefix."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = list({prefix(reader.manifest): reader for reader in readers}.values())
        self.row_bytes = sum(reader.row_bytes for reader in self.readers)

    def rows(self, ids: Int[ndarray, " n"], view: int) -> dict[str, ndarray]:
        """The columns of these samples in a view."""
        return {
            f"{prefix(reader.manifest)}{name}": column
            for reader in self.readers
            for name, column in reader.rows(ids, view).items()
        }

    def close(self) -> None:
        """Let go of files and threads."""
        for reader in self.readers:
            reader.close()


def prefix(manifest: Manifest) -> str:
    """Begins the names of a cache's columns in a batch."""
    return f"{manifest.id}/"


class Tutor(NamedTuple):
    """A teacher of a run, as it is reported."""

    model: str
    parameters: int
    flops: int
    network: Network | None  # None: a cache stands for it
    scores: dict[str, dict[str, float]]  # by split, where a cache has them


class Opened(NamedTuple):
    """The caches of a run, ready to be read."""

    caches: Caches
    members: list[Teacher]  # one a cache
    tutors: list[Tutor]
    ids: list[str]  # of the caches
    warnings: list[str]


def open_caches(
    recipe: Recipe,
    dataset: Dataset,
    networks: Sequence[Network],
    heard: Sequence[Objective],
    device: torch.device,
) -> Opened:
    """The recipe's caches, every one compared with what the recipe would make today.

    Args:
        recipe: Has a `cache.path`.
        dataset: What is trained on.
        networks: The teachers; none where the cache stands for them.
        heard: The objectives that read the answers.
        device: Where the canaries are made again.

    Raises:
        IdentityError: If a cache was made from something else.
        IncompleteError: If it is not there, or lacks views that the recipe reads.
        IncompatibleError: If a term cannot use what it holds.
        DamagedError: If a file is not what was written.
    """
    assert recipe.cache is not None
    assert recipe.cache.path is not None
    num_views = recipe.num_views
    assert num_views is not None
    found = Opened(Caches([]), [], [], [], [])
    readers: list[Reader] = []
    for i, (_, store) in enumerate(places(recipe.teachers, recipe.cache.path)):
        network = networks[i] if networks else None
        there = write.read_manifest(store)
        if there is None:
            raise IncompleteError(
                f"{store.origin}: there is no cache",
                hint="`distill teacher-cache RECIPE` writes it; `--set cache.fill=true` while "
                "training",
            )
        require_identity(recipe, dataset, network, there, store)
        read.require_complete(store, there, num_views)
        for objective in heard:
            require_usable(there, objective)
        reader = Reader(store, there, num_views=num_views)
        mixes = there.identity["data"]["mixed"] is not None
        reader.require(dataset.train_ids, exact=mixes)
        said = check_canaries(store, there, recipe, dataset, network, device)
        found.warnings.extend(said)
        index = write.read_index(store, there)
        live = _live(taps(heard, i), there, network, device)
        if network is not None and live is None:
            network.to("meta")  # it has said all that it is asked: its memory is the student's
        member = Cached(there.codec, there.num_classes, prefix=prefix(there), live=live)
        readers.append(reader)
        found.members.append(member)
        scores = index.scores if index else {}
        found.tutors.append(Tutor(**there.about, network=network if live else None, scores=scores))
        found.ids.append(there.id)
    return found._replace(caches=Caches(readers))


def anatomies(recipe: Recipe, networks: Sequence[Network]) -> list[Anatomy]:
    """What there is to read inside of the recipe's teachers; or inside of its caches.

    A cache that stands for its teacher knows the shapes of the features that it keeps; finer grids
    are taken to come before coarser ones.
    """
    if networks or recipe.cache is None or recipe.cache.path is None:
        return [network.anatomy() for network in networks]
    found = []
    for _, store in places(recipe.teachers, recipe.cache.path):
        manifest = write.read_manifest(store)
        kept = {} if manifest is None else manifest.identity["features"]
        width = kept.get("pooled", [0])[0]
        size = 0 if manifest is None else manifest.identity["pixels"]["image_size"]
        grids = {name: shape for name, shape in kept.items() if len(shape) == 3 and "@" not in name}
        ordered = sorted(grids, key=lambda name: -grids[name][1])
        sites = {
            name: Site(
                name,
                channels=grids[name][0],
                grid=(grids[name][1], grids[name][2]),
                stride=size / grids[name][1],
                depth=(i + 1) / len(ordered),
                prefix=0,
            )
            for i, name in enumerate(ordered)
        }
        model = store.origin if manifest is None else str(manifest.about["model"])
        found.append(Anatomy(model, width, False, sites, tuple(sites.values()), (), ()))
    return found


def require_identity(
    recipe: Recipe, dataset: Dataset, network: Network | None, found: Manifest, store: Store
) -> None:
    """Refuse a cache that was made from something else than the recipe says today.

    Raises:
        IdentityError: With every field that differs.
    """
    assert recipe.cache is not None
    wanted = identity(recipe, dataset, network)
    unasked = {"codec", "features"} | ({"teacher", "precision"} if network is None else set())
    # What the recipe leaves open is as the cache has it.
    wanted |= {key: found.identity.get(key) for key in unasked}
    if recipe.cache.codec != "auto":
        wanted["codec"] = recipe.cache.codec
    write.require_identity(found, wanted, store.origin)


def require_usable(found: Manifest, objective: Objective) -> None:
    """Refuse a codec that a term of the objective cannot use.

    Raises:
        IncompatibleError: With the reason.
    """
    cut = found.codec.startswith("topk:") and layout.num_kept(found.codec) < found.num_classes
    for name, term in objective.taught():
        if cut and term.needs_tail:
            raise IncompatibleError(
                f"objective: {name} reads what the teacher says of all {found.num_classes:,} "
                f"classes, and cache.codec {found.codec} keeps {layout.num_kept(found.codec)} of "
                "them: above temperature 1 the others are most of the signal",
                hint="--set cache.codec=int8, or temperature 1",
            )


def _live(
    needed: Sequence[str], found: Manifest, network: Network | None, device: torch.device
) -> Teacher | None:
    """The network itself, where a term reads features that the cache does not hold."""
    kept = found.identity["features"]
    missing = [name for name in needed if name not in kept]
    if not missing:
        return None
    if network is None:
        raise IncompatibleError(
            f"objective: reads the feature {missing[0]}, which the cache does not hold",
            hint=f"--set cache.features=[{missing[0]}], or give the teacher",
        )
    network.tap(missing)
    console.say(f"{network.model}: runs live for {', '.join(missing)}; logits come from the cache")
    return Live(network.to(device))


def _features(network: Network, dataset: Dataset, num_views: int) -> list[Column]:
    """The columns of the features that the network was asked for."""
    images = torch.empty(1, 3, dataset.image_size, dataset.image_size, device="meta")
    with torch.no_grad():
        features = on_meta(network).eval()(images).features or {}
    columns = [Column(FEATURE + n, "F16", tuple(f.shape[1:])) for n, f in features.items()]
    for column in columns:
        total = column.row_bytes * len(dataset.train_ids) * num_views
        if column.row_bytes > FEATURE_BYTES and total > FEATURES_BYTES:
            name = column.name.removeprefix(FEATURE)
            raise IncompatibleError(
                f"cache.features: {name} takes {column.row_bytes:,} bytes an image and view, "
                f"{total / 1e9:,.0f} GB in all",
                hint=f"leave {name} out of cache.features: the teacher then runs live for it, and "
                "logits still come from the cache",
            )
    return columns


def _rows_a_minute(flops: int) -> int:
    """Rows that the teacher answers in about a minute, the most that a kill should cost."""
    rate = 2e13 if torch.cuda.is_available() else 3e10  # FLOP/s that most networks reach
    return max(1, int(60 * rate / flops))


def _samples_fingerprint(dataset: Dataset) -> str:
    return hashlib.sha256(samples_file(dataset)).hexdigest()

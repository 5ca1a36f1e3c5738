"""What there is of a cache, and whether it is sound."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import console
from distill.cli._report import print_json

if TYPE_CHECKING:
    from distill.cache.layout import Manifest
    from distill.cache.store import Store
    from distill.recipe import Recipe

LISTED = 10  # faults that are named


class Level(StrEnum):
    """How closely a cache is looked at."""

    quick = "quick"
    full = "full"
    replay = "replay"
    teacher = "teacher"


def status(recipe: Recipe, place: str, *, as_json: bool) -> int:
    """Show what there is of each teacher's cache; return the exit status."""
    from distill.cache import verify, write

    caches: list[dict[str, Any]] = []
    for name, store, manifest in _there(recipe, place):
        parts = verify.progress(store, manifest)
        done, total = sum(part.done for part in parts), sum(part.total for part in parts)
        index = write.read_index(store, manifest)
        caches.append(
            {
                "name": name,
                "path": store.origin,
                "model": manifest.about["model"],
                "codec": manifest.codec,
                "views": manifest.views,
                "samples": manifest.samples,
                "units": total,
                "missing": total - done,
                "bytes": sum(manifest.size_of(unit) for unit in manifest.units()),
                "complete": done == total and index is not None and index.views == manifest.views,
                "parts": {part.part: [part.done, part.total] for part in parts},
                "eta_seconds": _eta(store, done, total),
                "scores": index.scores if index else {},
            }
        )
    complete = all(cache["complete"] for cache in caches)
    if as_json:
        print_json({"complete": complete, "caches": caches})
    else:
        for cache in caches:
            _show_status(cache)
    return 0 if complete else 3


def verdict(
    recipe: Recipe,
    place: str,
    run: Path,
    level: Level,
    *,
    sample: int,
    repair: bool,
    as_json: bool,
) -> int:
    """Look at each teacher's cache as closely as asked; return the exit status."""
    from distill.cache import verify, write

    caches: list[dict[str, Any]] = []
    for name, store, manifest in _there(recipe, place):
        look = verify.quick if level is Level.quick else verify.full
        faults = look(store, manifest) if level in (Level.quick, Level.full) else []
        bad = {fault.name for fault in faults}
        missing = [u.name for u in write.missing(store, manifest) if u.name not in bad]
        caches.append(
            {
                "name": name,
                "path": store.origin,
                "faults": [fault._asdict() for fault in faults],
                "missing": len(missing),
                "indexed": verify.indexed(store, manifest),
            }
        )
        if repair and faults:
            verify.repair(store, faults)
    if level in (Level.replay, Level.teacher):
        from distill.engine.audit import audit

        for cache, found in zip(
            caches,
            audit(recipe, place, run, teacher=level is Level.teacher, sample=sample),
            strict=True,
        ):
            cache |= found
    faulty = any(cache["faults"] for cache in caches)
    incomplete = any(cache["missing"] or not cache["indexed"] for cache in caches)
    word = "bad" if faulty else "incomplete" if incomplete else "sound"
    if as_json:
        print_json({"verdict": word, "level": level.value, "caches": caches})
    else:
        for cache in caches:
            _show_verdict(cache, repaired=repair)
        console.out.print(f"verdict: {word}", highlight=False)
    return 5 if faulty else 3 if incomplete else 0


def _there(recipe: Recipe, place: str) -> list[tuple[str, Store, Manifest]]:
    """The caches of the recipe's teachers that were begun.

    Raises:
        IncompleteError: If one was not.
    """
    from distill.cache import write
    from distill.cache.store import places
    from distill.errors import IncompleteError

    found = []
    for name, store in places(recipe.teachers, place):
        manifest = write.read_manifest(store)
        if manifest is None:
            raise IncompleteError(
                f"{store.origin}: there is no cache",
                hint="`distill teacher-cache RECIPE` writes it",
            )
        found.append((name, store, manifest))
    return found


def _eta(store: Store, done: int, total: int) -> float | None:
    """Seconds until all is there, at the pace of the files that are; of a folder only."""
    from distill.cache.store import Folder

    if not isinstance(store, Folder) or done < 2 or done == total:
        return None
    times = sorted(path.stat().st_mtime for path in store.path.rglob("u*.safetensors"))
    pace = (times[-1] - times[0]) / max(1, len(times) - 1)
    return round((total - done) * pace, 1)


def _show_status(cache: dict[str, Any]) -> None:
    from distill.storage import size

    whole = [part for part, (done, total) in cache["parts"].items() if done == total]
    begun = [(part, *count) for part, count in cache["parts"].items() if 0 < count[0] < count[1]]
    lines = [
        f"{cache['path']}: {cache['model']}, {cache['codec']}, {cache['views']} views of "
        f"{cache['samples']:,} images, {size(cache['bytes'])}",
        f"  {cache['units'] - cache['missing']:,} of {cache['units']:,} units; whole: "
        f"{sum(part.startswith('views/') for part in whole)} views",
    ]
    lines += [f"  {part}: {done} of {total} units" for part, done, total in begun[:LISTED]]
    if cache["eta_seconds"] is not None:
        lines.append(f"  about {cache['eta_seconds']:,.0f} s left at the pace so far")
    if "test" in cache["scores"]:
        test = cache["scores"]["test"]
        lines.append(
            f"  teacher on the test split: top-1 {test['top1']:.2%}, NLL {test['nll']:.3f}"
        )
    lines.append("  complete" if cache["complete"] else "  incomplete")
    console.out.print(console.plain("\n".join(lines)), highlight=False, soft_wrap=True)


def _show_verdict(cache: dict[str, Any], *, repaired: bool) -> None:
    faults = cache["faults"]
    lines = [f"{cache['path']}: {len(faults):,} faults, {cache['missing']:,} units missing"]
    lines += [f"  {fault['name']}: {fault['what']}" for fault in faults[:LISTED]]
    if len(faults) > LISTED:
        lines.append(f"  and {len(faults) - LISTED:,} more")
    if "kl" in cache:
        kl = cache["kl"]
        lines.append(
            f"  teacher asked again about {cache['sample']:,} views: KL mean {kl['mean']:.1e}, "
            f"median {kl['median']:.1e}, greatest {kl['max']:.1e} nats; same first class "
            f"{cache['top1_agreement']:.1%}"
        )
    lines += [f"  {note}" for note in cache.get("notes", [])]
    if repaired and faults:
        lines.append("  what is bad was removed: the same command without --verify makes it again")
    console.out.print(console.plain("\n".join(lines)), highlight=False, soft_wrap=True)

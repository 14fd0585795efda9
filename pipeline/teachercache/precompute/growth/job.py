"""Growth of a finished cache, from a recipe to a manifest that has more: targets of rows that are there, then rows.

Settings decide what may be added: a recipe that differs from the cache in anything else is refused by the first such key.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from teachercache.cache import Cache, Manifest
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.composition.append import appended
from teachercache.cache.composition.compatible import check_version, first_difference
from teachercache.cache.manifest.alignment_manifest import ALIGNMENT, ALIGNMENTS
from teachercache.cache.manifest.card import render_card
from teachercache.cache.manifest.manifest import GROWTH
from teachercache.cache.manifest.snapshots import replace_manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.verify import CARD
from teachercache.config import Recipe
from teachercache.errors import CacheError, RecipeError
from teachercache.precompute.capture.given_calibration import settings_beside
from teachercache.precompute.capture.plan import asked_of, portable_source
from teachercache.precompute.engine.placement import placed
from teachercache.precompute.engine.progress import progress_bar
from teachercache.precompute.growth.further_targets import (
    FurtherTargets,
    further_targets,
    with_further_targets,
)
from teachercache.precompute.growth.new_rows import corpus_of_new_rows, known_sources, write_new_rows
from teachercache.targets import StoredTargets

BY = "grow"  # in `parents` of the manifest
SAME = ("deduplicate", "held_out", "store_text")  # settings of a corpus that rows of one cache have in common
ROWS = f"{GROWTH}/rows"
NOT_TOLD = "new rows are told by their content, for which corpus.deduplicate must be true"

Job = Callable[[Recipe], Any]  # an ordinary precompute job


def grow(recipe: Recipe, *, console: Console, run: Job) -> dict[str, Any]:
    """Add to the finished cache of a recipe what it lacks of the recipe's targets, and of its corpus; `run` computes new rows
    as a cache of their own. Returns the summary that `--json` prints.

    Run again, it resumes. Raises `CacheError` for a recipe of other settings, which never mix into a cache.
    """
    began, folder = time.perf_counter(), Path(recipe.cache)
    store, cache = LocalStore(folder), Cache.open(folder)
    before = cache.manifest
    targets = _checked(recipe, cache)
    further = further_targets(before, targets, store=store)
    if further is None and recipe.corpus is not None and not recipe.corpus.deduplicate:
        raise RecipeError(f"precompute.grow: {NOT_TOLD}; set it, and make the cache anew")
    if further is not None:
        _add_targets(recipe, further, cache, console)
        cache = Cache.open(folder)
    rows = _add_rows(recipe, cache, console, run=run)
    _remove(store, GROWTH)
    manifest = Cache.open(folder).manifest
    _tell(before, manifest, folder, console)
    return {
        **_summary(manifest, folder),
        "added": {
            "rows": rows,
            "positions": manifest.positions - before.positions,
            "targets": list(further.sections) if further is not None else [],
        },
        "snapshot": before.fingerprint if before.fingerprint != manifest.fingerprint else None,
        "seconds": round(time.perf_counter() - began, 2),
    }


def check_unchanged(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """The summary of a cache that has grown, or was composed, for a recipe that asks for nothing more. Its corpus is not
    looked at. Raises `CacheError` for a recipe of other settings or targets."""
    folder = Path(recipe.cache)
    cache = Cache.open(folder)
    targets = _checked(recipe, cache)
    if further_targets(cache.manifest, targets, store=LocalStore(folder)) is not None:
        raise CacheError(
            f"{folder} lacks targets of this recipe; add them with -s precompute.grow=true, or take them out"
        )
    if (folder / GROWTH).is_dir():
        console.print(f"{folder} has begun to grow: -s precompute.grow=true goes on with that", markup=False)
    console.print(
        f"{folder} is complete: nothing to do; rows that came to the corpus since are added with -s precompute.grow=true",
        markup=False,
        soft_wrap=True,
    )
    return _summary(cache.manifest, folder)


def _checked(recipe: Recipe, cache: Cache) -> StoredTargets:
    """The targets that a recipe asks for, once all that it shares with the cache is the same."""
    assert recipe.corpus is not None
    check_version(cache.manifest, name=cache.name)
    identity, targets, *_ = asked_of(recipe)
    beside, manifest = settings_beside(identity, cache.manifest), cache.manifest
    corpus = recipe.corpus.model_dump(mode="json")
    known = {
        "settings": manifest.settings,
        "targets": manifest.targets,
        "corpus": {name: manifest.corpus[name] for name in SAME if name in manifest.corpus},
    }
    ours = {
        **beside,
        "targets": {section: value for section, value in beside["targets"].items() if section in manifest.targets},
        "corpus": {name: corpus[name] for name in known["corpus"]},
    }
    if difference := first_difference(known, ours):
        raise CacheError(
            f"the cache at {cache.name} was made with other settings than this recipe's: {difference}; nothing is added to it; "
            "set the recipe as it was, or choose another `cache:`"
        )
    return targets


def _add_targets(recipe: Recipe, plan: FurtherTargets, cache: Cache, console: Console) -> None:
    assert recipe.teacher is not None
    from teachercache.precompute.engine.cluster import cluster_nodes, connected
    from teachercache.precompute.growth.stages import FurtherJob, run_preparation, run_shards

    plan.begin()
    pending = plan.pending()
    console.print(
        f"adding {', '.join(plan.sections)} of {cache.manifest.rows:,} rows in {plan.units:,} shards "
        f"({plan.units - len(pending):,} are done) …",
        highlight=False,
    )
    if pending or plan.made() is None:
        with connected(recipe.precompute), progress_bar(console) as progress:
            placement = placed(recipe.precompute, cluster_nodes(), units=max(1, len(pending)))
            console.print(placement.describe(), highlight=False)
            job = FurtherJob.of(recipe, plan, placement)
            if plan.made() is None:
                run_preparation(job)
            bar = progress.add_task("targets", total=plan.units, completed=plan.units - len(pending), rate="")
            positions, first = 0, math.inf
            for done in run_shards(job, pending):
                positions, first = positions + done.positions, min(first, done.started)
                rate = f"{positions:,} positions, {positions / max(1e-9, time.time() - first):,.0f}/s"
                progress.update(bar, advance=1, rate=rate)
    _commit(with_further_targets(cache.manifest, plan), cache)


def _add_rows(recipe: Recipe, cache: Cache, console: Console, *, run: Job) -> int:
    """Adds the rows that are new, and counts them."""
    assert recipe.corpus is not None
    if not recipe.corpus.deduplicate:
        console.print(f"rows are not looked for: {NOT_TOLD}")
        return 0
    work = cache.folder / ROWS
    file, resumed = work / "new.jsonl", (work / "new.jsonl").is_file()
    if not resumed:
        console.print(f"looking for new rows in {recipe.corpus.source} …", markup=False)
        usable = write_new_rows(recipe.corpus, known_sources(cache), file)
        if not usable:
            console.print("no new rows")
            return 0
        console.print(f"{usable:,} new rows")
    new = work / "cache"
    targets = recipe.targets.model_copy(update={"calibration_from": str(cache.folder)})
    settings = recipe.precompute.model_copy(update={"grow": False})
    corpus = corpus_of_new_rows(recipe.corpus, file)
    run(
        recipe.model_copy(
            update={"cache": new, "corpus": corpus, "targets": targets, "precompute": settings, "align": ()}
        )
    )
    added = Cache.open(new)
    with progress_bar(console) as progress:
        bar = progress.add_task("adding", total=len(added.infos), rate="")
        manifest = appended(
            cache, added, lambda: progress.advance(bar), by=BY, source=portable_source(recipe.corpus.source)
        )
    _commit(manifest, cache)
    _remove(LocalStore(cache.folder), ROWS)
    count = added.manifest.rows
    return count + (_add_rows(recipe, Cache.open(cache.folder), console, run=run) if resumed else 0)


def _commit(manifest: Manifest, cache: Cache) -> None:
    store = LocalStore(cache.folder)
    store.put(CARD, render_card(manifest).encode())
    replace_manifest(manifest, store, before=cache.manifest)


def _remove(store: LocalStore, within: str) -> None:
    store.delete(*store.list(f"{within}/"))
    store.sweep(f"{within}/")


def _tell(before: Manifest, after: Manifest, folder: Path, console: Console) -> None:
    if before.fingerprint == after.fingerprint:
        console.print(f"{folder} has everything that the recipe asks for: nothing to do", markup=False)
        return
    console.print(
        f"{after.rows - before.rows:,} rows and {after.positions - before.positions:,} positions added → {folder}; the order "
        f"of training is another one now: runs that have begun go on in {folder}@{before.fingerprint[:12]}",
        markup=False,
        soft_wrap=True,
    )
    cache = Cache.open(folder)
    there = [name for name in cache.source.names(ALIGNMENTS) if name.count("/") == 2 and name.endswith(f"/{ALIGNMENT}")]
    if len(CacheAlignment.all_of(cache)) < len(there):
        console.print(
            f"alignments with other tokenizers lack the new rows: run `teachercache align {folder} --student …` for each",
            markup=False,
            soft_wrap=True,
        )


def _summary(manifest: Manifest, folder: Path) -> dict[str, Any]:
    return {
        "cache": str(folder),
        "rows": manifest.rows,
        "positions": manifest.positions,
        "quarantined": manifest.audit.quarantined,
        "windows_quarantined": manifest.audit.windows_quarantined,
        "audit": vars(manifest.audit),
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "fingerprint": manifest.fingerprint,
        "parents": json.loads(json.dumps(manifest.parents)),
    }

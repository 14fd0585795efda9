"""Caches made of rows of other caches: `merge` joins some, `filter_rows` keeps rows of one, `split` parts it in two.

The new cache appears with its manifest, which is written last and says under `parents` what it is made of. A job that was
killed goes on when it is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.composition.compatible import check_compatible, check_version
from teachercache.cache.composition.description import chosen_audit, merged_audit, sources_of
from teachercache.cache.composition.folder import Wanted, begin, build, is_complete
from teachercache.cache.composition.row_facts import Windows, chosen_rows, windows_of
from teachercache.cache.composition.selection import Part, without_repeated
from teachercache.cache.composition.where import Where
from teachercache.cache.manifest.manifest import read_manifest
from teachercache.cache.reader import Cache
from teachercache.config import is_url
from teachercache.errors import CacheError
from teachercache.files import locked


def merge(locations: Sequence[str | Path], to: str | Path, *, console: Console) -> dict[str, Any]:
    """One cache of the rows of several, each once: whole shards in the order of `locations`, without rows that came before.

    Returns the summary that `--json` prints. Raises `CacheError`, which names the first key that differs, for caches whose
    shards may not stand in one.
    """
    began = time.perf_counter()
    parents = _opened(locations)
    entries = [{"fingerprint": parent.manifest.fingerprint, "by": "merge"} for parent in parents]
    _check_distinct(parents)
    for other in parents[1:]:
        check_compatible(parents[0].manifest, other.manifest, name=parents[0].name, of=other.name)
    with _writing(to, parents, entries, console) as folder:
        if folder is None:
            return _summary(Path(to), began)
        shards = sum(len(parent.infos) for parent in parents)
        console.print(f"reading the ids of {sum(p.manifest.rows for p in parents):,} rows in {shards:,} shards …")
        with _bar(console, "ids", shards) as advance:
            parts = without_repeated(parents, seen=advance)
        dropped, repeated = _dropped(parents, parts)
        audit = merged_audit([parent.manifest for parent in parents], dropped)
        wanted = Wanted(folder, parents, parts, audit, entries, quarantine=True, is_whole=True)
        return {**_built(wanted, console, began), "repeated_rows": repeated}


def filter_rows(location: str | Path, where: str, to: str | Path, *, console: Console) -> dict[str, Any]:
    """A cache of the rows of another one that the expression holds of. Returns the summary that `--json` prints; raises
    `CacheError`, also where no row is left."""
    [result] = _chosen(location, [(where, to)], "filter", console)
    return result


def split(location: str | Path, where: str, to: str | Path, rest: str | Path, *, console: Console) -> dict[str, Any]:
    """Two caches of the rows of one: those that the expression holds of, and all others in `rest`. Returns the summaries that
    `--json` prints; raises `CacheError`, also where one of them would be empty."""
    chosen, others = _chosen(location, [(where, to), (f"not ({where})", rest)], "split", console)
    return {"chosen": chosen, "rest": others}


def _chosen(
    location: str | Path, wanted: Sequence[tuple[str, str | Path]], by: str, console: Console
) -> list[dict[str, Any]]:
    """A new cache for each expression and folder."""
    [parent] = _opened([location])
    check_version(parent.manifest, name=parent.name)
    wheres = [Where(text) for text, _ in wanted]
    if len({Path(to).absolute() for _, to in wanted}) < len(wanted):
        raise CacheError(f"both caches would be at {wanted[0][1]}; give them folders of their own")
    return [_of_one(parent, where, to, by=by, console=console) for where, (_, to) in zip(wheres, wanted, strict=True)]


def _of_one(parent: Cache, where: Where, to: str | Path, *, by: str, console: Console) -> dict[str, Any]:
    began = time.perf_counter()
    entries = [{"fingerprint": parent.manifest.fingerprint, "by": by, "where": where.text}]
    with _writing(to, [parent], entries, console) as folder:
        if folder is None:
            return _summary(Path(to), began)
        console.print(f"looking for rows: {where.text} …", markup=False, highlight=False)
        with _bar(console, "rows", len(parent.infos)) as advance:
            parts, kept = _matching(parent, where, advance)
        if not parts:
            raise CacheError(f"--where {where.text}: no row of {parent.name} is so, and a cache of none is not written")
        is_whole = len(parts) == len(parent.infos) and all(part.rows is None for part in parts)
        wanted = Wanted(folder, [parent], parts, chosen_audit(kept), entries, is_whole=is_whole)
        return _built(wanted, console, began)


def _matching(parent: Cache, where: Where, advance: Callable[[], None]) -> tuple[list[Part], Windows]:
    """Parts with the rows that are asked for, and counts of these."""
    parts, kept = [], Windows()
    for shard, (info, source) in enumerate(zip(parent.infos, sources_of(parent.manifest), strict=True)):
        part = Part.of(0, shard, chosen_rows(parent, info, where, source=source))
        if not part.is_empty:
            parts.append(part)
            kept += windows_of(parent, info, part.rows)[0]
        advance()
    return parts, kept


def _dropped(parents: Sequence[Cache], parts: list[Part]) -> tuple[Windows, int]:
    """Counts of the rows that are left out because they came before; empty parts are taken off the list."""
    dropped, rows = Windows(), 0
    for part in [part for part in parts if part.rows is not None]:
        assert part.rows is not None
        kept, whole = windows_of(parents[part.parent], part.info(parents), part.rows)
        dropped += whole - kept
        rows += int((~part.rows).sum())
    parts[:] = [part for part in parts if not part.is_empty]
    return dropped, rows


def _opened(locations: Sequence[str | Path]) -> list[Cache]:
    if len(locations) < 1:
        raise CacheError("name the caches to merge, one after the other")
    return [Cache.open(location) for location in locations]


def _check_distinct(parents: Sequence[Cache]) -> None:
    if len(parents) < 2:
        raise CacheError(f"{parents[0].name} alone is no merge; name two caches or more")
    met: dict[str, str] = {}
    for parent in parents:
        if (known := met.get(parent.manifest.fingerprint)) is not None:
            raise CacheError(f"{parent.name} is the same cache as {known}; name each once")
        met[parent.manifest.fingerprint] = parent.name


@contextmanager
def _writing(
    to: str | Path, parents: Sequence[Cache], entries: list[dict[str, Any]], console: Console
) -> Iterator[Path | None]:
    """The folder of a new cache, locked; None where the cache is there already."""
    if is_url(to):
        raise CacheError(f"{to} is in an object store; write the new cache into a folder, and copy it there")
    folder = Path(to)
    for parent in parents:
        if not parent.is_remote and parent.folder.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise CacheError(f"{folder} is in {parent.name} itself; choose a folder outside of it")
    with locked(folder.parent / f".{folder.name}.lock", job="job", folder=folder):
        if is_complete(folder, entries):
            console.print(f"{folder} is complete: nothing to do", markup=False)
            yield None
        else:
            begin(folder, entries)
            yield folder


def _built(wanted: Wanted, console: Console, began: float) -> dict[str, Any]:
    with _bar(console, "shards", len(wanted.parts)) as advance:
        hows = build(wanted, advance)
    result = _summary(wanted.folder, began)
    result["shards_by"] = {how: hows.count(how) for how in ("linked", "copied", "written")}
    console.print(
        f"{result['rows']:,} rows, {result['positions']:,} positions in {result['shards']:,} shards "
        f"({', '.join(f'{count:,} {how}' for how, count in result['shards_by'].items() if count)}) → {wanted.folder}",
        markup=False,
        soft_wrap=True,
    )
    if any(CacheAlignment.all_of(parent) for parent in wanted.parents):
        console.print(
            f"alignments with other tokenizers are not taken over: run `teachercache align {wanted.folder} --student …`",
            markup=False,
            soft_wrap=True,
        )
    return result


def _summary(folder: Path, began: float) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {
        "cache": str(folder),
        "rows": manifest.rows,
        "held_out_rows": manifest.held_out_rows,
        "positions": manifest.positions,
        "shards": len(manifest.shards),
        "bytes": manifest.shard_bytes,
        "audit": vars(manifest.audit),
        "parents": list(manifest.parents),
        "fingerprint": manifest.fingerprint,
        "seconds": round(time.perf_counter() - began, 2),
    }


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar while it is open; what is given advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)

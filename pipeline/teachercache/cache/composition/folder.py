"""The folder of a composed cache, from empty to committed. `.work/` says whose it is, and has a record of each shard that is in
place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachercache.cache.composition.description import composed, files_of_teacher, sources_of
from teachercache.cache.composition.placing import Placed, named, place, place_file
from teachercache.cache.composition.selection import Part
from teachercache.cache.files.entries import FileInfo
from teachercache.cache.manifest.card import render_card
from teachercache.cache.manifest.manifest import COMPOSITION, MANIFEST, WORK_FOLDER, commit_manifest, read_manifest
from teachercache.cache.manifest.model import QUARANTINE, Audit, Manifest
from teachercache.cache.reader import Cache
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.verify import CARD
from teachercache.errors import CacheError
from teachercache.files import sync_folder


@dataclass(frozen=True)
class Wanted:
    """Content of a new cache: `parts` of `parents`, which `entries` names in its manifest."""

    folder: Path
    parents: Sequence[Cache]
    parts: Sequence[Part]
    audit: Audit
    entries: list[dict[str, Any]]
    quarantine: bool = False  # files of quarantined rows come with it
    is_whole: bool = False  # every row of each parent, or one like it, is here


def is_complete(folder: Path, entries: list[dict[str, Any]]) -> bool:
    """Tells whether a folder holds this very composition, finished. Raises `CacheError` where it holds another cache."""
    if not (folder / MANIFEST).is_file():
        return False
    if list(read_manifest(folder).parents) == entries:
        return True
    raise CacheError(f"{folder} holds another cache; choose another folder, or delete that one to start over")


def begin(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Make the folder of a new cache, or find that of an unfinished one. Raises `CacheError` for any other folder."""
    work, wanted = folder / WORK_FOLDER, json.dumps({"parents": entries}, sort_keys=True)
    if (folder / COMPOSITION).is_file():
        if (folder / COMPOSITION).read_text(encoding="utf-8") != wanted:
            raise CacheError(
                f"{folder} holds an unfinished cache of other rows; choose another folder, or delete that one"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(path != work for path in folder.iterdir())):
        raise CacheError(f"{folder} exists and holds no cache of ours; choose another folder, or empty it")
    LocalStore(folder).put(COMPOSITION, wanted.encode())


def build(wanted: Wanted, placed_one: Callable[[], None]) -> list[str]:
    """Put every part in place and commit the cache; returns how each came: linked, copied or written."""
    placed = []
    for number, part in enumerate(wanted.parts):
        placed.append(_placed(wanted, number, part))
        placed_one()
    files = _teacher_files(wanted)
    if wanted.quarantine:
        for parent in wanted.parents:
            files += quarantine_files(parent, wanted.folder, first=sum(_is_quarantine(info) for info in files))
    sources = [sources_of(parent.manifest) for parent in wanted.parents]
    manifest = composed(
        [parent.manifest for parent in wanted.parents],
        placed,
        audit=wanted.audit,
        files=files,
        sources=[sources[part.parent][part.shard] for part in wanted.parts],
        described=wanted.entries,
        is_whole=wanted.is_whole,
    )
    _commit(manifest, wanted.folder)
    return [item.how for item in placed]


def _placed(wanted: Wanted, number: int, part: Part) -> Placed:
    """The part in place; of a cut one, by its record where there is one."""
    if part.rows is None:
        return place(wanted.parents, part, wanted.folder, number)
    store, name = LocalStore(wanted.folder), f"{WORK_FOLDER}/done/{number:05d}.json"
    try:
        known = Placed.from_json(json.loads(store.get(name)))
        if all(_is_there(wanted.folder, info) for info in known.shard.files.values()):
            return known
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that a power cut has cut
        pass
    placed = place(wanted.parents, part, wanted.folder, number)
    store.put(name, json.dumps(placed.to_json()).encode())
    return placed


def _is_there(folder: Path, info: FileInfo) -> bool:
    path = folder / info.file
    return path.is_file() and path.stat().st_size == info.bytes


def _teacher_files(wanted: Wanted) -> list[FileInfo]:
    """Those of the first parent: what shards are read by is the same in all of them."""
    first = wanted.parents[0]
    infos = files_of_teacher(first.manifest)
    for info in infos:
        place_file(first.source, info, wanted.folder, info.file)
    return infos


def quarantine_files(parent: Cache, folder: Path, *, first: int) -> list[FileInfo]:
    """Put a parent's files of quarantined rows into a folder, numbered from `first` on."""
    files = []
    for number, info in enumerate([info for info in parent.manifest.files if _is_quarantine(info)], start=first):
        name = named(QUARANTINE, number, info)
        place_file(parent.source, info, folder, name)
        files.append(FileInfo(name, info.bytes, info.sha256))
    return files


def _is_quarantine(info: FileInfo) -> bool:
    return info.file.startswith(f"{QUARANTINE}/")


def _commit(manifest: Manifest, folder: Path) -> None:
    listed = {info.file for info in manifest.all_files}
    for within in (*manifest.groups, QUARANTINE, "teacher"):
        for path in (folder / within).rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in listed:  # of a killed writer
                path.unlink()
        if (folder / within).is_dir():
            sync_folder(folder / within)
    LocalStore(folder).put(CARD, render_card(manifest).encode())
    commit_manifest(manifest, LocalStore(folder))
    shutil.rmtree(folder / WORK_FOLDER)

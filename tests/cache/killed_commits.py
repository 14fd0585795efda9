"""Puts another manifest into the place of a cache's, or of its alignment's, killed before each of the file operations in turn.

    python tests/cache/killed_commits.py cache|alignment FOLDER

Prints for each kill, and for the commit that was not killed, what a reader found then: `before`, `after` or why it was refused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.files.entries import ShardTable
from teachercache.cache.manifest.alignment_manifest import AlignmentManifest, commit_alignment
from teachercache.cache.manifest.manifest import commit_manifest, read_manifest
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.stores.store import Store
from teachercache.errors import CacheError

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")


def of_cache(folder: Path) -> Manifest:
    """The cache as a reader finds it."""
    return read_manifest(folder)


def of_alignment(folder: Path) -> AlignmentManifest:
    """The cache as a reader finds it."""
    [alignment] = CacheAlignment.all_of(Cache.open(folder))
    return alignment.manifest


def another(manifest: Any) -> Any:
    """The same with another index."""
    if isinstance(manifest, Manifest):
        return replace(manifest, shards=ShardTable.of(list(manifest.shards)[:-1]))
    others = [
        replace(shard, files={group: replace(info, sha256="0" * 64) for group, info in shard.files.items()})
        for shard in manifest.shards
    ]
    return replace(manifest, shards=ShardTable.of(others))


def killed(commit: Callable[[], None], folder: Path, number: int) -> str:
    """Run it in a process that ends before its operation `number` on files of the folder; returns which that was."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        left = number

        def end(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in OPERATIONS and any(str(folder) in str(each) for each in arguments):
                left -= 1
                if left < 0:
                    os.write(writing, event.encode())
                    os._exit(0)

        sys.addaudithook(end)
        commit()
        os.write(writing, b"nothing")
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


def main(what: str, folder: Path) -> list[dict[str, str]]:
    """Every kill, and what was found after it."""
    read: Callable[[Path], Any] = of_cache if what == "cache" else of_alignment
    commit: Callable[[Any, Store], None] = commit_manifest if what == "cache" else commit_alignment
    first, found = read(folder), list[dict[str, str]]()
    following = another(first)
    with tempfile.TemporaryDirectory() as name:
        saved = Path(shutil.copytree(folder, Path(name) / "saved"))
        while not found or found[-1]["killed_before"] != "nothing":
            shutil.rmtree(folder)
            shutil.copytree(saved, folder)
            event = killed(lambda: commit(following, LocalStore(folder)), folder, len(found))
            try:
                told = "before" if read(folder).shards == first.shards else "after"
            except CacheError as error:
                told = str(error)
            found.append({"killed_before": event, "found": told})
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

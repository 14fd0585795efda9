"""The look of a corpus from outside: names, sizes and times of its files. While these stay the same, they are not read
again."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teachercache.cache.files.digests import fingerprint_of
from teachercache.config import CorpusConfig
from teachercache.corpus.readers import kind_of, paths_of

THREADS = 32  # that ask a file system which answers in a millisecond


def look_of(config: CorpusConfig) -> str:
    """A fingerprint of all that can be known of a corpus without reading it: its settings, and name, size and time of each
    file. Of a dataset of the hub that is its name and revision; CPython's own documentation is that of a version.

    Raises `CorpusError` for a corpus that is not there.
    """
    kind = kind_of(config)
    said: list[object] = [config.model_dump(), kind]
    folder = Path(config.source).expanduser()
    if kind == "python-docs":
        said.append(platform.python_version())
    elif kind != "datasets":
        said += _looks(paths_of(config.source, kind=kind))
    elif folder.exists():  # saved, or described by a card
        said += _looks(sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder])
    return fingerprint_of(said)


def _looks(paths: list[Path]) -> list[list[object]]:
    with ThreadPoolExecutor(THREADS) as pool:
        stats = pool.map(Path.stat, paths)
        return [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]

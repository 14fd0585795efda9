"""`list_caches`: what caches there are in a place, each in a line, from their manifests alone.

A place is a folder, with caches anywhere below it, the folder or the URL of one cache, or a catalogue: a YAML file of a team
with the places of its caches, each as it stands or with a name.

    - s3://team/caches/chat
    - {name: code, cache: /shared/caches/code}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.storage.source import manifest_of
from teachercache.config import is_url
from teachercache.errors import CacheDamaged, CacheError, UserError

CATALOGUE_SUFFIXES = (".yaml", ".yml")
MOST_CATALOGUE_BYTES = 2**24


class Entry(BaseModel):
    """A cache in a catalogue."""

    model_config = ConfigDict(extra="forbid")

    cache: str
    name: str | None = None


_ENTRIES: TypeAdapter[list[Entry | str]] = TypeAdapter(list[Annotated[Entry | str, "a place, or a name with one"]])


@dataclass(frozen=True)
class Filter:
    """Choice of caches: those of which every text here is part of what it is compared with, in any case."""

    teacher: str = ""
    corpus: str = ""
    target: str = ""
    fingerprint: str = ""  # its beginning, or that of the settings' fingerprint

    def admits(self, described: dict[str, Any]) -> bool:
        """Tells whether a cache, as `described` describes it, is asked for. One that cannot be read is, unless something is."""
        if "problem" in described:
            return self == Filter()
        prints = (described["fingerprint"], described["settings_fingerprint"] or "")
        return (
            self.teacher.lower() in described["teacher"].lower()
            and self.corpus.lower() in described["corpus"].lower()
            and any(self.target.lower() in kind.lower() for kind in described["targets"].values())
            and any(digest.startswith(self.fingerprint) for digest in prints)
        )


def list_caches(places: Sequence[str], wanted: Filter = Filter()) -> list[dict[str, Any]]:
    """The caches in these places, in order, each as `described` describes it; one whose manifest cannot be read has its `name`,
    its `cache` and a `problem`. Raises `UserError` for a place that is not there, and for a catalogue that is none."""
    listed = [entry for place in places for entry in _entries(place)]
    return [found for name, location in listed if wanted.admits(found := _listed(name, location))]


def described(name: str, location: str, manifest: Manifest) -> dict[str, Any]:
    """A cache in one flat record: who it is of, what it holds, how large it is."""
    path = Path(location) / MANIFEST
    made = None if is_url(location) else datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {
        "name": name,
        "cache": location,
        "teacher": manifest.teacher["model"],
        "parameters": manifest.model.get("parameters"),
        "tokenizer": manifest.tokenizer["fingerprint"],
        "vocabulary_size": manifest.vocabulary_size,
        "corpus": manifest.corpus["source"],
        "rows": manifest.rows,
        "positions": manifest.positions,
        "shards": len(manifest.shards),
        "bytes": manifest.shard_bytes,
        "targets": {section: str(settings.get("kind", section)) for section, settings in manifest.targets.items()},
        "temperatures": manifest.logits.get("temperatures", "any" if manifest.logits else None),
        "fingerprint": manifest.fingerprint,
        "settings_fingerprint": manifest.settings_fingerprint,
        "format_version": manifest.format_version,
        "date": made.isoformat(timespec="seconds") if made else None,
    }


def _listed(name: str, location: str) -> dict[str, Any]:
    try:
        return described(name, location, manifest_of(location))
    except (CacheError, CacheDamaged) as error:
        return {"name": name, "cache": location, "problem": str(error)}


def _entries(place: str) -> Iterator[tuple[str, str]]:
    """Names and locations of the caches in a place."""
    if is_url(place):
        yield place, place
        return
    path = Path(place)
    if path.is_file() and path.suffix in CATALOGUE_SUFFIXES:
        yield from _catalogued(path)
    elif path.is_dir():
        yield from (
            (folder.relative_to(path).as_posix() if folder != path else place, str(folder)) for folder in _below(path)
        )
    else:
        raise UserError(f"{place} is neither a folder, nor a URL, nor a catalogue ({', '.join(CATALOGUE_SUFFIXES)})")


def _below(top: Path) -> Iterator[Path]:
    """Folders of caches; links are not followed, and nobody looks into a cache."""
    for folder, names, files in os.walk(top):
        if MANIFEST in files:
            names.clear()
            yield Path(folder)
        names[:] = sorted(name for name in names if not name.startswith("."))


def _catalogued(path: Path) -> Iterator[tuple[str, str]]:
    """The entries of a catalogue; relative folders are relative to it."""
    if path.stat().st_size > MOST_CATALOGUE_BYTES:
        raise UserError(f"{path} holds more than {MOST_CATALOGUE_BYTES:,} bytes, which no catalogue of caches does")
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(
            f"{path} is no catalogue ({said}); it is a list in YAML, each item the place of a cache or {{name: …, cache: …}}"
        ) from None
    for entry in entries:
        location = entry if isinstance(entry, str) else entry.cache
        found = location if is_url(location) else str(path.parent / Path(location).expanduser())
        yield (location if isinstance(entry, str) else entry.name or location), found

"""manifest.json: everything that a reader needs to know, and the digest of every file.

It is a small head, written last and whole: a folder without it is no cache. It carries the digest of itself,
and names the index files that list the shards (index.py). Nothing in it is trusted further than it can be checked: file
names are relative and stay inside the cache; format versions, and features in `requires`, that this version does not know
are refused. Keys that it does not know are ignored: they are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from teachercache.bounded.strangers_json import parse_json
from teachercache.cache.files.column_groups import check_groups, target_digests
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import FileTable
from teachercache.cache.files.regular_files import (
    MOST_MANIFEST_BYTES,
    open_regular,
    read_regular,
    refused_in_a_line,
    why_different,
)
from teachercache.cache.files.schema import ROW_COLUMNS
from teachercache.cache.manifest import manifest_v1
from teachercache.cache.manifest.checks import check_manifest
from teachercache.cache.manifest.index import read_index, remove_others, write_index
from teachercache.cache.manifest.model import (
    FORMAT_VERSION,
    OPTIONAL_LISTS,
    PLAIN_KEYS,
    Audit,
    Manifest,
    cache_fingerprint,
    is_indexed,
)
from teachercache.cache.stores.store import Store, place
from teachercache.errors import CacheDamaged, CacheError, one_line
from teachercache.targets.stored import why_unknown
from teachercache.tasks.known import TASKS
from teachercache.version import __version__

FEATURES = frozenset(task.name for task in TASKS)  # what a manifest may require of a reader beside its format version
MANIFEST = "manifest.json"
AGAIN = "fetch it again, or precompute the cache again"
WORK_FOLDER = ".work"  # plan, staged units and records of finished ones; gone when the manifest is committed
COMPOSITION = f"{WORK_FOLDER}/composition.json"  # of a cache that is being made of others
GROWTH = f"{WORK_FOLDER}/growth"  # of an unfinished job that adds to a finished cache


def commit_manifest(manifest: Manifest, store: Store) -> None:
    """Write the index files, then manifest.json: from here on the store holds this cache. A manifest that was there before
    stays readable until then; its index files go last."""
    indexed = [info for info in manifest.files if is_indexed(info)]
    index = write_index(store, manifest.shards, indexed)
    store.put(MANIFEST, manifest.to_json(index).encode())
    remove_others(store, index)


def read_manifest(folder: Path, *, knows: frozenset[str] = FEATURES) -> Manifest:
    """Read and check manifest.json and the index; `knows` are the features that the reader knows.

    Raises `CacheError` when there is no cache or only half of one, `CacheDamaged` when the manifest was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(_explain_missing(folder))
    read = partial(read_regular, folder, MANIFEST, most=MOST_MANIFEST_BYTES)
    return parse_manifest(read, partial(read_listed, folder), name=str(path), knows=knows)


def manifest_in(store: Store) -> Manifest:
    """The manifest in a store that a cache is written to. Raises `FileNotFoundError` where there is none, otherwise as
    `read_manifest` does."""

    def listed(name: str, size: int) -> bytes:
        with refused_in_a_line(place(store, name), remedy=AGAIN):
            data = store.get(name)
        if len(data) != size:
            raise CacheDamaged(f"{place(store, name)} holds {len(data)} bytes, the manifest says {size}; {AGAIN}")
        return data

    return parse_manifest(partial(store.get, MANIFEST), listed, name=place(store, MANIFEST))


def read_listed(folder: Path, file: str, size: int) -> bytes:
    """The bytes of a small file of a cache that a manifest lists, so many; not hashed. Raises `CacheDamaged` where it is not
    there, is no regular file or has another size."""
    with refused_in_a_line(str(folder / file), remedy=AGAIN), open_regular(folder, file) as stream:
        reason = why_different(stream, expected_bytes=size, sha256=None)
        if reason is not None:
            raise CacheDamaged(f"{folder / file} {reason}; {AGAIN}")
        return stream.read(size)


def parse_manifest(
    read: Callable[[], bytes],
    read_file: Callable[[str, int], bytes],
    *,
    name: str,
    knows: frozenset[str] = FEATURES,
) -> Manifest:
    """The manifest from the bytes that `read` gives, its index from those that `read_file(file, size)` gives; `name` is what
    errors call it. Raises as `read_manifest` does."""
    try:
        data = parse_json(read())  # read in here: nobody else then holds the text
        if data.pop("format") != "teachercache":
            raise ValueError("it is not a teachercache manifest")
        version, digest = data["format_version"], data.pop("digest")
        if type(version) is not int or version not in (manifest_v1.FORMAT_VERSION, FORMAT_VERSION):
            raise CacheError(
                f"{name} has format version {repr(version)[:80]}, this version of teachercache reads up to {FORMAT_VERSION}; "
                f"{UPGRADE}"
            )
        if digest != fingerprint_of(data):
            raise ValueError("its digest does not match: it was edited or damaged")
        check_requires(data, name=name, knows=knows)
        fields = manifest_v1.fields_of(data) if version == manifest_v1.FORMAT_VERSION else _fields_of(data, read_file)
        return _built(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CacheDamaged(
            f"{name} cannot be trusted: {reason}; fetch the cache again or precompute it again"
        ) from None


UPGRADE = f"install a newer version than {__version__}: pip install --upgrade teachercache"


def check_requires(data: Mapping[str, Any], *, name: str, knows: frozenset[str] = FEATURES) -> None:
    """Raise `CacheError` where a manifest requires something of its reader that this version does not know."""
    asked = data.get("requires", [])
    if not (isinstance(asked, list) and all(isinstance(feature, str) for feature in asked)):
        raise ValueError("its requires is no list of names")
    missing = sorted(set(asked) - knows)
    if missing:
        raise CacheError(
            f"{name} requires {one_line(', '.join(missing))[:200]}, which this version of teachercache lacks; {UPGRADE}"
        )


def _fields_of(data: dict[str, Any], read_file: Callable[[str, int], bytes]) -> dict[str, Any]:
    groups = {folder: tuple(sections) for folder, sections in data["groups"].items()}
    check_groups(groups)
    indexed = read_index(data["index"], read_file, groups=list(groups))
    if indexed.shards.totals() != {key: data["totals"][key] for key in indexed.shards.totals()}:
        raise ValueError("its totals are not those of its shards")
    if data["settings_fingerprint"] != fingerprint_of(data["settings"]):
        raise ValueError("its settings_fingerprint does not match its settings")
    fingerprint = cache_fingerprint(data["settings_fingerprint"], data["target_digests"], data["corpus"], data["units"])
    if data["fingerprint"] != fingerprint:
        raise ValueError("its fingerprint does not match its settings, targets and corpus")
    return {
        **{key: data[key] for key in PLAIN_KEYS},
        "input_form": data.get("input_form", {}),
        **{key: tuple(data.get(key, ())) for key in OPTIONAL_LISTS},
        "groups": groups,
        "shards": indexed.shards,
        "files": [*FileTable.from_entries(data["files"]), *indexed.files],
        "index": indexed.index,
        "audit": data["audit"],
    }


def _built(fields: dict[str, Any]) -> Manifest:
    try:
        fields["audit"] = Audit(**{key: fields["audit"][key] for key in Audit.__dataclass_fields__})
    except CacheDamaged as error:
        raise ValueError(str(error)) from None  # who calls names the file
    manifest = Manifest(described_teacher=fields.pop("teacher"), **fields)
    check_manifest(manifest, row_columns=ROW_COLUMNS)
    _check_digests(manifest)
    return manifest


def _check_digests(manifest: Manifest) -> None:
    """The digests of targets are those of their settings and files. Targets that this version does not know may be digested
    by other rules, and are not read; format 1 has no digests."""
    targets = manifest.targets
    known = {section: targets[section] for section in targets if not why_unknown(section, targets)}
    listed = {info.file: info.sha256 for info in manifest.files}
    read_by = {section: dict(manifest.read_by.get(section, {})) for section in known}
    for section, files in read_by.items():
        for role, name in files.items():
            if not (type(name) is str and name in listed):
                raise ValueError(f"its {section} are read by {str(name)[:200]!r}, which it does not list")
            files[role] = listed[name]
    if manifest.format_version == manifest_v1.FORMAT_VERSION:
        return
    wrong = [s for s, digest in target_digests(known, read_by).items() if manifest.target_digests.get(s) != digest]
    if wrong:
        raise ValueError(f"its target_digests do not match its targets ({wrong[0]})")


def _explain_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no cache at {folder}; make one with `teachercache precompute RECIPE`"
    work = folder / WORK_FOLDER
    if (folder / COMPOSITION).is_file():
        return f"the cache at {folder} is half written; run the command that makes it (merge, split or filter) again"
    if work.is_dir():
        done = len(list(work.glob("done/*.json")))
        return (
            f"the cache at {folder} is half written ({done} of {_planned_units(work)} units are done); "
            "run `teachercache precompute` with its recipe again to finish it"
        )
    return f"{folder} has no {MANIFEST}, so it is no cache; make one with `teachercache precompute RECIPE`"


def _planned_units(work: Path) -> int | str:
    """The number of units of an unfinished job, as its plan says."""
    try:
        with (work / "plan.json").open("rb") as stream:
            return int(parse_json(stream.read(MOST_MANIFEST_BYTES))["counted"]["units"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "?"

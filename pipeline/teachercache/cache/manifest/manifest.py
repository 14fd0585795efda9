"""manifest.json: everything that a reader needs to know, and the digest of every file.

It is a small head, written last by temp file and rename: a folder without it is no cache. It carries the digest of itself,
and names the index files that list the shards (index.py). Nothing in it is trusted further than it can be checked: file
names are relative and stay inside the cache; format versions, and features in `requires`, that this version does not know
are refused. Keys that it does not know are ignored: they are optional.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from teachercache.bounded.strangers_json import parse_json
from teachercache.cache.files.column_groups import check_groups, target_digests
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import FileInfo, FileTable, ShardTable
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
from teachercache.config import RowPrefix
from teachercache.errors import CacheDamaged, CacheError
from teachercache.files import write_whole
from teachercache.targets import StoredTargets
from teachercache.targets.stored import why_unknown
from teachercache.version import __version__

FORMAT_VERSION = 2
FEATURES = frozenset[str]()  # what a manifest may require of a reader beside its format version
MANIFEST = "manifest.json"
QUARANTINE = "quarantine"
JOB_KEYS = manifest_v1.JOB_KEYS
TEACHER_IDENTITY = ("weights_sha256", "commit", "code_sha256")  # of a job's `teacher`: what its numbers follow from
WORK_FOLDER = ".work"  # plan, staged units and records of finished ones; gone when the manifest is committed
_PLAIN_KEYS = (
    "fingerprint", "settings_fingerprint", "settings", "targets", "target_digests", "read_by", "groups", "teacher", "model",
    "corpus", "units", "calibration", "fidelity", "column_bytes", "created_by",
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """Where each row of the corpus went: `rows_in = stored + quarantined + deduplicated`."""

    rows_in: int
    stored: int
    quarantined: int
    deduplicated: int
    windowed_documents: int  # documents longer than a sequence …
    extra_windows: int  # … and the windows that they gave beyond their first
    windows_without_targets: int  # windows of stored documents that only hold prompt tokens: not stored
    windows_quarantined: int  # windows of stored documents that have no usable targets: not stored

    def __post_init__(self) -> None:
        if self.rows_in != self.stored + self.quarantined + self.deduplicated:
            raise CacheDamaged(f"the audit does not add up: {self}")


@dataclass(frozen=True)
class Manifest:
    """Typed view of a manifest, of whichever version. Dicts are descriptive: their keys are documented in FORMAT.md.

    `settings` is what shards of one cache have in common: `teacher`, `tokenizer` and `sequence`, and `settings_fingerprint`
    its digest; each of `targets` has a digest of its own. `fingerprint` covers all of these and the corpus: it names the
    cache, and decides the order of training.
    """

    fingerprint: str
    settings_fingerprint: str
    settings: dict[str, Any]
    targets: dict[str, Any]
    target_digests: dict[str, str]
    groups: dict[str, tuple[str, ...]]  # column group (a folder) to the sections of targets that its files hold
    described_teacher: dict[str, Any]  # portable name, and what was asked for
    model: dict[str, Any]  # what was loaded
    corpus: dict[str, Any]
    units: dict[str, Any]
    audit: Audit
    shards: ShardTable
    files: list[FileInfo]
    column_bytes: dict[str, int]  # compressed bytes of each column over all shards
    created_by: str
    read_by: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # files that targets are read by, by section and role
    calibration: dict[str, Any] = field(default_factory=dict)  # the sample that these files were fitted to
    fidelity: dict[str, Any] = field(default_factory=dict)  # KL(teacher ‖ stored), measured while capturing
    input_form: dict[str, Any] = field(default_factory=dict)  # the teacher's loss by what rows begin with, on a sample
    index: tuple[FileInfo, ...] = ()  # files that list the shards, once they are written
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def teacher(self) -> dict[str, Any]:
        """Name, weights and what was asked for of the teacher."""
        return {**self.settings["teacher"], **self.described_teacher}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The teacher's tokenizer, and how rows begin."""
        return self.settings["tokenizer"]

    @property
    def sequence(self) -> dict[str, Any]:
        """How documents became rows."""
        return self.settings["sequence"]

    @property
    def job(self) -> dict[str, Any]:
        """Inputs and settings, but nothing about how fast or where they were used."""
        return {name: getattr(self, name) for name in JOB_KEYS}

    @property
    def all_files(self) -> list[FileInfo]:
        """Every file that the manifest and its index list, the index among them."""
        return [*self.shards.all_files(), *self.files, *self.index]

    @property
    def logits(self) -> dict[str, Any]:
        """Settings of the logit targets, e.g. `{"kind": "top-k", "k": 64, …}`; {} where the cache stores none."""
        return self.targets.get("logits", {})

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the teacher's tokenizer: every distribution is over exactly these."""
        return self.tokenizer["vocabulary_size"]

    @property
    def tokenizer_fingerprint(self) -> str:
        """Equal fingerprints map text to equal ids."""
        return self.tokenizer["fingerprint"]

    @property
    def pad_id(self) -> int:
        """Token that fills up batches; never seen by a loss."""
        return self.tokenizer["pad_id"]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Tokens that every row and every packed segment begins with, never targets; caches of earlier versions do not
        say, and only the beginnings of documents may have them there."""
        return tuple(self.tokenizer.get("prefix_ids", ()))

    @property
    def row_prefix(self) -> RowPrefix:
        """`sequence.prefix` of the recipe: auto, bos, eos or none."""
        choice: RowPrefix = self.sequence.get("prefix", "auto")
        return choice

    @property
    def layout(self) -> str:
        """`documents` or `packed`."""
        return self.sequence["layout"]

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row."""
        return self.sequence["length"]

    @property
    def rows(self) -> int:
        """Rows in all shards, held-out ones included."""
        return int(self.shards.counted("rows").sum())

    @property
    def held_out_rows(self) -> int:
        """Rows that no student trains on."""
        return int(self.shards.counted("held_out_rows").sum())

    @property
    def positions(self) -> int:
        """Stored targets in all shards."""
        return int(self.shards.counted("positions").sum())

    @property
    def shard_bytes(self) -> int:
        """Size of all shards."""
        return int(self.shards.sizes().sum())

    def stored_targets(self, *, basis: Path | None = None) -> StoredTargets:
        """How its targets are read; `basis` is the file of kinds of logits that calibrate: without it they know their columns
        alone."""
        return StoredTargets.of(self.targets, vocabulary_size=self.vocabulary_size, basis=basis)

    def bytes_per_position(self) -> dict[str, float]:
        """On disk: `logits`, `boundary_mass`, `hidden` and `attention` where there are such columns, `tokens` (ids, masks,
        ids of rows, text), `other` columns, which only later versions know, `total` (with Arrow's framing)."""
        positions = max(1, self.positions)
        tokens = sum(self.column_bytes[name] for name in ROW_COLUMNS)
        kinds = self.stored_targets().sections
        section_of = {column.name: section for section, kind in kinds.items() for column in kind.columns}
        sections = {section: 0 for section in ("logits",) if section in kinds}
        for name, size in self.column_bytes.items():
            if name not in ROW_COLUMNS:
                section = section_of.get(name, "other")
                sections[section] = sections.get(section, 0) + size
        sizes = {**sections, "tokens": tokens, "total": self.shard_bytes}
        return {name: round(size / positions, 2) for name, size in sizes.items()}

    def to_json(self, index: list[dict[str, Any]]) -> str:
        """The file's text, its own digest included; `index` are the entries of its index files."""
        data: dict[str, Any] = {
            **{key: getattr(self, "described_teacher" if key == "teacher" else key) for key in _PLAIN_KEYS},
            "input_form": self.input_form,
            "format_version": FORMAT_VERSION,
            "requires": [],
            "audit": vars(self.audit),
            "totals": self.shards.totals(),
            "files": [vars(info) for info in self.files if not _is_indexed(info)],
            "index": index,
        }
        signed = {"format": "teachercache", **data, "digest": fingerprint_of(data)}
        return json.dumps(signed, indent=1, sort_keys=True) + "\n"


def _is_indexed(info: FileInfo) -> bool:
    """Files of which there may be one a unit stand in the index."""
    return info.file.startswith(f"{QUARANTINE}/")


def cache_fingerprint(
    settings_fingerprint: str, target_digests: Mapping[str, str], corpus: Mapping[str, Any], units: Mapping[str, Any]
) -> str:
    """The name of a cache: equal for equal settings, targets and content, wherever the corpus came from."""
    content = {key: value for key, value in corpus.items() if key != "source"}
    identity = {"settings": settings_fingerprint, "targets": dict(target_digests), "corpus": content, "units": units}
    return fingerprint_of(identity)


def commit_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the index files, then manifest.json by temp file and rename: from here on the folder is this cache. A manifest
    that was there before stays readable until then; its index files go last."""
    indexed = [info for info in manifest.files if _is_indexed(info)]
    index = write_index(folder, manifest.shards, indexed)
    write_whole(folder / MANIFEST, manifest.to_json(index))
    remove_others(folder, index)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json and the index.

    Raises `CacheError` when there is no cache or only half of one, `CacheDamaged` when the manifest was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(_explain_missing(folder))
    read = partial(read_regular, folder, MANIFEST, most=MOST_MANIFEST_BYTES)
    return parse_manifest(read, partial(read_listed, folder), name=str(path))


def read_listed(folder: Path, file: str, size: int) -> bytes:
    """The bytes of a small file of a cache that a manifest lists, so many; not hashed. Raises `CacheDamaged` where it is not
    there, is no regular file or has another size."""
    again = "fetch it again, or precompute the cache again"
    with refused_in_a_line(str(folder / file), remedy=again), open_regular(folder, file) as stream:
        reason = why_different(stream, expected_bytes=size, sha256=None)
        if reason is not None:
            raise CacheDamaged(f"{folder / file} {reason}; {again}")
        return stream.read(size)


def parse_manifest(read: Callable[[], bytes], read_file: Callable[[str, int], bytes], *, name: str) -> Manifest:
    """The manifest from the bytes that `read` gives, its index from those that `read_file(file, size)` gives; `name` is what
    errors call it. Raises as `read_manifest` does."""
    try:
        data = parse_json(read())  # read in here: nobody else then holds the text
        if data.pop("format") != "teachercache":
            raise ValueError("it is not a teachercache manifest")
        version, digest = data["format_version"], data.pop("digest")
        if version not in (manifest_v1.FORMAT_VERSION, FORMAT_VERSION):
            raise CacheError(
                f"{name} has format version {version}, this version of teachercache reads up to {FORMAT_VERSION}; {UPGRADE}"
            )
        if digest != fingerprint_of(data):
            raise ValueError("its digest does not match: it was edited or damaged")
        check_requires(data, name=name)
        fields = manifest_v1.fields_of(data) if version == manifest_v1.FORMAT_VERSION else _fields_of(data, read_file)
        return _built(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CacheDamaged(
            f"{name} cannot be trusted: {reason}; fetch the cache again or precompute it again"
        ) from None


UPGRADE = f"install a newer version than {__version__}: pip install --upgrade teachercache"


def check_requires(data: Mapping[str, Any], *, name: str) -> None:
    """Raise `CacheError` where a manifest requires something of its reader that this version does not know."""
    missing = sorted({str(feature) for feature in data.get("requires", [])} - FEATURES)
    if missing:
        raise CacheError(
            f"{name} requires {', '.join(missing)[:200]}, which this version of teachercache lacks; {UPGRADE}"
        )


def _fields_of(data: dict[str, Any], read_file: Callable[[str, int], bytes]) -> dict[str, Any]:
    groups = {folder: tuple(sections) for folder, sections in data["groups"].items()}
    check_groups(groups)
    indexed = read_index(data["index"], read_file, groups=list(groups))
    if indexed.shards.totals() != {key: data["totals"][key] for key in indexed.shards.totals()}:
        raise ValueError("its totals are not those of its shards")
    if data["settings_fingerprint"] != fingerprint_of(data["settings"]):
        raise ValueError("its settings_fingerprint does not match its settings")
    found = cache_fingerprint(data["settings_fingerprint"], data["target_digests"], data["corpus"], data["units"])
    if data["fingerprint"] != found:
        raise ValueError("its fingerprint does not match its settings, targets and corpus")
    return {
        **{key: data[key] for key in _PLAIN_KEYS},
        "input_form": data.get("input_form", {}),
        "groups": groups,
        "shards": indexed.shards,
        "files": [*FileTable.from_entries(data["files"]), *indexed.files],
        "index": indexed.index,
        "audit": data["audit"],
    }


def _built(fields: dict[str, Any]) -> Manifest:
    fields["audit"] = Audit(**{key: fields["audit"][key] for key in Audit.__dataclass_fields__})
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
    if work.is_dir():
        units, done = len(list(work.glob("units/*"))), len(list(work.glob("done/*.json")))
        return (
            f"the cache at {folder} is half written ({done} of {units} units are done); "
            "run `teachercache precompute` with its recipe again to finish it"
        )
    return f"{folder} has no {MANIFEST}, so it is no cache; make one with `teachercache precompute RECIPE`"

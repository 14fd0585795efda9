"""`Manifest`: what manifest.json says, as Python, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import FileInfo, ShardTable
from teachercache.cache.files.schema import ROW_COLUMNS
from teachercache.cache.manifest import manifest_v1
from teachercache.config import RowPrefix
from teachercache.errors import CacheDamaged
from teachercache.targets import StoredTargets
from teachercache.tasks.next_token import NEXT_TOKEN

FORMAT_VERSION = 2
QUARANTINE = "quarantine"
JOB_KEYS = manifest_v1.JOB_KEYS
TEACHER_IDENTITY = ("weights_sha256", "commit", "code_sha256")  # of a job's `teacher`: what its numbers follow from
PLAIN_KEYS = (
    "fingerprint", "settings_fingerprint", "settings", "targets", "target_digests", "read_by", "groups", "teacher", "model",
    "corpus", "units", "calibration", "fidelity", "column_bytes", "created_by",
)  # fmt: skip

OPTIONAL_LISTS = ("parents", "sources")  # keys that only composed caches have


@dataclass(frozen=True)
class Audit:
    """Count of where each row of the corpus went: `rows_in = stored + quarantined + deduplicated`."""

    rows_in: int
    stored: int
    quarantined: int
    deduplicated: int
    windowed_documents: int  # documents longer than a sequence …
    extra_windows: int  # … and the windows that they gave beyond their first
    windows_without_targets: int  # windows of stored documents that only hold prompt tokens: not stored
    windows_quarantined: int  # windows of stored documents that have no usable targets: not stored

    def __post_init__(self) -> None:
        for name, count in vars(self).items():
            if type(count) is not int:
                raise CacheDamaged(f"the audit's {name} is no count")
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
    parents: tuple[dict[str, Any], ...] = ()  # caches that it was composed of, and how
    sources: tuple[
        dict[str, Any], ...
    ] = ()  # corpora that its shards came from, where there are several, in their order
    index: tuple[FileInfo, ...] = ()  # files that list the shards, once they are written
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def teacher(self) -> dict[str, Any]:
        """Name, weights and what was asked for of the teacher."""
        return {**self.settings["teacher"], **self.described_teacher}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The teacher's tokenizer, and how rows begin."""
        tokenizer: dict[str, Any] = self.settings["tokenizer"]
        return tokenizer

    @property
    def sequence(self) -> dict[str, Any]:
        """Settings by which documents became rows."""
        sequence: dict[str, Any] = self.settings["sequence"]
        return sequence

    @property
    def task(self) -> dict[str, Any]:
        """The task of the rows: its `name`, and what that task keeps besides."""
        described: dict[str, Any] = self.settings.get("task", {"name": NEXT_TOKEN.name})
        return described

    @property
    def outcomes(self) -> int:
        """Number of outcomes of each distribution: the tokenizer's tokens, where the task does not say otherwise."""
        outcomes: int = self.task.get("outcomes", self.vocabulary_size)
        return outcomes

    @property
    def requires(self) -> list[str]:
        """The features that a reader must know beside this version of the format."""
        return [self.task["name"]] if "task" in self.settings else []

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
        logits: dict[str, Any] = self.targets.get("logits", {})
        return logits

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the teacher's tokenizer."""
        return int(self.tokenizer["vocabulary_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """Equal fingerprints map text to equal ids."""
        return str(self.tokenizer["fingerprint"])

    @property
    def pad_id(self) -> int:
        """Token that fills up batches; never seen by a loss."""
        return int(self.tokenizer["pad_id"])

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
        return str(self.sequence["layout"])

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row."""
        return int(self.sequence["length"])

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
        """Returns the readers of its targets; `basis` is the file of kinds of logits that calibrate: without it they
        know their columns alone."""
        return StoredTargets.of(self.targets, vocabulary_size=self.outcomes, basis=basis)

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
            **{key: getattr(self, "described_teacher" if key == "teacher" else key) for key in PLAIN_KEYS},
            "input_form": self.input_form,
            "format_version": FORMAT_VERSION,
            "requires": self.requires,
            "audit": vars(self.audit),
            "totals": self.shards.totals(),
            "files": [vars(info) for info in self.files if not is_indexed(info)],
            "index": index,
            **{key: list(getattr(self, key)) for key in OPTIONAL_LISTS if getattr(self, key)},
        }
        signed = {"format": "teachercache", **data, "digest": fingerprint_of(data)}
        return json.dumps(signed, indent=1, sort_keys=True) + "\n"


def is_indexed(info: FileInfo) -> bool:
    """Files of which there may be one a unit stand in the index."""
    return info.file.startswith(f"{QUARANTINE}/")


def cache_fingerprint(
    settings_fingerprint: str, target_digests: Mapping[str, str], corpus: Mapping[str, Any], units: Mapping[str, Any]
) -> str:
    """The name of a cache: equal for equal settings, targets and content, wherever the corpus came from."""
    content = {key: value for key, value in corpus.items() if key != "source"}
    identity = {"settings": settings_fingerprint, "targets": dict(target_digests), "corpus": content, "units": units}
    return fingerprint_of(identity)

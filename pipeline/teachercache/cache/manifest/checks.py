"""Checks a manifest's claims against what a cache can be, before anything relies on it.

Digests tell that bytes are those that somebody wrote, not that they make sense. So settings and counts of a manifest are
checked when a cache is opened: all of it is a `ValueError` here; readers name the file. The rows of a record batch are checked
when it is first read (shards/row_checks.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from teachercache.cache.files.bounds import (
    MOST_LENGTH,
    MOST_PREFIX,
    MOST_SHARD_BYTES_A_ROW,
    MOST_TOKENS,
    Count,
    check_files,
    check_sizes,
    validated,
)
from teachercache.cache.files.entries import MOST_COUNT
from teachercache.cache.manifest.model import Manifest
from teachercache.config import SequenceConfig
from teachercache.errors import CacheDamaged, RecipeError
from teachercache.targets import target_kind
from teachercache.targets.layers.kinds import SECTIONS, kind_named
from teachercache.targets.logits.boundary_mass import SECTION as BOUNDARY
from teachercache.targets.logits.kinds import kind_settings
from teachercache.targets.stored import why_unknown


class _Claim(BaseModel):
    """Keys that readers rely on; others are free."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Teacher(_Claim):
    model: str


class _Corpus(_Claim):
    source: str
    held_out: Annotated[float, Field(ge=0, le=1)] = 0.0


class _Model(_Claim):
    parameters: Count = 0
    dtype: str = ""
    architecture: str = ""


class _Tokenizer(_Claim):
    fingerprint: str
    vocabulary_size: int = Field(ge=1, le=MOST_TOKENS)
    pad_id: int = Field(ge=0, lt=MOST_TOKENS)
    prefix_ids: list[Annotated[int, Field(ge=0, lt=MOST_TOKENS)]] = Field([], max_length=MOST_PREFIX)


class _BoundaryMass(_Claim):
    tokens: Count
    set: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # part of a file's name


class _Targets(_Claim):
    logits: dict[str, Any] | None = None
    boundary_mass: dict[str, Any] | None = None


class _Task(_Claim):
    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,63}$")]
    outcomes: int = Field(1, ge=1, le=MOST_TOKENS)


class _Calibration(_Claim):
    positions: Count = 0
    rows: list[str] = []
    sources: list[str] = []


class _Unit(_Claim):
    unit: Count
    positions: Count
    kl: float


class _Fidelity(_Claim):
    positions: Count = 0
    tail: str = ""
    kl: dict[str, float] = {}
    drifting_units: list[_Unit] = []


class _InputForm(_Claim):
    positions: Count = 0
    chosen: str = ""
    nats: dict[str, float] = {}
    better: str | None = None


class _Parent(_Claim):
    fingerprint: str
    by: str
    where: str = ""


class _Source(_Claim):
    source: str
    shards: Annotated[int, Field(ge=1, le=MOST_COUNT)]


class _Described(_Claim):
    teacher: _Teacher
    model: _Model
    corpus: _Corpus
    tokenizer: _Tokenizer
    task: _Task
    targets: _Targets
    units: dict[str, Any]
    column_bytes: dict[str, Count]
    read_by: dict[str, dict[str, Any]]
    calibration: _Calibration
    fidelity: _Fidelity
    input_form: _InputForm
    parents: tuple[_Parent, ...]
    sources: tuple[_Source, ...]
    created_by: str


def check_manifest(manifest: Manifest, *, row_columns: Iterable[str]) -> None:
    """Raise `ValueError`, in one line, for a manifest whose settings or counts cannot be those of a cache."""
    names = list(_Described.model_fields)
    validated(_Described.model_validate, {name: getattr(manifest, name) for name in names})
    validated(lambda text: SequenceConfig.model_validate_json(text, strict=True), json.dumps(manifest.sequence))
    if manifest.sequence_length > MOST_LENGTH:
        raise ValueError(f"sequence.length is {manifest.sequence_length}, at most {MOST_LENGTH} is possible")
    if manifest.pad_id >= manifest.vocabulary_size:
        raise ValueError(f"tokenizer.pad_id is {manifest.pad_id}, of {manifest.vocabulary_size} tokens")
    if max(manifest.prefix_ids, default=0) >= manifest.vocabulary_size:
        raise ValueError(f"tokenizer.prefix_ids are {manifest.prefix_ids}, of {manifest.vocabulary_size} tokens")
    missing = set(row_columns) - set(manifest.column_bytes)
    if missing:
        raise ValueError(f"column_bytes has no {min(missing)}")
    if manifest.sources and sum(run["shards"] for run in manifest.sources) != len(manifest.shards):
        raise ValueError("its sources are of more or fewer shards than it has")
    _check_counts("audit", vars(manifest.audit))
    if (manifest.shards.sizes() / (1 + manifest.shards.counted("rows")) > MOST_SHARD_BYTES_A_ROW).any():
        raise ValueError("a shard has more bytes than its rows can take")
    check_sizes(manifest.files)
    check_files([*manifest.shards.names(), *(info.file for info in (*manifest.files, *manifest.index))])
    targets = manifest.targets
    known = {section for section in targets if why_unknown(section, targets) is None}
    if "logits" in known:
        _check_settings(manifest.logits, manifest.outcomes)
    if targets.get(BOUNDARY) is not None and BOUNDARY in known:
        validated(_BoundaryMass.model_validate, targets[BOUNDARY])
    for section in SECTIONS:
        if section in known:
            _check_layers(section, targets, longest=manifest.sequence_length)


def _check_layers(section: str, targets: Mapping[str, Any], *, longest: int) -> None:
    """Checks settings of a kind that this version knows; others are refused where they are read."""
    settings = targets[section]
    if not isinstance(settings, dict):
        raise ValueError(f"targets.{section} is no mapping")
    kind = kind_named(section, settings)
    if kind is not None:
        claim = kind.claim
        validated(lambda values: claim.model_validate(values).check(section, targets, longest=longest), settings)


def _check_settings(settings: Mapping[str, Any], vocabulary_size: int) -> None:
    """Checks settings of a kind that this version knows, by the rules that recipes are under; others are refused where
    they are read."""
    kind = settings.get("kind")
    if not isinstance(kind, str):
        raise ValueError("targets.logits.kind is no text")
    claim = kind_settings(kind)
    if claim is None:
        return
    chosen = claim.left_open(settings)  # by calibration
    stated = {name: value for name, value in settings.items() if value is not None or name not in chosen}
    if None in stated.values():
        raise ValueError("a setting of targets.logits has no value")
    validated(lambda text: claim.model_validate_json(text, strict=True), json.dumps(stated))
    try:
        target_kind(settings, vocabulary_size=vocabulary_size)
    except (RecipeError, CacheDamaged) as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"targets.logits has no {error}") from None


def _check_counts(what: str, entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        # A bool is an int in Python, but no count.
        if not (type(value) is int and 0 <= value <= MOST_COUNT):
            raise ValueError(f"{what}: a value of {name} is no count")

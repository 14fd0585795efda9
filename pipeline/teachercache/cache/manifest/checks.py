"""What a cache says of itself, held against what it can be, before anything relies on it.

Digests tell that bytes are those that somebody wrote, not that they make sense. So settings and counts of a manifest are
checked when a cache is opened, and the rows of a record batch when it is first read: sizes that nothing can have, ids
outside the vocabulary, columns that contradict each other. All of it is a `ValueError` here; readers name the file.

What a batch costs in memory is bounded before it is decompressed (ipc_blocks.py), what a row's column costs before it is
decoded (targets/coding/columns.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from teachercache.cache.files.entries import MOST_COUNT
from teachercache.cache.shards.row_batch import numbers, offsets
from teachercache.config import TARGET_KINDS, LogitsConfig, SequenceConfig
from teachercache.errors import CacheDamaged, RecipeError
from teachercache.targets import target_kind
from teachercache.targets.layers.attention_maps import check_length
from teachercache.targets.stored import SECTIONS

if TYPE_CHECKING:
    from teachercache.cache.manifest.manifest import Manifest

MOST_TOKENS = 2**24  # of a vocabulary
MOST_LENGTH = 2**24  # tokens of a row
MOST_PREFIX = 64  # tokens that every row begins with
MOST_BATCH_BYTES = 2**29  # decompressed; see `writer.BATCH_BYTES`, a single row may be larger

Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]


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
    boundary_mass: _BoundaryMass | None = None


Number = Annotated[int, Field(ge=1, le=2**20)]  # of layers, heads or channels
Step = Annotated[float, Field(gt=0, le=1000)]


class _Layers(_Claim):
    layers: list[Annotated[int, Field(ge=0, le=2**20)]] = Field(min_length=1)
    width: Number
    blocks: Number


class _HiddenStates(_Layers):
    codec: str
    step: Annotated[float, Field(ge=0, le=1000)]
    calibration_positions: Count


class _Relations(_Layers):
    layers: list[Number] = Field(min_length=1)
    heads: Number
    key_heads: Number
    head_width: Number
    values: bool


class _QueriesKeys(_Relations):
    step: Step
    calibration_positions: Count


class _Maps(_Layers):
    layers: list[Number] = Field(min_length=1)
    heads: Number
    teacher_heads: Number
    key_heads: Number
    head_width: Number
    top: Annotated[int, Field(ge=1, le=1024)] | None


_LAYER_CLAIMS: dict[tuple[str, str], type[_Layers]] = {
    ("hidden", "hidden"): _HiddenStates,
    ("attention", "relations"): _Relations,
    ("attention", "queries-keys"): _QueriesKeys,
    ("attention", "maps"): _Maps,
}


class _Calibration(_Claim):
    basis: str | None = None
    layers: str | None = None
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


class _Described(_Claim):
    teacher: _Teacher
    model: _Model
    corpus: _Corpus
    tokenizer: _Tokenizer
    targets: _Targets
    units: dict[str, Any]
    column_bytes: dict[str, Count]
    calibration: _Calibration
    fidelity: _Fidelity
    input_form: _InputForm
    created_by: str


_LOGITS: TypeAdapter[Any] = TypeAdapter(LogitsConfig)


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
    _check_counts("audit", vars(manifest.audit))
    check_files([*manifest.shards.names(), *(info.file for info in (*manifest.files, *manifest.index))])
    if "logits" in manifest.targets:
        _check_settings(manifest.logits, manifest.vocabulary_size)
    for section in SECTIONS:
        if section in manifest.targets:
            _check_layers(section, manifest.targets, longest=manifest.sequence_length)


def _check_layers(section: str, targets: Mapping[str, Any], *, longest: int) -> None:
    """Of a kind that this version knows; others are refused where they are read."""
    settings = targets[section]
    if not isinstance(settings, dict):
        raise ValueError(f"targets.{section} is no mapping")
    claim = _LAYER_CLAIMS.get((section, str(settings.get("kind", section))))
    if claim is None:
        return
    validated(claim.model_validate, settings)
    layers = settings["layers"]
    if sorted(set(layers)) != layers or layers[-1] > settings["blocks"]:
        raise ValueError(
            f"targets.{section}.layers do not rise, each once, up to the teacher's {settings['blocks']} blocks"
        )
    if settings.get("codec", "bf16") != "bf16" and not settings["step"] > 0:
        raise ValueError(f"targets.{section}.step is none")
    if section == "attention":
        _check_heads(settings, longest=longest)
    if settings.get("kind") == "relations":
        stored = set((targets.get("hidden") or {}).get("layers", ()))
        if missing := {layer - 1 for layer in layers} - stored:
            raise ValueError(f"targets.attention needs hidden state {min(missing)}, which is not stored")


def _check_heads(settings: Mapping[str, Any], *, longest: int) -> None:
    theirs = settings.get("teacher_heads", settings["heads"])
    if theirs % settings["key_heads"] or theirs % settings["heads"]:
        raise ValueError(
            f"targets.attention has {theirs} heads, {settings['key_heads']} of keys, and {settings['heads']} of them stored"
        )
    if settings["kind"] == "maps":
        check_length(longest, heads=settings["heads"], layers=len(settings["layers"]), top=settings["top"])


def validated(validate: Any, value: Any) -> None:
    """Run a check of pydantic's; raises `ValueError` with the first thing that is wrong, in one line."""
    try:
        validate(value)
    except ValidationError as error:
        wrong = [each for each in error.errors() if each["type"] != "extra_forbidden"]  # keys of a later version
        if not wrong:
            return
        first = wrong[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg'][:200]}") from None


def _check_settings(settings: Mapping[str, Any], vocabulary_size: int) -> None:
    """Of a kind that this version knows, by the rules that recipes are under; others are refused where they are read."""
    kind = settings.get("kind")
    if not isinstance(kind, str):
        raise ValueError("targets.logits.kind is no text")
    if kind not in TARGET_KINDS:
        return
    chosen = ("rank", "step") if settings.get("target_kl") is not None else ()  # by calibration
    given = {name: value for name, value in settings.items() if value is not None or name not in chosen}
    if None in given.values():
        raise ValueError("a setting of targets.logits has no value")
    validated(lambda text: _LOGITS.validate_json(text, strict=True), json.dumps(given))
    try:
        target_kind(settings, vocabulary_size=vocabulary_size)
    except (RecipeError, CacheDamaged) as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"targets.logits has no {error}") from None


def check_files(names: Sequence[str]) -> None:
    """Raise `ValueError` for a file that is listed twice."""
    if len(set(names)) < len(names):
        raise ValueError("it lists a file twice")


def _check_counts(what: str, entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        # A bool is an int in Python, but no count.
        if not (type(value) is int and 0 <= value <= MOST_COUNT):
            raise ValueError(f"{what}: a value of {name} is no count")


def check_rows(batch: pa.RecordBatch, *, vocabulary_size: int, longest: int, first: int, held_out_from: int) -> None:
    """Raise `ValueError` for a record batch whose rows cannot be; `first` is the index of its first row in the shard.

    Costs about 0.2 ms a batch, which holds the rows of about 1 MiB of targets.
    """
    check_values(batch, first)
    if pc.count_distinct(batch.column("row_id")).as_py() < batch.num_rows:
        raise ValueError("two rows have the same row_id")
    lengths = _lengths(batch.column("input_ids"))
    if lengths.min() < 1 or lengths.max() > longest:
        raise ValueError(f"a row has {lengths.min()} or {lengths.max()} tokens, between 1 and {longest} are possible")
    tokens = _flat(batch, "input_ids")
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise ValueError(f"input_ids hold {tokens.min()} or {tokens.max()}, of {vocabulary_size} tokens")
    held_out = numbers(batch.column("held_out"))
    if (held_out != (np.arange(first, first + len(held_out)) >= held_out_from)).any():
        raise ValueError("rows are not on the side, held out or not, that the manifest counts them on")
    marked = _check_masks(batch, lengths)
    if marked[np.cumsum(lengths) - 1].any():
        raise ValueError("the last token of a segment has a target")
    if "segments" in batch.schema.names:  # else they are not asked for
        _check_segments(batch, lengths, marked)


def check_values(batch: pa.RecordBatch, first: int) -> None:
    """Raise `ValueError` for a record batch whose columns are not what Arrow can read, or lack a value."""
    batch.validate(full=True)  # offsets and text: Arrow itself reads wherever they say
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            raise ValueError(f"column {name} has no value in some row")


def _check_masks(batch: pa.RecordBatch, lengths: Any) -> Any:
    """The flat target mask, bool."""
    if (_lengths(batch.column("target_mask")) != lengths).any():
        raise ValueError("a row's target_mask is not as long as its input_ids")
    marked = _flat(batch, "target_mask")
    ends = np.cumsum(lengths)
    counted = np.diff(np.cumsum(marked)[ends - 1], prepend=0)
    if (counted != numbers(batch.column("positions"))).any():
        raise ValueError("a row's positions are not those that its target_mask marks")
    return marked


def _check_segments(batch: pa.RecordBatch, lengths: Any, marked: Any) -> None:
    """Segments begin at the row's first token, follow each other within it, and end in a token without a target."""
    segments = batch.column("segments")
    counts, fields = _lengths(segments), segments.flatten()
    if counts.min() < 1 or fields.null_count:
        raise ValueError("a row has no segment")
    for index in range(fields.type.num_fields):
        if fields.field(index).null_count and fields.type.field(index).name != "text":
            raise ValueError(f"a segment has no {fields.type.field(index).name}")
    starts = numbers(fields.field("start")).astype(np.int64)
    firsts = np.cumsum(counts) - counts
    rising = np.diff(starts) > 0
    rising[firsts[1:] - 1] = True
    if starts[firsts].any() or not rising.all() or (starts >= np.repeat(lengths, counts)).any():
        raise ValueError("segments do not follow each other within their row")
    begins, finishes, occurrences = (numbers(fields.field(n)) for n in ("byte_start", "byte_end", "occurrence"))
    if begins.min() < 0 or (begins > finishes).any() or occurrences.min() < 0:
        raise ValueError("a segment's span of bytes cannot be")
    if fields.type.get_field_index("contents") >= 0:  # shards of earlier caches have none
        _check_contents(fields.field("contents"), finishes - begins)
    row_starts = np.cumsum(lengths) - lengths
    last_tokens = np.append(np.repeat(row_starts, counts) + starts, len(marked))[1:] - 1
    if marked[last_tokens].any():
        raise ValueError("the last token of a segment has a target")


def _check_contents(contents: Any, sizes: Any) -> None:
    """Contents of messages ascend within the bytes of their segment."""
    counts, fields = _lengths(contents), contents.flatten()
    if not len(fields):
        return
    if fields.null_count or any(fields.field(index).null_count for index in range(fields.type.num_fields)):
        raise ValueError("a content of a segment has no role, start or end")
    starts, ends = (numbers(fields.field(name)).astype(np.int64) for name in ("start", "end"))
    before = np.append(0, ends[:-1])
    before[(np.cumsum(counts) - counts)[counts > 0]] = 0
    if (starts < before).any() or (ends <= starts).any() or (ends > np.repeat(sizes, counts)).any():
        raise ValueError("contents of messages do not follow each other within their segment")


def _lengths(lists: pa.ListArray) -> Any:
    return np.diff(offsets(lists)).astype(np.int64)


def _flat(batch: pa.RecordBatch, name: str) -> Any:
    values = batch.column(name).flatten()
    if values.null_count:
        raise ValueError(f"column {name} has an entry without a value")
    return numbers(values)

"""The shape of each file in `.work/` of an unfinished precompute job; see `records.read_shaped`."""

from __future__ import annotations

from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache.files.bounds import Count
from teachercache.precompute.engine.records import Empty, File, Shard


class Counted(TypedDict):
    """The corpus, as it was counted; see `Plan`."""

    within: str
    look: str
    units: Count
    rows_in: Count
    deduplicated: Count
    files: list[File]
    staged: NotRequired[Count]  # files of documents


class Planned(TypedDict):
    """plan.json."""

    format_version: int
    identity: dict[str, Any]
    files: list[File]
    counted: Counted


class Seen(TypedDict):
    """See `plan.remember`."""

    look: str
    digest: str


class Fidelity(TypedDict):
    """See `Drift.result`."""

    positions: Count
    tail: str
    kl: dict[str, float]


class Loaded(TypedDict):
    """See `Teacher.describe`."""

    architecture: str
    parameters: Count
    dtype: str


class Record(TypedDict):
    """Record of a finished unit."""

    documents: Count
    quarantined_documents: Count
    windowed_documents: Count
    extra_windows: Count
    windows_without_targets: Count
    windows_quarantined: Count
    teacher: Loaded
    fidelity: Fidelity | Empty
    read_by: dict[str, dict[str, str]]
    shard: Shard | None
    quarantine: File | None
    column_bytes: dict[str, Count]
    job: NotRequired[str]  # see `Plan.job`


class Calibration(TypedDict):
    """See `Plan.calibration`."""

    positions: Count
    rows: list[str]
    sources: list[str]
    read_by: dict[str, dict[str, str]]


class InputForm(TypedDict):
    """See input_form.py."""

    positions: Count
    nats: dict[str, float]
    chosen: str
    better: str | None


PLANNED: TypeAdapter[Any] = TypeAdapter(Planned)
RECORD: TypeAdapter[Any] = TypeAdapter(Record)
CALIBRATION: TypeAdapter[Any] = TypeAdapter(Calibration)
SEEN: TypeAdapter[Any] = TypeAdapter(Seen)
INPUT_FORM: TypeAdapter[Any] = TypeAdapter(InputForm | Empty)

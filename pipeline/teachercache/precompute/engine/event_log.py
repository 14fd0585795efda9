"""Event log of a job: a line of JSON for each event, beside the cache and not in it, where all files are listed."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teachercache.config import is_url
from teachercache.config.location import folder_name


def log_file(cache: Path | str) -> Path:
    """The log of the jobs that write to a cache: `NAME.precompute.log.jsonl` in the folder that the cache is in; of a cache at
    a URL in the current one."""
    folder = Path(folder_name(cache.partition("?")[0])) if isinstance(cache, str) and is_url(cache) else Path(cache)
    return folder.parent / f"{folder.name}.precompute.log.jsonl"


class EventLog:
    """Appends events to a file, whose earlier lines are those of earlier runs."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def write(self, event: str, **values: Any) -> None:
        """Append an event with the time, UTC. A log that cannot be written ends no job."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, default=str) + "\n")

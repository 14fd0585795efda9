"""Progress of a job: by positions, in a line, in a log beside the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from teachercache.precompute.engine import progress
from teachercache.precompute.engine.event_log import EventLog, log_file
from teachercache.precompute.engine.progress import ProgressDisplay
from teachercache.precompute.engine.timing import Timing


def timing_of(*units: dict[str, Any], seconds: float, pending: int = 10, documents: float = 1000) -> Timing:
    timing = Timing(pending=pending, documents=documents, actors=2)
    for unit in units:
        timing.add(**{"rows": 5, "size": 10**6, "stage_seconds": {}, **unit})
    timing.working_seconds = seconds
    return timing


def test_what_is_left_follows_from_positions_and_not_from_units() -> None:
    """The first unit has most of the documents: a tenth of the units is more than half of the work."""
    timing = timing_of({"documents": 600, "positions": 60_000}, seconds=30.0)
    assert timing.rate == 2000 and timing.positions_left == 40_000 and timing.seconds_left == 20
    assert timing.describe() == "5 rows, 60,000 positions, 1.0 MB, 2,000 positions/s, about 20 s left"


def test_nothing_is_left_at_the_end_and_nothing_is_known_at_the_beginning() -> None:
    assert timing_of(seconds=0.0).seconds_left == 0 == timing_of(seconds=0.0).rate
    done = timing_of({"documents": 900, "positions": 9}, seconds=7200.0, pending=1)
    assert done.seconds_left == 0 and "left" not in done.describe()
    slow = timing_of({"documents": 100, "positions": 100}, seconds=1000.0)
    assert "about 2 h 30 min left" in slow.describe()


def test_stages_are_shares_of_the_actors_time() -> None:
    stages = {"reading": 1.0, "tokenising": 3.0, "forward": 12.0, "encoding": 2.0, "writing": 1.0}
    timing = timing_of({"documents": 1, "positions": 1, "stage_seconds": stages}, seconds=10.0)
    assert timing.utilisation() == {
        "reading": 0.05, "tokenising": 0.15, "forward": 0.6, "encoding": 0.1, "writing": 0.05, "waiting": 0.25,
    }  # fmt: skip
    assert Timing().utilisation() == {}


def test_where_there_is_no_terminal_a_plain_line_comes_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = timing_of({"documents": 600, "positions": 60_000}, seconds=30.0)
    with (tmp_path / "said").open("w") as stream:
        display = ProgressDisplay(Console(file=stream), timing)
        with display.shown():
            display.update()
            monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
            display.update()
    assert (tmp_path / "said").read_text() == f"1 of 10 units: {timing.describe()}\n"


def test_events_are_lines_beside_the_cache_and_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    assert log_file(cache) == tmp_path / "new" / "cache.precompute.log.jsonl"
    log = EventLog(log_file(cache))
    log.write("unit", unit=3, folder=cache)
    log.write("finished")
    first, second = map(json.loads, log_file(cache).read_text().splitlines())
    assert (first["event"], first["unit"], first["folder"], second["event"]) == ("unit", 3, str(cache), "finished")
    assert first["time"] <= second["time"]
    (tmp_path / "file").write_text("")
    EventLog(tmp_path / "file" / "log").write("lost")

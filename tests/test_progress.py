"""Progress of commands: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from teachercache import progress
from teachercache.progress import ShownProgress


def shown(*, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100)
    with ShownProgress(console, "checking") as bar:
        bar.begin("bytes", 300)
        bar.advance(100)
        bar.begin("bytes", 100)  # of an alignment
        bar.advance(300)
        bar.begin("rows", 10)
        bar.advance(4)
        bar.advance(6)
    return written.getvalue()


def test_a_terminal_shows_a_bar_for_each_thing() -> None:
    text = shown(terminal=True)
    assert "checking bytes" in text and "checking rows" in text and "100%" in text


def test_elsewhere_lines_say_how_far_it_is_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "NEXT_LINES", 0.0)
    assert shown(terminal=False).splitlines() == ["checking: 100 of 300 bytes", "checking: 4 of 10 rows"]


def test_what_is_done_at_once_prints_nothing() -> None:
    assert shown(terminal=False) == ""

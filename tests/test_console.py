"""Text of a cache that is printed cannot command the terminal."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from teachercache.console import PlainTextConsole, run_command, without_controls
from teachercache.errors import CacheDamaged

HOSTILE = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08" * 4, "\u202eevil", "\u2066x", "\x7f", "\u2028"]


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_spelled_out(text: str) -> None:
    shown = without_controls(text)
    assert shown.isprintable() and "\\" in shown


def test_plain_text_stays() -> None:
    text = "Größe ▁the 日本\n\ttab é"
    assert without_controls(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_printed_reaches_the_terminal_raw(text: str) -> None:
    file = io.StringIO()
    console = PlainTextConsole(file=file, force_terminal=False, width=200)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(Text(text))
    console.print(text, markup=False)
    console.print(Text(f"in {text} text"))
    console.print(table)
    assert all(line.isprintable() for line in file.getvalue().split("\n"))


def test_colours_of_ones_own_stay() -> None:
    file = io.StringIO()
    PlainTextConsole(file=file, force_terminal=True, color_system="standard").print(Text("red", style="red"))
    assert "\x1b[31m" in file.getvalue()


def test_errors_are_printed_plain(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> dict[str, object]:
        raise CacheDamaged("shards/\x1b[31m.arrow is missing")

    assert run_command(fail, as_json=False, show=lambda result: None) == 1
    assert "\x1b[31m" not in capfd.readouterr().err


def test_a_traceback_is_printed_plain(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> dict[str, object]:
        raise ZeroDivisionError("\x1b[2J\x1b]0;title\x07 of a cache")

    assert run_command(fail, as_json=False, show=lambda result: None) == 1
    printed = capfd.readouterr().err
    assert "ZeroDivisionError: \\x1b[2J" in printed and "Traceback" in printed
    assert all(line.isprintable() for line in printed.split("\n"))

"""Text of a cache that is printed cannot command the terminal; a command's exit status is its own."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from teachercache.console import PlainTextConsole, run_command, without_controls
from teachercache.errors import CacheDamaged
from teachercache.files import same_imports

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


def test_an_error_is_one_line_that_keeps_its_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> dict[str, object]:
        raise CacheDamaged("shards/a" + "\nok: all files are whole" * 10**5 + "; fetch the cache again")

    assert run_command(fail, as_json=True, show=lambda result: None) == 1
    said = capfd.readouterr()
    message = json.loads(said.out)["error"]
    assert len(message) < 2000 and message.isprintable()
    assert message.startswith(r"shards/a\nok") and message.endswith("fetch the cache again")
    assert said.err == f"error: {message}\n"


def test_a_library_that_is_not_installed_is_the_users_to_install(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_: object) -> dict[str, object]:
        return vars(importlib.import_module("ray.data"))

    monkeypatch.setitem(sys.modules, "ray", None)  # Python's own way to say that there is none
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    assert run_command(work, as_json=False, show=lambda result: None) == 2
    told = capfd.readouterr().err
    assert "needs ray, which is not installed" in told and '"teachercache[precompute]"' in told
    assert "Traceback" not in told


def test_a_traceback_is_printed_plain(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> dict[str, object]:
        raise ZeroDivisionError("\x1b[2J\x1b]0;title\x07 of a cache")

    assert run_command(fail, as_json=False, show=lambda result: None) == 1
    printed = capfd.readouterr().err
    assert "ZeroDivisionError: \\x1b[2J" in printed and "Traceback" in printed
    assert all(line.isprintable() for line in printed.split("\n"))


def test_last_words_that_nobody_reads_are_no_status() -> None:
    """As a library says them at the very end, when the connection that showed them has broken."""
    code = (
        "import sys; from teachercache.console import run_command\n"
        "print(flush=True); sys.stdin.readline()\n"
        "status = run_command(lambda console: {}, as_json=True, show=str)\n"
        "sys.stderr.write('no end of line'); sys.exit(status)"
    )
    command, pipes = [sys.executable, "-c", code], dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=same_imports(), **pipes, text=True)  # type: ignore[call-overload]
    process.stdout.readline()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0 and process.stdout.read() == "{}\n"

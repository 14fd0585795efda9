"""Commands of installed extensions: found where they are asked for, listed in help, and never in the way of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teachercache.cli import COMMANDS
from teachercache.files import same_imports
from teachercache.registry import GROUP

COMMAND = """
import typer
from teachercache.cli import COMMANDS

@COMMANDS.register
def count_to(most: int) -> None:
    \"\"\"Count.\"\"\"
    print(*range(1, most + 1))
    raise typer.Exit(0)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with an installed package, as `pip install --target` leaves it."""
    (tmp_path / "counting.py").write_text(COMMAND)
    about = tmp_path / "counting-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\ncounting = counting\n")
    return tmp_path


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **same_imports(), "COLUMNS": "200"}
    environment["PYTHONPATH"] += f":{installed}"
    return subprocess.run(
        [sys.executable, "-m", "teachercache", *arguments], env=environment, capture_output=True, text=True
    )


def test_a_command_of_an_installed_extension_runs_and_is_listed(installed: Path) -> None:
    done = run(installed, "count-to", "3")
    assert (done.returncode, done.stdout) == (0, "1 2 3\n"), done.stderr
    assert "count-to" in run(installed, "--help").stdout
    wrong = run(installed, "count-to", "three")
    assert wrong.returncode == 2 and "Usage:" in wrong.stderr


def test_an_extension_that_fails_is_told_of_and_takes_no_command_away(installed: Path) -> None:
    (installed / "counting.py").write_text("import nowhere_to_be_found")
    told = "the extension counting (counting) cannot be imported: No module named"
    shown = run(installed, "--help")
    assert shown.returncode == 0 and told in shown.stderr and all(name in shown.stdout for name in COMMANDS)
    asked = run(installed, "count-to", "3")
    assert asked.returncode == 2 and told in " ".join(asked.stderr.split()) and "Traceback" not in asked.stderr
    own = run(installed, "verify", str(installed / "none"))
    assert own.returncode == 2 and told not in own.stderr


def test_a_name_that_nobody_has_is_a_usage_error(installed: Path) -> None:
    done = run(installed, "verif", "x")
    assert done.returncode == 2 and "No such command 'verif'" in done.stderr and "'verify'" in done.stderr

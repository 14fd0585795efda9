"""The examples of the documentation run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from builders import build_cache, tiny_recipe, tiny_teacher
from pages import ROOT, text_of

EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, *arguments: str | Path) -> None:
    """An example as a script."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache, and a student of its tokenizer."""
    folder = tmp_path_factory.mktemp("examples")
    return build_cache(tiny_recipe(folder)), tiny_teacher(folder / "student", seed=5, layers=1)


def test_examples_are_short_and_shown() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
        assert path.name in text_of(ROOT / "docs" / "guides" / "python.md")


def test_read_a_cache(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("read_a_cache.py", made[0])
    said = capsys.readouterr().out
    assert said.count("  token ") == 6 and "positions" in said


def test_train_from_python(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train_from_python.py", *made, tmp_path / "run", "2")
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.slow
def test_change_a_recipe(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache, student = made
    settings = {"output": "unused", "max_steps": 1, "trackers": [], "loader_workers": 0}
    recipe = {"cache": str(cache), "student": {"model": str(student)}, "train": settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run("change_a_recipe.py", "recipe.yaml", "1", "2")
    assert all((tmp_path / "runs" / f"temperature-{T}" / "summary.json").is_file() for T in (1, 2))

"""Docstrings begin with a verb or a noun: they say what a thing does or is, not "what …", "of …" or "whether …"."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import teachercache

PACKAGE = Path(teachercache.__file__).parent
TESTS = Path(__file__).parent
NO_BEGINNINGS = {"What", "Of", "Whether", "How", "Which", "Where", "Who", "Why"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def wrong_in(text: str) -> Iterator[str]:
    """Names of what has a docstring that begins so."""
    for node in ast.walk(ast.parse(text)):
        words = (ast.get_docstring(node) or "").split() if isinstance(node, Documented) else []
        if words and words[0] in NO_BEGINNINGS:
            yield getattr(node, "name", "the module")


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    assert list(wrong_in('def f():\n    "Of a thing."')) == ["f"]
    wrong = {
        f"{path}: {name}"
        for folder in (PACKAGE, TESTS, TESTS.parent / "infra")
        for path in folder.rglob("*.py")
        for name in wrong_in(path.read_text(encoding="utf-8"))
    }
    assert not wrong

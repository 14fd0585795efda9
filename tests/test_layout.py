"""Test modules can be read, run and moved alone: what several use is in `conftest.py` or in a named helper module."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported_by(path: Path) -> set[str]:
    """Modules, and names in modules, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def test_no_file_imports_a_test_module_or_a_conftest() -> None:
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"conftest"}
    assert "test_layout" in modules
    found = {
        f"{path.relative_to(TESTS)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imported_by(path)
        if modules.intersection(name.split("."))
    }
    assert not found

"""Test modules can be read, run and moved alone: what several use is in `conftest.py` or in a named helper module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "pipeline" / "teachercache"


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


NO_MODULES = {"teachercache.nothing", "teachercache.extensions"}  # ours, and a group of entry points
BESIDE_THE_PACKAGE = {"bench", "docs", "zoo"}  # what their tests are about is no folder of the package


def test_folders_are_those_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert Path("training/trainer") in folders
    inside = {folder for folder in folders if folder.parts and folder.parts[0] not in BESIDE_THE_PACKAGE}
    assert not {str(folder) for folder in inside if not (PACKAGE / folder / "__init__.py").is_file()}


def test_no_test_imports_a_private_name() -> None:
    found = {
        f"{path.relative_to(TESTS)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imported_by(path)
        if name.startswith("teachercache.") and any(re.match(r"_(?!_)", part) for part in name.split("."))
    }
    assert not found


def named_in(path: Path) -> set[str]:
    """Dotted names of our package in a file, those inside programs and patches too."""
    return set(re.findall(r"\bteachercache(?:\.[a-zA-Z]\w*)+", path.read_text(encoding="utf-8")))


def exists(name: str) -> bool:
    """Tells whether it is a module, or a word of the module that its beginning names."""
    place = PACKAGE
    for part in name.split(".")[1:]:
        if (place / part).is_dir():
            place = place / part
        elif (place / f"{part}.py").is_file():
            place = place / f"{part}.py"
        else:
            text = (place / "__init__.py" if place.is_dir() else place).read_text(encoding="utf-8")
            return re.search(rf"\b{part}\b", text) is not None
    return True


def test_names_of_modules_in_programs_and_patches_exist() -> None:
    """A move rewrites imports; what stands in a string fails only where it runs, in a slow test or on a user's machine."""
    assert exists("teachercache.files.locked") and not exists("teachercache.nothing")
    files = [
        *TESTS.rglob("*.py"),
        *(ROOT / "infra").rglob("*.py"),
        *(ROOT / "jobs").rglob("*.py"),
        *PACKAGE.rglob("*.py"),
    ]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in named_in(path) - NO_MODULES
        if not exists(name)
    }
    assert not missing

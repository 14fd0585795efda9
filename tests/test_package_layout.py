"""The layout of the package: rooms of a size, manuals that name what is in them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import teachercache

PACKAGE = Path(teachercache.__file__).parent
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})
MOST_MODULES = 14


def modules_of(folder: Path) -> list[str]:
    """Names of a folder's modules, without `__init__.py`."""
    return sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")


def name_of(folder: Path) -> str:
    return ".".join(("teachercache", *folder.relative_to(PACKAGE).parts))


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_no_folder_is_a_hall(folder: Path) -> None:
    assert len(modules_of(folder)) <= MOST_MODULES, (
        f"{name_of(folder)} has {len(modules_of(folder))} modules: make wings"
    )


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != PACKAGE], ids=name_of)
def test_a_package_docstring_names_every_module_and_folder_in_it(folder: Path) -> None:
    manual = importlib.import_module(name_of(folder)).__doc__ or ""
    wings = [f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").exists()]
    missing = [name for name in modules_of(folder) + wings if name not in manual]
    assert not missing, f"the docstring of {name_of(folder)} does not say what these are: {', '.join(missing)}"


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != PACKAGE], ids=name_of)
def test_a_package_is_a_face_and_holds_no_implementation(folder: Path) -> None:
    text = (folder / "__init__.py").read_text()
    assert "\ndef " not in text and "\nclass " not in text, (
        f"{name_of(folder)} has code in its __init__.py: give it a module"
    )

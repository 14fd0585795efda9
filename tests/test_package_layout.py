"""The layout of the package: rooms of a size, manuals that name what is in them, and no circles."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import grimp
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


def test_no_siblings_import_each_other_in_a_circle() -> None:
    """Lazy imports and those for type checking count: a circle that is hidden is a circle."""
    graph = grimp.build_graph("teachercache", cache_dir=None)
    circles = [circle for package in map(name_of, FOLDERS) for circle in circles_below(graph, package)]
    assert not circles, "; ".join(" → ".join(circle) for circle in circles)


def circles_below(graph: grimp.ImportGraph, package: str) -> Iterator[tuple[str, ...]]:
    """A circle among the children of a package, each child with all that is below it; none where there is none."""
    children = sorted(graph.find_children(package))

    def imports(importer: str, imported: str) -> bool:
        return graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)

    left = {child: {other for other in children if other != child and imports(child, other)} for child in children}
    while leaves := [child for child, arrows in left.items() if not arrows & left.keys()]:
        for leaf in leaves:
            del left[leaf]
    if left:
        yield walk(left)


def walk(arrows: dict[str, set[str]]) -> tuple[str, ...]:
    """One circle of a graph in which every node has an arrow to another one that is in it."""
    path = [min(arrows)]
    while (following := min(arrows[path[-1]] & arrows.keys())) not in path:
        path.append(following)
    return (*path[path.index(following) :], following)


def test_a_circle_is_found() -> None:
    graph = grimp.ImportGraph()
    for name in ("p", "p.a", "p.b", "p.c"):
        graph.add_module(name)
    graph.add_import(importer="p.c", imported="p.a")
    graph.add_import(importer="p.a", imported="p.b")
    assert list(circles_below(graph, "p")) == []
    graph.add_import(importer="p.b", imported="p.a")
    assert list(circles_below(graph, "p")) == [("p.a", "p.b", "p.a")]

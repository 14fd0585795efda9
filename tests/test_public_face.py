"""The public face: what `teachercache` exports, and what it takes to import it."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tomllib

import pytest

import teachercache

from pages import ROOT, text_of

FACE = [
    "Cache",
    "CacheDamaged",
    "CacheError",
    "CorpusError",
    "DistillationTrainer",
    "JobFailed",
    "ModelError",
    "ObjectiveConfig",
    "Recipe",
    "RecipeError",
    "TeachercacheError",
    "UserError",
    "__version__",
    "init_student",
    "load_recipe",
    "parse_recipe",
    "run_align",
    "run_evaluation",
    "run_precompute",
    "run_sampling",
    "run_training",
    "verify",
]


def test_the_face_is_what_users_may_rely_on() -> None:
    """A name that leaves is a breaking change; one that comes belongs into the changelog and the Python reference."""
    assert sorted(teachercache.__all__) == sorted(FACE) == dir(teachercache)


@pytest.mark.parametrize("name", [name for name in FACE if name != "__version__"])
def test_every_name_is_there_with_documentation(name: str) -> None:
    value = getattr(teachercache, name)
    assert callable(value) and (inspect.getdoc(value) or "").strip()
    assert name in text_of(ROOT / "docs" / "reference" / "python.md")


@pytest.mark.parametrize("name", ["Cachee", "student"])
def test_a_name_that_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(teachercache, name)


def test_reading_a_cache_through_the_face_loads_neither_torch_nor_ray() -> None:
    code = "import sys, json, teachercache as t; t.Cache; t.load_recipe; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert "teachercache.cache.reader" in loaded
    assert {"torch", "ray", "transformers", "datasets"}.isdisjoint(loaded)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_from_the_face_alone(path: object) -> None:
    tree = ast.parse(text_of(path))  # type: ignore[arg-type]
    homes = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    homes |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {home for home in homes if home.split(".")[0] == "teachercache"}
    assert ours <= {"teachercache"}, f"import from teachercache itself in place of {', '.join(sorted(ours))}"


def test_the_version_is_that_of_the_distribution() -> None:
    assert tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["version"] == teachercache.__version__

"""One list for each sort of part: the package's own, and those that installed extensions add."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from teachercache.files import same_imports
from teachercache.registry import GROUP, Registry

EXTENSION = """
from dataclasses import dataclass, replace
from typing import Literal
from pydantic import Field
from teachercache.targets import KINDS, TAIL_POLICIES, TopK
from teachercache.targets.logits.tails.uniform import Uniform
from teachercache.targets.logits.top_k import GridConfig

class PairsConfig(GridConfig):
    kind: Literal["pairs"] = Field("pairs", description="two tokens")
    weight: int = Field(3, ge=1, description="of nothing")

@KINDS.register
@dataclass(frozen=True)
class Pairs(TopK):
    kind = "pairs"
    config = PairsConfig

@dataclass(frozen=True)
class Even(Uniform):
    name = "even"

TAIL_POLICIES.register(Even())
"""
READ = """
import sys
from teachercache.config import parse_recipe
from teachercache.errors import UserError
try:
    recipe = parse_recipe({"cache": "c", "targets": {"logits": %s}, "objective": {"tail": %r}}, origin="recipe.yaml")
except UserError as error:
    sys.exit(str(error))
print(recipe.targets.logits.model_dump()["kind"], recipe.objective.tail)
"""


@dataclass(frozen=True)
class Part:
    name: str
    value: int = 0


def parts() -> Registry[Part]:
    return Registry("part", (Part("a"), Part("b")), name_of=lambda part: part.name)


def test_a_part_from_outside_joins_the_list() -> None:
    registry = parts()
    assert registry.register(Part("c", 1)) == Part("c", 1) == registry["c"]
    assert list(registry) == ["a", "b", "c"] and registry.added == (Part("c", 1),)
    registry.register(Part("c", 2))  # a cell that runs again
    assert registry.added == (Part("c", 2),) and registry.own == (Part("a"), Part("b"))


def test_a_name_of_the_package_is_taken() -> None:
    with pytest.raises(ValueError, match="there is a part 'a' in teachercache; give yours another name"):
        parts().register(Part("a", 1))


def test_a_name_that_nobody_has_is_none() -> None:
    assert parts().get("x") is None and "x" not in parts()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with an installed package, as `pip install --target` leaves it."""
    (tmp_path / "pairs.py").write_text(EXTENSION)
    about = tmp_path / "pairs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pairs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\npairs = pairs\n")
    return tmp_path


def recipe_in_a_new_process(installed: Path, logits: object, tail: str = "auto") -> subprocess.CompletedProcess[str]:
    return in_a_new_process(installed, READ % (logits, tail))


def in_a_new_process(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = same_imports()
    environment["PYTHONPATH"] += f":{installed}"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_recipe_names_parts_of_an_installed_extension(installed: Path) -> None:
    done = recipe_in_a_new_process(installed, {"kind": "pairs", "weight": 2}, "even")
    assert (done.returncode, done.stdout) == (0, "pairs even\n"), done.stderr
    done = recipe_in_a_new_process(installed, {"kind": "pairs", "wieght": 2})
    assert done.returncode == 1 and "unknown key `targets.logits.wieght`; did you mean `weight`?" in done.stderr


def test_a_cache_names_parts_of_an_installed_extension(installed: Path) -> None:
    stored = {"logits": {"kind": "pairs", "weight": 2}}
    code = f"from teachercache.targets.stored import why_unknown; print(why_unknown('logits', {stored}))"
    done = in_a_new_process(installed, code)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    done = in_a_new_process(installed, code.replace("pairs", "triples"))
    assert "kind 'triples', this version reads top-k" in done.stdout and "pairs; install a newer version" in done.stdout
    assert done.stdout.endswith("or the extension that has it\n")


def test_an_extension_that_fails_is_named(installed: Path) -> None:
    (installed / "pairs.py").write_text("import nowhere_to_be_found")
    done = recipe_in_a_new_process(installed, {"kind": "pairs"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "the extension pairs (pairs) cannot be imported: No module named" in done.stderr

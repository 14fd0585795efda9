"""Claims of the pages hold: links lead somewhere, YAML is a recipe, commands and benchmarks exist, and README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from teachercache.cli import app
from teachercache.config import Recipe, parse_recipe

from pages import PAGES, README, ROOT, anchors, blocks, links, text_of


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_readme_is_short() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading; there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_every_page_can_be_reached(page: Path) -> None:
    """From README or from a page of docs/ beside itself."""
    reached = {
        (other.parent / link.partition("#")[0]).resolve() for other in PAGES if other != page for link in links(other)
    }
    assert page in reached or page.parent in reached


YAML = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), YAML, ids=[f"{name_of(page)}-{at}" for at, (page, _) in enumerate(YAML)])
def test_yaml_is_a_recipes(page: Path, block: str) -> None:
    written = yaml.safe_load(block)
    assert isinstance(parse_recipe({"cache": "c", **written}, origin=name_of(page)), Recipe)


def commands(page: Path) -> list[list[str]]:
    """Words of each `teachercache …` in a page's shell blocks, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|\s)teachercache (.*)", line.partition(" #")[0]) for line in lines]
    return [match.group(1).split() for match in found if match]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_have_these_options(page: Path) -> None:
    group = typer.main.get_command(app)
    for command, *words in commands(page):
        known = {option for parameter in group.commands[command].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, (command, words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_commands_run_exist(page: Path) -> None:
    for path in re.findall(
        r"(?:python|bash|pytest|deepspeed[^\n]*|torchrun[^\n]*) ((?:tests|jobs|infra)/[\w./]+)", text_of(page)
    ):
        assert (ROOT / path).exists(), path


def test_names_in_the_glossary_exist() -> None:
    """Classes, modules and keys of recipes: a renamed one is renamed there too."""
    rows = [line.split("|") for line in text_of(ROOT / "docs/design/glossary.md").splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`([\w.]+)`", row[3])}
    assert {"CacheAlignment", "stream.mix", "aligned_rows.py"} <= names
    sources = list((ROOT / "pipeline" / "teachercache").rglob("*.py"))
    words = {path.name for path in sources} | set(re.findall(r"\w+", "".join(map(text_of, sources))))
    unknown = {name for name in names if name not in words and not words.issuperset(name.split("."))}
    assert not unknown - {"manifest.json"}

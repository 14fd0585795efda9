"""Generated pages are what the code and the recorded results say now; `python infra/docs_site/generate.py` renews them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_site import errors
from docs_site.generate import generated
from docs_site.results import RUNS
from teachercache.config import Recipe
from teachercache.config.recipe import models_in

from pages import ROOT, text_of

COMMAND = "python infra/docs_site/generate.py"
OFTEN = "errors.md"  # changes with every message: checked with the slow tests, renewed by `bash infra/docs`


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[Path, str]]:
    return {path.name: (path, text) for path, text in generated().items()}


@pytest.mark.parametrize(
    "name", ["recipe.md", "commands.md", *(page.name for page in (ROOT / "docs" / "results").glob("*.md"))]
)
def test_pages_are_up_to_date(texts: dict[str, tuple[Path, str]], name: str) -> None:
    path, text = texts[name]
    assert path.read_text(encoding="utf-8") == text, f"{path} is behind: {COMMAND}"


@pytest.mark.slow
def test_errors_are_up_to_date(texts: dict[str, tuple[Path, str]]) -> None:
    path, text = texts[OFTEN]
    assert path.read_text(encoding="utf-8") == text, f"{path} is behind: {COMMAND}"


def test_every_key_is_described() -> None:
    sections, undescribed = [Recipe], []
    for section in sections:
        undescribed += [
            f"{section.__name__}.{name}" for name, field in section.model_fields.items() if not field.description
        ]
        inner = [model for field in section.model_fields.values() for model in models_in(field.annotation)]
        sections += [model for model in dict.fromkeys(inner) if model not in sections]
    assert undescribed == []


def test_troubleshooting_quotes_messages_of_the_code(texts: dict[str, tuple[Path, str]]) -> None:
    told = text_of(ROOT / "docs" / "guides" / "troubleshooting.md")
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", told)
    assert len(quoted) > 10
    assert [message for message in quoted if message not in texts[OFTEN][1]] == []


def test_every_recorded_result_is_on_a_page() -> None:
    told = "".join(text_of(page) for page in (ROOT / "docs" / "results").glob("*.md"))
    recorded = {path.stem for path in (ROOT / "tests" / "bench" / "results").glob("*.json")}
    assert {run.file for run in RUNS.values()} == recorded
    assert [name for name in RUNS if f"<!-- generated: {name} -->" not in told] == []


def test_the_messages_of_every_folder_are_listed() -> None:
    stages = {message.stage for message in errors.messages_of(ROOT / "pipeline" / "teachercache")}
    assert stages <= {stage for stage, _ in errors.STAGES}

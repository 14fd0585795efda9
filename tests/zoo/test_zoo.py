"""Every architecture through one list of properties; what each comes to is what docs/reference/models.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.architectures import ARCHITECTURES, Architecture
from zoo.properties import PROPERTIES, Outcome, examine
from zoo.report import PAGE, in_two_processes, page, read
from zoo.subject import Subject

# In every check: quick ones that differ from each other. The others are slow because they are many.
OFTEN = (
    "Llama", "Qwen 3 MoE", "Gemma 2", "Gemma 3, multimodal", "GPT-2", "OPT", "Mamba", "Phi 3, longrope", "Granite", "BERT",
)  # fmt: skip
SHOWN = [
    pytest.param(each, id=each.name, marks=() if each.name in OFTEN else pytest.mark.slow) for each in ARCHITECTURES
]


@pytest.mark.parametrize("architecture", SHOWN)
def test_an_architecture_works_or_is_refused_as_documented(architecture: Architecture, tmp_path: Path) -> None:
    subject, documented = Subject(architecture, tmp_path), read()[architecture.name]
    for name in PROPERTIES:
        found = examine(subject, name)
        assert found.result != "wrong", f"{name}: {found.why}"
        assert found == documented[name], (
            f"{name}: run `python tests/zoo/report.py --examine --only '{architecture.name}'`"
        )


def _how(outcome: Outcome) -> str:
    """The words of what works; a refusal's line may be put better without making the page wrong."""
    return outcome.why if outcome.result == "works" else ""


@pytest.mark.slow
def test_two_processes_under_zero_2_learn_what_one_learns(tmp_path: Path) -> None:
    documented = read()
    chosen = [each for each in ARCHITECTURES if documented[each.name]["export"].result == "works"]
    subjects = [Subject(each, tmp_path / str(number)) for number, each in enumerate(chosen)]
    for subject in subjects:
        subject.run()
    assert len(subjects) >= 45
    for name, outcome in in_two_processes(subjects).items():
        assert outcome.result == "works", f"{name}: {outcome.why}"


def test_the_page_is_what_the_results_say() -> None:
    results = read()
    assert list(results) == [each.name for each in ARCHITECTURES]
    assert set(OFTEN) <= set(results)
    assert PAGE.read_text(encoding="utf-8") == page(results), "run `python tests/zoo/report.py`"


def test_no_architecture_is_documented_as_wrong() -> None:
    wrong = [
        (name, key) for name, found in read().items() for key, outcome in found.items() if outcome.result == "wrong"
    ]
    assert wrong == []

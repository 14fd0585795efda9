"""The table of architectures in docs/reference/models.md, from what the zoo finds.

    python tests/zoo/report.py                              writes the page from results.json
    python tests/zoo/report.py --examine [--only NAME …]    examines architectures first (minutes), and writes results.json

`results.json` holds of each architecture what each property came to. Exit 1 where something is wrong: neither works nor is
refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "tests")]  # also as a command

from zoo.architectures import ARCHITECTURES, Architecture  # noqa: E402
from zoo.properties import PROPERTIES, Outcome, examine  # noqa: E402
from zoo.subject import Subject  # noqa: E402
from zoo.training import start  # noqa: E402

RESULTS, PAGE = Path(__file__).with_name("results.json"), ROOT / "docs" / "reference" / "models.md"
PROCESSES = "ZeRO 2, two processes"
TIMEOUT_SECONDS = 30 * 60
SAME_LOSS = 1e-4  # nats a position
COLUMNS = {
    "teacher": ("label shift", "logits", "padding", "causality"),
    "beginning": ("beginning",),
    "packed rows": ("packed rows",),
    "sketch": ("sketch",),
    "hidden states": ("hidden states",),
    "attention": ("attention",),
    "student": ("export",),
    "ZeRO 2": (PROCESSES,),
}
Results = dict[str, dict[str, Outcome]]


def examine_all(architectures: Sequence[Architecture], folder: Path) -> Iterator[Results]:
    """Every property of every architecture, one after the other; at last those that train once more in two processes."""
    trained = []
    for number, architecture in enumerate(architectures):
        subject = Subject(architecture, folder / str(number))
        found = {name: examine(subject, name) for name in PROPERTIES}
        if found["export"].result == "works":
            trained.append(subject)
        yield {architecture.name: found}
    for name, outcome in in_two_processes(trained).items():
        yield {name: {PROCESSES: outcome}}


def in_two_processes(subjects: Sequence[Subject]) -> dict[str, Outcome]:
    """Tells whether two processes under ZeRO 2 learn what one learns, step by step."""
    recipes = []
    for subject in subjects:
        path = subject.folder / "two.yaml"
        path.write_text(yaml.safe_dump(subject.recipe("two").model_dump(mode="json", exclude_none=True)))
        recipes.append(path)
    for process in start(recipes, processes=2):
        process.wait(timeout=TIMEOUT_SECONDS)
    return {subject.architecture.name: _compare(subject) for subject in subjects}


def _compare(subject: Subject) -> Outcome:
    alone, together = (_losses(subject.folder / name / "log.jsonl") for name in ("run", "two"))
    if len(together) != len(alone):
        return Outcome("wrong", f"{len(together)} of {len(alone)} records")
    off = max(abs(ours - theirs) for ours, theirs in zip(together, alone, strict=True))
    return Outcome("works") if off < SAME_LOSS else Outcome("wrong", f"losses differ by {off:.2g} nats")


def _losses(log: Path) -> list[float]:
    """Losses of every step, and of the held-out rows."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    return [value for record in records for name, value in record.items() if name in ("loss", "eval_loss")]


def written(results: Results) -> str:
    """The text of results.json."""
    order = [each.name for each in ARCHITECTURES if each.name in results]
    data = {name: {key: vars(outcome) for key, outcome in results[name].items()} for name in order}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def read() -> Results:
    """The contents of results.json."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {name: {key: Outcome(**outcome) for key, outcome in found.items()} for name, found in data.items()}


def page(results: Results) -> str:
    """docs/reference/models.md."""
    rows = [_row(each, results[each.name]) for each in ARCHITECTURES]
    head = ["architecture", "what sets it apart", *COLUMNS]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    refused = _reasons(results)
    return "\n".join([*_INTRODUCTION, *table, "", "## What is refused, and why", "", *refused, ""])


def _row(architecture: Architecture, found: dict[str, Outcome]) -> list[str]:
    return [architecture.name, architecture.differs or "–", *(_cell(found, names) for names in COLUMNS.values())]


def _cell(found: dict[str, Outcome], names: Sequence[str]) -> str:
    if not all(name in found for name in names):  # two processes have not tried what one refuses
        return "–" if found["export"].result == "refused" else "one process"
    results = [found[name].result for name in names]
    if "wrong" in results:
        return "**wrong**"
    return "–" if "refused" in results else next((found[name].why for name in names if found[name].why), "yes")


def _reasons(results: Results) -> list[str]:
    """One line for each architecture and reason, with the columns that it closes."""
    lines = []
    for name, found in results.items():
        reasons: dict[str, list[str]] = {}
        for column, properties in COLUMNS.items():
            for why in {found[each].why for each in properties if each in found and found[each].result == "refused"}:
                reasons.setdefault(why, []).append(column)
        lines += [f"- **{name}**, {', '.join(columns)}: {why}" for why, columns in reasons.items()]
    return lines


_INTRODUCTION = """\
# Models

What works for which architecture, and what is refused. Written by `python tests/zoo/report.py` from
[`tests/zoo/results.json`](../../tests/zoo/results.json), which `--examine` makes: it builds each architecture with a few
thousand weights and puts it through one list of properties
([`tests/zoo/properties.py`](../../tests/zoo/properties.py)). Other causal models of `transformers` are accepted too: the
same probes look at them when they are loaded.

Everything is tried in float32 on rows of at most 48 tokens: what changes with longer rows, such as a switch of rotary factors
or a window that is wider, and what half precision rounds, is tried by other tests for a few families and is not in this table.
Composite models (text beside images) are loaded as their text model alone where `transformers` lists one for their config
(`…ForCausalLM`: Llama 4, Mllama, Qwen 3.5): the student that is exported then has no image side.

| column | what was tried |
| --- | --- |
| teacher | stored targets are the model's own of the token that follows, whatever comes later or is in the batch |
| beginning | windows and packed documents begin as the family's tokenizer begins a text: with a token in front, or without |
| packed rows | documents of packed rows do not see each other (`sequence.layout: packed`), several rows in a batch |
| sketch | `targets.logits.kind: head+sketch` is right at T = 1, 2 and 4; where it is refused, `top-k` works |
| hidden states | `targets.hidden` holds what enters and what leaves a block |
| attention | `targets.attention` rebuilds the model's own maps; the cheapest kind that does |
| student | it learns from a cache; transformers alone finds the exported folder's held-out loss to be the one in training |
| ZeRO 2 | two processes learn what one learns; *one process*: tried in one alone |

“–”: refused, in the line that stands below.

""".splitlines()


def _examine(chosen: Sequence[Architecture]) -> None:
    """Into results.json, as it goes; of the others it keeps what it says."""
    results = read() if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for found in examine_all(chosen, Path(folder)):
            for name, outcomes in found.items():
                results[name] = {**results.get(name, {}), **outcomes}
            RESULTS.write_text(written(results), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examine", action="store_true", help="examine the architectures first")
    parser.add_argument("--only", nargs="*", help="their names; the others keep what results.json says")
    options = parser.parse_args()
    if options.examine:
        _examine([each for each in ARCHITECTURES if not options.only or each.name in options.only])
    results = read()
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(results), encoding="utf-8")
    wrong = [
        (name, key, one.why) for name, found in results.items() for key, one in found.items() if one.result == "wrong"
    ]
    for name, key, why in wrong:
        print(f"{name}: {key}: {why}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

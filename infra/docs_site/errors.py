"""The reference of errors: every message that the code raises on purpose, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ERRORS = {
    "RecipeError": (2, "The recipe does not parse or does not make sense. Nothing was started."),
    "ModelError": (2, "A model or tokenizer cannot be loaded or used."),
    "CorpusError": (2, "The corpus cannot be read, or holds nothing."),
    "CacheError": (2, "A cache is missing, unfinished, or does not fit what is asked of it."),
    "CacheDamaged": (1, "Bytes on disk differ from what the manifest promises, or do not make sense."),
    "JobFailed": (
        1,
        "A job could not be completed. What it finished is kept; most of these go away when it is run again.",
    ),
}
STAGES = (
    ("config", "Recipes"), ("corpus", "Corpus"), ("tokens", "Tokens"), ("bounded", "Chat templates"),
    ("models", "Models"), ("teacher", "Teacher"),
    ("targets", "Targets"), ("precompute", "Precompute"), ("cache", "The cache on disk"), ("stream", "Reading a cache"),
    ("objective", "Objective"), ("training", "Training"), ("evaluation", "Evaluation"), ("sampling", "Sampling"),
)  # fmt: skip
SETTINGS = ("config", "schedules")  # what is a `ValueError` there is a mistake in a recipe
HEAD = """# Errors

Every mistake that the code expects is one readable line: what is wrong, where, and the remedy. The classes are in
`teachercache.errors`; all of them are a `TeachercacheError`. The command line exits with 2 for a mistake in what was asked
and with 1 where a check failed or a job could not be completed. Anything with a traceback is a bug.

Longer advice on the most frequent ones is in [troubleshooting](../guides/troubleshooting.md).

The messages below are read from the sources by `python infra/docs_site/generate.py`; `…` stands for what is filled in.
Where a `ValueError` of a recipe's section is meant, the message begins with the file and the key.
"""


@dataclass(frozen=True, order=True)
class Message:
    """One message of the code, with the stage that raises it."""

    error: str
    stage: str
    text: str


def page(sources: Path) -> str:
    """The whole page, from the package's sources."""
    messages = set(messages_of(sources))
    parts = [HEAD]
    for error, (status, meaning) in ERRORS.items():
        parts.append(f"## {error}\n\nExit status {status}. {meaning}\n")
        for stage, title in STAGES:
            found = sorted(message.text for message in messages if (message.error, message.stage) == (error, stage))
            if found:
                parts.append("\n".join([f"**{title}**\n", *(f"- {text}" for text in found), ""]))
    return "\n".join(parts).rstrip("\n")


def messages_of(sources: Path) -> Iterator[Message]:
    for path in sorted(sources.rglob("*.py")):
        stage = path.relative_to(sources).parts[0].removesuffix(".py")
        stage = {"files": "cache", "quickstart": "evaluation"}.get(stage, stage)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        settings = {id(node) for section in ast.walk(tree) if _is_section(section) for node in ast.walk(section)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                of_recipes = node.func.id == "ValueError" and (stage in SETTINGS or id(node) in settings)
                error, text = "RecipeError" if of_recipes else node.func.id, _text(node.args[0])
                if error in ERRORS and len(text.replace("…", "")) > 12:
                    yield Message(error, "config" if of_recipes else stage, text)


def _is_section(node: ast.AST) -> bool:
    """Tells whether it is the class of a recipe's section, which may stand beside what it sets."""
    return isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Choice"))


def _text(node: ast.expr) -> str:
    """A string of the sources, with … for what is filled in; nothing for what is not a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return " ".join("".join(str(part) for part in parts).split())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{_text(node.left)} {_text(node.right)}".strip()
    return ""

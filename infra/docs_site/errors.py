"""The reference of errors: every message that the code raises on purpose, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ERRORS = {
    "UserError": (2, "An option of a command does not make sense, or something is missing from the installation."),
    "RecipeError": (2, "The recipe does not parse or does not make sense. Nothing was started."),
    "ModelError": (2, "A model or tokenizer cannot be loaded or used."),
    "CorpusError": (2, "The corpus cannot be read, or holds nothing."),
    "CacheError": (2, "A cache is missing, unfinished, or does not fit what is asked of it."),
    "JobFailed": (
        1,
        "A job could not be completed. What it finished is kept; most of these go away when it is run again.",
    ),
    "CacheDamaged": (
        1,
        "Bytes on disk differ from what the manifest promises, or do not make sense. Most of these are the reason within a "
        "longer line, which names the file and says the remedy: `… cannot be trusted: REASON; fetch the cache again …`.",
    ),
}
STAGES = (
    ("installation", "Installation"),
    ("config", "Recipes"), ("corpus", "Corpus"), ("tokens", "Tokens"), ("bounded", "Chat templates"),
    ("models", "Models"), ("teacher", "Teacher"),
    ("targets", "Targets"), ("precompute", "Precompute"), ("cache", "The cache on disk"),
    ("sharing", "Caches of other people"), ("stream", "Reading a cache"),
    ("objective", "Objective"), ("training", "Training"), ("evaluation", "Evaluation"), ("sampling", "Sampling"),
)  # fmt: skip
SETTINGS = ("config", "schedules")  # what is a `ValueError` there is a mistake in a recipe
EXPLAINING = ("_explain", "_unknown_key")  # of config/recipe.py
HOMES = {"files": "cache", "quickstart": "evaluation", "console": "installation", "registry": "installation"}
HEAD = """# Errors

Search for a part of your message without names or numbers, e.g. `has no field`. `…` stands for a name, a number or another
message. Longer advice on the most frequent ones is in [troubleshooting](../guides/troubleshooting.md).

| what went wrong | exit status | section |
|---|---|---|
| options of a command, the installation | 2 | [UserError](#usererror) |
| the recipe | 2 | [RecipeError](#recipeerror) |
| a model or tokenizer | 2 | [ModelError](#modelerror) |
| the corpus | 2 | [CorpusError](#corpuserror) |
| a cache that is missing, or does not fit | 2 | [CacheError](#cacheerror) |
| a job that could not be completed | 1 | [JobFailed](#jobfailed) |
| damaged files, most often of a cache | 1 | [CacheDamaged](#cachedamaged) |

Every mistake that the code expects is one readable line: what is wrong, where, and the remedy. A message about a recipe
begins with the file and the key. Anything with a traceback is a bug. The classes are in `teachercache.errors`; all of them
are a `TeachercacheError`.

This page is read from the sources by `python infra/docs_site/generate.py`.
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
        stage = HOMES.get(stage, stage)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (Message("RecipeError", "config", text) for text in _explanations(tree))
        settings = {id(node) for section in ast.walk(tree) if _is_section(section) for node in ast.walk(section)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                of_recipes = node.func.id == "ValueError" and (stage in SETTINGS or id(node) in settings)
                error, text = "RecipeError" if of_recipes else node.func.id, _text(node.args[0])
                if error in ERRORS and len(text.replace("…", "")) > 12:
                    yield Message(error, "config" if of_recipes else stage, text)


def _explanations(tree: ast.AST) -> Iterator[str]:
    """Reads what is said of a recipe's keys, which functions word that return it."""
    explaining = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in EXPLAINING)
    for node in (node for function in explaining for node in ast.walk(function)):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
            yield _text(node.value)


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

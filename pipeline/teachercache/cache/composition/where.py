"""`--where`: an expression over what is known of a row, such as `split == 'train' and positions >= 32`.

It is Python's own syntax, and of it only names, numbers, texts, tuples, comparisons, `in`, `and`, `or`, `not`: what is
evaluated holds no call and no attribute, and can do nothing but compare.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import CodeType
from typing import Any

from teachercache.errors import CacheError

# What is known of a row: an example of each, by whose type an expression is tried, and what it means.
NAMES: Mapping[str, tuple[Any, str]] = {
    "row_id": ("0" * 32, "its id, 32 hex digits"),
    "source_id": ("0" * 32, "the id of its document, in a packed row of the first one"),
    "source_ids": (("0" * 32,), "the ids of all its documents"),
    "source": ("corpus", "the name of the corpus that it came from"),
    "split": ("train", "'train' or 'held-out'"),
    "positions": (1, "stored targets"),
    "tokens": (1, "tokens"),
    "segments": (1, "segments: 1, or in the packed layout how many documents' windows"),
    "draw": (0.5, "a number from 0 to 1 made of source_id: draw < 0.1 is a tenth of the documents"),
}
MOST_CHARACTERS = 2**20
_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List,
)  # fmt: skip
_VALUES = (str, int, float, bool)


class Where:
    """An expression. Raises `CacheError` for one that is none, or that names what no row has."""

    def __init__(self, text: str) -> None:
        self.text = text
        tree = _parsed(text)
        self.names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        self._code = compile(tree, "--where", "eval")
        self.holds({name: NAMES[name][0] for name in self.names})

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Tells whether it is true of a row; `facts` has a value for each of its `names`."""
        return holds(self._code, facts, self.text)


def holds(code: CodeType, facts: Mapping[str, Any], text: str) -> bool:
    """The value of a checked expression. Raises `CacheError` for values that cannot be compared."""
    try:
        return bool(eval(code, {"__builtins__": {}}, dict(facts)))  # of the few nodes above
    except TypeError as error:
        raise CacheError(f"--where {text}: {error}; {_known()}") from None


def _parsed(text: str) -> ast.Expression:
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it has {len(text)} characters, at most {MOST_CHARACTERS} are possible")
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CacheError(
            f"--where {text[:200]}: it is no expression ({getattr(error, 'msg', error)}); e.g. \"split == 'train'\""
        ) from None
    for node in ast.walk(tree):
        if not isinstance(node, _NODES) or (isinstance(node, ast.Constant) and type(node.value) not in _VALUES):
            raise CacheError(f"--where {text}: only comparisons, in, and, or and not are possible; {_known()}")
        if isinstance(node, ast.Name) and node.id not in NAMES:
            raise CacheError(f"--where {text}: no row has {node.id}; {_known()}")
    return tree


def _known() -> str:
    return f"a row has {', '.join(NAMES)}"

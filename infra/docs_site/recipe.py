"""The reference of recipes, from the config's own sections: every key with its type, default and description."""

from __future__ import annotations

import inspect
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from teachercache.config import HeadSketchConfig, Recipe
from teachercache.config.recipe import models_in
from teachercache.targets.logits.head_sketch import SKETCH_PRESETS

HEAD = """# Recipe keys

A recipe is one YAML file for a precompute job, a training job, or both. Unknown keys are refused with the nearest valid
one. Any key can be given on the command line as well: `-s train.learning_rate=1e-4`, `-s 'targets.hidden={layers: [4, 8]}'`
(the value is YAML). Complete recipes, with a comment at each key, are in [`jobs/recipes/`](../../jobs/recipes). Guides say
what to choose: [own data](../guides/own-data.md), [targets](targets.md), [α and temperature at each
step](../guides/schedules.md), [layers](../guides/layers.md), [another tokenizer](../guides/other-tokenizer.md).

This page is generated from the classes in `teachercache.config` by `python infra/docs_site/generate.py`.
"""


def page() -> str:
    """The whole page."""
    seen: dict[type[BaseModel], str] = {Recipe: ""}
    parts = [HEAD, "## The whole recipe\n", _table(Recipe)]
    for name, field in Recipe.model_fields.items():
        for section in models_in(field.annotation):
            parts += _sections(section, name, seen)
    return "\n".join(parts)


def _sections(section: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """A section and those within it, each once, where it is first met."""
    if section in seen:
        return []
    seen[section] = path
    told = " ".join(inspect.cleandoc(section.__doc__ or "").split())
    parts = [
        f"\n## {_title(section, path)}\n",
        f"{textwrap.fill(told, 120, break_long_words=False, break_on_hyphens=False)}\n",
        _table(section),
    ]
    for name, field in section.model_fields.items():
        for inner in models_in(field.annotation):
            parts += _sections(inner, f"{path}.{name}", seen)
    return parts


def _title(section: type[BaseModel], path: str) -> str:
    chosen = _chosen_by(section)
    if chosen is None:
        return path
    key, value = chosen
    return f"{key}: {value}" if key != "kind" else f"{path}, {key}: {value}"


def _chosen_by(section: type[BaseModel]) -> tuple[str, str] | None:
    """The key and value by which a recipe chooses this one of several sections."""
    for key in ("kind", "schedule", "balance"):
        field = section.model_fields.get(key)
        if field is not None and get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return key, str(get_args(field.annotation)[0])
    return None


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = _by_preset(section, name) or _default(field)
        rows.append(f"| `{name}` | {_allowed(field)} | {default} | {_cell(field.description or '')} |")
    return "\n".join(rows)


def _allowed(field: FieldInfo) -> str:
    """Gives the type of a field, without sections that a check of its own refuses there."""
    extra = field.json_schema_extra
    refused = extra.get("refused") if isinstance(extra, dict) else None
    parts = _type(field.annotation).split(" or ")
    return " or ".join(part for part in parts if not part.startswith(f"`{refused}:"))


def _by_preset(section: type[BaseModel], name: str) -> str | None:
    if section is not HeadSketchConfig or name not in SKETCH_PRESETS["compact"]:
        return None
    return ", ".join(f"`{values[name]}` ({preset})" for preset, values in SKETCH_PRESETS.items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(annotation: Any) -> str:
    """A type as a writer of YAML thinks of it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in inner)
    if origin in (Union, types.UnionType):
        parts = [_type(part) for part in inner if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"map from {_type(inner[0])} to {_type(inner[1])}"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        chosen = _chosen_by(annotation)
        return "section" if chosen is None else f"`{chosen[0]}: {chosen[1]}`"
    names = {str: "text", int: "integer", float: "number", bool: "`true` \\| `false`", Path: "path", ByteSize: "bytes"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "see there"
    if value is None or value in ((), {}):
        return "–"
    if isinstance(value, tuple) and isinstance(value[0], BaseModel):
        return ", ".join(f"`{getattr(item, 'match', item)}`" for item in value)
    if isinstance(value, tuple):
        return f"`[{', '.join(_scalar(item) for item in value)}]`"
    return f"`{_scalar(value)}`"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ByteSize):
        return value.human_readable(decimal=True)
    return f"{value:g}" if isinstance(value, float) else str(value)

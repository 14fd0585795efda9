"""The reference of commands, from what `teachercache COMMAND --help` says."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from teachercache.cli import app

METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}

HEAD = """# Commands

Every command exits with 0, with 1 (a check failed, or a job could not be completed) or with 2 (a mistake in what was asked:
one readable line says what, where and the remedy). With `--json` stdout is exactly one JSON document, and progress goes to
stderr. `jobs/precompute_teacher.py` and `jobs/train_student.py` are `precompute` and `train` for launchers: they take the
same arguments ([clusters](../guides/clusters.md)).

This page is generated from the command line's own help by `python infra/docs_site/generate.py`.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    summary = ["| command | does |", "|---|---|"]
    sections = []
    for registered in app.registered_commands:
        callback: Any = registered.callback
        name = registered.name or callback.__name__.replace("_", "-")
        told = " ".join(inspect.cleandoc(callback.__doc__).split())
        parameters = [parameter for parameter in group.commands[name].params if parameter.name != "help"]
        types_of = get_type_hints(callback)
        summary.append(f"| [`{name}`](#{name}) | {told} |")
        usage = f"    teachercache {' '.join([name, *_usage(parameters, types_of)])}\n"
        sections += [f"\n## {name}\n", usage, f"{told}\n", _table(parameters, types_of)]
    return "\n".join([HEAD, *summary, *sections])


def _usage(parameters: list[Any], types_of: dict[str, Any]) -> list[str]:
    """Arguments, then options that must be there."""
    arguments = [parameter.metavar for parameter in parameters if parameter.param_type_name == "argument"]
    needed = [_signature(parameter, types_of) for parameter in parameters if parameter.required]
    return [*arguments, *(option for option in needed if option.startswith("-")), "[OPTIONS]"]


def _signature(parameter: Any, types_of: dict[str, Any]) -> str:
    """An argument's name, or an option's with what follows it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or METAVARS[_plain(types_of[parameter.name])]}"


def _plain(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _table(parameters: list[Any], types_of: dict[str, Any]) -> str:
    rows = ["| argument or option | what it is | default |", "|---|---|---|"]
    for parameter in parameters:
        rows.append(f"| `{_signature(parameter, types_of)}` | {parameter.help or ''} | {_default(parameter)} |")
    return "\n".join(rows)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    if parameter.param_type_name == "option" and parameter.is_flag:
        return "off"
    return "–" if parameter.default in (None, [], ()) or callable(parameter.default) else f"`{parameter.default}`"

"""`teachercache quickstart`: the main job in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides
from teachercache.console import run_command


def quickstart(
    out: Annotated[Path, typer.Option(help="where the cache, the student and the recipe go")] = Path("runs/quickstart"),
    compare: Annotated[
        bool, typer.Option("--compare", help="also train the same student without the teacher, and show it beside")
    ] = False,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Teacher → cache → student → table, on a model and a text that install from a package index."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.quickstart import run_quickstart

        return run_quickstart(out, compare=compare, overrides=overrides, console=console)

    def show(result: dict[str, Any]) -> Any:
        from rich.console import Group

        from teachercache.evaluation import render
        from teachercache.quickstart import next_commands, roles_of

        return Group(render({role: result[role] for role in roles_of(result)}), next_commands(result))

    raise typer.Exit(run_command(work, as_json=as_json, show=show))

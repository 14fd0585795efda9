"""`teachercache evaluate`: teacher and student side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides
from teachercache.console import run_command


def evaluate(
    recipe_or_run: Annotated[Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a recipe, or the run folder it made")],
    teacher: Annotated[
        str | None, typer.Option(help="where the teacher is here; default: as the cache names it")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="measure on at most so many held-out rows")] = None,
    cross_entropy: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="run folder of a student that learned without the teacher, to show it beside"),
    ] = None,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Compare teacher, student before and student after on held-out rows, each in a process of its own."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.evaluation import run_evaluation

        def progress(message: str) -> None:
            console.print(message, markup=False, soft_wrap=True)

        return run_evaluation(
            recipe_or_run,
            teacher=teacher,
            cross_entropy=cross_entropy,
            rows=rows,
            overrides=overrides,
            progress=progress,
        )

    def show(result: dict[str, Any]) -> Any:
        from teachercache.evaluation import render

        return render(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))

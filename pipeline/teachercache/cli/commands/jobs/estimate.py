"""`teachercache estimate`: the cost of a cache, before it is made."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides, RecipePath
from teachercache.config import load_recipe
from teachercache.console import run_command


def estimate(
    recipe: RecipePath,
    seconds: Annotated[float, typer.Option(min=1, help="how long the teacher reads a sample, about")] = 30,
    device: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="also the hours on such accelerators, by their data sheet: H100, L40S …"),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="how many of them; default: 1")] = None,
    price_per_gb_month: Annotated[float, typer.Option(min=0, help="of the store that holds the cache")] = 0.023,
    student_runs: Annotated[
        int | None, typer.Option(min=1, help="also what so many students take, from a cache and from a live teacher")
    ] = None,
    teacher_changes: Annotated[
        int,
        typer.Option(min=0, help="how often the teacher changes between these runs, so that the cache is made anew"),
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="as of `precompute`: at most so many rows of the corpus")
    ] = None,
    overrides: Overrides = [],
    as_json: Json = False,
) -> None:
    """Say what `precompute` will take, from a timed sample: bytes, hours, store cost, and when a cache pays. Writes nothing."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.precompute.estimate.job import Question, run_estimate

        extra = [f"corpus.limit={limit}"] if limit else []
        question = Question(
            seconds=seconds, device=device, devices=devices, price_per_gb_month=price_per_gb_month,
            student_runs=student_runs, teacher_changes=teacher_changes,
        )  # fmt: skip
        return run_estimate(load_recipe(recipe, [*overrides, *extra]), question, console=console)

    def show(result: dict[str, Any]) -> Any:
        from teachercache.precompute.estimate.rendering import estimate_table

        return estimate_table(result)

    raise typer.Exit(run_command(work, as_json=as_json, show=show))

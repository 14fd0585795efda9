"""`teachercache fidelity`: stored targets against the teacher."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from teachercache.cli.options import CacheLocation, Json
from teachercache.console import run_command
from teachercache.progress import ShownProgress
from teachercache.tables import fidelity_table


def fidelity(
    cache: CacheLocation,
    teacher: Annotated[
        str | None, typer.Option(help="where the teacher is here; default: as the cache names it")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="compare so many rows, drawn from the whole cache")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="draws the rows; take your own for a cache that you were given")] = 0,
    at_most: Annotated[
        float | None,
        typer.Option(min=0, metavar="KL", help="exit status 1 where the KL at a temperature is larger, in nats"),
    ] = None,
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "1,2,4",
    tail: Annotated[
        str | None, typer.Option(help="sketch, uniform or renormalise; default: the best the cache holds")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with the teacher")
    ] = False,
    other_weights: Annotated[
        bool, typer.Option("--other-weights", help="compare with a teacher whose files are not those of the cache's")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the teacher again on some rows and compare what it says with what is stored."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.cache import Cache
        from teachercache.evaluation.fidelity import parse_options, run_fidelity
        from teachercache.stream.beginnings import warnings_of

        options = parse_options(temperatures, tail)
        opened = Cache.open(cache)
        for line in warnings_of([opened]):
            console.print(line, markup=False, soft_wrap=True)
        console.print(f"running the teacher again on up to {rows} rows of {cache} …", markup=False, soft_wrap=True)
        options.update(trust_remote_code=trust_remote_code, other_weights=other_weights, seed=seed, at_most=at_most)
        with ShownProgress(console, "comparing") as progress:
            return run_fidelity(opened, teacher=teacher, rows=rows, progress=progress, **options)

    raise typer.Exit(run_command(work, as_json=as_json, show=fidelity_table))

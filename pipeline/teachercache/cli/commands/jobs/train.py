"""`teachercache train`: a student from a cache."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from teachercache.cli.options import Json, Overrides, RecipePath
from teachercache.config import load_recipe
from teachercache.console import run_command


def train(recipe: RecipePath, overrides: Overrides = [], as_json: Json = False) -> None:
    """Train a student from a cache, alone or under `deepspeed` / `torchrun`. Run it again to resume."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.training.job.train import run_training

        return run_training(load_recipe(recipe, overrides), console=console)

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))

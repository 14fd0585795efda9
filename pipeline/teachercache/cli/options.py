"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe; complete ones are in jobs/recipes/")]
CacheLocation = Annotated[str, typer.Argument(metavar="CACHE", help="a folder, or a URL such as s3://BUCKET/PREFIX")]
Overrides = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY.PATH=VALUE", help="override a recipe's value")
]
WHERE = "e.g. \"split == 'train' and positions >= 32\"; docs/guides/growing.md says what a row has"
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, progress on stderr")]

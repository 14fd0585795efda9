"""`teachercache init-student`: a student from a model's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from teachercache.cli.options import Json
from teachercache.console import run_command


def init_student(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder, .gguf or package://NAME/FILE")
    ],
    out: Annotated[Path, typer.Option(help="folder of the new student")],
    layers: Annotated[str, typer.Option(help="0,5,10 or every:3 or keep:10 or first:8")] = "every:3",
    tokenizer: Annotated[
        str | None, typer.Option(help="id or folder of another tokenizer: embeddings for it are made of the model's")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="hub commit, tag or branch")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the folder if it exists")] = False,
    as_json: Json = False,
) -> None:
    """Make a student from some of a model's own layers."""

    def work(console: Console) -> dict[str, Any]:
        from teachercache.training.initialise.init_student import init_student as make

        result = make(model, layers=layers, output=out, tokenizer=tokenizer, revision=revision, overwrite=overwrite)
        size = f"{len(result['layers'])} layers, {result['parameters']:,} parameters"
        console.print(Text.assemble(("made", "green"), f" a student of {size} → {out}"), soft_wrap=True)
        if tokenizer is not None:
            counts = result["embeddings"]
            how = f"{counts['copied']:,} copied, {counts['averaged']:,} averaged, {counts['mean']:,} from the mean"
            console.print(f"embeddings of {sum(counts.values()):,} tokens: {how}", soft_wrap=True)
        return result

    raise typer.Exit(run_command(work, as_json=as_json, show=lambda _: None))

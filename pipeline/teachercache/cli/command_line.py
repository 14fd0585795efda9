"""The application, made of `COMMANDS`, and the entry point that runs it."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from teachercache.cli.known import COMMANDS, Command, name_of
from teachercache.errors import UserError
from teachercache.registry import load_extensions


class Commands(TyperGroup):
    """The package's commands, and those of installed extensions, which are loaded where a name is asked for that the package
    does not have, and where all are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, the package's own first. An extension that cannot be imported is told of, and takes no help away."""
        try:
            load_extensions()
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
        return [*super().list_commands(ctx), *(name for name in COMMANDS if name not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; None where nobody has it."""
        try:
            command = None if cmd_name in self.commands else COMMANDS.get(cmd_name)
        except UserError as error:
            ctx.fail(str(error))
        return super().get_command(ctx, cmd_name) if command is None else _made(cmd_name, command)


def _made(name: str, command: Command) -> Any:
    """The command of a function, as typer makes it."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(command)
    return get_command(alone)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Knowledge distillation of language models from an offline cache of teacher outputs.",
)
for _command in COMMANDS.own:
    app.command(name_of(_command))(_command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script and of jobs/ (`arguments`: default, those of the process).

    With `--json`, arguments that make no sense are answered with a document too.
    """
    try:
        app(arguments)
    except SystemExit as end:
        explain = getattr(end.__context__, "format_message", None)  # a usage error: no command ran
        if explain is not None and "--json" in sys.argv:
            print(json.dumps({"error": explain(), "exit_status": end.code}))
        raise

"""`COMMANDS`: the commands, in the order in which help lists them.

Another command is a file in `commands/` and a line here; from outside the package, `COMMANDS.register(function)`.
"""

from __future__ import annotations

from collections.abc import Callable

from teachercache.cli.commands.align import align
from teachercache.cli.commands.estimate import estimate
from teachercache.cli.commands.evaluate import evaluate
from teachercache.cli.commands.fidelity import fidelity
from teachercache.cli.commands.filter import filter_
from teachercache.cli.commands.init_student import init_student
from teachercache.cli.commands.inspect import inspect
from teachercache.cli.commands.merge import merge
from teachercache.cli.commands.precompute import precompute
from teachercache.cli.commands.quickstart import quickstart
from teachercache.cli.commands.sample import sample
from teachercache.cli.commands.split import split
from teachercache.cli.commands.train import train
from teachercache.cli.commands.verify import verify
from teachercache.registry import Registry

Command = Callable[..., None]  # its parameters are typer's, its docstring is its help


def name_of(command: Command) -> str:
    """The name of a command: that of its function, which ends in _ where Python has that name."""
    return command.__name__.rstrip("_").replace("_", "-")


COMMANDS: Registry[Command] = Registry(
    "command",
    (
        quickstart,
        precompute,
        estimate,
        align,
        init_student,
        train,
        sample,
        evaluate,
        fidelity,
        inspect,
        merge,
        filter_,
        split,
        verify,
    ),
    name_of=name_of,
)

"""`COMMANDS`: the commands, in the order in which help lists them.

Another command is a file in `commands/` and a line here; from outside the package, `COMMANDS.register(function)`.
"""

from __future__ import annotations

from collections.abc import Callable

from teachercache.cli.commands.caches.diff import diff
from teachercache.cli.commands.caches.fidelity import fidelity
from teachercache.cli.commands.caches.filter import filter_
from teachercache.cli.commands.caches.inspect import inspect
from teachercache.cli.commands.caches.ls import ls
from teachercache.cli.commands.caches.merge import merge
from teachercache.cli.commands.caches.pack import pack
from teachercache.cli.commands.caches.split import split
from teachercache.cli.commands.caches.unpack import unpack
from teachercache.cli.commands.caches.verify import verify
from teachercache.cli.commands.jobs.align import align
from teachercache.cli.commands.jobs.estimate import estimate
from teachercache.cli.commands.jobs.evaluate import evaluate
from teachercache.cli.commands.jobs.init_student import init_student
from teachercache.cli.commands.jobs.precompute import precompute
from teachercache.cli.commands.jobs.quickstart import quickstart
from teachercache.cli.commands.jobs.sample import sample
from teachercache.cli.commands.jobs.train import train
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
        ls,
        diff,
        merge,
        filter_,
        split,
        pack,
        unpack,
        verify,
    ),
    name_of=name_of,
)

"""The `teachercache` command.

command_line.py   `main`, the entry point, and the application that it runs
known.py          `COMMANDS`, the list of commands
commands/         the commands, a file each
options.py        arguments and options that several of them have

Exit status: 0, 1 (a check failed, a job could not be completed), 2 (the user's mistake).
"""

from teachercache.cli.command_line import app, main
from teachercache.cli.known import COMMANDS

__all__ = ["COMMANDS", "app", "main"]

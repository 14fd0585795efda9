"""Progress of a job, for users, while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from teachercache.precompute.engine.timing import Timing

SECONDS_BETWEEN_LINES = 30.0  # where nobody looks at a terminal


def progress_bar(console: Console) -> Progress:
    """Units done, with a rate."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("units  {task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip


class ProgressDisplay:
    """Shows how far a capture job is: a bar on a terminal, and elsewhere a line now and then."""

    def __init__(self, console: Console, timing: Timing) -> None:
        self._console, self._timing = console, timing
        self._bar = Progress(
            TextColumn("precompute"), BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.fields[said]}"),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._told = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While it is open, what is printed stands above the bar."""
        with self._bar:
            yield

    def update(self) -> None:
        """Show how far the job is now."""
        if self._task is None:
            self._task = self._bar.add_task("", total=1.0, said="")
        positions, left = self._timing.positions, self._timing.positions_left
        share = positions / (positions + left) if positions else 0.0
        self._bar.update(self._task, completed=share, said=self._timing.describe())
        if not self._console.is_terminal and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            units = f"{self._timing.units:,} of {self._timing.pending:,} units"
            self._console.print(f"{units}: {self._timing.describe()}", markup=False, highlight=False, soft_wrap=True)

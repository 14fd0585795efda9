"""`ShownProgress`: how far a command is, as a bar on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST_LINE = 2.0  # seconds after which somebody wants to know
NEXT_LINES = 30.0  # seconds between lines in a log file


class ShownProgress:
    """Shows counts of one thing after the other while it is open: `begin("rows", 512)`, then `advance(8)` again and again."""

    def __init__(self, console: Console, doing: str) -> None:
        self._console, self._doing = console, doing
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._what, self._done, self._total = "", 0, 0
        self._next_line = time.monotonic() + FIRST_LINE

    def __enter__(self) -> ShownProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, total: int) -> None:
        """`total` of `what` are to come; more of the same adds to it."""
        self._total = total + (self._total if what == self._what else 0)
        self._done = self._done if what == self._what else 0
        self._what = what
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(f"{self._doing} {what}", total=0)
            self._bar.update(self._tasks[what], total=self._total)

    def advance(self, count: int) -> None:
        """So many more of it are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._tasks[self._what], count)
        elif time.monotonic() >= self._next_line and self._done < self._total:
            self._next_line = time.monotonic() + NEXT_LINES
            share = f"{self._done:,} of {self._total:,} {self._what}"
            self._console.print(f"{self._doing}: {share}", highlight=False, soft_wrap=True)

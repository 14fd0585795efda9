"""The tasks that this version knows. One is a file in this folder and an entry of `TASKS`."""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.tasks.contract import Task
from teachercache.tasks.next_token import NEXT_TOKEN

TASKS: tuple[Task, ...] = (NEXT_TOKEN,)


def task_named(name: str, tasks: Sequence[Task] = TASKS) -> Task | None:
    """The task of a name; None where it is none of them."""
    return next((task for task in tasks if task.name == name), None)

"""A child that holds its parent up is given up, whichever way it does."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from teachercache.bounded.process import BoundedProcess, Exhausted

MEMORY, LARGE = 2**28, "a" * 2**20  # more than a pipe holds


def asked(child: BoundedProcess, text: str, *, seconds: float) -> Any:
    """A conversation's text by its template, or of what the child took too much."""
    request = {"template": text, "variables": {}, "conversations": [{}], "most": 2**22}
    try:
        [answer] = child.ask(request, seconds=seconds, memory=MEMORY, most=2**23)
    except Exhausted as error:
        return error
    return answer["text"]


def test_a_child_that_reads_nothing_is_given_up_and_followed_by_another_one() -> None:
    child = BoundedProcess("templates")
    assert asked(child, LARGE, seconds=4) == LARGE
    stopped = child._process
    assert stopped is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(asked(child, LARGE, seconds=0.05)), daemon=True)
    waiting.start()
    waiting.join(20)
    try:
        assert not waiting.is_alive(), "it still waits for the child to read"
    finally:
        stopped.kill()
    assert str(answers[0]) == "time" and stopped.wait(5) == -signal.SIGKILL
    assert asked(child, "b", seconds=4) == "b"

"""A precompute job as a process of its own, and the processes that it consists of, to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from teachercache.config import Recipe

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds, on a machine that has other things to do


class RunningJob:
    """`teachercache precompute RECIPE --json`; a context manager that leaves no process behind."""

    def __init__(self, recipe: Recipe) -> None:
        path = Path(recipe.cache).parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
        self.cache = Path(recipe.cache)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "teachercache", "precompute", str(path), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "pipeline")},
        )
        self._driver = psutil.Process(self._process.pid)
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> RunningJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_running()
        for process in {self._driver, *self._seen}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()

    def is_running(self) -> bool:
        """Tells whether the driver is there, and remembers what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= set(self._driver.children(recursive=True))
        return self._process.poll() is None

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Wait for something while the driver runs; tells whether it came."""
        until = time.monotonic() + PATIENCE
        while self.is_running() and time.monotonic() < until:
            if what():
                return True
            time.sleep(0.02)
        return False

    def records(self) -> set[str]:
        """Names of the records of finished units."""
        return {path.name for path in self.cache.glob(".work/done/*.json")}

    def wait_for_more(self, known: set[str]) -> bool:
        """Wait for records beside those that are known."""
        return self.wait_for(lambda: self.records() > known)

    def send(self, kind: str, number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to its `driver`, an `actor`, the `teacher`'s process or the `raylet`, once there is one; tells whether
        there was."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [process for process in (self._driver, *self._seen) if _kind(process, self._driver) == kind]
            return bool(found)

        if not self.wait_for(is_there):
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            found[-1].send_signal(number)
            return True
        return False

    def end(self) -> tuple[int, str, str]:
        """Wait for the driver; its exit status, what it printed on stdout and on stderr."""
        out, err = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, out, err


def _kind(process: psutil.Process, driver: psutil.Process) -> str | None:
    if process == driver:
        return "driver"
    try:
        command, parent = " ".join(process.cmdline()), process.parent()
        if "engine.forks" in command:
            forked = parent is not None and "engine.forks" in " ".join(parent.cmdline())
            return "teacher" if forked else None
        return "actor" if command.startswith("ray::MapWorker") else process.name()
    except psutil.Error:
        return None

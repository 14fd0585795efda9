"""The supervisor of a teacher's process: goes on with another one where it raises, dies or hangs, and finds the row to blame.

A pass over a batch that fails is repeated over its halves, down to a row that fails alone; that row is left out, and the unit
is computed as if its process had never failed: with the same batches, but for that row. Results of the search are thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from teachercache.cache.stores.store import holds
from teachercache.errors import JobFailed
from teachercache.precompute.capture.attempts import Attempts, isolated
from teachercache.precompute.capture.job_facts import Job
from teachercache.precompute.capture.plan import INPUT_FILE
from teachercache.precompute.engine.fork_server import Ended, Fork, ForkServer, Silent

FRUITLESS = 3  # failures of one unit without a row that fails alone, after which it is given up for this run
BEGUN = 8  # times that one run begins with a unit: whoever supervises it was killed meanwhile
LOADS = 3  # processes that die before their teacher is loaded
HOPELESS = 8  # rows that fail one after the other, and none that does not: it is not the rows


class Failed(Exception):
    """The way in which a process failed; `str()` begins with raised, crashed or hung, and ends with what it said last."""

    def __init__(self, kind: str, said: str, rows: Sequence[str]) -> None:
        super().__init__(f"{kind}: {said}")
        self.rows = tuple(rows)  # in the forward pass that did not end; none where it was at something else


@dataclass(frozen=True)
class GivenUp:
    """A unit without a result."""

    unit: int
    reason: str


class Supervisor:
    """Holds one teacher, in a process of its own that starts when it is first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._server: ForkServer | None = None
        self._process: Fork | None = None
        self._task: tuple[Any, ...] | None = None  # what a new process is told first
        self._attempts: Attempts | None = None  # at the unit
        self._tells = False  # rows are written down before each pass
        self._passed = False  # some rows went through this teacher

    def compute(self, unit: int, payload: bytes) -> Any:
        """The report of a unit that is computed and written (`units.UnitReport`), or `GivenUp`. `payload` is what `tokenise`
        made of it; nothing where that did not end well.

        Raises what the user is to mend, and `JobFailed` for a teacher that fails on whatever it reads.
        """
        attempts = self._begun(unit)
        if attempts.begun > BEGUN:
            return GivenUp(unit, f"it was begun {BEGUN} times, and whoever computed it was killed each time")
        try:
            return self._computed(unit, payload, attempts)
        except Failed as failure:
            return GivenUp(unit, str(failure))
        finally:
            self._attempts, self._task = None, None

    def calibrate(self) -> None:
        """Make what targets are read by, without rows of the sample that fail. Raises `JobFailed`, and what the user is to
        mend."""
        self._check_input()
        self._take("sample")
        lost: dict[str, str] = {}
        for _ in range(HOPELESS):
            try:
                self._ask("calibrate", tuple(lost))
                return
            except Failed as failure:
                self._settle()
                said = str(failure)
                lost |= isolated(failure.rows, partial(self._failure_of, "read"), failed=failure)
        raise JobFailed(f"calibrating failed: {said}; run the same command again to try once more")

    def _begun(self, unit: int) -> Attempts:
        attempts = Attempts.of(self.job.plan.store, unit, run=self.job.run)
        self._tells = attempts.begun > 0
        attempts.begun += 1
        attempts.write()
        return attempts

    def _computed(self, unit: int, payload: bytes, attempts: Attempts) -> Any:
        self._check_input()
        self._take("take", unit, payload or self._tokenised(unit, attempts))
        self._attempts = attempts
        size, fruitless = self.job.precompute.positions_per_batch, 0
        if attempts.suspects:  # of a supervisor that is gone
            self._find(attempts, attempts.suspects, None)
        while True:
            try:
                return self._ask("compute", attempts.lost, size)
            except Failed as failure:
                self._settle()
                known, together = len(attempts.lost), self._find(attempts, failure.rows, failure)
                if len(attempts.lost) > known:
                    continue
                fruitless, size = (0, size // 2) if together and size > 1 else (fruitless + 1, size)
                if fruitless == FRUITLESS:
                    raise

    def _take(self, name: str, *arguments: Any) -> None:
        """A task that this process is told, or the next one when it starts."""
        self._task = (name, *arguments)
        if self._process is not None:
            self._ask(name, *arguments)

    def _find(self, attempts: Attempts, rows: Sequence[str], failure: Failed | None) -> bool:
        """Look for rows that fail alone; True where none does, and all together fail."""
        lost = isolated(rows, partial(self._failure_of, "probe"), failed=failure)
        together = len(rows) > 1 and not lost and self._failure_of("probe", rows) is not None
        attempts.lost |= lost
        attempts.suspects = []
        attempts.write()
        if not self._passed and len(attempts.lost) >= HOPELESS:
            raise JobFailed(
                f"the teacher fails on every row that it is given; {next(reversed(attempts.lost.values()))}; run the same "
                "command again once that is mended"
            )
        return together

    def _tokenised(self, unit: int, attempts: Attempts) -> bytes:
        """Tokenises in the teacher's process what could not be tokenised in a task."""
        while True:
            try:
                return bytes(self._ask("tokenise", unit, None, attempts.documents))
            except Failed as failure:
                self._settle()
                names = [name for name in self._ask("documents", unit) if name not in attempts.documents]
                lost = isolated(names, lambda some: self._failure_of("tokenise", unit, some, {}), failed=failure)
                if not lost:
                    raise
                attempts.documents |= lost
                attempts.write()

    def _check_input(self) -> None:
        """It only warns: a teacher that fails at it goes on without."""
        store = self.job.plan.store
        if holds(store, INPUT_FILE):
            return
        try:
            self._ask("check_input")
        except Failed:
            self._settle()
            store.put(INPUT_FILE, b"{}")

    def _failure_of(self, name: str, *arguments: Any) -> Failed | None:
        """The way in which the process fails at this, or none."""
        try:
            self._ask(name, *arguments)
        except Failed as failure:
            self._settle()
            return failure
        return None

    def _settle(self) -> None:
        """After a failure: a process that can read no row any more, as after some errors of a GPU, is ended."""
        if self._process is None:
            return
        passed = self._passed
        try:
            self._ask("rehearse")
        except Failed:
            self._end()
        self._passed = passed

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The result of a method of `TeacherProcess`. Raises `Failed`, and what the user is to mend."""
        try:
            return self._answer(self._process or self._started(), name, arguments)
        except Failed:
            raise
        except BaseException:  # an answer that nobody took must not be the next one's
            self._end()
            raise

    def _answer(self, process: Fork, name: str, arguments: Any) -> Any:
        rows: Sequence[str] = ()
        seconds = self.job.precompute.batch_seconds
        try:
            process.send((name, arguments))
            while (message := process.receive(seconds if rows else None))[0] == "rows":
                self._passed = self._passed or bool(rows)
                rows = message[1]
                self._write_down(rows)
        except Ended as ended:
            self._process = None
            raise Failed("crashed", str(ended), rows) from None
        except Silent:
            where = process.end(asking_where=True)
            self._process = None
            raise Failed("hung", f"a batch did not end within {seconds:g} s; {where}", rows) from None
        kind, value = message
        if kind == "refused":
            raise value
        if kind == "raised":
            raise Failed("raised", str(value), rows)
        return value

    def _write_down(self, rows: Sequence[str]) -> None:
        if self._tells and self._attempts is not None and rows:
            self._attempts.suspects = list(rows)
            self._attempts.write()

    def _started(self) -> Fork:
        """A process with its teacher loaded, and its unit taken."""
        for _ in range(LOADS):
            try:
                self._server = self._server or ForkServer("teachercache.precompute.capture.teacher_process:serve")
                self._process = self._server.fork()
                self._process.send(self.job)
                self._answer(self._process, "load", ())
                if self._task is not None:
                    self._answer(self._process, self._task[0], self._task[1:])
                return self._process
            except Ended as ended:
                said = str(ended)
                self._server = None
            except Failed as failure:
                said = str(failure)
            self._end()
        raise JobFailed(f"the teacher cannot be loaded: {said}; run the same command again once that is mended")

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(Ended):
                self._process.end()
        self._process = None

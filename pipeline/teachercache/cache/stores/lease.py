"""Leases: one job at a time writes to a cache, wherever its processes run and by whatever path they reach it.

    .work/lease/00003.json   the claim of epoch 3: who holds it, put where there was none
    .work/lease/00003.beat   a number that its holder raises every `BEAT` seconds

The claim of the highest epoch holds. A job whose process is gone from this very machine is followed at once; of any other
one the beat is watched, for `PATIENCE` seconds of the watcher's own clock: where it stands still, the next epoch is claimed.
Clocks of two machines are never compared. A holder that was stopped meanwhile, or cut off, finds at its next write that there
is a later claim, or that its own is gone, and writes nothing more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Buffer

from teachercache.cache.stores.store import Store
from teachercache.errors import JobFailed, TeachercacheError

logger = logging.getLogger(__name__)

WITHIN = ".work/lease"
BEAT = 5.0  # seconds
PATIENCE = 30.0  # seconds without a beat after which a holder is taken for dead
CHECKED_FOR = 1.0  # seconds that one look at the claims holds for
CLAIMS = 20  # tries to claim while others do


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease. `machine` is of one boot and one space of process ids: only there `pid` and `started` say
    whether it lives. `since` is for people."""

    job: str
    host: str
    pid: int
    started: str
    machine: str
    since: str
    token: str

    @classmethod
    def here(cls, job: str) -> Holder:
        """This process."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(job, os.uname().nodename, os.getpid(), _started(os.getpid()), _machine(), now, uuid.uuid4().hex)

    def is_near(self) -> bool:
        """Tells whether it can be seen from here whether it lives."""
        return self.machine == _machine()

    def is_gone(self) -> bool:
        """Tells whether it is seen to have ended."""
        return self.is_near() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> str:
    """The moment at which a process began, in ticks since the machine booted; "" where there is none, or only what is left of
    one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class LeaseLost(JobFailed):
    """Another job has taken over."""


@dataclass(frozen=True)
class Lease:
    """A claim of one epoch; travels to workers, which look at it too."""

    store: Store
    epoch: int
    holder: Holder

    def check(self) -> None:
        """Raise `LeaseLost` where another job has taken over."""
        claims = _claims(self.store)
        if max(claims, default=0) == self.epoch and _holder(self.store, self.epoch) == self.holder:
            return
        later = _holder(self.store, max(claims)) if claims else None
        who = f"{later.job} ({later})" if later is not None else "job"
        raise LeaseLost(
            f"another {who} has taken {self.store.name} over, because this one did not answer for a while; "
            "this one writes nothing more, and what it finished is kept"
        )


class LeasedStore:
    """A store whose objects are written only while a lease holds; picklable."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._checked = -CHECKED_FOR

    @property
    def name(self) -> str:
        """That of the store."""
        return self.lease.store.name

    def put(self, name: str, data: Buffer) -> None:
        """Checks the lease first."""
        self._check()
        self.lease.store.put(name, data)

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Checks the lease first."""
        self._check()
        return self.lease.store.put_if_absent(name, data)

    def get(self, name: str) -> bytes:
        """That of the store."""
        return self.lease.store.get(name)

    def list(self, prefix: str = "") -> dict[str, int]:
        """That of the store, without the lease itself."""
        return {name: n for name, n in self.lease.store.list(prefix).items() if not name.startswith(f"{WITHIN}/")}

    def delete(self, *names: str) -> None:
        """Checks the lease first."""
        self._check()
        self.lease.store.delete(*names)

    def sweep(self, prefix: str = "") -> None:
        """Checks the lease first."""
        self._check()
        self.lease.store.sweep(prefix)

    def _check(self) -> None:
        # A process that was stopped finds on waking that more time has passed.
        if time.monotonic() - self._checked >= CHECKED_FOR:
            self.lease.check()
            self._checked = time.monotonic()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LeasedStore) and self.lease == other.lease

    def __hash__(self) -> int:
        return hash(self.lease)

    def __getstate__(self) -> dict[str, Any]:
        return {"lease": self.lease, "_checked": -CHECKED_FOR}


@contextlib.contextmanager
def leased(
    store: Store,
    *,
    job: str,
    tell: Callable[[str], None] = lambda line: None,
    beat: float = BEAT,
    patience: float = PATIENCE,
) -> Iterator[LeasedStore]:
    """Hold the lease of a cache; gives the store to write by.

    Another holder is waited for until it is known to be gone; `tell` says that. Raises `JobFailed` where it is alive, naming
    who it is.
    """
    lease = _claimed(store, Holder.here(job), tell, patience)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, ended, beat), daemon=True)
    beating.start()
    try:
        yield LeasedStore(lease)
    finally:
        ended.set()
        beating.join()
        _release(lease)


def _claimed(store: Store, holder: Holder, tell: Callable[[str], None], patience: float) -> Lease:
    for _ in range(CLAIMS):
        epoch = max(_claims(store), default=0)
        if epoch and not _is_over(store, epoch, tell, patience):
            continue
        lease = Lease(store, epoch + 1, holder)
        if store.put_if_absent(_claim(epoch + 1), json.dumps(asdict(holder)).encode()):
            return lease
    raise JobFailed(f"other jobs claim {store.name} all the time; wait for them or stop them")


def _is_over(store: Store, epoch: int, tell: Callable[[str], None], patience: float) -> bool:
    """True where the holder of an epoch is gone, False where its claim is; raises `JobFailed` where it is alive."""
    holder = _holder(store, epoch)
    if holder is not None and holder.is_gone():
        return True
    what = "job" if holder is None else f"{holder.job} ({holder})"
    if holder is None or not holder.is_near():
        tell(f"another {what} held {store.name}: looking for {patience:g} s whether it is alive …")
        state = _state_after(store, epoch, patience)
        if state != "alive":
            return state == "dead"
    where = "stop it" if holder is None else f"stop it (on {holder.host}: kill {holder.pid})"
    raise JobFailed(f"another {what} is writing to {store.name}; wait for it or {where}")


def _state_after(store: Store, epoch: int, patience: float) -> Literal["alive", "dead", "released"]:
    """Watches the beat of an epoch by this process's own clock."""
    first, began = _beats_of(store, epoch), time.monotonic()
    while True:
        time.sleep(patience / 20)
        waited = time.monotonic() - began  # before the look: this process, too, may be stopped at any moment
        if (now := _beats_of(store, epoch)) != first:
            return "alive" if now is not None else "released"
        if waited >= patience:
            return "dead"


def _beat(lease: Lease, ended: threading.Event, seconds: float) -> None:
    """Until the lease ends: a store that is away for a while is no reason to end, a later claim is."""
    count = 0
    while not ended.is_set():
        try:
            lease.check()
            count += 1
            lease.store.put(_beat_name(lease.epoch), f"{lease.holder.token} {count}".encode())
        except LeaseLost:
            return
        except (TeachercacheError, OSError) as error:
            logger.info("no beat: %s", error)
        ended.wait(seconds)


def _release(lease: Lease) -> None:
    """Remove the claim and what is left of those before it; that of a later holder stays."""
    with contextlib.suppress(TeachercacheError, OSError):  # it will be taken for dead
        if _holder(lease.store, lease.epoch) == lease.holder:
            names = lease.store.list(f"{WITHIN}/")
            lease.store.delete(*(name for name in names if _epoch(name) <= lease.epoch))


def _claim(epoch: int) -> str:
    return f"{WITHIN}/{epoch:05d}.json"


def _beat_name(epoch: int) -> str:
    return f"{WITHIN}/{epoch:05d}.beat"


def _epoch(name: str) -> int:
    digits = name.rpartition("/")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _claims(store: Store) -> list[int]:
    return [_epoch(name) for name in store.list(f"{WITHIN}/") if name.endswith(".json")]


def _holder(store: Store, epoch: int) -> Holder | None:
    try:
        return Holder(**json.loads(store.get(_claim(epoch))))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _beats_of(store: Store, epoch: int) -> bytes | None:
    """Changes with every beat; None once the claim is released."""
    try:
        store.get(_claim(epoch))
        return store.get(_beat_name(epoch))
    except FileNotFoundError:
        return None

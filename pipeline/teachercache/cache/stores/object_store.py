"""Objects below a URL: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

The library is obstore, for reading and writing alike. It puts an object whole and in one request (PUT), where there is none
if asked (`If-None-Match: *`, or the store's own word for it); nothing is ever streamed into place, and there are no multipart
uploads: what a killed writer leaves is nothing at all.

A request that fails for a reason that may pass (the server is busy or away, a connection is cut or stalls) is made again,
after waits that double from `FIRST_WAIT` on: reading rides out an outage of about 15 seconds, writing, behind which stand
hours of a teacher, one of two minutes. What cannot pass, such as denied access, is said at once. All errors are one line:
which object, what happened, the remedy.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import random
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from typing_extensions import Buffer

from teachercache.cache.files.entries import check_inside
from teachercache.cache.stores.clients import Client, client_of
from teachercache.errors import CacheDamaged, CacheError, JobFailed

logger = logging.getLogger(__name__)

ATTEMPTS = 6  # at reading
WRITE_ATTEMPTS = 12
FIRST_WAIT = 0.5  # seconds
LONGEST_WAIT = 20.0
PIECE = 16 * 2**20  # bytes of one request
MOST_BYTES = 5 * 10**9  # of one PUT; S3 takes 5 GiB
AGAIN = "upload it again from the cache that it was copied from, or precompute that again"
# Asking again gives the same answer: a wrong region or endpoint, an option that the server does not know.
_FINAL = re.compile(r"status code: 4(?!08|09|12|29)\d\d\b|Received redirect")

Result = TypeVar("Result")


class Closed(Exception):
    """The store was closed while a read waited: whoever closed it wants nothing of it any more."""


class ObjectStore:
    """Objects by their names relative to a URL: a `Store`, which reads in pieces as well. Cheap to make and picklable; connects
    at the first request of a process.

    All verbs raise `CacheError` when access is denied or the URL cannot be used, and `JobFailed` when retrying was in vain.
    """

    def __init__(
        self,
        url: str,
        *,
        attempts: int = ATTEMPTS,
        write_attempts: int = WRITE_ATTEMPTS,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.url = url
        self.attempts, self.write_attempts, self.first_wait = attempts, write_attempts, first_wait
        self.name = url.partition("?")[0].rstrip("/")  # in messages: without options such as the endpoint
        self._closed = threading.Event()

    def name_of(self, file: str) -> str:
        """Returns the name of a file for messages."""
        return f"{self.name}/{file}".rstrip("/")

    # ----------------------------------------------------------------- reading

    def read(self, file: str, *, most: int) -> bytes:
        """The whole content of a file of at most so many bytes. Raises as `pieces` does."""
        return b"".join(self.pieces(file, most=most))

    def pieces(self, file: str, *, expected_bytes: int | None = None, most: int | None = None) -> Iterator[bytes]:
        """The content of a file, `PIECE` bytes at a time; each piece is retried by itself.

        Raises `FileNotFoundError` where there is none, and `CacheDamaged` before the first byte when its size is not
        `expected_bytes` or above `most`.
        """
        size = self._reading(file, lambda client: client.size(file))
        if expected_bytes is not None and size != expected_bytes:
            raise CacheDamaged(f"{self.name_of(file)} holds {size} bytes, the manifest says {expected_bytes}; {AGAIN}")
        if most is not None and size > most:
            raise CacheDamaged(f"{self.name_of(file)} holds {size} bytes, at most {most} are possible; {AGAIN}")
        for start in range(0, size, PIECE):
            length = min(PIECE, size - start)
            yield self._reading(file, functools.partial(Client.piece, name=file, start=start, length=length))

    def get(self, name: str) -> bytes:
        """One request."""
        return self._reading(name, lambda client: client.get(name))

    def list(self, prefix: str = "") -> dict[str, int]:
        """A request for a thousand names of the folder that the prefix names, and of those below it."""
        found = self._reading(prefix, lambda client: client.list(prefix.rpartition("/")[0]))
        return {name: size for name, size in sorted(found) if name.startswith(prefix)}

    # ----------------------------------------------------------------- writing

    def put(self, name: str, data: Buffer) -> None:
        """One request, again until one is answered: it writes the same."""
        self._check_size(name, data)
        self._writing(name, lambda client: client.put(name, data))

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """One conditional request. Where the answer to an earlier attempt was lost, an object with these very bytes is taken
        for what that one wrote: who must tell them apart writes bytes of its own."""
        self._check_size(name, data)
        uncertain = False

        def attempt(client: Client) -> bool:
            nonlocal uncertain
            before, uncertain = uncertain, True
            return client.put_if_absent(name, data) or (before and client.holds(name, data))

        return self._writing(name, attempt)

    def delete(self, *names: str) -> None:
        """A request for a thousand names on S3 itself, and for each elsewhere."""
        for name in names:
            check_inside(name)
        if names:
            self._writing(names[0], lambda client: client.delete(names))

    def sweep(self, prefix: str = "") -> None:
        """Nothing to do: what a killed writer leaves here is nothing."""

    def close(self) -> None:
        """End the waits between retries, in all threads."""
        self._closed.set()

    def _check_size(self, name: str, data: Buffer) -> None:
        check_inside(name)
        if (size := memoryview(data).nbytes) > MOST_BYTES:
            raise CacheError(
                f"{self.name_of(name)} would hold {size} bytes, and object stores take at most {MOST_BYTES} at once; lower "
                "precompute.unit_rows"
            )

    # ----------------------------------------------------------------- retries

    def _reading(self, file: str, request: Callable[[Client], Result]) -> Result:
        return self._retried(file, request, self.attempts, what="read")

    def _writing(self, file: str, request: Callable[[Client], Result]) -> Result:
        return self._retried(file, request, self.write_attempts, what="written")

    def _retried(self, file: str, request: Callable[[Client], Result], attempts: int, *, what: str) -> Result:
        client, wait = client_of(self.url), self.first_wait
        for left in reversed(range(attempts)):
            if self._closed.is_set():
                raise Closed
            try:
                return request(client)
            except OSError as error:
                reason = textwrap.shorten(str(error), 300, placeholder=" …")
                self._raise_if_final(file, error, reason, what)
            if attempts - left == ATTEMPTS:  # reading gives up here
                logger.warning("%s: %s; trying again for about two minutes", self.name_of(file), reason)
            if left:
                # Many processes that were turned away together must not come back together.
                self._closed.wait(random.uniform(0.5, 1) * wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise JobFailed(
            f"{self.name_of(file)} could not be {what} in {attempts} attempts: {reason}; check the network and the "
            "server, then run the same command again"
        )

    def _raise_if_final(self, file: str, error: OSError, reason: str, what: str) -> None:
        if isinstance(error, FileNotFoundError):
            if what == "written":
                raise CacheError(
                    f"{self.name_of(file)} cannot be written: there is no such bucket; make it, or name another"
                ) from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name_of(file)) from None
        if isinstance(error, PermissionError):
            raise CacheError(
                f"{self.name_of(file)}: access is denied ({reason}); set the store's credentials to ones by which it may be "
                f"{what}, for S3 by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from None
        if _FINAL.search(reason):
            raise CacheError(
                f"{self.name_of(file)} cannot be {what}: {reason}; check the URL and its options, such as ?region=… or "
                "?endpoint_override=…&scheme=http"
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_closed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _closed=threading.Event())

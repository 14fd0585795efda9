"""Files below a URL: S3, Google Cloud Storage, and whatever else pyarrow.fs knows.

A read that fails for a reason that may pass (the server is busy or away, a connection is cut or stalls) is tried again
`ATTEMPTS` times in all, after waits that double from `FIRST_WAIT` on: an outage of about 15 seconds goes unnoticed. What
cannot pass, such as denied access, is said at once. All errors are one line: which object, what happened, the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from teachercache.errors import CacheDamaged, CacheError, JobFailed

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds
PIECE = 16 * 2**20  # bytes of one request
AGAIN = "upload it again from the cache that it was copied from, or precompute that again"
_DENIED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|MISSING_AUTHENTICATION_TOKEN"
    r"|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|UNRECOGNIZED_CLIENT)|HTTP status 40[13]\b|PERMISSION_DENIED"
    r"|UNAUTHENTICATED|Permission denied"
)
_GONE = re.compile(r"AWS Error NO_SUCH_(KEY|BUCKET)|Bucket '[^']*' not found|HTTP status 404\b")
# Asking again gives the same answer: a wrong region or endpoint, an option that the server does not know.
_FINAL = re.compile(r"AWS Error INVALID_|HTTP status (3\d\d|4(?!08|29)\d\d)\b")

Result = TypeVar("Result")


class Closed(Exception):
    """The store was closed while a read waited: whoever closed it wants nothing of it any more."""


class ObjectStore:
    """Files by their names relative to a URL. Cheap to make and picklable; connects at the first read of a process."""

    def __init__(self, url: str, *, attempts: int = ATTEMPTS, first_wait: float = FIRST_WAIT) -> None:
        self.url = url
        self.attempts = attempts
        self.first_wait = first_wait
        self.name = url.partition("?")[0].rstrip("/")  # in messages: without options such as the endpoint
        self._closed = threading.Event()

    def name_of(self, file: str) -> str:
        """Returns the name of a file for messages."""
        return f"{self.name}/{file}".rstrip("/")

    def read(self, file: str, *, most: int) -> bytes:
        """The whole content of a file of at most so many bytes. Raises as `pieces` does."""
        return b"".join(self.pieces(file, most=most))

    def pieces(self, file: str, *, expected_bytes: int | None = None, most: int | None = None) -> Iterator[bytes]:
        """The content of a file, `PIECE` bytes at a time; each piece is retried by itself.

        Raises `FileNotFoundError` where there is none, `CacheDamaged` before the first byte when its size is not
        `expected_bytes` or above `most`, `CacheError` when access is denied, and `JobFailed` when retrying was in vain.
        """
        filesystem, root = self._connected()
        source = self._retried(file, lambda: filesystem.open_input_file(f"{root}/{file}"))
        with source:
            size = source.size()
            if expected_bytes is not None and size != expected_bytes:
                raise CacheDamaged(
                    f"{self.name_of(file)} holds {size} bytes, the manifest says {expected_bytes}; {AGAIN}"
                )
            if most is not None and size > most:
                raise CacheDamaged(f"{self.name_of(file)} holds {size} bytes, at most {most} are possible; {AGAIN}")
            for start in range(0, size, PIECE):
                yield self._retried(file, functools.partial(_read, source, min(PIECE, size - start), start))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name. Raises as `pieces` does; nothing there is an empty dict."""
        filesystem, root = self._connected()
        from pyarrow import fs

        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        infos = self._retried("", lambda: filesystem.get_file_info(selector))
        return {info.path.removeprefix(root).lstrip("/"): info.size for info in infos if info.type == fs.FileType.File}

    def close(self) -> None:
        """End the waits between retries, in all threads."""
        self._closed.set()

    def _connected(self) -> tuple[Any, str]:
        """The filesystem of this process, and the URL's path in it."""
        return self._retried("", lambda: _connect(self.url, os.getpid()))

    def _retried(self, file: str, read: Callable[[], Result]) -> Result:
        wait = self.first_wait
        for left in reversed(range(self.attempts)):
            if self._closed.is_set():
                raise Closed
            try:
                with in_flight.running():
                    return read()
            except OSError as error:
                reason = textwrap.shorten(str(error), 300, placeholder=" …")
                self._raise_if_final(file, error, reason)
            if left:
                # Many processes that were turned away together must not come back together.
                self._closed.wait(random.uniform(0.5, 1) * wait)
                wait *= 2
        raise JobFailed(
            f"{self.name_of(file)} could not be read in {self.attempts} attempts: {reason}; check the network and the "
            "server, then run the same command again"
        )

    def _raise_if_final(self, file: str, error: OSError, reason: str) -> None:
        if isinstance(error, FileNotFoundError) or _GONE.search(reason):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.name_of(file)) from None
        if isinstance(error, PermissionError) or _DENIED.search(reason):
            raise CacheError(
                f"{self.name_of(file)}: access is denied ({reason}); set the store's credentials to ones that may read "
                "it, for S3 by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from None
        if _FINAL.search(reason):
            raise CacheError(
                f"{self.name_of(file)} cannot be read: {reason}; check the URL and its options, such as ?region=… or "
                "?endpoint_override=…&scheme=http"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_closed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _closed=threading.Event())


@functools.cache  # never freed: ending a client that a fork inherited is nothing that the libraries below provide for
def _connect(url: str, pid: int) -> tuple[Any, str]:
    """The filesystem of a URL and the path in it, for the process `pid`: connections do not survive a fork."""
    from pyarrow import fs

    try:
        filesystem, root = fs.FileSystem.from_uri(_with_defaults(url))
        if not root:
            raise ValueError("it names no bucket")
    except (ValueError, NotImplementedError, ImportError) as error:
        raise CacheError(
            f"the cache's URL {url} cannot be used: {' '.join(str(error).split())}; write e.g. s3://BUCKET/PREFIX"
        ) from None
    if filesystem.type_name == "s3":
        # A URL's own retries are 31 at a steady 0.2 s, however busy the server says it is: only ours are left.
        _, (options,) = filesystem.__reduce__()
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        filesystem = fs.S3FileSystem(**options, retry_strategy=once)
    return filesystem, root.rstrip("/")


def _with_defaults(url: str) -> str:
    """Google's client retries for 15 minutes without a word, unless it is told otherwise: only our retries are left."""
    if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in url:
        return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds=1"
    return url


def _read(source: Any, length: int, start: int) -> bytes:
    data: bytes = source.read_at(length, start)
    if len(data) != length:
        raise OSError(f"{len(data)} of {length} bytes came")
    return data


class _Requests:
    """Requests keep forks out, and forks requests.

    A fork in the middle of a request would inherit the locks that pyarrow and the store's client hold meanwhile, and wait
    for them forever. So a fork waits until those that are running are over, at most one piece or timeout each. That makes a
    hang rare, and does not exclude it (their own threads hold locks between requests as well): what reads from a store in
    processes of its own should spawn them, as training does.
    """

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._changed:
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def before_fork(self) -> None:
        self._changed.acquire()
        self._changed.wait_for(lambda: self._count == 0)

    def after_fork(self) -> None:
        self._changed.release()


in_flight = _Requests()
os.register_at_fork(
    before=in_flight.before_fork,
    after_in_parent=in_flight.after_fork,
    after_in_child=in_flight.after_fork,
)

"""Clients of object stores: obstore behind the few requests that are made here, and URLs with their options.

Errors are Python's own: `FileNotFoundError`, `PermissionError`, and `OSError` for whatever may pass. A client makes no request
twice: who asks for it decides that (object_store.py).
"""

from __future__ import annotations

import configparser
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from typing_extensions import Buffer

from teachercache.errors import CacheError

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "file": "file"}
OPTIONS = {"region", "scheme", "endpoint_override", "anonymous"}
CONNECT_SECONDS, STALL_SECONDS, REQUEST_SECONDS = 10, 20, 600  # the last is for 16 MiB or a whole shard, however slow


class Client:
    """The objects below the URL's path, which is `root`."""

    def __init__(self, store: Any, root: str) -> None:
        self._store, self._root = store, root

    def size(self, name: str) -> int:
        """Bytes of an object."""
        with _plain_errors():
            return int(_obstore().head(self._store, self._key(name))["size"])

    def piece(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of an object."""
        with _plain_errors():
            data = bytes(_obstore().get_range(self._store, self._key(name), start=start, length=length))
        if len(data) != length:
            raise OSError(f"{len(data)} of {length} bytes came")
        return data

    def get(self, name: str) -> bytes:
        """All bytes of an object."""
        with _plain_errors():
            return bytes(_obstore().get(self._store, self._key(name)).bytes())

    def list(self, folder: str) -> list[tuple[str, int]]:
        """Names and sizes below a folder."""
        within = self._key(folder)
        with _plain_errors():
            pages = _obstore().list(self._store, within or None, chunk_size=1000)
            entries = [(entry["path"], entry["size"]) for page in pages for entry in page]
        found = {path.removeprefix(self._root).lstrip("/"): size for path, size in entries}
        # Some tools write empty objects that stand for folders.
        folders = {name[:end] for name in found for end, sign in enumerate(name) if sign == "/"}
        return [(name, size) for name, size in found.items() if name and (size or name not in folders)]

    def put(self, name: str, data: Buffer) -> None:
        """Write an object."""
        with _plain_errors():
            _obstore().put(self._store, self._key(name), _bytes_of(data), use_multipart=False)

    def put_if_absent(self, name: str, data: Buffer) -> bool:
        """Write an object; False where there is one."""
        from obstore.exceptions import AlreadyExistsError

        with _plain_errors():
            try:
                _obstore().put(self._store, self._key(name), _bytes_of(data), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def holds(self, name: str, data: Buffer) -> bool:
        """Tells whether there is an object with these bytes."""
        try:
            return self.get(name) == bytes(data)
        except FileNotFoundError:
            return False

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects, a thousand in a request on S3 itself; it may be that some are not there."""
        try:
            with _plain_errors():
                _obstore().delete(self._store, [self._key(name) for name in names])
        except FileNotFoundError:  # stores that remove one by one stop at the first that is not there
            for name in names[: len(names) if len(names) > 1 else 0]:
                self.delete([name])

    def _key(self, name: str) -> str:
        return "/".join(filter(None, [self._root, name]))


def _bytes_of(data: Buffer) -> memoryview:
    """The same memory as unsigned bytes, which the library asks for; Arrow's buffers are of signed ones."""
    return memoryview(data).cast("B")


def _obstore() -> Any:
    import obstore

    return obstore


@contextmanager
def _plain_errors() -> Iterator[None]:
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise PermissionError(_in_a_line(error)) from None
    except exceptions.NotFoundError as error:
        raise FileNotFoundError(_in_a_line(error)) from None
    except exceptions.BaseError as error:
        raise OSError(_in_a_line(error)) from None


_KINDS = {"Connect": ": cannot connect", "Timeout": ": it took too long"}  # which the library says there alone


def _in_a_line(error: BaseException) -> str:
    """Returns what the library says, without what is for those who debug it."""
    said, _, debug = str(error).partition("\n\nDebug source:")
    why = next((words for kind, words in _KINDS.items() if f"kind: {kind}" in debug), "")
    return " ".join((said + why).split())


def client_of(url: str) -> Client:
    """Returns the client of a URL, one a process. Raises `CacheError` for a URL that cannot be used, and in a process that was
    forked from one with clients of its own: the library's threads do not exist there."""
    if _forked:
        raise CacheError(
            f"{url.partition('?')[0]} cannot be reached from a process that was forked from one which has read or written "
            "there; start it by `spawn`"
        )
    return _client(url)


@functools.cache
def _client(url: str) -> Client:
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        kind = SCHEMES.get(parts.scheme)
        if kind is None:
            raise ValueError(f"there is no store of the kind {parts.scheme}://")
        if unknown := sorted(options.keys() - OPTIONS):
            raise ValueError(f"it has an option {unknown[0]!r}; there are {', '.join(sorted(OPTIONS))}")
        user, _, bucket = parts.netloc.rpartition("@")
        if user == "anonymous":
            options["anonymous"] = "true"
        if kind != "file" and not bucket:
            raise ValueError("it names no bucket")
        store = _MADE[kind](bucket, options)
    except (ValueError, ImportError) as error:
        raise CacheError(
            f"the cache's URL {url} cannot be used: {' '.join(str(error).split())}; write e.g. s3://BUCKET/PREFIX"
        ) from None
    return Client(store, parts.path.strip("/"))


def _s3(bucket: str, options: Mapping[str, str]) -> Any:
    from obstore.store import S3Store

    config: Any = _profile()
    if "region" in options:
        config["region"] = options["region"]
    if "endpoint_override" in options:
        # Not every server that speaks the protocol knows how to delete many objects at once.
        config |= {"endpoint": _endpoint(options), "disable_bulk_delete": True}
    if options.get("anonymous") == "true":
        config["skip_signature"] = True
    return S3Store(bucket, config=config, **_common(options))


def _endpoint(options: Mapping[str, str]) -> str:
    place = options["endpoint_override"]
    return place if "://" in place else f"{options.get('scheme', 'https')}://{place}"


def _profile() -> dict[str, str]:
    """Keys of ~/.aws/credentials, which the library does not read, where the environment has none."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    named = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    parsed = configparser.ConfigParser()
    parsed.read(Path(named).expanduser())
    profile = os.environ.get("AWS_PROFILE", "default")
    known = parsed[profile] if parsed.has_section(profile) else {}
    names = ("access_key_id", "secret_access_key", "session_token")
    return {name: known[f"aws_{name}"] for name in names if f"aws_{name}" in known}


def _gs(bucket: str, options: Mapping[str, str]) -> Any:
    from obstore.store import GCSStore

    config: Any = {"skip_signature": True} if options.get("anonymous") == "true" else {}
    return GCSStore(bucket, config=config, **_common(options))


def _az(container: str, options: Mapping[str, str]) -> Any:
    from obstore.store import AzureStore

    config: Any = {"endpoint": _endpoint(options)} if "endpoint_override" in options else {}
    if options.get("anonymous") == "true":
        config["skip_signature"] = True
    return AzureStore(container, config=config, **_common(options))


def _file(_: str, options: Mapping[str, str]) -> Any:
    from obstore.store import LocalStore

    return LocalStore()


_MADE: dict[str, Callable[[str, Mapping[str, str]], Any]] = {"s3": _s3, "gs": _gs, "az": _az, "file": _file}


def _common(options: Mapping[str, str]) -> dict[str, Any]:
    plain = options.get("scheme") == "http" or options.get("endpoint_override", "").startswith("http://")
    client = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=STALL_SECONDS),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
    }
    return {"client_options": client, "retry_config": {"max_retries": 0}}


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _client.cache_info().currsize > 0


os.register_at_fork(after_in_child=_after_fork)

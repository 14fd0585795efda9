"""Files that are named by their content: what two writers make never meets under one name, unless it is the same."""

from __future__ import annotations

import hashlib

from typing_extensions import Buffer

from teachercache.cache.files.digests import NAME_DIGITS
from teachercache.cache.files.entries import FileInfo
from teachercache.cache.stores.store import Store
from teachercache.stage_times import stage


def put_named(store: Store, within: str, stem: str, suffix: str, data: Buffer) -> FileInfo:
    """Write a whole file as `within/STEM-<12 digits of its sha256>SUFFIX`; it is never read back."""
    with stage("writing"):
        digest = hashlib.sha256(data).hexdigest()
        info = FileInfo(f"{within}/{stem}-{digest[:NAME_DIGITS]}{suffix}", memoryview(data).nbytes, digest)
        store.put(info.file, data)
    return info


def put_listed(store: Store, name: str, data: Buffer) -> FileInfo:
    """Write a whole file under a name that is given; returns what a manifest says of it."""
    store.put(name, data)
    return FileInfo(name, memoryview(data).nbytes, hashlib.sha256(data).hexdigest())

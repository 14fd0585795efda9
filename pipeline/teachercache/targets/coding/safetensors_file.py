"""Arrays as safetensors in files that are named by their content: two jobs that make the same one write the same file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachercache.bounded.strangers_json import parse_json

MOST_METADATA_VALUES = 2**16


def save_named(
    arrays: Mapping[str, Any], metadata: dict[str, str], folder: Path, *, prefix: str, digest: str | None = None
) -> Path:
    """Write `folder/PREFIX` and 16 digits of the sha256, or a `digest` of what it says, by temp file and rename; returns the
    path.

    `metadata` has one key: safetensors writes several in an order that differs from call to call.
    """
    from safetensors.numpy import save

    data = save(dict(arrays), metadata)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{digest or hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())  # shards are read by it: a record of it must not outlive it
    temporary.replace(path)
    return path


def load_named(path: Path, *, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of a safetensors file, and the JSON that its metadata holds under `key`.

    Raises `ValueError` for a file that is missing or is none, or of another version than 1.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = parse_json((file.metadata() or {})[key].encode(), most=MOST_METADATA_VALUES)
        version = described["version"]
    except (OSError, SafetensorError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__)) from None
    if version != 1:
        raise ValueError(f"it is of version {version!r}, this version of teachercache reads 1")
    return arrays, described

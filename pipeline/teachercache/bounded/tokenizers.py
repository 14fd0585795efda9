"""Tries a tokenizer in a child process: does it load and read texts within bounds, where nothing else can be harmed?"""

from __future__ import annotations

import hashlib

from teachercache.bounded.process import BoundedProcess, Exhausted

SECONDS = 8.0  # of processor time; 262,000 tokens load in 2
MEMORY = 2**29
_LARGER = 24  # times a file's size in memory, above that
_tried: dict[tuple[bytes, int], str | None] = {}  # by digest: files are large


def try_tokenizer(data: bytes, *, memory: int = MEMORY) -> None:
    """Load a tokenizer.json in another process and give it texts.

    Raises `ValueError`, in one line, where that fails or takes more than `SECONDS`, or than `memory` bytes and some for its
    size. Costs 0.2 s and the time of loading, once in a process for equal bytes.
    """
    key = hashlib.sha256(data).digest(), memory
    if key not in _tried:
        _tried[key] = _why_not(data, memory + _LARGER * len(data))
    if (reason := _tried[key]) is not None:
        raise ValueError(reason)


def _why_not(data: bytes, memory: int) -> str | None:
    try:
        answer = BoundedProcess("trial").ask({"data": data}, seconds=SECONDS, memory=memory, most=2**16)
    except Exhausted as error:
        answer = {"exhausted": str(error)}
    if "refused" in answer:
        return f"they read no text ({answer['refused']})"
    if "exhausted" in answer:
        most = f"{SECONDS:g} s" if answer["exhausted"] == "time" else f"{memory >> 20} MiB"
        return f"to load them and read a few lines takes more than {most}"
    return None

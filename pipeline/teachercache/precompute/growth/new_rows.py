"""Rows of a corpus that a finished cache does not have, by the hash of their content, written to a corpus of their own.

Only they are computed, by an ordinary job that takes the calibration of the cache; so what can be said of a row without the
teacher costs one pass over the corpus, in bounded memory: 16 bytes for each document that the cache knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.cache.composition.row_facts import source_ids_of
from teachercache.cache.files.bounds import MOST_CALIBRATION_BYTES
from teachercache.cache.manifest.model import QUARANTINE
from teachercache.cache.storage.source import read_checked
from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CacheDamaged
from teachercache.files import sync_files

ROWS = 4096  # that are looked up at a time
Ids = NDArray[np.bytes_]  # 16 bytes each, sorted


def known_sources(cache: Cache) -> Ids:
    """The ids of all documents that a cache holds, or has in quarantine."""
    parts = [source_ids_of(cache, info) for info in cache.infos]
    for info in cache.manifest.files:
        if info.file.startswith(f"{QUARANTINE}/"):
            lines = read_checked(cache.source, info, most=MOST_CALIBRATION_BYTES).splitlines()
            parts.append(_ids([_source_of(line, info.file) for line in lines]))
    return np.unique(np.concatenate([_ids([]), *parts]))


def write_new_rows(corpus: CorpusConfig, known: Ids, file: Path) -> int:
    """Write the rows of a corpus whose content is not known, as JSON lines, and return how many of them can be used. The file
    appears when it is whole. Raises `CorpusError` for a corpus that cannot be read."""
    temporary = file.with_name(f"{file.name}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    usable = 0
    with temporary.open("w", encoding="utf-8") as sink:
        for document, row in _new_rows(corpus, known):
            usable += document.problem is None
            sink.write(json.dumps(row, default=str) + "\n")
    sync_files(file.parent)
    temporary.replace(file)
    return usable


def corpus_of_new_rows(corpus: CorpusConfig, file: Path) -> CorpusConfig:
    """The corpus that these rows are, read as that which they came from."""
    free = {
        "source": str(file),
        "format": "jsonl",
        "name": None,
        "revision": None,
        "split": "train",
        "streaming": False,
    }
    return corpus.model_copy(update={**free, "limit": None})


def _new_rows(corpus: CorpusConfig, known: Ids) -> Iterator[tuple[Document, dict[str, Any]]]:
    """Rows that are not known, each as little of it as names its content."""
    left = iter(read_rows(corpus))
    while rows := list(islice(left, ROWS)):
        found = [next(iter(documents([row], corpus))) for row in rows]
        ids = _ids([document.source_id for document in found])
        places = np.searchsorted(known, ids)
        is_known = np.zeros(len(ids), np.bool_)
        inside = places < len(known)
        is_known[inside] = known[places[inside]] == ids[inside]
        for document, row, is_there in zip(found, rows, is_known.tolist(), strict=True):
            assert isinstance(document, Document)  # a duplicate has another one before it
            if not is_there:
                yield document, _content(row, document, corpus)


def _content(row: dict[str, Any], document: Document, corpus: CorpusConfig) -> dict[str, Any]:
    """The field that a usable row is; all of one that is not, so that it gets the same reason."""
    field = corpus.messages_field or corpus.text_field
    return {field: row[field]} if document.problem is None else row


def _ids(source_ids: list[str]) -> Ids:
    # All are of one length, so that numpy, which compares without zeros at the end, compares whole ids.
    return np.frombuffer(bytes.fromhex("".join(source_ids)), "S16")


def _source_of(line: bytes, file: str) -> str:
    try:
        source_id = json.loads(line)["source_id"]
        if len(bytes.fromhex(source_id)) != 16:
            raise ValueError("an id of another length")
    except (ValueError, KeyError, TypeError) as error:
        raise CacheDamaged(f"{file} does not list quarantined rows ({error}); fetch the cache again") from None
    return str(source_id)

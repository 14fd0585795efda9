"""Documents: rows that are checked, named by their content, counted, and put on one side of the held-out split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from teachercache.config import CorpusConfig
from teachercache.tokens.rows import is_held_out

EXCERPT_CHARACTERS = 500


@dataclass(frozen=True)
class Document:
    """One row of the corpus: a text, or a conversation, or (with `problem` set) a row that cannot be used.

    A document with a problem keeps an excerpt of the row in `text`; it is to be quarantined, never tokenised.
    """

    source_id: str  # blake2b-128 of the raw UTF-8 text, or of the canonical JSON of the messages; 32 hex digits
    occurrence: int  # 0 for the first row with this content
    held_out: bool
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    problem: str | None = None

    def to_json(self) -> str:
        """One line of ASCII JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str | bytes) -> Document:
        """The inverse of `to_json`."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Duplicate:
    """A row whose content occurred before, dropped because `corpus.deduplicate` is set."""

    source_id: str


def documents(rows: Iterable[dict[str, Any]], config: CorpusConfig) -> Iterator[Document | Duplicate]:
    """One `Document` or `Duplicate` for every row, in order.

    Rows that cannot be used come out with `problem` set, and are never taken for duplicates: each is accounted for.
    Equal content counts up `occurrence`; which of several equal rows comes first makes no difference to what is stored.
    Remembers a hash of every distinct row, about 100 bytes of memory each.
    """
    seen: set[bytes] = set()
    repeats: dict[bytes, int] = {}
    for row in rows:
        document = document_of(row, config)
        key = bytes.fromhex(document.source_id)
        if key not in seen:
            seen.add(key)
            yield document
        elif config.deduplicate and document.problem is None:
            yield Duplicate(document.source_id)
        else:
            repeats[key] = repeats.get(key, 0) + 1
            yield dataclasses.replace(document, occurrence=repeats[key])


def content_id(content: str) -> str:
    """blake2b-128 of a text's UTF-8 bytes, 32 hex digits; lone surrogates, which UTF-8 cannot hold, may be there."""
    return content_digest(content).hex()


def content_digest(content: str) -> bytes:
    """The same as 16 bytes."""
    return hashlib.blake2b(content.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def usable_text(row: dict[str, Any], config: CorpusConfig) -> str | None:
    """The text of a row that is a usable text, as most rows are; None for any other, which `document_of` looks at."""
    if config.messages_field or "_unreadable" in row:
        return None
    text = row.get(config.text_field)
    return text if isinstance(text, str) and text and not text.isspace() else None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; what JSON cannot hold (dates, say) becomes its `str`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def document_of(row: dict[str, Any], config: CorpusConfig) -> Document:
    """The document that a row is, as if its content had not occurred before; with `problem` set where it cannot be used."""
    field = config.messages_field or config.text_field
    if "_unreadable" in row:
        return _unusable(row["_unreadable"], excerpt=str(row.get("_raw", "")))
    if field not in row:
        present = ", ".join(sorted(row)) or "none"
        return _unusable(f"no field `{field}`; fields: {present}", excerpt=canonical_json(row))
    if config.messages_field:
        return _conversation(row[field], config)
    return _text(row[field], config)


def _unusable(problem: str, *, excerpt: str) -> Document:
    # hashed apart from documents, so that a usable row is never taken for the duplicate of an unusable one
    source_id = content_id(f"unusable row: {excerpt}")
    return Document(source_id, 0, held_out=False, text=excerpt[:EXCERPT_CHARACTERS], problem=problem)


def _text(text: Any, config: CorpusConfig) -> Document:
    if not isinstance(text, str):
        return _unusable(f"`{config.text_field}` is {_kind(text)}, not text", excerpt=canonical_json(text))
    if not text.strip():
        return _unusable("empty text", excerpt=text)
    source_id = content_id(text)
    return Document(source_id, 0, held_out=is_held_out(source_id, config.held_out), text=text)


def _conversation(messages: Any, config: CorpusConfig) -> Document:
    messages = _as_list(messages)
    problem = _conversation_problem(messages)
    if problem:
        return _unusable(f"`{config.messages_field}` {problem}", excerpt=canonical_json(messages))
    canonical = canonical_json([_without_nulls(message) for message in messages])
    source_id = content_id(canonical)
    held_out = is_held_out(source_id, config.held_out)
    return Document(source_id, 0, held_out=held_out, messages=json.loads(canonical))


def _as_list(messages: Any) -> Any:
    """A dict of equally long columns, as `datasets` hands out some sequences of structs, becomes a list of dicts."""
    if not isinstance(messages, dict) or not all(isinstance(column, list) for column in messages.values()):
        return messages
    if len({len(column) for column in messages.values()}) != 1:
        return messages
    return [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]


def _conversation_problem(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"is {_kind(messages)}, not a list of messages"
    if not messages:
        return "is an empty conversation"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"holds {_kind(message)} as message {number}, not {{role, content}}"
        if not isinstance(message.get("role"), str):
            return f"has no role in message {number}; its keys: {', '.join(sorted(map(str, message))) or 'none'}"
        if not isinstance(message.get("content"), str | list | None):
            return f"has {_kind(message['content'])} as the content of message {number}"
    return None


def _without_nulls(value: Any) -> Any:
    """Drop keys that hold null, at any depth.

    Columnar formats give every message the keys of all messages, null where it had none; chat templates take a key that
    is present for one that is meant, and the same conversation must hash alike from JSON lines and from Parquet.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "null" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"

"""What `teachercache inspect` shows: a cache in numbers, and one row token by token.

Token texts come from the cache's own tokenizer.json with plain JSON: no torch, no transformers.
"""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from typing import Any

import numpy as np

from teachercache.errors import CacheDamaged, CacheError
from teachercache.shards.reader import SPLITS, Cache, Split, StoredRow

ROW_ID_DIGITS = 32
_BYTE_TOKEN = re.compile(r"<0x([0-7][0-9A-F])>")  # SentencePiece's, as far as the byte is a character by itself


def describe(cache: Cache) -> dict[str, Any]:
    """The cache in numbers, from its manifest alone."""
    manifest = cache.manifest
    return {
        "cache": cache.name,
        "fingerprint": manifest.fingerprint,
        "teacher": {**manifest.teacher, **manifest.model},
        "tokenizer": manifest.tokenizer,
        "corpus": manifest.corpus,
        "sequence": manifest.sequence,
        "targets": manifest.targets,
        "rows": {split: cache.rows_of(split) for split in SPLITS},
        "positions": {split: cache.positions_of(split) for split in SPLITS},
        "shards": len(manifest.shards),
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "column_bytes": manifest.column_bytes,
        "audit": vars(manifest.audit),
        "calibration": {name: value for name, value in manifest.calibration.items() if name not in ("rows", "sources")},
        "fidelity": manifest.fidelity,
    }


def describe_row(cache: Cache, row_id: str, *, top: int = 5) -> dict[str, Any]:
    """One row, token by token, with the teacher's `top` next tokens at T = 1.

    `row_id` may be a prefix, or `SPLIT:INDEX` such as `train:0`. Raises `CacheError` unless exactly one row matches.
    """
    stored = _find(cache, row_id)
    texts = token_texts(cache)
    row = stored.row
    ordinal = np.cumsum(row.target_mask_S) - 1
    tokens = []
    for index, token in enumerate(row.input_ids_S.tolist()):
        entry: dict[str, Any] = {"id": token, "text": texts.get(token, f"<{token}>"), "target": None}
        if row.target_mask_S[index]:
            entry["target"] = _describe_target(cache, stored, int(ordinal[index]), texts, top)
        tokens.append(entry)
    segments = [{key: value for key, value in vars(segment).items() if key != "text"} for segment in row.segments]
    return {
        "row_id": row.row_id, "held_out": row.held_out, "positions": row.positions, "segments": segments, "tokens": tokens,
    }  # fmt: skip


def _describe_target(cache: Cache, stored: StoredRow, position: int, texts: dict[int, str], top: int) -> dict[str, Any]:
    arrays = cache.kind.decoded(stored.targets)
    here = {name: values[position : position + 1] for name, values in arrays.items()}
    softened = cache.kind.softened(here, 1.0, tail=cache.kind.tail_policies[0])
    ranked = softened.head_ids_Nk.shape[1] if softened.tail is None else cache.kind.vocabulary_size
    ids, probabilities = softened.topk(min(top, ranked))
    return {
        "actual_log_prob": round(float(here["actual_log_prob"][0]), 4),
        "tail_mass": round(math.exp(softened.tail_log_prob_N[0]), 4),
        "top": [
            {"id": token, "text": texts.get(token, f"<{token}>"), "probability": round(probability, 4)}
            for token, probability in zip(ids[0].tolist(), probabilities[0].tolist(), strict=True)
            if probability > 0
        ],
    }


def _find(cache: Cache, row_id: str) -> StoredRow:
    name, colon, number = row_id.partition(":")
    if colon and name in SPLITS and number.isdigit():
        split: Split = "train" if name == "train" else "held-out"
        if int(number) >= cache.rows_of(split):
            raise CacheError(
                f"there is no row {row_id}: the cache has {cache.rows_of(split)} {split} rows, counted from 0"
            )
        return cache.read_row(split, int(number), columns=cache.logit_columns)
    rows = ((split, index) for split in SPLITS for index in range(cache.rows_of(split)))
    named = ((cache.read_row(*row, columns=()).row.row_id, row) for row in rows)
    found = list(
        islice((pair for pair in named if pair[0].startswith(row_id)), 1 if len(row_id) == ROW_ID_DIGITS else 2)
    )
    if not found:
        raise CacheError(f"no row's id begins with {row_id!r}; `--row train:0` shows the first one and its id")
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise CacheError(
            f"more than one row's id begins with {row_id!r}, {names} do; give more digits of the one you mean"
        )
    return cache.read_row(*found[0][1], columns=cache.logit_columns)


def token_texts(cache: Cache) -> dict[int, str]:
    """Token id to readable text; spellings, byte-level (`Ġthe`) or SentencePiece's (`▁the`), are turned back into text.

    Raises `CacheDamaged` for a tokenizer.json that is none.
    """
    path = cache.teacher_folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        return _texts(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CacheDamaged(f"{path} is no tokenizer ({error}); fetch the cache again") from None


def _texts(data: dict[str, Any]) -> dict[int, str]:
    vocabulary = data["model"].get("vocab", {})
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], i) for i, entry in enumerate(vocabulary))
    )
    readable = _byte_level_text if any(_has_byte_level(data.get(k)) for k in ("decoder", "pre_tokenizer")) else _text
    texts = {token: readable(spelling) for spelling, token in pairs}
    texts.update({token["id"]: token["content"] for token in data.get("added_tokens", [])})
    return texts


def _has_byte_level(part: dict[str, Any] | None) -> bool:
    if part is None:
        return False
    inner = [*part.get("decoders", []), *part.get("pretokenizers", [])]
    return part.get("type") == "ByteLevel" or any(_has_byte_level(each) for each in inner)


def _byte_level_text(spelling: str) -> str:
    if all(char in _BYTE_OF for char in spelling):
        return bytes(_BYTE_OF[char] for char in spelling).decode("utf-8", errors="replace")
    return spelling


def _text(spelling: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(spelling)
    return chr(int(byte[1], 16)) if byte else spelling.replace("▁", " ")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()

"""From a teacher's tokens to a student's: which token of the student's begins with what the teacher emits.

A teacher's probabilities over its own vocabulary become probabilities over the student's *next* token: those of all
teacher tokens whose bytes begin with the same student token add up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.bounded.strangers_json import parse_json
from teachercache.errors import CacheDamaged
from teachercache.tokens.panics import panics_refused
from teachercache.tokens.token_bytes import CHARACTER_OF, TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_METADATA_VALUES = 99
# Tokens that fill a vocabulary up to a round size, as model makers name them.
_FILLER = re.compile(
    r"\[PAD\d*\]|\[unused\d+\]|<pad_?\d*>|<(unused|extra_id_|reserved_)\d+>|<\|(extra|reserved|unused|dummy|placeholder)\w*\|>"
)
_KEY = "vocabulary_map"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Map between the vocabularies of one pair of tokenizers; 5 bytes a teacher token, 1 byte a student token."""

    first_Vt: NDArray[np.int32]  # the student's token with the same bytes, or its first token of these; -1: none
    exact_Vt: NDArray[np.bool_]  # the student has a token of the same bytes (of special tokens: with the same role)
    emitted_Vs: NDArray[
        np.bool_
    ]  # student tokens that some teacher token maps to: the teacher can emit them in one step
    identical: bool  # the same bytes at the same ids, apart from padding at the end
    coverage: float  # share of the teacher's tokens with bytes, special ones aside, that are mapped exactly

    def save(self, path: Path) -> None:
        """Write it as safetensors; the same map gives the same bytes."""
        from safetensors.numpy import save_file

        arrays = {"first": self.first_Vt, "exact": self.exact_Vt, "emitted": self.emitted_Vs}
        described = {"version": _VERSION, "identical": self.identical, "coverage": self.coverage}
        save_file(arrays, path, {_KEY: json.dumps(described, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> VocabularyMap:
        """Read what `save` wrote. Raises `CacheDamaged` for a file that is missing, is none, or contradicts itself."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("first", "exact", "emitted")}
                described = parse_json((file.metadata() or {})[_KEY].encode(), most=_MOST_METADATA_VALUES)
            version, identical, coverage = (described[name] for name in ("version", "identical", "coverage"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, MemoryError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CacheDamaged(f"{path} is no vocabulary map ({reason}); {_REMEDY}") from None
        problem = _problem(version, identical, coverage, **arrays)
        if problem:
            raise CacheDamaged(f"{path} is no vocabulary map that can be used: {problem}; {_REMEDY}")
        return cls(arrays["first"], arrays["exact"], arrays["emitted"], identical, float(coverage))


_REMEDY = "delete it and run `teachercache align` again"


def vocabulary_map(
    teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase
) -> VocabularyMap:
    """The map between two fast tokenizers; seconds for vocabularies of 100,000 tokens.

    Special tokens map by their text, and EOS and BOS by role; how others do: `token_pieces`. Raises `ModelError` for
    tokenizers without a fast backend.
    """
    pieces = token_pieces(teacher_tokenizer, student_tokenizer)
    first_Vt = np.array([ids[0] if ids else -1 for ids in pieces.ids], dtype=np.int32)
    emitted_Vs = np.zeros(pieces.target.size, dtype=np.bool_)
    emitted_Vs[first_Vt[first_Vt >= 0]] = True
    plain = np.array([bool(value) for value in pieces.source.values]) & ~pieces.source.special_V
    coverage = float(pieces.exact_V[plain].mean()) if plain.any() else 0.0
    identical = _is_identical(pieces.source, pieces.target, teacher_tokenizer, student_tokenizer)
    return VocabularyMap(first_Vt, pieces.exact_V, emitted_Vs, identical, coverage)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Each token of one vocabulary in tokens of another."""

    source: TokenBytes
    target: TokenBytes
    ids: list[list[int]]  # [V of source], none where the other has nothing for it
    exact_V: NDArray[np.bool_]  # one token of the same bytes; of special tokens: of the same text or role


def token_pieces(source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Every token of the source in tokens of the target, as it continues a text.

    Equal bytes are found by a dictionary. Where there are none, the target's tokenizer itself encodes the token's bytes,
    all of them in one call, without the space that it would put before a text: a walk along the longest prefixes would
    give what neither BPE nor Unigram do. Bytes that are no UTF-8 by themselves go to its model directly.
    """
    source, target = TokenBytes.of(source_tokenizer), TokenBytes.of(target_tokenizer)
    keys, known = _keys(source), _Known.of(target, target_tokenizer)
    special = set(np.flatnonzero(source.special_V).tolist())
    single_V = np.full(source.size, -1, dtype=np.int64)
    for index, key in enumerate(keys):
        is_special = index in special
        single_V[index] = known.special(source.contents[index], index) if is_special else known.find(key, index)
    for role in ("bos_token_id", "eos_token_id"):
        source_id, other = getattr(source_tokenizer, role, None), getattr(target_tokenizer, role, None)
        if source_id is not None and other is not None:
            single_V[source_id] = other
    exact_V = single_V >= 0
    ids = [[index] if index >= 0 else [] for index in single_V.tolist()]
    rest = [index for index, key in enumerate(keys) if key and not exact_V[index] and index not in special]
    encoded = _encoded([keys[index] or b"" for index in rest], target, target_tokenizer, known)
    for index, pieces in zip(rest, encoded, strict=True):
        ids[index] = pieces
    return Pieces(source, target, ids, exact_V)


def _keys(tokens: TokenBytes) -> list[bytes | None]:
    """The bytes of each token, with the space before a word where the vocabulary leaves it out (WordPiece)."""
    begins = tokens.begins_V.tolist()
    return [b" " + value if begin and value else value for value, begin in zip(tokens.values, begins, strict=True)]


@dataclass(frozen=True, eq=False)
class _Known:
    """The target's tokens by their bytes."""

    keys: list[bytes | None]
    plain: dict[bytes, int]
    specials: dict[bytes, int]
    contents: list[bytes | None]

    @classmethod
    def of(cls, target: TokenBytes, tokenizer: PreTrainedTokenizerBase) -> _Known:
        plain: dict[bytes, int] = {}
        keys = _keys(target)
        texts = tokenizer.convert_ids_to_tokens(list(range(target.size)))
        # SentencePiece has two tokens for many a byte; <0x41> never occurs where there is an A, so that A is what is meant
        order = sorted(range(target.size), key=lambda index: str(texts[index]).startswith("<0x"))
        for index in order:
            if key := keys[index]:
                plain.setdefault(key, index)
        specials = {target.contents[index]: index for index in np.flatnonzero(target.special_V)[::-1].tolist()}
        return cls(keys, plain, {text: index for text, index in specials.items() if text}, target.contents)

    def find(self, key: bytes | None, index: int) -> int:
        """The token of these bytes, of several the one at `index`; -1: none."""
        if not key:
            return -1
        if index < len(self.keys) and self.keys[index] == key:
            return index
        return self.plain.get(key, self.specials.get(key, -1))

    def special(self, content: bytes | None, index: int) -> int:
        """The special token that is written like this, or a plain one; -1: none."""
        if not content:
            return -1
        if index < len(self.contents) and self.contents[index] == content:
            return index
        return self.specials.get(content, self.plain.get(content, -1))


@panics_refused()
def _encoded(
    keys: Sequence[bytes], target: TokenBytes, tokenizer: PreTrainedTokenizerBase, known: _Known
) -> list[list[int]]:
    """The tokens that the tokenizer gives to each of these bytes, as they continue a text; none if any is unknown."""
    backend = _continuing(tokenizer.backend_tokenizer)
    texts = [_valid_prefix(key) for key in keys]
    pieces = []
    for key, text, encoding in zip(keys, texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, cut = list(encoding.ids), key[len(text.encode()) :]
        if cut and target.family == "byte-level":
            ids = [piece.id for piece in backend.model.tokenize("".join(CHARACTER_OF[byte] for byte in key))]
        elif cut:
            ids += [known.plain[cut[at : at + 1]] for at in range(len(cut)) if cut[at : at + 1] in known.plain]
        pieces.append([] if any(target.values[index] is None for index in ids) else ids)
    return pieces


def _continuing(backend: Any) -> Any:
    """A tokenizer that puts no space before a text, and pads and cuts nothing; the same one where that is so already."""
    parts = [(_state(backend.normalizer), "normalizers"), (_state(backend.pre_tokenizer), "pretokenizers")]
    changed = [_without_prefix(part, inner) for part, inner in parts]
    if changed == [part for part, _ in parts] and backend.padding is None and backend.truncation is None:
        return backend
    description = json.loads(backend.to_str())
    description["normalizer"], description["pre_tokenizer"] = changed
    description["padding"] = description["truncation"] = None
    return type(backend).from_str(json.dumps(description))


def _state(part: Any) -> dict[str, Any] | None:
    """Returns a part as a tokenizer.json describes it."""
    return None if part is None else json.loads(part.__getstate__())


def _without_prefix(part: dict[str, Any] | None, inner: str) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        steps = (_without_prefix(step, inner) for step in part[inner])
        return {**part, inner: [step for step in steps if step is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part


def _valid_prefix(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _is_identical(
    teacher: TokenBytes,
    student: TokenBytes,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Tells whether the student has all that the teacher has at the same ids, those aside that only fill a vocabulary
    up."""
    size = max(teacher.size, student.size)
    sides = [_comparable(tokens, tokenizer, size) for tokens, tokenizer in
             ((teacher, teacher_tokenizer), (student, student_tokenizer))]  # fmt: skip
    pairs = list(zip(*sides, strict=True))
    return all(a == b or a is None for a, b in pairs) and any(a is not None for a, _ in pairs)


def _comparable(tokens: TokenBytes, tokenizer: PreTrainedTokenizerBase, size: int) -> list[tuple[str, bool] | None]:
    """Each id's token and whether it is special; None for an id without a token, or that fills up."""
    comparable: list[tuple[str, bool] | None] = [None] * size
    special = tokens.special_V.tolist()
    for token, index in tokenizer.get_vocab().items():
        if not _FILLER.fullmatch(token):
            comparable[index] = (token, special[index])
    return comparable


def _problem(version: Any, identical: Any, coverage: Any, *, first: Any, exact: Any, emitted: Any) -> str | None:
    if version != _VERSION:
        return f"it is of version {version!r}, this version of teachercache reads {_VERSION}"
    if not isinstance(identical, bool) or isinstance(coverage, bool) or not isinstance(coverage, int | float):
        return "what it says of itself is no flag and no share"
    if not 0 <= coverage <= 1:
        return f"its coverage is {coverage}"
    for name, array, dtype in (("first", first, np.int32), ("exact", exact, np.bool_), ("emitted", emitted, np.bool_)):
        if array.ndim != 1 or array.dtype != dtype:
            return f"{name} has shape {array.shape} and type {array.dtype}"
    if first.min(initial=-1) < -1 or first.max(initial=-1) >= len(emitted):
        return "first names tokens that the student does not have"
    if first.shape != exact.shape or (exact & (first < 0)).any():
        return "exact says more than first"
    reached = np.zeros(len(emitted), dtype=np.bool_)
    reached[first[first >= 0]] = True
    return None if np.array_equal(reached, emitted) else "emitted is not what first reaches"

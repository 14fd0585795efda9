"""FORMAT.md is complete: a reader that was written by it alone reads what this project's own reads."""

from __future__ import annotations

import ast
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache import independent_reader
from cache.golden_caches import CHAT, GOLDEN, RECIPES
from cache.independent_reader import IndependentCache, ascii_only, canonical, corpus_digest, quoted, weights_sha256
from teachercache.cache import SPLITS, Cache, StoredRow
from teachercache.tokens.fingerprint import template_fingerprint

V2 = GOLDEN / "v2"


def own_rows(cache: Cache) -> dict[str, StoredRow]:
    rows = [cache.read_row(split, index) for split in SPLITS for index in range(cache.rows_of(split))]
    return {stored.row.row_id: stored for stored in rows}


@pytest.mark.parametrize("name", [*RECIPES, CHAT])
def test_both_readers_read_the_same(name: str) -> None:
    independent, own = IndependentCache(V2 / name), own_rows(Cache.open(V2 / name))
    independent.checked()
    found = list(independent.rows())
    assert {row["row_id"] for row, _ in found} == own.keys() and len(found) == len(own)
    for row, columns in found:
        stored = own[row["row_id"]]
        assert row["input_ids"] == stored.row.input_ids_S.tolist()
        assert row["target_mask"] == stored.row.target_mask_S.tolist()
        assert row["held_out"] == stored.row.held_out
        assert [s["text"] for s in row["segments"]] == [s.text for s in stored.row.segments]
        assert columns.keys() == stored.targets.keys()
        for column, values in columns.items():
            assert values.dtype == stored.targets[column].dtype
            np.testing.assert_array_equal(values, stored.targets[column])


def test_log_probabilities_are_the_same() -> None:
    cache, independent = Cache.open(V2 / "top-k"), IndependentCache(V2 / "top-k")
    own = own_rows(cache)
    for row, columns in independent.rows():
        stored = own[row["row_id"]].targets
        decoded = cache.kind.decoded({name: stored[name] for name in cache.logit_columns})
        for temperature, log_probs in independent.head_log_probs(columns).items():
            softened = cache.kind.softened(decoded, temperature, tail=cache.kind.tail_policies[0])
            np.testing.assert_allclose(log_probs, softened.head_log_prob_Nk, atol=1e-5)
            np.testing.assert_array_equal(columns["head_ids"], softened.head_ids_Nk)


def test_what_caches_were_made_from_has_the_digests_that_they_say() -> None:
    settings = IndependentCache(V2 / "top-k").manifest
    texts = [json.loads(line)["text"] for line in (V2 / "corpus.jsonl").read_text().splitlines()]
    assert corpus_digest(texts) == settings["corpus"]["digest"]
    assert weights_sha256(V2 / "teacher") == settings["settings"]["teacher"]["weights_sha256"]


@pytest.mark.parametrize("what", ["the manifest's digest", "is damaged", "row_ids", "settings_fingerprint"])
def test_it_finds_what_is_not_as_the_text_says(tmp_path: Path, what: str) -> None:
    folder = Path(shutil.copytree(V2 / "top-k", tmp_path / "cache"))
    if what == "is damaged":
        [first, *_] = sorted((folder / "shards").iterdir())
        first.write_bytes(first.read_bytes()[:-9] + b"damaged!!")
    cache = IndependentCache(folder)
    if what == "the manifest's digest":
        cache.manifest["created_by"] = "somebody"
    if what == "settings_fingerprint":
        cache.manifest["settings"]["sequence"]["length"] += 1
        unsigned = {key: value for key, value in cache.manifest.items() if key not in ("format", "digest")}
        cache.manifest["digest"] = independent_reader.digest_of(unsigned)
    if what == "row_ids":
        cache.index[0]["shards"]["row_ids"].reverse()
    with pytest.raises(ValueError, match=what):
        cache.checked()
        list(cache.rows())


def test_canonical_json_by_its_rules_is_what_is_hashed() -> None:
    generator = random.Random(0)
    numbers = [0.0, -0.0, 1.0, 1e15, 1e16, 1e-4, 1e-5, 0.1, 1e22, 5e-324, 1.7976931348623157e308, 2**70, -(2**53) - 1]
    numbers += [generator.uniform(-1, 1) * 10 ** generator.randint(-30, 30) for _ in range(2000)]
    text = 'é\x7f\x80\u2028😀"\\/\b\x01\x1f\n ﬀ'
    value = {"😀": numbers, "ﬀ": [None, True, False, {}, []], "a": text, text: 1}
    assert canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert ascii_only(canonical(value)) == json.dumps(value, sort_keys=True, separators=(",", ":"))


def test_the_fingerprint_of_a_template_is_by_the_same_rule() -> None:
    class Tokenizer:
        chat_template = "{{ bos_token }}\n«é» 😀"

    assert independent_reader.sha256(ascii_only(quoted(Tokenizer.chat_template))) == template_fingerprint(Tokenizer())


def test_it_is_independent() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} & {"teachercache", "torch", "transformers", "tokenizers"} == set()

"""The cache on disk: round trips, and every way in which it can be broken."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from teachercache.cache import Cache, verify
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.regular_files import NO_FILE
from teachercache.cache.inspection import describe, describe_row
from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.cache.token_texts import token_texts
from teachercache.errors import CacheDamaged, CacheError
from teachercache.stream.tokenizers import teacher_tokenizer

from builders import part, sentences, tiny_cache, tiny_recipe


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache_folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def edit_manifest(folder: Path, *, sign: bool, **changes) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data.update(changes)
    if sign:
        unsigned = {key: value for key, value in data.items() if key not in ("format", "digest")}
        data["digest"] = fingerprint_of(unsigned)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_made_cache_is_whole(made):
    assert verify(made) == []
    assert verify(made, quick=True) == []


def test_every_row_is_there_once_and_on_its_side(made):
    cache = Cache.open(made)
    seen = {}
    for split in ("train", "held-out"):
        rows = [cache.read_row(split, index) for index in range(cache.rows_of(split))]
        assert {stored.row.held_out for stored in rows} == {split == "held-out"}
        assert sum(stored.row.positions for stored in rows) == cache.positions_of(split)
        seen[split] = {segment.source_id for stored in rows for segment in stored.row.segments}
    assert not seen["train"] & seen["held-out"]
    assert len(seen["train"] | seen["held-out"]) == cache.manifest.audit.stored
    assert cache.manifest.rows == cache.rows_of("train") + cache.rows_of("held-out")


def test_only_the_asked_for_columns_are_decoded(made):
    stored = Cache.open(made).read_row("train", 1, columns=("head_ids",))
    assert list(stored.targets) == ["head_ids"]
    assert stored.targets["head_ids"].shape == (stored.row.positions, 16)


def test_a_cache_travels_to_workers(made):
    cache = Cache.open(made)
    first = cache.read_row("train", 0)
    again = pickle.loads(pickle.dumps(cache)).read_row("train", 0)
    np.testing.assert_array_equal(first.targets["head_logits"], again.targets["head_logits"])


def test_an_index_beyond_the_split_is_refused(made):
    with pytest.raises(IndexError, match="train rows"):
        Cache.open(made).read_row("train", 10**6)


def test_plain_columns_open_in_pyarrow_and_datasets(made, tmp_path):
    from datasets import load_dataset

    shards = sorted((made / "shards").glob("*.arrow"))
    with pa.memory_map(str(shards[0])) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.column("positions").to_pylist() == [sum(mask) for mask in table.column("target_mask").to_pylist()]
    loaded = load_dataset("arrow", data_files=[str(path) for path in shards], split="train", cache_dir=str(tmp_path))
    assert len(loaded) == Cache.open(made).manifest.rows


def test_no_path_of_this_machine_is_stored(made):
    for path in made.rglob("*"):
        if path.suffix in (".json", ".md", ".jsonl"):
            assert str(made.parent) not in path.read_text(encoding="utf-8"), path


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize("where", [0, 300, -300, -1])
def test_a_flipped_bit_is_found_before_a_row_is_read(cache_folder, where):
    shard = part(cache_folder, 0)
    flip_bit(shard, where if where >= 0 else shard.stat().st_size + where)
    with pytest.raises(CacheDamaged, match=r"part-00000-\w+.arrow differs from its sha256.*precompute"):
        Cache.open(cache_folder).read_row("train", 0)
    [problem] = verify(cache_folder)
    assert problem.file == f"shards/{shard.name}" and "sha256" in problem.reason and problem.remedy


def test_bit_flips_anywhere_are_found(cache_folder):
    shard = part(cache_folder, 1)
    whole = shard.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(whole), 25).tolist():
        flip_bit(shard, offset)
        assert [problem.file for problem in verify(cache_folder)] == [f"shards/{shard.name}"]
        shard.write_bytes(whole)


def test_a_truncated_shard_is_found_even_quickly(cache_folder):
    shard = part(cache_folder, 2)
    shard.write_bytes(shard.read_bytes()[:-100])
    [problem] = verify(cache_folder, quick=True)
    assert problem.file == f"shards/{shard.name}" and "the manifest says" in problem.reason


def test_missing_and_unlisted_files_are_found(cache_folder):
    missing = part(cache_folder, 1)
    missing.unlink()
    (cache_folder / "shards" / "extra.arrow").write_bytes(b"?")
    (cache_folder / "run_me.py").write_text("print('hello')")
    reasons = {problem.file: problem.reason for problem in verify(cache_folder)}
    assert reasons[f"shards/{missing.name}"] == "it is missing"
    assert reasons["shards/extra.arrow"] == reasons["run_me.py"] == "the manifest does not list it"


def test_changed_tokenizer_files_are_found(cache_folder):
    path = cache_folder / "teacher" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert [problem.file for problem in verify(cache_folder)] == ["teacher/tokenizer.json"]


def test_a_shard_of_another_cache_is_refused(cache_folder, tmp_path):
    other = tiny_cache(tmp_path / "other", targets={"logits": {"kind": "top-k", "k": 9}})
    shutil.copy(part(other, 0), part(cache_folder, 0))
    assert [problem.file for problem in verify(cache_folder)] == [f"shards/{part(cache_folder, 0).name}"]
    with pytest.raises(CacheDamaged):
        Cache.open(cache_folder).read_row("train", 0)


def test_a_link_is_no_part_of_a_cache(cache_folder, tmp_path):
    shard = part(cache_folder, 0)
    shard.rename(tmp_path / "elsewhere.arrow")
    shard.symlink_to(tmp_path / "elsewhere.arrow")
    assert [problem.reason for problem in verify(cache_folder)] == [NO_FILE]
    with pytest.raises(CacheDamaged, match="is refused: it is no regular file"):
        Cache.open(cache_folder).read_row("train", 0)


# --------------------------------------------------------------------------- the manifest


def test_an_edited_manifest_is_refused(cache_folder):
    edit_manifest(cache_folder, sign=False, created_by="somebody else")
    with pytest.raises(CacheDamaged, match="digest does not match"):
        Cache.open(cache_folder)
    assert [problem.file for problem in verify(cache_folder)] == [MANIFEST]


def test_settings_that_do_not_give_the_fingerprint_are_refused(cache_folder):
    settings = json.loads((cache_folder / MANIFEST).read_text())["settings"]
    edit_manifest(cache_folder, sign=True, settings={**settings, "sequence": {**settings["sequence"], "length": 7}})
    with pytest.raises(CacheDamaged, match="fingerprint does not match its settings"):
        Cache.open(cache_folder)


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret", "shards/../../secret", "a\\..\\b", ""])
def test_a_manifest_that_points_outside_is_refused(cache_folder, file):
    files = [{"file": file, "bytes": 1, "sha256": "0"}]
    edit_manifest(cache_folder, sign=True, files=files)
    with pytest.raises(CacheDamaged, match="outside the cache"):
        Cache.open(cache_folder)


def test_a_manifest_of_another_version_says_what_to_do(cache_folder):
    edit_manifest(cache_folder, sign=True, format_version=99)
    with pytest.raises(CacheError, match=r"format version 99.*reads up to 2.*install a newer version"):
        Cache.open(cache_folder)


def test_an_audit_that_does_not_add_up_is_refused(cache_folder):
    audit = json.loads((cache_folder / MANIFEST).read_text())["audit"]
    edit_manifest(cache_folder, sign=True, audit={**audit, "stored": audit["stored"] + 1})
    with pytest.raises(CacheDamaged, match="audit does not add up"):
        Cache.open(cache_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "teachercache"}', "\x00\x01"])
def test_rubbish_for_a_manifest_is_damage_not_a_traceback(cache_folder, text):
    (cache_folder / MANIFEST).write_text(text)
    with pytest.raises(CacheDamaged, match="cannot be trusted"):
        Cache.open(cache_folder)


def test_a_half_written_cache_says_how_far_it_is(tmp_path):
    from teachercache.precompute.capture.plan import make_plan

    recipe = tiny_recipe(tmp_path)
    make_plan(recipe)
    with pytest.raises(CacheError, match=r"half written \(0 of 3 units are done\).*precompute"):
        Cache.open(recipe.cache)


def test_no_cache_at_all(tmp_path):
    with pytest.raises(CacheError, match="there is no cache at"):
        Cache.open(tmp_path / "nothing")
    with pytest.raises(CacheError, match="has no manifest.json"):
        Cache.open(tmp_path)


# --------------------------------------------------------------------------- looking inside


def test_inspection_shows_the_teachers_own_words(made):

    cache = Cache.open(made)
    tokenizer = teacher_tokenizer(cache)
    shown = describe_row(cache, "train:2", top=3)
    stored = cache.read_row("train", 2)
    assert [token["id"] for token in shown["tokens"]] == stored.row.input_ids_S.tolist()
    assert "".join(token["text"] for token in shown["tokens"]) == tokenizer.decode(stored.row.input_ids_S)
    first = shown["tokens"][0]["target"]
    assert [entry["id"] for entry in first["top"]] == stored.targets["head_ids"][0][:3].tolist()
    assert 0 < first["tail_mass"] < 1 and first["actual_log_prob"] < 0
    assert shown["tokens"][-1]["target"] is None
    assert describe_row(cache, shown["row_id"][:12])["row_id"] == shown["row_id"]
    with pytest.raises(CacheError, match="no row's id begins with"):
        describe_row(cache, "zzz")


def test_a_prefix_of_several_ids_is_refused(made):
    cache = Cache.open(made)
    ids = [cache.read_row(split, i).row.row_id for split in ("train", "held-out") for i in range(cache.rows_of(split))]
    prefix = next(a[0] for a in ids if sum(b[0] == a[0] for b in ids) > 1)
    with pytest.raises(CacheError, match="give more digits") as caught:
        describe_row(cache, prefix)
    named = re.findall(r"[0-9a-f]{32}", str(caught.value))
    assert len(set(named)) == 2 and set(named) < set(ids)
    assert all(describe_row(cache, name)["row_id"] == name for name in (ids[0], ids[-1]))


BYTE_LEVEL = {"type": "ByteLevel"}


@pytest.mark.parametrize(
    ("parts", "vocabulary", "texts"),
    [
        ({"decoder": BYTE_LEVEL}, {"Ã©": 0, "Ġthe": 1}, ["é", " the"]),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, BYTE_LEVEL]}}, {"Ċ": 0}, ["\n"]),
        (
            {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}},
            {"é": 0, "▁the": 1, "<0x0A>": 2, "<0xC3>": 3},
            ["é", " the", "\n", "<0xC3>"],
        ),
        ({"decoder": None}, [["é", -1.0], ["▁a", -2.0]], ["é", " a"]),
    ],
    ids=["byte-level", "in-a-sequence", "sentencepiece", "unigram"],
)
def test_token_texts_follow_the_tokenizers_decoder(parts, vocabulary, texts):
    data = json.dumps({**parts, "model": {"vocab": vocabulary}}).encode()
    assert token_texts(data, name="tokenizer.json") == dict(enumerate(texts))


def test_description_adds_up(made):
    shown = describe(Cache.open(made))
    sizes = shown["bytes_per_position"]
    assert sizes["logits"] + sizes["tokens"] < sizes["total"]
    assert sum(shown["positions"].values()) == Cache.open(made).manifest.positions


def test_reading_needs_neither_torch_nor_ray(made):
    code = (
        "import sys; from teachercache.cache import Cache, verify; from pathlib import Path;"
        f"c = Cache.open({str(made)!r}); c.read_row('train', 0); assert not verify(c.folder);"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_equal_inputs_give_equal_files(made, tmp_path):
    again = tiny_cache(tmp_path, teacher=made.parent / "teacher", texts=sentences(40))
    for path in sorted(made.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(made)).read_bytes(), path

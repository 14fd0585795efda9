"""Caches whose digests are right and whose contents lie: one readable line, bounded memory, and never wrong data."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cache.forged_batches import name_often
from cache.forgery import manifest_of, payload, problems, read_everything, rewrite, sign, write_signed
from teachercache.cache import Cache, verify
from teachercache.cache.files.schema import SEGMENT
from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets.layers.layer_file import METADATA_KEY as LAYERS_KEY
from teachercache.targets.logits.basis import METADATA_KEY
from teachercache.tokens.rows import Content

from builders import part, tiny_cache, tiny_teacher

KINDS: dict[str, dict[str, Any]] = {
    "top-k": {"kind": "top-k", "k": 16},
    "top-p": {"kind": "top-p", "k": 16},
    "random-sampling": {"kind": "random-sampling", "draws": 20},
    "full": {"kind": "full"},
    "hidden": {"kind": "hidden", "calibration_positions": 200},
    "head+sketch": {"kind": "head+sketch", "k": 6, "rank": 24, "step": 0.05, "calibration_positions": 200},
    "relations": {"kind": "top-k", "k": 4},
    "queries-keys": {"kind": "top-k", "k": 4},
    "maps": {"kind": "top-k", "k": 4},
    "top-maps": {"kind": "top-k", "k": 4},
}
LAYERS: dict[str, dict[str, Any]] = {
    "relations": {"attention": {"layers": [2]}, "hidden": {"layers": [2], "codec": "projected"}},
    "queries-keys": {"attention": {"layers": [1], "kind": "queries-keys"}, "hidden": {"layers": [1], "codec": "bf16"}},
    "maps": {"attention": {"layers": [2], "kind": "maps", "heads": 2}},
    "top-maps": {"attention": {"layers": [1, 2], "kind": "maps", "top": 5}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    teacher = tiny_teacher(folder / "teacher")
    return {
        name: tiny_cache(folder / name, teacher=teacher, targets={"logits": logits, **LAYERS.get(name, {})})
        for name, logits in KINDS.items()
    }


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Any:
    def fresh(kind: str = "top-k") -> Path:
        return Path(shutil.copytree(made[kind], tmp_path / "cache", dirs_exist_ok=True))

    return fresh


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CacheDamaged, match=match) as caught:
        read_everything(folder)
    message = str(caught.value)
    assert "\n" not in message and "fetch" in message and len(message) < 1500
    assert re.search(r"manifest\.json|part-00000|sketch-|layers-|boundary-", message), message


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rewritten_honestly_is_read(copy: Any, kind: str) -> None:
    folder = copy(kind)
    rewrite(folder)
    read_everything(folder)
    assert problems(folder) == []
    assert verify(folder, deep=True) == []


# --------------------------------------------------------------------------- rows


def put(name: str, value: Any) -> Any:
    return lambda data: data[name].__setitem__(0, value)


def change(name: str, edit: Any) -> Any:
    return lambda data: data[name].__setitem__(0, edit(data[name][0]))


def say(*contents: Any) -> Any:
    named = [dict(zip(("role", "start", "end"), content, strict=True)) for content in contents]
    return change("segments", lambda segments: [{**segments[0], "contents": named}])


ROWS = {
    "token beyond the vocabulary": (change("input_ids", lambda ids: [10**6, *ids[1:]]), "input_ids hold"),
    "negative token": (change("input_ids", lambda ids: [*ids[:-1], -1]), "input_ids hold -1"),
    "no token": (change("input_ids", lambda ids: []), "a row has 0"),
    "null for tokens": (put("input_ids", None), "input_ids has no value"),
    "null among tokens": (change("input_ids", lambda ids: [None, *ids[1:]]), "input_ids"),
    "row too long": (lambda d: d.update(input_ids=[d["input_ids"][0] * 9, *d["input_ids"][1:]]), "tokens, between 1"),
    "mask longer than the tokens": (change("target_mask", lambda mask: [*mask, False]), "target_mask is not as long"),
    "target on the last token": (change("target_mask", lambda m: [*m[:-2], False, True]), "last token of a segment"),
    "other positions": (change("positions", lambda count: count + 1), "positions are not those"),
    "held-out row among the others": (put("held_out", True), "not on the side"),
    "null for positions": (put("positions", None), "positions has no value"),
    "no segment": (put("segments", []), "no segment"),
    "segment beyond the row": (
        change("segments", lambda s: [*s, {**s[0], "start": 10**6}]),
        "do not follow each other",
    ),
    "segment that starts before": (change("segments", lambda s: [{**s[0], "start": -1}]), "do not follow each other"),
    "segment twice": (change("segments", lambda s: [*s, *s]), "do not follow each other"),
    "segment of negative bytes": (change("segments", lambda s: [{**s[0], "byte_end": -4}]), "span of bytes"),
    "segment without a source": (change("segments", lambda s: [{**s[0], "source_id": None}]), "no source_id"),
    "content beyond its segment": (say(("user", 0, 10**6)), "contents of messages do not follow"),
    "content that begins before": (say(("user", -1, 4)), "contents of messages do not follow"),
    "content of nothing": (say(("user", 4, 4)), "contents of messages do not follow"),
    "contents that overlap": (say(("user", 0, 4), ("assistant", 3, 6)), "contents of messages do not follow"),
    "contents that descend": (say(("user", 4, 6), ("assistant", 0, 3)), "contents of messages do not follow"),
    "content without a role": (say((None, 0, 4)), "no role"),
    "null for contents": (change("segments", lambda s: [{**s[0], "contents": None}]), "no contents"),
    "a row's id twice": (lambda data: data["row_id"].__setitem__(1, data["row_id"][0]), "the same row_id"),
    "no targets": (change("head_ids", lambda page: b""), "head_ids: 0 bytes"),
    "targets of another length": (change("head_ids", lambda page: page + b"1"), "column head_ids"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_lie_are_refused(copy: Any, name: str) -> None:
    edit, match = ROWS[name]
    folder = copy()
    rewrite(folder, columns=edit)
    refused(folder, match)


def test_contents_that_can_be_are_read(copy: Any) -> None:
    folder = copy()
    rewrite(folder, columns=say(("user", 0, 4), ("assistant", 4, 6)))
    read_everything(folder)
    [first, *_] = Cache.open(folder).read_row("train", 0).row.segments
    assert first.contents == (Content("user", 0, 4), Content("assistant", 4, 6))


def test_shards_from_before_contents_are_read(copy: Any, made: dict[str, Path]) -> None:
    folder = copy()
    segments = pa.list_(pa.struct([field for field in SEGMENT if field.name != "contents"]))
    rewrite(folder, types={"segments": segments})
    read_everything(folder)
    assert problems(folder) == []
    for index in range(Cache.open(folder).rows_of("train")):
        now, before = (Cache.open(each).read_row("train", index).row for each in (made["top-k"], folder))
        assert now.segments == before.segments and before.segments[0].contents == ()


def test_a_shard_with_fewer_rows_than_the_manifest_says(copy: Any) -> None:
    folder = copy()
    rewrite(folder, columns=lambda data: data.update({name: values[:-1] for name, values in data.items()}))
    refused(folder, r"it holds \d+ rows, the manifest says")
    assert any("the manifest says" in reason for reason in problems(folder))


def test_a_row_in_two_shards_is_found_by_a_deep_check(copy: Any) -> None:
    folder = copy()
    cache = Cache.open(folder)
    info = cache.infos[0]
    next_shard = info.rows - info.held_out_rows
    twice = cache.read_row("train", next_shard).row.row_id
    rewrite(folder, columns=lambda data: data["row_id"].__setitem__(0, twice))
    assert verify(folder) == []
    [problem] = verify(folder, deep=True)
    assert problem.file == f"row train:{next_shard}" and "an earlier row has the same row_id" in problem.reason


VALUES = {
    "id beyond the vocabulary": ("top-k", "head_ids", 300),
    "NaN logit": ("top-k", "head_logits", np.nan),
    "negative NaN": ("top-k", "head_logits", np.uint16(0xFE00).view(np.float16)),
    "logit above the largest": ("top-k", "head_logits", 3.0),
    "infinite tail": ("top-k", "tail_log_partition", np.inf),
    "mass above one": ("top-k", "actual_log_prob", 1.0),
    "NaN among all": ("full", "log_probs", np.nan),
    "NaN beside a hidden state": ("hidden", "actual_log_prob", np.nan),
    "rank beyond the vocabulary": ("head+sketch", "head_ranks", 300),
    "ragged id beyond the vocabulary": ("top-p", "head_ids", 300),
    "ragged NaN": ("top-p", "head_logits", np.nan),
    "empty head": ("top-p", "head_sizes", 0),
    "head larger than k": ("top-p", "head_sizes", 17),
    "sizes that add up to less": ("top-p", "head_sizes", 1),
    "drawn more often": ("random-sampling", "sample_counts", 2**16 - 1),
    "drawn otherwise": ("random-sampling", "sample_counts", 20),
    "sample beyond the vocabulary": ("random-sampling", "sample_gaps", 2**16 - 1),
    "nothing drawn": ("random-sampling", "sample_sizes", 0),
    "a code of two bytes": ("top-maps", "map_2", 256),
    "a key before the row": ("top-maps", "map_keys_1", 48),
    "less mass than any": ("top-k", "boundary_log_mass", 9160),
}
HEADS = {
    "a token twice": ("top-k", "head_ids", lambda ids: ids[:, [0, *range(ids.shape[1] - 1)]]),
    "one token alone": ("top-k", "head_ids", lambda ids: np.repeat(ids[:, :1], ids.shape[1], axis=1)),
    "rising logits": ("top-k", "head_logits", lambda logits: logits[:, ::-1]),
    "one logit that rises": ("top-k", "head_logits", lambda logits: logits[:, [0, 2, 1, *range(3, logits.shape[1])]]),
    "a rank twice": ("head+sketch", "head_ranks", lambda ranks: ranks[:, [0, 0, *range(2, ranks.shape[1])]]),
    "a ragged token twice": ("top-p", "head_ids", lambda ids: np.full_like(ids, ids[0])),
    "ragged logits that rise": ("top-p", "head_logits", lambda logits: logits[::-1]),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_no_teacher_has_are_refused(copy: Any, name: str) -> None:
    kind, column, edit = HEADS[name]
    folder = copy(kind)
    payload(folder, column, lambda array: np.ascontiguousarray(edit(array)))
    refused(folder, "a position has a token twice|the logits of a position rise")


@pytest.mark.parametrize("name", VALUES)
def test_targets_that_lie_are_refused(copy: Any, name: str) -> None:
    kind, column, value = VALUES[name]
    folder = copy(kind)

    def edit(array: Any) -> Any:
        where = np.flatnonzero(array.reshape(-1) != value)[1]
        array.reshape(-1)[where] = value
        return array

    payload(folder, column, edit)
    refused(folder, column if column != "sample_sizes" else "sample_")
    [problem] = {problem.file: problem for problem in verify(folder, deep=True)}.values()
    assert problem.file == "row train:0" and column.partition("_")[0] in problem.reason


def test_a_token_drawn_twice_is_refused(copy: Any) -> None:
    folder = copy("random-sampling")
    stored = Cache.open(folder).read_row("train", 0).targets
    second = int(np.flatnonzero(stored["sample_sizes"] > 1)[0])
    at = int(stored["sample_sizes"][:second].sum()) + 1

    def edit(gaps: Any) -> Any:
        gaps[at] = 0
        return gaps

    payload(folder, "sample_gaps", edit)
    refused(folder, "ids do not rise")


# --------------------------------------------------------------------------- what describes columns

SKETCH = {
    "every 0": lambda data: data["columns"]["sketch_means"].update(every=0),
    "every huge": lambda data: data["columns"]["sketch_means"].update(every=2**62),
    "every missing": lambda data: data["columns"]["sketch_means"].pop("every"),
    "every text": lambda data: data["columns"]["sketch_means"].update(every="64"),
    "negative shape": lambda data: data["columns"]["sketch_codes"].update(shape=[-1]),
    "huge shape": lambda data: data["columns"]["sketch_codes"].update(shape=[2**62]),
    "shape of shapes": lambda data: data["columns"]["sketch_codes"].update(shape=[[24]]),
    "groups that add up otherwise": lambda data: data["columns"]["sketch_codes"].update(groups=[2**40]),
    "negative groups": lambda data: data["columns"]["sketch_codes"].update(groups=[-1, 25]),
    "objects": lambda data: data["columns"]["sketch_codes"].update(dtype="O"),
    "floats under the coder of integers": lambda data: data["columns"]["sketch_codes"].update(dtype="<f2"),
    "no dtype": lambda data: data["columns"]["sketch_codes"].pop("dtype"),
    "codec of a later version": lambda data: data["columns"]["sketch_codes"].update(codec="future/9"),
    "codec in a list": lambda data: data["columns"]["sketch_codes"].update(codec=["pco/1"]),
    "ragged": lambda data: data["columns"]["sketch_codes"].update(ragged=True),
    "tables that are no base64": lambda data: data["columns"]["sketch_codes"].update(tables="!!!!"),
    "tables that are no text": lambda data: data["columns"]["sketch_codes"].update(tables=[1]),
    "no tables": lambda data: data["columns"]["sketch_codes"].pop("tables"),
    "tables of another column": lambda data: data["columns"]["sketch_codes"].update(
        tables=data["columns"]["head_ranks"]["tables"]
    ),
    "a column less": lambda data: data["columns"].pop("sketch_codes"),
    "no columns": lambda data: data.update(columns=[]),
    "no rows in a batch": lambda data: data.update(rows_per_batch=0),
    "half rows": lambda data: data.update(rows_per_batch=0.5),
    "another basis": lambda data: data.update(read_by={"logits": {"basis": "teacher/other.safetensors"}}),
    "basis in a list": lambda data: data.update(read_by={"logits": []}),
    "files in a list": lambda data: data.update(read_by=[]),
    "another cache": lambda data: data.update(settings_fingerprint="0" * 64),
}


@pytest.mark.parametrize("name", SKETCH)
def test_descriptions_that_lie_are_refused(copy: Any, name: str) -> None:
    folder = copy("head+sketch")
    rewrite(folder, metadata=SKETCH[name])
    refused(folder, "part-00000")


def test_metadata_that_is_no_json_is_refused(copy: Any) -> None:
    folder = copy()
    data = part(folder, 0).read_bytes()
    assert data.count(b'{"columns"') == 2  # the schema stands at both ends
    part(folder, 0).write_bytes(data.replace(b'{"columns"', b'["columns"'))
    sign(folder)
    refused(folder, "its metadata is not a shard's")


# --------------------------------------------------------------------------- memory


def test_a_row_of_nothing_that_claims_gigabytes_is_refused(copy: Any) -> None:
    folder = copy("top-p")
    rewrite(folder, columns=change("head_ids", lambda page: struct.pack("<I", 2**32 - 1)))
    refused(folder, r"head_ids: 4294967295 entries for \d+ positions of at most 16")


@pytest.mark.parametrize("claim", [2**29, 2**40, 2**62, -5])
def test_a_buffer_that_claims_gigabytes_is_refused_before_it_is_decompressed(copy: Any, claim: int) -> None:
    folder = copy()
    forge_length(folder, claim)
    refused(folder, "at most 536870912 are possible|claims less than nothing")
    assert any("cannot be read as a shard" in reason for reason in problems(folder))


def test_a_buffer_that_holds_more_than_it_claims_is_refused(copy: Any) -> None:
    folder = copy()
    forge_length(folder, 64)
    refused(folder, "part-00000")


def forge_length(folder: Path, claim: int) -> None:
    """Write another decompressed length before the largest buffer of the first record batch."""
    path = part(folder, 0)
    data = bytearray(path.read_bytes())
    sizes = [len(frame) for frame in data.split(b"\x28\xb5\x2f\xfd")[1:]]
    at = -1
    for _ in range(int(np.argmax(sizes)) + 1):
        at = data.index(b"\x28\xb5\x2f\xfd", at + 1)
    data[at - 8 : at] = struct.pack("<q", claim)
    path.write_bytes(data)
    sign(folder)


def test_blocks_are_those_that_arrow_reads(made: dict[str, Path]) -> None:
    for folder in made.values():
        with pa.memory_map(str(part(folder, 0))) as source:
            reader = pa.ipc.open_file(source)
            sizes = [reader.get_batch(number).nbytes for number in range(reader.num_record_batches)]
            source.seek(0)
            blocks = Blocks(source.read_buffer())
            assert len(blocks) == len(sizes)
            for number, size in enumerate(sizes):
                assert size <= blocks.decompressed_bytes(number) <= 1.1 * size + 1024


def test_batches_that_lie_over_each_other_are_refused(copy: Any) -> None:
    folder = copy()
    name_often(part(folder, 0), times=3)
    sign(folder)
    refused(folder, "its record batches lie over each other")
    assert any("lie over each other" in reason for reason in problems(folder))


# --------------------------------------------------------------------------- the basis


def rewrite_basis(folder: Path, described: dict[str, Any] | None = None, **arrays: Any) -> None:
    [path] = (folder / "teacher").glob("sketch-*.safetensors")
    held = {**load_file(path), **{name: np.ascontiguousarray(values) for name, values in arrays.items()}}
    settings = {"version": 1, "softcap": None, "step": None, **(described or {})}
    kept = {name: values for name, values in held.items() if values.size or name not in arrays}
    save_file(kept, path, {METADATA_KEY: json.dumps(settings)})
    sign(folder)


V = 300
BASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "NaN in the basis": (None, {"basis_Vr": np.full((V, 24), np.nan, np.float16)}),
    "infinite base": (None, {"base_V": np.full(V, np.inf, np.float32)}),
    "huge weights": (None, {"tail_weights_GF": np.full((6, 12), 3e38, np.float32)}),
    "integers": (None, {"basis_Vr": np.zeros((V, 24), np.int16)}),
    "other rank": (None, {"basis_Vr": np.zeros((V, 23), np.float16)}),
    "other vocabulary": (None, {"base_V": np.zeros(V - 1, np.float32)}),
    "flat": (None, {"basis_Vr": np.zeros(V * 24, np.float16)}),
    "other head": (None, {"tail_weights_GF": np.zeros((6, 11), np.float32)}),
    "a token twice": (None, {"token_of_rank_V": np.zeros(V, np.uint32)}),
    "a token beyond": (None, {"token_of_rank_V": np.arange(1, V + 1, dtype=np.uint32)}),
    "an array less": (None, {"bias_slope_V": np.zeros(0, np.float16)}),
    "one more array": (None, {"surprise": np.zeros(3, np.float16)}),
    "soft cap of zero": ({"softcap": 0}, {}),
    "soft cap in text": ({"softcap": "30"}, {}),
    "infinite step": ({"step": float("inf")}, {}),
    "negative step": ({"step": -1.0}, {}),
    "a curve in text": ({"bias_curve": "0.8"}, {}),
    "a curve beyond all biases": ({"bias_curve": 1e300}, {}),
    "later version": ({"version": 2}, {}),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_lie_are_refused(copy: Any, name: str) -> None:
    described, arrays = BASES[name]
    folder = copy("head+sketch")
    rewrite_basis(folder, described, **arrays)
    with pytest.raises(CacheDamaged, match="basis.*fetch the cache again") as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the layer file

D = 32
SHAPE = {"heads": 4, "key_heads": 2, "head_width": 8, "scaling": 0.35, "window": None, "softcap": None}
ENTRY = {"norm": "rms", "epsilon": 1e-6, "head_epsilon": 0.0}
LAYER_FILES: dict[str, tuple[Any, dict[str, Any]]] = {
    "NaN": (None, {"hidden.1.mean": np.full(D, np.nan, np.float32)}),
    "beyond all numbers": (None, {"attention.2.query": np.full((32, D), 3e38, np.float32)}),
    "doubles": (None, {"hidden.1.mean": np.zeros(D)}),
    "other width": (None, {"hidden.1.spread": np.ones(D - 1, np.float32)}),
    "no spread": (None, {"hidden.1.spread": np.zeros(D, np.float32)}),
    "a flat matrix": (None, {"attention.2.query": np.zeros(32 * D, np.float32)}),
    "other heads": (None, {"attention.2.key": np.zeros((8, D), np.float32)}),
    "a longer norm": (None, {"attention.2.norm": np.zeros(D + 1, np.float32)}),
    "a table of cosines alone": (None, {"attention.2.sin": np.zeros((3, 8), np.float32)}),
    "a table for three tokens": (
        None,
        {name: np.zeros((3, 8), np.float32) for name in ("attention.2.cos", "attention.2.sin")},
    ),
    "nothing about attention": ({}, {}),
    "other heads in words": ({"2": {"shape": {**SHAPE, "heads": 2}, "entry": ENTRY}}, {}),
    "heads without end": ({"2": {"shape": {**SHAPE, "head_width": 2**40}, "entry": ENTRY}}, {}),
    "no scaling": ({"2": {"shape": {**SHAPE, "scaling": 0}, "entry": ENTRY}}, {}),
    "scaling in words": ({"2": {"shape": {**SHAPE, "scaling": "much"}, "entry": ENTRY}}, {}),
    "a window of nothing": ({"2": {"shape": {**SHAPE, "window": 0}, "entry": ENTRY}}, {}),
    "one more word": ({"2": {"shape": {**SHAPE, "surprise": 1}, "entry": ENTRY}}, {}),
    "no entry": ({"2": {"shape": SHAPE}}, {}),
    "an unknown norm": ({"2": {"shape": SHAPE, "entry": {**ENTRY, "norm": "odd"}}}, {}),
    "a negative epsilon": ({"2": {"shape": SHAPE, "entry": {**ENTRY, "epsilon": -1.0}}}, {}),
    "layers in words": ({"two": {"shape": SHAPE, "entry": ENTRY}}, {}),
    "a list": ([], {}),
}


@pytest.mark.parametrize("name", LAYER_FILES)
def test_layer_files_that_lie_are_refused(copy: Any, name: str) -> None:
    attention, arrays = LAYER_FILES[name]
    folder = copy("relations")
    section = "hidden" if any(array.startswith("hidden") for array in arrays) else "attention"
    path = folder / manifest_of(folder)["read_by"][section]["layers"]
    honest = {"2": {"shape": SHAPE, "entry": ENTRY}} if section == "attention" else {}
    described = {"version": 1, "attention": honest if attention is None else attention}
    save_file({**load_file(path), **arrays}, path, {LAYERS_KEY: json.dumps(described)})
    sign(folder)
    with pytest.raises(CacheDamaged, match="is no layer file of this cache .*fetch the cache again") as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("hidden", {"width": 2**40}), ("hidden", {"codec": 3}), ("hidden", {"step": 0.0}),
        ("hidden", {"step": -1.0}), ("hidden", {"layers": []}), ("hidden", {"layers": [2, 2]}), ("hidden", {"layers": [1]}),
        ("hidden", {"layers": [1, 9]}), ("hidden", {"layers": "all"}), ("attention", {"heads": 3}),
        ("attention", {"kind": []}), ("attention", {"layers": [0]}),
        ("attention", {"key_heads": 0}), ("attention", {"values": "yes"}),
    ],
)  # fmt: skip
def test_settings_of_layers_that_lie_are_refused(copy: Any, section: str, change: dict[str, Any]) -> None:
    folder = copy("relations")
    sign(folder, lambda data: data["targets"][section].update(change))
    with pytest.raises((CacheDamaged, CacheError)) as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 3}, {"heads": 0}, {"heads": 8}, {"teacher_heads": 3}, {"teacher_heads": None}, {"top": 0}, {"top": 2**30},
        {"top": "5"}, {"top": 6}, {"top": None}, {"head_width": 4}, {"key_heads": 4}, {"layers": [1]}, {"kind": "relations"},
    ],
)  # fmt: skip
def test_settings_of_maps_that_lie_are_refused(copy: Any, change: dict[str, Any]) -> None:
    folder = copy("top-maps")
    sign(folder, lambda data: data["targets"]["attention"].update(change))
    with pytest.raises(CacheDamaged) as caught:
        read_everything(folder)
    assert "\n" not in str(caught.value)


def test_maps_of_rows_that_are_too_long_are_refused_at_opening(copy: Any) -> None:
    folder = copy("maps")
    sign(folder, lambda data: data["settings"]["sequence"].update(length=2**20))
    with pytest.raises(
        CacheDamaged, match=r"maps of 1 blocks with 2 heads and 1048576 tokens have \d+ places, at most"
    ):
        Cache.open(folder)


def test_maps_with_fewer_pairs_than_their_row_are_refused(copy: Any) -> None:
    folder = copy("maps")
    rewrite(folder, columns=change("map_2", lambda page: page[:-2]))
    refused(folder, r"column map_2: \d+ bytes for \d+ pairs of 2 bytes")


@pytest.mark.parametrize("what", ["other set", "two for a token", "other length", "other type", "nothing", "no file"])
def test_a_set_of_tokens_that_lies_is_refused(copy: Any, what: str) -> None:
    folder = copy()
    [path] = (folder / "teacher").glob("boundary-*")
    arrays = load_file(path)
    begins_V = arrays["begins_V"]
    begins_V[0] = {"other set": 1 - begins_V[0], "two for a token": 2}.get(what, begins_V[0])
    if what == "other length":
        begins_V = begins_V[:-1].copy()
    elif what == "other type":
        begins_V = begins_V.astype(np.float32)
    if what == "nothing":
        path.write_bytes(b"")
    else:
        save_file({"begins_V": begins_V}, path, {"teachercache-boundary": '{"version": 1}'})
    sign(
        folder,
        lambda data: data.update(files=[f for f in data["files"] if what != "no file" or path.name not in f["file"]]),
    )
    refused(folder, "is no set of tokens .*" if what != "no file" else "names the boundary tokens teacher/boundary-")


def test_a_manifest_that_names_another_set_is_refused(copy: Any) -> None:
    folder = copy()
    sign(folder, lambda data: data["targets"]["boundary_mass"].update(tokens=7))
    with pytest.raises(CacheDamaged, match="another set than the manifest says"):
        Cache.open(folder).boundary  # noqa: B018


def test_a_basis_of_another_kind_is_refused(copy: Any, made: dict[str, Path], tmp_path: Path) -> None:
    folder = copy("hidden")
    [theirs] = (made["head+sketch"] / "teacher").glob("sketch-*")
    [ours] = (folder / "teacher").glob("sketch-*")
    shutil.copy(theirs, ours)
    sign(folder)
    with pytest.raises(CacheDamaged, match="fetch the cache again"):
        read_everything(folder)


# --------------------------------------------------------------------------- the manifest


def at(path: str, value: Any) -> Any:
    def edit(data: dict[str, Any]) -> None:
        *parents, leaf = path.split(".")
        if parents[:1] in (["tokenizer"], ["sequence"]):
            data = data["settings"]
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data[key]
        data[leaf] = value

    return edit


MANIFESTS = [
    ("targets.logits.k", 0), ("targets.logits.k", -3), ("targets.logits.k", 10**12), ("targets.logits.k", True),
    ("targets.logits.k", "16"), ("targets.logits.k", None), ("targets.logits.kind", ["top-k"]), ("targets.logits", 7),
    ("targets.logits.temperatures", []), ("targets.logits.temperatures", [0, 1]), ("targets.logits.dtype", "O"),
    ("targets.logits.temperatures", [1, float("inf")]), ("targets", None),
    ("tokenizer.vocabulary_size", -1), ("tokenizer.vocabulary_size", 2**62), ("tokenizer.vocabulary_size", 1.5),
    ("tokenizer.vocabulary_size", 10), ("tokenizer.pad_id", -1), ("tokenizer.pad_id", 300), ("tokenizer.pad_id", None),
    ("sequence.length", 0), ("sequence.length", 2**60), ("sequence.length", "48"), ("sequence.layout", "sideways"),
    ("shards.0.rows", -1), ("shards.0.rows", 10**30), ("shards.0.rows", 1.5), ("shards.0.rows", 0),
    ("shards.0.held_out_rows", 10**6), ("shards.0.positions", "many"), ("shards.0.files.shards.file", 3),
    ("shards.0.files", {}), ("shards.0.row_ids", 3),
    ("files", [{"file": "a", "bytes": -1, "sha256": ""}]), ("column_bytes", {}),
    ("column_bytes", []), ("column_bytes.input_ids", -1),
    ("targets.boundary_mass", True), ("targets.boundary_mass", {"tokens": 3}), ("targets.boundary_mass.tokens", -1),
    ("targets.boundary_mass.set", "../../etc/passwd"), ("targets.boundary_mass.set", 7),
    ("calibration", []), ("calibration", {"sources": 4}), ("read_by", []), ("read_by", {"logits": 4}),
    ("read_by", {"logits": {"basis": 4}}), ("read_by", {"boundary_mass": {"basis": "teacher/none"}}), ("fidelity", {"kl": 3}),
    ("audit.extra_windows", "x"), ("teacher", {}), ("model", {"parameters": "many"}), ("corpus", {"source": 1}),
    ("created_by", {}), ("shards", 3), ("files", None), ("units", 3),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), MANIFESTS, ids=lambda value: json.dumps(value)[:40])
def test_manifests_that_lie_are_refused_at_opening(copy: Any, path: str, value: Any) -> None:
    folder = copy()
    data = manifest_of(folder)
    at(path, value)(data)
    write_signed(folder, data)
    with pytest.raises(CacheDamaged, match=r"manifest\.json cannot be trusted: .*fetch the cache again") as caught:
        Cache.open(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert len(problems(folder)) == 1


def test_rows_that_add_up_to_more_than_can_be_are_refused_at_opening(copy: Any) -> None:
    folder = copy()
    data = manifest_of(folder)
    shard, [info] = data["shards"][0], data["shards"][0]["files"].values()
    data["shards"] = [
        {**shard, "files": {"shards": {**info, "file": f"shards/{number}.arrow"}}, "rows": 2**52}
        for number in range(2000)
    ]
    write_signed(folder, data)
    with pytest.raises(CacheDamaged, match="its rows add up to more than can be"):
        Cache.open(folder)


def test_a_manifest_nested_beyond_reason_is_refused(copy: Any) -> None:
    folder = copy()
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CacheDamaged, match="cannot be trusted"):
        Cache.open(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"model": {"vocab": {"a": []}}}', "[" * 100_000])
def test_a_tokenizer_that_is_none_is_refused(copy: Any, text: str) -> None:
    folder = copy()
    (folder / "teacher" / "tokenizer.json").write_text(text)
    sign(folder)
    with pytest.raises(CacheDamaged, match=r"tokenizer\.json is no tokenizer .*fetch the cache again"):
        Cache.open(folder).token_texts()


# --------------------------------------------------------------------------- anything


def read_or_refused(folder: Path) -> None:
    try:
        read_everything(folder)
    except CacheDamaged as error:
        assert "\n" not in str(error)
    except CacheError as error:  # of a later version, or without the basis that its kind needs
        assert re.search("install a newer version|read it with the version|is read with the", str(error))
        return
    problems(folder)


ANY = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def read_when_damaged(made: Path, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of a cache to damage, which is then read, and removed."""
    folder = Path(shutil.copytree(made, factory.mktemp("damaged") / "cache"))
    yield folder
    read_or_refused(folder)
    shutil.rmtree(folder)


@ANY
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_bytes_of_a_shard_may_be_others(made: dict[str, Path], tmp_path_factory: Any, data: Any, kind: str) -> None:
    with read_when_damaged(made[kind], tmp_path_factory) as folder:
        path = part(folder, 0)
        shard = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            place = data.draw(st.integers(0, len(shard) - 8))
            value = data.draw(
                st.sampled_from([b"\0", b"\xff", b"\x80", b"\x01", b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f"])
            )
            shard[place : place + len(value)] = value
        path.write_bytes(shard)
        sign(folder)


@ANY
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_coded_bytes_of_a_row_may_be_others(
    made: dict[str, Path], tmp_path_factory: Any, data: Any, kind: str
) -> None:
    def edit(values: dict[str, Any]) -> None:
        name = data.draw(st.sampled_from([name for name in values if isinstance(values[name][0], bytes)]))
        page = bytearray(values[name][0])
        for _ in range(data.draw(st.integers(1, 4))):
            if page:
                page[data.draw(st.integers(0, len(page) - 1))] = data.draw(st.integers(0, 255))
        values[name][0] = bytes(page[: data.draw(st.integers(0, len(page)))] if data.draw(st.booleans()) else page)

    with read_when_damaged(made[kind], tmp_path_factory) as folder:
        rewrite(folder, columns=edit)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def mutate(data: Any, draw: Any) -> None:
    """Put any JSON in any place."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(data[key], dict | list) and data[key] and draw(st.integers(0, 3)):
            data = data[key]
            continue
        data[key] = draw(JSON | st.sampled_from([0, -1, 2**31, 2**63, 1e308, "", "<f8", [], {}]))
        return


@ANY
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_json_of_a_shard_may_be_other(made: dict[str, Path], tmp_path_factory: Any, data: Any, kind: str) -> None:
    with read_when_damaged(made[kind], tmp_path_factory) as folder:
        rewrite(folder, metadata=lambda described: mutate(described, data.draw))


@ANY
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_any_json_of_a_manifest_may_be_other(
    made: dict[str, Path], tmp_path_factory: Any, data: Any, kind: str
) -> None:
    with read_when_damaged(made[kind], tmp_path_factory) as folder:
        manifest = manifest_of(folder)
        mutate(manifest, data.draw)
        if all(name in manifest for name in ("format", "digest")):
            write_signed(folder, manifest)

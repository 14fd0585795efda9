"""Promises of format 2: parts of a cache stand by themselves, and later versions may add keys without moving anything."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cache.forgery import manifest_of, problems, read_everything, rewrite, write_signed
from cache.golden_caches import GOLDEN, reading, recipe
from teachercache.cache import SPLITS, Cache, FileInfo, ShardInfo, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.files.column_groups import groups_of
from teachercache.cache.files.entries import ShardTable
from teachercache.cache.inspection import describe
from teachercache.cache.manifest.card import render_card
from teachercache.cache.manifest.index import INDEX_SHARDS, read_index, write_index
from teachercache.cache.manifest.manifest import MANIFEST, commit_manifest, read_listed, read_manifest
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.stores.local import LocalStore
from teachercache.cache.stores.named import put_named
from teachercache.errors import CacheDamaged, CacheError
from teachercache.training.supervision.fit import check_cache

from builders import aligned, build_cache, other_student, part, sentences, tiny_cache, tiny_recipe, tiny_teacher
from s3_server import Server

LAYERS = GOLDEN / "v2" / "layers"


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A cache of logits, hidden states and attention, with an alignment, to change."""
    return Path(shutil.copytree(LAYERS, tmp_path / "layers"))


def logits_of(cache: Cache) -> list[Any]:
    rows = [(split, index) for split in SPLITS for index in range(cache.rows_of(split))]
    return [cache.read_row(*row, columns=cache.logit_columns).targets for row in rows]


def without_group(folder: Path, section: str) -> None:
    """Take a target out of a cache, as if it had never been stored, and sign what is left."""
    data = manifest_of(folder)
    [group] = [name for name, sections in data["groups"].items() if section in sections]
    del data["groups"][group], data["targets"][section]
    files = data["read_by"].pop(section, {}).values()
    data["files"] = [entry for entry in data["files"] if entry["file"] not in files]
    for name in files:
        (folder / name).unlink()
    for shard in data["shards"]:
        del shard["files"][group]
    shutil.rmtree(folder / group)
    write_signed(folder, data)


# --------------------------------------------------------------------------- column groups


def test_a_student_of_logits_opens_no_file_of_other_targets(layers: Path) -> None:
    whole = logits_of(Cache.open(layers))
    shutil.rmtree(layers / "targets")
    cache = Cache.open(layers)
    for ours, theirs in zip(logits_of(cache), whole, strict=True):
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(CacheDamaged, match=r"targets/hidden/part-00000-\w+\.arrow is missing"):
        cache.read_row("train", 0, columns=["hidden_1"])
    assert {problem.file.rpartition("/")[0] for problem in verify(layers)} == {"targets/hidden", "targets/attention"}


def test_nor_does_it_fetch_one(s3: Server, tmp_path: Path) -> None:
    url = s3.upload(LAYERS, "bucket/groups")
    cache = Cache.open(url, local=tmp_path / "copies")
    cache.prefetch(range(len(cache.infos)), columns=cache.logit_columns)
    logits_of(cache)
    assert s3.downloads("targets/") == 0 and s3.downloads("shards/") == len(cache.infos)
    cache.read_row("train", 0, columns=["hidden_1"])
    assert s3.downloads("targets/hidden") == 1 and s3.downloads("targets/attention") == 0


def test_a_target_is_taken_out_without_touching_the_rest(layers: Path) -> None:
    before = reading(Cache.open(layers))
    rest = {path: path.read_bytes() for path in layers.rglob("*.arrow") if "hidden" not in path.parts}
    without_group(layers, "hidden")
    assert problems(layers) == []
    after = Cache.open(layers)
    assert not [name for name in after.columns if name.startswith("hidden")]
    assert reading(after)["rows"] == before["rows"] and reading(after)["alignments"] == before["alignments"]
    assert all(path.read_bytes() == data for path, data in rest.items())


@pytest.mark.parametrize("section", ["hidden", "attention"])
def test_layers_are_added_beside_others_of_the_same_rows(layers: Path, section: str) -> None:
    """The file that each section is read by is one of its own: none of the others' bytes or digests knows of it."""
    before, whole = reading(Cache.open(layers)), manifest_of(layers)
    without_group(layers, section)
    fewer = manifest_of(layers)
    assert problems(layers) == []
    assert fewer["target_digests"] == {
        name: digest for name, digest in whole["target_digests"].items() if name != section
    }
    shutil.copytree(LAYERS / "targets" / section, layers / "targets" / section)
    for name in whole["read_by"][section].values():
        shutil.copy(LAYERS / name, layers / name)
    write_signed(layers, whole)
    assert problems(layers) == [] and reading(Cache.open(layers)) == before


def test_files_of_a_shard_whose_rows_differ_are_refused(layers: Path) -> None:
    data = manifest_of(layers)
    first, second = data["shards"][0]["files"], data["shards"][1]["files"]
    first["targets/hidden"], second["targets/hidden"] = second["targets/hidden"], first["targets/hidden"]
    write_signed(layers, data)
    with pytest.raises(CacheDamaged, match=r"targets/hidden/part-00001.* it has another row in the place of"):
        Cache.open(layers).read_row("train", 0)


def test_targets_of_other_settings_are_refused(layers: Path) -> None:
    data = manifest_of(layers)
    data["targets"]["hidden"]["step"] *= 2  # the same codes would be other numbers
    write_signed(layers, data)
    with pytest.raises(CacheDamaged, match="its hidden are of other settings than the manifest's"):
        Cache.open(layers).read_row("train", 0)
    assert {problem.file.rpartition("/")[0] for problem in verify(layers)} == {"targets/hidden"}
    assert logits_of(Cache.open(layers))


def test_a_cache_of_hidden_states_alone_is_valid(layers: Path) -> None:
    data = manifest_of(layers)
    moved = {"logits", "boundary_mass"}
    for name in moved:
        del data["targets"][name]
    _rewritten_without(layers, data, moved)
    assert problems(layers) == []
    cache = Cache.open(layers)
    stored = cache.read_row("train", 0)
    assert stored.targets["hidden_1"].shape == (stored.row.length, 16)
    assert describe(cache)["bytes_per_position"]["hidden"] > 0 and "hidden" in render_card(cache.manifest)
    assert "logits" not in cache.manifest.bytes_per_position()
    with pytest.raises(
        CacheError, match="stores no logits, only attention, hidden; use a cache that has them"
    ) as caught:
        cache.kind  # noqa: B018
    assert "\n" not in str(caught.value) and str(layers) in str(caught.value)
    with pytest.raises(CacheError, match="stores no logits"):
        check_cache(cache)


def _rewritten_without(folder: Path, data: dict[str, Any], sections: set[str]) -> None:
    """Write the files of rows anew, without the columns of these sections."""
    from teachercache.cache.files.column_groups import Group
    from teachercache.cache.files.schema import ROW_COLUMNS

    cache = Cache.open(folder)
    groups = [Group(folder="shards", columns=(), settings=cache.manifest.settings_fingerprint)]
    for number, shard in enumerate(data["shards"]):
        rows = [cache.shard(number).read_row(index, (), cache.recent).row for index in range(shard["rows"])]
        info, _ = write_shard(LocalStore(folder), number, rows=rows, payload=[{}] * len(rows), groups=groups)
        (folder / shard["files"]["shards"]["file"]).unlink()
        shard["files"]["shards"] = vars(info.rows_file)
    data["groups"]["shards"] = [name for name in data["groups"]["shards"] if name not in sections]
    kept = (*ROW_COLUMNS, "hidden_1", "hidden_2", "query_2", "key_2")
    data["column_bytes"] = {name: size for name, size in data["column_bytes"].items() if name in kept}
    write_signed(folder, data)


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": ("logits",), "targets/boundary_mass": ("boundary_mass",)},
        {"shards": (), "targets/logits": ("logits",), "targets/boundary_mass": ("boundary_mass",)},
    ],
    ids=["boundary mass", "logits"],
)
def test_a_boundary_mass_that_is_added_later_has_files_of_its_own(layers: Path, layout: dict[str, Any]) -> None:
    cache, data = Cache.open(layers), manifest_of(layers)
    before, manifest = reading(cache), cache.manifest
    groups = groups_of(
        cache.targets,
        layout=layout,
        settings=manifest.settings_fingerprint,
        digests=manifest.target_digests,
        read_by=manifest.read_by,
    )
    for number, shard in enumerate(data["shards"]):
        stored = [cache.shard(number).read_row(index, None, cache.recent) for index in range(shard["rows"])]
        payload = [row.targets for row in stored]
        info, _ = write_shard(
            LocalStore(layers), number, rows=[row.row for row in stored], payload=payload, groups=groups
        )
        (layers / shard["files"].pop("shards")["file"]).unlink()
        shard["files"] = {**{group: vars(file) for group, file in info.files.items()}, **shard["files"]}
    data["groups"] = {**layout, **{name: held for name, held in data["groups"].items() if name != "shards"}}
    write_signed(layers, data)
    assert problems(layers) == [] and reading(Cache.open(layers)) == before
    for group in layout:
        assert (layers / group).is_dir()


# --------------------------------------------------------------------------- fingerprints


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def test_shards_of_equal_settings_may_stand_in_one_cache(teacher: Path, tmp_path: Path) -> None:
    """Neither the corpus, nor how it was cut into shards, nor other targets are in what shards carry."""
    texts = sentences(30)
    one = tiny_cache(tmp_path / "a", teacher=teacher, texts=texts[:14])
    two = tiny_cache(
        tmp_path / "b", teacher=teacher, texts=texts[14:], precompute={"unit_rows": 5},
        targets={"hidden": {"layers": [1], "codec": "bf16"}},
    )  # fmt: skip
    ours, theirs = Cache.open(one).manifest, Cache.open(two).manifest
    assert ours.settings_fingerprint == theirs.settings_fingerprint and ours.fingerprint != theirs.fingerprint
    assert ours.target_digests["logits"] == theirs.target_digests["logits"]
    without_group(two, "hidden")
    data, further = manifest_of(one), manifest_of(two)
    for shard in further["shards"]:
        shutil.copy(two / shard["files"]["shards"]["file"], one / "shards")
    data["shards"] += further["shards"]
    write_signed(one, data)
    assert problems(one) == []
    read_everything(one)
    assert Cache.open(one).manifest.rows == ours.rows + theirs.rows


@pytest.mark.parametrize(
    "changed",
    [{"sequence": {"length": 40}}, {"sequence": {"add_eos": False}}, {}],
    ids=["length", "end of rows", "dtype"],
)
def test_settings_that_change_numbers_change_the_fingerprint(teacher: Path, tmp_path: Path, changed: Any) -> None:
    one = tiny_cache(tmp_path / "a", teacher=teacher, texts=sentences(6))
    other = (
        tiny_cache(tmp_path / "b", teacher=teacher, texts=sentences(6), **changed)
        if changed
        else of_dtype("bfloat16", tmp_path / "b", teacher=teacher)
    )
    found = [Cache.open(each).manifest.settings_fingerprint for each in (one, other)]
    assert found[0] != found[1]
    shutil.copy(part(other, 0), part(one, 0))
    data = manifest_of(one)
    write_signed(one, data)
    with pytest.raises(CacheDamaged, match="it belongs to another cache"):
        Cache.open(one).read_row("train", 0)


def of_dtype(dtype: str, folder: Path, *, teacher: Path) -> Path:
    made = tiny_recipe(folder, teacher=teacher, texts=sentences(6))
    assert made.teacher is not None
    return build_cache(made.model_copy(update={"teacher": made.teacher.model_copy(update={"dtype": dtype})}))


def test_the_dtype_is_the_one_that_was_loaded(teacher: Path, tmp_path: Path) -> None:
    """`auto` is float32 here: both are the same settings."""
    made = [of_dtype(dtype, tmp_path / dtype, teacher=teacher) for dtype in ("auto", "float32")]
    first, second = (Cache.open(each).manifest for each in made)
    assert first.settings_fingerprint == second.settings_fingerprint and first.fingerprint == second.fingerprint
    assert part(made[0], 0).read_bytes() == part(made[1], 0).read_bytes()


def test_an_alignment_outlives_what_is_added_to_a_cache(teacher: Path, tmp_path: Path) -> None:
    """It belongs to the settings and to rows: the cache that is made with a further target takes it as it is."""
    student = other_student(tmp_path / "student")
    one = tiny_cache(tmp_path / "a", teacher=teacher, texts=sentences(12), precompute={"unit_rows": 5})
    more = {"hidden": {"layers": [1], "codec": "bf16"}}
    two = tiny_cache(
        tmp_path / "b", teacher=teacher, texts=sentences(12), targets=more, precompute={"unit_rows": 10**6}
    )
    whole = tiny_cache(tmp_path / "c", teacher=teacher, texts=sentences(12), precompute={"unit_rows": 10**6})
    aligned(whole, student)
    shutil.copytree(whole / "alignments", two / "alignments")
    assert problems(two) == []
    [alignment] = CacheAlignment.all_of(cache := Cache.open(two))
    assert alignment.aligned_row("train", 0, cache.read_row("train", 0)).row.length > 0
    shutil.copytree(whole / "alignments", one / "alignments")  # other shards
    with pytest.raises(CacheDamaged, match="its rows are not those of the cache"):
        CacheAlignment.all_of(Cache.open(one))


# --------------------------------------------------------------------------- later versions


def test_keys_that_this_version_does_not_know_are_ignored(layers: Path) -> None:
    data = manifest_of(layers)
    before = reading(Cache.open(layers))
    data.update(license="Apache-2.0", snapshots=["first"])
    data["corpus"]["parts"] = [{"digest": "0" * 64}]
    data["audit"]["merged"] = 0
    data["files"][0]["media_type"] = "application/octet-stream"
    data["calibration"]["borrowed_from"] = "0" * 64
    write_signed(layers, data)
    index = next((layers / "index").iterdir())
    assert problems(layers) == [] and index.is_file()
    after = reading(Cache.open(layers))
    assert {key: value for key, value in after.items() if key not in ("fingerprint", "order")} == {
        key: value for key, value in before.items() if key not in ("fingerprint", "order")
    }


def test_a_feature_that_it_lacks_is_refused_with_the_remedy(layers: Path) -> None:
    data = manifest_of(layers)
    data["requires"] = ["sequence-classification"]
    write_signed(layers, data)
    for opened in (lambda: Cache.open(layers), lambda: verify(layers)):
        with pytest.raises(CacheError, match=r"requires sequence-classification, .*pip install --upgrade") as caught:
            opened()
        assert "\n" not in str(caught.value) and not isinstance(caught.value, CacheDamaged)


def test_targets_that_no_group_holds_are_refused(layers: Path) -> None:
    data = manifest_of(layers)
    data["groups"]["shards"].remove("logits")
    write_signed(layers, data)
    with pytest.raises(CacheDamaged, match="targets logits, and no column group that holds them"):
        read_everything(layers)
    assert "no column group" in problems(layers)[0]


def test_a_further_target_that_it_does_not_know_is_left_alone_and_still_verified(layers: Path) -> None:
    before = logits_of(Cache.open(layers))
    data = manifest_of(layers)
    data["targets"]["gradients"] = {"rank": 3}
    data["read_by"]["gradients"] = {"projection": "teacher/projection-0123.safetensors"}
    (layers / "teacher" / "projection-0123.safetensors").write_bytes(b"read by a later version")
    data["files"].append({"file": "teacher/projection-0123.safetensors"})
    data["groups"]["targets/gradients"] = ["gradients"]
    for number, shard in enumerate(data["shards"]):
        shard["files"]["targets/gradients"] = vars(
            put_named(
                LocalStore(layers), "targets/gradients", f"part-{number:05d}", ".arrow", b"what a later version writes"
            )
        )
    write_signed(layers, data)
    assert problems(layers) == []
    for ours, theirs in zip(logits_of(Cache.open(layers)), before, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    part(layers, 1, group="targets/gradients").write_bytes(b"what a later version wrote.")
    assert [problem.file.rpartition("/")[0] for problem in verify(layers)] == ["targets/gradients"]


def test_how_a_target_that_it_does_not_know_is_digested_is_for_later_versions_to_say(layers: Path) -> None:
    before = logits_of(Cache.open(layers))
    data = manifest_of(layers)
    data["targets"]["gradients"] = {"rank": 3}
    write_signed(layers, data, digests={"gradients": "of another rule"})
    assert problems(layers) == [] and len(logits_of(Cache.open(layers))) == len(before)
    write_signed(layers, data, digests={"hidden": "of another rule"})
    with pytest.raises(CacheDamaged, match=r"its target_digests do not match its targets \(hidden\)"):
        Cache.open(layers)


FUTURE: dict[str, tuple[str, dict[str, Any], str]] = {
    "logits": ("logits", {"kind": "future"}, r"stores logits of kind 'future', this version reads top-k, .*; install"),
    "boundary mass": ("boundary_mass", {"kind": "future"}, r"stores boundary_mass of kind 'future'.*; install a newer"),
    "hidden states": (
        "hidden",
        {"kind": "future"},
        r"stores hidden of kind 'future', this version reads hidden; install",
    ),
    "codec": ("hidden", {"codec": "future"}, r"hidden states coded as 'future', this version reads int8, .*; install"),
    "attention": ("attention", {"kind": "future"}, r"stores attention of kind 'future'.*; install a newer version"),
}


@pytest.mark.parametrize("name", FUTURE)
def test_a_kind_that_it_does_not_know_leaves_the_others_readable(layers: Path, name: str) -> None:
    section, change, message = FUTURE[name]
    whole = Cache.open(layers)
    before = [whole.read_row("train", index) for index in range(3)]
    data = manifest_of(layers)
    data["targets"][section].update(change, width=[])  # its other settings may be anything
    if section == "logits":
        _renamed(layers, data["shards"], {"head_ranks": "future_ranks"})
    write_signed(layers, data, digests={section: "of another rule"})
    assert problems(layers) == []
    cache = Cache.open(layers)
    assert "of a later version" in render_card(cache.manifest) and describe(cache)["groups"]
    for index, theirs in enumerate(before):
        ours = cache.read_row("train", index).targets
        assert ours and all(np.array_equal(ours[column], theirs.targets[column]) for column in ours)
    kept = {column.name for kind in cache.targets.sections.values() for column in kind.columns}
    assert kept == set(cache.columns) and section not in cache.targets.sections
    with pytest.raises(CacheError, match=message) as caught:
        cache.targets.check_known(section)
    assert "\n" not in str(caught.value)
    with contextlib.ExitStack() as stack:
        if section == "logits":
            stack.enter_context(pytest.raises(CacheError, match=message))
        check_cache(cache)


def _renamed(folder: Path, shards: list[Any], names: dict[str, str]) -> None:
    """Give columns of the files of rows names that no kind of today has."""
    for shard in shards:
        path = folder / shard["files"]["shards"]["file"]
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            size = json.loads(table.schema.metadata[b"teachercache"])["rows_per_batch"]
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
        renamed = table.rename_columns([names.get(name, name) for name in table.column_names])
        renamed = renamed.replace_schema_metadata(table.schema.metadata)  # renaming forgets it
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, renamed.schema, options=options) as writer:
            writer.write_table(renamed, max_chunksize=size)


def test_settings_that_it_does_not_know_are_ignored_where_the_kind_is_one_of_today(layers: Path) -> None:
    data = manifest_of(layers)
    for section in data["targets"].values():
        section["noted"] = "by a later version"
    digests = {name: data["target_digests"][name] for name in data["targets"]}
    with pytest.raises(CacheDamaged, match="do not match"):  # they are hashed with it, as all settings of targets
        write_signed(layers, data, digests=digests)
        Cache.open(layers)
    write_signed(layers, data)
    assert Cache.open(layers).targets.settings().keys() == data["targets"].keys()
    with pytest.raises(CacheDamaged, match="of other settings than the manifest's"):
        Cache.open(layers).read_row("train", 0)


RESERVED = [
    "croissant.json", "partial.json", "signatures/first.sig", "snapshots/first/manifest.json", "lease.json", ".work/plan.json",
]  # fmt: skip


def test_reserved_names_are_neither_listed_nor_read_and_bounded(layers: Path) -> None:
    before = reading(Cache.open(layers))
    for name in RESERVED:
        (layers / name).parent.mkdir(parents=True, exist_ok=True)
        (layers / name).write_bytes(b"\xff not what anybody reads")
    (layers / "README.md").write_text("somebody's own words")
    assert verify(layers) == [] and reading(Cache.open(layers)) == before
    with (layers / "croissant.json").open("wb") as stream:
        stream.truncate(2**40)
    (layers / "signatures" / "more").symlink_to(layers / MANIFEST)
    (layers / "signature.txt").write_text("")
    found = {problem.file: problem.reason for problem in verify(layers)}
    assert "at most" in found.pop("croissant.json") and found.pop("signatures/more") == "it is no regular file"
    assert found == {"signature.txt": "the manifest does not list it"}


# --------------------------------------------------------------------------- the index


def _shards(count: int) -> ShardTable:
    def shard(number: int) -> ShardInfo:
        digest = f"{number:064x}"
        files = {
            group: FileInfo(f"{group}/part-{number:05d}.arrow", 7, digest) for group in ("shards", "targets/hidden")
        }
        return ShardInfo(number % 9 + 1, number % 2, 5, 0, 9, digest, files)

    return ShardTable.of(map(shard, range(count)))


def test_a_long_list_is_read_in_parts_and_growth_leaves_full_ones_alone(tmp_path: Path) -> None:
    many, more = _shards(2 * INDEX_SHARDS + 5), _shards(3 * INDEX_SHARDS)
    files = [FileInfo(f"quarantine/part-{number}.jsonl", 3, "0" * 64) for number in range(7)]
    first, later = (write_index(LocalStore(tmp_path), lists, files) for lists in (many, more))
    assert [entry["shards"] for entry in first] == [INDEX_SHARDS, INDEX_SHARDS, 5]
    assert first[:2] == later[:2] and first[2] != later[2]
    read: list[str] = []

    def read_file(name: str, size: int) -> bytes:
        read.append(name)
        return read_listed(tmp_path, name, size)

    found = read_index(first, read_file, groups=["shards", "targets/hidden"])
    assert found.shards == many and found.files[:] == files and read == [entry["file"] for entry in first]
    assert found.shards[5000] == many[5000] and found.shards.totals() == many.totals()
    assert all(entry["bytes"] < 2**21 for entry in first)


def test_an_index_file_that_was_changed_is_refused(layers: Path) -> None:
    [path] = (layers / "index").iterdir()
    whole = path.read_bytes()
    for damaged in (whole.replace(b"7", b"8", 1), whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(CacheDamaged, match=path.name):
            Cache.open(layers)
        assert [problem.file for problem in verify(layers)] == [MANIFEST]
    path.unlink()
    with pytest.raises(CacheDamaged, match=f"{path.name} is missing"):
        Cache.open(layers)


# --------------------------------------------------------------------------- one manifest after another


@pytest.mark.parametrize("what", ["cache", "alignment"])
def test_a_cache_whose_next_manifest_was_killed_at_any_moment_is_readable(layers: Path, what: str) -> None:
    script = Path(__file__).with_name("killed_commits.py")
    told = subprocess.run([sys.executable, script, what, layers], check=True, capture_output=True, text=True).stdout
    found: list[dict[str, str]] = json.loads(told)
    assert {each["found"] for each in found} == {"before", "after"}, found
    events = [each["killed_before"] for each in found]
    assert len(events) > 5 and events[-1] == "nothing" and any("remove" in event for event in events)
    assert [each["found"] for each in found] == sorted(
        (each["found"] for each in found), reverse=True
    )  # once, for good
    assert problems(layers) == []


def test_a_snapshot_is_read_as_the_manifest_that_it_was(layers: Path) -> None:
    first = read_manifest(layers)
    kept = layers / "snapshots" / first.fingerprint
    shutil.copytree(layers / "index", kept / "index")
    shutil.copy(layers / MANIFEST, kept / MANIFEST)
    fewer = ShardTable.of(list(first.shards)[:-1])
    commit_manifest(replace(first, shards=fewer), LocalStore(layers))
    now, then = read_manifest(layers), read_manifest(kept)
    assert then == first and len(now.shards) == len(first.shards) - 1
    assert not {info.file for info in now.index} & {info.file for info in then.index}
    assert [path.name for path in (layers / "index").iterdir()] == [Path(info.file).name for info in now.index]


# --------------------------------------------------------------------------- who writes


def test_two_writers_of_one_shard_never_meet(teacher: Path, tmp_path: Path) -> None:
    """Each file has the name of its content, and the record of the unit says which of them counts."""
    made = tiny_recipe(tmp_path, teacher=teacher, texts=sentences(20), precompute={"unit_rows": 10})
    build_cache(made, units=1)
    own = part(made.cache, 0)
    rival = put_named(LocalStore(made.cache), "shards", "part-00000", ".arrow", own.read_bytes()[:-1] + b"?")
    build_cache(made)
    assert verify(made.cache) == [] and not (made.cache / rival.file).exists()
    digest = Cache.open(made.cache).manifest.shards[0].rows_file.sha256
    assert own == part(made.cache, 0) and own.stem.endswith(digest[:12])


def test_a_finished_cache_of_format_1_is_complete(tmp_path: Path) -> None:
    from rich.console import Console

    from teachercache.precompute.capture.job import run_precompute

    inputs = Path(shutil.copytree(GOLDEN / "v1", tmp_path / "v1"))
    console = Console(record=True, width=200)
    result = run_precompute(recipe("top-k", inputs / "top-k", inputs=inputs), console=console)
    assert "is complete: nothing to do" in console.export_text() and result["positions_computed"] == 0
    assert json.loads((inputs / "top-k" / MANIFEST).read_text())["format_version"] == 1
    with pytest.raises(CacheError, match=r"made with other settings or data; different: targets\.logits\.k;"):
        run_precompute(recipe("top-k", inputs / "top-k", inputs=inputs, k=9), console=console)


def test_a_job_that_another_version_began_is_refused_in_a_line(tmp_path: Path) -> None:
    from teachercache.precompute.capture.plan import make_plan

    inputs = Path(shutil.copytree(GOLDEN / "v1", tmp_path / "v1"))
    with pytest.raises(CacheError, match="was begun by another version of teachercache, .*or delete") as caught:
        make_plan(recipe("top-k", inputs / "half-done", inputs=inputs))
    assert "\n" not in str(caught.value) and list((inputs / "half-done" / "shards").iterdir())


def test_a_row_of_a_further_file_is_checked_as_any_other(layers: Path) -> None:
    rewrite(layers, columns=lambda data: data["hidden_1"].__setitem__(0, data["hidden_1"][0][:-3]))
    with pytest.raises(CacheDamaged, match=r"targets/hidden/part-00000-\w+\.arrow, row 0, cannot be trusted"):
        read_everything(layers)

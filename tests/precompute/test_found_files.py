"""Files that a resumed job finds of an earlier run: as that run wrote it, or refused in a line with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.golden_caches import GOLDEN, recipe
from teachercache.cache import Cache, verify
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.manifest.manifest import read_manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.corpus.documents import Document
from teachercache.errors import CacheDamaged, CacheError, JobFailed
from teachercache.precompute.align.plan import AlignPlan
from teachercache.precompute.align.plan import make_plan as make_align_plan
from teachercache.precompute.align.units import align_shard
from teachercache.precompute.capture.plan import Plan, make_plan
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.staged import read_documents, write_documents

from builders import build_cache, other_student

Edit = Callable[[Any], Any]
INPUTS = GOLDEN / "v2"
RECORD, PLAN = "done/00000.json", "plan.json"


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unit of a job with a basis and layer files."""
    return build_cache(recipe("layers", tmp_path_factory.mktemp("job") / "cache", inputs=INPUTS), units=1)


@pytest.fixture
def job(half_done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "cache"))


def planned(job: Path) -> Plan:
    return make_plan(recipe("layers", job, inputs=INPUTS))


def edit_json(file: Path, edit: Edit) -> None:
    data = json.loads(file.read_text())
    changed = edit(data)
    data = data if changed is None else changed
    if isinstance(data, dict) and data.pop("digest", None):  # it is as whoever wrote it meant it
        data["digest"] = fingerprint_of(data)
    file.write_text(json.dumps(data))


def refused(job: Path, message: str) -> None:
    with pytest.raises(CacheDamaged, match=message) as caught:
        planned(job).pending()
    assert "\n" not in str(caught.value) and "delete" in str(caught.value)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def be_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "boundary-*", "sketch-*", "layers-*"])
@pytest.mark.parametrize("damage", [flip, be_a_link], ids=["a flipped bit", "a link"])
def test_a_changed_file_of_the_teacher_is_noticed(job: Path, name: str, damage: Callable[[Path], None]) -> None:
    [file, *_] = sorted((job / "teacher").glob(name))
    damage(file)
    refused(job, rf"{file.name}, which an unfinished job goes on from, (has other bytes|is refused)")


def test_a_missing_file_of_the_teacher_is_noticed(job: Path) -> None:
    (job / "teacher" / "tokenizer.json").unlink()
    refused(
        job, r"tokenizer.json, which an unfinished job goes on from, is missing; delete \S+ and run this command again"
    )


def test_a_strangers_file_beside_them_is_no_part_of_the_cache(job: Path) -> None:
    (job / "teacher" / "tokenizer_evil").write_text("not the job's")
    build_cache(recipe("layers", job, inputs=INPUTS))
    assert verify(job) == []
    assert not [info.file for info in read_manifest(job).all_files if "evil" in info.file]


FOREIGN: list[tuple[str, str, Edit]] = [
    *(
        (RECORD, f"without {key}", lambda data, key=key: data.pop(key) and None)
        for key in ("shard", "read_by", "teacher", "documents", "column_bytes", "fidelity", "quarantine")
    ),
    (RECORD, "a list", lambda data: [data]),
    (RECORD, "a number", lambda data: 3),
    (RECORD, "rows as text", lambda data: data["shard"].update(rows="7")),
    (RECORD, "true rows", lambda data: data["shard"].update(rows=True)),
    (RECORD, "negative rows", lambda data: data["shard"].update(rows=-7)),
    (RECORD, "files as a list", lambda data: data["shard"].update(files=[])),
    (RECORD, "other groups", lambda data: data["shard"]["files"].pop("targets/hidden") and None),
    (RECORD, "a file outside", lambda data: data["shard"]["files"]["shards"].update(file="../a")),
    (RECORD, "a file without a digest", lambda data: data["shard"]["files"]["shards"].pop("sha256") and None),
    (RECORD, "read by a list", lambda data: data.update(read_by=["basis"])),
    (RECORD, "an odd teacher", lambda data: data["teacher"].update(parameters=None)),
    (RECORD, "odd fidelity", lambda data: data.update(fidelity={"positions": 1})),
    (PLAN, "without files", lambda data: data.pop("files") and None),
    (PLAN, "without identity", lambda data: data.pop("identity") and None),
    (PLAN, "files as text", lambda data: data.update(files="teacher")),
    (PLAN, "a file outside", lambda data: data["files"][0].update(file="/etc/hostname")),
    ("calibration.json", "a list", lambda data: [data]),
    ("calibration.json", "without rows", lambda data: data.pop("rows") and None),
    ("calibration.json", "read by text", lambda data: data.update(read_by="teacher/sketch")),
    ("calibration.json", "a file outside", lambda data: data["read_by"]["logits"].update(basis="../basis")),
]


@pytest.mark.parametrize(("name", "edit"), [each[::2] for each in FOREIGN], ids=[f"{n}: {w}" for n, w, _ in FOREIGN])
def test_records_of_another_shape_are_refused(job: Path, name: str, edit: Edit) -> None:
    edit_json(job / ".work" / name, edit)
    refused(job, rf"{Path(name).name} is (not as a job writes it|of other column groups)")


@pytest.mark.parametrize("edit", [lambda data: [], lambda data: {"better": "bos"}], ids=["a list", "without nats"])
def test_a_measurement_of_another_shape_is_refused(job: Path, edit: Edit) -> None:
    edit_json(job / ".work" / "input.json", edit)
    with pytest.raises(CacheDamaged, match="input.json is not as a job writes it"):
        planned(job).input_form()


def test_a_record_that_is_no_json_is_computed_again(job: Path) -> None:
    assert 0 not in planned(job).pending()
    (job / ".work" / RECORD).write_text("{")
    assert 0 in planned(job).pending()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = pytest.mark.parametrize("damage", [emptied, halved, flip])


@DAMAGES
def test_a_damaged_plan_is_made_again_and_finished_units_stay(job: Path, damage: Callable[[Path], None]) -> None:
    before = planned(job)
    damage(job / ".work" / PLAN)
    plan = planned(job)
    assert "plan.json was damaged: the job is planned again" in plan.mended
    assert (plan.pending(), plan.calibration()) == (before.pending(), before.calibration()) and 0 not in plan.pending()
    assert planned(job).mended == ""


def test_a_damaged_plan_of_another_recipe_takes_nothing_away(job: Path) -> None:
    emptied(job / ".work" / PLAN)
    with pytest.raises(CacheError, match="finished units of another recipe.* its plan is damaged"):
        make_plan(recipe("top-k", job, inputs=INPUTS))
    assert 0 not in planned(job).pending()


@DAMAGES
@pytest.mark.parametrize("name", ["units.arrow", "partitions.json", "sample.jsonl.zst"])
def test_a_corpus_is_read_again_where_its_counts_are_damaged(
    job: Path, name: str, damage: Callable[[Path], None]
) -> None:
    documents = planned(job).documents(1)
    [file] = (job / ".work").glob(f"corpus-*/{name}")
    damage(file)
    plan = planned(job)
    assert "was damaged: the corpus is read again" in plan.mended
    assert plan.documents(1) == documents and 0 not in plan.pending()
    assert planned(job).mended == ""


@DAMAGES
def test_a_damaged_staged_file_is_removed_so_that_the_next_run_writes_it(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shelf = Shelf(LocalStore(tmp_path), "documents")
    documents = [Document(f"{number:032x}", 0, held_out=False, text="the cat " * number) for number in range(9)]
    write_documents(shelf, "000000.jsonl.zst", documents)
    assert read_documents(shelf, "000000.jsonl.zst") == documents
    damage(tmp_path / "documents" / "000000.jsonl.zst")
    for _ in range(2):
        with pytest.raises(JobFailed, match="000000.jsonl.zst is gone, or has other bytes.*run the same command again"):
            read_documents(shelf, "000000.jsonl.zst")
        assert shelf.store.list() == {}


def test_a_finished_unit_whose_bytes_have_changed_is_computed_again(job: Path) -> None:
    plan = planned(job)
    assert plan.records().recheck() == [] and 0 not in plan.pending()
    [file] = (job / "shards").glob("part-00000-*")
    flip(file)
    assert 0 not in plan.pending()  # its size is right
    assert plan.records().recheck() == [f"shards/{file.name}"]
    assert 0 in plan.pending()


@pytest.fixture(scope="module")
def half_aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a student, and one shard of an alignment of both."""
    folder = tmp_path_factory.mktemp("aligning")
    shutil.copytree(INPUTS / "layers", folder / "cache", ignore=shutil.ignore_patterns("alignments"))
    other_student(folder / "student")
    align_shard(aligning(folder), 0)
    return folder


def aligning(folder: Path) -> AlignPlan:
    return make_align_plan(Cache.open(folder / "cache"), str(folder / "student"))


ALIGNED_FOREIGN: list[tuple[str, Edit]] = [
    ("plan.json", lambda data: [data]),
    ("plan.json", lambda data: data["vocabulary"].pop("coverage") and None),
    ("plan.json", lambda data: data.pop("files") and None),
    ("00000.json", lambda data: [data]),
    ("00000.json", lambda data: data.update(shard=None)),
    ("00000.json", lambda data: data["shard"].update(files={})),
    ("00000.json", lambda data: data.update(longest="7")),
]


@pytest.mark.parametrize(("name", "edit"), ALIGNED_FOREIGN)
def test_a_resumed_alignment_refuses_records_of_another_shape(
    half_aligned: Path, tmp_path: Path, name: str, edit: Edit
) -> None:
    folder = Path(shutil.copytree(half_aligned, tmp_path / "copy"))
    [work] = (folder / "cache" / "alignments").glob("*/.work")
    edit_json(work / name, edit)
    with pytest.raises(
        CacheDamaged, match=rf"{name} is (not as a job writes it|of another alignment)[^\n]*delete[^\n]*$"
    ):
        aligning(folder).pending()


def test_an_alignment_that_an_earlier_version_left_half_done_is_begun_anew(half_aligned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(half_aligned, tmp_path / "copy"))
    [work] = (folder / "cache" / "alignments").glob("*/.work")

    def earlier(data: dict[str, Any]) -> None:
        del data["files"], data["identity"]["records"]

    edit_json(work / "plan.json", earlier)
    assert 0 in aligning(folder).pending()


@pytest.mark.parametrize("name", ["vocabulary.safetensors", "tokenizer/tokenizer.json", "boundary-*"])
def test_a_resumed_alignment_checks_what_all_shards_share(half_aligned: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(half_aligned, tmp_path / "copy"))
    assert 0 not in aligning(folder).pending()
    [file] = (folder / "cache" / "alignments").glob(f"*/{name}")
    flip(file)
    with pytest.raises(CacheDamaged, match=r"has other bytes than the job wrote; delete [^\n]*$"):
        aligning(folder)

"""Planning, resuming, auditing: the job without Ray, in this process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from teachercache.cache import Cache, verify
from teachercache.cache.inspection import describe_row
from teachercache.config import parse_recipe
from teachercache.errors import CacheDamaged, CacheError, CorpusError, JobFailed, ModelError, RecipeError
from teachercache.precompute.capture.commit import commit
from teachercache.precompute.capture.plan import make_plan

from builders import build_cache, part, sentences, tiny_model, tiny_recipe, tiny_teacher, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


def test_cached_logits_equal_the_teachers_own(tmp_path, teacher):
    """Every stored position against a plain forward pass over its document, labels shifted by one."""
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(tmp_path, teacher=teacher, targets={"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}})
    cache = Cache.open(build_cache(recipe))
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    for index in range(cache.rows_of("train")):
        stored = cache.read_row("train", index)
        ids = torch.from_numpy(stored.row.input_ids_S.astype(np.int64))
        with torch.no_grad():
            own = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        positions = np.flatnonzero(stored.row.target_mask_S)
        assert positions.tolist() == list(range(len(ids) - 1))
        top = own[positions].topk(16, -1)
        relative = (top.values - top.values[:, :1]).numpy()
        np.testing.assert_allclose(stored.targets["head_logits"], relative, atol=1e-4)
        actual = own[positions, ids[positions + 1]].numpy()
        np.testing.assert_allclose(stored.targets["actual_log_prob"], actual, atol=1e-4)


def test_running_again_skips_what_is_done(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    first = build_cache(tiny_recipe(tmp_path / "whole", teacher=teacher))
    plan = make_plan(recipe)
    assert plan.pending() == [0, 1, 2]
    build_cache(recipe)
    again = make_plan(recipe)
    assert again.identity == plan.identity
    for shard in sorted((first / "shards").iterdir()):
        assert shard.read_bytes() == (recipe.cache / "shards" / shard.name).read_bytes()


def test_a_killed_writer_leaves_nothing_behind(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    make_plan(recipe)
    (recipe.cache / "shards").mkdir()
    (recipe.cache / "shards" / ".part-00001.arrow.tmp").write_bytes(b"half of a shard")
    (recipe.cache / "shards" / "part-00002-0123456789ab.arrow").write_bytes(b"a shard without a record")
    assert verify(build_cache(recipe)) == []


def test_a_unit_without_a_record_is_missed_at_the_end(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    plan = make_plan(recipe)
    with pytest.raises(JobFailed, match="3 of 3 units have no result"):
        commit(plan)


def _compute_one_unit(recipe) -> None:
    build_cache(recipe, units=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": {"logits": {"kind": "top-k", "k": 9}}}, "targets.logits.k"),
        ({"sequence": {"length": 20}}, "sequence.length"),
        ({"corpus": {"held_out": 0.5}}, "corpus.held_out"),
        ({"precompute": {"unit_rows": 7}}, "units.unit_rows"),
        ({"corpus": {"limit": 3}}, "corpus.digest .other rows: corpus.limit"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_job_is_refused(tmp_path, teacher, change, named, finished):
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=sentences(12))
    build_cache(recipe) if finished else _compute_one_unit(recipe)
    with pytest.raises(CacheError, match=f"other settings or data; different: .*{named}"):
        make_plan(tiny_recipe(tmp_path, teacher=teacher, texts=sentences(12), **change))


def test_a_changed_corpus_or_teacher_is_noticed(tmp_path, teacher):
    build_cache(tiny_recipe(tmp_path, teacher=teacher, texts=sentences(12)))
    with pytest.raises(CacheError, match="corpus.digest"):
        make_plan(tiny_recipe(tmp_path, teacher=teacher, texts=sentences(13)))
    tiny_model(seed=1).save_pretrained(tmp_path / "tiny-teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny-teacher")
    with pytest.raises(CacheError, match="different: teacher.weights_sha256"):
        make_plan(tiny_recipe(tmp_path, teacher=tmp_path / "tiny-teacher", texts=sentences(12)))


def test_a_job_that_has_computed_nothing_can_be_mended_in_place(tmp_path, teacher):
    make_plan(tiny_recipe(tmp_path, teacher=teacher))
    mended = tiny_recipe(tmp_path, teacher=teacher, sequence={"length": 20})
    assert verify(build_cache(mended)) == []


@pytest.mark.parametrize("left", ["plan.json", "corpus-*"])
def test_a_job_killed_while_planning_starts_over(tmp_path, teacher, left):
    """Whatever is there of `.work` and `teacher/` at the kill."""
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    make_plan(recipe)
    for path in (recipe.cache / ".work").iterdir():
        if not path.match(left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert verify(build_cache(recipe)) == []


def test_a_batch_size_may_change_between_runs(tmp_path, teacher):
    """The setting that the advice after a batch that did not fit asks for."""
    build_cache(tiny_recipe(tmp_path, teacher=teacher), units=1)
    smaller = tiny_recipe(tmp_path, teacher=teacher, precompute={"positions_per_batch": 64})
    assert make_plan(smaller).pending() == [1, 2]
    assert verify(build_cache(smaller)) == []


def test_a_recorded_shard_that_is_gone_is_computed_again(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    build_cache(recipe, units=2)
    part(recipe.cache, 0).write_bytes(b"short")
    assert make_plan(recipe).pending() == [0, 2]


def test_a_finished_cache_with_a_missing_shard_is_not_called_complete(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    part(build_cache(recipe), 1).unlink()
    with pytest.raises(CacheDamaged, match=r"part-00001-\w+.arrow is missing"):
        make_plan(recipe)


def test_a_relative_cache_is_refused_on_a_cluster(tmp_path, teacher, monkeypatch):
    from rich.console import Console

    from teachercache.precompute.capture.job import run_precompute

    monkeypatch.chdir(tmp_path)
    data = tiny_recipe(tmp_path, teacher=teacher, precompute={"address": "auto"}).model_dump(mode="json")
    recipe = parse_recipe({**data, "cache": "runs/cache"}, origin="tests")
    with pytest.raises(RecipeError, match="relative path.*-s cache=/shared/cache"):
        run_precompute(recipe, console=Console(quiet=True))


def test_windows_lost_in_packed_rows_are_told_from_lost_documents(tmp_path):
    """One document has a token whose embedding is NaN: its row goes, other windows of its neighbours stay."""
    model = tiny_model(tied=False)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z")["input_ids"][0]] = torch.nan
    model.save_pretrained(tmp_path / "sick")
    tokenizer.save_pretrained(tmp_path / "sick")
    texts = [*sentences(6, words=60), "Z"]
    sections = {"sequence": {"layout": "packed", "length": 32}, "corpus": {"held_out": 0}}
    cache = Cache.open(build_cache(tiny_recipe(tmp_path, teacher=tmp_path / "sick", texts=texts, **sections)))
    audit = cache.manifest.audit
    rows = [cache.read_row("train", index).row for index in range(cache.rows_of("train"))]
    stored = {(segment.source_id, segment.occurrence) for row in rows for segment in row.segments}
    assert audit.stored == len(stored) == audit.rows_in - audit.quarantined
    assert audit.extra_windows == sum(len(row.segments) for row in rows) - len(stored)


def test_a_folder_with_somebodys_files_is_left_alone(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher)
    recipe.cache.mkdir()
    (recipe.cache / "thesis.tex").write_text("precious")
    with pytest.raises(CacheError, match="holds no cache of ours"):
        make_plan(recipe)
    assert (recipe.cache / "thesis.tex").read_text() == "precious"


def test_the_audit_accounts_for_every_row(tmp_path, teacher):
    texts = [*sentences(20), *sentences(5), "", "x"]
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=texts, sequence={"add_eos": False})
    with (tmp_path / "corpus.jsonl").open("a") as stream:
        stream.write('{"text": 7}\nno json\n{"texd": "wrong field"}\n')
    cache = Cache.open(build_cache(recipe))
    audit = cache.manifest.audit
    assert (audit.rows_in, audit.deduplicated, audit.quarantined, audit.stored) == (30, 5, 5, 20)
    lines = [
        json.loads(line) for path in (recipe.cache / "quarantine").iterdir() for line in path.read_text().splitlines()
    ]
    assert len(lines) == 5 and all(line["reason"] for line in lines)
    assert verify(recipe.cache) == []


def test_repeated_rows_can_be_kept_apart(tmp_path, teacher):
    texts = [*sentences(6), *sentences(6)]
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=texts, corpus={"deduplicate": False})
    cache = Cache.open(build_cache(recipe))
    rows = [cache.read_row(s, i).row for s in ("train", "held-out") for i in range(cache.rows_of(s))]
    assert len({row.row_id for row in rows}) == len(rows)
    assert {segment.occurrence for row in rows for segment in row.segments} == {0, 1}


def test_a_teacher_that_gives_no_numbers_fails_with_the_reason_kept(tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    recipe = tiny_recipe(tmp_path, teacher=tmp_path / "broken", texts=sentences(3))
    with pytest.raises(JobFailed, match="all 3 rows were quarantined"):
        build_cache(recipe)
    assert "not finite" in next((recipe.cache / "quarantine").iterdir()).read_text()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"targets": {"logits": {"kind": "top-k", "k": 1000}}},
            RecipeError,
            "k is 1000, but the teacher's tokenizer has 300 tokens",
        ),
        ({"sequence": {"length": 5000}}, RecipeError, "context holds 256 tokens"),
        ({"corpus": {"source": "nowhere.jsonl"}}, CorpusError, "nowhere.jsonl"),
        ({"teacher": Path("./no-such-model")}, ModelError, "no-such-model"),
    ],
)
def test_mistakes_are_found_before_compute_is_spent(tmp_path, teacher, sections, error, message):
    with pytest.raises(error, match=message):
        make_plan(tiny_recipe(tmp_path, **{"teacher": teacher, **sections}))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_an_empty_corpus_is_a_mistake(tmp_path, teacher):
    with pytest.raises(CorpusError, match="empty"):
        make_plan(tiny_recipe(tmp_path, teacher=teacher, texts=[]))
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_chat_rows_without_a_template_are_refused_at_once(tmp_path, teacher):
    recipe = tiny_recipe(tmp_path, teacher=teacher, corpus={"messages_field": "messages"})
    with pytest.raises(ModelError, match="chat template"):
        make_plan(recipe)
    assert not recipe.cache.exists()


def test_chat_rows_store_only_assistant_targets(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    teacher = tiny_teacher(tmp_path / "chat-teacher", chat_template=template)
    messages = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on a mat"}]
    recipe = tiny_recipe(tmp_path, teacher=teacher, corpus={"messages_field": "messages", "held_out": 0})
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    cache = Cache.open(build_cache(recipe))
    row = cache.read_row("train", 0).row
    texts = [token["text"] for token in describe_row(cache, "train:0")["tokens"]]
    labels = "".join(texts[index + 1] for index in np.flatnonzero(row.target_mask_S))
    assert labels == "sat on a mat</s>"
    [segment] = row.segments
    said = [(role, segment.text.encode()[start:end].decode()) for role, start, end in segment.contents]
    assert said == [("user", "the cat?"), ("assistant", "sat on a mat")]


def test_two_jobs_do_not_write_to_one_cache(tmp_path, teacher):
    """The second one is turned away while the first runs, and the first is not disturbed."""
    from rich.console import Console

    from teachercache.precompute.capture.job import run_precompute

    recipe = tiny_recipe(tmp_path, teacher=teacher)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(recipe.cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(JobFailed, match=r"another precompute job \(process \d+ on .*\) is writing to"):
        run_precompute(recipe, console=Console(quiet=True))
    holder.communicate(b"\n")
    assert not list(recipe.cache.iterdir())


HOLDER = """
import sys
from pathlib import Path
from teachercache.cache.stores.lease import leased
from teachercache.cache.stores.local import LocalStore
with leased(LocalStore(Path(sys.argv[1])), job="precompute job"):
    print("held", flush=True)
    sys.stdin.readline()
"""

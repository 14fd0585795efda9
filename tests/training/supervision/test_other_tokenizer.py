"""Training a student with another tokenizer than the teacher's, from a cache and its alignment."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from teachercache.cache import Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import ObjectiveConfig, parse_recipe
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.evaluation import run_evaluation
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.objective import DistillationObjective
from teachercache.objective.cross_tokenizer.objective import CrossTokenizerObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.aligned_tensors import AlignedRows
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.dataset import CacheDataset
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.fingerprint import tokenizer_fingerprint
from teachercache.training.job.train import run_training
from training.runs import log_of

from builders import aligned, other_student, other_tokenizer, sentences, tiny_cache, tiny_student
from s3_server import Server
from tokenizer_families import unigram

ACROSS = [{"match": "projected-kl"}, {"match": "chunk-likelihood"}, {"match": "sorted-probabilities", "weight": 0.5}]
TARGETS = {
    "logits": {"kind": "top-k", "k": 16, "dtype": "float32"},
    "hidden": {"layers": [1, 2], "codec": "bf16"},
    "attention": {"layers": [2]},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache aligned with a student without dropout, whose tokens are pieces of other sizes than the teacher's."""
    folder = tmp_path_factory.mktemp("aligned")
    cache = tiny_cache(folder, texts=[*sentences(60), "naïve café 日本語 🙂"], targets=TARGETS)
    student = other_student(folder / "student", tokenizer=unigram(), layers=2, dropout=0.0)
    aligned(cache, student)
    return cache, student


def recipe_of(shared: tuple[Path, Path], output: Path, **sections: Any) -> Any:
    cache, student = shared
    train = {
        "output": str(output), "global_batch": 8, "micro_batch": 4, "epochs": 1.5, "learning_rate": 2e-3, "log_every": 1,
        "evaluate_every": 4, "loader_workers": 0, "trackers": [], **sections.pop("train", {}),
    }  # fmt: skip
    objective = {"alpha": 0.8, "across": ACROSS, **sections.pop("objective", {})}
    data = {"cache": str(cache), "student": {"model": str(student)}, "objective": objective, "train": train}
    return parse_recipe({**data, **sections}, origin="tests")


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in log_of(run) if "loss" in record]


def falls(records: list[dict[str, Any]], name: str) -> bool:
    """Tells whether a loss falls from the first steps to the last: those of single batches differ by as much as is learned."""
    values = [record[name] for record in records]
    return float(np.mean(values[-4:])) < float(np.mean(values[:4]))


def test_a_run_learns_logs_every_term_and_exports_the_students_tokenizer(
    shared: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run_training(recipe_of(shared, tmp_path / "run"))
    assert {"total", "ce", "projected-kl", "chunk-likelihood", "sorted-probabilities"} <= result["losses"].keys()
    records = [record for record in log_of(tmp_path / "run") if "loss" in record]
    for name in ("projected-kl", "chunk-likelihood", "sorted-probabilities", "unmapped", "unreachable"):
        assert all(math.isfinite(record[name]) for record in records), name
    assert falls(records, "projected-kl") and "kl" not in records[0]
    total = records[0]["projected-kl"] + records[0]["chunk-likelihood"] + 0.5 * records[0]["sorted-probabilities"]
    assert records[0]["loss"] == pytest.approx(0.8 * total + 0.2 * records[0]["ce"], rel=1e-4)
    evaluated = [record for record in log_of(tmp_path / "run") if "eval_loss" in record]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] and evaluated[0]["eval_bits_per_byte"] > 0
    assert all(math.isfinite(record["eval_kl"]) for record in evaluated)
    student = load_tokenizer(result["student"])
    assert tokenizer_fingerprint(student) == tokenizer_fingerprint(load_tokenizer(str(shared[1])))
    assert load_causal_lm(result["student"]).config.vocab_size == len(student)


def test_held_out_bits_per_byte_are_those_of_the_text(shared: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_training(recipe_of(shared, tmp_path / "run", train={"max_steps": 2, "evaluate_every": 2}))
    model, tokenizer = load_causal_lm(result["student"]), load_tokenizer(result["student"])
    cache = Cache.open(shared[0])
    alignment = CacheAlignment.open(cache, tokenizer_fingerprint(tokenizer), student="student")
    nats = size = 0.0
    for index in range(cache.rows_of("held-out")):
        stored = cache.read_row("held-out", index, columns=())
        segment = stored.row.segments[0]
        text = segment.text
        encoded = tokenizer(text, return_offsets_mapping=True)  # BOS stands before every window
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        row = alignment.aligned_row("held-out", index, stored).row
        assert row.input_ids_S.tolist() == ids[: row.length]  # the end of a window is no end of a text
        with torch.no_grad():
            log_prob = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ends = [end for _, end in encoded["offset_mapping"]] + [len(text)]
        for place in np.flatnonzero(row.target_mask_S).tolist():
            nats -= float(log_prob[place, ids[place + 1]])
            size += len(text[ends[place] : ends[place + 1]].encode())
    logged = [record for record in log_of(tmp_path / "run") if "eval_loss" in record][-1]["eval_bits_per_byte"]
    assert logged == pytest.approx(nats / size / math.log(2), rel=1e-3)
    table = run_evaluation(tmp_path / "run", teacher=str(Path(shared[0]).parent / "teacher"))
    assert table["student_after"]["bits_per_byte"] == pytest.approx(logged, rel=1e-3)
    assert table["teacher"]["bits_per_byte"] > 0 and table["student_after"]["quality_kept"] is None
    assert table["student_after"]["tokenizer"] == "student" and table["teacher"]["tokenizer"] == "the teacher's"


@pytest.mark.parametrize(
    "settings", [{"micro_batch": 1}, {"pack": True}, {"loader_workers": 1}, {"gradient_checkpointing": True}]
)
def test_how_a_step_is_computed_does_not_change_its_loss(
    shared: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    for name, train in (("one", {}), ("two", settings)):
        run_training(recipe_of(shared, tmp_path / name, train={"max_steps": 4, **train}))
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-4)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(shared: tuple[Path, Path], tmp_path: Path) -> None:
    run_training(recipe_of(shared, tmp_path / "whole", train={"max_steps": 6, "evaluate_every": 3}))
    run_training(recipe_of(shared, tmp_path / "cut", train={"max_steps": 6, "evaluate_every": 3}))
    for name in ("checkpoint-6", "summary.json", "student"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_training(recipe_of(shared, tmp_path / "cut", train={"max_steps": 6, "evaluate_every": 3}))
    assert again["resumed_from"] == 3
    one, two = (load_causal_lm(str(tmp_path / name / "student")).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_zero_stages_learn_the_same(shared: tuple[Path, Path], tmp_path: Path, zero_stage: int) -> None:
    for stage in (1, zero_stage):
        run_training(recipe_of(shared, tmp_path / str(stage), train={"max_steps": 3, "zero_stage": stage}))
    np.testing.assert_allclose(losses_of(tmp_path / str(zero_stage)), losses_of(tmp_path / "1"), rtol=1e-5)


def test_layers_are_matched_at_aligned_tokens(shared: tuple[Path, Path], tmp_path: Path) -> None:
    layers = [
        {"match": "hidden-cosine", "pairs": {1: 1, 2: 2}},
        {"match": "attention-kl", "pairs": {2: 2}},
        {"match": "query-relations", "pairs": {2: 2}},
        {"match": "distances", "pairs": {2: 2}},
    ]
    run_training(recipe_of(shared, tmp_path / "run", objective={"layers": layers}))
    records = [record for record in log_of(tmp_path / "run") if "loss" in record]
    for name in ("hidden-cosine", "attention-kl", "query-relations", "distances", "projected-kl"):
        assert all(math.isfinite(record[name]) for record in records), name
    for name in ("hidden-cosine", "attention-kl", "projected-kl"):
        assert falls(records, name), name


def test_with_the_same_tokens_layers_at_aligned_tokens_are_layers_at_all_tokens(tmp_path: Path) -> None:
    """A student whose vocabulary is the teacher's, under another fingerprint: everything aligned is everything."""
    cache = tiny_cache(tmp_path, texts=sentences(30), targets=TARGETS)
    student = tiny_student(tmp_path / "student", layers=2, dropout=0.0)
    tokenizer = teacher_tokenizer(Cache.open(cache))
    tokenizer.add_tokens(["<never>"])  # another fingerprint
    tokenizer.save_pretrained(student)
    attention = {"match": "attention-kl", "pairs": {2: 2}}
    layers = [{"match": "hidden-cosine", "pairs": {1: 1, 2: 2}}, attention, {**attention, "first_key": False}]
    model = load_causal_lm(str(student))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(student)
    objective = {"layers": layers, "across": [{"match": "projected-kl"}]}
    plain = recipe_of((cache, student), tmp_path / "plain", objective=objective, train={"max_steps": 3})
    run_training(plain)  # the vocabulary holds the teacher's: no alignment is needed
    aligned(cache, student)
    run_training(plain.model_copy(update={"train": plain.train.model_copy(update={"output": tmp_path / "aligned"})}))
    before, after = (
        [record for record in log_of(tmp_path / name) if "loss" in record] for name in ("plain", "aligned")
    )
    assert "kl" in before[0] and "projected-kl" in after[0]
    for name in (
        "hidden-cosine",
        "attention-kl",
        "attention-kl.2",
    ):  # of all tokens but a text's first, which nobody predicts
        np.testing.assert_allclose([r[name] for r in after], [r[name] for r in before], rtol=0.1)


def test_equal_vocabularies_make_projected_kl_the_kl(tmp_path: Path) -> None:
    """The same batch through the same student, by the loss of one vocabulary and by that of two."""
    cache = tiny_cache(tmp_path, texts=sentences(30), targets={"logits": TARGETS["logits"]})
    student = tiny_student(tmp_path / "student", layers=1, dropout=0.0)
    tokenizer = teacher_tokenizer(Cache.open(cache))
    tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained(student)
    aligned(cache, student)
    opened = Cache.open(cache)
    alignment = CacheAlignment.open(opened, tokenizer_fingerprint(tokenizer), student="student")
    config = ObjectiveConfig.model_validate({"alpha": 1.0, "across": [{"match": "projected-kl"}]})
    one = DistillationObjective(config, kind=opened.kind)
    vocabulary = alignment.vocabulary
    two = CrossTokenizerObjective(
        config, targets=opened.targets, first_U=vocabulary.first_Vt, emitted_V=vocabulary.emitted_Vs, begins_V=None
    )
    indices = list(range(6))
    plain = Collator.of(OwnRows(opened, one.columns))(
        CacheDataset([OwnRows(opened, one.columns)], "train").__getitems__(indices).rows
    )
    across = Collator.of(AlignedRows(opened, alignment, two.columns))(
        CacheDataset([AlignedRows(opened, alignment, two.columns)], "train").__getitems__(indices).rows
    )
    torch.testing.assert_close(plain["input_ids"], across["input_ids"])
    model = load_causal_lm(str(student))
    logits = model(plain["input_ids"]).logits.detach()
    padded = torch.cat([logits, torch.full((*logits.shape[:2], 1), -1e9)], -1)  # the token that never comes
    wanted = one(StudentOutput.of_logits(logits), plain["shift_labels"], plain["targets"])
    found = two(StudentOutput.of_logits(padded), across["shift_labels"], across["targets"])
    assert float(found.named["projected-kl"]) == pytest.approx(float(wanted.divergence), rel=1e-5)
    assert float(found.ce) == pytest.approx(float(wanted.ce), rel=1e-5)


def test_what_does_not_fit_is_refused_before_the_first_step(shared: tuple[Path, Path], tmp_path: Path) -> None:
    cache, _ = shared
    stranger = other_student(tmp_path / "stranger", tokenizer=other_tokenizer(vocabulary=320, seed=4))
    with pytest.raises(CacheError, match="teachercache align"):
        run_training(recipe_of((cache, stranger), tmp_path / "a"))
    small = shutil.copytree(shared[1], tmp_path / "small")
    model = load_causal_lm(str(small))
    model.resize_token_embeddings(200)
    model.save_pretrained(small)
    with pytest.raises(ModelError, match="its own tokenizer"):
        run_training(recipe_of((cache, small), tmp_path / "b"))
    without = tiny_cache(tmp_path / "c", texts=sentences(20), targets={"boundary_mass": False})
    student = other_student(tmp_path / "student")
    aligned(without, student)
    with pytest.raises(CacheError, match="boundaries: false"):
        run_training(recipe_of((without, student), tmp_path / "d"))
    with pytest.raises(RecipeError, match="twice"):
        recipe_of(shared, tmp_path / "e", objective={"across": [{"match": "projected-kl"}] * 2})
    with pytest.raises(RecipeError, match="tau means nothing"):
        recipe_of(shared, tmp_path / "e", objective={"across": [{"match": "projected-kl", "tau": 3.0}]})
    assert not any(list((tmp_path / name).glob("checkpoint-*")) for name in "abd")


def test_shares_are_of_chunks(shared: tuple[Path, Path], tmp_path: Path) -> None:
    """As in evaluation, however many chunks a position has."""
    count = Cache.open(shared[0]).rows_of("train")
    train = {"max_steps": 1, "learning_rate": 1e-9, "global_batch": count, "micro_batch": count}
    run_training(recipe_of(shared, tmp_path / "run", train=train))
    record = next(record for record in log_of(tmp_path / "run") if "loss" in record)
    cache = Cache.open(shared[0])
    student = load_tokenizer(str(shared[1]))
    alignment = CacheAlignment.open(cache, tokenizer_fingerprint(student), student="student")
    vocabulary = alignment.vocabulary
    config = ObjectiveConfig.model_validate({"alpha": 1.0, "across": [{"match": "projected-kl"}]})
    objective = CrossTokenizerObjective(
        config, targets=cache.targets, first_U=vocabulary.first_Vt, emitted_V=vocabulary.emitted_Vs, begins_V=None
    )
    rows = CacheDataset([AlignedRows(cache, alignment, objective.columns)], "train").__getitems__(list(range(count)))
    batch = Collator.of(AlignedRows(cache, alignment, objective.columns))(rows.rows)
    logits = load_causal_lm(str(shared[1]))(batch["input_ids"]).logits  # padding is on the right
    terms = objective(StudentOutput.of_logits(logits.detach()), batch["shift_labels"], batch["targets"])
    chunks = len(batch["targets"]["chunk_first"])
    assert chunks < 0.95 * terms.positions  # else this would show nothing
    assert record["unreachable"] == pytest.approx(float(terms.named["unreachable"]) / chunks, rel=1e-3)
    assert record["projected-kl"] == pytest.approx(float(terms.named["projected-kl"]) / terms.positions, rel=1e-3)


def test_maps_of_attention_are_refused_across_tokenizers(tmp_path: Path) -> None:
    targets = {"logits": TARGETS["logits"], "attention": {"kind": "maps", "layers": [2]}}
    cache = tiny_cache(tmp_path, texts=sentences(20), targets=targets)
    student = other_student(tmp_path / "student", layers=2)
    aligned(cache, student)
    layers = [{"match": "attention-kl", "pairs": {2: 2}}]
    with pytest.raises(CacheError, match="kind: relations"):
        run_training(recipe_of((cache, student), tmp_path / "run", objective={"layers": layers}))
    with pytest.raises(RecipeError, match="reverse-kl means nothing"):
        run_training(recipe_of((cache, student), tmp_path / "run", objective={"divergence": "reverse-kl"}))


def test_inspect_shows_both_sides(shared: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    from teachercache.cli import main

    for arguments in (["inspect", str(shared[0]), "--row", "train:0", "--json"], ["inspect", str(shared[0]), "--json"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code in (0, None)
    row, whole = (json.loads(line) for line in capfd.readouterr().out.strip().splitlines())
    assert sum(chunk["student"] for chunk in row["chunks"]) == len(row["student_tokens"])
    assert sum(chunk["teacher"] for chunk in row["chunks"]) == len(row["tokens"])
    assert whole["alignments"][0]["student"] == "student" and whole["alignments"][0]["aligned_fraction"] == 1.0
    with pytest.raises(SystemExit):
        main(["inspect", str(shared[0]), "--row", "train:0"])
    assert "student's tokens" in capfd.readouterr().out


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_training_from_an_object_store_is_training_from_the_folder(
    shared: tuple[Path, Path], s3: Server, tmp_path: Path, workers: int
) -> None:
    """Logits, layers and alignment alike."""
    cache, student = shared
    url = s3.upload(cache, f"aligned/cache{workers}")
    objective = {
        "layers": [{"match": "hidden-cosine", "pairs": {1: 1, 2: 2}}, {"match": "attention-kl", "pairs": {2: 2}}]
    }
    train = {"max_steps": 4, "evaluate_every": 2, "loader_workers": workers}
    s3.break_next(match="alignments/", kind="status", status=503, times=2)
    stream = {"local": str(tmp_path / "copies"), "local_bytes": "1 GB"}
    run_training(recipe_of((url, student), tmp_path / "there", objective=objective, train=train, stream=stream))  # type: ignore[arg-type]
    train["loader_workers"] = 0  # who loads changes nothing
    run_training(recipe_of(shared, tmp_path / "here", objective=objective, train=train))
    assert losses_of(tmp_path / "there") == losses_of(tmp_path / "here")
    assert verify(url) == []
    table = run_evaluation(tmp_path / "there", teacher=str(cache.parent / "teacher"), rows=2, overrides=())
    assert table["student_after"]["tokenizer"] == "student"


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_learn_what_one_learns(shared: tuple[Path, Path], tmp_path: Path, zero_stage: int) -> None:
    objective = {
        "layers": [{"match": "hidden-cosine", "pairs": {1: 1, 2: 2}}, {"match": "attention-kl", "pairs": {2: 2}}]
    }
    train = {"max_steps": 4, "zero_stage": zero_stage, "micro_batch": 2}
    one = recipe_of(shared, tmp_path / "one", objective=objective, train=train)
    run_training(one)
    two = one.model_copy(update={"train": one.train.model_copy(update={"output": tmp_path / "two"})})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two.model_dump(mode="json", exclude_none=True)))
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root / "pipeline"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, str(root / "jobs" / "train_student.py"), str(tmp_path / "two.yaml")],
        env=environment, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5)


def test_without_a_teacher_a_student_learns_its_own_tokens(shared: tuple[Path, Path], tmp_path: Path) -> None:
    run_training(recipe_of(shared, tmp_path / "run", objective={"alpha": 0.0}))
    records = [record for record in log_of(tmp_path / "run") if "loss" in record]
    assert records[-1]["ce"] < records[0]["ce"] and "projected-kl" not in records[0]
    assert records[0]["loss"] == pytest.approx(records[0]["ce"])


@pytest.mark.parametrize(
    "logits",
    [
        {"kind": "head+sketch", "k": 6, "rank": 8, "step": 0.1, "calibration_positions": 256},
        {"kind": "top-p", "p": 0.9, "k": 16},
        {"kind": "full"},
        {"kind": "hidden", "step": 0.03},
        {"kind": "random-sampling", "draws": 20},
    ],
    ids=lambda logits: logits["kind"],
)
def test_every_kind_of_targets_teaches_across_tokenizers(tmp_path: Path, logits: dict[str, Any]) -> None:
    cache = tiny_cache(tmp_path / "cache", texts=sentences(40), targets={"logits": logits})
    student = other_student(tmp_path / "student", dropout=0.0)
    aligned(cache, student)
    temperature = 2.0 if logits["kind"] in ("head+sketch", "full", "hidden") else 1.0
    objective = {
        "temperature": temperature,
        "alpha": 1.0,
        "across": [{"match": "projected-kl"}],
    }  # nothing else is learned
    run_training(recipe_of((cache, student), tmp_path / "run", objective=objective, train={"epochs": 3}))
    records = [record for record in log_of(tmp_path / "run") if "loss" in record]
    assert all(math.isfinite(record["projected-kl"]) for record in records)
    assert falls(records, "projected-kl")


def test_low_rank_adapters_learn_across_tokenizers_too(shared: tuple[Path, Path], tmp_path: Path) -> None:
    _, student = shared
    recipe = recipe_of(shared, tmp_path / "run", student={"model": str(student), "lora": {"rank": 4}})
    result = run_training(recipe)
    records = [record for record in log_of(tmp_path / "run") if "loss" in record]
    assert records[-1]["projected-kl"] < records[0]["projected-kl"]
    assert tokenizer_fingerprint(load_tokenizer(result["student"])) == tokenizer_fingerprint(
        load_tokenizer(str(student))
    )


def test_several_caches_are_learned_from_through_their_alignments(shared: tuple[Path, Path], tmp_path: Path) -> None:
    _, student = shared
    further = tiny_cache(tmp_path / "further", texts=sentences(20, seed=8), targets=TARGETS)
    mix = {"mix": [{"cache": str(further)}]}
    with pytest.raises(CacheError, match="has no alignment"):
        run_training(recipe_of(shared, tmp_path / "run", stream=mix))
    aligned(further, student)
    run_training(recipe_of(shared, tmp_path / "run", stream=mix, train={"max_steps": 4}))
    evaluated = [record for record in log_of(tmp_path / "run") if "eval_loss" in record][-1]
    assert evaluated["eval_bits_per_byte"] > 0 and evaluated["eval_cache1_bits_per_byte"] > 0

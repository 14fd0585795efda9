"""Ten mistakes that systems in this field have made, each with a test of ours, by number."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from teachercache.cache import Cache, verify
from teachercache.config import ObjectiveConfig, StudentConfig
from teachercache.errors import CacheDamaged, CacheError, ModelError
from teachercache.evaluation.quality import held_out_rows, quality
from teachercache.objective import NO_TARGET, DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.order.mixture import Mixture
from teachercache.stream.order.shuffle_windows import RowOrder
from teachercache.targets import TopK
from teachercache.targets.logits.temperature import softened
from teachercache.training.supervision.fit import check_shapes
from teachercache.training.supervision.tokenizers import alignments_of
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import part, sentences, tiny_cache, tiny_model, tiny_teacher

PADDED = 20  # rows of the output matrix that no token uses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_teacher(folder / "teacher", padded_vocabulary=PADDED)
    tiny_cache(folder, teacher=folder / "teacher", targets={"logits": {"kind": "top-k", "k": 300, "dtype": "float32"}})
    return folder


@pytest.fixture(scope="module")
def cache(folder) -> Cache:
    return Cache.open(folder / "cache")


@pytest.fixture(scope="module")
def teacher(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[-PADDED:] = 0  # a trained model never chooses them
    return model


def batch_of(cache: Cache, rows: range, columns: tuple[str, ...]) -> dict:
    stored = [cache.read_row("train", index, columns=columns) for index in rows]
    return Collator.of(OwnRows(cache, columns))(stored)


def objective_of(cache: Cache, **settings) -> tuple[DistillationObjective, tuple[str, ...]]:
    config = ObjectiveConfig(**settings)
    objective = DistillationObjective(config, kind=cache.kind)
    return objective, objective.columns


def test_mistake_01_labels_and_masks_are_not_shifted_against_the_logits(cache, teacher):
    """Row i predicts token i + 1. The teacher as its own student has KL 0 only if every target is where it belongs."""
    objective, columns = objective_of(cache, alpha=0.5, temperature=2.0)
    batch = batch_of(cache, range(8), columns)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits[..., : cache.manifest.vocabulary_size]
        terms = objective(StudentOutput.of_logits(logits), batch["shift_labels"], batch["targets"])
        moved = objective(StudentOutput.of_logits(logits.roll(1, dims=1)), batch["shift_labels"], batch["targets"])
    assert abs(float(terms.divergence)) / terms.positions < 1e-5 < float(moved.divergence) / terms.positions
    ids, labels = batch["input_ids"], batch["shift_labels"]
    shifted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NO_TARGET)], dim=1)
    at_target = labels != NO_TARGET
    assert torch.equal(labels[at_target], shifted[at_target]) and not at_target[:, -1].any()


def test_mistake_02_fewer_candidates_than_k_leave_no_uninitialised_ids():
    kind = TopK(6, (1.0, 4.0), "float16", 20)
    logits = torch.full((3, 20), -torch.inf)
    logits[:, :2] = torch.tensor([1.0, 2.0])
    columns = kind.capture(torch, logits, torch.zeros(3, dtype=torch.long))
    assert (columns["head_ids"] < 20).all() and (columns["head_ids"][:, :2] == [1, 0]).all()
    head, tail = softened(
        columns["head_logits"].astype(np.float32), columns["tail_log_partition"].astype(np.float32), (1.0, 4.0), 4.0
    )
    assert np.isneginf(head[:, 2:]).all() and np.isneginf(tail).all()
    np.testing.assert_allclose(np.exp(head).sum(-1), 1, atol=1e-3)


class Wrapper(torch.nn.Module):
    """A wrapper such as DeepSpeed and DDP put around a student: gradients synchronise only if *its* forward is called."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, **inputs):
        self.calls += 1
        return self.module(**inputs)


def test_mistake_03_the_loss_goes_through_the_data_parallel_wrapper(cache, tmp_path):
    student = tiny_model(vocabulary=300 + PADDED)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[])
    trainer = DistillationTrainer(model=student, cache=cache, args=args, objective=ObjectiveConfig())
    batch = next(iter(trainer.get_train_dataloader()))
    wrapped = Wrapper(student)
    trainer.compute_loss(wrapped, dict(batch))
    tried = wrapped.calls  # the first batch also tries whether the output layer can form the loss
    trainer.compute_loss(wrapped, dict(batch))
    assert wrapped.calls == tried + 1


def test_mistake_04_rows_do_not_depend_on_world_size_or_accumulation():
    """Picking rows by `rank * batch + batch * step` loses or repeats some under another world size."""
    order = Mixture.of(
        [RowOrder([20, 0, 33], block_rows=[4, 4, 4], block_bytes=[1, 1, 1], fingerprint="f", seed=1, window=2)]
    )
    plans = [
        BatchPlan(order, global_batch=12, micro_batch=micro, world_size=world)
        for world, micro in ((1, 12), (1, 3), (2, 6), (3, 2), (4, 3))
    ]
    for plan in plans:
        seen = []
        for step in range(plan.steps_per_epoch):
            rows = [
                row for rank in range(plan.world_size) for part in plan.micro_batches(step, rank=rank) for row in part
            ]
            assert sorted(rows) == sorted(plans[0].step_rows(step).tolist())
            seen += rows
        assert sorted(seen) == list(range(53))


def test_mistake_05_a_cache_and_a_student_that_do_not_fit_are_not_paired(cache, tmp_path):
    small = tiny_model(vocabulary=200)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"200 tokens, the cache's tokenizer has 300"):
        check_shapes(small, cache.manifest)
    other = tiny_teacher(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    swapped = (
        tokenizer.replace('"A"', '"?"', 1).replace('"B"', '"A"', 1).replace('"?"', '"B"', 1)
    )  # same size, other ids
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    with pytest.raises(CacheError, match="has no alignment with the tokenizer of .*other"):
        alignments_of(StudentConfig(model=str(other)), [cache])


def test_mistake_06_payload_is_no_nested_list(cache):
    """Decoding hands out views of the decompressed buffer: no Python object per number."""
    with pa.memory_map(str(cache.folder / cache.manifest.shards[0].file)) as source:
        schema = pa.ipc.open_file(source).schema
    for name in ("head_ids", "head_logits", "tail_log_partition", "actual_log_prob"):
        assert schema.field(name).type == pa.binary()
    values = cache.read_row("train", 0).targets["head_ids"]
    assert values.base is not None and not values.flags.owndata


def test_mistake_07_a_truncated_file_never_counts_as_done(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "cache", tmp_path / "cache"))
    shard = part(copy, 0)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheDamaged, match=r"part-00000-\w+.arrow holds \d+ bytes, the manifest says"):
        Cache.open(copy).read_row("train", 0)
    assert [problem.file for problem in verify(copy)] == [f"shards/{shard.name}"]
    assert not list((folder / "cache").rglob("*.tmp"))


def test_mistake_08_padded_output_rows_are_a_part_of_the_students_softmax_and_the_teacher_gives_them_nothing(
    cache, teacher
):
    """Whoever samples from the student samples from them too; of the teacher only the tokenizer's vocabulary is stored."""
    objective, columns = objective_of(cache, alpha=0.5, temperature=1.0)
    batch, size = batch_of(cache, range(4), columns), cache.manifest.vocabulary_size
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], use_cache=False).logits
        plain = objective(StudentOutput.of_logits(logits[..., :size]), batch["shift_labels"], batch["targets"])
        logits[..., size:] = logits[..., :size].logsumexp(-1, keepdim=True) - math.log(PADDED)
        padded = objective(StudentOutput.of_logits(logits), batch["shift_labels"], batch["targets"])
    lost = math.log(2) * plain.positions
    assert float(padded.divergence) == pytest.approx(float(plain.divergence) + lost, rel=1e-4)
    assert float(padded.ce) == pytest.approx(float(plain.ce) + lost, rel=1e-4)
    naive = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")
    assert float(padded.ce) == pytest.approx(float(naive), rel=1e-5)


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_mistake_09_padding_does_not_change_what_is_captured(folder, tmp_path, layout):
    """One row a forward pass against many of different lengths: the same targets."""
    caches = [
        Cache.open(
            tiny_cache(
                tmp_path / str(size), teacher=folder / "teacher", texts=sentences(30), sequence={"layout": layout},
                precompute={"positions_per_batch": size}, targets={"logits": {"kind": "top-k", "k": 300, "dtype": "float32"}},
            )
        )
        for size in (1, 4096)
    ]  # fmt: skip
    for index in range(caches[0].rows_of("train")):
        alone, batched = (cache.read_row("train", index) for cache in caches)
        assert alone.row.row_id == batched.row.row_id
        for name in ("head_logits", "tail_log_partition", "actual_log_prob"):
            np.testing.assert_allclose(alone.targets[name], batched.targets[name], atol=1e-4)


def test_mistake_10_an_evaluation_scores_tokens_and_not_padding(cache, teacher):
    rows = held_out_rows(cache, limit=None)
    measured = quality(teacher, rows, cache, batch_rows=16)
    assert measured["positions"] == cache.positions_of("held-out")
    losses = []
    with torch.no_grad():
        for stored in rows:
            ids = torch.from_numpy(stored.row.input_ids_S.astype(np.int64))
            logits = teacher(input_ids=ids[None]).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
    assert measured["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert measured["top1_agreement"] == 1.0  # the teacher agrees with itself

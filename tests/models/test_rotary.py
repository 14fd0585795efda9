"""Rotary embeddings whose factors depend on length: what a row or a document gives does not depend on what stands beside it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import TrainingArguments

from flash import flash_kernels, with_flash
from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm
from teachercache.models.probes import check_length, check_rows_alone, computes_rows_alone, most_tokens
from teachercache.models.rotary import most_positions, original_context, rotate_by_own_length
from teachercache.targets import HiddenStates, StoredTargets, TopK
from teachercache.teacher import Teacher
from teachercache.tokens.rows import Segment, TokenRow
from teachercache.training.supervision.fit import check_shapes
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import sentences, tiny_cache, tiny_tokenizer

VOCABULARY, ORIGINAL = 300, 32
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
KINDS = ("longrope", "dynamic", "by layer")


def model_of(kind: str) -> Any:
    """Phi-3's kind, dynamic NTK, and Gemma 3's: factors of their own for each type of layer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "longrope":
        config: Any = transformers.Phi3Config(
            **sizes, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL
        )
    elif kind == "dynamic":
        config = transformers.LlamaConfig(**{**sizes, "max_position_embeddings": ORIGINAL}, rope_parameters=DYNAMIC)
    else:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        config = transformers.Gemma3TextConfig(
            **sizes, head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"sliding_attention": plain, "full_attention": LONGROPE},
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.mul_(6)
    return model


def row(seed: int, *lengths: int) -> TokenRow:
    ids_S = np.random.default_rng(seed).integers(3, VOCABULARY, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    mask_S = np.ones(len(ids_S), dtype=bool)
    mask_S[np.cumsum(lengths) - 1] = False
    return TokenRow(f"{seed:032x}", False, ids_S, mask_S, tuple(Segment("", 0, 0, 0, at) for at in starts))


def alone(kind: str, ids_S: Any) -> torch.Tensor:
    """Logits of a sequence by transformers' own model, which has seen nothing before."""
    with torch.no_grad():
        return model_of(kind)(input_ids=torch.from_numpy(ids_S).long()[None], use_cache=False).logits[0]


def expected(kind: str, one: TokenRow) -> np.ndarray:
    """Log p of each token that follows, every document of the row alone."""
    ends = [*(segment.start for segment in one.segments), one.length]
    logits_SV = torch.cat([alone(kind, one.input_ids_S[a:b]) for a, b in pairwise(ends)])
    log_p_NV = logits_SV[torch.from_numpy(one.target_mask_S)].log_softmax(-1)
    return log_p_NV.gather(1, torch.from_numpy(one.labels_N()).long()[:, None])[:, 0].numpy()


DOCUMENTS = [row(1, 60), row(2, 20), row(3, 33), row(4, 32), row(5, 47)]
PACKED = [row(1, 60, 20), row(2, 20, 33, 7), row(3, 12)]


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_a_document_alone(kind: str, layout: str) -> None:
    rows = DOCUMENTS if layout == "documents" else PACKED
    hidden = HiddenStates(layers=(1,), width=32, blocks=2, codec="bf16")
    targets = StoredTargets(TopK(8, (1.0,), "float32", VOCABULARY), hidden=hidden)
    teacher = Teacher.of(model_of(kind), targets=targets, layout=layout, pad_id=0, longest=80)
    by_itself = [captured for each in rows for captured in teacher.capture([each], positions_per_batch=1)]
    for one, other, each in zip(teacher.capture(rows, positions_per_batch=10_000), by_itself, rows, strict=True):
        assert one.columns is not None and other.columns is not None
        np.testing.assert_allclose(one.columns["actual_log_prob"], expected(kind, each), atol=1e-4)
        np.testing.assert_allclose(one.columns["actual_log_prob"], other.columns["actual_log_prob"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_batches_changes_nothing(kind: str) -> None:
    """transformers keeps what the longest sequence left, and cannot take a second long one where factors go by layer."""
    model = rotate_by_own_length(model_of(kind))
    for length in (20, 60, 40, 60, 33, 32, 20):
        ids_S = row(length, length).input_ids_S
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(ids_S).long()[None], use_cache=False).logits[0]
        assert torch.allclose(found, alone(kind, ids_S), atol=1e-4)


def test_flash_kernels_and_copies_too() -> None:
    targets = StoredTargets(TopK(8, (1.0,), "float32", VOCABULARY))
    model = copy.deepcopy(rotate_by_own_length(model_of("longrope")))
    assert all(module.forward.__self__ is module for module in model.modules() if hasattr(module, "rope_type"))
    with flash_kernels():
        teacher = Teacher.of(with_flash(model), targets=targets, layout="documents", pad_id=0)
        for captured in teacher.capture(DOCUMENTS, positions_per_batch=10_000):
            assert captured.columns is not None
            found = captured.columns["actual_log_prob"]
            np.testing.assert_allclose(found, expected("longrope", captured.row), atol=1e-4)


def test_models_without_such_factors_are_left_as_they_are() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    rotate_by_own_length(model)
    assert original_context(model) is None and "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize(("kind", "most"), [("longrope", 128), ("dynamic", None), ("by layer", 128)])
def test_teacher_and_student_take_rows_of_equal_length(tmp_path: Path, kind: str, most: int | None) -> None:
    """LongRoPE's factors are for so many tokens; dynamic ones are for any number."""
    model = model_of(kind)
    assert most_positions(model.config) == most_tokens(model) == most
    cache = Cache.open(tiny_cache(tmp_path, texts=sentences(4, words=200), sequence={"length": 160}))
    long_student = pytest.raises(ModelError, match="takes at most 128 tokens, rows of") if most else nullcontext()
    long_teacher = pytest.raises(ModelError, match="takes at most 128 tokens, rows have") if most else nullcontext()
    with long_student:
        check_shapes(model, cache.manifest)
    with long_teacher:
        check_length(model, name="the teacher", longest=160)
    check_length(model, name="the teacher", longest=100)


def test_a_model_that_chooses_by_the_batch_in_code_of_its_own_is_found_out() -> None:
    """An embedding that this project does not know of: here transformers' own way, before it is mended."""
    model = model_of("longrope")
    assert not computes_rows_alone(model, vocabulary_size=VOCABULARY, longest=60)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "a way of its own"
            module.forward = lambda x, position_ids, _of=module: _rotated_by_batch(_of, x, position_ids)
    with pytest.raises(ModelError, match="a row of 2100 tokens stands beside it"):
        check_rows_alone(model, vocabulary_size=VOCABULARY, longest=2100)


def _rotated_by_batch(module: Any, x: Any, position_ids: Any) -> Any:
    module.rope_type = "longrope"
    try:
        return type(module).forward(module, x, position_ids)
    finally:
        module.rope_type = "a way of its own"


@pytest.mark.parametrize("pack", [False, True])
def test_a_student_of_this_kind_learns_from_each_row_as_it_is_alone(tmp_path: Path, pack: bool) -> None:
    """The loss of a step does not depend on how many rows are in a micro-batch."""
    model_of("longrope").save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    cache = Cache.open(tiny_cache(tmp_path / "c", texts=sentences(40, words=60), sequence={"length": 64}))
    found = []
    for micro_batch in (1, 8):
        args = TrainingArguments(
            str(tmp_path / f"run{micro_batch}"), max_steps=2, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=8 // micro_batch, use_cpu=True, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, per_device_eval_batch_size=micro_batch,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=load_causal_lm(str(tmp_path / "student")), cache=cache, args=args, objective=ObjectiveConfig(),
            pack=pack and micro_batch > 1,
        )  # fmt: skip
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        found.append([*losses, trainer.evaluate()["eval_loss"]])
    assert found[1] == pytest.approx(found[0], abs=1e-4)

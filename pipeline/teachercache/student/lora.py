"""Students that learn in low-rank adapters, through `peft`: their own weights stay as they are (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", ICLR 2022).

Adam's states are then those of the adapters, a percent of the student's. What leaves the run is a plain student all the
same, its adapters merged into its weights; the adapters by themselves lie beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from teachercache.config import LoraConfig, StudentConfig
from teachercache.errors import ModelError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def with_adapters(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """The model with trainable adapters in the layers that `config.target_modules` names, and everything else frozen.
    `seed` decides what the adapters begin with.

    Raises `ModelError` when peft is not installed, or finds no such layer.
    """
    try:
        import peft
    except ImportError:
        raise ModelError('student.lora needs peft: pip install "teachercache[train]"') from None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number does
        lora_dropout=config.dropout,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules],
        task_type="CAUSAL_LM",
    )
    _check_not_tied(model, config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"student.lora.target_modules: {' '.join(str(error).split())}") from None


def _check_not_tied(model: Any, config: LoraConfig) -> None:
    """Merging adapters of an output layer into a weight that is the input embedding as well would change both."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if config.target_modules == "all-linear" or output is None or output.weight is not inputs.weight:
        return
    named = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in (output, inputs)}
    if tied & {name.rpartition(".")[2] for name in named}:
        raise ModelError(
            f"student.lora.target_modules: {' and '.join(sorted(tied))} share one weight in this student, which adapters of "
            "one of them would change for both; leave them out"
        )


def write_merged(checkpoint: Path, student: StudentConfig, folder: Path) -> None:
    """The student's own weights with a checkpoint's adapters merged into them, as a plain folder in float32."""
    import peft
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from teachercache.models import load_causal_lm

    unset_hf_deepspeed_config()  # after a run under ZeRO 3 transformers would shard what it loads
    base = load_causal_lm(student.model, revision=student.revision, dtype="float32")
    merged = peft.PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload()
    merged.save_pretrained(folder)


def copy_adapters(checkpoint: Path, folder: Path) -> None:
    """The adapters alone, as `peft` loads them; they appear whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(checkpoint / name, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)

"""Students that learn in low-rank adapters, through `peft`: their own weights stay as they are (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", ICLR 2022).

Adam's states are then those of the adapters, a percent of the student's. What leaves the run is a plain student all the
same, its adapters merged into its weights; the adapters by themselves lie beside it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from teachercache.config import LoraConfig, StudentConfig
from teachercache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def with_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PreTrainedModel:
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
    places = _places_of_weights(model)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused below
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, re.error) as error:
        # The brackets hold a whole model, layer by layer.
        message = re.sub(r"\(.*\)(?= is not supported)", "", " ".join(str(error).split()))
        raise ModelError(f"student.lora.target_modules: {message}") from None
    _check_not_shared(adapted, places)
    return cast("PreTrainedModel", adapted)  # it passes on what it does not have itself


Places = dict[int, dict[tuple[int, str], str]]  # of each weight: its layers, by what holds them, and their names


def _places_of_weights(model: PreTrainedModel) -> Places:
    places: Places = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, own_name = name.rpartition(".")
        for weight in module.parameters(recurse=False):
            places.setdefault(id(weight), {})[id(model.get_submodule(parent)), own_name] = name
    return places


def _check_not_shared(adapted: Any, places: Places) -> None:
    """Merging adapters into a weight of several layers, as a tied output layer's is, would change all of them.

    Asks which layers peft has adapted: how names, their endings and regular expressions are read is its own affair.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for weight in layer.get_base_layer().parameters(recurse=False):
            names = places.get(id(weight), {}).values()
            if len(names) > 1:
                last = {name.rpartition(".")[2] for name in names}
                shared = sorted(last if len(last) == len(names) else names)
                raise ModelError(
                    f"student.lora.target_modules: {' and '.join(shared)} share one weight in this student, which adapters "
                    "of one of them would change for all; leave them out"
                )


def write_merged(checkpoint: Path, student: StudentConfig, folder: Path) -> None:
    """The student's own weights with a checkpoint's adapters merged into them, as a plain folder in float32."""
    import peft
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from teachercache.models.loading import load_causal_lm

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

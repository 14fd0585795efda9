"""A student made of a teacher's own layers: some of them, by index, with its embeddings, norm, head and tokenizer,
or with another tokenizer and embeddings for it that are made of the teacher's.

Works for any decoder-only architecture of transformers whose layers sit in one `ModuleList` of
`config.num_hidden_layers` modules, and that keeps what differs from layer to layer in lists of that length in its
config (`layer_types` and the like). The result is a plain folder that `from_pretrained` loads anywhere; making it takes
the memory of both models. Keeping every k-th layer is the usual start of a distilled student (Sanh et al., 2019,
"DistilBERT").
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.errors import ModelError, UserError
from teachercache.models.activations import path_of_blocks
from teachercache.models.loading import find_model, load_causal_lm, load_tokenizer
from teachercache.models.probes import check_causal
from teachercache.tokens.fingerprint import vocabulary_size
from teachercache.training.initialise.embedding_transfer import check_tokenizers, transplant_embeddings
from teachercache.training.initialise.layer_choice import chosen_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Lists of any config that are not one entry a layer, whatever their length.
NOT_PER_LAYER = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}


def init_student(
    model: str,
    *,
    layers: str,
    output: Path,
    tokenizer: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a student made of the chosen layers of `model` to the folder `output`.

    `layers` reads "0,5,10", "every:3" (0, 3, 6 …), "keep:10" (evenly spaced, first and last included) or "first:8".
    `tokenizer` names another tokenizer (an id, a folder, or package://NAME/FOLDER): the student takes its vocabulary, see
    `transplant_embeddings`. Returns `student` (folder), `layers` (indices kept), `teacher_layers` (how many there were),
    `parameters` and `teacher_parameters`, with another tokenizer also `tokenizer` (its name) and `embeddings` (how many
    tokens were `copied`, `averaged` and made from the `mean`). The folder appears when it is whole; `overwrite` replaces a
    model that is there already.

    Raises `ModelError` for a model or a choice of layers that cannot be used, a model that sees later tokens, or a tokenizer
    without defined bytes, `UserError` for an output that is taken.
    """
    output = Path(output)
    _check_output(output, model, overwrite=overwrite)
    model_tokenizer = load_tokenizer(model, revision=revision)
    chosen = model_tokenizer if tokenizer is None else load_tokenizer(tokenizer)
    if tokenizer is not None:
        check_tokenizers({model: model_tokenizer, tokenizer: chosen})
    source: Any = load_causal_lm(model, revision=revision, dtype="auto")
    check_causal(source, name=model, vocabulary_size=vocabulary_size(model_tokenizer))
    path = path_of_layers(source, model)
    kept = chosen_layers(layers, count=len(source.get_submodule(path)))
    student = _keep_layers(source, model, path, kept)
    transferred: dict[str, Any] = {}
    if tokenizer is not None:
        transferred = {
            "tokenizer": tokenizer,
            "embeddings": transplant_embeddings(student, old=model_tokenizer, new=chosen, name=model),
        }
    _save(student, chosen, output)
    return {
        "student": str(output),
        "layers": kept,
        "teacher_layers": len(source.get_submodule(path)),
        "parameters": sum(weight.numel() for weight in student.parameters()),
        "teacher_parameters": sum(weight.numel() for weight in source.parameters()),
        **transferred,
    }


def _check_output(output: Path, model: str, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} exists and is not empty; choose another folder, or replace it with --overwrite")
    if not (output / "config.json").is_file():
        raise UserError(f"{output} holds something that is no model, so it is not overwritten; choose another folder")
    source = find_model(model)
    if source.is_local and Path(source.location).resolve() == output.resolve():
        raise UserError(f"{output} is the model that the layers come from; choose another folder")


def path_of_layers(source: Any, model: str) -> str:
    """Name of the one list of layers, e.g. `model.layers` or `transformer.h`."""
    if getattr(source, "hf_quantizer", None) is not None:
        raise ModelError(f"{model} is quantised, its layers cannot be copied; give the checkpoint in full precision")
    path = path_of_blocks(source)
    if path is None:
        raise ModelError(
            f"{model} ({type(source).__name__}) does not keep its layers in one list of config.num_hidden_layers "
            "modules; init-student takes decoder-only models that do, such as Llama, Qwen, Gemma, Mistral or GPT-2"
        )
    return path


def _keep_layers(source: Any, model: str, path: str, kept: list[int]) -> Any:
    """A model of the same class with the layers `kept`, renumbered, and everything else as it was."""
    config = type(source.config).from_dict(_config_of_kept(source.config, kept))
    try:
        student = type(source)(config).to(source.dtype)
        student.load_state_dict(_weights_of_kept(source.state_dict(), path, kept), strict=True)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"{model} ({type(source).__name__}) decides by a layer's index what the layer is, so that layers {kept} "
            f"do not make a model; choose others, e.g. first:N ({' '.join(str(error).split())[:200]})"
        ) from error
    student.generation_config = source.generation_config
    return student.eval()


def _config_of_kept(config: Any, kept: list[int]) -> dict[str, Any]:
    """The config as a dict, with as many layers as are kept, and every list of one entry a layer cut to those."""
    values: dict[str, Any] = config.to_dict()
    text = config.get_text_config()
    inner = values
    if text is not config:  # a composite config: the decoder's own is one of its parts
        inner = next(values[name] for name, part in vars(config).items() if part is text)
    count = text.num_hidden_layers
    for name, value in inner.items():
        if isinstance(value, list) and len(value) == count and name not in NOT_PER_LAYER:
            inner[name] = [value[index] for index in kept]
    inner[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return values


def _weights_of_kept(weights: dict[str, Any], path: str, kept: list[int]) -> dict[str, Any]:
    renumbered = {old: new for new, old in enumerate(kept)}
    chosen = {}
    for name, weight in weights.items():
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}."):
            chosen[name] = weight
        elif int(index) in renumbered:
            chosen[f"{path}.{renumbered[int(index)]}.{rest}"] = weight
    return chosen


def _save(student: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    student.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if output.exists():
        shutil.rmtree(output)
    temporary.replace(output)

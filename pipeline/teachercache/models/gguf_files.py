"""GGUF files as plain Hugging Face folders, made once for each file in the user's cache folder.

transformers parses GGUF in 10-20 s each time, and marks the model so that it refuses `save_pretrained`; the plain float32
copy loads in a tenth of a second, in every actor and every later command. What the file says of its tokenizer beyond the
vocabulary transformers passes over: BOS and EOS around a text, and the space before it. Here the copy has them, as
llama.cpp would.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from teachercache.models.weights import REPORTED, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSION = 2  # part of the folder's name: raise it with every change of what a conversion gives

# What llama.cpp (src/llama-vocab.cpp) takes where the file does not say: by `tokenizer.ggml.model`, and of byte-level
# vocabularies by `tokenizer.ggml.pre`.
_ADD_BOS = {"llama": True, "bert": True}
_ADD_EOS = {"t5": True}
_ADD_BOS_PRE = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    *("tekken", "chameleon"),
}


class Surroundings(NamedTuple):
    """Settings of a GGUF file about what stands around a text; `space_prefix` None: the file has none. `tokens`: size
    of the vocabulary."""

    bos: bool
    eos: bool
    space_prefix: bool | None
    tokens: int


def plain_folder(file: Path) -> Path:
    """The folder of a GGUF file, converted if it is not there yet."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = _user_cache() / "gguf" / f"{digest[:32]}-{CONVERSION}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teachercache"


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, **REPORTED}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
    marked = whole(loaded, model=file.name)
    config = type(marked.config).from_dict(marked.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(marked)(config)
    plain.load_state_dict(marked.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    surround(tokenizer, surroundings(file))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)


def surroundings(file: Path) -> Surroundings:
    """From the file's metadata: `tokenizer.ggml.add_bos_token`, `add_eos_token` and `add_space_prefix`."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def said(name: str, otherwise: Any) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return otherwise if field is None else field.contents()

    kind, split = said("model", ""), said("pre", "")
    return Surroundings(
        bos=bool(said("add_bos_token", _ADD_BOS.get(kind, split in _ADD_BOS_PRE))),
        eos=bool(said("add_eos_token", _ADD_EOS.get(kind, False))),
        space_prefix=said("add_space_prefix", None),
        tokens=len(fields["tokenizer.ggml.tokens"].data),
    )


def surround(tokenizer: PreTrainedTokenizerBase, settings: Surroundings) -> None:
    """Have a tokenizer put before and after a text what its file says."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    changed = description
    if settings.space_prefix is not None:
        changed = with_space_prefix(description, wanted=settings.space_prefix)
        if changed != description:
            tokenizer.add_prefix_space = settings.space_prefix
            tokenizer.init_kwargs["add_prefix_space"] = settings.space_prefix
    # transformers gives byte-level vocabularies GPT-2's <|endoftext|>, for which the model has no row.
    added = [token for token in changed["added_tokens"] if token["id"] < settings.tokens]
    if added != changed["added_tokens"] or changed != description:
        changed = {**changed, "added_tokens": added}
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(changed))
    if tokenizer.bos_token is not None and tokenizer.add_bos_token != settings.bos:
        tokenizer.add_bos_token = settings.bos
    if tokenizer.eos_token is not None and tokenizer.add_eos_token != settings.eos:
        tokenizer.add_eos_token = settings.eos


def with_space_prefix(description: dict[str, Any], *, wanted: bool) -> dict[str, Any]:
    """A tokenizer.json that puts a space before a text, or none: in each of the places where such files have it."""
    changed: dict[str, Any] = json.loads(json.dumps(description))
    changed["normalizer"] = _parts(changed.get("normalizer"), "normalizers", lambda part: part["type"] != "Prepend")
    places, decoders = _places(changed.get("pre_tokenizer")), _places(changed.get("decoder"))
    for part in [*places, *decoders]:
        if part["type"] == "Metaspace" and wanted == (part["prepend_scheme"] == "never"):
            part["prepend_scheme"] = "first" if wanted else "never"
    for part in places:
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = wanted
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if any(part["type"] == "Fuse" for part in decoders):
        changed["decoder"] = _parts(changed["decoder"], "decoders", lambda part: part["type"] != "Strip")
        if wanted:
            changed["decoder"] = _with(changed["decoder"], "decoders", strip, first=False)
    if wanted and not any(part["type"] in ("Metaspace", "ByteLevel") for part in places):
        changed["normalizer"] = _with(
            changed["normalizer"], "normalizers", {"type": "Prepend", "prepend": "▁"}, first=True
        )
    return changed


def _places(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A part of a tokenizer.json, or those of a sequence."""
    if part is None:
        return []
    inner = next((part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part), None)
    return [part] if inner is None else [place for item in inner for place in _places(item)]


def _parts(part: dict[str, Any] | None, name: str, kept: Any) -> dict[str, Any] | None:
    """The same without parts that are not kept."""
    places = _places(part)
    left = [place for place in places if kept(place)]
    if len(left) == len(places):
        return part
    return {"type": "Sequence", name: left} if left else None


def _with(part: dict[str, Any] | None, name: str, step: dict[str, Any], *, first: bool) -> dict[str, Any]:
    places = _places(part)
    return {"type": "Sequence", name: [step, *places] if first else [*places, step]}

"""Embeddings for another vocabulary, made of a model's own.

Fast Vocabulary Transfer (Gee et al., 2022, "Fast Vocabulary Transfer for Language Model Compression"): a token that the
model has too takes its row, any other the mean of the rows of the tokens that the model's tokenizer gives to its bytes.
Random rows would have to be learned before anything else can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from teachercache.errors import ModelError
from teachercache.tokens.fingerprint import require_fast
from teachercache.tokens.token_bytes import TokenBytes
from teachercache.tokens.vocabulary_map import token_pieces

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_tokenizers(tokenizers: Mapping[str, Any]) -> None:
    """Raise `ModelError` unless every tokenizer, given by name, defines the bytes of its tokens."""
    for name, tokenizer in tokenizers.items():
        if TokenBytes.of(require_fast(tokenizer)).family == "text":
            raise ModelError(
                f"tokenizer {name} does not define the bytes of its tokens (it drops white space, as WordPiece does), so no "
                "embeddings can be made for them; take a byte-level tokenizer, or SentencePiece"
            )


def transplant_embeddings(
    model: PreTrainedModel, *, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, name: str
) -> dict[str, int]:
    """Give `model`, whose tokenizer is `old`, the vocabulary of `new`, in place; returns how its rows were made.

    Input and output embeddings, and the head's bias, take as many rows as `new` has ids. Tokens with bytes that are a
    token of `old`, special tokens of the same text, BOS and EOS are `copied`; others with bytes are `averaged`; what is
    left takes the `mean` over all tokens of `old`. The model's config and generation config name `new`'s special tokens.
    Raises `ModelError` for a model with further weights for each token of its vocabulary.
    """
    embeddings: Any = model.get_input_embeddings()
    rows, size = embeddings.weight.shape[0], TokenBytes.of(new).size
    _check_weights(model, rows=rows, name=name)
    pieces = token_pieces(new, old)
    ids = [[index for index in indices if index < rows] for indices in pieces.ids]
    tensors = {kind: _made(weight, ids, known=pieces.target.size) for kind, weight in _weights(model).items()}
    _name_special_tokens(model, new)
    model.resize_token_embeddings(size, mean_resizing=False)
    for kind, weight in _weights(model).items():
        weight.data.copy_(tensors[kind])
    empty = sum(not indices for indices in ids)
    copied = sum(bool(indices) and exact for indices, exact in zip(ids, pieces.exact_V.tolist(), strict=True))
    return {"copied": copied, "averaged": size - copied - empty, "mean": empty}


def _weights(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the weights that have a row for each token: of tied embeddings one, else input and output, and the head's
    bias."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    weights = {"inputs": inputs}
    if head is not None and head.weight is not inputs:
        weights["outputs"] = head.weight
    if getattr(head, "bias", None) is not None:
        weights["bias"] = head.bias
    return weights


def _check_weights(model: PreTrainedModel, *, rows: int, name: str) -> None:
    known = {id(weight) for weight in _weights(model).values()}
    others = [
        key for key, weight in model.named_parameters() if weight.shape[:1] == (rows,) and id(weight) not in known
    ]
    if others:
        raise ModelError(
            f"{name} ({type(model).__name__}) has weights for each token beside its embeddings ({others[0]}), which another "
            "tokenizer would not fit; take another model, or keep its tokenizer"
        )


def _made(weight: Tensor, ids: list[list[int]], *, known: int) -> Tensor:
    """Rows for the new tokens: means over `ids` of each, computed in float32; over all `known` ones where there are none."""
    import torch

    with torch.no_grad():
        source = weight.detach().float().reshape(weight.shape[0], -1)
        counts = np.array([len(indices) for indices in ids], dtype=np.int64)
        flat = torch.tensor([index for indices in ids for index in indices], dtype=torch.int64)
        owner = torch.from_numpy(np.repeat(np.arange(len(ids)), counts))
        sums = torch.zeros(len(ids), source.shape[1]).index_add_(0, owner, source[flat])
        means = sums / torch.from_numpy(counts).clamp_min(1)[:, None]
        means[torch.from_numpy(counts == 0)] = source[:known].mean(dim=0)
        return means.reshape(len(ids), *weight.shape[1:]).to(weight.dtype)


def _name_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = model.config.get_text_config()
    for name in SPECIAL_IDS:
        for config in (model.config, text, getattr(model, "generation_config", None)):
            if config is not None and (config is not model.config or config is text or hasattr(config, name)):
                setattr(config, name, getattr(tokenizer, name, None))

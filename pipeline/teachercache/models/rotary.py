"""Rotary embeddings whose factors depend on how long a sequence is: a sequence must be rotated by its own length.

transformers chooses the factors of LongRoPE (Phi-3 and kin) and of dynamic NTK scaling once a batch, by its largest position:
one long row changes all others, and one long document all others of a packed row, by 0.46 nats in a model as small as a test's.
Dynamic factors moreover stay those of the longest batch so far. Here every run of consecutive positions is rotated as it is
alone, whatever stands beside it.

The length of a row is read off its positions, so padded rows need positions of their own: `loading.input_layout` sees to it.

Shapes: B rows, S tokens, R a head's rotated width.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def rotate_by_own_length(model: PreTrainedModel) -> Any:
    """The model, each rotary module of which now does so where its factors depend on length. Once is enough, twice no harm."""
    for module, _ in _by_length(model):
        module.forward = MethodType(_rotate, module)
    return model


def original_context(model: PreTrainedModel) -> int | None:
    """Tokens up to which no factor depends on length; None where none does at all."""
    return min((_original(module, layer_type) for module, layer_type in _by_length(model)), default=None)


def most_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a sequence may have by a model's config; None where it does not say, or where factors grow with the
    sequence (dynamic scaling), so that no length is beyond them. LongRoPE has its factors for that many."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    grows = any(isinstance(kind, str) and "dynamic" in kind for kind in kinds)
    return None if grows else positions


def _by_length(model: PreTrainedModel) -> Iterator[tuple[Any, str | None]]:
    """Rotary modules with such factors, with the type of layer that each kind of factors is for."""
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None)
        of_types = rope_types if isinstance(rope_types, dict) else {None: rope_types}
        for layer_type, rope_type in of_types.items():
            if _depends_on_length(rope_type):
                yield module, layer_type


def _depends_on_length(rope_type: Any) -> bool:
    return isinstance(rope_type, str) and (rope_type == "longrope" or "dynamic" in rope_type)


def _original(module: Any, layer_type: str | None) -> int:
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    return int(
        parameters["original_max_position_embeddings"] if rope_type == "longrope" else module.original_max_seq_len
    )


def _rotate(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
    """In the place of a rotary module's `forward`: cos and sin [B, S, R]."""
    kind = {} if layer_type is None else {"layer_type": layer_type}
    rope_type = self.rope_type if layer_type is None else self.rope_type[layer_type]

    def plain(position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rotations: tuple[Tensor, Tensor] = type(self).forward(self, x, position_ids, **kind)
        return rotations

    if not _depends_on_length(rope_type) or position_ids.dim() != 2:
        return plain(position_ids)
    # transformers takes long factors from a variable that only the first long sequence sets.
    vars(self).pop(f"{layer_type}_long_inv_freq", None)

    def of(longest: int) -> tuple[Tensor, Tensor]:
        type(self).forward(self, x[:, :1], position_ids.new_zeros(1, 1), **kind)  # resets what a long sequence left
        return plain(position_ids.clamp(max=longest - 1))

    original = _original(self, layer_type)
    length_BS = _lengths(position_ids).clamp_min(original)
    if rope_type == "longrope":  # one set of factors for all long sequences
        length_BS = length_BS.where(length_BS == original, length_BS.max())
    first, *others = length_BS.unique().tolist()
    cos_BSR, sin_BSR = of(first)
    for length in others:
        chosen_BS1 = (length_BS == length)[..., None]
        cos_BSR, sin_BSR = (a.where(chosen_BS1, b) for a, b in zip(of(length), (cos_BSR, sin_BSR), strict=True))
    return cos_BSR, sin_BSR


def _lengths(position_ids_BS: Tensor) -> Tensor:
    """Returns the length of the sequence that each token belongs to, [B, S]: its largest position and one. Sequences
    begin where positions do not go on by one."""
    import torch

    begins_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = position_ids_BS.diff(dim=-1) != 1
    sequence_N = begins_BS.flatten().cumsum(0) - 1
    longest = position_ids_BS.new_zeros(position_ids_BS.numel())
    longest.scatter_reduce_(0, sequence_N, position_ids_BS.flatten() + 1, "amax")
    return longest[sequence_N].view_as(position_ids_BS)

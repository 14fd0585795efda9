"""Layer files, which the teacher makes before its layers are captured: from a sample of the corpus and from its
weights.

Means, spreads and principal directions come from a sample, without the first token of each segment and without tokens
that are far larger than the rest (massive activations, see targets/layers/hidden_states.py). How a block makes queries and keys
is read off the model and tried: rebuilt from hidden states they must be those that its attention kernel got.

Shapes: B rows, S tokens, N tokens of a sample, D width, H heads of queries, K of keys, E a head's width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.errors import ModelError
from teachercache.models.activations import Activations, Heads, blocks_of, check_attention, recorded
from teachercache.models.loading import row_places
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import BlockEntry, HeadShape
from teachercache.targets.layers.attention_factors import PARTS
from teachercache.targets.layers.kind import AttentionKind, RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGE = 5.0  # times the median norm: a token that is no longer one of the sample
SMALLEST_SPREAD = 1e-6  # of the mean spread: a channel that never varies
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
REMEDY = "store its attention with targets.attention.kind: queries-keys"
BRIEF = 8  # tokens of a short row
NORMS = ("input_layernorm", "ln_1", "attention_norm", "norm1", "operator_norm")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


def rows_of(activations: Activations, rows: Sequence[TokenRow], *, layout: str) -> list[RowActivations]:
    """Splits what was recorded of a batch into rows, without padding; `layout` is that of its inputs."""
    split = []
    shapes = {layer: shape_of(heads) for layer, heads in activations.attention.items()}
    sinks = {layer: heads.sinks_H for layer, heads in activations.attention.items() if heads.sinks_H is not None}
    for row, (index, tokens) in zip(rows, row_places(rows, layout=layout), strict=True):
        parts: dict[str, dict[int, Tensor]] = {"queries": {}, "keys": {}, "values": {}}
        for layer, heads in activations.attention.items():
            parts["queries"][layer] = heads.queries_BHSE[index, :, tokens]
            parts["keys"][layer] = heads.keys_BKSE[index, :, tokens]
            parts["values"][layer] = heads.values_BKSE[index, :, tokens]
        hidden = {layer: values_BSD[index, tokens] for layer, values_BSD in activations.hidden.items()}
        split.append(RowActivations(hidden, **parts, shapes=shapes, sinks=sinks, segment_S=row.segment_S()))
    return split


def shape_of(heads: Heads) -> HeadShape:
    """Returns the shape of a block's attention."""
    count, width = heads.queries_BHSE.shape[1], heads.queries_BHSE.shape[-1]
    scaling, softcap = float(heads.scaling), None if heads.softcap is None else float(heads.softcap)
    return HeadShape(count, heads.keys_BKSE.shape[1], width, scaling, heads.window, softcap)


class LayerSample:
    """Tokens of some rows, layer by layer: hidden states [N, D], and parts of attention [N, H·E] or [N, K·E]. On the CPU."""

    def __init__(self, targets: StoredTargets) -> None:
        self._most = max(getattr(kind, "calibration_positions", 0) for kind in targets.layers)
        self._values: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.tokens = 0
        kinds = [kind for kind in targets.layers if kind.arrays()]
        self.hidden_layers = sorted({layer for kind in kinds for layer in kind.hidden_layers})
        self._attention_layers = sorted({layer for kind in kinds for layer in kind.attention_layers})

    def add(self, rows: Sequence[RowActivations]) -> None:
        """The tokens of a batch's rows, but for first ones, until there are enough."""
        for held in rows:
            if self.tokens >= self._most:
                return
            inside_S = np.flatnonzero(np.diff(held.segment_S, prepend=-1) == 0)
            chosen = torch.from_numpy(inside_S[: self._most - self.tokens])
            self.tokens += len(chosen)
            for layer in self.hidden_layers:
                self._values["hidden", layer].append(held.hidden[layer].float().cpu()[chosen])
            for layer in self._attention_layers:
                for part, heads in zip(PARTS, (held.queries, held.keys, held.values), strict=True):
                    flat_SX = heads[layer].transpose(0, 1).flatten(1)
                    self._values[part, layer].append(flat_SX.float().cpu()[chosen])

    def of(self, what: str, layer: int) -> Tensor:
        """Finite tokens of ordinary size, [N, …]. Raises `ModelError` where there are none."""
        values_NX = torch.cat(self._values[what, layer]) if self._values[what, layer] else torch.empty(0, 1)
        values_NX = values_NX[values_NX.isfinite().all(-1)]
        norms_N = values_NX.norm(dim=-1)
        kept_NX = values_NX[norms_N <= LARGE * norms_N.median()] if len(norms_N) else values_NX
        if len(kept_NX) < 2:
            raise ModelError(
                f"no token is left to fit the steps of {what} {layer} to: every document is held out, quarantined, a single "
                "token, or gives no numbers; use a larger corpus"
            )
        return kept_NX


@torch.inference_mode()
def make_layer_files(
    of_attention: Callable[..., LayerFile], targets: StoredTargets, sample: LayerSample, *, longest: int
) -> dict[str, LayerFile]:
    """Everything that the kinds are read by: a file for each section. `longest` is the number of tokens in the longest row,
    `of_attention` makes the file of attention (`TeacherBackend.attention_file`).

    Raises `ModelError` for attention that cannot be rebuilt, or has other heads than the settings say, and for a sample that
    is too small.
    """
    files: dict[str, LayerFile] = {}
    if (hidden := targets.hidden) is not None:
        arrays: dict[str, NDArray[Any]] = {}
        for layer in hidden.layers:
            arrays |= hidden_arrays(
                sample.of("hidden", layer), layer, rotated=f"hidden.{layer}.rotation" in hidden.arrays()
            )
        files["hidden"] = LayerFile(arrays)
    if targets.attention is not None:
        files["attention"] = of_attention(targets.attention, sample, longest=longest)
    return files


def attention_file(model: PreTrainedModel, attention: AttentionKind, sample: LayerSample, *, longest: int) -> LayerFile:
    """The file of a kind of attention, from the blocks of a model of transformers. Raises `ModelError` for attention that
    cannot be rebuilt, or has other heads than the settings say."""
    arrays: dict[str, NDArray[Any]] = {}
    described: dict[int, Any] = {}
    tried = _tried(model, attention.layers, longest=longest)
    if attention.from_hidden:
        _check_rotary(tried, _recorded(model, attention.layers, length=min(longest, BRIEF)), model)
    for layer in attention.layers:
        _check_heads(attention, layer, tried.attention[layer])
        described[layer] = {"shape": shape_of(tried.attention[layer]).to_metadata()}
        if attention.from_hidden:
            with_values = f"attention.{layer}.value" in attention.arrays()
            entry, block_arrays = _entry(model, layer, tried, values=with_values)
            described[layer]["entry"] = asdict(entry)
        else:
            block_arrays = _spreads(attention, sample, layer)
        sinks_H = tried.attention[layer].sinks_H
        if sinks_H is not None and not attention.holds_sinks:
            raise ModelError(
                f"the attention of block {layer} of {type(model).__name__} leaves mass to sinks, which maps of keys do not "
                f"hold; {REMEDY}"
            )
        if sinks_H is not None:
            block_arrays["sinks"] = sinks_H
        arrays |= {f"attention.{layer}.{name}": _numpy(values) for name, values in block_arrays.items()}
    return LayerFile(arrays, described)


def _numpy(values: Tensor) -> NDArray[Any]:
    return values.detach().float().cpu().numpy()


def hidden_arrays(tokens_ND: Tensor, layer: int, *, rotated: bool) -> dict[str, NDArray[Any]]:
    """Returns the arrays that a layer's hidden states are read by: mean and spread of each channel, and with `rotated`
    the principal directions, of which the spreads are then."""
    tokens_ND = tokens_ND.double()
    mean_D = tokens_ND.mean(0)
    spread_D = tokens_ND.std(0, correction=0)
    arrays = {f"hidden.{layer}.mean": _numpy(mean_D)}
    if rotated:
        centred_ND = tokens_ND - mean_D
        values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
        spread_D, vectors_DD = values_D.flip(0).clamp_min(0).sqrt(), vectors_DD.flip(1)
        largest_D = vectors_DD.gather(0, vectors_DD.abs().argmax(0, keepdim=True))
        arrays[f"hidden.{layer}.rotation"] = _numpy(vectors_DD * largest_D.sign())  # a direction's sign is arbitrary
    arrays[f"hidden.{layer}.spread"] = _numpy(_not_zero(spread_D))
    return arrays


def _not_zero(spread_X: Tensor) -> Tensor:
    return spread_X.clamp_min(max(SMALLEST_SPREAD * float(spread_X.mean()), 1e-20))


def _spreads(attention: AttentionKind, sample: LayerSample, layer: int) -> dict[str, Tensor]:
    """Spreads of the channels of those parts that the kind is read by."""
    spreads = {}
    for part in (part for part in PARTS if f"attention.{layer}.{part}_spread" in attention.arrays()):
        tokens_NX = sample.of(part, layer)
        spreads[f"{part}_spread"] = _not_zero(tokens_NX.square().mean(0).sqrt())  # after rotation means are near zero
    return spreads


def _tried(model: PreTrainedModel, layers: Sequence[int], *, longest: int) -> Activations:
    """Activations of some tokens, as many as a row can have."""
    activations = _recorded(model, layers, length=longest)
    check_attention(activations, layers, model)
    return activations


def _recorded(model: PreTrainedModel, layers: Sequence[int], *, length: int) -> Activations:
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids_BS = torch.arange(length, device=model.device).mul(7919).remainder(vocabulary)[None]
    with recorded(model, hidden=[layer - 1 for layer in layers], attention=layers) as activations:
        model.base_model(input_ids=ids_BS, use_cache=False)
    return activations


def _check_heads(attention: AttentionKind, layer: int, heads: Heads) -> None:
    shape = shape_of(heads)
    counts = (shape.heads, shape.key_heads, shape.head_width)
    wanted = (attention.teacher_heads, attention.key_heads, attention.head_width)
    if counts != wanted:
        raise ModelError(
            f"block {layer} has {counts[0]} heads ({counts[1]} of keys) {counts[2]} wide, where the teacher's config.json says "
            f"{wanted[0]} ({wanted[1]}) and {wanted[2]}; leave this block out of targets.attention.layers"
        )


def _entry(
    model: PreTrainedModel, layer: int, tried: Activations, *, values: bool
) -> tuple[BlockEntry, dict[str, Tensor]]:
    """Describes how a block makes queries and keys, with its arrays. Raises `ModelError` where they are not those that
    it made."""
    block, name = blocks_of(model)[layer - 1], type(model).__name__
    attention = next((getattr(block, child) for child in ATTENTIONS if hasattr(block, child)), None)
    parts = PARTS if values else PARTS[:2]
    projections = {part: getattr(attention, f"{part[0]}_proj", None) for part in parts}
    if not all(isinstance(projection, torch.nn.Linear) for projection in projections.values()):
        raise ModelError(f"block {layer} of {name} has no query and key matrices of its own; {REMEDY}")
    arrays: dict[str, Tensor] = {}
    for part, projection in projections.items():
        assert projection is not None
        arrays[part] = projection.weight
        if projection.bias is not None:
            arrays[f"{part}_bias"] = projection.bias
    norm, epsilon = _add_norm(next((getattr(block, child) for child in NORMS if hasattr(block, child)), None), arrays)
    head_epsilon = 0.0
    for part in PARTS[:2]:
        head_norm = getattr(attention, f"{part[0]}_norm", None)
        if head_norm is not None:
            kind, head_epsilon = _add_norm(head_norm, arrays, name=f"{part}_norm")
            if kind != "rms":
                raise ModelError(f"block {layer} of {name} norms its heads in a way that cannot be rebuilt; {REMEDY}")
    entry = BlockEntry(norm, epsilon, head_epsilon)
    tables = [{}] if layer not in tried.rotary else _rotary_tables(*tried.rotary[layer])
    errors = [_error_rebuilt(tried, layer, entry, {**arrays, **table}) for table in tables]
    if not min(errors) <= TOLERANCE.get(model.dtype, 6e-2):
        raise ModelError(
            f"the queries and keys of block {layer} of {name} cannot be rebuilt from its hidden states (they differ by "
            f"{min(errors):.1%} of the largest); {REMEDY}"
        )
    return entry, {**arrays, **tables[errors.index(min(errors))]}


def _rotary_tables(cos_BSR: Tensor, sin_BSR: Tensor) -> list[dict[str, Tensor]]:
    """Returns the tables that a block was given, and the same for models that give them to both halves of a head alike
    (GPT-OSS)."""
    return [{"cos": cos_BSR[0].repeat(1, times), "sin": sin_BSR[0].repeat(1, times)} for times in (1, 2)]


def _check_rotary(tried: Activations, brief: Activations, model: PreTrainedModel) -> None:
    """Raise `ModelError` where a long row is rotated by other tables than a short one, as under some ways to scale rotary
    embeddings: there is one table a block."""
    for layer, tables in brief.rotary.items():
        for short_BSR, long_BSR in zip(tables, tried.rotary[layer], strict=True):
            if not torch.allclose(short_BSR.float(), long_BSR[:, : short_BSR.shape[1]].float(), atol=1e-4):
                raise ModelError(
                    f"block {layer} of {type(model).__name__} rotates queries and keys by a row's length, so that they cannot "
                    f"be rebuilt from hidden states; {REMEDY}"
                )


def _add_norm(module: Any, arrays: dict[str, Tensor], *, name: str = "norm") -> tuple[str, float]:
    """Names what a norm does, found by trying it, and adds its weights to `arrays`."""
    if module is None:
        return "none", 0.0
    epsilon = next((float(getattr(module, key)) for key in ("variance_epsilon", "eps") if hasattr(module, key)), 1e-6)
    weight_D, bias_D = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight_D is None:
        return "unknown", epsilon
    generator = torch.Generator().manual_seed(0)
    values_ND = torch.randn(4, len(weight_D), generator=generator).to(weight_D.device, weight_D.dtype) * 3 + 1
    wanted_ND = module(values_ND).float()
    for kind, offset in (("rms", 0.0), ("rms", 1.0), ("layer", 0.0)):
        scale_D = weight_D.float() + offset
        tried = {"norm": scale_D} if bias_D is None else {"norm": scale_D, "norm_bias": bias_D.float()}
        found_ND = BlockEntry(kind, epsilon)._normed(tried, values_ND.float())
        error = float((found_ND - wanted_ND).abs().max() / wanted_ND.abs().max().clamp_min(1e-9))
        if error <= TOLERANCE.get(weight_D.dtype, 6e-2):
            arrays[name] = scale_D
            if bias_D is not None:
                arrays[f"{name}_bias"] = bias_D
            return kind, epsilon
    return "unknown", epsilon


def _error_rebuilt(tried: Activations, layer: int, entry: BlockEntry, arrays: Mapping[str, Tensor]) -> float:
    """Returns the error of rebuilt queries, keys and values against those that the kernel got, as a part of the
    largest; infinite where nothing can be rebuilt."""
    heads = tried.attention[layer]
    wanted = (heads.queries_BHSE, heads.keys_BKSE, heads.values_BKSE)
    if entry.norm not in ("rms", "layer", "none"):
        return float("inf")
    position_BS = torch.arange(wanted[0].shape[2], device=wanted[0].device)[None]
    held = {name: values.float() for name, values in arrays.items()}
    try:
        rebuilt = entry.apply(torch, held, tried.hidden[layer - 1], position_BS, shape_of(heads))
    except (RuntimeError, ValueError, IndexError):
        return float("inf")
    return max(_difference(part, recorded) for part, recorded in zip(rebuilt, wanted, strict=True) if part is not None)


def _difference(rebuilt: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference, as a part of the largest wanted value."""
    if rebuilt.shape != wanted.shape:
        return float("inf")
    return float((rebuilt - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-9))

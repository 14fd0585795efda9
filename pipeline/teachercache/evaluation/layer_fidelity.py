"""Fidelity of stored layers: compares hidden states and attention maps with the teacher's, layer by layer.

    hidden_cosine           mean cosine of stored and exact states over tokens
    hidden_cosine_centred   the same, both less the layer's mean over the corpus
    attention_kl            KL(teacher ‖ rebuilt) of a query's keys, nats, mean over queries and heads; of maps that average
                            groups of heads, between averages

All are without the first token of each segment, whose massive activations any codec keeps and which sees nothing but
itself."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from teachercache.cache import StoredRow
from teachercache.models.activations import recorded
from teachercache.models.loading import model_inputs
from teachercache.stream.cache_rows import OwnTensors
from teachercache.stream.collate import collate
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import sees
from teachercache.targets.layers.attention_factors import StoredHeads
from teachercache.targets.layers.hidden_states import column_of
from teachercache.targets.layers.kind import RowActivations
from teachercache.teacher.layers import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerComparison:
    """Sums over rows; add each with what the teacher held at its tokens."""

    def __init__(self, targets: StoredTargets) -> None:
        self._targets = targets
        self._sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._tokens = 0

    @torch.inference_mode()
    def add(self, model: PreTrainedModel, stored: StoredRow, *, pad_id: int, layout: str) -> None:
        """A row of the cache; the teacher runs on it."""
        if not self._targets.layers:
            return
        row, targets = stored.row, self._targets
        inputs = model_inputs([row], pad_id=pad_id, layout=layout)
        blocks = () if targets.attention is None else targets.attention.layers
        hidden = () if targets.hidden is None else targets.hidden.layers
        with recorded(model, hidden=hidden, attention=blocks) as activations:
            model.base_model(
                **{name: torch.from_numpy(v).to(model.device) for name, v in inputs.items()}, use_cache=False
            )
        [exact] = rows_of(activations, [row], layout=layout)
        segment_S = row.segment_S()
        later_S = torch.from_numpy(np.flatnonzero(np.diff(segment_S, prepend=-1) == 0))
        self._tokens += len(later_S)
        decoded = targets.decoded(stored.targets)
        for layer in hidden:
            stored_SD = torch.from_numpy(decoded[column_of(layer)])
            self._hidden(layer, exact.hidden[layer].float().cpu()[later_S], stored_SD[later_S])
        for layer in blocks:
            divergence_S = attention_divergence(targets, layer, stored, exact)
            self._sums["attention_kl"][layer] += float(divergence_S[later_S].sum())

    def _hidden(self, layer: int, exact_SD: Tensor, found_SD: Tensor) -> None:
        assert self._targets.hidden is not None and self._targets.hidden.layer_file is not None
        mean_D = torch.from_numpy(self._targets.hidden.layer_file.arrays[f"hidden.{layer}.mean"])
        for name, less in (("hidden_cosine", torch.zeros(())), ("hidden_cosine_centred", mean_D)):
            cosine_S = cosine_similarity((exact_SD - less).double(), (found_SD - less).double(), dim=-1)
            self._sums[name][layer] += float(cosine_S.sum())

    def result(self) -> dict[str, dict[str, float]]:
        """Means by layer, `{"hidden_cosine": {"8": …}, …}`; empty where no layers are stored."""
        count = max(1, self._tokens)
        return {name: {str(layer): sums / count for layer, sums in by.items()} for name, by in self._sums.items()}


def attention_divergence(targets: StoredTargets, layer: int, stored: StoredRow, exact: RowActivations) -> Tensor:
    """KL(teacher ‖ rebuilt) of each query of a row in nats, mean over heads, [S]; between what the teacher held, and what
    training makes of the columns that are stored of it."""
    assert targets.attention is not None
    columns = targets.attention.columns_of(layer)
    batch = collate([stored], layout="documents", pad_id=0, tensors=OwnTensors(targets, columns))["layers"]
    stored_heads = targets.attention.stored_heads(
        torch, layer, batch, torch.from_numpy(stored.row.position_ids_S())[None]
    )
    shape, sinks_H = exact.shapes[layer], exact.sinks.get(layer)
    queries_BHSE, keys_BKSE = (part[layer].float().cpu()[None] for part in (exact.queries, exact.keys))
    exact_heads = StoredHeads(queries_BHSE, keys_BKSE, None, shape, None if sinks_H is None else sinks_H.cpu())
    sees_BSS = sees(torch, batch["segment"], window=shape.window)
    exact_HSS, stored_HSS = (
        heads.probabilities(slice(None), sees_BSS, sinks=True)[0] for heads in (exact_heads, stored_heads)
    )
    if stored_heads.heads < shape.heads:
        exact_HSS = exact_HSS.unflatten(0, (stored_heads.heads, -1)).mean(1)
    apart_HSS = (maps_HSS.clamp_min(torch.finfo(maps_HSS.dtype).tiny).log() for maps_HSS in (exact_HSS, stored_HSS))
    return torch.where(sees_BSS, exact_HSS * torch.sub(*apart_HSS), 0.0).sum(-1).mean(0)

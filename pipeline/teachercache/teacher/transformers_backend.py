"""The backend of transformers: the reference, which other backends are held against.

A probe at loading tells whether logits are what the output layer, with its scale and soft cap, makes of the body's output:
then the body alone runs. Models with more in between (an encoder's prediction head) run whole.

    B rows, S tokens, R = B · S, N positions, D hidden width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from teachercache.errors import ModelError
from teachercache.models.activations import check_recorded, recorded
from teachercache.models.loading import Layout, input_layout, load_causal_lm, model_inputs, target_places
from teachercache.models.probes import check_length, check_rows_alone, check_sight, isolates_packed_segments
from teachercache.models.rotary import rotate_by_own_length
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.tasks.contract import Task
from teachercache.teacher.backend import ForwardPass, OwnLogits, TeacherBackend
from teachercache.teacher.layers import LayerSample, attention_file, rows_of
from teachercache.teacher.output_layer import OutputLayer, layer_after_body, recorded_input
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from teachercache.config import TeacherConfig


class TransformersBackend(TeacherBackend):
    """A model of transformers, or one that is called as they are."""

    name: ClassVar[str] = "transformers"

    def __init__(self, model: Any, *, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self._layer: OutputLayer | None = None  # where logits are what it makes of the body's output

    @classmethod
    def load(cls, config: TeacherConfig, *, device: str) -> TransformersBackend:
        model = load_causal_lm(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            attention=config.attention,
        )
        return cls(model, device=device)

    def prepare(self, *, task: Task, layout: str, pad_id: int, vocabulary_size: int, longest: int) -> None:
        self._task, self._rows_layout, self._pad_id, self._vocabulary_size = task, layout, pad_id, vocabulary_size
        _check_vocabulary(self.model, vocabulary_size)
        check_length(self.model, name="the teacher", longest=longest)
        rotate_by_own_length(self.model)
        check_sight(self.model, task, name="the teacher", vocabulary_size=vocabulary_size)
        check_rows_alone(self.model, vocabulary_size=vocabulary_size, longest=longest)
        if layout == "packed" and not isolates_packed_segments(self.model, vocabulary_size=vocabulary_size):
            raise ModelError(
                f"{type(self.model).__name__} does not keep the segments of a packed row apart; set "
                "`sequence.layout: documents`"
            )
        self._layer = layer_after_body(self.model, vocabulary_size=vocabulary_size)

    def describe(self) -> dict[str, Any]:
        return {
            "architecture": type(self.model).__name__,
            "parameters": sum(weights.numel() for weights in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "libraries": {name: version(name) for name in ("torch", "transformers")},
        }

    def output_layer(self) -> OutputLayer:
        return self._layer or OutputLayer.of(self.model, vocabulary_size=self._vocabulary_size)

    def hidden(
        self, rows: Sequence[TokenRow], *, layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> ForwardPass:
        layout = input_layout(self.model, self._rows_layout, longest=max(row.length for row in rows))
        inputs, index_N = self._inputs(rows, layout)
        with recorded(self.model, hidden=layers, attention=attention) as activations:
            hidden_ND, logits = self._run(inputs, index_N)
        check_recorded(activations, attention, self.model)
        held = rows_of(activations, rows, layout=layout) if layers or attention else ()
        return ForwardPass(hidden_ND, logits, held)

    def attention_file(self, kind: Any, sample: LayerSample, *, longest: int) -> LayerFile:
        return attention_file(self.model, kind, sample, longest=longest)

    def _inputs(self, rows: Sequence[TokenRow], layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs, and indices of all positions in the flattened batch [N]."""
        arrays = model_inputs(rows, pad_id=self._pad_id, layout=layout, is_causal=self._task.is_causal)
        inputs = {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}
        places = target_places(rows, layout=layout, width=inputs["input_ids"].shape[1])
        return inputs, torch.from_numpy(places).to(self.device)

    def _run(self, inputs: dict[str, Tensor], index_N: Tensor) -> tuple[Tensor | None, OwnLogits | None]:
        if self._layer is not None:
            return self.model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[index_N], None
        with recorded_input(self.model) as entered:
            logits_RV = self.model(**inputs, use_cache=False).logits.flatten(0, 1)
        hidden_ND = entered[0].flatten(0, 1)[index_N] if entered else None
        return hidden_ND, OwnLogits(logits_RV, index_N)


def _check_vocabulary(model: Any, vocabulary_size: int) -> None:
    """Raise `ModelError` for a teacher without a prediction for some token of its tokenizer."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None and len(weight) < vocabulary_size:
        raise ModelError(
            f"{type(model).__name__} predicts {len(weight)} tokens, its tokenizer has {vocabulary_size}; take the tokenizer "
            "that it was trained with, without tokens that were added later (a padding token, most often)"
        )

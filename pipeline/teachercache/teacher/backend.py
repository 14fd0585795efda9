"""`TeacherBackend`: runs the rows of a batch through a teacher's model.

A backend gives what enters the model's output layer at the positions of some rows, and what their layers hold. Everything
behind that is the same for every backend, in forward.py: which rows share a pass, the projection to logits, and what is
stored of them.

    N positions of a batch, in the order of its rows; D hidden width, V vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from teachercache.errors import ModelError
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.teacher.output_layer import OutputLayer
from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from teachercache.config import TeacherConfig
    from teachercache.tasks.contract import Task
    from teachercache.teacher.layers import LayerSample


@dataclass(frozen=True, eq=False)
class OwnLogits:
    """Logits that a model made itself: `values_RV` [R, V] in any precision, and the rows `index_N` of the N positions."""

    values_RV: Tensor
    index_N: Tensor

    @property
    def width(self) -> int:
        """Length of a row of logits, with whatever the model has beyond the vocabulary."""
        return self.values_RV.shape[1]

    def block(self, part: slice) -> Tensor:
        """float32 [n, V] of some of the positions; the caller's to overwrite."""
        return self.values_RV[self.index_N[part]].float()


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """Results of one forward pass.

    `hidden_ND` is what enters the output layer, None of a model that does not show it. `logits` are the model's own, where
    they are more than its output layer makes of `hidden_ND`; with None they are projected by us. `activations` are those
    of each row, where layers were asked for.
    """

    hidden_ND: Tensor | None
    logits: OwnLogits | None = None
    activations: Sequence[RowActivations] = ()


class TeacherBackend(ABC):
    """A loaded model on one device."""

    name: ClassVar[str]  # in recipes, and in the manifest of what was loaded
    device: torch.device

    @classmethod
    @abstractmethod
    def load(cls, config: TeacherConfig, *, device: str) -> TeacherBackend:
        """Load the model that a recipe names. Raises `ModelError`."""

    @abstractmethod
    def prepare(self, *, task: Task, layout: str, pad_id: int, vocabulary_size: int, longest: int) -> None:
        """Get ready for rows of a cache: once, before the first of them. `layout` is `documents` or `packed`, `longest` the
        number of tokens in the longest row, as far as it is known (else 0).

        Raises `ModelError` for a model that cannot run such rows, or that would let tokens see what they should not.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describes the loaded model for the manifest: `architecture`, `parameters` and `dtype`, which decide the numbers,
        and what it runs with, which is noted: `attention`, `libraries`."""

    @abstractmethod
    def output_layer(self) -> OutputLayer:
        """The output layer as math. Raises `ModelError` for a model whose logits are not what such a layer makes."""

    @abstractmethod
    def hidden(
        self, rows: Sequence[TokenRow], *, layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> ForwardPass:
        """Run some rows; `layers` and `attention` are the hidden states and the blocks whose activations are wanted.

        Called in inference mode. What runs out of memory is raised as it is: the caller tries again with fewer rows.
        """

    def attention_file(self, kind: Any, sample: LayerSample, *, longest: int) -> LayerFile:
        """The layer file of a kind of attention (targets/layers/), for rows of up to `longest` tokens. Raises `ModelError`
        for attention that cannot be stored so."""
        raise ModelError(
            f"the backend {self.name} shows no attention, so none can be stored; leave out targets.attention, or set "
            "teacher.backend: transformers"
        )

"""Target kind `full`: every log-probability, for small vocabularies (characters, classes).

Per position: `log_probs` [V], in the order of ids (nats, T = 1), and `actual_log_prob`, that of the token that really
follows. Exact at any T > 0; costs V · 2 bytes with float16 before compression, so vocabularies end at LARGEST.

float16 keeps 11 bits: a log-probability of -d is off by at most d / 2048. `float32` stores the teacher's values as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.errors import CacheError, RecipeError
from teachercache.targets.coding.columns import LOG_SHARE, Column
from teachercache.targets.coding.float16 import float32_of
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.kind import NOTHING, KindSettings
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policies import TAIL_POLICIES
from teachercache.targets.logits.tails.policy import TailContext
from teachercache.targets.logits.temperature import check_positive

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 4096  # tokens: 8 KiB a position

Array = NDArray[Any]


class FullConfig(KindSettings):
    """Every log-probability, for vocabularies of at most 4096 tokens or classes."""

    kind: Literal["full"] = Field("full", description="every log-probability")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored log-probabilities")


@dataclass(frozen=True)
class Full:
    """Settings of the kind. Every token is in the head, so that its tail policies all mean the same."""

    kind = "full"
    needs_calibration = False
    config = FullConfig
    tail_policies: ClassVar[tuple[str, ...]] = ("ghost", "uniform")

    dtype: str
    vocabulary_size: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> Full:
        """Rebuild from a recipe's or manifest's settings; raises `RecipeError` for a vocabulary above LARGEST."""
        if vocabulary_size > LARGEST:
            raise RecipeError(
                f"targets.logits.kind: full would store {vocabulary_size:,} numbers a position, the teacher's whole "
                f"vocabulary, and is for at most {LARGEST:,}; use kind: head+sketch, or hidden for every logit"
            )
        return cls(settings["dtype"], vocabulary_size)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "dtype": self.dtype}

    def describe(self) -> str:
        """One line for people."""
        return f"all {self.vocabulary_size:,} log-probabilities as {self.dtype}: any T"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        real = {"float16": "<f2", "float32": "<f4"}[self.dtype]
        return (
            Column("log_probs", real, (self.vocabulary_size,), within=LOG_SHARE),
            Column("actual_log_prob", real, within=LOG_SHARE),
        )

    def check_temperature(self, temperature: float) -> None:
        """Raise `CacheError` for T <= 0."""
        check_positive(temperature)

    def capture(
        self,
        torch: ModuleType,
        logits_NV: Tensor,
        labels_N: Tensor,
        hidden_ND: Tensor | None = None,
        seeds_N: NDArray[np.uint64] | None = None,
        *,
        beside: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Array]:
        """Columns of N positions from float32 logits [N, V >= vocabulary]."""
        log_probs_NV = torch.log_softmax(logits_NV[:, : self.vocabulary_size], dim=-1)
        taken = (log_probs_NV, log_probs_NV.gather(1, labels_N[:, None])[:, 0])
        named = {column.name: values for column, values in zip(self.columns, taken, strict=True)}
        captured = to_host(torch, {**named, **beside})
        return {**captured, **{column.name: captured[column.name].astype(column.dtype) for column in self.columns}}

    @staticmethod
    def is_usable(captured: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N]; -inf is legal: a token that is ruled out."""
        usable_N: NDArray[np.bool_] = ~np.isnan(captured["log_probs"].max(-1))
        return usable_N

    def finish(self, captured: Mapping[str, Array]) -> dict[str, Array]:
        """One row's captured arrays to its columns: the same here."""
        return dict(captured)

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` reads; raises `CacheError` for a tail policy without meaning here."""
        if tail not in self.tail_policies:
            raise CacheError(
                f"objective.tail is {tail}, but targets of kind {self.kind} hold every token and have no tail; use auto"
            )
        return ("log_probs",)

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Columns of fixed shapes cannot contradict each other."""

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Columns as arrays ready for a batch, float32."""
        return {name: float32_of(values) for name, values in stored.items()}

    def softened(
        self, arrays: Mapping[str, Any], temperature: float, *, tail: str = "ghost", xp: ModuleType = np
    ) -> Softened:
        """The distribution at any T > 0, from what `decoded` gives (numpy's or torch's): a head of all V tokens."""
        self.objective_columns(tail)
        scaled_NV = arrays["log_probs"] / temperature
        nothing_N = xp.full_like(scaled_NV[:, 0], -np.inf)
        place = {} if xp is np else {"device": scaled_NV.device}
        ids_NV = xp.broadcast_to(xp.arange(self.vocabulary_size, **place), scaled_NV.shape)
        softened = Softened(ids_NV, scaled_NV, nothing_N).renormalised()  # p^(1/T), scaled to mass one
        return TAIL_POLICIES[tail].apply(softened, TailContext(self.vocabulary_size, temperature))

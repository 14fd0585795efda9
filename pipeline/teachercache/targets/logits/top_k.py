"""Target kind `top-k`: the k largest logits, and the exact tail log-partition on a temperature grid.

Per position: `head_ids` [k], `head_logits` [k] relative to the largest (the first is 0), `tail_log_partition` [G] and
`actual_log_prob`, the log-probability (nats, T = 1) of the token that really follows. Costs k · 4 + 2 · G + 2 bytes with
a vocabulary below 65,537 and float16 values, before compression.

float16 keeps 11 bits: a logit that lies d below the largest is off by at most d / 2048 (0.005 at d = 10). `float32`
stores the teacher's values as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from teachercache.errors import CacheError, RecipeError
from teachercache.targets.coding.columns import LOG_SHARE, Column
from teachercache.targets.coding.float16 import float32_of
from teachercache.targets.coding.grouped_topk import largest
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.head_checks import check_distinct, check_falling
from teachercache.targets.logits.kind import NOTHING, KindSettings
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policies import TAIL_POLICIES
from teachercache.targets.logits.tails.policy import HEAD, MASS, TailContext, offered
from teachercache.targets.logits.temperature import grid_index, softened

if TYPE_CHECKING:
    from torch import Tensor


class GridConfig(KindSettings):
    """Base of kinds that hold the tail log-partition on a temperature grid."""

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 2.0, 4.0, 8.0), description="where the mass outside the head is stored; students train at these"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored logits and masses")

    @model_validator(mode="after")
    def _ordered_grid(self) -> GridConfig:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError("temperatures must rise, each once, and hold at least one: [1, 2, 4, 8]")
        if 1.0 not in self.temperatures:
            raise ValueError("temperatures must hold 1: the log-probability of the actual token is taken there")
        return self


class TopKConfig(GridConfig):
    """Top-k logits with the exact tail log-partition on a temperature grid."""

    kind: Literal["top-k"] = Field("top-k", description="the k largest logits")
    k: int = Field(64, ge=1, description="largest logits kept exactly")


@dataclass(frozen=True)
class TopK:
    """Settings of the kind; `columns` and `capture` follow from them."""

    kind = "top-k"
    needs_calibration = False
    config: ClassVar[type[GridConfig]] = TopKConfig
    preferred_tails: ClassVar[tuple[str, ...]] = ("ghost", "uniform", "renormalise")  # the first is the default

    k: int
    temperatures: tuple[float, ...]
    dtype: str
    vocabulary_size: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> TopK:
        """Rebuild from a recipe's or manifest's settings; raises `RecipeError` when k exceeds the vocabulary."""
        return cls(**top_k_fields(settings, vocabulary_size))

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "k": self.k, "temperatures": list(self.temperatures), "dtype": self.dtype}

    def describe(self) -> str:
        """One line for people."""
        grid = ", ".join(f"{value:g}" for value in self.temperatures)
        return f"top-{self.k} logits, the tail's mass at T = {grid}"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        real = {"float16": "<f2", "float32": "<f4"}[self.dtype]
        ids = "<u2" if self.vocabulary_size <= 2**16 else "<u4"
        tail = (-math.inf, math.log(self.vocabulary_size) + 0.1)
        return (
            Column("head_ids", ids, (self.k,), within=(0, self.vocabulary_size - 1)),
            Column("head_logits", real, (self.k,), within=LOG_SHARE),
            Column("tail_log_partition", real, (len(self.temperatures),), within=tail),
            Column("actual_log_prob", real, within=LOG_SHARE),
        )

    @property
    def tail_policies(self) -> tuple[str, ...]:
        """Names of what `softened` accepts."""
        return offered(self.preferred_tails, TAIL_POLICIES.values(), known=frozenset((HEAD, MASS)))

    def check_temperature(self, temperature: float) -> None:
        """Raise `CacheError` when the cache does not hold this temperature."""
        grid_index(self.temperatures, temperature)

    def capture(
        self,
        torch: ModuleType,
        logits_NV: Tensor,
        labels_N: Tensor,
        hidden_ND: Tensor | None = None,
        seeds_N: NDArray[np.uint64] | None = None,
        *,
        beside: Mapping[str, Any] = NOTHING,
    ) -> dict[str, NDArray[Any]]:
        """Columns of N positions from float32 logits [N, V >= vocabulary], which are overwritten.

        Call it with blocks that fit a core's cache: tests/bench/capture_cost.py measures what a position costs by their
        size. A block with a NaN or +inf logit gives columns that `is_usable` refuses: callers quarantine such rows.
        """
        logits_NV = logits_NV[:, : self.vocabulary_size]
        head_Nk, ids_Nk = largest(torch, logits_NV, self.k)
        largest_N1 = head_Nk[:, :1].clone()
        actual_N = logits_NV.gather(1, labels_N[:, None]) - largest_N1
        logits_NV.sub_(largest_N1)
        tail_NG = tail_log_partition(torch, logits_NV, ids_Nk, self.temperatures)
        head_Nk = head_Nk - largest_N1
        log_z_N = torch.logaddexp(head_Nk.exp().sum(-1).log(), tail_NG[:, self.temperatures.index(1.0)])
        taken = (ids_Nk, head_Nk, tail_NG, actual_N[:, 0] - log_z_N)
        named = {column.name: values for column, values in zip(self.columns, taken, strict=True)}
        captured = to_host(torch, {**named, **beside})
        return {**captured, **{column.name: captured[column.name].astype(column.dtype) for column in self.columns}}

    @staticmethod
    def is_usable(captured: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N].

        NaN or +inf among the logits makes the first head logit NaN. -inf elsewhere is legal: a token that the teacher
        rules out, or an empty tail.
        """
        usable_N: NDArray[np.bool_] = np.isfinite(captured["head_logits"][:, 0]) & ~np.isnan(
            captured["actual_log_prob"]
        )
        return usable_N

    def finish(self, captured: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One row's captured arrays to its columns: the same here."""
        return dict(captured)

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` reads; raises `CacheError` for a tail policy that they do not allow."""
        if tail not in self.tail_policies:
            raise CacheError(
                f"objective.tail is {tail}, but targets of kind {self.kind} hold no sketch of the tail; "
                f"use {', '.join(self.tail_policies)} or auto, or precompute with targets.logits.kind: head+sketch"
            )
        return "head_ids", "head_logits", "tail_log_partition"

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` for a head that names a token twice, or rises."""
        if "head_ids" in stored:
            check_distinct(stored["head_ids"], name="head_ids")
        if "head_logits" in stored:
            check_falling(stored["head_logits"], name="head_logits")

    def decoded(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns as arrays ready for a batch: ids int32, other numbers float32."""
        return {
            name: values.astype(np.int32) if name == "head_ids" else float32_of(values)
            for name, values in stored.items()
        }

    def softened(
        self, arrays: Mapping[str, Any], temperature: float, *, tail: str = "ghost", xp: ModuleType = np
    ) -> Softened:
        """The distribution at a temperature of the grid, from what `decoded` gives (numpy's or torch's).

        Raises `CacheError`, naming the grid, for any other temperature.
        """
        self.objective_columns(tail)
        head_Nk, tail_N = softened(
            arrays["head_logits"], arrays["tail_log_partition"], self.temperatures, temperature, xp
        )
        distribution = Softened(arrays["head_ids"], head_Nk, tail_N)
        return TAIL_POLICIES[tail].apply(distribution, TailContext(self.vocabulary_size, temperature))


def top_k_fields(settings: Mapping[str, Any], vocabulary_size: int) -> dict[str, Any]:
    """Fields of `TopK` from settings; raises `RecipeError` when k exceeds the vocabulary."""
    if settings["k"] > vocabulary_size:
        raise RecipeError(
            f"targets.logits.k is {settings['k']}, but the teacher's tokenizer has {vocabulary_size} tokens; "
            f"use k <= {vocabulary_size}"
        )
    fields = {"k": settings["k"], "temperatures": tuple(settings["temperatures"]), "dtype": settings["dtype"]}
    return {**fields, "vocabulary_size": vocabulary_size}


def tail_log_partition(
    torch: ModuleType, relative_NV: Tensor, head_ids_Nk: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """log Σ exp(z / T) over tokens outside the head, for each T: [N, G]. Expects logits relative to the largest.

    From the highest temperature down: where one is half of the one before, exp(z / T) is the square of what is at hand.
    """
    sums_N = []
    powers_NV, at = None, 0.0
    for temperature in reversed(temperatures):
        if powers_NV is not None and temperature * 2 == at:
            powers_NV.mul_(powers_NV)
        else:
            powers_NV = torch.div(relative_NV, temperature).exp_()
            powers_NV.scatter_(1, head_ids_Nk, 0.0)
        at = temperature
        sums_N.append(powers_NV.sum(-1))
    sums_NG: Tensor = torch.stack(sums_N[::-1], dim=-1)
    return sums_NG.log()

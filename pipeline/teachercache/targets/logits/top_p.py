"""Target kind `top-p`: the smallest head that holds a share p of the mass, and the exact tail log-partition outside it.

Per position, ragged (columns.py):

    head_sizes           n, the fewest largest tokens with mass p or more at T = 1: at least 1, at most k
    head_ids             [n] their tokens, largest logit first
    head_logits          [n] relative to the largest (the first is 0)
    tail_log_partition   [G] log Σ exp(z / T) outside this position's own head, for each T of the grid
    actual_log_prob      log-probability (nats, T = 1) of the token that really follows

A position that the teacher is sure of costs a few bytes, an open one at most what `top-k` costs. Everything else is
`top-k`'s: exact at every T of the grid, and a tail of known mass and unknown shape.

Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (nucleus sampling), for what p means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.grouped_topk import largest
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.coding.ragged import check_sizes, places, spread, spread_ids
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.head_checks import check_ragged
from teachercache.targets.logits.kind import NOTHING
from teachercache.targets.logits.top_k import GridConfig, TopK, tail_log_partition, top_k_fields

if TYPE_CHECKING:
    from torch import Tensor


class TopPConfig(GridConfig):
    """As many of the largest logits as hold a share p of the mass, and the exact tail log-partition outside them."""

    kind: Literal["top-p"] = Field("top-p", description="as many of the largest logits as hold a share p")
    p: float = Field(0.95, gt=0, le=1, description="mass of a head at T = 1")
    k: int = Field(64, ge=1, description="most tokens of a head, whatever its mass")


@dataclass(frozen=True)
class TopP(TopK):
    """Settings of the kind; `k` bounds a head, and is what a batch is padded to."""

    kind = "top-p"
    config: ClassVar[type[GridConfig]] = TopPConfig

    p: float

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> TopP:
        """Rebuild from a recipe's or manifest's settings; raises `RecipeError` when k exceeds the vocabulary."""
        return cls(**top_k_fields(settings, vocabulary_size), p=settings["p"])

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {**super().settings(), "p": self.p}

    def describe(self) -> str:
        """One line for people."""
        grid = ", ".join(f"{value:g}" for value in self.temperatures)
        return f"largest logits up to mass {self.p:g}, at most {self.k}; the tail's mass at T = {grid}"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        ids, logits, *others = super().columns
        return (
            Column("head_sizes", "<u2" if self.k < 2**16 else "<u4", (), PCO, groups=(1,), within=(1, self.k)),
            Column("head_ids", ids.dtype, (), PCO, groups=(1,), ragged=True, within=ids.within, most=self.k),
            Column("head_logits", logits.dtype, ragged=True, within=logits.within, most=self.k),
            *others,
        )

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
        """As `TopK.capture`, with each position's head cut where its mass reaches p."""
        logits_NV = logits_NV[:, : self.vocabulary_size]
        head_Nk, ids_Nk = largest(torch, logits_NV, self.k)
        log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
        actual_N = (logits_NV.gather(1, labels_N[:, None]) - log_z_N1)[:, 0]
        mass_Nk = (head_Nk - log_z_N1).double().exp()
        reached_before_Nk = mass_Nk.cumsum(-1) - mass_Nk >= self.p
        held_Nk = (mass_Nk > 0) & ~reached_before_Nk
        held_Nk[:, 0] = True
        logits_NV.sub_(head_Nk[:, :1])
        # Places beyond the head name its first token, which is outside the tail anyway.
        ids_Nk = torch.where(held_Nk, ids_Nk, ids_Nk[:, :1])
        taken = {
            "head_sizes": held_Nk.sum(-1),
            "head_ids": ids_Nk,
            "head_logits": head_Nk - head_Nk[:, :1],
            "tail_log_partition": tail_log_partition(torch, logits_NV, ids_Nk, self.temperatures),
            "actual_log_prob": actual_N,
        }
        captured = to_host(torch, {**taken, **beside})
        return {**captured, **{column.name: captured[column.name].astype(column.dtype) for column in self.columns}}

    def finish(self, captured: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One row's captured arrays to its columns: heads without what lies beyond them."""
        held_Nk = places(captured["head_sizes"], self.k)
        flat = {name: captured[name][held_Nk] for name in ("head_ids", "head_logits")}
        return {**captured, **flat}

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` reads; raises `CacheError` for a tail policy that they do not allow."""
        return "head_sizes", *super().objective_columns(tail)

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` unless heads are as many tokens as their sizes add up to, each once, and do not rise."""
        check_sizes(stored, "head_sizes", ("head_ids", "head_logits"))
        if "head_sizes" in stored:
            check_ragged(stored["head_sizes"], ids_E=stored.get("head_ids"), logits_E=stored.get("head_logits"))

    def decoded(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns as arrays ready for a batch: those of `TopK`, heads padded to k."""
        flat = {name: values for name, values in stored.items() if not name.startswith("head_")}
        arrays = super().decoded(flat)
        if "head_sizes" in stored:
            held_Nk = places(stored["head_sizes"], self.k)
            arrays["head_ids"] = spread_ids(stored["head_ids"], held_Nk)
            arrays["head_logits"] = spread(stored["head_logits"], held_Nk, fill=-np.inf, dtype=np.float32)
        return arrays

"""Target kind `random-sampling`: tokens drawn from the teacher, and how often each came up.

N draws with replacement from the teacher at one temperature τ (`draw_temperature`, 1 by default). Per position, ragged
(columns.py):

    sample_sizes         how many different tokens were drawn
    sample_gaps          their ids, rising: the first, and how far each lies above the one before
    sample_counts        how often each was drawn; they sum up to `draws`
    actual_log_prob      log-probability (nats, T = 1) of the token that really follows

count / N is an unbiased estimate of the teacher's probabilities at T = τ, of every token: top-k's is not. So is the gradient
of forward KL at that temperature, in which probabilities enter linearly; the *value* of the divergence is not (its entropy
term is taken of the estimate), and no other divergence. At another T the estimate is raised to τ / T and scaled to mass
one, which is biased, the more the further T lies from τ: tokens never drawn stay at zero. To train at T = 2, draw at 2.

The estimate has mass one on the drawn tokens, so the only tail policy is `renormalise`, of an empty tail.

Draws follow from the row and the place in it alone (coding/counter_rng.py). Rounding of logits, which batches change, moves a
draw only where it falls within a rounding error of the border between two tokens.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, with draws from the
softened teacher itself in place of their importance weights.

Shapes: N positions, V vocabulary, d draws, E different tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets.coding.columns import LOG_SHARE, Column
from teachercache.targets.coding.counter_rng import uniforms
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.coding.ragged import check_sizes, places, spread
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.kind import NOTHING, KindSettings
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.temperature import check_positive

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


class RandomSamplingConfig(KindSettings):
    """Tokens drawn from the teacher with replacement, and how often each came up."""

    kind: Literal["random-sampling"] = Field("random-sampling", description="tokens drawn from the teacher")
    draws: int = Field(
        50, ge=1, le=2**16 - 1, description="draws at each position; about 12 to 16 different tokens of 50"
    )
    draw_temperature: float = Field(1.0, gt=0, description="where the sample is unbiased: train at this temperature")


@dataclass(frozen=True)
class RandomSampling:
    """Settings of the kind."""

    kind = "random-sampling"
    needs_calibration = False
    config = RandomSamplingConfig
    tail_policies: ClassVar[tuple[str, ...]] = ("renormalise",)

    draws: int
    draw_temperature: float
    vocabulary_size: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> RandomSampling:
        """Rebuild from a recipe's or manifest's settings."""
        return cls(settings["draws"], settings["draw_temperature"], vocabulary_size)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "draws": self.draws, "draw_temperature": self.draw_temperature}

    def describe(self) -> str:
        """One line for people."""
        return f"{self.draws} random draws at T = {self.draw_temperature:g}: unbiased there, biased at any other T"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        ids = "<u2" if self.vocabulary_size <= 2**16 else "<u4"
        return (
            Column("sample_sizes", "<u2", (), PCO, groups=(1,), within=(1, self.most)),
            Column("sample_gaps", ids, (), PCO, groups=(1,), ragged=True, most=self.most),
            Column("sample_counts", "<u2", (), PCO, groups=(1,), ragged=True, within=(1, self.draws), most=self.most),
            Column("actual_log_prob", "<f2", within=LOG_SHARE),
        )

    @property
    def most(self) -> int:
        """Most different tokens that can be drawn at one position."""
        return min(self.draws, self.vocabulary_size)

    def check_temperature(self, temperature: float) -> None:
        """Raise `CacheError` for T <= 0; `draw_temperature` alone is free of bias."""
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
        """Draws of N positions by inverting the distribution function, in float64: rising ids, [N, draws]."""
        assert seeds_N is not None
        logits_NV = logits_NV[:, : self.vocabulary_size]
        actual_N = (logits_NV.gather(1, labels_N[:, None]) - logits_NV.logsumexp(-1, keepdim=True))[:, 0]
        logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).div_(self.draw_temperature).exp_()
        sums_NV = logits_NV.cumsum(-1, dtype=torch.float64)
        # Rising numbers give rising ids. `right`: a token of probability 0 ends where it begins, and is passed over.
        at_Nd = torch.from_numpy(np.sort(uniforms(seeds_N, self.draws), axis=1)).to(logits_NV.device)
        drawn_Nd = torch.searchsorted(sums_NV, at_Nd * sums_NV[:, -1:], right=True)
        actual_N = torch.where(sums_NV[:, -1].isfinite(), actual_N, torch.nan)
        drawn_Nd.clamp_(max=self.vocabulary_size - 1)
        captured = to_host(torch, {"drawn": drawn_Nd, "actual_log_prob": actual_N, **beside})
        return {**captured, "actual_log_prob": captured["actual_log_prob"].astype(np.float16)}

    @staticmethod
    def is_usable(captured: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N]: NaN or +inf among the logits shows as
        NaN."""
        return ~np.isnan(captured["actual_log_prob"])

    def finish(self, captured: Mapping[str, Array]) -> dict[str, Array]:
        """One row's draws to different tokens and their counts: runs of equal ids."""
        drawn_Nd = captured["drawn"]
        first_Nd = np.ones(drawn_Nd.shape, dtype=np.bool_)
        first_Nd[:, 1:] = drawn_Nd[:, 1:] != drawn_Nd[:, :-1]
        starts_E = np.flatnonzero(first_Nd)  # a run never goes on into the next position
        gaps_Nd = np.diff(drawn_Nd, axis=1, prepend=0)
        return {
            "sample_sizes": first_Nd.sum(-1).astype(np.uint16),
            "sample_gaps": gaps_Nd[first_Nd].astype(self.columns[1].dtype),
            "sample_counts": np.diff(starts_E, append=drawn_Nd.size).astype(np.uint16),
            "actual_log_prob": captured["actual_log_prob"],
        }

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` reads; raises `CacheError` for any tail policy but `renormalise`."""
        if tail not in self.tail_policies:
            raise CacheError(
                f"objective.tail is {tail}, but a random sample has no tail: its mass is all on the drawn tokens; use "
                "renormalise or auto, or precompute with targets.logits.kind: head+sketch"
            )
        return "sample_sizes", "sample_gaps", "sample_counts"

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Raise `CacheDamaged` unless ids rise within the vocabulary and counts add up to the draws."""
        check_sizes(stored, "sample_sizes", ("sample_gaps", "sample_counts"))
        if not stored.keys() >= {"sample_sizes", "sample_gaps", "sample_counts"} or not len(stored["sample_sizes"]):
            return
        ends_N = np.cumsum(stored["sample_sizes"], dtype=np.int64)
        starts_N = ends_N - stored["sample_sizes"]
        gaps_E = stored["sample_gaps"]
        last_N = np.add.reduceat(gaps_E, starts_N, dtype=np.int64)
        repeated = np.count_nonzero(gaps_E) - np.count_nonzero(gaps_E[starts_N]) < len(gaps_E) - len(starts_N)
        if repeated or last_N.max() >= self.vocabulary_size:
            raise CacheDamaged(f"column sample_gaps: ids do not rise within {self.vocabulary_size} tokens")
        drawn_N = np.add.reduceat(stored["sample_counts"], starts_N, dtype=np.int64)
        if drawn_N.min() != self.draws or drawn_N.max() != self.draws:
            raise CacheDamaged(
                f"column sample_counts: positions of {drawn_N.min()} to {drawn_N.max()} draws, not {self.draws}"
            )

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Columns as arrays ready for a batch: `sample_ids` int32 and `sample_counts` float32, [N, most], padded."""
        arrays: dict[str, Array] = {}
        if "sample_sizes" in stored:
            held_Nk = places(stored["sample_sizes"], self.most)
            ids_Nk = spread(stored["sample_gaps"], held_Nk, fill=0, dtype=np.int32).cumsum(1, dtype=np.int32)
            arrays["sample_ids"] = np.where(held_Nk, ids_Nk, ids_Nk[:, :1])  # padding: softened.py
            arrays["sample_counts"] = spread(stored["sample_counts"], held_Nk, fill=0, dtype=np.float32)
        if "actual_log_prob" in stored:
            arrays["actual_log_prob"] = stored["actual_log_prob"].astype(np.float32)
        return arrays

    def softened(
        self, arrays: Mapping[str, Any], temperature: float, *, tail: str = "renormalise", xp: ModuleType = np
    ) -> Softened:
        """The estimate at any T > 0, from what `decoded` gives (numpy's or torch's): unbiased at `draw_temperature` alone."""
        self.objective_columns(tail)
        with np.errstate(divide="ignore"):
            log_share_Nk = xp.log(arrays["sample_counts"] / self.draws)
        nothing_N = xp.full_like(log_share_Nk[:, 0], -np.inf)
        estimate = Softened(arrays["sample_ids"], log_share_Nk * (self.draw_temperature / temperature), nothing_N)
        return estimate if temperature == self.draw_temperature else estimate.renormalised()

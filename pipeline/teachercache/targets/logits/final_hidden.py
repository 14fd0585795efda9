"""Target kind `hidden`: the final hidden state itself, and the teacher's output matrix once a cache.

Per position, entropy-coded:

    hidden_codes      [D]  what entered the output layer, less its mean, in steps of its channel
    actual_log_prob        log-probability (nats, T = 1) of the token that really follows

Calibration gives each channel its mean and a unit, the power of two next to its spread; `step` is in such units. The output
matrix, its columns multiplied by these units, is the basis of the cache (basis.py), so that

    logits = cap(basis · (codes · step) + base)

which is the teacher, at any T > 0, up to rounding by half a step in each channel. Codes are int32 and never clipped: an
outlier costs bits, not itself. At the default step of 1/32 they fill about 7 bits each: 0.9 · D bytes a position (500 at
D = 576), beside 2 · V · D bytes of basis. `head+sketch` is this with the directions that matter alone.

Shapes: N positions, V vocabulary, D width of the output layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.targets.coding.columns import LOG_SHARE, Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.coding.transfer import to_host
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.kind import NOTHING, KindSettings, hidden_size
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.temperature import check_positive

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


class HiddenConfig(KindSettings):
    """The final hidden state, quantised, and the teacher's output matrix once a cache."""

    kind: Literal["hidden"] = Field("hidden", description="the final hidden state")
    width: int | None = Field(None, ge=1, description="inputs of the teacher's output layer; default: its hidden_size")
    step: float = Field(
        1 / 32, gt=0, le=1000, description="quantisation step in units of a channel's spread; smaller = larger"
    )
    calibration_positions: int = Field(
        4096, ge=64, description="positions that give means and spreads, drawn from the whole corpus by content hash"
    )

    def for_teacher(self, config: Any) -> dict[str, Any]:
        """As `KindSettings.for_teacher`: the width, unless it is given."""
        settings = super().for_teacher(config)
        if self.width is None:
            settings["width"] = hidden_size(config)
        if settings["width"] is None:
            raise RecipeError("the teacher's config.json has no hidden_size; set targets.logits.width")
        return settings


@dataclass(frozen=True, eq=False)
class FinalHidden:
    """Settings of the kind, and the basis once there is one."""

    kind = "hidden"
    needs_calibration = True
    config = HiddenConfig
    tail_policies: ClassVar[tuple[str, ...]] = ("sketch",)

    width: int
    step: float
    vocabulary_size: int
    calibration_positions: int
    basis: SketchBasis | None = None

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], *, vocabulary_size: int, basis: SketchBasis | None = None
    ) -> FinalHidden:
        """Rebuild from a recipe's or manifest's settings; raises `CacheDamaged` for a basis of other settings."""
        if basis is not None and (basis.vocabulary_size, *basis.analysis_Dr.shape) != (
            vocabulary_size,
            settings["width"],
        ):
            raise CacheDamaged(
                f"the output matrix has {basis.rank} channels for {basis.vocabulary_size} tokens, the manifest says "
                f"{settings['width']} for {vocabulary_size}; fetch the cache again"
            )
        names = ("width", "step", "calibration_positions")
        return cls(**{name: settings[name] for name in names}, vocabulary_size=vocabulary_size, basis=basis)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        names = ("kind", "width", "step", "calibration_positions")
        return {name: getattr(self, name) for name in names}

    def with_basis(self, basis: SketchBasis) -> FinalHidden:
        """The kind, ready to capture and to read."""
        return self.from_settings(self.settings(), vocabulary_size=self.vocabulary_size, basis=basis)

    def describe(self) -> str:
        """One line for people."""
        return f"final hidden states ({self.width} channels, step {self.step:g}) and the output matrix: any T"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        # In units of their own spread all channels are alike: one table serves them.
        codes = Column("hidden_codes", "<i4", (self.width,), PCO, groups=(self.width,))
        return codes, Column("actual_log_prob", "<f2", within=LOG_SHARE)

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
        """Coefficients of N positions, float32 [N, D]; of the logits only the label's log-probability is taken."""
        assert hidden_ND is not None
        basis = self._basis()
        mean_D, per_unit_D = basis.capturing_arrays(torch, hidden_ND.device)
        logits_NV = logits_NV[:, : self.vocabulary_size]
        actual_N = (logits_NV.gather(1, labels_N[:, None]) - logits_NV.logsumexp(-1, keepdim=True))[:, 0]
        coefficients_ND = (hidden_ND.float() - mean_D) * per_unit_D
        captured = to_host(torch, {"coefficients": coefficients_ND, "actual_log_prob": actual_N, **beside})
        return {**captured, "actual_log_prob": captured["actual_log_prob"].astype(np.float16)}

    def is_usable(self, captured: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N]: finite, and within the range of the
        codes."""
        size_N = np.abs(captured["coefficients"]).max(-1)
        usable_N: NDArray[np.bool_] = (size_N < self.step * 2**31) & ~np.isnan(captured["actual_log_prob"])
        return usable_N

    def finish(self, captured: Mapping[str, Array]) -> dict[str, Array]:
        """One row's captured arrays to its columns."""
        codes_ND = np.rint(captured["coefficients"].astype(np.float64) / self.step).astype(np.int32)
        return {"hidden_codes": codes_ND, "actual_log_prob": captured["actual_log_prob"]}

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` reads; raises `CacheError` for any tail policy but `sketch`."""
        if tail not in self.tail_policies:
            raise CacheError(
                f"objective.tail is {tail}, but targets of kind {self.kind} keep no head apart from a tail: every token has "
                "its own share; use sketch or auto, or precompute with targets.logits.kind: head+sketch"
            )
        return ("hidden_codes",)

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Columns of fixed shapes cannot contradict each other."""

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Columns as arrays ready for a batch: `coefficients` float32 [N, D], `actual_log_prob` float32."""
        arrays: dict[str, Array] = {}
        if "hidden_codes" in stored:
            arrays["coefficients"] = stored["hidden_codes"].astype(np.float32) * np.float32(self.step)
        if "actual_log_prob" in stored:
            arrays["actual_log_prob"] = stored["actual_log_prob"].astype(np.float32)
        return arrays

    def softened(
        self, arrays: Mapping[str, Any], temperature: float, *, tail: str = "sketch", xp: ModuleType = np
    ) -> Softened:
        """The distribution at any T > 0, from what `decoded` gives (numpy's or torch's): an empty head, all mass outside."""
        self.objective_columns(tail)
        coefficients_ND = arrays["coefficients"]
        none_N0 = coefficients_ND[:, :0]
        ids_N0 = xp.zeros_like(none_N0, dtype=xp.int64)
        return Softened(
            ids_N0, none_N0, xp.zeros_like(coefficients_ND[:, 0]), self._basis().tail(coefficients_ND, temperature)
        )

    def _basis(self) -> SketchBasis:
        if self.basis is None:
            raise CacheError("this kind of targets is read with the output matrix in the cache's teacher/ folder")
        return self.basis

"""Interface of a teacher: gives a `Softened` distribution at each position, at the temperature of a step.

Shapes: N positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError
from teachercache.targets import TAIL_POLICIES, Softened, TargetKind


class Teacher(Protocol):
    """One cache's teacher, or several made into one."""

    @property
    def vocabulary_size(self) -> int:
        """Tokens that its distributions are over."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the cache that it is read from."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that `measured` gives."""

    def check_temperatures(self, temperatures: Sequence[float]) -> None:
        """Raise `CacheError` for one at which it cannot be read."""

    def softened(
        self, targets: Mapping[str, Tensor], temperature: float, *, like: Tensor, dtype: torch.dtype
    ) -> Softened:
        """Its distributions at a temperature, from what the collator gave; on the device of `like`, in `dtype`."""

    def chosen(self, targets: Mapping[str, Tensor], index_M: Tensor) -> dict[str, Tensor]:
        """Selects some positions of what the collator gave; `index_M` rises."""

    def measured(self, softened: Softened) -> Mapping[str, Tensor]:
        """Sums over positions of what is logged of its distributions."""


class CachedTeacher:
    """The teacher of one cache.

    Raises `CacheError` for a tail policy that its targets do not allow, or not with this divergence.
    """

    names: tuple[str, ...] = ()

    def __init__(self, config: ObjectiveConfig, *, kind: TargetKind) -> None:
        self.kind = kind
        self.tail: str = kind.tail_policies[0] if config.tail == "auto" else config.tail
        if config.divergence == "reverse-kl" and not TAIL_POLICIES[self.tail].keeps_mass:
            raise CacheError(
                f"reverse-kl is infinite against targets of kind {kind.kind}, which give all other tokens no mass; "
                "use divergence: forward-kl"
            )
        self.columns = kind.objective_columns(self.tail)

    @property
    def vocabulary_size(self) -> int:
        """See `Teacher`."""
        return self.kind.vocabulary_size

    def check_temperatures(self, temperatures: Sequence[float]) -> None:
        """See `Teacher`."""
        for temperature in temperatures:
            self.kind.check_temperature(temperature)

    def softened(
        self, targets: Mapping[str, Tensor], temperature: float, *, like: Tensor, dtype: torch.dtype
    ) -> Softened:
        """See `Teacher`."""
        arrays = in_type(targets, like=like, dtype=dtype)
        return self.kind.softened(arrays, temperature, tail=self.tail, xp=torch)

    def chosen(self, targets: Mapping[str, Tensor], index_M: Tensor) -> dict[str, Tensor]:
        """See `Teacher`."""
        return {name: values[index_M.to(values.device)] for name, values in targets.items()}

    def measured(self, softened: Softened) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


def in_type(targets: Mapping[str, Tensor], *, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch's arrays on the device of `like`, numbers in `dtype` and ids as int64."""
    return {
        name: values.to(like.device, dtype if values.is_floating_point() else torch.int64)
        for name, values in targets.items()
    }

"""Boundary mass: how probable the teacher holds it, at each position, that the next token begins a new pre-token.

A student with another tokenizer cannot be compared token by token. What it can be held to are chunks of bytes that begin
and end alike on both sides; and the teacher's probability of a chunk is comparable only when it says, too, that the chunk
ends there: times the mass on tokens that begin a new pre-token (Minixhofer, Ponti & Vulić, "Universal Cross-Tokenizer
Distillation via Approximate Likelihood Matching", 2025, outcome chunk debiasing). No kind of logits holds that mass, and a
teacher is not run twice: so it is kept beside each of them, log Σ softmax(z) over these tokens, T = 1, in one column.

Stored is the square root of its magnitude, in steps of STEP: what is sqrt(x) · 2 to either side of a log-mass of -x is half
a step, so that masses near one, where their complement counts, are kept finest. Which tokens these are is a file of the
cache, named by what it says.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.coding.safetensors_file import load_named, save_named
from teachercache.targets.coding.transfer import to_host

if TYPE_CHECKING:
    from torch import Tensor

BOUNDARY_MASS = "boundary_log_mass"  # its column
SECTION = "boundary_mass"
PREFIX = "boundary-"
METADATA_KEY = "teachercache-boundary"
STEP = 1 / 1024  # of the square root of nats: a log-mass of -x is off by at most STEP · sqrt(x) nats, and a little at 0
LEAST = -80.0  # nats: what less mass than this counts as, none included; float32 hardly holds less

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class BoundaryMass:
    """The set of tokens that begin a new pre-token: their number, the set's digest, and the set itself, once it is at
    hand."""

    tokens: int
    digest: str  # of the set, 16 hex digits
    vocabulary_size: int
    begins_V: NDArray[np.bool_] | None = None
    copies: dict[str, Any] = field(default_factory=dict, repr=False)  # of the set, by device

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": {}}

    @classmethod
    def of(cls, begins_V: NDArray[np.bool_]) -> BoundaryMass:
        """Makes it from a set of tokens, bool [V]."""
        return cls(int(begins_V.sum()), _digest(begins_V), len(begins_V), begins_V)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> BoundaryMass:
        """Rebuild from a manifest's settings."""
        return cls(settings["tokens"], settings["set"], vocabulary_size)

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"tokens": self.tokens, "set": self.digest}

    def describe(self) -> str:
        """One line for people."""
        return f"mass of the {self.tokens:,} tokens that begin a new pre-token"

    @property
    def file(self) -> str:
        """The set's file in the teacher's folder."""
        return f"{PREFIX}{self.digest}.safetensors"

    def save(self, folder: Path) -> Path:
        """Write the set; returns the path."""
        arrays = {"begins_V": self._set().astype(np.uint8)}
        return save_named(arrays, {METADATA_KEY: '{"version": 1}'}, folder, prefix=PREFIX, digest=self.digest)

    def with_set(self, path: Path) -> BoundaryMass:
        """The same with its set; raises `CacheDamaged` when the file is missing or holds another one."""
        try:
            begins_V = load_named(path, key=METADATA_KEY)[0]["begins_V"]
            if begins_V.dtype != np.uint8 or begins_V.shape != (self.vocabulary_size,) or begins_V.max() > 1:
                raise ValueError(f"it does not say of each of {self.vocabulary_size} tokens 0 or 1")
            mass = self.of(begins_V.astype(np.bool_))
            if mass.settings() != self.settings():
                raise ValueError("it holds another set than the manifest says")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CacheDamaged(f"{path} is no set of tokens ({error}); fetch the cache again") from None
        return mass

    @property
    def columns(self) -> tuple[Column, ...]:
        """Its payload column."""
        return (Column(BOUNDARY_MASS, "<u2", (), PCO, groups=(1,), within=(0, int(_codes(np.array([LEAST]))[0]))),)

    def capture(self, torch: ModuleType, logits_NV: Tensor) -> dict[str, Array]:
        """As `log_masses`, on the host."""
        return to_host(torch, self.log_masses(torch, logits_NV))

    def log_masses(self, torch: ModuleType, logits_NV: Tensor) -> dict[str, Any]:
        """Log-masses of N positions, float32 [N], from float32 logits [N, V or more], which stay as they are.

        One softmax and one product with the set (tests/bench/boundary_cost.py measures what that costs). Rows are
        summed alone: the same in any batch.
        """
        device = logits_NV.device
        if str(device) not in self.copies:
            self.copies[str(device)] = torch.from_numpy(self._weights_V).to(device)
        mass_N = torch.softmax(logits_NV[:, : self.vocabulary_size], -1).mv(self.copies[str(device)])
        return {BOUNDARY_MASS: mass_N.log()}

    @staticmethod
    def is_usable(captured: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Marks the positions whose numbers a student can learn from, [N]."""
        return ~np.isnan(captured[BOUNDARY_MASS])

    @staticmethod
    def finish(captured: Mapping[str, Array]) -> dict[str, Array]:
        """One row's captured masses to its column."""
        return {BOUNDARY_MASS: _codes(captured[BOUNDARY_MASS])}

    @staticmethod
    def decoded(stored: Mapping[str, Array]) -> dict[str, Array]:
        """A row's log-masses, if its column is there, float32 [N]: from LEAST, which stands for none, to 0."""
        if BOUNDARY_MASS not in stored:
            return {}
        return {BOUNDARY_MASS: -((stored[BOUNDARY_MASS] * np.float32(STEP)) ** 2)}

    @cached_property
    def _weights_V(self) -> NDArray[np.float32]:
        return self._set().astype(np.float32)

    def _set(self) -> NDArray[np.bool_]:
        if self.begins_V is None:
            raise CacheDamaged("which tokens begin a pre-token is said by a file in the cache's teacher/ folder")
        return self.begins_V


def _codes(log_mass_N: Array) -> NDArray[np.uint16]:
    return np.rint(np.sqrt(-np.clip(log_mass_N.astype(np.float64), LEAST, 0.0)) / STEP).astype(np.uint16)


def _digest(begins_V: NDArray[np.bool_]) -> str:
    return hashlib.sha256(np.ascontiguousarray(begins_V, dtype=np.uint8).tobytes()).hexdigest()[:16]

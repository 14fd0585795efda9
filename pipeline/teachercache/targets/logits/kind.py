"""The contract of a target kind: what every file of a kind in this package provides.

Shapes: N positions, V vocabulary, D width of the output layer's input. Arrays are numpy's unless `torch` or `xp` is an
argument: a reader of caches needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from numpy.typing import NDArray

from teachercache.section import Section
from teachercache.targets.coding.columns import Column
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policies import TAIL_POLICIES
from teachercache.targets.logits.tails.policy import SKETCH

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})
ACTUAL = (
    "actual_log_prob"  # of the token that really follows, as every kind decodes it; the column that holds it begins so
)


class KindSettings(Section):
    """Base of a kind's settings as a recipe's `targets.logits` holds them. A subclass has a key `kind`, a `Literal` of the
    kind's name."""

    def for_teacher(self, config: Any) -> dict[str, Any]:
        """Returns the settings that `TargetKind.from_settings` takes, once the teacher's config (transformers') is
        known. Raises `RecipeError` where that does not say what the kind needs."""
        return self.model_dump()

    @classmethod
    def left_open(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Settings that may have no value in a manifest, because calibration chose them."""
        return ()


def hidden_size(config: Any) -> int | None:
    """Returns the width of the teacher's hidden states, where its config (transformers') says so."""
    size: int | None = getattr(config.get_text_config(), "hidden_size", None)
    return size


class TargetKind(Protocol):
    """Settings of a kind and what follows from them; immutable, picklable."""

    @property
    def kind(self) -> str:
        """Its name in recipes and manifests."""

    @property
    def config(self) -> type[KindSettings]:
        """The class of its settings in a recipe."""

    @property
    def needs_calibration(self) -> bool:
        """Tells whether it is a `CalibratedKind`: a basis must be made from a sample of the corpus before anything is
        captured."""

    @property
    def tail_policies(self) -> tuple[str, ...]:
        """Tail policies that `softened` accepts; the first is the default."""

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the teacher's tokenizer: distributions are over exactly these."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, vocabulary_size: int) -> TargetKind:
        """Rebuild from a recipe's or manifest's settings; raises `RecipeError` for settings that this vocabulary excludes."""

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps: the inverse of `from_settings`."""

    def describe(self) -> str:
        """One line for people."""

    def check_temperature(self, temperature: float) -> None:
        """Raise `CacheError`, with the remedy, for a temperature at which nothing can be read."""

    def capture(
        self,
        torch: ModuleType,
        logits_NV: Tensor,
        labels_N: Tensor,
        hidden_ND: Tensor | None = None,
        seeds_N: NDArray[Any] | None = None,
        *,
        beside: Mapping[str, Any] = NOTHING,
    ) -> dict[str, NDArray[Any]]:
        """Takes the targets of N positions while their float32 logits [N, V or more] are at hand, which are
        overwritten.

        `hidden_ND` entered the output layer; `seeds_N` (numpy, uint64) are each position's own, the same in any batch.
        Tensors that are `beside` come along as they are: all is fetched from the device at once.
        """

    def is_usable(self, captured: Arrays) -> NDArray[Any]:
        """Marks the positions whose numbers a student can learn from, bool [N]."""

    def finish(self, captured: Arrays) -> dict[str, NDArray[Any]]:
        """One row's captured arrays, in order of positions, to its columns."""

    def objective_columns(self, tail: str) -> tuple[str, ...]:
        """Columns that `softened` needs; raises `CacheError` for a tail policy that the kind does not have."""

    def check_stored(self, stored: Arrays) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, contradict each other. What each may hold by
        itself its `Column` says, and what reads it has checked."""

    def decoded(self, stored: Arrays) -> dict[str, NDArray[Any]]:
        """One row's columns, those that are there, as arrays [N, …] ready for a batch: ids int32, other numbers float32."""

    def softened(self, arrays: Arrays, temperature: float, *, tail: str = ..., xp: ModuleType = ...) -> Softened:
        """The distribution at a temperature, from what `decoded` gives (numpy's or torch's)."""


class CalibratedKind(TargetKind, Protocol):
    """A kind whose numbers are coefficients in a basis (basis.py), a file of the cache."""

    @property
    def calibration_positions(self) -> int:
        """Size of the sample that the basis is made from."""

    @property
    def basis(self) -> SketchBasis | None:
        """The basis, once there is one."""

    def with_basis(self, basis: SketchBasis) -> CalibratedKind:
        """The kind, ready to capture and to read; raises `CacheDamaged` for a basis of other settings."""


def calibrates(kind: TargetKind | None) -> TypeGuard[CalibratedKind]:
    """Tells whether the kind, if there is one, has a basis."""
    return kind is not None and kind.needs_calibration


def first_choice_tail(kind: TargetKind) -> str:
    """The tail policy to read first choices by: they are in the head, where there is one, so the tail's shape is not needed."""
    policies = kind.tail_policies
    return next((name for name in policies if SKETCH not in TAIL_POLICIES[name].needs), policies[0])


def first_choices(kind: TargetKind, arrays: Arrays, *, xp: ModuleType) -> Any:
    """The teacher's most probable token at each position at T = 1, [N], from what `decoded` gives of the columns
    `objective_columns(first_choice_tail(kind))`."""
    return kind.softened(arrays, 1.0, tail=first_choice_tail(kind), xp=xp).topk(1)[0][:, 0]

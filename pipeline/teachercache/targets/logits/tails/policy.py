"""The contract of a tail policy, and what a kind of targets tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from teachercache.targets.logits.softened import Softened, Tail

# What a kind may know of a distribution, and a policy may need.
HEAD = "head"  # the log-probabilities of some tokens
MASS = "mass"  # the mass of all other tokens together
SKETCH = "sketch"  # a shape of the tail that the cache stores


@dataclass(frozen=True, eq=False)
class TailContext:
    """Facts beside the distribution itself that a policy may ask about."""

    vocabulary_size: int
    temperature: float
    sketch: Callable[[], Tail] | None = None  # the stored shape of the tail at this temperature


class TailPolicy(Protocol):
    """A tail policy: spreads the mass outside the head over its tokens; immutable, picklable."""

    @property
    def name(self) -> str:
        """Its name in `objective.tail`."""

    @property
    def needs(self) -> frozenset[str]:
        """Facts that a kind must know for it, of `HEAD`, `MASS` and `SKETCH`."""

    @property
    def tells_tokens_apart(self) -> bool:
        """Tells whether it says what each token outside the head gets, be it nothing."""

    @property
    def keeps_mass(self) -> bool:
        """Tells whether what the head leaves over stays in the tail."""

    def apply(self, softened: Softened, context: TailContext) -> Softened:
        """The distribution with its tail spread; it comes with the mass outside the head and no shape (`tail` is None)."""


def is_dense(policy: TailPolicy) -> bool:
    """Tells whether every token gets a share of the mass that there is."""
    return policy.tells_tokens_apart and policy.keeps_mass


def offered(preferred: Sequence[str], policies: Iterable[TailPolicy], *, known: frozenset[str]) -> tuple[str, ...]:
    """Names of the policies that a kind offers: those that it prefers in their order, then all others for which it knows
    enough."""
    return (*preferred, *(policy.name for policy in policies if policy.name not in preferred and policy.needs <= known))

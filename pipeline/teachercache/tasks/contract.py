"""`Task`: what rows, collation, capture, heads and evaluation ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from numpy.typing import NDArray

from teachercache.tokens.rows import TokenRow

NO_TARGET = -100  # label of a token that is not a position, which losses of torch and transformers skip


class Task(ABC):
    """One task; immutable and picklable. It may be written outside of this package (docs/design/extending.md).

    `name` is what manifests call it. `is_causal`: what is predicted at a token must not depend on later ones, so a model that
    sees these is refused, and no attention mask is needed for padding. `heads` are the classes of transformers that load a
    model for it, the best known first. `labels_are_text`: labels are tokens of the row's text, so that a loss is so many bits
    for each of its bytes.
    """

    name: str
    is_causal: bool
    heads: tuple[str, ...]
    labels_are_text: bool = False

    @abstractmethod
    def labels_N(self, row: TokenRow) -> NDArray[Any]:
        """The label of each position of a row, in order: a number below that of outcomes; shape [positions]."""

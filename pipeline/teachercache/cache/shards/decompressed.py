"""Record batches that were decompressed last, up to so many bytes: in a random order neighbours come back much later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


Batch = TypeVar("Batch", bound=Sized)


class Decompressed(Generic[Batch]):
    """Keeps what was used last; a batch that is larger than `most_bytes` stays until the next one comes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._batches: OrderedDict[Hashable, Batch] = OrderedDict()

    def get(self, key: Hashable, decompress: Callable[[], Batch]) -> Batch:
        """The batch that goes by this key, from `decompress()` where it is not held."""
        batch = self._batches.get(key)
        if batch is not None:
            self._batches.move_to_end(key)
            return batch
        batch = self._batches[key] = decompress()
        self.held_bytes += batch.nbytes
        while self.held_bytes > self.most_bytes and len(self._batches) > 1:
            _, dropped = self._batches.popitem(last=False)
            self.held_bytes -= dropped.nbytes
        return batch

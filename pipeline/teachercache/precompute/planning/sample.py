"""The sample that calibration draws from: documents of the whole corpus by content hash, smallest first."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from teachercache.corpus.documents import Document

# At least so many documents and bytes of them, unless that is more than memory should hold. Half of it is used; 32 bytes are
# more text than most tokens stand for.
SAMPLED_DOCUMENTS = 512
SAMPLED_BYTES = 2 * 2**20
BYTES_PER_CALIBRATION_POSITION = 2 * 32
MOST_SAMPLED_BYTES = 256 * 2**20
SPARE = 8  # times what a partition's share of the sample would be, if documents lay evenly over all


@dataclass(frozen=True)
class SampleSize:
    """Size of a sample: so many documents and bytes of JSON at least, and not many more than `most` bytes."""

    documents: int
    bytes: int
    most: int

    @classmethod
    def of(cls, calibration_positions: int) -> SampleSize:
        """Enough to calibrate with so many positions."""
        size = max(SAMPLED_BYTES, BYTES_PER_CALIBRATION_POSITION * calibration_positions)
        return cls(SAMPLED_DOCUMENTS, size, MOST_SAMPLED_BYTES)

    def share(self, partitions: int) -> SampleSize:
        """The share that each of so many partitions is asked for, so that the sample is among all of them."""
        part = min(1.0, SPARE / partitions)
        return SampleSize(max(1, int(part * self.documents)), int(part * self.bytes), int(part * self.most))

    def is_met(self, documents: int, size: int) -> bool:
        """Tells whether so much is enough."""
        return (documents >= self.documents and size >= self.bytes) or size >= self.most


@dataclass(frozen=True)
class Sampled:
    """A document of the sample, as JSON, and its place in the corpus."""

    partition: int
    row: int
    hash: str
    line: str


class Smallest:
    """The documents with the smallest hashes, as few as suffice: the order of the corpus changes nothing. Equal ones count
    `once`, or each."""

    def __init__(self, size: SampleSize, *, once: bool = False) -> None:
        self._size, self._once = size, once
        self._places: set[int] = set()
        self._kept: list[tuple[int, int, int, str]] = []  # a heap: the document with the largest hash goes first
        self._bytes = 0

    def wants(self, place: int) -> bool:
        """Tells whether a document with this hash could be in it."""
        return not self._size.is_met(len(self._kept), self._bytes) or place <= -self._kept[0][0]

    def add(self, place: int, row: int, line: str) -> None:
        """Take a document, and let go of those that are too many by now."""
        if self._once and place in self._places:
            return
        self._places.add(place)
        heapq.heappush(self._kept, (-place, row, len(line), line))
        self._bytes += len(line)
        while self._size.is_met(len(self._kept) - 1, self._bytes - self._kept[0][2]):
            largest, _, size, _ = heapq.heappop(self._kept)
            self._bytes -= size
            self._places.discard(-largest)

    def sampled(self, partition: int) -> list[Sampled]:
        """Smallest first."""
        kept = sorted(self._kept, key=lambda entry: (-entry[0], entry[1]))
        return [Sampled(partition, row, f"{-place:032x}", line) for place, row, _, line in kept]


def salted_hash(identity: str) -> str:
    """Decides what calibration samples: independent of what `held_out` and the order of the corpus follow."""
    return hashlib.blake2b(identity.encode(), digest_size=16, salt=b"calibration").hexdigest()


def smallest_of(sampled: Iterable[Sampled], size: SampleSize) -> list[Document]:
    """The sample of a corpus, of those of its partitions."""
    kept = Smallest(size)
    for number, each in enumerate(sorted(sampled, key=lambda each: (each.partition, each.row))):
        if kept.wants(int(each.hash, 16)):
            kept.add(int(each.hash, 16), number, each.line)
    return [Document.from_json(each.line) for each in kept.sampled(0)]

"""`Shelf`: a folder in the cache's store, with tables of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from teachercache.cache.stores.store import Store


@dataclass(frozen=True)
class Shelf:
    """The folder `within` of a store."""

    store: Store
    within: str

    def name(self, name: str) -> str:
        """The whole name of an object."""
        return f"{self.within}/{name}"

    def below(self, name: str) -> Shelf:
        """A folder in this one."""
        return Shelf(self.store, self.name(name))

    def write(self, name: str, columns: Mapping[str, Any], *, codec: str | None = None) -> None:
        """Columns of one length as an Arrow file of one batch."""
        batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
        sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        self.store.put(self.name(name), sink.getvalue())

    def read(self, name: str) -> pa.RecordBatch:
        """Inverse of `write`."""
        return pa.ipc.open_file(pa.BufferReader(self.store.get(self.name(name)))).get_batch(0)

    def clear(self) -> None:
        """Remove all that is in it."""
        self.store.delete(*self.store.list(f"{self.within}/"))

"""The cache on disk: what is written, how it is found again, and how it is trusted. FORMAT.md beside this is the contract.

    schema.py     columns of a shard's files
    groups.py     which file of a shard holds which columns
    writer.py     rows and target columns to the files of a shard
    content_files.py  files that are hashed while they are written, and named by it
    claims.py     what a manifest and a shard's rows say of themselves, checked
    ipc_blocks.py what a record batch claims to take in memory
    entries.py    what a manifest lists: files, and shards by the hundred thousand
    manifest.py   manifest.json: what the cache holds, committed last
    index.py      the lists of shards that it names
    manifest_v1.py    manifests of format 1
    digests.py    of values and files
    reader.py     `Cache`: rows by (split, index), digests checked before the first row is handed out
    shard_set.py  many shards, opened when they are needed
    shard.py      one shard: rows by index
    row_batch.py  rows of a record batch in memory
    decompressed.py  record batches in memory, bounded
    source.py     where files are: a folder, or an object store
    object_store.py  reading from one: pieces, retries, errors in a line
    local_copies.py  what was fetched: bounded, verified, shared by processes
    prefetch.py   fetching ahead of the reader
    verify.py     every file against the manifest
    row_values.py every row as training reads it, for a deep check
    problem.py    what checks find
    card.py       the generated README.md of a cache

Needs pyarrow and numpy; neither torch nor ray.
"""

from teachercache.shards.entries import FileInfo, ShardInfo
from teachercache.shards.manifest import Audit, Manifest
from teachercache.shards.reader import SPLITS, Cache, StoredRow
from teachercache.shards.verify import Problem, verify
from teachercache.shards.writer import write_shard

__all__ = [
    "SPLITS",
    "Audit",
    "Cache",
    "FileInfo",
    "Manifest",
    "Problem",
    "ShardInfo",
    "StoredRow",
    "verify",
    "write_shard",
]

"""The cache on disk: what is written, how it is found again, and how it is trusted. FORMAT.md beside this is the contract.

    files/          names, digests and schemas of files, and opening them safely
    stores/         where a cache is written: a folder or an object store, by the same few verbs
    manifest/       what a cache says of itself: manifest.json, alignment.json, their lists, and checks of what they claim
    storage/        how its files are read: from a folder, or from an object store through local copies
    shards/         rows on disk: writing a shard, reading its rows
    reader.py       `Cache`: rows by (split, index), digests checked before the first row is handed out
    alignment.py    a cache's rows in the tokens of another student, aligned with its own
    row_keys.py     rows by what names them, for joining caches
    row_sources.py  which rows hold a document that another cache holds out
    token_texts.py  readable tokens from tokenizer.json alone
    inspection.py   a cache in numbers, and one row token by token
    verify.py       every file against the manifest
    quarantined.py  windows without targets, by their places in their documents
    checking.py     several checks at a time, and who is told of them
    repair.py       a manifest that is lost or damaged, put back
    row_values.py   every row as training reads it, for a deep check
    problem.py      what checks find
    composition/    caches made of rows of other caches: merge, split, filter

Folders are in the order in which they may import: files, stores, manifest, storage, shards, then the modules here, then
composition.
Needs pyarrow and numpy; neither torch nor ray.
"""

from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.manifest.model import Audit, Manifest
from teachercache.cache.problem import Problem
from teachercache.cache.reader import SPLITS, Cache, StoredRow
from teachercache.cache.shards.writer import write_shard
from teachercache.cache.verify import verify

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

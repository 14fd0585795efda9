"""Storage of a cache's files: a folder, or an object store that is read through local copies.

source.py         `Source`: how a cache is read, one interface for both
store.py          `Store`: five verbs, by which records of units are written; a local folder
object_store.py   reading from a store: pieces, retries, errors in a line
local_copies.py   what was fetched: bounded, verified, shared by processes
prefetch.py       fetching ahead of the reader
"""

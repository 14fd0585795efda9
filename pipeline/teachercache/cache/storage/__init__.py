"""Reading a cache's files: from a folder, or from an object store through local copies.

source.py         `Source`: how a cache is read, one interface for both
local_copies.py   what was fetched: bounded, verified, shared by processes
prefetch.py       fetching ahead of the reader
"""

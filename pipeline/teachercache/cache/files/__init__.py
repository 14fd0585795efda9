"""The files that a cache is made of: their names, digests and schemas, and how they are opened.

bounds.py          how large what a cache says may be
digests.py         of values, by one byte string for equal ones, and of files
entries.py         what a manifest lists: files, and shards by the hundred thousand
listing.py         what lies in a folder, however much
regular_files.py   opening regular files below a folder, and nothing else
column_groups.py   which file of a shard holds which columns
schema.py          columns of a shard's files, and rows to them
"""

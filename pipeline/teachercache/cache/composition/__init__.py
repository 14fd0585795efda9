"""Composition: caches made of rows of other caches, whole shards as they are, and only cut ones written anew.

compatible.py     which shards may stand in one cache, and which key says that they may not
where.py          `--where`: which rows, by what is known of each
row_facts.py      what is known of the rows of a shard, without their targets
selection.py      parts: shards of parents, whole or cut; which rows are there twice
placing.py        a part in a folder: linked, copied, or written anew
column_sizes.py   bytes of each column of a file that is there
description.py    the manifest of what was composed
folder.py         the folder of a composed cache, from empty to committed
append.py         rows added to a cache in place
compose.py        `merge`, `split` and `filter_rows`
"""

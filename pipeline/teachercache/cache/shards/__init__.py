"""Shards: rows in Arrow files, one file a column group.

writer.py         one work unit to one shard
shard.py          one shard: rows by index, checked before they are handed out
shard_set.py      many shards, opened when they are needed
row_batch.py      rows of a record batch in memory
one_column.py     one column of a file, without a look at any other
row_ids.py        ids of a file's rows, and whether they are those that the index says
row_checks.py     ids, masks and segments of rows, checked at their first reading
ipc_blocks.py     what a record batch claims to take in memory, before it is decompressed
decompressed.py   record batches in memory, bounded
"""

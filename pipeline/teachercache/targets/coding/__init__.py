"""Arrays to bytes, and the arithmetic under it.

columns.py           payload columns: per-position arrays and their bytes on disk
chunk_columns.py     columns of an alignment: tokens that stand for the same bytes
ragged.py            positions with different numbers of tokens: flat on disk, padded in a batch
pco.py               codec `pco/1`: small integers under an entropy coder, a page for each row
float16.py           float16 to float32 by moving bits
grouped_topk.py      the k largest of many
counter_rng.py       random numbers that belong to a position
safetensors_file.py  arrays in files that are named by their content
transfer.py          what a device computed, to the host in one copy
"""

"""Rows of a cache to the batches of a training step, in an order that is a pure function of (manifest, seed, epoch).

    order.py      a keyed permutation as arithmetic: no table, whatever the number of rows
    windows.py    `RowOrder`: the rows of one cache, shuffled in windows of shards
    mixture.py    `Mixture`: several caches in stated shares
    batches.py    `BatchPlan`: which rows global batch t holds, and which of them a process sees
    dataset.py    rows by index, decoded by the processes that load data
    teachers.py   rows joined to further teachers' caches
    collate.py    rows to tensors

The position in a run is one integer, the optimizer step: resume is a seek, and neither the number of processes nor the
size of a micro-batch nor the number of loading processes changes which rows a step sees.
"""

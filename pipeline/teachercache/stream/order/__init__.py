"""Order of rows: the rows that each step of a run sees, as arithmetic.

permutation.py      a keyed permutation of 0 … size-1: no table, whatever the number of rows
shuffle_windows.py  `RowOrder`: the rows of one cache, shuffled in windows of shards
mixture.py          `Mixture`: several caches in stated shares
batch_plan.py       `BatchPlan`: which rows global batch t holds, and which of them a process sees
phases.py           runs whose caches, shares or batch sizes change
"""

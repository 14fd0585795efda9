"""Rows of a cache to the batches of a training step, in an order that is a pure function of (manifest, seed, epoch).

    order/              which rows each step sees: permutation, shuffle windows, mixtures, phases
    sources.py          the caches of a run, in order
    cache_rows.py       rows of one cache as a student learns from them: read, and as tensors
    dataset.py          rows by index, decoded by the processes that load data
    loading_process.py  what these processes do with signals
    collate.py          rows to tensors
    packing.py          short rows in one sequence, isolated from each other
    alignment.py        through which alignment a model with its own tokenizer reads a cache
    aligned_rows.py     rows in a student's tokens, aligned with the teacher's rows of the same text
    aligned_tensors.py  ... read, and as tensors
    ensemble_rows.py    rows matched with those of other teachers' caches
    tokenizers.py       tokenizers that lie in caches, from bytes that were checked
    beginnings.py       caches of earlier versions whose rows do not begin as their tokenizer has it
    withheld.py         documents that one cache holds out train in none

The position in a run is one integer, the optimizer step: resume is a seek, and neither the number of processes nor the
size of a micro-batch nor the number of loading processes changes which rows a step sees.
"""

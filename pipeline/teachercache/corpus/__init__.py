"""Rows in, token sequences out. The stages, in the order in which data flows:

    readers.py    read_rows(config)          raw rows of a dataset, Parquet, JSONL or text
                                             (files.py, hub.py, python_docs.py)
    contents.py                              where the messages of a conversation stand in its text
    documents.py  documents(rows, config)    validated, content-hashed, deduplicated, split    -> Document | Duplicate
    sequences.py  tokenise(documents, ...)   tokens, windows, packing, loss masks              -> Tokenised
                                             (chat.py, encoding.py, slices.py, windows.py, packing.py)

partitions.py cuts a corpus into parts that are read apart, from any row on; sample.py says how much there is of one too large
to read twice, from a sample of its rows.

Nothing here depends on the order of the corpus or on who reads it: a document is named by a hash of its content, the
held-out split is decided by that hash, and `tokenise` is a pure function. A row that cannot be used is never dropped
in silence: it travels on as a `Document` with a `problem` and ends as `Quarantined`, with its reason.

`datasets` and `transformers` are imported only by the functions that need them.
"""

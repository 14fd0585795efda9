"""The corpus in work units, counted before any compute is spent; without Ray, and so that Ray can run it.

counted.py      all of it: `count_corpus`, from a recipe's corpus to `Counted`, whose units anyone can read
row_table.py    one partition, read once: ids, sizes and places of its rows, and documents for calibration
sample.py       which documents these are
repeats.py      rows whose content occurred before, in whichever partition: an external sort by id
unit_table.py   runs of documents that make units
staged.py       a corpus that nobody could read twice, as files of documents
shelf.py        where tables are kept: a folder in the cache's store
each.py         how work is done on each of many partitions: here, or by whoever is given
sources.py      what the files of a corpus look like from outside: whether to read them again
"""

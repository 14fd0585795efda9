"""Commands about caches that are there.

fidelity.py     stored targets against the teacher
inspect.py      a cache, or one of its rows
ls.py           caches in a place
diff.py         two caches, or two runs, held against each other
merge.py        caches joined into one
filter.py       some rows of a cache, as a cache
split.py        a cache parted in two
pack.py         a cache in one file
unpack.py       a cache out of one file
verify.py       bytes of a cache against its manifest
"""

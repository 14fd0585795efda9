"""A cache in one file, `NAME.tar.zst`, which any tar reads: `pack` and `unpack`.

contents.py     what an archive holds, in which order
packing.py      a cache into an archive, checked and resumed
unpacking.py    an archive into a cache, nothing in it trusted
"""

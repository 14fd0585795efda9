"""Checkpoints: whether they are whole, and going on from them.

completion.py   which checkpoint folders are whole, and whether their bytes are those that were written
digests.py      sizes and digests of a folder's files
resuming.py     which checkpoint a run goes on from
elastic.py      going on with another number of processes
universal.py    a checkpoint that any number of processes can load
disk.py         a full disk, in one line
"""

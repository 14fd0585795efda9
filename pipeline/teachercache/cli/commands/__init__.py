"""The commands, a file each. Each function parses, calls one function of the package, and prints what that returns.

quickstart.py   the main job in one
precompute.py   a cache from a teacher and a corpus
estimate.py     the cost of a cache, before it is made
align.py        a cache for a student with another tokenizer
init_student.py a student from a model's own layers
train.py        a student from a cache
sample.py       a corpus of a student's own text
evaluate.py     teacher and student side by side
fidelity.py     stored targets against the teacher
inspect.py      a cache, or one of its rows
merge.py        caches joined into one
filter.py       some rows of a cache, as a cache
split.py        a cache parted in two
verify.py       bytes of a cache against its manifest

Heavy libraries are imported inside the functions: `teachercache --help` answers at once.
"""

"""Commands that compute.

quickstart.py   the main job in one
precompute.py   a cache from a teacher and a corpus
estimate.py     the cost of a cache, before it is made
align.py        a cache for a student with another tokenizer
init_student.py a student from a model's own layers
train.py        a student from a cache
sample.py       a corpus of a student's own text
evaluate.py     teacher and student side by side
"""

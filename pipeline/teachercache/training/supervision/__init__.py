"""What a run learns from, and whether the student fits it.

reading.py         the caches of a run: columns, datasets, collators, loaders, prefetching
fit.py             what is refused before the first step
ensemble.py        several teachers: their caches and weights
ensemble_fit.py    what is refused of them before the first step
teacher_losses.py  what teachers lose on held-out rows
"""

"""Losses between layers of student and teacher: the terms of `objective.layers`.

objective.py  `LayerObjective`: a recipe's terms against the layers that one cache stores
term.py       the contract of a term
terms.py      the term that a recipe describes
pairs.py      which layer learns from which
adapter.py    from the student's width to the teacher's
heads.py      from the teacher's heads to the student's
hidden.py     hidden states: cosine, mean squared error
attention.py  attention maps: KL, mean squared error
relations.py  relations among queries, keys or values (MiniLMv2)
map_loss.py   both by: one map against another, a chunk of queries at a time
structure.py  distances, angles, correlations of channels
aligned.py    terms at aligned tokens, for a student with another tokenizer
gradient_taps.py  gradients of a term at what it matches, beside those from the layers above
"""

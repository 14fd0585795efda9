"""Supervision: what a run learns from, and whether the student fits it.

choice.py             which supervision a run has: chosen once
contract.py           ... what every one of them answers
own_tokens.py         ... one cache's teacher, in the student's own tokens
other_tokens.py       ... a student with another tokenizer, through alignments
several_teachers.py   ... several teachers of the same text
reading.py            the caches of a run: datasets, collators, loaders
tokenizers.py         the student's tokenizer: alignments that it needs, files that leave with it
fit.py                what is refused before the first step
ensemble.py           several teachers: their caches and weights
ensemble_fit.py       what is refused of them before the first step
teacher_losses.py     what teachers lose on held-out rows
held_out.py           what evaluation measures on held-out rows
held_out_aligned.py   ... of a student with another tokenizer
held_out_ensemble.py  ... against each of several teachers
"""

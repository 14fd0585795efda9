"""Divergence and cross-entropy over the vocabulary, value and gradient in one pass.

student_output.py  what a student gives: logits, or what enters its output layer; the loss of either
divergences.py     forward and reverse KL, Jensen-Shannon, total variation: value and gradient, outcome by outcome
teacher.py         what gives a distribution at each position, and which tail policies it can serve
fused.py           the loss of logits that exist
projected.py       ... together with the student's output projection: no logits of a whole batch
bucketed.py        a block of that pass where the teacher's tail is one outcome
dense.py           ... where every token has its own share
tail_logits.py     a tail sketch, expanded a chunk of positions at a time
padding.py         columns beyond the vocabulary
operands.py        weights, and other operands of the pass
blocks.py          how that pass stays inside a processor's cache
"""

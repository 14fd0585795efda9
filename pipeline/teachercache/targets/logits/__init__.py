"""Kinds of next-token targets: what is kept of a distribution, and how it is one again at any temperature.

kind.py             the contract of a kind
kinds.py            the list of kinds
top_k.py            the k largest logits, and the exact tail mass on a grid of temperatures
top_p.py            the smallest head that holds a share p of the mass
random_sampling.py  tokens drawn from the teacher, and how often each came up
full.py             every log-probability, for small vocabularies
final_hidden.py     the final hidden state, and the teacher's output matrix once a cache
head_sketch.py      an exact head, the tail's mass at every temperature, and a sketch of the tail's shape
basis.py            what turns a sketch's coefficients back into logits: one file a cache
tail.py             the tail's log-partition at any temperature from a few numbers
temperature.py      softened distributions from a head and the tail's log-partition
softened.py         `Softened`: a distribution at one temperature, however it is stored
tails/              tail policies: what a student is told of the tokens outside a head
head_checks.py      what a head can be: every token once, logits that do not rise
boundary_mass.py    how probable the teacher holds it that the next token begins a new pre-token
"""

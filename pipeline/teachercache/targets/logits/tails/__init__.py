"""Tail policies: what a student is told of the tokens outside a head, whose mass is known together.

policy.py       the contract of a policy, and what a kind tells it
policies.py     the list of policies
ghost.py        one outcome, for its mass alone
uniform.py      every token the same share
renormalise.py  none at all
sketch.py       each token its own share, from a sketch of the logits
"""

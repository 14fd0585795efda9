"""Tasks, what a row is asked: which of its tokens are positions with a label, what a student may see, and which head answers.

contract.py    what every task says of itself
next_token.py  the token that follows: causal language models
known.py       the tasks that this version knows, and the one that a manifest names

Rows, collation, capture, loading of models, checks before the first step and evaluation ask the task of the cache. What a task
does not decide is the same for all: targets are distributions over so many outcomes, losses and measures compare these.
"""

"""Run a teacher over rows and capture its targets. Torch, but no Ray: usable in a notebook as it is.

batches.py    which rows share a forward pass, a function of the rows alone
layers.py     what layers are read by: steps, directions, and how blocks make queries and keys
forward.py    `Teacher`: the model, its forward pass in bounded memory, the captured columns
"""

from teachercache.teacher.batches import length_sorted_batches
from teachercache.teacher.forward import Captured, Teacher

__all__ = ["Captured", "Teacher", "length_sorted_batches"]

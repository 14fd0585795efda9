"""Run a teacher over rows and capture its targets. Torch, but no Ray: usable in a notebook as it is.

forward.py        `Teacher`: the model, its forward pass in bounded memory, the captured columns
batches.py        which rows share a forward pass, a function of the rows alone
output_layer.py   its output layer as math
calibration.py    a basis from its hidden states on a sample of the corpus
sketch_choice.py  rank and step of a sketch from a target of fidelity
layers.py         what layers are read by: steps, directions, and how blocks make queries and keys
fidelity.py       KL(teacher ‖ stored) on a share of the positions, while their logits are there
"""

from teachercache.teacher.batches import length_sorted_batches
from teachercache.teacher.forward import Captured, Teacher

__all__ = ["Captured", "Teacher", "length_sorted_batches"]

"""Run a teacher over rows and capture its targets. Torch, but no Ray: usable in a notebook as it is.

forward.py        `Teacher`: forward passes in bounded memory, the captured columns
backend.py        `TeacherBackend`: what runs a model
backends.py       `BACKENDS`: the list of them
transformers_backend.py  the one of transformers, the reference
batches.py        which rows share a forward pass, a function of the rows alone
output_layer.py   its output layer as math
calibration.py    a basis from its hidden states on a sample of the corpus
sketch_choice.py  rank and step of a sketch from a target of fidelity
layers.py         what layers are read by: steps, directions, and how blocks make queries and keys
fidelity.py       KL(teacher ‖ stored) on a share of the positions, while their logits are there
"""

from teachercache.teacher.backend import ForwardPass, TeacherBackend
from teachercache.teacher.backends import BACKENDS
from teachercache.teacher.batches import length_sorted_batches
from teachercache.teacher.forward import Captured, Teacher

__all__ = ["BACKENDS", "Captured", "ForwardPass", "Teacher", "TeacherBackend", "length_sorted_batches"]

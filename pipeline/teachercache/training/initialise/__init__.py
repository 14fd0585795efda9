"""Beginnings of a student.

init_student.py        a student from a model's own layers
layer_choice.py        which layers, as people write it
embedding_transfer.py  embeddings for another vocabulary
lora.py                low-rank adapters
partitioned.py         students of which each process holds a part from the first byte (ZeRO 3)
"""

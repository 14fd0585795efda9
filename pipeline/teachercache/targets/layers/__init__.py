"""Kinds of targets from a teacher's layers.

kind.py                  the contract of a kind
kinds.py                 `LAYER_KINDS`, the list of them, and the types of their settings
settings.py              which layers a recipe chooses, and the teacher's sizes
claims.py                what a manifest may say of layers
hidden_states.py         hidden states of chosen layers, by one of three codecs
attention_maps.py        attention as maps, a byte a query and key
attention_relations.py   attention rebuilt from hidden states, linear in the length of a row
attention_vectors.py     attention as queries and keys, for models in which that cannot be
attention_factors.py     what these two share
attention.py             maps from queries and keys, and those from what entered a block
stored_maps.py           stored maps as a batch holds them
layer_file.py            what stored layers are read by: steps, means, directions
"""

"""Kinds of targets from a teacher's layers.

kind.py                  the contract of a kind
hidden_states.py         hidden states of chosen layers, by one of three codecs
attention_maps.py        attention as maps, a byte a query and key
attention_relations.py   attention as queries and keys, linear in the length of a row
attention.py             maps from queries and keys, and those from what entered a block
stored_maps.py           stored maps as a batch holds them
layer_file.py            what stored layers are read by: steps, means, directions
"""

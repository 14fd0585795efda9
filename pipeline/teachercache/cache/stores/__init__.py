"""Stores: where a cache is written, by the same few verbs in a folder and in an object store.

store.py   `Store`: the verbs, and what they promise
local.py   `LocalStore`: a folder
named.py   files that are named by their content
copies.py  whole folders into a store, and out of it
"""

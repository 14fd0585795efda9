"""Stores: where a cache is written, by the same few verbs in a folder and in an object store.

store.py         `Store`: the verbs, and what they promise
local.py         `LocalStore`: a folder
object_store.py  `ObjectStore`: S3 and its kin, with retries; read in pieces, too
clients.py       the library behind it, and URLs with their options
choice.py        the store of a location
lease.py         one job at a time writes
named.py         files that are named by their content
copies.py        whole folders into a store, and out of it
"""

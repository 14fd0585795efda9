"""Caches of other people: found, and held against each other. Needs no torch.

catalogue.py    caches below a folder, at a URL, or in a team's list of them
comparison.py   differences of two caches, or of two runs
archive/        a cache in one file
rendering.py    tables of both for people
"""

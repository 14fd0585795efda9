"""Token weighting: positions that count more.

weights.py  weights of positions from the entropy of what student or teacher expect there
entropy.py  ... the entropies
"""

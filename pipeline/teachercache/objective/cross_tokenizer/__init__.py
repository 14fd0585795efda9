"""The loss of a student with another tokenizer than the teacher's: the terms of `objective.across`.

objective.py              `CrossTokenizerObjective`: a recipe's terms
batch.py                  chunks: tokens that stand for the same bytes on both sides
term.py                   the contract of a term
projected_kl.py           next tokens where chunks begin, through a map between the vocabularies
chunk_likelihood.py       likelihoods of chunks (ALM)
sorted_probabilities.py   sorted next-token probabilities (ULD)
softmax.py                losses of one softmax, their gradients in closed form
sums.py                   all of them over the student's output layer, a block of logits at a time
"""

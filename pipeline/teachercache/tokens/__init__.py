"""Tokens and the bytes that they stand for. No torch.

rows.py            the token sequence that flows from the corpus to the teacher, into shards and out to the student
prefix.py          how rows begin: tokens in front of a text
carried_prefix.py  a tokenizer that begins texts as a recipe says
fingerprint.py     whether two tokenizers turn every text into the same ids
description.py     what of a tokenizer's description decides ids, in one form whatever version wrote it
claims.py          what a tokenizer's files say of themselves, looked at before a library reads them
rules.py           what a tokenizer's rules may do to a text, of its description alone
token_bytes.py     the bytes of each token of a vocabulary
spans.py           where each token of a text ends in its bytes
alignment.py       which tokens of two tokenizers stand for the same bytes
vocabulary_map.py  from a teacher's tokens to a student's
panics.py          a tokenizer that gives up on a text, as an error
pretokens.py       which tokens begin a new pre-token
"""

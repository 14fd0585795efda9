"""Models and tokenizers, whoever uses them: teacher, student and evaluation.

loading.py      any causal language model or tokenizer, and rows into its inputs
weights.py      a checkpoint must have every weight of its model
gguf_files.py   GGUF files as plain Hugging Face folders
activations.py  hidden states and attention of a running model
probes.py       what a loaded model is asked on a few tokens: is it causal, does it keep packed documents apart
rotary.py       rotary factors that depend on length, by each document's own
memory.py       which errors say that a device has no memory left
"""

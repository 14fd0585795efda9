"""Knowledge distillation of language models from an offline cache of teacher outputs."""

__version__ = "0.1.0"

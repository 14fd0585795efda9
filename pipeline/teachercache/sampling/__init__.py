"""Samples a student's own text, as a corpus: `teachercache sample`.

    job.py        `run_sampling`: the whole command
    prompts.py    which documents of a corpus, and how much of them the student is given
    writing.py    the student goes on from there; samples as JSON lines

On-policy distillation asks the teacher about the student's own text (Agarwal et al., "On-Policy Distillation of Language
Models: Learning from Self-Generated Mistakes", ICLR 2024). A cache cannot answer: it holds what the teacher said of the corpus.
So the teacher runs again, on samples: `sample`, `precompute` on them, `train` on, in rounds (`infra/on_policy`).
"""

"""`DistillationTrainer`: `transformers.Trainer` on a cache.

trainer.py             the trainer
batch_loss.py          the loss of one micro-batch
output_layer.py        ... formed inside the student's output layer
layers.py              terms between layers: adapters in the student, what its layers hold
routing.py             chosen parts of the student learn from chosen terms
gradient_cosines.py    whether terms agree
learning_rate.py       the learning rate of a run in phases
held_out.py            evaluation on held-out rows
held_out_pass.py       ... of all caches of a run
held_out_ensemble.py   ... against each of several teachers
"""

"""`DistillationTrainer`: `transformers.Trainer` on a cache.

trainer.py             the trainer
objectives.py          the losses of a run: of logits and between layers
batch_loss.py          the loss of one micro-batch
output_layer.py        ... formed inside the student's output layer
layers.py              terms between layers: adapters in the student, what its layers hold
routing.py             chosen parts of the student learn from chosen terms
gradient_cosines.py    whether terms agree
learning_rate.py       the learning rate of a run in phases
held_out_pass.py       evaluation on held-out rows
"""

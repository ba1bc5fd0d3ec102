"""Optimisers with PyTorch's update rules, and learning rates as functions of the step."""

from sparsetrain.optim.adam import Adam, AdamW
from sparsetrain.optim.schedules import constant, cosine, restarts, step, warmup
from sparsetrain.optim.sgd import SGD, Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "constant", "cosine", "restarts", "step", "warmup"]

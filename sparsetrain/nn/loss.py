"""Losses: each returns (loss, gradient), the mean over the batch and its gradient by the first argument."""

import numpy as np

from sparsetrain import arrays, checks
from sparsetrain._kernels import core


def cross_entropy(logits, labels, label_smoothing=0.0):
    """Softmax cross-entropy of logits (N, classes), float32 or float64, and labels (N,) int64 in [0, classes).

    label_smoothing in [0, 1] spreads that share of the target over all classes. Returns (float, array (N, classes)).
    """
    arrays.check("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}, must be (N, classes)")
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64:
        raise TypeError(f"labels are {getattr(labels, 'dtype', type(labels).__name__)}, must be an int64 array")
    n, classes = logits.shape
    if labels.shape != (n,):
        raise ValueError(f"labels have shape {labels.shape}, must be ({n},) as logits have shape {logits.shape}")
    wrong = labels.view(np.uint64) >= classes  # so seen, those below 0 are large
    if wrong.any():
        first = wrong.argmax()
        raise ValueError(f"labels[{first}] is {labels[first]}, must be in [0, {classes})")
    smoothing = checks.number("label_smoothing", label_smoothing, low=0, high=1)
    loss, gradient = np.empty(n), np.empty_like(logits, order="C")
    core.cross_entropy(np.ascontiguousarray(logits), np.ascontiguousarray(labels), smoothing, loss, gradient)
    return float(loss.sum() / n), gradient


def mse_loss(y, target):
    """Mean of (y - target)^2 over all elements of two arrays of one shape and dtype. Returns (float, array)."""
    arrays.check("y", y)
    arrays.check("target", target)
    if y.shape != target.shape or y.dtype != target.dtype:
        raise ValueError(f"target is {target.dtype} {target.shape}, must be {y.dtype} {y.shape} as y")
    difference = y - target
    return float(np.mean(np.square(difference, dtype=np.float64))), difference * y.dtype.type(2 / y.size)

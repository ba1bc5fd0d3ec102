"""Which weights exist."""

from sparsetrain.sparsity.sparsify import DISTRIBUTIONS, METHODS, sparsifiable, sparsify

__all__ = ["DISTRIBUTIONS", "METHODS", "sparsifiable", "sparsify"]

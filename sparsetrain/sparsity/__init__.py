"""Which weights exist."""

from sparsetrain.sparsity.ac_dc import ACDC
from sparsetrain.sparsity.drop_grow import DropGrow, largest_gradients, smallest
from sparsetrain.sparsity.gmp import GMP
from sparsetrain.sparsity.granet import GraNet
from sparsetrain.sparsity.magnitude import Magnitude
from sparsetrain.sparsity.method import Method, Timed
from sparsetrain.sparsity.n_m import NM
from sparsetrain.sparsity.rigl import RigL
from sparsetrain.sparsity.set import SET
from sparsetrain.sparsity.sparsify import DISTRIBUTIONS, METHODS, sparsifiable, sparsify
from sparsetrain.sparsity.static import Static

__all__ = [
    "ACDC", "DISTRIBUTIONS", "GMP", "METHODS", "NM", "SET", "DropGrow", "GraNet", "Magnitude", "Method", "RigL",
    "Static", "Timed", "largest_gradients", "smallest", "sparsifiable", "sparsify",
]  # fmt: skip

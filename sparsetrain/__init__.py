"""Neural networks on CPUs in which sparsity is real: removed weights are neither stored nor multiplied."""

from sparsetrain import data, nn, optim, sparsity
from sparsetrain._kernels.core import available_isas, get_isa, get_num_threads, set_isa, set_num_threads
from sparsetrain.rng import manual_seed
from sparsetrain.sparsity import sparsify
from sparsetrain.train import Trainer

__version__ = "0.1.0"
__all__ = [
    "Trainer", "available_isas", "data", "get_isa", "get_num_threads", "manual_seed", "nn", "optim", "set_isa",
    "set_num_threads", "sparsify", "sparsity",
]  # fmt: skip

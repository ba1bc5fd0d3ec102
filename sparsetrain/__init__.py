"""Neural networks on CPUs in which sparsity is real: removed weights are neither stored nor multiplied."""

from sparsetrain import backprop, choices, data, interchange, nn, optim, sparsity
from sparsetrain._kernels.core import available_isas, get_isa, get_num_threads, set_isa, set_num_threads
from sparsetrain.profile import profile
from sparsetrain.rng import manual_seed
from sparsetrain.sparsity import sparsify
from sparsetrain.train import Trainer
from sparsetrain.version import VERSION as __version__

__all__ = [
    "Trainer", "__version__", "available_isas", "backprop", "choices", "data", "get_isa", "get_num_threads",
    "interchange", "manual_seed", "nn", "optim", "profile", "set_isa", "set_num_threads", "sparsify", "sparsity",
]  # fmt: skip

"""Which values of the output gradients are used: one method a file, and what they have in common in method.py."""

from sparsetrain.backprop.dithered import Dithered
from sparsetrain.backprop.mem_aop import MemAOP
from sparsetrain.backprop.method import Layer, Method
from sparsetrain.backprop.resprop import ReSprop
from sparsetrain.backprop.top_k import TopK
from sparsetrain.sparse_gradient import above, chosen, dither, nonzero

__all__ = ["Dithered", "Layer", "MemAOP", "Method", "ReSprop", "TopK", "above", "chosen", "dither", "nonzero"]

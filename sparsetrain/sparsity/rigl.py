"""RigL: the rigged lottery."""

from dataclasses import dataclass

from sparsetrain.sparsity.drop_grow import DropGrow, largest_gradients, smallest


@dataclass
class RigL(DropGrow):
    """At each update the weights of the least magnitude go, and as many grow where the loss has the largest gradients.

    Gradients of weights that are not stored are taken in that one step, in blocks (probe.py).

    Source: Evci et al., Rigging the Lottery, ICML 2020, arXiv 1911.11134, algorithm 1; fraction 0.3, every 100 steps,
    stop at three quarters of the run are its settings for CNNs.
    """

    def prepare(self):
        for layer in self.layers:
            if self.count(layer):
                layer.probe(self.count(layer))

    def drop(self, layer, count):
        return smallest(layer.weight, count)

    def grow(self, layer, kept, count):
        return largest_gradients(layer, kept, count)

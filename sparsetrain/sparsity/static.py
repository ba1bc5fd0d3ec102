"""A structure that is chosen once and stays."""

from dataclasses import dataclass, field

from sparsetrain import checks
from sparsetrain.sparsity import scores
from sparsetrain.sparsity.method import Method

CHOICES = {"random": scores.random, "magnitude": scores.magnitude}


@dataclass
class Static(Method):
    """Weights are removed before the first step and never again.

    method: "random" weights, or the smallest in "magnitude"; sparsify() has more. The default, random with
    distribution "erk", is Static of Evci et al., RigL, ICML 2020, arXiv 1911.11134.
    """

    method: str = "random"
    distribution: str = field(default="erk", kw_only=True)

    distributions = ("uniform", "erk", "global")

    def check(self):
        checks.one_of("method", self.method, CHOICES)

    def begin(self):
        self.prune(self.sparsity, CHOICES[self.method])

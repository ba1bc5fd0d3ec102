"""Adam, and Adam with decoupled weight decay."""

from sparsetrain import checks
from sparsetrain._kernels import core
from sparsetrain.optim.sgd import Optimizer


class Adam(Optimizer):
    """Adam: steps scaled by running means of the gradient and of its square.

        g = grad + weight_decay * w;  m = b1 * m + (1 - b1) * g;  v = b2 * v + (1 - b2) * g * g
        w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Kingma and Ba, Adam, ICLR 2015, arXiv:1412.6980, as torch.optim.Adam computes it.
    The slots are "m" and "v"; t is counted for each parameter.
    """

    settings = ("betas", "eps", "weight_decay")
    slots = ("m", "v")
    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr)
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise ValueError(f"betas is {betas!r}, must be two numbers in [0, 1)") from None
        self.betas = (checks.fraction("betas[0]", beta1), checks.fraction("betas[1]", beta2))
        self.eps = checks.number("eps", eps, low=0.0)
        self.weight_decay = checks.number("weight_decay", weight_decay, low=0.0)

    def update(self, rows, steps):
        core.adam_step(rows, steps, self.lr, *self.betas, self.eps, self.weight_decay, self.decoupled)


class AdamW(Adam):
    """Adam whose weight decay shrinks the weights directly: w -= lr * weight_decay * w first.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019,
    arXiv:1711.05101, as torch.optim.AdamW computes it.
    """

    decoupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr, betas, eps, weight_decay)

"""Ten steps of an optimiser beside PyTorch's."""

import numpy as np

from sparsetrain.sparse import Parameter


def parameters(rng, dtype=np.float32):
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in ((5, 7), (3,))]


def steps_agree_with_torch(rng, ours, theirs, dtype, skip):
    """Ten steps of both on the same gradients; skip(step, i): parameter i has no gradient."""
    import torch

    params = parameters(rng, dtype)
    twins = [torch.nn.Parameter(torch.tensor(p.data)) for p in params]
    optimizer, twin = ours(params), theirs(twins)
    for step in range(10):
        for i, (p, t) in enumerate(zip(params, twins, strict=True)):
            grad = None if skip(step, i) else rng.standard_normal(p.shape).astype(dtype)
            p.grad, t.grad = grad, None if grad is None else torch.tensor(grad)
        optimizer.step()
        twin.step()
        for p, t in zip(params, twins, strict=True):
            # each step rounds a handful of times
            bound = 20 * (step + 1) * np.finfo(dtype).eps
            np.testing.assert_allclose(p.data, t.detach().numpy(), rtol=bound, atol=4 * bound)

"""Gradient checks: a module's backward against numerical derivatives of its forward, in float64."""

import numpy as np

import sparsetrain as st


def derivative(f, a, at, h):
    """df/da[at], by central differences of fourth order; a[at] is restored."""
    kept = a[at]

    def moved(steps):
        a[at] = kept + steps * h
        return f()

    slope = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * h)
    a[at] = kept
    return slope


def gradcheck(module, x, *, seed=0, h=1e-4, at_most=60):
    """AssertionError unless backward's gradients of sum(module(x) * r), r random, are the numerical
    ones: for x and for each stored value of each parameter.

    Of an array with more values than at_most, that many drawn at random. A step of h errs by about
    h**4, for the differences, and 1e-16 / h, for rounding: the tolerance is far above both. Every
    forward starts from the same seed, for dropout.
    """
    module.to(np.float64)
    rng = np.random.default_rng(seed)
    x = np.array(x, np.float64)

    def forward():
        st.manual_seed(seed)
        return module(x)

    r = rng.standard_normal(forward().shape)
    module.zero_grad()
    forward()
    checked = {"x": (x, module.backward(r))}
    for name, parameter in module.named_parameters():
        checked[name] = (parameter.data, parameter.grad)

    for name, (values, gradient) in checked.items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.shape == values.shape and gradient.dtype == np.float64, name
        places = list(np.ndindex(values.shape))
        if len(places) > at_most:
            places = [places[i] for i in rng.choice(len(places), at_most, replace=False)]
        actual = np.array([gradient[at] for at in places])
        expected = [derivative(lambda: (forward() * r).sum(), values, at, h) for at in places]
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8, err_msg=name)

"""One layer with a method of backprop, run backward pass by pass, and what the reference makes of a gradient."""

import numpy as np

import reference as ref
from sparsetrain import nn
from sparsetrain.sparse import SparseParameter

KINDS = ("linear", "conv")


def close(actual, expected):
    """Whether all of actual is expected, up to rounding of the largest value."""
    eps = 1e-5 if actual.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(actual, expected, rtol=0, atol=eps * max(1e-30, np.abs(expected).max()))


class Passes:
    """A model of one layer with 6 inputs. dense: its weight as an array, random or, with identity=True, such that dx is
    the very output gradient that is used; shape: that of the output."""

    def __init__(self, kind, method=None, n=18, dtype=np.float32, identity=False, sparsity=None, optimizer=None):
        rng = np.random.default_rng(1)
        out = 6 if identity else 5
        if kind == "linear":
            self.module, self.shape = nn.Linear(6, out), (n, out)
        elif identity:
            self.module, self.shape = nn.Conv2d(6, out, 3, padding=1), (n, out, 9, 8)
        else:
            self.module, self.shape = nn.Conv2d(6, out, 3, stride=(2, 1), padding=(1, 0)), (n, out, 5, 6)
        self.kind, self.model = kind, nn.Sequential(self.module)
        self.model.to(dtype)
        self.x = rng.standard_normal((n, 6) if kind == "linear" else (n, 6, 9, 8)).astype(dtype)
        w = rng.standard_normal(self.module.weight.shape).astype(dtype)
        if identity:
            w[...] = 0
            w[(range(6), range(6), *((1, 1) if kind == "conv" else ()))] = 1
        mask = rng.random(w.shape) >= (sparsity or 0)
        self.dense = w * mask
        self.module.weight.data[...] = w
        self.mask = mask
        if sparsity is not None:
            self.module.weight = SparseParameter.from_dense(w, mask)
        self.method = method
        if method is not None:
            method.attach(self.model, optimizer)

    @property
    def layer(self):
        return self.module.backprop

    @property
    def state(self):
        return self.module.backprop.state

    def gradient(self, seed=0):
        """A random output gradient."""
        return np.random.default_rng((seed, 2)).standard_normal(self.shape).astype(self.x.dtype)

    def step(self, dy, x=None):
        """dx, dw (as a dense array), db of one pass."""
        self.module.weight.grad = self.module.bias.grad = None
        self.model(self.x if x is None else x)
        dx = self.model.backward(dy)
        dw = self.module.weight.grad.copy()
        if isinstance(self.module.weight, SparseParameter):
            stored, dw = dw, np.zeros(self.mask.shape, dw.dtype)
            dw[self.mask] = stored
        return dx, dw, self.module.bias.grad.copy()

    def reference(self, dy, x=None):
        """dx, dw, db of the exact backward pass of dy, in float64; dw is 0 where no weight is stored."""
        x = self.x if x is None else x
        if self.kind == "linear":
            dx, dw, db = ref.linear_backward(dy, x, self.dense)
        else:
            conv = self.module
            dx, dw, db = ref.conv2d_backward(dy, x, self.dense, conv.stride, conv.padding)
        return dx, dw * self.mask if isinstance(self.module.weight, SparseParameter) else dw, db

    def check(self, found, used, exact, x=None):
        """That dx and dw are those of `used`, and db that of `exact`."""
        dx, dw, _ = self.reference(used, x)
        close(found[0], dx)
        close(found[1], dw)
        close(found[2], self.reference(exact, x)[2])

    def rows(self, dy, x=None):
        """(M, inputs) and (M, outputs): each row the window of x that one output pixel meets, and its gradient."""
        x = self.x if x is None else x
        if self.kind == "linear":
            return x.astype(np.float64), dy.astype(np.float64)
        (kh, kw), (sh, sw), (ph, pw) = self.module.kernel_size, self.module.stride, self.module.padding
        padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
        height, width = dy.shape[2:]
        windows = [
            padded[:, :, r * sh : r * sh + kh, c * sw : c * sw + kw].reshape(len(x), -1)
            for r in range(height)
            for c in range(width)
        ]
        flat = np.stack(windows, 1).reshape(len(x) * height * width, -1)
        return flat.astype(np.float64), np.moveaxis(dy, 1, 3).reshape(-1, dy.shape[1]).astype(np.float64)

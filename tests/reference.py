"""Every operation of the engine in plain float64 NumPy, written to be read: what the tests trust.

Names and meanings are PyTorch's; test_reference.py compares with it. Each backward stands beside
its forward and takes the forward's arguments after dy. Pairs are (height, width). Nothing is fast:
loops run over kernel positions.
"""

import numpy as np


def _double(*arrays):
    return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def _pad(x, padding, value=0.0):
    (ph, pw) = padding
    return np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=value)


def _crop(x, padding):
    (ph, pw) = padding
    return x[:, :, ph : x.shape[2] - ph, pw : x.shape[3] - pw]


def output_size(size, kernel, stride, padding, dilation=(1, 1)):
    """(height, width) of the output of a convolution or a pooling."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def _taps(size, kernel, stride, dilation=(1, 1)):
    """Each kernel position (i, j), with the slice of the padded image that it meets."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + stride[0] * (size[0] - 1) + 1, stride[0])
            columns = slice(left, left + stride[1] * (size[1] - 1) + 1, stride[1])
            yield i, j, (slice(None), slice(None), rows, columns)


def _groups(x_channels, y_channels, groups):
    """For each group, the slices of its input and of its output channels."""
    ci, co = x_channels // groups, y_channels // groups
    return [(slice(g * ci, (g + 1) * ci), slice(g * co, (g + 1) * co)) for g in range(groups)]


def conv2d(x, w, b=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """y (N, O, H', W') of x (N, I, H, W), w (O, I / groups, KH, KW) and b (O,)."""
    x, w, b = _double(x, w, b)
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((len(x), len(w), *size))
    x = _pad(x, padding)
    for i, j, window in _taps(size, w.shape[2:], stride, dilation):
        for ci, co in _groups(x.shape[1], len(w), groups):
            y[:, co] += np.einsum("nihw,oi->nohw", x[window][:, ci], w[co, :, i, j])
    return y if b is None else y + b[:, None, None]


def conv2d_backward(dy, x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """dx, dw, db of conv2d."""
    dy, x, w = _double(dy, x, w)
    x = _pad(x, padding)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for i, j, window in _taps(dy.shape[2:], w.shape[2:], stride, dilation):
        for ci, co in _groups(x.shape[1], len(w), groups):
            dx[window][:, ci] += np.einsum("nohw,oi->nihw", dy[:, co], w[co, :, i, j])
            dw[co, :, i, j] += np.einsum("nohw,nihw->oi", dy[:, co], x[window][:, ci])
    return _crop(dx, padding), dw, dy.sum((0, 2, 3))


def linear(x, w, b=None):
    """y (N, O) of x (N, I), w (O, I) and b (O,)."""
    x, w, b = _double(x, w, b)
    return x @ w.T if b is None else x @ w.T + b


def linear_backward(dy, x, w):
    """dx, dw, db of linear."""
    dy, x, w = _double(dy, x, w)
    return dy @ w, dy.T @ x, dy.sum(0)


def _channels(x):
    """The axes that batch norm averages over, and the shape that spreads channels over x."""
    axes = (0, *range(2, x.ndim))
    return axes, (1, -1) + (1,) * (x.ndim - 2)


def batch_norm(x, w, b, running_mean, running_var, training=True, momentum=0.1, eps=1e-5):
    """y, running_mean, running_var of x (N, C) or (N, C, H, W).

    Training normalises by the batch's mean and biased variance, and moves the running statistics
    towards its mean and unbiased variance; otherwise the running statistics normalise and stay.
    """
    x, w, b, running_mean, running_var = _double(x, w, b, running_mean, running_var)
    axes, spread = _channels(x)
    mean, var = running_mean, running_var
    if training:
        mean, var = x.mean(axes), x.var(axes)
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * x.var(axes, ddof=1)
    normal = (x - mean.reshape(spread)) / np.sqrt(var + eps).reshape(spread)
    return normal * w.reshape(spread) + b.reshape(spread), running_mean, running_var


def batch_norm_backward(dy, x, w, running_mean, running_var, training=True, eps=1e-5):
    """dx, dw, db of batch_norm; running statistics as they were before the forward."""
    dy, x, w, mean, var = _double(dy, x, w, running_mean, running_var)
    axes, spread = _channels(x)
    if training:
        mean, var = x.mean(axes), x.var(axes)
    scale = 1 / np.sqrt(var + eps).reshape(spread)
    normal = (x - mean.reshape(spread)) * scale
    dw, db = (dy * normal).sum(axes), dy.sum(axes)
    if training:  # the batch's mean and variance depend on x too
        count = x.size // x.shape[1]
        dy = dy - db.reshape(spread) / count - normal * dw.reshape(spread) / count
    return dy * scale * w.reshape(spread), dw, db


def relu(x):
    """max(x, 0); NaN stays NaN."""
    (x,) = _double(x)
    return np.where(x <= 0, 0, x)


def relu_backward(dy, x):
    """dx of relu: 0 where x <= 0, so 0 at 0."""
    dy, x = _double(dy, x)
    return np.where(x <= 0, 0, dy)


def _max_positions(x, kernel, stride, padding):
    """y of max_pool2d and, for each output, the number of the kernel position that won."""
    size = output_size(x.shape[2:], kernel, stride, padding)
    inside = _pad(np.ones(x.shape, bool), padding, False)
    x = _pad(x, padding, -np.inf)
    y = np.full((*x.shape[:2], *size), -np.inf)
    winner = np.full(y.shape, -1)
    for i, j, window in _taps(size, kernel, stride):
        better = (x[window] > y) | np.isnan(x[window]) | (winner < 0)
        better &= inside[window]
        y = np.where(better, x[window], y)
        winner = np.where(better, i * kernel[1] + j, winner)
    return y, winner


def max_pool2d(x, kernel, stride, padding=(0, 0)):
    """The largest of each window, padding never; NaN if the window has one."""
    (x,) = _double(x)
    return _max_positions(x, kernel, stride, padding)[0]


def max_pool2d_backward(dy, x, kernel, stride, padding=(0, 0)):
    """dx of max_pool2d: all to the first of equal maxima, row by row, and to the last of NaNs."""
    dy, x = _double(dy, x)
    winner = _max_positions(x, kernel, stride, padding)[1]
    dx = _pad(np.zeros_like(x), padding)
    for i, j, window in _taps(dy.shape[2:], kernel, stride):
        dx[window] += np.where(winner == i * kernel[1] + j, dy, 0)
    return _crop(dx, padding)


def avg_pool2d(x, kernel, stride, padding=(0, 0)):
    """The mean of each window; padding counts, as zeros."""
    (x,) = _double(x)
    size = output_size(x.shape[2:], kernel, stride, padding)
    x = _pad(x, padding)
    return sum(x[window] for _, _, window in _taps(size, kernel, stride)) / np.prod(kernel)


def avg_pool2d_backward(dy, x, kernel, stride, padding=(0, 0)):
    """dx of avg_pool2d; of x only the shape matters."""
    dy, x = _double(dy, x)
    dx = _pad(np.zeros_like(x), padding)
    for _, _, window in _taps(dy.shape[2:], kernel, stride):
        dx[window] += dy / np.prod(kernel)
    return _crop(dx, padding)


def _bins(size, output):
    """The slices of an axis that adaptive pooling averages: they cover it and may overlap."""
    return [slice(i * size // output, -(-(i + 1) * size // output)) for i in range(output)]


def adaptive_avg_pool2d(x, output):
    """The means of output[0] x output[1] windows that cover the image."""
    (x,) = _double(x)
    y = np.zeros((*x.shape[:2], *output))
    for i, rows in enumerate(_bins(x.shape[2], output[0])):
        for j, columns in enumerate(_bins(x.shape[3], output[1])):
            y[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return y


def adaptive_avg_pool2d_backward(dy, x):
    """dx of adaptive_avg_pool2d; of x only the shape matters."""
    dy, x = _double(dy, x)
    dx = np.zeros_like(x)
    for i, rows in enumerate(_bins(x.shape[2], dy.shape[2])):
        for j, columns in enumerate(_bins(x.shape[3], dy.shape[3])):
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            dx[:, :, rows, columns] += dy[:, :, i : i + 1, j : j + 1] / area
    return dx


def flatten(x):
    """(N, C, H, W) as (N, C * H * W)."""
    (x,) = _double(x)
    return x.reshape(len(x), -1)


def flatten_backward(dy, x):
    """dx of flatten; of x only the shape matters."""
    (dy,) = _double(dy)
    return dy.reshape(x.shape)


def dropout(x, mask, p):
    """x where mask, scaled so that the expectation stays; 0 elsewhere. Its own backward."""
    (x,) = _double(x)
    return np.where(mask, x / (1 - p), 0)


def softmax(logits):
    """Probabilities of each row."""
    (logits,) = _double(logits)
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(logits, labels, label_smoothing=0.0):
    """The mean loss of logits (N, K) and labels (N,), and its gradient; the target is
    (1 - label_smoothing) on the label plus label_smoothing / K everywhere."""
    (logits,) = _double(logits)
    n, k = logits.shape
    target = (1 - label_smoothing) * np.eye(k)[labels] + label_smoothing / k
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -(target * log_p).sum() / n, (softmax(logits) - target) / n


def mse_loss(y, target):
    """The mean squared difference and its gradient for y."""
    y, target = _double(y, target)
    return ((y - target) ** 2).mean(), 2 * (y - target) / y.size


def sgd(w, dw, buf, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    """New w and momentum buffer; buf None at the first step."""
    w, dw, buf = _double(w, dw, buf)
    dw = dw + weight_decay * w
    if momentum == 0:
        return w - lr * dw, None
    buf = dw if buf is None else momentum * buf + dw
    return w - lr * (dw + momentum * buf if nesterov else buf), buf


def adam(w, dw, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """New w, m, v; step counts from 1."""
    w, dw, m, v = _double(w, dw, m, v)
    dw = dw + weight_decay * w
    m = betas[0] * m + (1 - betas[0]) * dw
    v = betas[1] * v + (1 - betas[1]) * dw**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return w - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def adamw(w, dw, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """Adam whose weight decay shrinks w itself instead of joining the gradient."""
    (w,) = _double(w)
    return adam(w * (1 - lr * weight_decay), dw, m, v, step, lr, betas, eps)


def assert_close(actual, expected, terms, size):
    """|actual - expected| <= terms * eps * size: the bound on rounding of a sum of that many terms.

    eps is that of actual's type; size is the same operation on absolute values; terms is a number
    or, exactly, the same operation on ones. The smallest normal number is added, because the engine
    flushes subnormal numbers to zero.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    info = np.finfo(actual.dtype)
    bound = np.asarray(terms) * (info.eps * np.asarray(size) + info.tiny)
    excess = np.abs(actual - expected) - bound
    if not (excess <= 0).all():  # NaN fails too
        at = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(
            f"{(~(excess <= 0)).sum()} of {excess.size} off, worst at {tuple(map(int, at))}: "
            f"{actual[at]!r}, not {expected[at]!r}: by {excess[at]:.3g} more than rounding"
        )

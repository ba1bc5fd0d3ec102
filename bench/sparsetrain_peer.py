"""Our own side of the benchmarks: sparsetrain's layers and nets, as peers.py asks for them."""

import os

import cases
from scipy.optimize import brentq
from scipy.stats import norm
from subject import Subject, sampled, timed_parts

import sparsetrain as st
from sparsetrain import arrays, backprop, interchange, nn
from sparsetrain.backprop.resprop import MARGIN
from sparsetrain.record import record
from sparsetrain.sparse import SparseParameter

st.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

NO_HALO = (0, 0)
SETTLE = 15  # steps until a method holds the share of zeros that is asked for


def versions(peer):
    return {
        "sparsetrain": st.__version__,
        "isa": st.get_isa(),
        "threads": st.get_num_threads(),
    }


def layer(peer, case):
    """A layer as it runs inside a net, on blocked arrays; and called with NumPy arrays."""
    weight, mask, bias, x, dy = cases.layer_arrays(case)
    if case["kind"] == "linear":
        module = nn.Linear(case["in"], case["out"])
    else:
        module = nn.Conv2d(case["in"], case["out"], case["kernel"], stride=case["stride"], padding=case["padding"])
    module.bias.data[:] = bias
    if cases.weight_sparsity(case) > 0:
        module.weight = SparseParameter.from_dense(weight, mask)
    else:
        module.weight.data[:] = weight
    x_blocked, dy_blocked = arrays.pack(x, module.halo), arrays.pack(dy, module.grad_halo)

    method = _method(peer, case)
    if method is not None:
        method.attach(module)
    runs = []

    def inside_net():
        module.zero_grad()
        runs.clear()
        with record(runs.append):
            seconds = timed_parts(
                forward=lambda _: module.forward(x_blocked, NO_HALO),
                backward=lambda result: result[1](dy_blocked, NO_HALO),
            )
        if case.get("zeros") == "gradient":
            for run in runs:
                if run.kind != "forward":  # its parts, and those of backward
                    seconds[run.kind] = seconds.get(run.kind, 0.0) + run.end - run.start
        return seconds

    def from_numpy():
        module.zero_grad()
        return timed_parts(forward_numpy=lambda _: module(x), backward_numpy=lambda _: module.backward(dy))

    def sample():
        module.zero_grad()
        y, dx, dw = module(x), module.backward(dy), module.weight.grad
        dw = dw if cases.weight_sparsity(case) > 0 else dw[mask]
        return {"y": sampled(y), "dx": sampled(dx), "dw": sampled(dw)}

    if method is None:
        return Subject([inside_net, from_numpy], sample)
    inside_net(), inside_net()  # a method's first pass may be exact
    method.report()
    inside_net()
    about = {"zeros": method.report()[""]["gradient_sparsity"]}
    # Its gradients are not those of the other peers
    same = {} if peer == "dithered-8-bit" else {"y": sampled(module(x))}
    return Subject([inside_net], lambda: same, about)


def _method(peer, case):
    """The method of backprop that a peer stands for, leaving out the share case["sparsity"] of the values; None if
    none."""
    zeros = case["sparsity"]
    precision = 8 if peer == "dithered-8-bit" else None
    if "net" in case and peer.startswith("dithered"):
        return backprop.Dithered(sparsity=zeros, precision=precision)
    return {
        "sparsetrain": lambda: None,
        "dithered": lambda: backprop.Dithered(s=_dither_step(zeros)),
        "dithered-8-bit": lambda: backprop.Dithered(s=_dither_step(zeros), precision=8),
        "resprop": lambda: backprop.ReSprop(reuse=min(zeros + MARGIN, 0.999), control="quantile"),
        "mem-aop": lambda: backprop.MemAOP(k=1 - zeros, memory=case.get("memory", False)),
        "top-k": lambda: backprop.TopK(k=1 - zeros),
    }[peer]()


def _dither_step(zeros):
    """The s that rounds so many values of a normal distribution to zero (papers.md: 1 - E min(1, |x| / s))."""

    def share(s):
        return 2 * (norm.cdf(s) - 0.5) - 2 / s * (norm.pdf(0) - norm.pdf(s))

    return brentq(lambda s: share(s) - zeros, 1e-3, 1e4)


def net(peer, case):
    """A whole training step with SGD, from a NumPy batch to updated weights."""
    model = getattr(nn.models, case["net"])(in_channels=case["image"][0])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values, dense = cases.net_weights(shapes, case)
    model.load_state_dict(model.state_dict() | values)
    if "weights" in case:
        interchange.zeros_to_structure(model)
    elif cases.weight_sparsity(case) > 0:
        # The removed weights are zero already, so the largest are those of the mask.
        st.sparsify(model, case["sparsity"], method="magnitude", exclude=dense)
    optimizer = st.optim.SGD(model.parameters(), **cases.SGD)
    first_bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    x, labels = cases.net_arrays(case)
    method = _method(peer, case)
    if method is not None:
        method.attach(model)

    def loss_and_gradients():
        optimizer.zero_grad()
        loss, dy = nn.cross_entropy(model(x), labels)
        model.backward(dy, input_gradient=False)
        return loss

    def step(_):
        loss_and_gradients()
        optimizer.step()

    def sample():
        return {"loss": [loss_and_gradients()], "first bias gradient": sampled(first_bias.grad)}

    about = {"parameters": shapes, "dense_layers": dense}
    if method is not None:
        for _ in range(SETTLE):
            step(None)
        method.report()
        step(None)
        layers = method.report().values()
        values = sum(layer["values"] for layer in layers)
        about["zeros"] = sum(layer["values"] * layer["gradient_sparsity"] for layer in layers) / values
        return Subject([lambda: timed_parts(step=step)], dict, about)  # trained by now, so nothing is comparable
    return Subject([lambda: timed_parts(step=step)], sample, about)

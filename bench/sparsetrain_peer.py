"""Our own side of the benchmarks: sparsetrain's layers and nets, as peers.py asks for them."""

import os

import cases
from subject import Subject, sampled, timed_parts

import sparsetrain as st
from sparsetrain import arrays, nn
from sparsetrain.sparse import SparseParameter

st.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

NO_HALO = (0, 0)


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
    if case["sparsity"] > 0:
        module.weight = SparseParameter.from_dense(weight, mask)
    else:
        module.weight.data[:] = weight
    x_blocked, dy_blocked = arrays.pack(x, module.halo), arrays.pack(dy, module.grad_halo)

    def inside_net():
        module.zero_grad()
        return timed_parts(
            forward=lambda _: module.forward(x_blocked, NO_HALO),
            backward=lambda result: result[1](dy_blocked, NO_HALO),
        )

    def from_numpy():
        module.zero_grad()
        return timed_parts(forward_numpy=lambda _: module(x), backward_numpy=lambda _: module.backward(dy))

    def sample():
        module.zero_grad()
        y, dx, dw = module(x), module.backward(dy), module.weight.grad
        dw = dw if case["sparsity"] > 0 else dw[mask]
        return {"y": sampled(y), "dx": sampled(dx), "dw": sampled(dw)}

    return Subject([inside_net, from_numpy], sample)


def net(peer, case):
    """A whole training step with SGD, from a NumPy batch to updated weights."""
    model = getattr(nn.models, case["net"])(in_channels=case["image"][0])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    values, dense = cases.net_weights(shapes, case)
    model.load_state_dict(model.state_dict() | values)
    if case["sparsity"] > 0:
        # The removed weights are zero already, so the largest are those of the mask.
        st.sparsify(model, case["sparsity"], method="magnitude", exclude=dense)
    optimizer = st.optim.SGD(model.parameters(), **cases.SGD)
    first_bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    x, labels = cases.net_arrays(case)

    def loss_and_gradients():
        model.zero_grad()
        loss, dy = nn.cross_entropy(model(x), labels)
        model.backward(dy, input_gradient=False)
        return loss

    def step(_):
        loss_and_gradients()
        optimizer.step()

    def sample():
        return {"loss": [loss_and_gradients()], "first bias gradient": sampled(first_bias.grad)}

    about = {"parameters": shapes, "dense_layers": dense}
    return Subject([lambda: timed_parts(step=step)], sample, about)

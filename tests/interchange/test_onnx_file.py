"""ONNX files: there and back, against onnxruntime where it is installed, and models that are refused."""

import os

import numpy as np
import pytest

import nets
from sparsetrain import data, manual_seed, nn, sparsify
from sparsetrain.interchange import load_state, read_onnx, write_onnx

onnx = pytest.importorskip("onnx")

MODELS = {
    "mlp": (nn.models.mlp, (1, 28, 28)),
    "lenet300": (nn.models.lenet300, (1, 28, 28)),
    "lenet5": (nn.models.lenet5, (1, 28, 28)),
    "small_cnn": (nn.models.small_cnn, (1, 28, 28)),
    "vgg11": (nn.models.vgg11, (3, 32, 32)),
    "resnet20": (nn.models.resnet20, (3, 32, 32)),
    "resnet18": (nn.models.resnet18, (3, 32, 32)),
    "resnet20_a": (nn.models.resnet20_a, (3, 32, 32)),
}


def runtime(path, x):
    """What onnxruntime gives for the inputs."""
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def images(shape, n=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def used(model):
    """The model with statistics and parameters of batch norms as after some training, in evaluation mode."""
    rng = np.random.default_rng(1)
    for _, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            size = module.num_features
            module.weight.data[...], module.bias.data[...] = rng.uniform(0.5, 1.5, size), rng.uniform(-0.5, 0.5, size)
            for name, buffer in module.named_buffers():
                if name.startswith("running"):
                    buffer[...] = rng.uniform(0.5, 1.5, size)
    return model.eval()


def close(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(1, abs(wanted).max()))


def there_and_back(path, model, shape):
    """Write, read, and compare; the model that was read."""
    write_onnx(path, model, shape)
    back = read_onnx(path).eval()
    for n in (1, 5):
        x = images(shape, n)
        close(back(x), model(x))
    return back


# ---- there and back


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """Name, model, shape of its images, and its file."""
    make, shape = MODELS[request.param]
    manual_seed(0)
    model, path = used(make()), tmp_path_factory.mktemp("onnx") / "a.onnx"
    write_onnx(path, model, shape)
    return request.param, model, shape, path


def test_every_model(written):
    _, model, shape, path = written
    back = read_onnx(path).eval()
    for n in (1, 5):
        x = images(shape, n)
        close(back(x), model(x))
    for one, other in zip(back.state_dict().values(), model.state_dict().values(), strict=True):
        if one.dtype == np.float32:  # counts of batches are not in the file
            np.testing.assert_array_equal(one, other)


def test_every_model_against_onnxruntime(written):
    _, model, shape, path = written
    for n in (1, 5):
        x = images(shape, n)
        close(runtime(path, x), model(x))


def test_shortcuts_without_weights(tmp_path):
    """A Slice and a Pad are one layer."""
    model = nn.models.resnet20_a()
    write_onnx(tmp_path / "a.onnx", model, (3, 32, 32))
    (found, wanted) = (
        [repr(module) for _, module in net.named_modules() if isinstance(module, nn.PadChannels)]
        for net in (read_onnx(tmp_path / "a.onnx"), model)
    )
    assert found == wanted == ["PadChannels(8, 8, stride=2)", "PadChannels(16, 16, stride=2)"]


LAYERS = {
    "convolution": lambda: [nn.Conv2d(4, 6, 3)],
    "no bias": lambda: [nn.Conv2d(4, 6, 3, bias=False)],
    "groups": lambda: [nn.Conv2d(4, 6, 3, groups=2)],
    "depthwise": lambda: [nn.Conv2d(4, 8, 3, groups=4, bias=False)],
    "dilation": lambda: [nn.Conv2d(4, 6, 3, dilation=(2, 1))],
    "padding": lambda: [nn.Conv2d(4, 6, (3, 5), padding=(1, 2))],
    "wide padding": lambda: [nn.Conv2d(4, 6, 2, padding=3)],
    "stride": lambda: [nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0))],
    "max pool": lambda: [nn.MaxPool2d(2)],
    "max pool with padding": lambda: [nn.MaxPool2d(3, 2, 1)],
    "avg pool": lambda: [nn.AvgPool2d(2)],
    "avg pool with padding": lambda: [nn.AvgPool2d(3, (2, 1), (1, 0))],
    "global pool": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "dropout": lambda: [nn.Dropout(0.5), nn.Conv2d(4, 6, 1), nn.Dropout(0.2)],
    "norm": lambda: [nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()],
    "linear": lambda: [nn.Flatten(), nn.Linear(4 * 9 * 8, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)],
    "norm of a linear layer": lambda: [nn.Flatten(), nn.Linear(4 * 9 * 8, 7), nn.BatchNorm1d(7), nn.ReLU()],
    "residual": lambda: [nn.Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())), nn.ReLU()],
    "residual at the end": lambda: [nn.Conv2d(4, 6, 1), nn.Residual(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))],
    "residual with a shortcut": lambda: [
        nn.Residual(nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()), nn.Conv2d(4, 6, 1, 2)),
    ],
    "a longer shortcut": lambda: [
        nn.Residual(nn.Conv2d(4, 6, 3, 2, 1), nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6), nn.ReLU())),
    ],
    "residual within a residual": lambda: [
        nn.Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())),
                                  nn.ReLU())),
    ],
    "residual after residual": lambda: [nn.Residual(nn.Conv2d(4, 4, 1)), nn.Residual(nn.Conv2d(4, 4, 1))],
    "channels of zeros": lambda: [nn.PadChannels(1, 0, stride=1), nn.Conv2d(5, 6, 1), nn.PadChannels(0, 2, stride=1)],
    "every third pixel": lambda: [nn.PadChannels(2, 1, stride=3), nn.PadChannels(0, 1, stride=2), nn.Conv2d(8, 6, 1)],
    "norm of a linear layer in a block": lambda: [
        nn.Flatten(), nn.Residual(nn.Sequential(nn.Linear(4 * 9 * 8, 4 * 9 * 8), nn.BatchNorm1d(4 * 9 * 8))),
    ],
    "nested": lambda: [nn.Sequential(nn.Conv2d(4, 6, 1), nn.Sequential(nn.ReLU())), nn.MaxPool2d(2)],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(tmp_path, name):
    manual_seed(0)
    model, path = used(nn.Sequential(*LAYERS[name]())), tmp_path / "a.onnx"
    there_and_back(path, model, (4, 9, 8))
    x = images((4, 9, 8))
    close(runtime(path, x), model(x))


def test_what_is_written(tmp_path):
    """An inference graph for any N that the checker takes, whatever mode the model is in; the model stays as it is."""
    model, path = used(nn.models.small_cnn()).train(), tmp_path / "a.onnx"
    before = model.state_dict()
    write_onnx(path, model, (1, 28, 28))
    assert all(module.training for _, module in model.named_modules())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*made.graph.input, *made.graph.output)]  # fmt: skip
    assert shapes == [["N", 1, 28, 28], ["N", 10]]
    x = images((1, 28, 28))
    close(runtime(path, x), model.eval()(x))
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_weights(tmp_path, dtype):
    """Written dense, with a zero where none is stored; as float32."""
    path = tmp_path / "a.onnx"
    model = used(sparsify(nn.models.small_cnn(width=8), 0.9)).to(dtype)
    write_onnx(path, model, (1, 28, 28))
    back = read_onnx(path).eval()
    zeros = 0
    for (name, one), other in zip(back.named_parameters(), model.parameters(), strict=True):
        assert one.data.dtype == np.float32
        np.testing.assert_array_equal(one.to_dense(), other.to_dense().astype(np.float32), err_msg=name)
        zeros += (one.to_dense() == 0).sum()
    assert zeros > 1000
    x = images((1, 28, 28))
    close(runtime(path, x), model(x.astype(dtype)).astype(np.float32))


def test_what_cannot_be_written(tmp_path):
    class Mine(nn.ReLU):
        pass

    for layer, message in (
        (Mine(), "a layer of class Mine has no ONNX operator"),
        (nn.AdaptiveAvgPool2d((2, 1)), r"AdaptiveAvgPool2d to \(2, 1\) has no ONNX operator, only to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_onnx(tmp_path / "a.onnx", nn.Sequential(nn.Conv2d(3, 4, 1), layer), (3, 8, 8))
    with pytest.raises(ValueError):
        write_onnx(tmp_path / "a.onnx", nets.small_net(), (3, 8, 8))
    with pytest.raises(ValueError):  # images that the model does not take
        write_onnx(tmp_path / "a.onnx", nn.models.small_cnn(), (3, 28, 28))
    assert not any(tmp_path.iterdir())


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"sparsetrain\[onnx\]"):
        write_onnx(tmp_path / "a.onnx", nn.models.lenet300(), (1, 28, 28))
    with pytest.raises(ImportError, match=r"sparsetrain\[onnx\]"):
        read_onnx(tmp_path / "a.onnx")


# ---- models of others

N = onnx.helper.make_node


def rand(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def model_of(path, nodes, constants=None, x=(2, 3, 6, 6), y=2, inputs=(), outputs=(), opset=17, domains=()):
    """A file of this graph, which reads x and gives y. y: the number of its axes."""
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("x", kind, x), *(value(name, kind, x) for name in inputs)],
        [value("y", kind, [None] * y), *(value(name, kind, [None] * y) for name in outputs)],
        [
            t if isinstance(t, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(t), n)
            for n, t in (constants or {}).items()
        ],
    )
    opsets = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(name, 1) for name in domains)]
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


READ = {
    "gemm that is not transposed": ([N("Gemm", ["x", "w", "b"], ["y"])], {"w": rand(3, 5), "b": rand(5)}, (2, 3)),
    "matmul and add": (
        [N("MatMul", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["y"])], {"w": rand(3, 5), "b": rand(1, 5)}, (2, 3),
    ),
    "add from the left": (
        [N("Gemm", ["x", "w"], ["a"]), N("Add", ["b", "a"], ["y"])], {"w": rand(3, 5), "b": rand(5)}, (2, 3),
    ),
    "convolution and add": (
        [N("Conv", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["y"])], {"w": rand(5, 3, 2, 2), "b": rand(5, 1, 1)},
    ),
    "add to a bias": (
        [N("Conv", ["x", "w", "c"], ["a"]), N("Add", ["a", "b"], ["y"])],
        {"w": rand(5, 3, 2, 2), "b": rand(1, 5, 1, 1), "c": rand(5)},
    ),
    "even pads": (
        [N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER")], {"w": rand(5, 3, 3, 5)},
    ),
    "no pads": ([N("MaxPool", ["x"], ["y"], auto_pad="VALID", kernel_shape=[2, 3])], {}),
    "constants as nodes": (
        [N("Constant", [], ["w"], value=onnx.numpy_helper.from_array(rand(5, 3, 1, 1))), N("Conv", ["x", "w"], ["y"])],
        {},
    ),
    "reshape of a constant": (
        [N("Reshape", ["w", "s"], ["v"]), N("MatMul", ["x", "v"], ["y"])], {"w": rand(5, 3), "s": np.array([3, -1])},
        (2, 3),
    ),
    "reshape to features": (
        [N("Reshape", ["x", "s"], ["r"]), N("MatMul", ["r", "w"], ["y"])], {"w": rand(108, 5), "s": np.array([0, -1])},
    ),
    "identities": ([N("Identity", ["x"], ["i"]), N("Dropout", ["i"], ["d"]), N("Relu", ["d"], ["y"])], {}),
    "a graph that goes on": ([N("Relu", ["x"], ["y"]), N("Sigmoid", ["y"], ["z"])], {}),
    "add to the first layer of a block": (
        [N("Conv", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["c"]), N("Add", ["c", "x"], ["y"])],
        {"w": rand(3, 3, 1, 1), "b": rand(3, 1, 1)},
    ),
    "zeros around zeros": (
        [N("Pad", ["x", "p", "v"], ["a"]), N("Pad", ["a", "p"], ["b"], mode="constant"), N("Relu", ["b"], ["y"])],
        {"p": np.array([0, 1, 0, 0, 0, 2, 0, 0]), "v": np.zeros((), np.float32)},
    ),
    "a residual of the input": ([N("Relu", ["x"], ["r"]), N("Add", ["r", "x"], ["y"])], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_other_programs_write(tmp_path, name):
    nodes, constants, *x = READ[name]
    shape = x[0] if x else (2, 3, 6, 6)
    y = 2 if len(shape) == 2 or nodes[-1].op_type == "MatMul" else 4
    path = model_of(tmp_path / "a.onnx", nodes, constants, shape, y)
    model, inputs = read_onnx(path).eval(), images(shape[1:], 2)
    close(model(inputs), runtime(path, inputs))


NODES = {
    "an operator": ([N("Sigmoid", ["x"], ["y"], name="squash")], {}, "node squash is a Sigmoid which no layer does"),
    "no name": ([N("Relu", ["x"], ["a"]), N("Tanh", ["a"], ["y"])], {}, "node y is a Tanh which no layer does"),
    "uneven pads": ([N("Conv", ["x", "w"], ["y"], name="c", pads=[0, 1, 1, 1])], {"w": rand(5, 3, 3, 3)},
                    r"node c is a Conv with uneven pads \(0, 1, 1, 1\)"),
    "auto_pad": ([N("MaxPool", ["x"], ["y"], name="p", kernel_shape=[2, 2], auto_pad="SAME_LOWER")], {},
                 "node p is a MaxPool with auto_pad SAME_LOWER that pads unevenly"),
    "ceil_mode": ([N("MaxPool", ["x"], ["y"], name="p", kernel_shape=[2, 2], ceil_mode=1)], {},
                  "node p is a MaxPool with ceil_mode"),
    "dilations": ([N("MaxPool", ["x"], ["y"], name="p", kernel_shape=[2, 2], dilations=[2, 2])], {},
                  "node p is a MaxPool with dilations or indices"),
    "indices": ([N("MaxPool", ["x"], ["y", "i"], name="p", kernel_shape=[2, 2])], {}, "with dilations or indices"),
    "padding not counted": ([N("AveragePool", ["x"], ["y"], name="p", kernel_shape=[3, 3], pads=[1] * 4)], {},
                            "node p is a AveragePool that does not count its padding"),
    "one dimension": ([N("MaxPool", ["x"], ["y"], name="p", kernel_shape=[2])], {}, r"with a kernel of shape \(2,\)"),
    "three dimensions": ([N("Conv", ["x", "w"], ["y"], name="c")], {"w": rand(2, 3, 1, 1, 1)},
                         r"node c is a Conv with a kernel of shape \(1, 1, 1\)"),
    "weights that are computed": ([N("Relu", ["w"], ["v"]), N("Conv", ["x", "v"], ["y"], name="c")],
                                  {"w": rand(5, 3, 1, 1)}, "node c is a Conv whose input v is no constant"),
    "flatten": ([N("Flatten", ["x"], ["y"], name="f", axis=2)], {}, "node f is a Flatten from axis 2"),
    "reshape": ([N("Reshape", ["x", "s"], ["y"], name="r")], {"s": np.array([0, 3, 36])},
                "node r is a Reshape to"),
    "reshape to one row of many": ([N("Reshape", ["x", "s"], ["y"], name="r")], {"s": np.array([2, 108])},
                                   "node r is a Reshape to"),
    "alpha": ([N("Flatten", ["x"], ["a"]), N("Gemm", ["a", "w"], ["y"], name="g", alpha=0.5)], {"w": rand(108, 3)},
              "node g is a Gemm with alpha, beta or transA"),
    "a product by three axes": ([N("MatMul", ["x", "w"], ["y"], name="m")], {"w": rand(1, 6, 2)},
                                r"node m is a MatMul by an array of shape \(1, 6, 2\)"),
    "a constant first": ([N("Add", ["x", "b"], ["y"], name="a")], {"b": rand(1)},
                         "node a is a Add of a constant that follows no convolution or linear layer"),
    "a constant of another shape": ([N("Conv", ["x", "w"], ["c"]), N("Add", ["c", "b"], ["y"], name="a")],
                                    {"w": rand(5, 3, 1, 1), "b": rand(6, 6)},
                                    r"node a is a Add of a constant of shape \(6, 6\) to 5 channels"),
    "a sum with itself": ([N("Relu", ["x"], ["a"]), N("Add", ["a", "a"], ["y"])], {}, "y is not reached"),
    "a part of the image": ([N("Slice", ["x", "s", "e", "a"], ["y"], name="s")],
                            {"s": np.array([0, 0]), "e": np.array([2**31 - 1] * 2), "a": np.array([2, 3])},
                            "node s is a Slice of another part than every n-th row and column"),
    "every second row": ([N("Slice", ["x", "s", "e", "a", "t"], ["y"], name="s")],
                         {"s": np.array([0, 0]), "e": np.array([2**63 - 1] * 2), "a": np.array([2, 3]),
                          "t": np.array([2, 1])}, "node s is a Slice of another part"),
    "pixels around": ([N("Pad", ["x", "p"], ["y"], name="p")], {"p": np.array([0, 1, 1, 1, 0, 1, 1, 1])},
                      "node p is a Pad by anything but channels of zeros"),
    "channels of ones": ([N("Pad", ["x", "p", "v"], ["y"], name="p")],
                         {"p": np.array([0, 1, 0, 0, 0, 1, 0, 0]), "v": np.ones((), np.float32)}, "node p is a Pad by"),
    "channels again": ([N("Pad", ["x", "p"], ["y"], name="p", mode="reflect")],
                       {"p": np.array([0, 1, 0, 0, 0, 1, 0, 0])}, "node p is a Pad by"),
    "fewer channels": ([N("Pad", ["x", "p"], ["y"], name="p")], {"p": np.array([0, -1, 0, 0, 0, 0, 0, 0])},
                       "node p is a Pad that is malformed.*before is -1"),
    "a product of branches": ([N("Relu", ["x"], ["a"]), N("Mul", ["a", "x"], ["y"], name="m")], {},
                              "node m is a Mul which no layer does"),
    "three branches": ([N("Relu", ["x"], ["a"]), N("Relu", ["x"], ["b"]), N("Relu", ["x"], ["c"]),
                        N("Add", ["a", "b"], ["d"]), N("Add", ["d", "c"], ["y"])], {}, "x is read by 3 nodes"),
    "branches that do not meet": ([N("Relu", ["x"], ["a"]), N("Relu", ["x"], ["b"]), N("Relu", ["a"], ["y"])], {},
                                  "nothing reads"),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_the_node_that_is_not_supported_is_named(tmp_path, name):
    nodes, constants, message = NODES[name]
    path = model_of(tmp_path / "a.onnx", nodes, constants, y=4)
    with pytest.raises(ValueError, match=f"a.onnx.*{message}"):
        read_onnx(path)


def test_inputs_and_outputs(tmp_path):
    path = tmp_path / "a.onnx"
    model_of(path, [N("Add", ["x", "z"], ["y"])], y=4, inputs=["z"])
    with pytest.raises(ValueError, match="a.onnx has 2 inputs and 1 outputs, must have one of each"):
        read_onnx(path)
    model_of(path, [N("Relu", ["x"], ["y"]), N("Relu", ["y"], ["z"])], y=4, outputs=["z"])
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        read_onnx(path)


def test_weights_in_another_file(tmp_path, monkeypatch):
    tensor = onnx.numpy_helper.from_array(rand(5, 3, 1, 1), "w")
    model_of(tmp_path / "a.onnx", [N("Conv", ["x", "w"], ["y"])], {"w": tensor}, y=4)
    model = onnx.load(tmp_path / "a.onnx")
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").is_file()
    with pytest.raises(ValueError, match="b.onnx.*weights.bin"):  # onnx looks for it in the current folder
        read_onnx(tmp_path / "b.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="b.onnx: w lies in another file, which is not supported"):
        read_onnx("b.onnx")


@pytest.mark.parametrize("contents", [b"", b"hello\n", bytes(100), b"\xff" * 100, b"PK\x03\x04"])
def test_no_file_of_onnx(tmp_path, contents):
    (tmp_path / "a.onnx").write_bytes(contents)
    with pytest.raises(ValueError, match="a.onnx is not a sound ONNX model"):
        read_onnx(tmp_path / "a.onnx")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(OSError):
        read_onnx(tmp_path / "a.onnx")
    with pytest.raises(OSError):
        read_onnx(tmp_path)


def test_cut_files(tmp_path):
    write_onnx(tmp_path / "a.onnx", used(nn.Sequential(*LAYERS["residual with a shortcut"]())), (4, 9, 8))
    contents = (tmp_path / "a.onnx").read_bytes()
    for length in range(0, len(contents) - 1, len(contents) // 40):
        (tmp_path / "b.onnx").write_bytes(contents[:length])
        with pytest.raises(ValueError, match="b.onnx"):
            read_onnx(tmp_path / "b.onnx")


def test_changed_bytes(tmp_path):
    """Most changes are of weights; the others are a ValueError."""
    layers = [nn.Conv2d(2, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Residual(nn.Conv2d(2, 2, 1))]
    write_onnx(tmp_path / "a.onnx", used(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))), (2, 3, 3))
    contents, rng = (tmp_path / "a.onnx").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(contents)
        for at in rng.integers(0, len(contents), rng.integers(1, 4)):
            changed[at] = rng.integers(0, 256)
        (tmp_path / "b.onnx").write_bytes(changed)
        try:
            assert isinstance(read_onnx(tmp_path / "b.onnx"), nn.Sequential)
        except ValueError as error:
            assert str(error)


KINDS = (
    "Add", "AveragePool", "BatchNormalization", "Constant", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul",
    "MaxPool", "Pad", "Relu", "Reshape", "Slice",
)  # fmt: skip


def changed(model, rng):
    """A copy with one to three other attributes, operators, inputs, outputs, shapes or types."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph, sizes = model.graph, (-1, 0, 1, 2, 3, 7, 2**31, 2**40)
    values = [*(t.name for t in graph.initializer), *(n.output[0] for n in graph.node), "x", ""]
    for _ in range(rng.integers(1, 4)):
        node, tensor = (some[rng.integers(len(some))] for some in (graph.node, graph.initializer))
        kind = rng.integers(7)
        if kind == 0:
            node.op_type = rng.choice(KINDS)
        elif kind == 1 and node.input:
            node.input[rng.integers(len(node.input))] = rng.choice(values)
        elif kind == 2 and node.input:
            del node.input[rng.integers(len(node.input))]
        elif kind == 3:
            node.output[0] = rng.choice(values)
        elif kind == 4 and tensor.dims:
            tensor.dims[rng.integers(len(tensor.dims))] = rng.choice(sizes)
        elif kind == 5:
            tensor.data_type = int(rng.integers(25))
        elif kind == 6:
            for attribute in node.attribute:
                for i in range(len(attribute.ints)):
                    attribute.ints[i] = rng.choice(sizes)
    return model


def test_changed_graphs(tmp_path):
    """They are a ValueError that names the file, or another model."""
    layers = [nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Residual(nn.Conv2d(2, 2, 1)), nn.PadChannels(1, 1, stride=2)]
    write_onnx(tmp_path / "a.onnx", used(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))), (2, 3, 3))
    model, rng = onnx.load(tmp_path / "a.onnx"), np.random.default_rng(0)
    for _ in range(500):
        (tmp_path / "b.onnx").write_bytes(changed(model, rng).SerializeToString())
        try:
            assert isinstance(read_onnx(tmp_path / "b.onnx"), nn.Sequential)
        except ValueError as error:
            assert "b.onnx" in str(error)


def test_blocks_within_blocks(tmp_path):
    depth = 2000
    into = [N("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"]) for i in range(depth)]
    out = [N("Add", [f"y{i + 1}" if i + 1 < depth else f"x{depth}", f"x{i}" if i else "x"], [f"y{i}" if i else "y"])
           for i in reversed(range(depth))]  # fmt: skip
    with pytest.raises(ValueError, match="a.onnx has residual blocks within residual blocks"):
        read_onnx(model_of(tmp_path / "a.onnx", into + out, y=4))


@pytest.mark.parametrize("features", [1_200_000_000, 18])
def test_features_are_counted_without_images(tmp_path, monkeypatch, features):
    """A file of some bytes can name an image of any size."""

    def run(*_):
        raise AssertionError("the model runs")

    monkeypatch.setattr(nn.Module, "__call__", run)
    path = model_of(tmp_path / "a.onnx", [N("Relu", ["x"], ["r"]), N("Reshape", ["r", "s"], ["y"])],
                    {"s": np.array([-1, features])}, (1, 3, 20_000, 20_000))  # fmt: skip
    if features == 18:
        with pytest.raises(ValueError, match="a.onnx: node y is a Reshape to 18 features of 1200000000"):
            read_onnx(path)
    else:
        assert repr(read_onnx(path)) == repr(nn.Sequential(nn.ReLU(), nn.Flatten()))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Dropout(0.5))])
def test_nothing_to_write(tmp_path, model):
    with pytest.raises(ValueError, match="a model of class Sequential without layers that predict has no ONNX graph"):
        write_onnx(tmp_path / "a.onnx", model, (3,))


def test_mnist_of_the_model_zoo():
    folder = os.environ.get(data.sets.ENVIRONMENT)
    path = os.path.join(folder or "", "weights", "mnist-8.onnx")
    if not folder or not os.path.isfile(path):
        pytest.skip(f"mnist-8.onnx is not in the weights folder of {data.sets.ENVIRONMENT}")
    model, x = read_onnx(path).eval(), 255 * images((1, 28, 28), 20)
    wanted = np.concatenate([runtime(path, one[None]) for one in x])  # it is of one image
    close(model(x), wanted)
    close(model(x[:1]), wanted[:1])
    other = read_onnx(path).eval()
    close(load_state(other, model.state_dict())(x), wanted)


# ---- known faults


FAULTS = {
    "a constant of numbers": (
        [N("Constant", [], ["s"], value_ints=[0, -1]), N("Reshape", ["x", "s"], ["y"])], {}, {}, "KeyError",
    ),
    "an operator of another domain": (
        [N("Branch", ["x"], ["y"], domain="mine")], {}, {"domains": ["mine"]}, "methods of the reader are taken",
    ),
    "a known name in another domain": (
        [N("Relu", ["x"], ["y"], domain="mine")], {}, {"domains": ["mine"]}, "read as the operator of ONNX",
    ),
    "weights of one axis": (
        [N("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3])], {"w": rand(4)}, {}, "IndexError",
    ),
    "a product by a vector": ([N("Gemm", ["x", "w"], ["y"])], {"w": rand(3)}, {"x": (2, 3)}, "TypeError"),
    "a product by three axes": ([N("Gemm", ["x", "w"], ["y"])], {"w": rand(3, 2, 2)}, {"x": (2, 3)}, "TypeError"),
    "another kernel than the weights": (
        [N("Conv", ["x", "w"], ["y"], kernel_shape=[5, 5])], {"w": rand(4, 3, 3, 3)}, {}, "kernel_size is wrong",
    ),
    "dilations of an average": (
        [N("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])], {}, {"opset": 19},
        "read as if it had none",
    ),
    "a column of biases": (
        [N("Gemm", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["y"])], {"w": rand(3, 4), "b": rand(4, 1)},
        {"x": (4, 3)}, "read as biases of outputs",
    ),
    "a bias for each image": (
        [N("Conv", ["x", "w"], ["a"]), N("Add", ["a", "b"], ["y"])], {"w": rand(2, 3, 1, 1), "b": rand(2, 1, 1, 1)},
        {}, "read as biases of channels",
    ),
    "a shape of two axes": (
        [N("Reshape", ["w", "s"], ["v"]), N("MatMul", ["x", "v"], ["y"])],
        {"w": rand(5, 3), "s": np.array([[3, 5]])}, {"x": (2, 3)}, "TypeError",
    ),
    "a shape of another size": (
        [N("Reshape", ["w", "s"], ["v"]), N("MatMul", ["x", "v"], ["y"])],
        {"w": rand(5, 3), "s": np.array([4, 5])}, {"x": (2, 3)}, "an error without the file",
    ),
    "no output": (
        [N("Branch", ["x"], [], domain="mine"), N("Relu", ["x"], ["y"])], {}, {"domains": ["mine"]}, "IndexError",
    ),
    "reshape to more rows": (
        [N("Reshape", ["x", "s"], ["y"])], {"s": np.array([-1, 6])}, {}, "read as a Flatten",
    ),
    "reshape to more rows of any size": (
        [N("Reshape", ["x", "s"], ["y"])], {"s": np.array([-1, 6])}, {"x": (None, 3, None, None)}, "read as a Flatten",
    ),
    "all images to one": (
        [N("Reshape", ["x", "s"], ["y"])], {"s": np.array([1, -1])}, {}, "read as a Flatten",
    ),
    "an addend for each image": (
        [N("Gemm", ["x", "w", "b"], ["y"])], {"w": rand(3, 4), "b": rand(4, 1)}, {"x": (4, 3)},
        "read as biases of outputs",
    ),
    "a norm of training": (
        [N("BatchNormalization", ["x", *"wwww"], ["y"], training_mode=1)], {"w": rand(3)}, {},
        "read as one that predicts",
    ),
    "a dropout of training": (
        [N("Dropout", ["x", "r", "t"], ["y"])], {"r": np.float32(0.5), "t": np.bool_(True)}, {},
        "read as one that predicts",
    ),
    "a norm of sequences": (
        [N("BatchNormalization", ["x", *"wwww"], ["y"])], {"w": rand(3)}, {"x": (2, 3, 5)}, "read as of images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_reader(tmp_path, name):
    nodes, constants, settings, _ = FAULTS[name]
    path = model_of(tmp_path / "a.onnx", nodes, constants, **settings)
    with pytest.raises(ValueError, match="a.onnx"):
        read_onnx(path)


def test_norms_of_features(tmp_path):
    """Wherever they stand: first, after another, at a block's begin and behind its end."""
    block = nn.Residual(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)))
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), block, nn.BatchNorm1d(6), nn.Linear(6, 6))
    there_and_back(tmp_path / "a.onnx", used(model), (6,))


def test_norms_of_flat_images(tmp_path):
    there_and_back(tmp_path / "a.onnx", used(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))), (3, 2, 2))

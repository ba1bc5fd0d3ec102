"""ONNX models made of the layers we have, both ways. Needs the onnx package ([onnx] extra)."""

import contextlib
import math

import numpy as np

from sparsetrain import nn
from sparsetrain.files import replacing

OPSET = 17
SLICE_END = 2**31 - 1  # or more: to the end of an axis
READS = (
    "Add (of a bias, or of a residual block)", "AveragePool", "BatchNormalization", "Conv", "Dropout", "Flatten",
    "Gemm", "GlobalAveragePool", "Identity", "MatMul", "MaxPool", "Pad (channels of zeros)", "Relu",
    "Reshape (to (N, features))", "Slice (every n-th row and column)",
)  # fmt: skip


def _onnx():
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX models need the onnx package: pip install 'sparsetrain[onnx]'") from None
    return onnx


# ---- reading


def read_onnx(path):
    """The Sequential of an ONNX model: a chain of the operators READS, in which an Add may join a block's input to its
    output. ValueError names the node and what of it is not supported, or says that the file is damaged."""
    onnx = _onnx()
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # of protobuf or of onnx; they have no base in common
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} is not a sound ONNX model: {error}") from error
    try:
        return _Graph(onnx, path, model).sequential()
    except RecursionError:
        raise ValueError(f"{path} has residual blocks within residual blocks, too many to be read") from None


class _Unsupported(ValueError):
    """An error that names the file already."""


class _Graph:
    def __init__(self, onnx, path, model):
        self.onnx, self.path, self.model, graph = onnx, path, model, model.graph
        self.constants = {}
        for tensor in graph.initializer:
            self.constants[tensor.name] = self._array(tensor)
        self.nodes = []
        for node in graph.node:
            with self._blamed(node):
                if node.op_type == "Constant":
                    if "value" not in self._attributes(node):
                        raise self._unsupported(node, "that is no tensor")
                    self.constants[node.output[0]] = self._array(self._attributes(node)["value"])
                elif node.op_type == "Reshape" and all(name in self.constants for name in node.input[:2]):
                    values, shape = (self.constants[name] for name in node.input)
                    self.constants[node.output[0]] = values.reshape([int(n) for n in shape])
                else:
                    self.nodes.append(node)
        inputs = [i.name for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ValueError(f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs, must have one of each")
        self.first, self.last = inputs[0], graph.output[0].name
        self.features = []  # (features, node) of each Reshape that names them
        axes = next(i for i in graph.input if i.name == self.first).type.tensor_type.shape.dim
        self.images = axes[0].dim_value if axes else 0  # in a batch, 0 if any number
        self.ranks = {self.first: len(axes)}  # of the values that are reached

    def _array(self, tensor):
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise _Unsupported(f"{self.path}: {tensor.name} lies in another file, which is not supported")
        try:
            return self.onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # whatever a forged type or shape can bring onnx and NumPy to
            raise _Unsupported(f"{self.path}: {tensor.name} is no array that can be read: {error}") from error

    @contextlib.contextmanager
    def _blamed(self, node):
        """Within it, an error is said to be the node's."""
        try:
            yield
        except _Unsupported:
            raise
        except Exception as error:
            raise self._unsupported(node, f"that is malformed ({error})") from error

    def sequential(self):
        layers, at = self._chain(self.first, {self.last})
        if at != self.last:
            raise ValueError(f"{self.path}: the output {self.last} is not reached from the input")
        model = nn.Sequential(*layers)
        if self.features:
            self._check_features()
        return model

    def _check_features(self):
        """ValueError where a Reshape makes another number of features than an image has, as onnx infers from the input.

        The model is not run for it: a small file may name huge images.
        """
        try:
            del self.model.graph.value_info[:]  # the shapes that the file says
            graph = self.onnx.shape_inference.infer_shapes(self.model).graph
        except Exception as error:  # of onnx or protobuf, as above
            raise ValueError(f"{self.path} has shapes that do not fit: {error}") from error
        values = (*graph.input, *graph.value_info)
        shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim[1:]] for value in values}
        for features, node in self.features:
            known = math.prod(shapes.get(node.input[0], [0]))  # 0 where it is not
            if features != known and (known or self.constants[node.input[1]][0] == -1):
                raise self._unsupported(node, f"to {features} features of {known or 'an unknown number'}")

    def _readers(self, name):
        return [node for node in self.nodes if name in node.input]

    def _chain(self, at, ends, layers=()):
        """`layers` and those from a value on, up to one of the values `ends` or an Add of two branches; and where."""
        layers = list(layers)
        while at not in ends:
            readers = self._readers(at)
            if not readers:
                raise ValueError(f"{self.path}: nothing reads {at}, which is not the output")
            if len(readers) > 1:
                block, at = self._residual(at, readers)
                layers.append(block)
                continue
            (node,) = readers
            if node.op_type == "Add" and not any(name in self.constants for name in node.input):
                return layers, at  # the end of a branch
            made = self._layer(node, layers)
            layers += made
            at = node.output[0]
        return layers, at

    def _residual(self, at, readers):
        """The Residual that begins at a value with two readers."""
        if len(readers) != 2:
            raise ValueError(
                f"{self.path}: {at} is read by {len(readers)} nodes, only residual blocks of two are supported"
            )
        joins = [n for n in readers if n.op_type == "Add" and at in n.input and self._constant_of(n) is None]
        if joins:
            (other,) = [n for n in readers if n is not joins[0]] or readers[:1]
            body, end = self._branch(other)
            join, shortcut = joins[0], None
        else:
            (body, end), (around, other_end) = (self._branch(n) for n in readers)
            join = self._readers(end)[0]
            if other_end not in join.input:
                raise ValueError(f"{self.path}: the branches from {at} do not meet in one Add")
            if len(around) > len(body):
                body, around = around, body
            shortcut = around[0] if len(around) == 1 else nn.Sequential(*around)
        if end not in join.input:
            raise ValueError(f"{self.path}: the branches from {at} do not meet in one Add")
        self.ranks[join.output[0]] = self.ranks[end]
        return nn.Residual(nn.Sequential(*body), shortcut), join.output[0]

    def _branch(self, node):
        layers = self._layer(node, [])
        return self._chain(node.output[0], set(), layers)

    def _constant_of(self, node):
        return next((self.constants[name] for name in node.input if name in self.constants), None)

    def _attributes(self, node):
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}

    def _unsupported(self, node, what):
        name = f"node {node.name or ', '.join(node.output)}"
        return _Unsupported(f"{self.path}: {name} is a {node.op_type} {what}; supported are {', '.join(READS)}")

    def _layer(self, node, before):
        """The layers of a node, [] if it goes into the last of those before it."""
        make = self.makers.get(node.op_type)
        if make is None or node.domain not in ("", "ai.onnx"):
            raise self._unsupported(node, "which no layer does")
        with self._blamed(node):
            made = make(self, node, self._attributes(node), before)
            of_input = next(self.ranks[name] for name in node.input if name in self.ranks)
            self.ranks[node.output[0]] = 2 if node.op_type in ("Flatten", "Gemm", "Reshape") else of_input
        return made if isinstance(made, list) else [made]

    def _constant(self, node, index):
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name not in self.constants:
            raise self._unsupported(node, f"whose input {name} is no constant")
        return self.constants[name]

    def _weights(self, node, index):
        array = self._constant(node, index)
        return None if array is None else np.asarray(array, np.float32)

    def _integers(self, node, index):
        array = self._constant(node, index)
        return () if array is None else tuple(int(n) for n in array)

    def _window(self, node, about):
        """Kernel, stride and padding of a Conv or a pooling."""
        kernel = about["kernel_shape"]
        if len(kernel) != 2:
            raise self._unsupported(node, f"with a kernel of shape {tuple(kernel)}")
        strides, dilations = tuple(about.get("strides", (1, 1))), tuple(about.get("dilations", (1, 1)))
        auto = about.get("auto_pad", b"NOTSET").decode()
        pads = about.get("pads", (0, 0, 0, 0))
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            if strides != (1, 1) or any(r % 2 for r in reach):
                raise self._unsupported(node, f"with auto_pad {auto} that pads unevenly")
            pads = (reach[0] // 2, reach[1] // 2) * 2
        if tuple(pads[:2]) != tuple(pads[2:]):
            raise self._unsupported(node, f"with uneven pads {tuple(pads)}")
        if about.get("ceil_mode"):
            raise self._unsupported(node, "with ceil_mode")
        return tuple(kernel), strides, tuple(pads[:2]), dilations

    def _conv(self, node, about, before):
        weight, bias = self._weights(node, 1), self._weights(node, 2)
        kernel, stride, padding, dilation = self._window(node, {"kernel_shape": weight.shape[2:], **about})
        groups = about.get("group", 1)
        if weight.ndim != 4 or kernel != weight.shape[2:]:
            raise self._unsupported(node, f"with a kernel {kernel} and weights of shape {weight.shape}")
        layer = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, dilation, groups, bias is not None
        )
        return _filled(layer, weight, bias)

    def _gemm(self, node, about, before):
        weight, bias = self._weights(node, 1), self._weights(node, 2)
        if about.get("alpha", 1.0) != 1.0 or about.get("beta", 1.0) != 1.0 or about.get("transA"):
            raise self._unsupported(node, "with alpha, beta or transA")
        if weight.ndim != 2:
            raise self._unsupported(node, f"by an array of shape {weight.shape}")
        weight = weight if about.get("transB") else weight.T
        if bias is not None and (bias.size not in (1, len(weight)) or any(n != 1 for n in bias.shape[:-1])):
            raise self._unsupported(node, f"with an addend of shape {bias.shape} to {len(weight)} features")
        return _filled(nn.Linear(*weight.shape[::-1], bias=bias is not None), weight, bias)

    def _matmul(self, node, about, before):
        weight = self._weights(node, 1)
        if weight.ndim != 2:
            raise self._unsupported(node, f"by an array of shape {weight.shape}")
        return _filled(nn.Linear(*weight.shape, bias=False), weight.T, None)

    def _add(self, node, about, before):
        bias = self._constant_of(node)
        layer = before[-1] if before else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            raise self._unsupported(node, "of a constant that follows no convolution or linear layer")
        size = layer.weight.shape[0]
        shape = (size, 1, 1) if isinstance(layer, nn.Conv2d) else (size,)
        if bias.shape not in (shape, (1, *shape)):
            raise self._unsupported(node, f"of a constant of shape {bias.shape} to {size} channels")
        bias = np.asarray(bias, np.float32).reshape(size)
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias.data + bias)
        return []

    def _batchnormalization(self, node, about, before):
        gamma, beta, mean, var = (self._weights(node, i) for i in range(1, 5))
        if about.get("training_mode") or not about.get("spatial", 1):
            raise self._unsupported(node, "of training, or of each value by itself")
        rank = self.ranks[node.input[0]]
        if rank not in (2, 4):
            raise self._unsupported(node, f"of arrays of {rank} dimensions")
        kind = nn.BatchNorm1d if rank == 2 else nn.BatchNorm2d
        layer = kind(len(gamma), eps=float(about.get("epsilon", 1e-5)))
        _filled(layer, gamma, beta)
        buffers = dict(layer.named_buffers())
        buffers["running_mean"][...], buffers["running_var"][...] = mean, var
        return layer

    def _relu(self, node, about, before):
        return nn.ReLU()

    def _maxpool(self, node, about, before):
        kernel, stride, padding, dilation = self._window(node, about)
        if dilation != (1, 1) or len(node.output) > 1:
            raise self._unsupported(node, "with dilations or indices")
        return nn.MaxPool2d(kernel, stride, padding)

    def _averagepool(self, node, about, before):
        kernel, stride, padding, dilation = self._window(node, about)
        if dilation != (1, 1):
            raise self._unsupported(node, "with dilations")
        if padding != (0, 0) and not about.get("count_include_pad"):
            raise self._unsupported(node, "that does not count its padding")
        return nn.AvgPool2d(kernel, stride, padding)

    def _globalaveragepool(self, node, about, before):
        return nn.AdaptiveAvgPool2d(1)

    def _flatten(self, node, about, before):
        if about.get("axis", 1) != 1:
            raise self._unsupported(node, f"from axis {about['axis']}")
        return nn.Flatten()

    def _reshape(self, node, about, before):
        shape = self.constants.get(node.input[1])
        if shape is None or len(shape) != 2 or shape[0] not in (-1, 0, 1):
            raise self._unsupported(node, f"to {None if shape is None else tuple(shape)}")
        if shape[0] == 1 and self.images != 1:
            raise self._unsupported(node, f"of {self.images or 'any number of'} images to one")
        if shape[1] > 0:
            self.features.append((int(shape[1]), node))
        return nn.Flatten()

    def _slice(self, node, about, before):
        starts, ends, axes, steps = (self._integers(node, i) for i in range(1, 5))
        step = steps[0] if steps else 1
        if starts != (0, 0) or min(ends) < SLICE_END or axes != (2, 3) or steps != (step, step):
            raise self._unsupported(node, "of another part than every n-th row and column")
        return nn.PadChannels(0, 0, step)

    def _pad(self, node, about, before):
        """A PadChannels, which also does the Slice before it."""
        pads, value = self._integers(node, 1), self._constant(node, 2)
        others, mode = pads[:1] + pads[2:5] + pads[6:], about.get("mode", b"constant")
        if len(pads) != 8 or any(others) or np.any(value) or len(node.input) > 3 or mode != b"constant":
            raise self._unsupported(node, "by anything but channels of zeros")
        inner = before.pop() if before and isinstance(before[-1], nn.PadChannels) else nn.PadChannels(0, 0, 1)
        return nn.PadChannels(inner.before + pads[1], inner.after + pads[5], inner.stride)

    def _dropout(self, node, about, before):
        if np.any(self._constant(node, 2)):
            raise self._unsupported(node, "of training")
        return []

    def _identity(self, node, about, before):
        return []

    makers = {
        "Add": _add, "AveragePool": _averagepool, "BatchNormalization": _batchnormalization, "Conv": _conv,
        "Dropout": _dropout, "Flatten": _flatten, "Gemm": _gemm, "GlobalAveragePool": _globalaveragepool,
        "Identity": _identity, "MatMul": _matmul, "MaxPool": _maxpool, "Pad": _pad, "Relu": _relu,
        "Reshape": _reshape, "Slice": _slice,
    }  # fmt: skip


def _filled(layer, weight, bias):
    layer.weight = nn.Parameter(np.ascontiguousarray(weight, np.float32))
    if bias is not None:
        bias = nn.Parameter(np.broadcast_to(np.asarray(bias, np.float32).reshape(-1), len(weight)).copy())
    layer.bias = bias
    return layer


# ---- writing


def write_onnx(path, model, input_shape):
    """Write the model, as it predicts, for inputs (N, *input_shape), any N. Sparse weights are written dense.

    ValueError for a layer of a class that is not sparsetrain's own.
    """
    onnx = _onnx()
    writer = _Writer(onnx)
    output = writer.add(model, "x")
    if not writer.nodes:
        raise ValueError(f"a model of class {type(model).__name__} without layers that predict has no ONNX graph")
    shape = ["N", *input_shape]
    classes = nn.summary(model, input_shape).rows[-1].output
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        writer.nodes,
        "sparsetrain",
        [value("x", onnx.TensorProto.FLOAT, shape)],
        [value(output, onnx.TensorProto.FLOAT, ["N", *classes])],
        writer.tensors,
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    with replacing(path, "wb") as file:
        file.write(made.SerializeToString())


class _Writer:
    def __init__(self, onnx):
        self.onnx, self.nodes, self.tensors = onnx, [], []

    def add(self, module, x):
        """Adds the nodes of a module that reads x; returns the name of its output."""
        if type(module) is nn.Sequential:
            for layer in module.layers:
                x = self.add(layer, x)
            return x
        if type(module) is nn.Residual:
            around = self.add(module.shortcut, x) if module.shortcut else x
            return self._node("Add", [self.add(module.body, x), around])
        make = getattr(self, f"_{type(module).__name__.lower()}", None)
        if make is None or getattr(nn, type(module).__name__, None) is not type(module):
            raise ValueError(f"a layer of class {type(module).__name__} has no ONNX operator here")
        return make(module, x)

    def _node(self, kind, inputs, **about):
        output = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **about))
        return output

    def _tensor(self, array):
        name = f"tensor{len(self.tensors)}"
        array = np.ascontiguousarray(array, array.dtype if array.dtype == np.int64 else np.float32)
        self.tensors.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def _parameters(self, module):
        return [self._tensor(p.to_dense()) for p in (module.weight, module.bias) if p is not None]

    def _conv2d(self, module, x):
        about = {
            "kernel_shape": module.kernel_size, "strides": module.stride, "pads": module.padding * 2,
            "dilations": module.dilation, "group": module.groups,
        }  # fmt: skip
        return self._node("Conv", [x, *self._parameters(module)], **about)

    def _linear(self, module, x):
        return self._node("Gemm", [x, *self._parameters(module)], transB=1)

    def _batchnorm2d(self, module, x):
        buffers = dict(module.named_buffers())
        statistics = [self._tensor(buffers[name]) for name in ("running_mean", "running_var")]
        return self._node("BatchNormalization", [x, *self._parameters(module), *statistics], epsilon=module.eps)

    _batchnorm1d = _batchnorm2d

    def _relu(self, module, x):
        return self._node("Relu", [x])

    def _dropout(self, module, x):
        return x

    def _flatten(self, module, x):
        return self._node("Flatten", [x], axis=1)

    def _maxpool2d(self, module, x):
        return self._pool("MaxPool", module, x)

    def _avgpool2d(self, module, x):
        return self._pool("AveragePool", module, x, count_include_pad=1)

    def _pool(self, kind, module, x, **about):
        window = {"kernel_shape": module.kernel_size, "strides": module.stride, "pads": module.padding * 2}
        return self._node(kind, [x], **window, **about)

    def _adaptiveavgpool2d(self, module, x):
        if tuple(module.output_size) != (1, 1):
            raise ValueError(f"AdaptiveAvgPool2d to {module.output_size} has no ONNX operator, only to 1")
        return self._node("GlobalAveragePool", [x])

    def _padchannels(self, module, x):
        if module.stride > 1:
            limits = ([0, 0], [SLICE_END] * 2, [2, 3], [module.stride] * 2)  # starts, ends, axes, steps
            x = self._node("Slice", [x, *(self._tensor(np.array(v, np.int64)) for v in limits)])
        pads = np.array([0, module.before, 0, 0, 0, module.after, 0, 0], np.int64)
        return self._node("Pad", [x, self._tensor(pads)])

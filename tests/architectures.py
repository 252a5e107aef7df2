"""Classifiers of the usual architectures with random weights, in the operators that the exporters write.

Each builder takes the side of the image, the width and the number of classes, so that a test can have it small. The
batch axis is open. Weights are scaled so that every value stays of the order of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGE, SCORES = "image", "logits"
FAR = np.iinfo(np.int64).max


class Net:
    """A graph written line by line: net("Relu", x) -> its output's name. Every value's channels are kept in mind."""

    def __init__(self, size: int, classes: int, opset: int = 17, seed: int = 0) -> None:
        self.size, self.classes, self.opset = size, classes, opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels = {IMAGE: 3}

    def __call__(self, kind: str, *inputs: str | npt.ArrayLike, channels: int | None = None, **attributes) -> str:
        return self.several(kind, 1, *inputs, channels=channels, **attributes)[0]

    def several(
        self, kind: str, count: int, *inputs: str | npt.ArrayLike, channels: int | None = None, **attributes
    ) -> list[str]:
        """A node with several outputs. They have as many channels as the first input, unless it is said."""
        names = [value if isinstance(value, str) else self.const(value) for value in inputs]
        name = f"{kind.lower()}_{len(self.nodes)}"
        outputs = [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, names, outputs, name=f"/{name}", **attributes))
        known = channels or next((self.channels[value] for value in names if value in self.channels), 0)
        self.channels.update(dict.fromkeys(outputs, known))
        return outputs

    def const(self, value: npt.ArrayLike) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, scale: float = 0.1, mean: float = 0.0) -> str:
        return self.const(self.rng.normal(mean, scale, shape))

    # ----- layers -----

    def conv(
        self,
        x: str,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        *,
        pads: Sequence[int] | None = None,
        group: int = 1,
        gain: float = 2**0.5,
        norm: bool = False,
    ) -> str:
        """With a bias, padded to keep the grid, or with a BatchNormalization behind it in the bias's place."""
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        inputs = self.channels[x] // group
        weight = self.random(channels, inputs, *sides, scale=gain * (inputs * sides[0] * sides[1]) ** -0.5)
        bias = [] if norm else [self.random(channels)]
        half = [side // 2 for side in sides]
        attributes = {"kernel_shape": sides, "strides": [stride] * 2, "pads": pads or half * 2, "dilations": [1, 1]}
        x = self("Conv", x, weight, *bias, channels=channels, group=group, **attributes)
        return self.norm(x) if norm else x

    def depthwise(self, x: str, kernel: int, stride: int = 1, **options) -> str:
        return self.conv(x, self.channels[x], kernel, stride, group=self.channels[x], **options)

    def norm(self, x: str) -> str:
        c = self.channels[x]
        spread = self.const(self.rng.uniform(0.7, 1.3, c))
        return self("BatchNormalization", x, self.random(c, mean=1), self.random(c), self.random(c), spread)

    def pool(self, kind: str, x: str, kernel: int, stride: int, **attributes) -> str:
        return self(kind, x, kernel_shape=[kernel] * 2, strides=[stride] * 2, **attributes)

    def dense(self, x: str, channels: int, gain: float = 2**0.5, inputs: int = 0) -> str:
        inputs = inputs or self.channels[x]
        weight = self.random(channels, inputs, scale=gain * inputs**-0.5)
        return self("Gemm", x, weight, self.random(channels), channels=channels, transB=1)

    def linear(self, x: str, channels: int, gain: float = 1.0) -> str:
        """On the last axis, as MatMul and Add."""
        weight = self.random(self.channels[x], channels, scale=gain * self.channels[x] ** -0.5)
        return self("Add", self("MatMul", x, weight, channels=channels), self.random(channels))

    def layer_norm(self, x: str) -> str:
        c = self.channels[x]
        return self("LayerNormalization", x, self.random(c, mean=1), self.random(c), axis=-1, epsilon=1e-6)

    def gelu(self, x: str) -> str:
        """The operator where the opset has it, else written out."""
        if self.opset >= 20:
            return self("Gelu", x)
        bent = self("Add", self("Erf", self("Div", x, np.sqrt(2))), 1.0)
        return self("Mul", self("Mul", x, bent), 0.5)

    def mlp(self, x: str) -> str:
        return self.linear(self.gelu(self.linear(x, 4 * self.channels[x])), self.channels[x], gain=0.7)

    def silu(self, x: str) -> str:
        return self("Mul", x, self("Sigmoid", x))

    def gated(self, x: str, kind: str, between: Callable[[str], str], **attributes) -> str:
        """Squeeze and excitation."""
        few = between(self.conv(self("GlobalAveragePool", x), max(2, self.channels[x] // 4)))
        return self("Mul", x, self(kind, self.conv(few, self.channels[x]), **attributes))

    def concat(self, *values: str, axis: int = 1) -> str:
        return self("Concat", *values, channels=sum(self.channels[value] for value in values), axis=axis)

    def sizes(self, x: str, *rest: int) -> str:
        """A shape whose first axis is computed from x, as an exporter does for an open batch."""
        rows = self("Unsqueeze", self("Gather", self("Shape", x), 0, axis=0), [0])
        return self("Concat", rows, list(rest), axis=0)

    def reshape(self, x: str, *rest: int, channels: int | None = None) -> str:
        return self("Reshape", x, self.sizes(x, *rest), channels=channels or self.channels[x])

    def cut(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self("Slice", x, [start], [end], [axis], [step])

    # ----- the file -----

    def classified(self, x: str) -> onnx.ModelProto:
        """Pooling and a linear layer."""
        return self.proto(self.dense(self("Flatten", self("GlobalAveragePool", x), axis=1), self.classes, gain=1.0))

    def proto(self, scores: str) -> onnx.ModelProto:
        assert self.nodes[-1].output[0] == scores, "the scores are written last"
        self.nodes[-1].output[0] = SCORES
        image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["N", 3, self.size, self.size])
        output = helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["N", self.classes])
        opset = helper.make_opsetid("", self.opset)
        graph = helper.make_graph(self.nodes, "main_graph", [image], [output], self.weights)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8 if self.opset < 20 else 10)


# ----- convolutions and ReLU -----


def resnet(
    size: int = 33, width: int = 4, classes: int = 7, depths: Sequence[int] = (1, 2, 1), norm: bool = False
) -> onnx.ModelProto:
    """Bottlenecks behind a strided stem and a max pool; batch normalisation folded by the exporter, or left to us."""
    net = Net(size, classes)
    x = net("Relu", net.conv(IMAGE, width, 7, 2, norm=norm))
    x = net.pool("MaxPool", x, 3, 2, pads=[1] * 4)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            inner, stride = width << stage, 2 if stage and not block else 1
            y = net("Relu", net.conv(x, inner, norm=norm))
            y = net("Relu", net.conv(y, inner, 3, stride, norm=norm))
            y = net.conv(y, 4 * inner, gain=0.6, norm=norm)
            x = x if block else net.conv(x, 4 * inner, 1, stride, gain=1.0, norm=norm)
            x = net("Relu", net("Add", y, x))
    return net.classified(x)


def vgg(
    size: int = 32, width: int = 4, classes: int = 7, depths: Sequence[int] = (1, 1, 2), hidden: int = 16
) -> onnx.ModelProto:
    """Max pools and three dense layers."""
    net = Net(size, classes)
    x = IMAGE
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            x = net("Relu", net.conv(x, width << stage, 3))
        x = net.pool("MaxPool", x, 2, 2)
    x = net("Flatten", net.pool("AveragePool", x, 1, 1), axis=1)
    x = net("Relu", net.dense(x, hidden, inputs=net.channels[x] * (size >> len(depths)) ** 2))
    return net.proto(net.dense(net("Relu", net.dense(x, hidden)), classes, gain=1.0))


def densenet(size: int = 33, width: int = 4, classes: int = 7, depths: Sequence[int] = (2, 2)) -> onnx.ModelProto:
    """Batch normalisation before the convolution, where it can't be folded, and ever more channels."""
    net = Net(size, classes)
    x = net("Relu", net.conv(IMAGE, 2 * width, 7, 2, norm=True))
    x = net.pool("MaxPool", x, 3, 2, pads=[1] * 4)
    for stage, depth in enumerate(depths):
        if stage:
            x = net.conv(net("Relu", net.norm(x)), net.channels[x] // 2)
            x = net.pool("AveragePool", x, 2, 2)
        for _ in range(depth):
            y = net("Relu", net.conv(net("Relu", net.norm(x)), 4 * width, norm=True))
            x = net.concat(x, net.conv(y, width, 3, gain=1.0))
    return net.classified(net("Relu", net.norm(x)))


def squeezenet(size: int = 40, width: int = 4, classes: int = 7, fires: Sequence[int] = (1, 2)) -> onnx.ModelProto:
    """Pools that reach over the edge; the scores are a map that is pooled."""
    net = Net(size, classes)
    x = net("Relu", net.conv(IMAGE, 4 * width, 3, 2, pads=[0] * 4))
    for stage, count in enumerate(fires):
        x = net.pool("MaxPool", x, 3, 2, ceil_mode=1)
        for _ in range(count):
            few = net("Relu", net.conv(x, width << stage))
            x = net.concat(*(net("Relu", net.conv(few, 4 * width << stage, kernel)) for kernel in (1, 3)))
    x = net("Relu", net("Add", net.conv(x, classes, gain=1.0), np.ones((1, 1, 1))))
    return net.proto(net("Flatten", net("GlobalAveragePool", x), axis=1))


def shufflenet(size: int = 40, width: int = 4, classes: int = 7, depths: Sequence[int] = (2, 2)) -> onnx.ModelProto:
    """Channels are split, and shuffled by reshaping to sizes that are computed at run time."""
    net = Net(size, classes)

    def branch(x: str, channels: int, stride: int) -> str:
        y = net.depthwise(net("Relu", net.conv(x, channels)), 3, stride, gain=1.0)
        return net("Relu", net.conv(y, channels))

    x = net.pool("MaxPool", net("Relu", net.conv(IMAGE, 2 * width, 3, 2)), 3, 2, pads=[1] * 4)
    side = (size + 3) // 4
    for stage, depth in enumerate(depths):
        half = 2 * width << stage
        side = (side + 1) // 2
        for block in range(depth):
            if block:
                left, right = net.several("Split", 2, x, [half, half], channels=half, axis=1)
                y = net.concat(left, branch(right, half, 1))
            else:
                left = net("Relu", net.conv(net.depthwise(x, 3, 2, gain=1.0), half))
                y = net.concat(left, branch(x, half, 2))
            apart = net("Transpose", net.reshape(y, 2, half, side, side), perm=[0, 2, 1, 3, 4])
            x = net.reshape(apart, 2 * half, side, side, channels=2 * half)
    x = net("ReduceMean", net("Relu", net.conv(x, 8 * width)), axes=[2, 3], keepdims=0)
    return net.proto(net.dense(x, classes, gain=1.0))


def inception(size: int = 35, width: int = 4, classes: int = 7) -> onnx.ModelProto:
    """Branches, convolutions along one axis, averages that count the padding."""
    net = Net(size, classes)

    def chain(x: str, *kernels: int | tuple[int, int], stride: int = 1) -> str:
        for kernel in kernels[:-1]:
            x = net("Relu", net.conv(x, 2 * width, kernel, norm=True))
        pads = None if stride == 1 else [0] * 4
        return net("Relu", net.conv(x, 2 * width, kernels[-1], stride, pads=pads, norm=True))

    def averaged(x: str) -> str:
        return chain(net.pool("AveragePool", x, 3, 1, pads=[1] * 4, count_include_pad=1), 1)

    x = net.pool("MaxPool", chain(chain(IMAGE, 3, stride=2), 3), 3, 2)
    x = net.concat(chain(x, 1), chain(x, 1, 5), chain(x, 1, 3, 3), averaged(x))
    x = net.concat(chain(x, 3, stride=2), chain(x, 1, 3, stride=2), net.pool("MaxPool", x, 3, 2))
    x = net.concat(chain(x, 1), chain(x, 1, (1, 7), (7, 1)), averaged(x))
    return net.classified(x)


# ----- depthwise convolutions and gates -----


def mobilenet_v2(
    size: int = 33,
    width: int = 4,
    classes: int = 7,
    stages: Sequence[tuple[int, int, int, int]] = ((1, 1, 1, 1), (4, 2, 2, 2), (4, 3, 1, 2), (4, 4, 2, 1)),
) -> onnx.ModelProto:
    """Inverted residuals, (expansion, width, blocks, stride) for each stage; ReLU6 with its bounds as nodes."""
    net = Net(size, classes)

    def relu6(x: str) -> str:
        low, high = (net("Constant", value=numpy_helper.from_array(np.float32(bound))) for bound in (0, 6))
        return net("Clip", x, low, high)

    x = relu6(net.conv(IMAGE, 2 * width, 3, 2))
    for expansion, times, blocks, stride in stages:
        for block in range(blocks):
            y = x if expansion == 1 else relu6(net.conv(x, expansion * net.channels[x]))
            y = relu6(net.depthwise(y, 3, 1 if block else stride))
            y = net.conv(y, times * width, gain=0.7 if block else 1.4)
            x = net("Add", x, y) if block else y
    return net.classified(relu6(net.conv(x, 8 * width)))


def mobilenet_v3(size: int = 33, width: int = 4, classes: int = 7) -> onnx.ModelProto:
    """HardSwish, gates of HardSigmoid, two dense layers, and the padding of TensorFlow."""
    net = Net(size, classes)

    def swish(x: str) -> str:
        return net("HardSwish", x)

    x = swish(net.conv(IMAGE, 2 * width, 3, 2, pads=[0, 0, 1, 1]))
    for kernel, stride, times in [(3, 2, 2), (5, 2, 3), (5, 1, 3)]:
        y = swish(net.conv(x, 3 * net.channels[x]))
        y = swish(net.depthwise(y, kernel, stride, pads=[kernel // 2 - stride + 1] * 2 + [kernel // 2] * 2))
        y = net.gated(y, "HardSigmoid", lambda few: net("Relu", few), alpha=1 / 6, beta=0.5)
        y = net.conv(y, times * width, gain=2.0)
        x = net("Add", y, x) if stride == 1 else y
    x = net("Flatten", net("GlobalAveragePool", swish(net.conv(x, 8 * width))), axis=1)
    return net.proto(net.dense(swish(net.dense(x, 8 * width)), classes, gain=1.0))


def efficientnet(size: int = 33, width: int = 4, classes: int = 7) -> onnx.ModelProto:
    """SiLU and gates of Sigmoid, both a product of what they come from."""
    net = Net(size, classes)
    x = net.silu(net.conv(IMAGE, 2 * width, 3, 2, norm=True))
    for kernel, stride, times in [(3, 1, 2), (3, 2, 3), (5, 2, 4), (5, 1, 4)]:
        y = net.silu(net.conv(x, 4 * net.channels[x], norm=True))
        y = net.silu(net.depthwise(y, kernel, stride, norm=True))
        y = net.conv(net.gated(y, "Sigmoid", net.silu), times * width, gain=2.0, norm=True)
        x = net("Add", y, x) if times * width == net.channels[x] else y
    return net.classified(net.silu(net.conv(x, 8 * width, norm=True)))


# ----- layer normalisation and attention -----


def convnext(
    size: int = 32, width: int = 8, classes: int = 7, depths: Sequence[int] = (1, 2), opset: int = 17
) -> onnx.ModelProto:
    """Large depthwise convolutions, layer normalisation across channels, GELU, and a factor for each branch."""
    net = Net(size, classes, opset)

    def across(x: str, *layers: Callable[[str], str]) -> str:
        x = net("Transpose", x, perm=[0, 2, 3, 1])
        for layer in layers:
            x = layer(x)
        return net("Transpose", x, perm=[0, 3, 1, 2])

    x = across(net.conv(IMAGE, width, 4, 4, pads=[0] * 4, gain=1.0), net.layer_norm)
    for stage, depth in enumerate(depths):
        if stage:
            x = net.conv(across(x, net.layer_norm), width << stage, 2, 2, pads=[0] * 4, gain=1.0)
        for _ in range(depth):
            y = across(net.depthwise(x, 7, gain=1.0), net.layer_norm, net.mlp)
            x = net("Add", net("Mul", y, net.random(1, width << stage, 1, 1, mean=0.5)), x)
    pooled = across(net("GlobalAveragePool", x), net.layer_norm)
    return net.proto(net.dense(net("Flatten", pooled, axis=1), classes, gain=1.0))


def attention(net: Net, x: str, tokens: int, heads: int, shifted: Callable[[str], str] = lambda scores: scores) -> str:
    """Self-attention, with what is added to its scores."""
    width, each = net.channels[x], net.channels[x] // heads
    projected = net.reshape(net.linear(x, 3 * width, gain=1.5), tokens, 3, heads, each, channels=width)
    q, k, v = (net("Gather", net("Transpose", projected, perm=[2, 0, 3, 1, 4]), i, axis=0) for i in range(3))
    scores = net("MatMul", net("Mul", q, each**-0.5), net("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net("MatMul", net("Softmax", shifted(scores), axis=-1), v, channels=width)
    return net.linear(net.reshape(net("Transpose", mixed, perm=[0, 2, 1, 3]), tokens, width), width)


def vit(
    size: int = 32, width: int = 16, classes: int = 7, depth: int = 2, heads: int = 2, patch: int = 8
) -> onnx.ModelProto:
    """A class token before the patches, taken out at the end."""
    net = Net(size, classes)
    tokens = (size // patch) ** 2
    x = net.reshape(net.conv(IMAGE, width, patch, patch, pads=[0] * 4, gain=1.0), width, tokens)
    x = net("Transpose", x, perm=[0, 2, 1])
    first = net("Expand", net.random(1, 1, width, scale=1), net.sizes(x, 1, width))
    x = net("Add", net("Concat", first, x, axis=1, channels=width), net.random(1, tokens + 1, width, scale=0.5))
    for _ in range(depth):
        x = net("Add", x, attention(net, net.layer_norm(x), tokens + 1, heads))
        x = net("Add", x, net.mlp(net.layer_norm(x)))
    x = net("Gather", net.layer_norm(x), 0, axis=1)
    return net.proto(net.dense(x, classes, gain=1.0))


def swin(
    size: int = 32, width: int = 8, classes: int = 7, depths: Sequence[int] = (2, 1), heads: int = 2, window: int = 4
) -> onnx.ModelProto:
    """Attention within windows, which every second block shifts; stages joined by merging four patches into one."""
    net = Net(size, classes)
    side, cells, half = size // 4, window**2, window // 2

    def rolled(x: str, by: int) -> str:
        for axis in (1, 2):
            x = net("Concat", net.cut(x, by, FAR, axis), net.cut(x, 0, by, axis), axis=axis, channels=net.channels[x])
        return x

    def apart(x: str, sizes: Sequence[int], last: Sequence[int]) -> str:
        return net("Reshape", net("Transpose", net("Reshape", x, sizes), perm=[0, 1, 3, 2, 4, 5]), last)

    def mask() -> npt.NDArray[np.float64]:
        edge = np.digitize(np.arange(side), [side - window, side - half])
        regions = (3 * edge[:, None] + edge).reshape(side // window, window, -1, window).swapaxes(1, 2)
        lines = regions.reshape(-1, cells)
        return np.where(lines[:, None, :, None] == lines[:, None, None], 0.0, -100.0)

    def shifted(scores: str, masked: bool) -> str:
        place = np.stack(np.mgrid[:window, :window]).reshape(2, -1)
        dy, dx = place[:, :, None] - place[:, None] + window - 1
        table = net("Gather", net.random((2 * window - 1) ** 2, heads, scale=0.5), (dy * (2 * window - 1) + dx).ravel())
        bias = net("Transpose", net("Reshape", table, [cells, cells, heads]), perm=[2, 0, 1])
        scores = net("Add", scores, net("Unsqueeze", bias, [0]))
        if not masked:
            return scores
        split = net("Reshape", scores, [-1, (side // window) ** 2, heads, cells, cells])
        return net("Reshape", net("Add", split, mask()), [-1, heads, cells, cells])

    x = net.layer_norm(net("Transpose", net.conv(IMAGE, width, 4, 4, pads=[0] * 4, gain=1.0), perm=[0, 2, 3, 1]))
    for stage, depth in enumerate(depths):
        c = width << stage
        if stage:
            corners = [net.cut(net.cut(x, i % 2, FAR, 1, 2), i // 2, FAR, 2, 2) for i in range(4)]
            merged = net.layer_norm(net.concat(*corners, axis=-1))
            x = net("MatMul", merged, net.random(2 * c, c, scale=(2 * c) ** -0.5), channels=c)
            side //= 2
        count = side // window
        for block in range(depth):
            turned = block % 2 == 1 and count > 1
            y = rolled(net.layer_norm(x), half) if turned else net.layer_norm(x)
            y = apart(y, [-1, count, window, count, window, c], [-1, cells, c])
            y = attention(net, y, cells, heads, lambda scores, masked=turned: shifted(scores, masked))
            y = apart(y, [-1, count, count, window, window, c], [-1, side, side, c])
            x = net("Add", x, rolled(y, side - half) if turned else y)
            x = net("Add", x, net.mlp(net.layer_norm(x)))
    pooled = net("ReduceMean", net.layer_norm(x), axes=[1, 2], keepdims=0)
    return net.proto(net.dense(pooled, classes, gain=1.0))

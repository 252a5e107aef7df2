"""Relevance against its textbook reading: every layer unrolled to a matrix, every rule written out, in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image

from heatmill.models.graph import relevance_rules
from heatmill.models.graph.backward import START, TARGETS, WEIGHTS, Built, Unsupported, build
from heatmill.models.graph.canonize import Graph, canonize
from heatmill.models.graph.composites import COMPOSITES, Composite
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.lrp import RELEVANCE
from heatmill.models.graph.relevance_facts import Facts
from heatmill.models.graph.relevance_rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from heatmill.models.graph.relevance_starts import STARTS
from heatmill.models.graph.request import Request
from heatmill.models.load import open_model
from tests.graphs import Writer

SIZE = (8, 8)
LOW, HIGH = np.array([-2.5, -2.0, -3.0]), np.array([2.5, 3.0, 2.0])
CHOSEN = np.array([[1], [6]])


class Net(Writer):
    """A graph on the image `x`."""

    def __init__(self, seed: int = 0, layout: str = "nchw") -> None:
        super().__init__(seed)
        self.layout = layout

    def shape(self, size, rows: int | str = 1) -> list[int | str]:
        """Of the image."""
        return [rows, 3, *size] if self.layout == "nchw" else [rows, *size, 3]

    def w(self, *shape: int, scale: float = 0.4) -> np.ndarray:
        return (self.rng.normal(size=shape) * scale).astype(np.float32)

    def proto(self, output: str, shape: Sequence[Any] | None, size=SIZE, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape(size, "N"))],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def graph(self, tmp_path, scores: str, size=SIZE, opset: int = 17, dtype=np.float64, **options: Any) -> Graph:
        """The canonical form of the net that ends in these scores."""
        sample = np.full(self.shape(size), 0.5, np.float32)
        count = evaluate(self.proto(scores, None, size, opset), {"x": sample})[0].size
        path = tmp_path / f"net{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(self.proto(scores, ["N", count], size, opset), path)
        model = open_model(path)
        return canonize(model, size, raw_scores(model), dtype=dtype, **options)


class ConvTranspose(OpRun):
    """In place of the reference evaluator's own, which does not know groups."""

    def _run(self, x, w, b=None, group=1, strides=None, dilations=None, pads=None, output_padding=None, **_):
        rank, group = w.ndim - 2, group or 1
        strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
        axes = list(zip(x.shape[2:], w.shape[2:], strides, dilations, output_padding or [0] * rank, strict=True))
        reach = [(count - 1) * stride + (taps - 1) * step + 1 + more for count, taps, stride, step, more in axes]
        grouped, w = x.reshape(len(x), group, -1, *x.shape[2:]), w.reshape(group, -1, *w.shape[1:])
        full = np.zeros((len(x), group * w.shape[2], *reach), x.dtype)
        for tap in product(*(range(taps) for _, taps, *_ in axes)):
            first = [index * step for index, step in zip(tap, dilations, strict=True)]
            cut = [slice(at, at + (axis[0] - 1) * axis[2] + 1, axis[2]) for at, axis in zip(first, axes, strict=True)]
            sent = np.einsum("ngc...,gco->ngo...", grouped, w[(..., *tap)])
            full[(..., *cut)] += sent.reshape(len(x), -1, *x.shape[2:])
        out = full[(..., *(slice(pads[i], full.shape[2 + i] - pads[rank + i]) for i in range(rank)))]
        return (out if b is None else out + b.reshape(-1, *[1] * rank),)


def evaluate(proto: onnx.ModelProto, feed: dict[str, np.ndarray], names: Sequence[str] = ()) -> list[np.ndarray]:
    evaluator = ReferenceEvaluator(proto, new_ops=[ConvTranspose])
    found = dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))
    return [found[name] for name in names or found]


Found = tuple[np.ndarray, np.ndarray]


def run(built: Built, feed: dict[str, np.ndarray], request: int = 0) -> Found:
    """In float64: the values (targets, rows, ...) and the kept shares (targets, rows)."""
    onnx.checker.check_model(built.proto, full_check=True)
    outputs = built.outputs[request]
    found = evaluate(built.proto, feed, [*outputs.values, *outputs.kept])
    return np.stack(found[: len(outputs.values)]), np.stack(found[len(outputs.values) :])


def in_float32(built: Built, feed: dict[str, np.ndarray]) -> list[Found]:
    """By ONNX Runtime, for each request."""
    onnx.checker.check_model(built.proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(built.proto.SerializeToString(), options)
    feed = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in feed.items()}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    return [tuple(np.stack([found[n] for n in part]) for part in (out.values, out.kept)) for out in built.outputs]


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max() + 1e-300


def images(rows: int = 2, size=SIZE, seed: int = 1) -> np.ndarray:
    """Of both signs, within the bounds; exactly what float32 holds."""
    values = np.random.default_rng(seed).uniform(-1.9, 1.9, (rows, 3, *size))
    return values.astype(np.float32).astype(np.float64)


# ----- the textbook -----


def positive(a):
    return np.maximum(a, 0)


def negative(a):
    return np.minimum(a, 0)


def stable(z, eps):
    return z + eps * np.where(z < 0, -1, 1) if eps else np.where(z == 0, np.inf, z)


def shared(parts, r, eps, extra=0.0):
    """sum_p x_p * (W_p (R / z)), z = sum_p x_p W_p + extra"""
    z = sum(x @ w for x, w in parts) + extra
    return sum(x * (w @ (r / stable(z, eps))) for x, w in parts)


def dense_epsilon(rule, x, w, connected, b, r, low, high):
    return shared([(x, w)], r, rule.eps, b)


def dense_z_plus(rule, x, w, connected, b, r, low, high):
    parts = [(positive(x), positive(w)), (negative(x), negative(w))]
    return shared(parts, r, rule.eps, positive(b) if rule.bias else 0)


def dense_alpha_beta(rule, x, w, connected, b, r, low, high):
    for_it = [(positive(x), positive(w)), (negative(x), negative(w))]
    against = [(positive(x), negative(w)), (negative(x), positive(w))]
    return rule.alpha * shared(for_it, r, rule.eps, positive(b)) - rule.beta * shared(against, r, rule.eps, negative(b))


def dense_gamma(rule, x, w, connected, b, r, low, high):
    z, g = x @ w + b, rule.gamma
    more, less = w + g * positive(w), w + g * negative(w)
    above = shared([(positive(x), more), (negative(x), less)], r * (z > 0), rule.eps, b + g * positive(b))
    below = shared([(positive(x), less), (negative(x), more)], r * (z < 0), rule.eps, b + g * negative(b))
    return above + below


def dense_z_box(rule, x, w, connected, b, r, low, high):
    if rule.own:
        low, high = np.full(x.shape, x.min()), np.full(x.shape, x.max())
    return shared([(x, w), (-low, positive(w)), (-high, negative(w))], r, rule.eps)


def dense_w_square(rule, x, w, connected, b, r, low, high):
    return w**2 @ (r / stable((w**2).sum(0), rule.eps))


def dense_flat(rule, x, w, connected, b, r, low, high):
    return connected @ (r / stable(connected.sum(0), rule.eps))


DENSE = {
    Epsilon: dense_epsilon,
    ZPlus: dense_z_plus,
    AlphaBeta: dense_alpha_beta,
    Gamma: dense_gamma,
    ZBox: dense_z_box,
    WSquare: dense_w_square,
    Flat: dense_flat,
}


def grid_of(size, kernel, strides, pads) -> list[int]:
    return [(size[i] + pads[i] + pads[2 + i] - kernel[i]) // strides[i] + 1 for i in (0, 1)]


def conv_matrix(weight, shape, strides, pads, group) -> np.ndarray:
    """(inputs, outputs): one entry for every output, input channel and tap."""
    channels, height, width = shape
    outputs, per_group, *kernel = weight.shape
    grid = grid_of((height, width), kernel, strides, pads)
    matrix = np.zeros((channels, height, width, outputs, *grid))
    for o, i, j, c, u, v in product(*map(range, (outputs, *grid, per_group, *kernel))):
        y, x = i * strides[0] - pads[0] + u, j * strides[1] - pads[1] + v
        if 0 <= y < height and 0 <= x < width:
            matrix[o // (outputs // group) * per_group + c, y, x, o, i, j] = weight[o, c, u, v]
    return matrix.reshape(channels * height * width, -1)


class Textbook:
    """One image through a net, and relevance back through it, each layer as a matrix."""

    def __init__(self, net: Net, composite: Composite, image: np.ndarray, low=-2.1179, high=2.64) -> None:
        self.net, self.composite = net, composite
        self.edges = [np.broadcast_to(np.reshape(edge, (-1, 1, 1)), image.shape).ravel() for edge in (low, high)]
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in net.weights}
        self.values = {name: w.astype(np.float64) if w.dtype == np.float32 else w for name, w in weights.items()}
        self.values["x"] = image
        for node in net.nodes:
            forward = getattr(self, f"do_{node.op_type}")
            self.values[node.output[0]] = forward(node, *(self.values[name] for name in node.input))

    def back(self, at: str, relevance: np.ndarray, end: str = "x") -> np.ndarray:
        sent = {at: relevance}
        for node in reversed(self.net.nodes):
            if node.output[0] in sent and node.output[0] != end:
                inputs = [self.values[name] for name in node.input]
                undo = getattr(self, f"undo_{node.op_type}")
                parts = undo(node, inputs, self.values[node.output[0]], sent[node.output[0]])
                for name, part in zip(node.input, parts, strict=False):
                    sent[name] = sent.get(name, 0) + part.reshape(self.values[name].shape)
        return sent[end]

    def linear(self, node, x, w, b):
        """The matrix, 1 wherever it may have an entry, and the bias of every output."""
        if node.op_type == "Gemm":
            return w.T, np.ones_like(w.T), b
        rest = (x.shape, *settings(node, strides=[1, 1], pads=[0] * 4, group=1))
        matrix = conv_matrix(w, *rest)
        return matrix, conv_matrix(np.ones_like(w), *rest), np.repeat(b, matrix.shape[1] // len(w))

    def do_Conv(self, node, x, w, b):
        matrix, _, shift = self.linear(node, x, w, b)
        grid = grid_of(x.shape[1:], w.shape[2:], *settings(node, strides=[1, 1], pads=[0] * 4))
        return (x.ravel() @ matrix + shift).reshape(-1, *grid)

    def do_Gemm(self, node, x, w, b):
        return x @ w.T + b

    def undo_Conv(self, node, inputs, y, r):
        rule = self.composite.dense if node.op_type == "Gemm" else self.composite.conv
        if node.input[0] == "x" and self.composite.first is not None:
            rule = self.composite.first
        return [DENSE[type(rule)](rule, inputs[0].ravel(), *self.linear(node, *inputs), r.ravel(), *self.edges)]

    undo_Gemm = undo_Conv

    def do_Relu(self, node, x):
        return positive(x)

    def undo_Relu(self, node, inputs, y, r):
        return [r]

    def do_Clip(self, node, x, low, high):
        return x.clip(low, high)

    undo_Clip = undo_Relu

    def windows(self, node, x):
        """Every cell of the output, and what it looks at."""
        kernel, strides, pads = settings(node, kernel_shape=None, strides=[1, 1], pads=[0] * 4)
        grid = grid_of(x.shape[1:], kernel, strides, pads)
        for c, i, j in product(range(len(x)), *map(range, grid)):
            top, left = i * strides[0] - pads[0], j * strides[1] - pads[1]
            yield (c, i, j), (c, slice(max(top, 0), top + kernel[0]), slice(max(left, 0), left + kernel[1]))

    def pooled(self, node, x, function):
        cells = list(self.windows(node, x))
        result = np.zeros([place + 1 for place in cells[-1][0]])
        for cell, window in cells:
            result[cell] = function(x[window])
        return result

    def do_MaxPool(self, node, x):
        return self.pooled(node, x, np.max)

    def undo_MaxPool(self, node, inputs, y, r):
        (x,), result = inputs, np.zeros_like(inputs[0])
        for cell, window in self.windows(node, x):
            greatest = x[window] == y[cell]
            if self.composite.pool == "ties":
                result[window] += r[cell] * greatest / greatest.sum()
            elif self.composite.pool == "winner" or y[cell] > 0:
                result[window].flat[greatest.argmax()] += r[cell]
        return [result]

    def do_AveragePool(self, node, x):
        return self.pooled(node, x, np.mean)

    def undo_AveragePool(self, node, inputs, y, r):
        x, result = inputs[0], np.zeros_like(inputs[0])
        x = positive(x) if self.composite.pool == "proportional" else x
        for cell, window in self.windows(node, x):
            result[window] += x[window] / x[window].size * r[cell] / stable(x[window].mean(), self.composite.eps)
        return [result]

    def do_Add(self, node, a, b):
        return a + b

    def undo_Add(self, node, inputs, y, r):
        return [part * r / stable(y, self.composite.eps) for part in inputs]

    def do_Concat(self, node, *parts):
        return np.concatenate(parts)

    def undo_Concat(self, node, inputs, y, r):
        return np.split(r, np.cumsum([len(part) for part in inputs])[:-1])

    def do_Flatten(self, node, x):
        return x.ravel()

    def undo_Flatten(self, node, inputs, y, r):
        return [r]


def settings(node: onnx.NodeProto, **defaults: Any) -> list[Any]:
    """Attributes, in the order asked for."""
    given = {found.name: helper.get_attribute_value(found) for found in node.attribute}
    return [given.get(name, default) for name, default in defaults.items()]


def tiny(shift: float = 0.3, seed: int = 0) -> tuple[Net, str]:
    """Groups, a stride, overlapping and padded maxima, a sum, a concatenation, an average, two dense layers."""
    net = Net(seed)
    first = net("Relu", net("Conv", "x", net.w(6, 3, 3, 3), net.w(6, scale=shift), pads=[1, 1, 1, 1]))
    second = net("Conv", first, net.w(6, 3, 3, 3), net.w(6, scale=shift), group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    pooled = net("MaxPool", net("Relu", second), kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    branch = net("Conv", pooled, net.w(6, 6, 3, 3, scale=0.2), net.w(6, scale=shift), pads=[1, 1, 1, 1])
    added = net("Relu", net("Add", branch, pooled))
    side = net("Conv", pooled, net.w(2, 6, 1, 1), net.w(2, scale=shift))
    joined = net("Concat", added, side, axis=1)
    flat = net("Flatten", net("AveragePool", joined, kernel_shape=[2, 2], strides=[2, 2]))
    hidden = net("Relu", net("Gemm", flat, net.w(10, 32), net.w(10, scale=shift), transB=1))
    return net, net("Gemm", hidden, net.w(7, 10), net.w(7, scale=shift), transB=1)


def textbook(net: Net, scores: str, composite: str, x: np.ndarray, start: Callable, bounds=()) -> np.ndarray:
    """(1, rows, ...); `start` makes the seed of the raw scores and the class."""
    found = []
    for image, (chosen,) in zip(x, CHOSEN, strict=True):
        book = Textbook(net, COMPOSITES[composite], image, *bounds)
        found.append(book.back(scores, start(book.values[scores], chosen)))
    return np.array(found)[None]


def logit(z, c):
    return np.eye(len(z))[c] * z


# ----- whole nets -----


@pytest.mark.parametrize("bounds", [None, (LOW, HIGH)], ids=["default", "given"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_composite(composite, bounds, tmp_path):
    net, scores = tiny()
    x = images()
    wanted = textbook(net, scores, composite, x, logit, bounds or ())
    feed = {"x": x, TARGETS: CHOSEN}
    request = Request("relevance", composite=composite)
    for portable in (True, False):
        graph = net.graph(tmp_path, scores, dtype=np.float64 if portable else np.float32)
        built = build(graph, [request], targets=1, portable=portable, bounds=bounds)
        found, kept = run(built, feed) if portable else in_float32(built, feed)[0]
        close(found, wanted, 1e-9 if portable else 2e-4)
        raw = np.take_along_axis(evaluate(graph.proto, {"x": x.astype(np.float32)}, [graph.scores])[0], CHOSEN, 1)
        np.testing.assert_allclose(kept[0], wanted[0].sum((1, 2, 3)) / raw[:, 0], rtol=2e-3, atol=2e-5)


def test_every_composite_and_start_is_refused_by_name_when_unknown(tmp_path):
    net, scores = tiny()
    graph = net.graph(tmp_path, scores)
    with pytest.raises(ValueError, match="epsilon-plus"):
        build(graph, [Request("relevance", composite="plus")], targets=1)
    with pytest.raises(ValueError, match="clrp1-code"):
        build(graph, [Request("relevance", composite="epsilon", start="dual")], targets=1)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def clrp1(z, c):
    e = np.eye(len(z))[c]
    return e - (1 - e) / (len(z) - 1)


def clrp1_code(z, c):
    e = np.eye(len(z))[c]
    return e * abs(z), (1 - e) * abs(z)


def sglrp(z, c):
    p, e = softmax(z), np.eye(len(z))[c]
    dual = (1 - e) * p[c] * p
    return e * (dual.sum() + 1e-8), dual  # sum = p_c (1 - p_c)


FED = np.random.default_rng(8).normal(size=(2, 7))
SEEDS = {  # one seed, or one for the class and one for the others
    "logit": logit,
    "one": lambda z, c: np.eye(len(z))[c],
    "weights": lambda z, c: FED[list(CHOSEN[:, 0]).index(c)],
    "clrp1": clrp1,
    "clrp1-code": clrp1_code,
    "sglrp": sglrp,
}


def literal_start(start, net, scores, composite, x, end="x"):
    """(rows, ...) and the share that arrived: two passes where there are two seeds, as the papers' code has it."""
    maps, shares = [], []
    for image, (c,) in zip(x, CHOSEN, strict=True):
        book = Textbook(net, COMPOSITES[composite], image)
        seeds = SEEDS[start](book.values[scores], c)
        if not isinstance(seeds, tuple):
            found = book.back(scores, seeds, end)
            mass = np.abs if start in ("clrp1", "weights") else np.positive
            maps.append(found)
            shares.append(mass(found).sum() / mass(seeds).sum())
            continue
        target, dual = (book.back(scores, seed, end) for seed in seeds)
        if start == "sglrp":  # the second map is scaled to the sum of the first
            maps.append(target - dual * target.sum() / dual.sum())
        else:
            maps.append(target / target.sum() - dual / dual.sum())
        shares.append(min(target.sum() / seeds[0].sum(), dual.sum() / seeds[1].sum()))
    return np.array(maps), np.array(shares)


def test_every_start_has_a_textbook_form():
    assert set(SEEDS) == set(STARTS)


@pytest.mark.parametrize("composite", ["clrp", "epsilon-plus"])
@pytest.mark.parametrize("start", STARTS)
def test_start(start, composite, tmp_path):
    """Where relevance is conserved, and where biases take some of it on the way."""
    net, scores = tiny()
    x = images()
    wanted, shares = literal_start(start, net, scores, composite, x)
    feed = {"x": x, TARGETS: CHOSEN, **({WEIGHTS: FED} if start == "weights" else {})}
    request = Request("relevance", composite=composite, start=start)
    found, kept = run(build(net.graph(tmp_path, scores), [request], targets=1, portable=True), feed)
    close(found[0], wanted)
    np.testing.assert_allclose(kept[0], shares, rtol=1e-6)
    if composite == "epsilon-plus":
        assert (np.abs(shares - 1) > 0.01).any()
    rough = build(net.graph(tmp_path, scores, dtype=np.float32), [request], targets=1)
    close(in_float32(rough, feed)[0][0][0], wanted, 1e-3)


@pytest.mark.parametrize("start", ["clrp1", "clrp1-code", "sglrp"])
def test_one_signed_pass_equals_two_passes_where_relevance_is_conserved(start, tmp_path):
    """Without a bias the authors' two passes, each map divided by its own sum, come to the same as one from the
    difference of the two seeds, each divided by its own sum.
    """
    net = Net()
    first = net("Relu", net("Conv", "x", net.w(12, 3, 3, 3), net.w(12, scale=0), pads=[1, 1, 1, 1]))
    second = net("Relu", net("Conv", first, net.w(12, 12, 3, 3), net.w(12, scale=0), strides=[2, 2]))
    flat = net("Flatten", net("MaxPool", second, kernel_shape=[2, 2]))
    hidden = net("Relu", net("Gemm", flat, net.w(30, 48), net.w(30, scale=0), transB=1))
    scores = net("Gemm", hidden, net.w(7, 30), net.w(7, scale=0), transB=1)
    x = np.abs(images())

    def parts(z, c):
        found = SEEDS[start](z, c)
        return found if isinstance(found, tuple) else (positive(found), -negative(found))

    def signed(z, c):
        target, dual = parts(z, c)
        return target / target.sum() - dual / dual.sum()

    wanted = textbook(net, scores, "z-plus", x, signed)
    request = Request("relevance", composite="z-plus", start=start)
    found, kept = run(
        build(net.graph(tmp_path, scores), [request], targets=1, portable=True), {"x": x, TARGETS: CHOSEN}
    )
    if start == "sglrp":
        target = textbook(net, scores, "z-plus", x, lambda z, c: parts(z, c)[0])
        found = found / target.sum((2, 3, 4), keepdims=True)
    close(found, wanted, 1e-4)
    if start != "clrp1":
        np.testing.assert_allclose(kept, 1, rtol=1e-4)


def with_tail(tail: str) -> tuple[Net, str, str]:
    """`tiny` with its last layer as different exporters write it; its input and the scores."""
    net, scores = tiny()
    weight, shift = (numpy_helper.to_array(tensor) for tensor in net.weights[-2:])
    last = net.nodes[-1]
    hidden = last.input[0]
    if tail == "Gemm":
        return net, hidden, scores
    del net.nodes[-1]
    if tail == "MatMul":
        return net, hidden, net("Identity", net("Add", shift, net("MatMul", hidden, np.ascontiguousarray(weight.T))))
    grid = net("Reshape", hidden, [0, 10, 1, 1])
    return net, hidden, net("Flatten", net("Squeeze", net("Conv", grid, weight[:, :, None, None], shift), [3]))


@pytest.mark.parametrize("tail", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize("composite", ["epsilon-plus", "zero", "clrp"])
def test_a_dense_layer_is_one_however_it_is_written(composite, tail, tmp_path):
    x = images()
    wanted = textbook(*tiny(), composite, x, logit)
    net, _, scores = with_tail(tail)
    built = build(net.graph(tmp_path, scores), [Request("relevance", composite=composite)], targets=1, portable=True)
    close(run(built, {"x": x, TARGETS: CHOSEN})[0], wanted)


@pytest.mark.parametrize("tail", ["Gemm", "MatMul", "Conv"])
def test_negated_weights(tail, tmp_path):
    """clrp2: the last layer by z+ with its weights and with their negatives, each through the rest."""
    x = images()
    net, hidden, scores = with_tail(tail)
    request = Request("relevance", composite="clrp", start="clrp2")
    built = build(net.graph(tmp_path, scores), [request], targets=1, portable=True)
    found, kept = run(built, {"x": x, TARGETS: CHOSEN})
    net, scores = tiny()
    weight = numpy_helper.to_array(net.weights[-2]).astype(np.float64).T
    wanted, shares = [], []
    for image, (c,) in zip(x, CHOSEN, strict=True):
        book = Textbook(net, COMPOSITES["clrp"], image)
        seed, h = np.eye(7)[c] * abs(book.values[scores]), book.values[hidden]
        sent = [shared([(h, positive(w))], seed, 1e-9) for w in (weight, -weight)]
        target, dual = (book.back(hidden, part) for part in sent)
        wanted.append(target / target.sum() - dual / dual.sum())
        shares.append(min(target.sum() / sent[0].sum(), dual.sum() / sent[1].sum()))
    close(found, np.array(wanted)[None])
    np.testing.assert_allclose(kept[0], shares)


def test_negated_weights_need_a_linear_end(tmp_path):
    net = Net()
    features = net("Relu", net("Conv", "x", net.w(5, 3, 3, 3)))
    scores = net("Flatten", net("GlobalAveragePool", features))
    graph = net.graph(tmp_path, scores)
    with pytest.raises(Unsupported, match="clrp2 needs raw scores straight from a linear layer; GlobalAveragePool"):
        build(graph, [Request("relevance", composite="clrp", start="clrp2")], targets=1)
    net = Net()
    scores = net("Gemm", net("Flatten", "x"), net.w(4, 192), net.w(4), transB=1)
    graph = net.graph(tmp_path, scores, keep=[scores])
    with pytest.raises(Unsupported, match="which does not depend on what is asked for"):
        build(graph, [Request("relevance", at=scores, composite="clrp", start="clrp2")], targets=1)


# ----- rules -----


def test_every_rule_has_a_textbook_form():
    made = {kind for _, kind in inspect.getmembers(relevance_rules, inspect.isclass) if hasattr(kind, "needs_input")}
    assert made - {relevance_rules.LinearRule} == set(DENSE)


RULES = [
    *(Epsilon(), Epsilon(0), Epsilon(0.25), ZPlus(), ZPlus(bias=True), ZPlus(eps=0), AlphaBeta(), AlphaBeta(3, 2)),
    *(Gamma(), Gamma(2.0), ZBox(), ZBox(own=True), ZBox(own=True, eps=0), WSquare(), WSquare(0), Flat()),
]
UNITS: dict[str, Callable[[Net, str], str]] = {
    "Conv": lambda net, x: net("Conv", x, net.w(4, 3, 3, 2), net.w(4), pads=[1, 0, 2, 1], strides=[2, 1]),
    "Conv without bias": lambda net, x: net(
        "Conv", x, net.w(6, 1, 3, 3), group=3, dilations=[2, 2], auto_pad="SAME_UPPER"
    ),
    "Conv, 1-D": lambda net, x: net(
        "Conv", net("Reshape", x, [0, 6, 32]), net.w(4, 3, 5), net.w(4), group=2, strides=[3]
    ),
    "Conv and Add": lambda net, x: net("Add", net.w(4, 1, 1), net("Conv", x, net.w(4, 3, 1, 1), net.w(4))),
    "Conv and Add of a grid": lambda net, x: net("Add", net("Conv", x, net.w(4, 3, 1, 1)), net.w(4, 8, 8)),
    "ConvTranspose": lambda net, x: net("ConvTranspose", x, net.w(3, 2, 3, 3), net.w(6), group=3, strides=[2, 2]),
    "Gemm": lambda net, x: net("Gemm", net("Flatten", x), net.w(192, 5), net.w(5), alpha=-0.5, beta=2.0),
    "Gemm, turned": lambda net, x: net("Gemm", net("Flatten", x), net.w(5, 192), net.w(1, 5), transB=1),
    "MatMul": lambda net, x: net("MatMul", x, net.w(8, 5)),
    "MatMul and Add": lambda net, x: net("Add", net("MatMul", net("Flatten", x), net.w(192, 5)), net.w(5)),
    "MatMul from the left": lambda net, x: net("Add", net("MatMul", net.w(5, 8), x), net.w(5, 1)),
}


def jacobian(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """(numbers of x, numbers of y) for one row, by central differences."""
    moved = np.eye(x.size).reshape(x.size, *x.shape) * step
    ahead, behind = (function(x[None] + sign * moved).reshape(x.size, -1) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
def test_rule(unit, signed, tmp_path, monkeypatch):
    """Every rule on a layer of its own, fed with a map; the layer's matrix is found by running it."""
    net, x = Net(), images()
    y = UNITS[unit](net, "x" if signed else net("Relu", "x"))
    graph = net.graph(tmp_path, net("Flatten", net("Relu", y)), keep=[y])
    relevance = np.random.default_rng(3).normal(size=(2, *graph.shape(y)[1:]))
    layer = in_doubles(graph, y)
    shift = layer(np.zeros((1, *x[0].shape))).ravel()
    matrix = layer(np.eye(x[0].size).reshape(-1, *x[0].shape)).reshape(x[0].size, -1) - shift
    if unit == "Conv and Add of a grid":  # what is added to every cell apart is no bias: relevance passes it
        shift = 0 * shift
    edges = [np.broadcast_to(edge.reshape(3, 1, 1), x[0].shape).ravel() for edge in (LOW, HIGH)]
    inputs = x.reshape(2, -1)
    if not signed:
        inputs, edges = positive(inputs), [positive(edge) for edge in edges]
    for rule in RULES:
        monkeypatch.setitem(COMPOSITES, "tried", Composite(rule, rule))
        request = Request("relevance", composite="tried", start="map", start_at=y)
        if unit == "ConvTranspose" and not rule.needs_input:
            with pytest.raises(Unsupported, match="transposed convolution"):
                build(graph, [request], targets=1)
            continue
        built = build(graph, [request], targets=1, portable=True, bounds=(LOW, HIGH))
        found, _ = run(built, {"x": x, TARGETS: CHOSEN, START: relevance})
        rest = (matrix, (matrix != 0).astype(float), shift)
        dense = DENSE[type(rule)]
        wanted = [dense(rule, v, *rest, r.ravel(), *edges) for v, r in zip(inputs, relevance, strict=True)]
        close(found[0], np.reshape(wanted, x.shape), 1e-8)


CHAINS: dict[str, Callable[[Net, str], str]] = {
    "Relu": lambda net, z: net("Relu", z),
    "Clip": lambda net, z: net("Clip", z, 0.0, 6.0),
    "Relu, Add": lambda net, z: net("Add", net("Relu", z), 0.5),
    "Relu, Sub of the mean": lambda net, z: (lambda y: net("Sub", y, net("ReduceMean", y, axes=[1])))(net("Relu", z)),
    "Relu, Sigmoid": lambda net, z: net("Sigmoid", net("Relu", z)),
    "Relu, BatchNormalization": lambda net, z: net(
        "BatchNormalization", net("Relu", z), net.w(4), net.w(4), net.w(4), np.abs(net.w(4)) + 1
    ),
    "Relu, LayerNormalization": lambda net, z: net("LayerNormalization", net("Relu", z), net.w(6)),
    "Relu, Relu": lambda net, z: net("Identity", net("Relu", net("Relu", z))),
    "nothing": lambda net, z: net("Flatten", z),
}


@pytest.mark.parametrize("rule", [Gamma(), Epsilon(), ZBox()], ids=repr)
@pytest.mark.parametrize("chain", CHAINS)
def test_relevance_of_inactive_units_is_not_forgotten(chain, rule, tmp_path, monkeypatch):
    """Where a unit behind a ReLU may have relevance though it is inactive, the rule's full form is needed."""
    monkeypatch.setitem(COMPOSITES, "tried", Composite(rule, rule))
    net = Net()
    weight, shift = net.w(4, 3, 3, 3), net.w(4)
    last = CHAINS[chain](net, net("Conv", "x", weight, shift))
    graph = net.graph(tmp_path, net("Flatten", last), keep=[last], fold_norm=False)
    x = images()
    relevance = np.random.default_rng(3).normal(size=(2, *graph.shape(last)[1:]))
    request = Request("relevance", composite="tried", start="map", start_at=last)
    built = build(graph, [request], targets=1, portable=True)
    found, _ = run(built, {"x": x, TARGETS: CHOSEN, START: relevance})
    matrix = conv_matrix(weight, x[0].shape, [1, 1], [0] * 4, 1)
    rest = (matrix, (matrix != 0).astype(float), np.repeat(shift.astype(float), matrix.shape[1] // 4))
    edges = [np.full(x[0].size, edge) for edge in (-2.1179, 2.64)]
    wanted = [DENSE[type(rule)](rule, v.ravel(), *rest, r.ravel(), *edges) for v, r in zip(x, relevance, strict=True)]
    close(found[0], np.reshape(wanted, x.shape))


def test_a_map_may_stand_before_an_added_bias(tmp_path, monkeypatch):
    """Also where the unit behind it is inactive."""
    monkeypatch.setitem(COMPOSITES, "tried", Composite(Epsilon(), Epsilon()))
    net, x = Net(), images()
    weight, shift = net.w(192, 5), net.w(5)
    product = net("MatMul", net("Flatten", "x"), weight)
    graph = net.graph(tmp_path, net("Identity", net("Relu", net("Add", product, shift))), keep=[product])
    request = Request("relevance", composite="tried", start="map", start_at=product)
    relevance = np.random.default_rng(3).normal(size=(2, 5))
    built = build(graph, [request], targets=1)
    found, _ = run(built, {"x": x, TARGETS: CHOSEN % 5, START: relevance})
    rest = (weight.astype(float), None, shift.astype(float))
    wanted = [
        dense_epsilon(Epsilon(), v, *rest, r, None, None) for v, r in zip(x.reshape(2, -1), relevance, strict=True)
    ]
    close(found[0], np.reshape(wanted, x.shape))


@pytest.mark.parametrize("rule", [Gamma(), Epsilon()], ids=repr)
@pytest.mark.parametrize("low", [-0.4, 0.0, 0.4])
def test_a_clip_cuts_units_off_only_at_zero(low, rule, tmp_path, monkeypatch):
    """What a clip leaves of an inactive unit has relevance of its own, unless it is 0."""
    monkeypatch.setitem(COMPOSITES, "tried", Composite(rule, Epsilon()))
    net, x = Net(), images()
    clipped = net("Clip", net("Conv", "x", net.w(4, 3, 3, 3), net.w(4)), low, 1.0)
    scores = net("Gemm", net("Flatten", clipped), net.w(7, 144), net.w(7), transB=1)
    built = build(net.graph(tmp_path, scores), [Request("relevance", composite="tried")], targets=1, portable=True)
    close(run(built, {"x": x, TARGETS: CHOSEN})[0], textbook(net, scores, "tried", x, logit))


def test_the_full_form_is_left_out_only_where_it_is_certain(tmp_path):
    """Under gamma a layer that a ReLU6 follows is run once more and sent back once, one that nothing follows twice.

    The first layer's box costs no run, as its edges are constant. Targets share the runs.
    """
    net = Net()
    value = net("Relu", net("Conv", net("Relu", "x"), net.w(4, 3, 3, 3)))
    value = net("Clip", net("Conv", value, net.w(4, 4, 3, 3)), 0.0, 6.0)
    scores = net("Flatten", net("Conv", value, net.w(5, 4, 4, 4)))
    request, targets = Request("relevance", composite="epsilon-gamma-box"), 3
    kinds = [node.op_type for node in build(net.graph(tmp_path, scores), [request], targets).proto.graph.node]
    layers = {"box": 1 + 3 * targets, "gamma": 1 + 1 + targets, "last": 1 + 2 + 2 * targets}
    assert kinds.count("Conv") + kinds.count("ConvTranspose") == sum(layers.values())


# ----- operators -----


@dataclass(frozen=True)
class Case:
    """One operator between the image and the value at which a map is fed.

    Attributes:
        make: writes it.
        how: what its input must receive: the map as it is ("pass"), through the transposed Jacobian ("move"), or in
            proportion ("share").
        positive: whether the image is.
    """

    make: Callable[[Net, str], str]
    how: str
    opset: int = 17
    positive: bool = False
    size: tuple[int, int] = (4, 4)


def passing(op: str, *more: Any, opset: int = 17, positive: bool = False, **attributes: Any) -> Case:
    return Case(lambda net, x: net(op, x, *more, **attributes), "pass", opset, positive)


def moving(op: str, *more: Any, opset: int = 17, **attributes: Any) -> Case:
    return Case(lambda net, x: net(op, x, *more, **attributes), "move", opset)


def sharing(op: str, *more: Any, opset: int = 17, **attributes: Any) -> Case:
    return Case(lambda net, x: net(op, x, *more, **attributes), "share", opset)


def channel(net: Net, x: str, i: int) -> str:
    return net("Slice", x, [i], [i + 1], [1])


def squeeze_and_excitation(net: Net, x: str) -> str:
    squeezed = net("Conv", net("GlobalAveragePool", x), net.w(3, 3, 1, 1))
    return net("Mul", net("Sigmoid", squeezed), x)


def hard_gate(net: Net, x: str) -> str:
    return net("Div", net("Clip", net("Add", x, 3.0), 0.0, 6.0), 6.0)


def gelu(order: int) -> Callable[[Net, str], str]:
    def make(net: Net, x: str) -> str:
        bent = net("Add", net("Erf", net("Div", x, 2**0.5)), 1.0)
        if order == 0:
            return net("Mul", net("Mul", x, bent), 0.5)
        if order == 1:
            return net("Mul", net("Mul", x, 0.5), bent)
        if order == 2:
            return net("Mul", 0.5, net("Mul", bent, x))
        return net("Mul", x, net("Mul", 0.5, bent))

    return make


def gelu_by_tanh(net: Net, x: str) -> str:
    inner = net("Mul", net("Add", x, net("Mul", net("Pow", x, 3.0), 0.044715)), 0.79788456)
    return net("Mul", net("Mul", x, 0.5), net("Add", net("Tanh", inner), 1.0))


def mish(net: Net, x: str) -> str:
    return net("Mul", x, net("Tanh", net("Log", net("Add", net("Exp", x), 1.0))))


def layer_norm(net: Net, x: str) -> str:
    centred = net("Sub", x, net("ReduceMean", x, axes=[1]))
    spread = net("Sqrt", net("Add", net("ReduceMean", net("Pow", centred, 2.0), axes=[1]), 1e-5))
    return net("Add", net("Mul", net("Div", centred, spread), net.w(3, 1, 1)), net.w(3, 1, 1))


def quantised(net: Net, x: str) -> str:
    return net("DequantizeLinear", net("QuantizeLinear", x, 0.05, np.int8(3)), 0.05, np.int8(3))


PASSED = {
    **{kind: [passing(kind)] for kind in ("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSwish")},
    **{kind: [passing(kind)] for kind in ("Tanh", "Erf", "Softsign", "Abs", "Neg", "LpNormalization", "Identity")},
    **{kind: [passing(kind)] for kind in ("Sigmoid", "HardSigmoid", "Softplus", "Exp", "Dropout")},
    **{kind: [passing(kind, positive=True)] for kind in ("Sqrt", "Log", "Reciprocal")},
    "PRelu": [passing("PRelu", np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1))],
    "Swish": [passing("Swish", opset=24)],
    "Gelu": [passing("Gelu", opset=20)],
    "Mish": [passing("Mish", opset=18)],
    "LRN": [passing("LRN", size=3)],
    "Cast": [passing("Cast", to=TensorProto.FLOAT)],
    "QuantizeLinear": [Case(quantised, "pass", opset=19)],
    "DequantizeLinear": [Case(quantised, "pass", opset=19)],
    "Clip": [passing("Clip", 0.0, 6.0), passing("Clip", None, 1.0)],
    "Pow": [passing("Pow", 2.0)],
    "LayerNormalization": [passing("LayerNormalization", np.ones(4))],
    "InstanceNormalization": [passing("InstanceNormalization", np.ones(3), np.zeros(3))],
    "GroupNormalization": [passing("GroupNormalization", np.ones(3), np.zeros(3), num_groups=1, opset=21)],
    "RMSNormalization": [passing("RMSNormalization", np.ones(4), opset=23)],
    "Mul": [
        passing("Mul", np.array([2.0, -1.0, 0.5]).reshape(3, 1, 1)),
        Case(lambda net, x: net("Mul", x, x), "pass"),
        Case(lambda net, x: net("Mul", x, net("Sigmoid", x)), "pass"),
        Case(lambda net, x: net("Mul", net("Sigmoid", x), x), "pass"),
        Case(lambda net, x: net("Mul", hard_gate(net, x), x), "pass"),
        Case(lambda net, x: net("Mul", net("Neg", x), hard_gate(net, net("Identity", x))), "pass"),
        *(Case(gelu(order), "pass") for order in range(4)),
        Case(gelu_by_tanh, "pass"),
        Case(mish, "pass"),
        Case(squeeze_and_excitation, "pass"),
        Case(
            lambda net, x: net("Mul", net("Clip", x, 0.0, 6.0), net("Sigmoid", net("MatMul", x, net.w(4, 4)))), "pass"
        ),
        Case(lambda net, x: net("Mul", net("ReduceMax", x, axes=[1]), x), "pass"),
    ],
    "Div": [
        passing("Div", 3.0),
        Case(lambda net, x: net("Div", 3.0, x), "pass"),
        Case(lambda net, x: net("Div", x, net("Add", net("Exp", net("Neg", x)), 1.0)), "pass"),
        Case(lambda net, x: net("Div", x, net("ReduceL2", x, axes=[1])), "pass"),
        Case(layer_norm, "pass"),
    ],
}
MOVED = {
    "Reshape": [moving("Reshape", [0, 6, 8])],
    "Flatten": [moving("Flatten")],
    "Squeeze": [Case(lambda net, x: net("Squeeze", channel(net, x, 1), [1]), "move")],
    "Unsqueeze": [moving("Unsqueeze", [1])],
    "Transpose": [moving("Transpose", perm=[0, 2, 3, 1])],
    "Concat": [Case(lambda net, x: net("Concat", x, net("Slice", x, [1], [3], [2]), axis=2), "move")],
    "Split": [Case(lambda net, x: net("Split", x, [1, 2], outputs=2, axis=1)[1], "move")],
    "Slice": [moving("Slice", [3, 1], [0, 4], [2, 3], [-1, 2])],
    "Pad": [moving("Pad", [0, 0, 1, 0, 0, 0, 0, 2], 0.5)],
    "Expand": [Case(lambda net, x: net("Expand", channel(net, x, 0), [1, 5, 1, 1]), "move")],
    "Gather": [moving("Gather", [2, 0, 2], axis=1)],
    "DepthToSpace": [Case(lambda net, x: net("DepthToSpace", net("Reshape", x, [0, 12, 2, 2]), blocksize=2), "move")],
    "SpaceToDepth": [moving("SpaceToDepth", blocksize=2)],
    "Where": [Case(lambda net, x: net("Where", net("Greater", x, 0.0), x, 0.1), "move")],
    "GlobalMaxPool": [moving("GlobalMaxPool")],
    "ReduceMax": [moving("ReduceMax", axes=[1], keepdims=0)],
    "ReduceMin": [moving("ReduceMin", axes=[2, 3])],
    "MaxPool": [moving("MaxPool", kernel_shape=[2, 2])],
    "Max": [passing("Max", 0.0), Case(lambda net, x: net("Max", channel(net, x, 0), channel(net, x, 2)), "move")],
    "Min": [passing("Min", 6.0), Case(lambda net, x: net("Min", channel(net, x, 0), channel(net, x, 2)), "move")],
}
SHARED = {
    "AveragePool": [
        sharing("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 2], count_include_pad=1)
    ],
    "GlobalAveragePool": [sharing("GlobalAveragePool")],
    "ReduceMean": [sharing("ReduceMean", axes=[1, 3], keepdims=0), sharing("ReduceMean", [2], opset=18)],
    "ReduceSum": [sharing("ReduceSum", [2, 3])],
    "Resize": [sharing("Resize", None, [1.0, 1.0, 2.0, 1.5], mode="linear")],
    "BatchNormalization": [
        sharing("BatchNormalization", [1.0, -2.0, 0.5], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    ],
    "Add": [
        Case(lambda net, x: net("Add", channel(net, x, 0), net("Slice", x, [1], [3], [1])), "share"),
        passing("Add", np.array([2.0, -1.0, 0.5]).reshape(3, 1, 1)),
    ],
    "Sub": [
        Case(lambda net, x: net("Sub", channel(net, x, 0), channel(net, x, 2)), "share"),
        passing("Sub", 0.4),
        Case(lambda net, x: net("Sub", 0.4, x), "pass"),
        Case(lambda net, x: net("Sub", x, net("ReduceMean", x, axes=[1])), "pass"),
    ],
    "Sum": [Case(lambda net, x: net("Sum", *(channel(net, x, i) for i in range(3))), "share"), passing("Sum", 0.4)],
    "Mean": [Case(lambda net, x: net("Mean", *(channel(net, x, i) for i in range(3))), "share")],
    "Conv": [Case(lambda net, x: net("Conv", x, net.w(2, 3, 3, 3), net.w(2), pads=[1, 0, 1, 0]), "share")],
    "ConvTranspose": [
        Case(lambda net, x: net("ConvTranspose", x, net.w(3, 2, 3, 3), net.w(2), strides=[2, 1]), "share")
    ],
    "Gemm": [Case(lambda net, x: net("Gemm", net("Flatten", x), net.w(48, 5), net.w(5), alpha=0.7), "share")],
    "MatMul": [Case(lambda net, x: net("Add", net("MatMul", x, net.w(4, 5)), net.w(5)), "share")],
}


def attention(net: Net, x: str) -> str:
    tokens = net("Transpose", net("Reshape", x, [0, 3, -1]), perm=[0, 2, 1])
    weights = net("Softmax", net("MatMul", tokens, net("Transpose", tokens, perm=[0, 2, 1])), axis=-1)
    return net("MatMul", weights, tokens)


def attended(net: Net, x: str) -> str:
    tokens = net("Transpose", net("Reshape", x, [0, 3, -1]), perm=[0, 2, 1])
    return net("Attention", tokens, tokens, tokens, q_num_heads=1, kv_num_heads=1)


REFUSED = {
    "Softmax": (
        attention,
        "MatMul 'n5'.*: both factors are computed from the image .*; Softmax 'n4': attention has no",
    ),
    "LogSoftmax": (lambda net, x: net("Neg", net("LogSoftmax", x)), "LogSoftmax 'n0': attention has no relevance rule"),
    "Einsum": (lambda net, x: net("Einsum", x, net.w(4, 5), equation="nchw,wk->nchk"), "Einsum 'n0': attention has no"),
    "Attention": (attended, "Attention 'n2': attention has no relevance rule"),
}
CASES = {kind: cases for table in (PASSED, MOVED, SHARED) for kind, cases in table.items()}
SINGLE = {"Celu", "QuantizeLinear", "DequantizeLinear"}  # operators without a float64 form


def in_doubles(graph: Graph, value: str) -> Callable[[np.ndarray], np.ndarray]:
    """An inner value as a function of the image, without the image's rounding to float32."""
    proto = onnx.ModelProto.FromString(graph.proto.SerializeToString())
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=value))
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    evaluator = ReferenceEvaluator(proto, new_ops=[ConvTranspose])
    return lambda image: evaluator.run(None, {"x": image})[0]


def test_every_operator_has_a_case():
    assert set(CASES) | set(REFUSED) == set(RELEVANCE)


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind in CASES for i in range(len(CASES[kind]))], ids=str)
def test_operator(kind, number, tmp_path):
    case = CASES[kind][number]
    net = Net()
    y = case.make(net, "x")
    assert any(node.op_type == kind for node in net.nodes)
    scores = net("Flatten", net("Neg", y)) if case.opset < 23 else net("Flatten", y)
    x = images(size=case.size)
    x = np.abs(x) + 0.1 if case.positive else x
    single = net.graph(tmp_path, scores, case.size, case.opset, np.float32, keep=[y])
    request = Request("relevance", composite="epsilon", start="map", start_at=y)
    values = evaluate(net.proto(y, None, case.size, case.opset), {"x": x.astype(np.float32)})[0]
    relevance = np.random.default_rng(5).normal(size=values.shape)
    feed = {"x": x, TARGETS: CHOSEN, START: relevance}
    ((rough, _),) = in_float32(build(single, [request], targets=1), feed)
    if kind in SINGLE:
        assert case.how == "pass"
        close(rough[0], relevance, 1e-6)
        return
    graph = net.graph(tmp_path, scores, case.size, case.opset, keep=[y])
    function = in_doubles(graph, y)
    wanted = []
    for image, z, r in zip(x, function(x), relevance, strict=True):
        if case.how == "pass":
            wanted.append(r)
        elif case.how == "move":
            wanted.append((jacobian(function, image) @ r.ravel()).reshape(image.shape))
        else:
            sent = r / stable(z, 1e-6)
            wanted.append(image * (jacobian(function, image) @ sent.ravel()).reshape(image.shape))
    found, _ = run(build(graph, [request], targets=1, portable=True), feed)
    close(found[0], np.array(wanted), 1e-6)
    close(rough[0], found[0], 1e-3)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_operator_and_the_reason(kind, tmp_path):
    make, text = REFUSED[kind]
    net = Net()
    graph = net.graph(tmp_path, net("Flatten", make(net, "x")), (4, 4), 23 if kind == "Attention" else 17)
    with pytest.raises(Unsupported, match=text):
        build(graph, [Request("relevance", composite="epsilon-plus")], targets=1)


def test_a_product_without_a_gate_is_refused(tmp_path):
    net = Net()
    product = net("Mul", net("Conv", "x", net.w(3, 3, 1, 1)), net("Conv", "x", net.w(3, 3, 1, 1)))
    graph = net.graph(tmp_path, net("Flatten", product))
    with pytest.raises(Unsupported, match="Mul 'n2': neither factor is a gate"):
        build(graph, [Request("relevance", composite="epsilon-plus")], targets=1)


# ----- properties -----


def test_every_operators_sign_is_what_the_facts_say(tmp_path):
    """Values that count as non-negative are so on random images, in every case above, on signed and other inputs."""
    checked = set()
    for kind, cases in CASES.items():
        for case in cases:
            for image in ("x", "Abs"):
                net = Net()
                y = case.make(net, image if image == "x" else net("Abs", "x"))
                graph = net.graph(tmp_path, net("Flatten", net("Cast", y, to=1)), case.size, case.opset, np.float32)
                outputs = [name for op in graph.ops for name in op.outputs]
                proto = onnx.ModelProto.FromString(graph.proto.SerializeToString())
                del proto.graph.output[:]
                proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
                x = images(2, case.size).astype(np.float32)
                found = evaluate(proto, {"x": np.abs(x) + 0.1 if case.positive else x})
                facts = Facts(graph)
                for name, values in zip(outputs, found, strict=True):
                    if name in facts.nonnegative and graph.producer[name].kind != "QuantizeLinear":
                        assert values.min() >= 0, (kind, graph.producer[name].text)
                        checked.add(graph.producer[name].kind)
    assert len(checked) > 40


def test_relevance_inside_a_branch(tmp_path):
    """Asked for in one branch only, a sum still divides by what both bring."""
    net, scores = tiny()
    x = images()
    inner = [node.output[0] for node in net.nodes if node.output[0] != scores]
    for value in inner:
        graph = net.graph(tmp_path, scores, keep=[value])
        request = Request("relevance", at=value, composite="epsilon-plus")
        found, _ = run(build(graph, [request], targets=1, portable=True), {"x": x, TARGETS: CHOSEN})
        wanted = []
        for image, (c,) in zip(x, CHOSEN, strict=True):
            book = Textbook(net, COMPOSITES["epsilon-plus"], image)
            wanted.append(book.back(scores, logit(book.values[scores], c), end=value))
        close(found[0], np.array(wanted))


def test_lrp_0_is_input_times_gradient(tmp_path):
    net, scores = tiny()
    requests = [Request("relevance", composite="zero"), Request(times_input=True)]
    built = build(net.graph(tmp_path, scores), requests, targets=1, portable=True)
    x = images()
    relevance = evaluate(built.proto, {"x": x, TARGETS: CHOSEN}, built.outputs[0].values)
    gradient = evaluate(built.proto, {"x": x, TARGETS: CHOSEN}, built.outputs[1].values)
    close(relevance[0], gradient[0])


@pytest.mark.parametrize("composite", COMPOSITES)
def test_relevance_is_linear_and_targets_do_not_mix(composite, tmp_path):
    """R(a + 2 b) = R(a) + 2 R(b) for fed maps; several targets give what each alone does."""
    net, scores = tiny()
    start_at = next(node.output[0] for node in net.nodes if node.op_type == "Concat")
    x, rng = images(), np.random.default_rng(9)
    graph = net.graph(tmp_path, scores, keep=[start_at])
    request = Request("relevance", composite=composite, start="map", start_at=start_at)
    built = build(graph, [request], targets=1, portable=True)
    a, b = rng.normal(size=(2, 2, *graph.shape(start_at)[1:]))
    of_a, of_b, of_both = (run(built, {"x": x, TARGETS: CHOSEN, START: m})[0] for m in (a, b, a + 2 * b))
    close(of_both, of_a + 2 * of_b)
    request = Request("relevance", composite=composite)
    others = 6 - CHOSEN
    both = build(graph, [request], targets=2, portable=True)
    together, kept = run(both, {"x": x, TARGETS: np.hstack([CHOSEN, others])})
    for k, chosen in enumerate((CHOSEN, others)):
        alone, share = run(build(graph, [request], targets=1, portable=True), {"x": x, TARGETS: chosen})
        close(together[k], alone[0])
        close(kept[k], share[0])


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("start", [*STARTS, "clrp2"])
def test_a_dead_network_sends_zeros(composite, start, tmp_path):
    """Nothing is 0/0: a black image, and biases that switch every unit off, or no bias at all."""
    for shift in (-1.0, 0.0):
        net, scores = tiny()
        net.weights = [
            numpy_helper.from_array(np.full(t.dims, shift, np.float32), t.name) if len(t.dims) == 1 else t
            for t in net.weights
        ]
        graph = net.graph(tmp_path, scores, dtype=np.float32)
        request = Request("relevance", composite=composite, start=start)
        built = build(graph, [request], targets=1)
        feed = {"x": images() * 0, TARGETS: CHOSEN, **({WEIGHTS: FED} if start == "weights" else {})}
        ((found, kept),) = in_float32(built, feed)
        assert np.isfinite(found).all()
        assert np.isfinite(kept).all()
        if COMPOSITES[composite].first is None:
            assert not found.any()


POOLS = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1]},
    {"kernel_shape": [2, 2], "strides": [3, 4]},
]


@pytest.mark.parametrize("geometry", POOLS, ids=str)
@pytest.mark.parametrize("pool", ["winner", "ties", "proportional"])
def test_equal_maxima(pool, geometry, tmp_path, monkeypatch):
    """Whole numbers from -2 to 2: the greatest of a window is seldom alone, and often not positive."""
    x = np.random.default_rng(4).integers(-2, 3, (2, 3, *SIZE)).astype(np.float64)
    monkeypatch.setitem(COMPOSITES, "tried", Composite(Epsilon(), Epsilon(), pool=pool))
    net = Net()
    y = net("MaxPool", "x", **geometry)
    graph = net.graph(tmp_path, net("Flatten", y), keep=[y], dtype=np.float32)
    relevance = np.random.default_rng(6).normal(size=(2, *graph.shape(y)[1:]))
    books = [Textbook(net, COMPOSITES["tried"], image) for image in x]
    wanted = np.array([book.back(y, r) for book, r in zip(books, relevance, strict=True)])
    request = Request("relevance", composite="tried", start="map", start_at=y)
    for portable in (True, False):
        built = build(graph, [request], targets=1, portable=portable)
        ((found, _),) = in_float32(built, {"x": x, TARGETS: CHOSEN, START: relevance})
        close(found[0], wanted, 1e-6)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bounds_hold_at_the_image_before_a_normalisation_inside(layout, tmp_path):
    """A net that scales its own input, given the pixels' bounds, is the plain net given the scaled bounds."""
    mean, deviation = (np.reshape(values, (3, 1, 1)) for values in ([0.5, 0.25, 0.75], [0.25, -0.5, 0.125]))
    pixels = np.random.default_rng(2).integers(0, 256, (2, 3, *SIZE)) / 256
    ends = (0 - mean) / deviation, (1 - mean) / deviation
    found = []
    for inside in (True, False):
        net = Net(layout=layout if inside else "nchw")
        value, x = "x", (pixels - mean) / deviation
        edges = np.minimum(*ends).ravel(), np.maximum(*ends).ravel()
        if inside:
            x, edges = pixels, (np.zeros(3), np.ones(3))
            if layout == "nhwc":
                x, value = pixels.transpose(0, 2, 3, 1), net("Transpose", "x", perm=[0, 3, 1, 2])
            value = net("Div", net("Sub", value, mean), deviation)
        hidden = net("Relu", net("Conv", value, net.w(5, 3, 3, 3), net.w(5), pads=[1, 1, 1, 1]))
        scores = net("Gemm", net("Flatten", hidden), net.w(7, 320), net.w(7), transB=1)
        request = Request("relevance", composite="deep-taylor")
        built = build(net.graph(tmp_path, scores), [request], targets=1, portable=True, bounds=edges)
        relevance, _ = run(built, {"x": x, TARGETS: CHOSEN})
        found.append(relevance.transpose(0, 1, 4, 2, 3) if inside and layout == "nhwc" else relevance)
    close(found[0], found[1])


# ----- a trained network -----


def test_a_trained_network_keeps_its_relevance(shared_data):
    """z+ without a bias conserves, at the image and at the last feature map."""
    model = open_model(shared_data / "models" / "resnet50.onnx")
    graph = canonize(model, (224, 224), raw_scores(model), keep=["activation_48"])
    path = sorted((shared_data / "images" / "ccby").glob("*.jpg"))[10]
    photograph = Image.open(path).convert("RGB").resize((224, 224))
    x = (np.asarray(photograph, np.float32).transpose(2, 0, 1)[None] / 255 - 0.45) / 0.225
    requests = [Request("relevance", composite="z-plus"), Request("relevance", at="activation_48", composite="z-plus")]
    built = build(graph, requests, targets=1, ranks=1)
    for values, kept in in_float32(built, {model.input.name: x, TARGETS: np.array([[-1]])}):
        assert np.isfinite(values).all()
        assert kept[0, 0] == pytest.approx(1, abs=1e-4)

"""Every gradient rule against finite differences in float64, every emitted graph against ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from heatmill.models.graph.backward import CLASSES, TARGETS, WEIGHTS, Built, Unsupported, build
from heatmill.models.graph.canonize import Graph, canonize
from heatmill.models.graph.emit import PREFIX
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.request import Request
from heatmill.models.graph.vjp import GUIDED, VJP
from heatmill.models.load import open_model
from tests.graphs import Writer

SIZE = (7, 6)
NEWEST = min(26, onnx.defs.onnx_opset_version())
CHOSEN = np.array([[0, 2], [2, 1]])  # of each row, two classes


class Net(Writer):
    """A graph on the image `x`."""

    def w(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def proto(self, output: str, shape: Sequence[int | str | None] | None, size=SIZE, opset: int = 17, rows="N"):
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3, *size])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def save(self, path: Path, features: str, size=SIZE, opset: int = 17, rows: int | str = "N") -> Path:
        """A linear layer behind the flattened features, and the file."""
        feed = {"x": image(size).astype(np.float32)}
        (sample,) = evaluate(self.proto(features, None, size, opset, rows), [features], feed)
        flat = self("Flatten", features)
        scores = self("Gemm", flat, self.w(3, sample[0].size), self.w(3), transB=1)
        onnx.save(self.proto(scores, [rows, 3], size, opset, rows), path)
        return path


def image(size=SIZE, rows: int = 2, seed: int = 1) -> np.ndarray:
    """Within a row all values lie apart from each other and from 0, by more than a finite difference moves them."""
    rng, count = np.random.default_rng(seed), 3 * size[0] * size[1]
    count += count % 2
    values = np.linspace(-2, 2, count)[: 3 * size[0] * size[1]]
    return np.stack([rng.permutation(values) for _ in range(rows)]).reshape(rows, 3, *size)


# ----- float64 operators that the reference evaluator has wrong, slow or in float32 only -----
# Its Conv and poolings are slow; wrong are ConvTranspose with groups, ceil_mode, the Indices of MaxPool, GlobalMaxPool
# of other ranks than 4, LRN beyond as many channels as rows, LpNormalization with p=1, Mean and negative Pad; Erf, Gelu
# and GroupNormalization work in float32. ONNX Runtime's answers in float32 are compared with all of these below.


def padding(auto_pad, pads, size, kernel, strides, dilations):
    rank = len(kernel)
    pads = list(pads or [0] * 2 * rank)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        for i in range(rank):
            whole = max(0, (-(-size[i] // strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size[i])
            pads[i] = whole // 2 if auto_pad == "SAME_UPPER" else whole - whole // 2
            pads[rank + i] = whole - pads[i]
    return pads


def windowed(x, kernel, strides, dilations, pads, count, fill=0.0):
    """What each window reads, along a last axis."""
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(count, strides, kernel, dilations, strict=True)]
    behind = [max(0, r - size - pad) for r, size, pad in zip(reach, x.shape[2:], pads, strict=False)]
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads, behind, strict=False)], constant_values=fill)
    read = []
    for tap in product(*map(range, kernel)):
        start = [t * d for t, d in zip(tap, dilations, strict=True)]
        cut = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(start, count, strides, strict=True)]
        read.append(x[(..., *cut)])
    return np.stack(read, -1)


def counts(size, kernel, strides, dilations, pads, ceil_mode=0):
    rank, found = len(kernel), []
    for i in range(rank):
        room = size[i] + pads[i] + pads[rank + i] - (kernel[i] - 1) * dilations[i] - 1
        n = -(-room // strides[i]) + 1 if ceil_mode else room // strides[i] + 1
        found.append(n - 1 if ceil_mode and (n - 1) * strides[i] >= size[i] + pads[i] else n)
    return found


class Conv(OpRun):
    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, pads=None, strides=None):
        kernel, rank, group = w.shape[2:], w.ndim - 2, group or 1
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        pads = padding(auto_pad, pads, x.shape[2:], kernel, strides, dilations)
        count = counts(x.shape[2:], kernel, strides, dilations, pads)
        read = windowed(x, kernel, strides, dilations, pads, count)
        read = read.reshape(len(x), group, -1, *read.shape[2:])
        w = w.reshape(group, len(w) // group, w.shape[1], -1)
        out = np.einsum("ngc...k,gock->ngo...", read, w).reshape(len(x), -1, *count)
        return (out if b is None else out + b.reshape(-1, *[1] * rank),)


class ConvTranspose(OpRun):
    def _run(
        self,
        x,
        w,
        b=None,
        auto_pad=None,
        dilations=None,
        group=1,
        kernel_shape=None,
        output_padding=None,
        output_shape=None,
        pads=None,
        strides=None,
    ):
        kernel, rank, group = w.shape[2:], w.ndim - 2, group or 1
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        extra, pads = output_padding or [0] * rank, list(pads or [0] * 2 * rank)
        size = x.shape[2:]
        reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER") and output_shape is None:
            output_shape = [n * s for n, s in zip(size, strides, strict=True)]
        if output_shape is not None:
            for i in range(rank):
                whole = max(0, reach[i] + extra[i] - output_shape[i])
                pads[i] = whole // 2 if auto_pad == "SAME_UPPER" else whole - whole // 2
                pads[rank + i] = whole - pads[i]
        grouped = x.reshape(len(x), group, -1, *size)
        w = w.reshape(group, -1, *w.shape[1:])
        full = np.zeros((len(x), group * w.shape[2], *(r + e for r, e in zip(reach, extra, strict=True))), x.dtype)
        for tap in product(*map(range, kernel)):
            cut = [
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, n, s in zip(tap, dilations, size, strides, strict=True)
            ]
            share = np.einsum("ngc...,gco->ngo...", grouped, w[(..., *tap)])
            full[(..., *cut)] += share.reshape(len(x), -1, *size)
        out = full[(..., *(slice(pads[i], full.shape[2 + i] - pads[rank + i]) for i in range(rank)))]
        return (out if b is None else out + b.reshape(-1, *[1] * rank),)


class MaxPool(OpRun):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=0,
        dilations=None,
        kernel_shape=None,
        pads=None,
        storage_order=0,
        strides=None,
    ):
        rank = len(kernel_shape)
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        pads = padding(auto_pad, pads, x.shape[2:], kernel_shape, strides, dilations)
        count = counts(x.shape[2:], kernel_shape, strides, dilations, pads, ceil_mode)
        window = (kernel_shape, strides, dilations, pads, count)
        read = windowed(x, *window, fill=-np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min)
        where = read.argmax(-1)[..., None]
        places = windowed(np.arange(x.size).reshape(x.shape), *window, fill=-1)
        found = np.take_along_axis(read, where, -1)[..., 0], np.take_along_axis(places, where, -1)[..., 0]
        return found[: len(self.output)]


class AveragePool(OpRun):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=0,
        count_include_pad=0,
        dilations=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        rank = len(kernel_shape)
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        pads = padding(auto_pad, pads, x.shape[2:], kernel_shape, strides, dilations)
        count = counts(x.shape[2:], kernel_shape, strides, dilations, pads, ceil_mode)
        sums = windowed(x, kernel_shape, strides, dilations, pads, count).sum(-1)
        ones = np.ones((1, 1, *x.shape[2:]))
        if count_include_pad:
            ones = np.pad(ones, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)], constant_values=1)
            pads = [0] * 2 * rank
        return (sums / windowed(ones, kernel_shape, strides, dilations, pads, count).sum(-1),)


class GlobalMaxPool(OpRun):
    def _run(self, x):
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class Erf(OpRun):
    def _run(self, x):
        return (np.vectorize(math.erf)(x),)


class LRN(OpRun):
    def _run(self, x, alpha=None, beta=None, bias=None, size=None):
        squares = np.pad(x**2, [(0, 0), ((size - 1) // 2, size // 2), *[(0, 0)] * (x.ndim - 2)])
        total = sum(squares[:, i : i + x.shape[1]] for i in range(size))
        return (x / (bias + alpha / size * total) ** beta,)


class LpNormalization(OpRun):
    def _run(self, x, axis=None, p=None):
        return (x / (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p),)


class Mean(OpRun):
    def _run(self, *values):
        return (sum(values) / len(values),)


class Pad(OpRun):
    def _run(self, x, pads, fill=None, axes=None, mode="constant"):
        axes = np.arange(x.ndim) if axes is None else axes
        fill = {} if mode != "constant" else {"constant_values": 0.0 if fill is None else fill}
        for i, axis in enumerate(axes):
            low, high = pads[i], pads[len(axes) + i]
            x = np.take(x, range(max(0, -low), x.shape[axis] - max(0, -high)), axis)
            widths = [(0, 0)] * x.ndim
            widths[axis] = (max(0, low), max(0, high))
            x = np.pad(x, widths, mode, **fill)
        return (x,)


class Gelu(OpRun):
    def _run(self, x, approximate="none"):
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),)


class GroupNormalization(OpRun):
    def _run(self, x, scale, bias, epsilon=None, num_groups=None, stash_type=None):
        lines = x.reshape(len(x), num_groups, -1)
        lines = (lines - lines.mean(-1, keepdims=True)) / np.sqrt(lines.var(-1, keepdims=True) + epsilon)
        along = (-1, *[1] * (x.ndim - 2))
        return (lines.reshape(x.shape) * scale.reshape(along) + bias.reshape(along),)


OPERATORS = [
    *(Conv, ConvTranspose, MaxPool, AveragePool, GlobalMaxPool, Mean, Pad),
    *(Erf, Gelu, LRN, LpNormalization, GroupNormalization),
]


def evaluate(proto: onnx.ModelProto, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    evaluator = ReferenceEvaluator(proto, new_ops=OPERATORS)
    values = evaluator.run(None, feed)
    return [values[evaluator.output_names.index(name)] for name in names]


# ----- what is checked of every graph -----


def gradients(built: Built, feed: dict[str, np.ndarray], request: int = 0) -> np.ndarray:
    """(targets, rows, ...)"""
    return np.stack(evaluate(built.proto, built.outputs[request].values, feed))


def run(proto: onnx.ModelProto, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """By ONNX Runtime in float32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feed = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in feed.items()}
    return session.run(list(names), feed)


def in_float32(built: Built, feed: dict[str, np.ndarray], request: int = 0) -> np.ndarray:
    """(targets, rows, ...)"""
    return np.stack(run(built.proto, built.outputs[request].values, feed))


def slopes(scores: Callable[[np.ndarray], np.ndarray], x: np.ndarray, directions: np.ndarray, step: float):
    """Differences of the scores of every row along each direction, of the fourth order: (directions, rows, classes)."""
    moved = np.concatenate([x + k * step * v for v in directions for k in (1, -1, 2, -2)])
    near, back, far, rear = scores(moved).reshape(len(directions), 4, len(x), -1).swapaxes(0, 1)
    return (8 * (near - back) - (far - rear)) / (12 * step)


def agree(found: np.ndarray, directions: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Gradients (targets, rows, ...) along directions (directions, rows, ...) are the slopes."""
    chosen = np.take_along_axis(wanted, CHOSEN[None], 2)
    along = (found * directions[:, None]).sum((3, 4, 5)).swapaxes(1, 2)
    assert np.isfinite(found).all()
    assert np.abs(along - chosen).max() <= tolerance * np.linalg.norm(found) + 1e-9


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def lowerings(graph: Graph, requests: Sequence[Request] = (Request(),), **options) -> list[Built]:
    """The default one, and the portable one where it differs; both are valid ONNX."""
    fast, portable = (build(graph, requests, targets=2, portable=choice, **options) for choice in (False, True))
    kinds = [[node.op_type for node in built.proto.graph.node] for built in (fast, portable)]
    assert not {"ScatterElements", "ScatterND"}.intersection(kinds[1])
    found = [fast] if kinds[0] == kinds[1] else [fast, portable]
    for built in found:
        onnx.checker.check_model(built.proto, full_check=True)
    return found


def check(path: Path, compare: bool = True) -> None:
    """Both lowerings at two classes against finite differences in float64, and ONNX Runtime in float32 against them."""
    model = open_model(path)
    x = image()
    directions = np.random.default_rng(2).choice([-1.0, 1.0], (4, *x.shape))
    graph = canonize(model, SIZE, model.output, dtype=np.float64, fold_norm=False)
    wanted = slopes(lambda moved: evaluate(graph.proto, [graph.scores], {"x": moved})[0], x, directions, 1e-3)
    single = canonize(model, SIZE, model.output, fold_norm=False)
    for built, rough in zip(lowerings(graph), lowerings(single), strict=True):
        found = gradients(built, {"x": x, TARGETS: CHOSEN})
        assert found.dtype == np.float64
        agree(found, directions, wanted, 5e-8)  # attributes are float32
        if compare:
            close(in_float32(rough, {"x": x, TARGETS: CHOSEN}), found, 1e-3)


# ----- the cases: what stands between the image and the linear layer -----

Make = Callable[[Net, str], str]


@dataclass(frozen=True)
class Case:
    make: Make
    opset: int = 17
    compare: bool = True  # with ONNX Runtime


def one(op: str, *more, opset: int = 17, **attributes: Any) -> Case:
    return Case(lambda net, x: net(op, x, *more, **attributes), opset)


def after(first: Make, op: str, *more, opset: int = 17, **attributes: Any) -> Case:
    """The operator on something made of the image."""
    return Case(lambda net, x: net(op, first(net, x), *more, **attributes), opset)


def shaped(*shape: int) -> Make:
    return lambda net, x: net("Reshape", x, [0, *shape])


def turned(*order: int) -> Make:
    return lambda net, x: net("Transpose", x, perm=order)


def positive(net: Net, x: str) -> str:
    return net("Add", net("Abs", x), 0.4)


def doubled(net: Net, x: str) -> str:
    """Six channels."""
    return net("Concat", x, net("Exp", x), axis=1)


def flat(net: Net, x: str) -> str:
    return net("Flatten", x)


def row_sums(net: Net, x: str) -> str:
    return net("ReduceSum", net("Mul", x, net.w(1, 3, *SIZE)), [2], keepdims=1)


def conv(*kernel: int, op: str = "Conv", channels: int = 4, shape=(3, *SIZE), group: int = 1, **attributes) -> Case:
    def make(net: Net, x: str) -> str:
        dims = (channels, shape[0] // group) if op == "Conv" else (shape[0], channels // group)
        weight, bias = net.w(*dims, *kernel), net.w(channels)
        return net(op, net("Reshape", x, [0, *shape]), weight, bias, group=group, **attributes)

    return Case(make)


def pool(op: str, *kernel: int, shape=(3, *SIZE), opset: int = 17, **attributes) -> Case:
    return after(shaped(*shape), op, kernel_shape=kernel, opset=opset, **attributes)


def binary(op: str, same: bool = True) -> list[Case]:
    """Two operands that depend on the image, or one, with each kind of broadcasting."""

    def wide(net: Net, x: str) -> str:
        return net("Add", net("Mul", x, net.w(3, 1, 1)), 4.6)

    def narrow(net: Net, x: str) -> str:
        return net("Add", net("Tanh", row_sums(net, x)), 2.3)

    def lead(net: Net, x: str) -> str:
        low, high = net("Squeeze", narrow(net, x), [2]), net("Squeeze", narrow(net, x), [2])
        return net("Transpose", net(op, low, net("Unsqueeze", high, [0])), perm=[1, 0, 2, 3])

    return [
        Case(lambda net, x: net(op, x, wide(net, x))),
        Case(lambda net, x: net(op, narrow(net, x), wide(net, x))),
        Case(lambda net, x: net(op, wide(net, x), narrow(net, x))),
        Case(lambda net, x: net(op, x, net.w(*SIZE) + 3)),
        Case(lambda net, x: turned(1, 0, 2, 3, 4)(net, net(op, net.w(4, 1, 1, 1, 1), wide(net, x)))),
        Case(lead),
        *([Case(lambda net, x: net(op, x, x))] if same else []),
    ]


def matmul(*, left=None, right=None, shape=(3, *SIZE)) -> Case:
    """A product with given weights on one side, or with the image's own transpose."""

    def make(net: Net, x: str) -> str:
        x = net("Reshape", x, [0, *shape])
        if left or right:
            return net("MatMul", net.w(*left), x) if left else net("MatMul", x, net.w(*right))
        order = [*range(len(shape) - 1), len(shape), len(shape) - 1]
        return net("MatMul", x, net("Transpose", net("Mul", x, net.w(*shape)), perm=order))

    return Case(make)


def gemm(net: Net, x: str, **attributes) -> str:
    """With a C that depends on the image."""
    shape = (4, 126) if attributes.get("transB") else (126, 4)
    return net("Gemm", flat(net, x), net.w(*shape), net("ReduceMean", flat(net, x), axes=[1]), **attributes)


def columns(net: Net, x: str) -> str:
    return net("Transpose", flat(net, x))


def slices(*bounds: tuple[int, int, int, int], opset: int = 17) -> Case:
    """Each (start, end, axis, step)."""
    starts, ends, axes, steps = map(list, zip(*bounds, strict=True))
    return one("Slice", starts, ends, axes, steps, opset=opset)


def split(used: Sequence[int], count: int, *sizes: Sequence[int], axis: int = 1, opset: int = 17, **options) -> Case:
    def make(net: Net, x: str) -> str:
        parts = net("Split", x, *sizes, outputs=count, axis=axis, **options)
        return net("Concat", *(net("Flatten", parts[i]) for i in used), axis=1)

    return Case(make, opset)


def resize(*operands, shape=(3, *SIZE), opset: int = 17, **attributes) -> Case:
    return after(shaped(*shape), "Resize", *operands, opset=opset, **attributes)


def resize_to(*grid: int, region=None, **attributes) -> Case:
    """To sizes that the graph computes, as exporters have it."""

    def make(net: Net, x: str) -> str:
        sizes = net("Concat", net("Gather", net("Shape", x), [0, 1]), list(grid), axis=0)
        return net("Resize", x, region, None, sizes, **attributes)

    return Case(make)


def token_class(net: Net, x: str) -> str:
    """A learned row joined to rows of the image, repeated over the batch."""
    shape = net("Concat", net("Gather", net("Shape", x), [0]), [3, 2, 6], axis=0)
    return net("Concat", net("Expand", net.w(1, 3, 2, 6), shape), x, net("Tanh", x), axis=2)


REDUCTIONS = ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"]
CASES: dict[str, list[Case]] = {
    "Conv": [
        conv(3, 3),
        conv(3, 3, pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        conv(3, 2, pads=[0, 2, 3, 1]),
        conv(3, 3, pads=[4, 3, 0, 5]),
        conv(3, 3, strides=[2, 2], pads=[1, 1, 1, 1]),
        conv(2, 3, strides=[2, 3], pads=[0, 1, 2, 0]),
        conv(1, 1, strides=[3, 3]),
        conv(1, 2, strides=[2, 4], pads=[0, 0, 0, 1]),
        conv(3, 3, dilations=[2, 1], pads=[2, 0, 1, 0]),
        conv(3, 3, dilations=[2, 2], strides=[2, 2], pads=[2, 2, 2, 2]),
        conv(2, 3, dilations=[3, 1], strides=[2, 3], pads=[2, 0, 3, 1]),
        conv(3, 3, group=3, channels=6, strides=[2, 2], pads=[1, 1, 1, 1]),
        conv(3, 3, group=3, channels=6),
        conv(3, 3, group=3, channels=3, dilations=[2, 2], strides=[2, 1], pads=[2, 2, 2, 2]),
        conv(3, 3, auto_pad="SAME_UPPER", strides=[2, 2]),
        conv(2, 4, auto_pad="SAME_LOWER"),
        conv(3, 3, auto_pad="VALID", strides=[2, 1]),
        conv(4, shape=(6, 21), strides=[3], pads=[1, 2]),
        conv(3, shape=(6, 21), group=2, dilations=[2]),
        conv(2, 3, 2, shape=(2, 3, 7, 3), strides=[1, 2, 2], pads=[1, 1, 0, 0, 1, 1]),
        conv(2, 3, 2, shape=(2, 3, 7, 3), pads=[1, 1, 0, 0, 1, 1]),
        conv(1, 1, channels=5),
    ],
    "ConvTranspose": [
        conv(3, 3, op="ConvTranspose"),
        conv(3, 3, op="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        conv(3, 3, op="ConvTranspose", strides=[2, 3], dilations=[2, 1], pads=[0, 1, 2, 0]),
        conv(3, 3, op="ConvTranspose", group=3, channels=6, strides=[3, 1]),
        conv(3, 3, op="ConvTranspose", strides=[2, 2], output_shape=[15, 12]),
        conv(4, 3, op="ConvTranspose", strides=[2, 2], auto_pad="SAME_UPPER"),
        conv(2, 3, op="ConvTranspose", strides=[3, 4], output_padding=[2, 1]),
        conv(3, op="ConvTranspose", shape=(6, 21), strides=[2]),
    ],
    "Gemm": [
        Case(lambda net, x: gemm(net, x, alpha=0.7, beta=1.3)),
        Case(lambda net, x: gemm(net, x, transB=1)),
        Case(lambda net, x: net("Gemm", columns(net, x), net.w(126, 4), transA=1)),
        Case(lambda net, x: net("Gemm", columns(net, x), net.w(4, 126), net.w(4), transA=1, transB=1)),
        Case(lambda net, x: net("Transpose", net("Gemm", net.w(4, 126), flat(net, x), transB=1, alpha=0.3))),
        Case(lambda net, x: net("Transpose", net("Gemm", net.w(126, 4), columns(net, x), transA=1))),
    ],
    "MatMul": [
        matmul(right=(6, 5)),
        matmul(right=(3, 6, 5)),
        matmul(right=(6,)),
        matmul(left=(4, 7)),
        matmul(left=(3, 4, 7)),
        matmul(left=(7,)),
        matmul(left=(5, 7), shape=(1, 7, 18)),
        matmul(right=(5, 6, 2), shape=(3, 1, 7, 6)),
        matmul(right=(126, 5), shape=(126,)),
        matmul(),
        matmul(shape=(1, 9, 14)),
        Case(lambda net, x: net("MatMul", net("ReduceSum", x, [1]), turned(0, 1, 3, 2)(net, x))),
        Case(lambda net, x: net("MatMul", x, turned(0, 1, 3, 2)(net, net("ReduceSum", x, [1])))),
    ],
    "Einsum": [
        Case(lambda net, x: net("Einsum", x, net.w(3, 5), equation="nchw,ck->nkhw")),
        Case(lambda net, x: net("Einsum", x, net("Sigmoid", x), equation="n c h w, n c h v -> n h w v")),
        Case(lambda net, x: net("Einsum", flat(net, x), net.w(126, 5), equation="bi,ij")),
        one("Einsum", equation="nchw->nwhc"),
    ],
    "BatchNormalization": [
        Case(lambda net, x: net("BatchNormalization", x, net.w(3), net.w(3), net.w(3), net.w(3) ** 2 + 0.5)),
        Case(lambda net, x: net("BatchNormalization", flat(net, x), *[net.w(126) ** 2 + 1] * 4, epsilon=0.1)),
    ],
    "LayerNormalization": [
        Case(lambda net, x: net("LayerNormalization", turned(0, 2, 3, 1)(net, x), net.w(3), net.w(3))),
        Case(lambda net, x: net("LayerNormalization", x, net.w(*SIZE), axis=2, epsilon=1e-2)),
    ],
    "RMSNormalization": [
        Case(lambda net, x: net("RMSNormalization", turned(0, 2, 3, 1)(net, x), net.w(3)), opset=23),
        Case(lambda net, x: net("RMSNormalization", x, net.w(*SIZE), axis=2, epsilon=1e-2), opset=23),
    ],
    "InstanceNormalization": [
        Case(lambda net, x: net("InstanceNormalization", x, net.w(3), net.w(3), epsilon=1e-3)),
        Case(lambda net, x: net("InstanceNormalization", shaped(6, 21)(net, x), net.w(6), net.w(6))),
    ],
    "GroupNormalization": [
        Case(lambda net, x: net("GroupNormalization", doubled(net, x), net.w(6), net.w(6), num_groups=2), opset=21),
        Case(lambda net, x: net("GroupNormalization", x, net.w(3), net.w(3), num_groups=1), opset=21),
    ],
    "LpNormalization": [one("LpNormalization"), one("LpNormalization", axis=1, p=1)],
    "LRN": [
        after(doubled, "LRN", size=5, alpha=0.3, beta=0.6, bias=1.4),
        replace(after(doubled, "LRN", size=4, alpha=0.9), compare=False),  # ONNX Runtime takes odd sizes only
    ],
    "Softmax": [one("Softmax"), one("Softmax", axis=1), after(flat, "Softmax", opset=13)],
    "LogSoftmax": [one("LogSoftmax"), one("LogSoftmax", axis=1)],
    "Relu": [one("Relu")],
    "LeakyRelu": [one("LeakyRelu"), one("LeakyRelu", alpha=-0.3)],
    "PRelu": [
        Case(lambda net, x: net("PRelu", x, net.w(3, 1, 1))),
        Case(lambda net, x: net("PRelu", x, net("ReduceMean", x, axes=[2, 3]))),
    ],
    "ThresholdedRelu": [one("ThresholdedRelu", alpha=0.41)],
    "Elu": [one("Elu"), one("Elu", alpha=0.4)],
    "Selu": [one("Selu"), one("Selu", alpha=1.1, gamma=0.9)],
    "Clip": [one("Clip", -0.71, 0.9), one("Clip", None, 0.9), one("Clip", 0.0), one("Clip")],
    "Sigmoid": [one("Sigmoid")],
    "HardSigmoid": [one("HardSigmoid", alpha=0.9), one("HardSigmoid", beta=0.1)],
    "HardSwish": [Case(lambda net, x: net("HardSwish", net("Mul", x, 2.3)))],
    "Swish": [one("Swish", opset=24), one("Swish", opset=24, alpha=1.7)],
    "Mish": [one("Mish", opset=18)],
    "Gelu": [one("Gelu", opset=20), one("Gelu", opset=20, approximate="tanh")],
    "Tanh": [one("Tanh")],
    "Erf": [one("Erf")],
    "Softplus": [one("Softplus")],
    "Softsign": [one("Softsign")],
    "Exp": [one("Exp")],
    "Log": [after(positive, "Log")],
    "Sqrt": [after(positive, "Sqrt")],
    "Reciprocal": [after(positive, "Reciprocal")],
    "Neg": [one("Neg")],
    "Abs": [one("Abs")],
    "Pow": [
        one("Pow", 2.0),
        one("Pow", 3.0),
        one("Pow", np.int64(3)),
        after(positive, "Pow", 0.5),
        after(positive, "Pow", np.array([0.5, 2, -1.5])[:, None, None]),
        Case(lambda net, x: net("Pow", net("Exp", x), net("ReduceMean", x, axes=[1]))),
        Case(lambda net, x: net("Pow", 1.7, x)),
    ],
    "Identity": [one("Identity")],
    "Dropout": [one("Dropout"), one("Dropout", 0.4)],
    "Cast": [one("Cast", to=TensorProto.FLOAT), one("Cast", to=TensorProto.DOUBLE)],
    "Add": [*binary("Add"), one("Add", 0.7)],
    "Sum": [*binary("Sum"), Case(lambda net, x: net("Sum", x, net.w(3, 1, 1), net("Exp", x))), one("Sum")],
    "Sub": [*binary("Sub"), one("Sub", 0.7)],
    "Mul": [*binary("Mul"), one("Mul", 0.7)],
    "Div": [*binary("Div", same=False), one("Div", 0.7)],
    "Mean": [*binary("Mean"), Case(lambda net, x: net("Mean", x, net.w(3, 1, 1), net("Exp", x)))],
    "Max": [*binary("Max", same=False), Case(lambda net, x: net("Max", x, net("Neg", x), net.w(3, 1, 1))), one("Max")],
    "Min": [*binary("Min", same=False), Case(lambda net, x: net("Min", net.w(6), x, net("Neg", x), net.w(3, 1, 1)))],
    "Where": [
        Case(lambda net, x: net("Where", net("Greater", x, 0.1), net("Exp", x), net("ReduceMean", x, axes=[1]))),
        Case(lambda net, x: net("Where", np.arange(6) % 2 == 0, x, 0.3)),
    ],
    "Expand": [
        Case(lambda net, x: net("Expand", net("ReduceSum", x, [2]), [1, 3, 4, 6])),
        Case(lambda net, x: turned(1, 0, 2, 3, 4)(net, net("Expand", x, [2, 1, 1, 1, 6]))),
    ],
    "MaxPool": [
        pool("MaxPool", 2, 2, strides=[2, 2]),
        pool("MaxPool", 3, 3, strides=[2, 2], pads=[1, 1, 1, 1]),
        pool("MaxPool", 3, 2, storage_order=1),
        pool("MaxPool", 3, 3, pads=[1, 0, 0, 2]),
        pool("MaxPool", 3, 3, strides=[2, 2], ceil_mode=1),
        pool("MaxPool", 2, 2, strides=[3, 3]),
        pool("MaxPool", 2, 3, strides=[3, 2], pads=[1, 1, 0, 1], ceil_mode=1),
        pool("MaxPool", 2, 3, dilations=[3, 2]),
        pool("MaxPool", 2, 2, dilations=[2, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        pool("MaxPool", 3, 3, strides=[2, 2], auto_pad="SAME_UPPER"),
        pool("MaxPool", 2, 4, strides=[1, 3], auto_pad="SAME_LOWER"),
        pool("MaxPool", 2, 2, strides=[2, 2], auto_pad="VALID", opset=13),
        pool("MaxPool", 1, 1),
        pool("MaxPool", 4, shape=(6, 21), strides=[3], pads=[1, 2]),
        pool("MaxPool", 2, 3, 2, shape=(2, 3, 7, 3), strides=[1, 2, 2]),
    ],
    "AveragePool": [
        pool("AveragePool", 2, 2, strides=[2, 2]),
        pool("AveragePool", 3, 4, strides=[3, 4], ceil_mode=1),
        pool("AveragePool", 1, 1),
        pool("AveragePool", 7, 6),
        pool("AveragePool", 3, 3, pads=[1, 1, 1, 1]),
        pool("AveragePool", 3, 3, pads=[1, 1, 1, 1], count_include_pad=1),
        pool("AveragePool", 3, 3, pads=[0, 1, 2, 0], strides=[2, 1]),
        pool("AveragePool", 3, 3, pads=[0, 1, 2, 0], strides=[2, 1], count_include_pad=1),
        pool("AveragePool", 3, 3, strides=[2, 2], ceil_mode=1),
        pool("AveragePool", 3, 3, strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1),
        pool("AveragePool", 2, 2, strides=[3, 3]),
        pool("AveragePool", 2, 2, strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
        pool("AveragePool", 3, 3, strides=[2, 2], auto_pad="SAME_UPPER"),
        pool("AveragePool", 2, 2, dilations=[2, 3], opset=19),
        pool("AveragePool", 2, 2, dilations=[2, 2], strides=[2, 2], pads=[1, 0, 1, 1], opset=22),
        pool("AveragePool", 4, shape=(6, 21), strides=[3], pads=[1, 2]),
        pool("AveragePool", 2, 3, 2, shape=(2, 3, 7, 3), strides=[1, 2, 2]),
        pool("AveragePool", 2, 3, 2, shape=(2, 3, 7, 3)),
    ],
    "GlobalAveragePool": [one("GlobalAveragePool"), after(shaped(6, 21), "GlobalAveragePool")],
    "GlobalMaxPool": [one("GlobalMaxPool"), after(shaped(6, 21), "GlobalMaxPool")],
    "ReduceSum": [
        one("ReduceSum", [2, 3]),
        one("ReduceSum", [-1], keepdims=0, opset=13),
        one("ReduceSum", noop_with_empty_axes=1),
        after(turned(2, 0, 1, 3), "ReduceSum", [0, 2], keepdims=0),
    ],
    **{
        kind: [
            one(kind, axes=[2, 3]),
            one(kind, axes=[-1], keepdims=0),
            one(kind, [-3, 3], keepdims=0, opset=18),
            one(kind, [1], opset=20),
            after(turned(2, 0, 1, 3), kind, axes=[0, 2], keepdims=0),
        ]
        for kind in REDUCTIONS
    },
    "Reshape": [one("Reshape", [0, -1]), one("Reshape", [-1, 6, 3, 7]), after(shaped(3, 6, 7), "Reshape", [-1, 126])],
    "Flatten": [one("Flatten"), one("Flatten", axis=-3)],
    "Transpose": [
        one("Transpose", perm=[0, 2, 3, 1]),
        one("Transpose", perm=[0, 3, 1, 2]),
        after(columns, "Transpose"),
    ],
    "Squeeze": [after(row_sums, "Squeeze", [2]), Case(lambda net, x: net("Squeeze", net("GlobalMaxPool", x)))],
    "Unsqueeze": [one("Unsqueeze", [1, -1])],
    "Concat": [
        Case(lambda net, x: net("Concat", x, net("Exp", x), axis=-1)),
        Case(lambda net, x: net("Concat", x, x, axis=1)),
        Case(token_class),
        one("Concat", axis=1),
    ],
    "Split": [
        split((0, 1, 2), 3),
        split((2, 0), 3, [1, 4, 2], axis=2),
        split((1,), 2, [2, 4], axis=-1, opset=13),
        split((1, 2), 3, axis=2, opset=18, num_outputs=3),
    ],
    "Slice": [
        slices((1, 5, 2, 1)),
        slices((0, 2**62, 2, 2), (1, 2**62, 3, 2)),
        slices((-2, -(2**62), -1, -1)),
        slices((-1, -(2**62), 2, -3), (4, 1, 3, -2), (0, 2**62, 0, 1)),
        slices((-3, 2**62, -1, 1), opset=13),
        slices((0, 7, 2, 3), (0, 6, 3, 5)),
        slices((6, 7, 2, 4)),
        one("Slice", [0, 1], [2**31 - 1, 2]),
    ],
    "Gather": [
        one("Gather", np.int64(-2), axis=2),
        one("Gather", [1, 2], axis=1),
        one("Gather", [2, 0, 1], axis=1),
        one("Gather", [3, 3, -1, 0], axis=3),
        one("Gather", np.array([[0, 5], [2, 5], [6, 1]]), axis=2),
        Case(lambda net, x: turned(1, 0, 2, 3)(net, net("Gather", turned(2, 0, 1, 3)(net, x), [1, 1, 4]))),
    ],
    "Pad": [
        one("Pad", [0, 0, 1, 2, 0, 0, 3, 0]),
        one("Pad", [0, 1, 0, 0, 0, 0, 2, 0], 0.7),
        one("Pad", [0, 0, -1, 2, 0, 0, 3, -2]),
        one("Pad", [1, 2], None, [-1], opset=18),
        one("Pad", [0, 0, 2, 1, 0, 0, 3, 0], mode="reflect"),
        one("Pad", [0, 0, 2, 1, 0, 0, 3, 0], mode="edge"),
        one("Pad", [2, 1], None, [2], mode="wrap", opset=19),
        one("Pad", [0] * 8),
    ],
    "DepthToSpace": [
        after(shaped(18, 7, 1), "DepthToSpace", blocksize=3),
        after(shaped(9, 7, 2), "DepthToSpace", blocksize=3, mode="CRD"),
    ],
    "SpaceToDepth": [after(shaped(1, 21, 6), "SpaceToDepth", blocksize=3)],
    "Resize": [
        resize(None, [1.0, 1, 2, 2], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        resize(None, [1.0, 1, 1.7, 0.6], mode="linear"),
        resize(None, [1.0, 1, 1.5, 2], mode="cubic", cubic_coeff_a=-0.5),
        resize(None, [1.0, 1, 1.5, 0.7], mode="cubic", exclude_outside=1),
        resize(None, [1.0, 1, 0.4], mode="nearest", shape=(3, 42)),
        resize(None, [1.0, 1, 2, 1, 1.5], mode="linear", shape=(1, 3, *SIZE)),
        resize(
            *(None, None, [9, 4]),
            axes=[3, 2],
            mode="linear",
            coordinate_transformation_mode="pytorch_half_pixel",
            opset=18,
        ),
        resize(None, None, [3, 4], axes=[2, 3], mode="linear", antialias=1, opset=19),
        resize_to(5, 11, mode="linear", coordinate_transformation_mode="align_corners"),
        resize_to(
            *(5, 9),
            region=np.array([0, 0, 0.2, -0.2, 1, 1, 0.9, 1.1]),
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
            extrapolation_value=2.5,
        ),
    ],
}
ELSEWHERE = {"Celu", "QuantizeLinear", "DequantizeLinear"}  # operators that have no float64 form


def test_every_rule_has_a_case():
    assert set(CASES) | ELSEWHERE == set(VJP)
    assert set(GUIDED) <= set(VJP)


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, i) for kind, cases in CASES.items() for i in range(len(cases))], ids=str
)
def test_rule(kind, number, tmp_path):
    case, net = CASES[kind][number], Net()
    path = net.save(tmp_path / "m.onnx", case.make(net, "x"), opset=case.opset)
    assert any(node.op_type == kind for node in net.nodes)
    check(path, case.compare)


def save(tmp_path: Path, make: Make, opset: int = 17) -> Path:
    net = Net()
    return net.save(tmp_path / "m.onnx", make(net, "x"), opset=opset)


def canonical(path: Path, dtype=np.float64, **options) -> Graph:
    model = open_model(path)
    return canonize(model, SIZE, model.output, dtype=dtype, **options)


def test_celu_which_is_float32_only(tmp_path):
    for alpha in (1.0, 0.4):
        graph = canonical(save(tmp_path, one("Celu", alpha=alpha).make), np.float32)
        x = image()
        directions = np.random.default_rng(2).choice([-1.0, 1.0], (4, *x.shape))
        wanted = slopes(lambda moved: run(graph.proto, [graph.scores], {"x": moved})[0], x, directions, 1 / 160)  # noqa: B023
        (built,) = lowerings(graph)
        agree(in_float32(built, {"x": x, TARGETS: CHOSEN}), directions, wanted, 1e-4)


@pytest.mark.parametrize("number", range(len(CASES["Resize"])))
def test_resampling_is_the_runtimes(number, tmp_path):
    """Its matrices are probed with the same evaluator that the finite differences take."""
    case = CASES["Resize"][number]
    graph = canonical(save(tmp_path, case.make, case.opset), np.float32)
    x = image()
    directions = np.random.default_rng(2).choice([-1.0, 1.0], (4, *x.shape))
    wanted = slopes(lambda moved: run(graph.proto, [graph.scores], {"x": moved})[0], x, directions, 0.5)
    (built,) = lowerings(graph)
    agree(in_float32(built, {"x": x, TARGETS: CHOSEN}), directions, wanted, 1e-5)


def test_gradients_pass_straight_through_quantised_values(tmp_path):
    def quantised(net: Net, x: str) -> str:
        held = net("QuantizeLinear", x, 0.05, np.int8(3))
        return net("DequantizeLinear", net("MaxPool", held, kernel_shape=[1, 1]), 0.05, np.int8(3))

    graph = canonical(save(tmp_path, quantised, opset=21), np.float32)
    plain = canonical(save(tmp_path, lambda net, x: net("Identity", x)), np.float32)
    feed = {"x": image(), TARGETS: CHOSEN}
    built, reference = build(graph, [Request()], targets=2), build(plain, [Request()], targets=2)
    (told,), (silent,) = built.outputs, reference.outputs
    assert told.notes == ("gradients pass straight through the rounding of quantised values",)
    assert silent.notes == ()
    np.testing.assert_array_equal(in_float32(built, feed), in_float32(reference, feed))


def test_a_request_is_told_of_its_own_way_only(tmp_path):
    """What is asked for above the quantisers passes none, though both are read off one walk."""
    net = Net()
    held = net("DequantizeLinear", net("QuantizeLinear", "x", 0.05, np.int8(3)), 0.05, np.int8(3))
    inner = net("Tanh", held)
    graph = canonical(net.save(tmp_path / "m.onnx", net("Mul", inner, inner), opset=21), np.float32, keep=[inner])
    for kind, composite in (("gradient", ""), ("relevance", "epsilon")):
        requests = [Request(kind, composite=composite), Request(kind, inner, composite=composite)]
        whole, part = build(graph, requests, targets=1).outputs
        assert len(whole.notes) == 1
        assert part.notes == ()


def random_geometry(rng: np.random.Generator, kind: str) -> Make:
    rank = int(rng.choice([1, 2, 2, 2, 3]))
    grid = {1: (21,), 2: SIZE, 3: (3, 7, 3)}[rank]
    channels = {1: 6, 2: 3, 3: 2}[rank]
    kernel = [int(rng.integers(1, min(5, size))) for size in grid]
    dilations = [int(rng.integers(1, 3)) for _ in range(rank)]
    dilations = [d if (k - 1) * d < size else 1 for k, d, size in zip(kernel, dilations, grid, strict=True)]
    strides = [int(rng.integers(1, 4)) for _ in range(rank)]
    pads = [int(rng.integers(0, k)) for k in (*kernel, *kernel)]
    options = {"strides": strides, "dilations": dilations, "pads": pads}
    if kind in ("Conv", "ConvTranspose"):
        group = int(rng.choice([1, channels]))
        options["pads"] = (
            pads if kind == "Conv" else [min(pad, 1) if k > 2 else 0 for pad, k in zip(pads, kernel * 2, strict=True)]
        )
        return conv(*kernel, op=kind, shape=(channels, *grid), group=group, channels=2 * channels, **options).make
    options["ceil_mode"] = int(rng.integers(0, 2))
    if kind == "AveragePool":
        options["count_include_pad"] = int(rng.integers(0, 2))
    return pool(kind, *kernel, shape=(channels, *grid), **options).make


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("seed", range(40))
def test_random_windows(kind, seed, tmp_path):
    rng = np.random.default_rng([seed, len(kind)])
    check(save(tmp_path, random_geometry(rng, kind), opset=22))


def small_net(net: Net, x: str, bend: str = "Relu") -> str:
    """A residual block, an attention of tokens over themselves, a gate; values that several operators share."""
    pooled = net("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    pooled = net(bend, net("Conv", pooled, net.w(8, 3, 3, 3) / 4, net.w(8), pads=[1, 1, 1, 1]))
    value = net("Add", pooled, net("Conv", pooled, net.w(8, 1, 3, 3), group=8, pads=[1, 1, 1, 1]))
    gate = net("Sigmoid", net("Conv", net("GlobalAveragePool", value), net.w(8, 8, 1, 1)))
    value = net("Mul", net("Mul", value, value), gate)
    tokens = net("Transpose", net("Reshape", value, [0, 8, 12]), perm=[0, 2, 1])
    query, key, _ = net("Split", net("MatMul", tokens, net.w(8, 24)), [8, 8, 8], outputs=3, axis=-1)
    weights = net("Softmax", net("MatMul", query, net("Transpose", key, perm=[0, 2, 1])), axis=-1)
    tokens = net("Add", tokens, net("MatMul", weights, tokens))
    return net("Concat", net(bend, tokens), tokens, net("Tanh", tokens), axis=2)


def test_values_that_several_operators_share(tmp_path):
    check(save(tmp_path, partial(small_net, bend="Softplus")))


@pytest.mark.parametrize("opset", range(13, NEWEST + 1))
def test_every_opset(opset, tmp_path):
    feed = {"x": image(), TARGETS: CHOSEN}
    first = in_float32(build(canonical(save(tmp_path, small_net), np.float32), [Request()], targets=2), feed)
    graph = canonical(save(tmp_path, small_net, opset), np.float32)
    for built in lowerings(graph):
        assert built.proto.opset_import[0].version == opset
        np.testing.assert_allclose(in_float32(built, feed), first, rtol=1e-3, atol=1e-4)


def test_rows_do_not_touch_each_other(tmp_path):
    graph = canonical(save(tmp_path, small_net))
    for built in lowerings(graph):
        x, targets = image(rows=5), np.array([[0, 1], [1, 2], [2, 0], [1, 1], [0, 2]])
        together = gradients(built, {"x": x, TARGETS: targets})
        for row in range(5):
            alone = gradients(built, {"x": x[row : row + 1], TARGETS: targets[row : row + 1]})
            np.testing.assert_allclose(together[:, row], alone[:, 0], rtol=1e-12, atol=1e-12)


def test_a_rank_is_the_class_that_has_it(tmp_path):
    graph = canonical(save(tmp_path, small_net))
    x = image(rows=4)
    (built, *_) = lowerings(graph, ranks=2)
    ranks = np.tile([-1, -2], (4, 1))
    by_rank = gradients(built, {"x": x, TARGETS: ranks})
    scores, classes = evaluate(built.proto, [graph.scores, CLASSES], {"x": x, TARGETS: ranks})
    np.testing.assert_array_equal(classes, np.argsort(-scores, axis=1)[:, :2])
    np.testing.assert_array_equal(gradients(built, {"x": x, TARGETS: classes}), by_rank)
    (single, *_) = lowerings(graph)
    np.testing.assert_array_equal(gradients(single, {"x": x, TARGETS: classes}), by_rank)


def test_several_places_are_read_off_one_pass(tmp_path):
    net = Net()
    inner = net("Exp", "x")
    path = net.save(tmp_path / "m.onnx", net("Mul", net("Tanh", inner), inner))
    graph = canonical(path, keep=[inner])
    built = build(graph, [Request(), Request(at=inner), Request(times_input=True)], targets=2, keep=[inner])
    onnx.checker.check_model(built.proto, full_check=True)
    feed = {"x": image(), TARGETS: CHOSEN}
    at_image, at_inner, times_input = (gradients(built, feed, i) for i in range(3))
    np.testing.assert_allclose(at_image, at_inner * np.exp(image()), rtol=1e-12)
    np.testing.assert_array_equal(times_input, at_image * image())
    alone = build(graph, [Request(at=inner)], targets=2)
    kinds = [node.op_type for node in alone.proto.graph.node[len(graph.proto.graph.node) :]]
    assert "Exp" not in kinds, "nothing below the asked value is differentiated"


@pytest.mark.parametrize("bounds", [(), (np.float32(0), np.float32(1000))], ids=["Relu", "Clip"])
def test_guided_passes_only_positive_gradients(bounds, tmp_path):
    """Of two ReLUs around a linear map, by hand; a ReLU that ends above is one."""
    net, kind = Net(), "Clip" if bounds else "Relu"
    low = net("Flatten", "x")
    first = net(kind, low, *bounds)
    weight = net.w(126, 20)
    high = net("MatMul", first, weight)
    path = net.save(tmp_path / "m.onnx", net(kind, high, *bounds))
    last = numpy_helper.to_array(next(t for t in net.weights if t.dims[:] == [3, 20])).astype(np.float64)
    graph = canonical(path)
    built = build(graph, [Request("guided"), Request("guided", at=high), Request()], targets=2)
    feed = {"x": image(), TARGETS: CHOSEN}
    flat_image = image().reshape(2, -1)
    upper = np.maximum(flat_image, 0) @ weight.astype(np.float64)
    for k in range(2):
        at_high = np.maximum(last[CHOSEN[:, k]] * (upper > 0), 0)
        at_low = np.maximum(at_high @ weight.astype(np.float64).T * (flat_image > 0), 0)
        np.testing.assert_allclose(gradients(built, feed, 1)[k], at_high, rtol=1e-12)
        np.testing.assert_allclose(gradients(built, feed, 0)[k].reshape(2, -1), at_low, rtol=1e-12)
    assert (gradients(built, feed, 2) < 0).any()


@pytest.mark.parametrize("form", ["hard swish", "gate", "activation"])
def test_guided_gates_no_factor(form, tmp_path):
    """A Clip from 0 that only scales another value is no ReLU: the guided gradient is the plain one there."""
    net = Net()
    inner = net("Conv", "x", net.w(8, 3, 3, 3))
    if form == "hard swish":
        bent = net("Mul", inner, net("Div", net("Clip", net("Add", inner, 3.0), 0.0, 6.0), 6.0))
    elif form == "gate":
        squeezed = net("Conv", net("GlobalAveragePool", inner), net.w(8, 8, 1, 1))
        bent = net("Mul", net("Clip", squeezed, 0.0, 1.0), inner)
    else:
        gate = net("Sigmoid", net("Conv", net("GlobalAveragePool", inner), net.w(8, 8, 1, 1)))
        bent = net("Mul", net("Clip", inner, 0.0, 6.0), gate)
    built = build(canonical(net.save(tmp_path / "m.onnx", bent)), [Request("guided"), Request()], targets=2)
    feed = {"x": image(), TARGETS: CHOSEN}
    same = np.array_equal(gradients(built, feed, 0), gradients(built, feed, 1))
    assert same == (form != "activation")


@pytest.mark.parametrize("shape", ["flat", "grid"])
def test_weighted_scores(shape, tmp_path):
    """The gradient from fed weights is the weighted sum of the classes' gradients, whatever the scores' shape."""
    net = Net()
    if shape == "grid":
        scores = net("Tanh", net("Conv", "x", net.w(3, 3, *SIZE)))
        onnx.save(net.proto(net("Flatten", scores), ["N", 3]), tmp_path / "m.onnx")
        graph = canonize(open_model(tmp_path / "m.onnx"), SIZE, scores, dtype=np.float64)
    else:
        graph = canonical(save(tmp_path, small_net))
    (built, *_) = lowerings(graph, [Request(start="weights"), Request()])
    fed = np.random.default_rng(2).normal(size=(2, 3))
    x = image()
    of_class = [gradients(built, {"x": x, TARGETS: np.full((2, 2), c), WEIGHTS: fed}, 1)[0] for c in range(3)]
    found = gradients(built, {"x": x, TARGETS: CHOSEN, WEIGHTS: fed}, 0)
    wanted = sum(fed[:, c].reshape(-1, *[1] * (x.ndim - 1)) * of_class[c] for c in range(3))
    for values in found:
        np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", ["cross-entropy", "cross-entropy-sigmoid"])
@pytest.mark.parametrize("shape", ["flat", "grid"])
def test_cross_entropy(start, shape, tmp_path):
    """The gradient of -log of the class's posterior, against finite differences of it."""
    net = Net()
    if shape == "grid":
        scores = net("Tanh", net("Conv", "x", net.w(3, 3, *SIZE)))
        onnx.save(net.proto(net("Flatten", scores), ["N", 3]), tmp_path / "m.onnx")
        graph = canonize(open_model(tmp_path / "m.onnx"), SIZE, scores, dtype=np.float64)
    else:
        graph = canonical(save(tmp_path, small_net))
    x = image()

    def entropies(moved: np.ndarray) -> np.ndarray:
        z = evaluate(graph.proto, [graph.scores], {"x": moved})[0].reshape(len(moved), -1)
        if start == "cross-entropy":
            return np.logaddexp.reduce(z, axis=1, keepdims=True) - z
        return np.logaddexp(0, -z)

    directions = np.random.default_rng(2).choice([-1.0, 1.0], (4, *x.shape))
    wanted = slopes(entropies, x, directions, 1e-3)
    for built in lowerings(graph, [Request(start=start)]):
        agree(gradients(built, {"x": x, TARGETS: CHOSEN}), directions, wanted, 5e-6)


def test_names_that_the_graph_already_has_are_left_alone(tmp_path):
    path = save(tmp_path, small_net)
    wanted = gradients(build(canonical(path), [Request()], targets=2), {"x": image(), TARGETS: CHOSEN})
    proto = onnx.load(path)
    taken: dict[str, str] = {}
    for i, node in enumerate(proto.graph.node[:-1]):
        kind = ("const", "Where", "Mul", "Conv")[i % 4]
        node.name = f"{PREFIX}{kind}_{i + 1}"
        for k, name in enumerate(node.output):
            taken[name] = f"{PREFIX}{kind}_{i + 1}" + ".1" * k
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = taken.get(name, name)
    onnx.save(proto, tmp_path / "taken.onnx")
    for built in lowerings(canonical(tmp_path / "taken.onnx")):
        np.testing.assert_allclose(gradients(built, {"x": image(), TARGETS: CHOSEN}), wanted, rtol=1e-9, atol=1e-12)


def test_every_refused_operator_is_named(tmp_path):
    net = Net()
    value = net("CumSum", net("Relu", "x"), np.int64(2))
    index = net("ArgMax", net("ReduceSum", value, [0, 2, 3]), axis=1, keepdims=0)
    picked = net("Gather", net("Hardmax", value), net("Squeeze", index), axis=1)
    path = net.save(tmp_path / "m.onnx", picked)
    with pytest.raises(Unsupported) as refusal:
        build(canonical(path, np.float32), [Request()], targets=1)
    message = str(refusal.value)
    assert "3 operators on the way back have no rule" in message
    for node in net.nodes:
        named = f"{node.op_type} {node.name!r}:" in message
        assert named == (node.op_type in ("CumSum", "Hardmax", "Gather"))
    assert "its indices are computed at run time" in message
    build(canonical(path, np.float32), [Request(at=picked)], targets=1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda net, x: net("Conv", x, net("Reshape", net("ReduceMean", x, axes=[0]), [3, 1, 7, 6]), group=3),
            "weights",
        ),
        (lambda net, x: net("ReduceMean", x, axes=[0]), "along the batch"),
        (lambda net, x: net("Slice", x, [0], [1], [0]), "rows of the batch apart"),
        (lambda net, x: net("Einsum", x, equation="n...->n..."), "the equation"),
        (lambda net, x: net("Pad", x, [0, 0, 2, -1, 0, 0, 0, 0], mode="reflect"), "crops"),
        (lambda net, x: net("Clip", x, net("ReduceMean", x, keepdims=0)), "weights"),
    ],
    ids=["Conv", "ReduceMean", "Slice", "Einsum", "Pad", "Clip"],
)
def test_what_a_rule_refuses_is_said(make, reason, tmp_path):
    net = Net()
    value = make(net, "x")
    shape = net("Concat", net("Gather", net("Shape", "x"), [0]), [7], axis=0)
    path = net.save(tmp_path / "m.onnx", net("Expand", net("ReduceSum", value, keepdims=0), shape))
    with pytest.raises(Unsupported, match=reason):
        build(canonical(path, np.float32), [Request()], targets=1)


def test_a_branch_that_reads_the_image_is_refused_by_name(tmp_path):
    """Inner graphs read outer values without listing them among the inputs."""

    def branch(op: str) -> onnx.GraphProto:
        inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2, 3, *SIZE])
        return helper.make_graph([helper.make_node(op, [value], ["inner"])], "branch", [], [inner])

    net = Net()
    value = net("Relu", "x")
    positive = net("Greater", net("ReduceMax", "x", keepdims=0), 0.0)
    either = net("If", positive, then_branch=branch("Neg"), else_branch=branch("Exp"))
    behind = net("Tanh", either)
    graph = canonical(net.save(tmp_path / "m.onnx", behind, rows=2), np.float32, batch=2)
    with pytest.raises(Unsupported, match=r"1 operator on the way back has no rule: If 'n\d'"):
        build(graph, [Request()], targets=1)
    built = build(graph, [Request(at=behind)], targets=2)
    assert in_float32(built, {"x": image(), TARGETS: CHOSEN}).shape == (2, 2, 3, *SIZE)


@pytest.mark.parametrize("file", ["squeezenet1.1", "mobilenet_v2", "efficientnet_lite0", "resnet50"])
def test_the_real_models(shared_data, file):
    """Both lowerings agree, and a step along the gradient raises the score by what it says."""
    model = open_model(shared_data / "models" / f"{file}.onnx")
    graph = canonize(model, (224, 224), raw_scores(model))
    y, x = np.mgrid[:224, :224] / 224
    picture = np.stack([np.sin(5 * y + 3 * x), np.cos(7 * x), np.sin(4 * x * y)])[None]
    found = []
    for portable in (False, True):
        built = build(graph, [Request()], targets=1, ranks=1, portable=portable)
        best = built.outputs[0].values[0]
        found += run(built.proto, [best, CLASSES], {graph.input: picture, TARGETS: np.array([[-1]])})
    close(found[2], found[0], 1e-3)
    gradient, length = found[0], np.linalg.norm(found[0])
    moved = [picture + step * gradient / length for step in (5e-4, -5e-4)]
    ahead, behind = (run(graph.proto, [graph.scores], {graph.input: rows})[0].ravel() for rows in moved)
    rise = (ahead - behind)[found[1].item()] / 1e-3
    assert abs(rise / length - 1) < 0.03

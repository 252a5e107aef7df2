"""Whole classifiers: their maps, gradients and relevance on both runtimes, and gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from heatmill.models.graph.backward import CLASSES, TARGETS, Built, Unsupported, build
from heatmill.models.graph.canonize import Graph, canonize
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.request import Request
from heatmill.models.graph.tap import Reading, Tap
from heatmill.models.load import ModelFile, open_model
from tests import architectures as made

STEP = 1e-6  # so small that hardly a ReLU changes sides
COMPOSITES = ("epsilon-plus", "z-plus")


@dataclass(frozen=True, slots=True)
class Case:
    """A classifier, where its last map is found, and whether it has attention, which no relevance passes."""

    make: Callable[[], onnx.ModelProto]
    layout: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0
    attention: bool = False


CASES = {
    "resnet": Case(made.resnet, "nchw", 64, (3, 3)),
    "resnet with batch normalisation": Case(partial(made.resnet, norm=True), "nchw", 64, (3, 3)),
    "vgg": Case(made.vgg, "nchw", 16, (8, 8)),
    "densenet": Case(made.densenet, "nchw", 16, (4, 4)),
    "squeezenet": Case(made.squeezenet, "nchw", 64, (4, 4)),
    "shufflenet": Case(made.shufflenet, "nchw", 32, (3, 3)),
    "inception": Case(made.inception, "nchw", 24, (3, 3)),
    "mobilenet_v2": Case(made.mobilenet_v2, "nchw", 32, (5, 5)),
    "mobilenet_v3": Case(made.mobilenet_v3, "nchw", 32, (4, 4)),
    "efficientnet": Case(made.efficientnet, "nchw", 32, (5, 5)),
    "convnext": Case(made.convnext, "nchw", 16, (4, 4)),
    "convnext with Gelu": Case(partial(made.convnext, opset=20), "nchw", 16, (4, 4)),
    "vit": Case(made.vit, "ntc", 16, (4, 4), prefix=1, attention=True),
    "swin": Case(made.swin, "nhwc", 16, (4, 4), attention=True),
}


@dataclass(frozen=True, slots=True)
class Opened:
    """A case's file, read: the map that is chosen, and where relevance is asked for."""

    case: Case
    model: ModelFile
    size: tuple[int, int]
    tap: Tap
    reached: tuple[str, ...]

    def graph(self, dtype: type = np.float32) -> Graph:
        keep = {self.tap.name, *self.reached} - {""}
        return canonize(self.model, self.size, raw_scores(self.model), keep, dtype=dtype)

    def images(self, rows: int) -> np.ndarray:
        return np.random.default_rng(1).normal(size=(rows, 3, *self.size)).astype(np.float32)


@pytest.fixture(scope="module", params=CASES)
def opened(request, tmp_path_factory) -> Opened:
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("architectures") / "model.onnx"
    proto = case.make()
    onnx.save(proto, path)
    model = open_model(path)
    height, width = (axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim[2:])
    reading = Reading(model, (height, width))
    reached = (reading.taps()[-1].name,) if case.attention else (reading.automatic().name, "")
    return Opened(case, model, (height, width), reading.automatic(), reached)


def on_onnxruntime(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in proto.graph.output), session.run(None, feeds), strict=True))


class Erf(OpRun):
    """The reference evaluator's own is float32, also within its Gelu."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(Erf):
    def _run(self, x, approximate="none"):
        return (x * (1 + Erf._run(self, x / math.sqrt(2))[0]) / 2,)


def on_reference(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(proto, new_ops=[Erf, Gelu])
    return dict(zip((value.name for value in proto.graph.output), evaluator.run(None, feeds), strict=True))


def assert_alike(found: np.ndarray, wanted: np.ndarray, tolerance: float, name: str) -> None:
    assert found.shape == wanted.shape, name
    apart = np.linalg.norm((found - wanted).ravel().astype(np.float64))
    assert apart <= tolerance * max(np.linalg.norm(wanted.ravel().astype(np.float64)), 1e-6), name


def test_the_last_map_is_found(opened):
    case = opened.case
    assert opened.tap == Tap(opened.tap.name, case.layout, case.channels, case.grid, case.prefix)
    graph = opened.graph()
    assert graph.image == made.IMAGE
    assert graph.shape(made.SCORES) == (None, 7)


def test_runtimes_and_lowerings_agree(opened):
    """Every quantity at the map and at the image, of several rows and targets and of one alone."""
    requests = [Request(at=end) for end in (opened.tap.name, "")]
    requests += [Request("relevance", end, composite=composite) for composite in COMPOSITES for end in opened.reached]
    graph, images, targets = opened.graph(), opened.images(3), np.array([[-1, 3], [2, -2], [-7, 0]])
    built = build(graph, requests, targets=2, ranks=7)
    portable = build(graph, requests, targets=1, ranks=7, portable=True)
    for proto in (built.proto, portable.proto):
        onnx.checker.check_model(proto, full_check=True)
    found = on_onnxruntime(built.proto, {made.IMAGE: images, TARGETS: targets})
    lowered = on_onnxruntime(portable.proto, {made.IMAGE: images, TARGETS: targets[:, :1]})
    wanted = on_reference(portable.proto, {made.IMAGE: images[:1], TARGETS: targets[:1, :1]})
    assert found.keys() == {name for out in built.outputs for name in (*out.values, *out.kept)} | {made.SCORES, CLASSES}
    assert all(np.isfinite(values).all() for values in found.values())
    order = np.argsort(-found[made.SCORES])
    np.testing.assert_array_equal(found.pop(CLASSES), [[order[0, 0], 3], [2, order[1, 1]], [order[2, 6], 0]])
    for name in found.keys() & wanted.keys():
        assert_alike(lowered[name][:1], wanted[name], 1e-3, name)
        assert_alike(found[name], lowered[name], 1e-3, name)


def nudged(graph: Graph, ends: dict[str, str]) -> onnx.ModelProto:
    """The forward graph in which each value of `ends` has an input of the given name added to it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    nodes = list(proto.graph.node)
    moved = {value: f"{value}/nudged" for value in ends}
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = moved.get(name, name)
    placed = []
    for node in nodes:
        placed.append(node)
        for value in set(node.output) & set(ends):
            placed.append(helper.make_node("Add", [value, ends[value]], [moved[value]]))
            shape = ["N", *graph.shape(value)[1:]]
            proto.graph.input.append(helper.make_tensor_value_info(ends[value], TensorProto.DOUBLE, shape))
    placed = [onnx.NodeProto.FromString(node.SerializeToString()) for node in placed]
    del proto.graph.node[:]
    proto.graph.node.extend(placed)
    return proto


def test_gradients_against_finite_differences(opened):
    """In float64, along a random direction, at the image and at the map."""
    graph, tap, chosen = opened.graph(np.float64), opened.tap.name, 4
    ends, image = [graph.image, tap], opened.images(1)
    built = build(graph, [Request(at=end) for end in ends], targets=1, keep=[tap])
    results = on_reference(built.proto, {made.IMAGE: image, TARGETS: np.array([[chosen]])})
    rng = np.random.default_rng(2)
    ways = [rng.normal(size=graph.shape(end)[1:]) for end in ends]
    ways[1] *= results[tap][0] != 0  # a pooling behind the map has several greatest inputs where they are all 0
    signs = STEP * np.array([[1, -1, 0, 0], [0, 0, 1, -1]])
    steps = [np.multiply.outer(sign, way) for sign, way in zip(signs, ways, strict=True)]
    feeds = {made.IMAGE: np.concatenate([image] * 4), "at image": steps[0], "at map": steps[1]}
    scores = on_reference(nudged(graph, {graph.image: "at image", tap: "at map"}), feeds)[made.SCORES][:, chosen]
    for i, (output, way) in enumerate(zip(built.outputs, ways, strict=True)):
        (gradient,) = results[output.values[0]]
        assert gradient.dtype == np.float64
        size = np.linalg.norm(gradient)
        assert size > 1e-3
        difference = (scores[2 * i] - scores[2 * i + 1]) / (2 * STEP)
        assert abs(difference - (gradient * way).sum()) < 1e-5 * size


def test_float32_stays_near_float64(opened):
    """By ONNX Runtime: to 1e-3 of the gradient at the image, 1e-5 at the last map; no ReLU decides otherwise here."""
    ends, image = [opened.tap.name, ""], opened.images(1)
    feed = {made.IMAGE: image, TARGETS: np.array([[4]])}
    exact, rough = (
        build(opened.graph(dtype), [Request(at=end) for end in ends], targets=1) for dtype in (np.float64, np.float32)
    )
    wanted = on_reference(exact.proto, {**feed, made.IMAGE: image.astype(np.float64)})
    found = on_onnxruntime(rough.proto, feed)
    for output, tolerance in zip(exact.outputs, (1e-5, 1e-3), strict=True):
        (name,) = output.values
        assert_alike(found[name], wanted[name], tolerance, name)


def test_only_a_max_pool_has_a_form_of_its_own_for_tensorrt(opened):
    graph = opened.graph()
    protos = [build(graph, [Request()], targets=1, portable=portable).proto for portable in (True, False)]
    assert (protos[0] != protos[1]) == ("MaxPool" in {op.kind for op in graph.ops})


def test_relevance_is_refused_through_attention_alone(opened):
    graph, requests = opened.graph(), [Request("relevance", composite="epsilon-plus")]
    if not opened.case.attention:
        assert isinstance(build(graph, requests, targets=1), Built)
        return
    with pytest.raises(Unsupported, match=r"MatMul '/matmul_\d+'.*attention.*; Softmax '/softmax_\d+'.*attention"):
        build(graph, requests, targets=1)
    assert isinstance(build(graph, [Request()], targets=1), Built)

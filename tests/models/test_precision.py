"""Typed graphs in half precision: valid, near the fp32 graph, and equal to rounding after every node by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from heatmill import ModelError
from heatmill.models.graph.backward import TARGETS, build
from heatmill.models.graph.canonize import canonize
from heatmill.models.graph.emit import PREFIX
from heatmill.models.graph.head import raw_scores
from heatmill.models.graph.precision import HALF, SENSITIVE, is_typed, typed
from heatmill.models.graph.request import Request
from heatmill.models.graph.tap import WEIGHTED
from heatmill.models.load import open_model
from tests import architectures as made
from tests.models.test_architectures import CASES, on_onnxruntime

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.uint8: TensorProto.UINT8}


def checked(proto: onnx.ModelProto) -> onnx.ModelProto:
    onnx.checker.check_model(proto, full_check=True)
    return proto


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def images(proto: onnx.ModelProto, rows: int = 16) -> np.ndarray:
    sides = [axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(0).normal(size=(rows, *sides)).astype(np.float32)


def rounded(array: np.ndarray, dtype: type) -> np.ndarray:
    return array.astype(dtype).astype(np.float32) if array.dtype == np.float32 else array


def by_hand(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], dtype: type) -> dict[str, np.ndarray]:
    """The fp32 graph node by node with NumPy, each value and weight rounded, sensitive operators and outputs not."""
    values = feeds | {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    ends = {value.name for value in proto.graph.output}
    whole = {}
    for node in proto.graph.node:
        stays = node.op_type in SENSITIVE
        names = [name for name in node.input if name]
        inputs = {name: np.asarray(values[name]) for name in names}
        if not stays:
            inputs = {name: rounded(array, dtype) for name, array in inputs.items()}
        alone = helper.make_model(
            helper.make_graph(
                [node], "one", [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names)],
                [onnx.ValueInfoProto(name=name) for name in node.output],
            ),
            opset_imports=list(proto.opset_import),
        )  # fmt: skip
        for name, value in zip(node.output, ReferenceEvaluator(alone).run(None, inputs), strict=True):
            values[name] = value if stays else rounded(np.asarray(value), dtype)
            whole[name] = values[name]
    return {name: whole[name] for name in ends}


def alike(found: np.ndarray, wanted: np.ndarray) -> float:
    """The least cosine of a row, of what is left over the mean row: scores of random networks share most of it."""
    found, wanted = (np.asarray(each, np.float64) for each in (found, wanted))
    middle = wanted.mean(axis=0)
    a, b = found - middle, wanted - middle
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


# ----- whole networks -----


@pytest.mark.parametrize("name", CASES)
def test_fp16_scores_are_near_fp32(name):
    proto = CASES[name].make()
    half = checked(typed(proto, "fp16"))
    rows = images(proto)
    wanted, found = (on_onnxruntime(each, {made.IMAGE: rows})[made.SCORES] for each in (proto, half))
    assert found.dtype == np.float32
    assert not np.array_equal(found, wanted)
    assert alike(found, wanted) > 0.999
    first, second = np.sort(wanted, axis=1)[:, [-1, -2]].T
    clear = first - second > 0.02 * np.abs(wanted).max()
    assert clear.sum() >= 8
    assert (found.argmax(axis=1) == wanted.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", HALF)
def test_every_node_has_the_precision_that_the_policy_says(name, precision):
    proto = CASES[name].make()
    half = typed(proto, precision)
    onnx.checker.check_model(half)
    types = types_of(half)
    weighted = [node for node in half.graph.node if node.op_type in WEIGHTED]
    kept = [node for node in half.graph.node if node.op_type in SENSITIVE]
    assert {types[value] for node in weighted for value in node.input} == {HALF[precision]}
    assert all(types[value] == TensorProto.FLOAT for node in kept for value in (node.input[0], node.output[0]))
    assert types[made.IMAGE] == types[made.SCORES] == TensorProto.FLOAT
    assert half.opset_import == proto.opset_import
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert all(types[node.input[0]] != node.attribute[0].i for node in casts)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v3", "convnext"])
@pytest.mark.parametrize("precision", HALF)
def test_it_is_rounding_after_every_node(name, precision):
    """bf16 too, on onnx's evaluator: ONNX Runtime has no kernels for it on a CPU."""
    proto = CASES[name].make()
    rows = images(proto, 2)
    wanted = by_hand(proto, {made.IMAGE: rows}, DTYPES[precision])[made.SCORES]
    plain = by_hand(proto, {made.IMAGE: rows}, np.float32)[made.SCORES]
    half = typed(proto, precision)
    if precision == "fp16":
        found = on_onnxruntime(half, {made.IMAGE: rows})[made.SCORES]
    else:
        found = ReferenceEvaluator(half).run([made.SCORES], {made.IMAGE: rows})[0]
    off = np.linalg.norm(wanted - plain)
    assert off > 0
    assert np.linalg.norm(found - plain) < 3 * off  # no worse than rounding makes it


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", HALF)
def test_once_is_enough(name, precision):
    half = typed(CASES[name].make(), precision)
    assert is_typed(half)
    assert typed(half, precision) is half


def test_inputs_may_come_in_half_precision():
    proto = made.resnet()
    rows = images(proto)
    half = checked(typed(proto, "fp16", half_input=True))
    wanted = on_onnxruntime(typed(proto, "fp16"), {made.IMAGE: rows})[made.SCORES]
    found = on_onnxruntime(half, {made.IMAGE: rows.astype(np.float16)})[made.SCORES]
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)
    assert types_of(half)[made.IMAGE] == TensorProto.FLOAT16


def test_the_way_back_stays_in_fp32(tmp_path):
    onnx.save(made.resnet(), tmp_path / "model.onnx")
    model = open_model(tmp_path / "model.onnx")
    graph = canonize(model, (33, 33), raw_scores(model))
    proto = build(graph, (Request(), Request("relevance", composite="epsilon-plus")), targets=1).proto
    half = checked(typed(proto, "fp16"))
    types = types_of(half)
    backward = [node for node in half.graph.node if node.name.startswith(PREFIX)]
    assert backward
    assert not {types[name] for node in backward for name in node.output} & set(HALF.values())
    feeds = {made.IMAGE: images(made.resnet(), 4), TARGETS: np.zeros((4, 1), np.int64)}
    wanted, found = on_onnxruntime(proto, feeds), on_onnxruntime(half, feeds)
    for name, value in wanted.items():
        apart = np.linalg.norm((found[name] - value).ravel())
        assert found[name].dtype == value.dtype
        assert apart <= 0.3 * np.linalg.norm(value.ravel()), name


# ----- single graphs -----


class Small:
    """A graph of a few nodes between `x` and outputs."""

    def __init__(self, opset: int = 17) -> None:
        self.opset, self.nodes, self.weights = opset, [], []

    def __call__(self, kind: str, *inputs: object, output: str, **attributes) -> str:
        names = [value if isinstance(value, str) else self.weight(np.asarray(value)) for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [output], name=f"/{output}", **attributes))
        return output

    def weight(self, array: np.ndarray) -> str:
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def proto(self, *outputs: str, shape=("N", 4), dtype: type = np.float32, listed: bool = False) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TYPES[dtype], shape)]
        if listed:
            inputs += [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in self.weights]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "small", inputs, ends, self.weights)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=3 if listed else 8
        )


def test_constants_keep_within_fp16():
    net = Small()
    net("MatMul", "x", np.eye(4), output="a")
    net("Add", "a", np.array([1e9, -1e9, 1e-9, -1e-9], np.float32), output="b")
    net("Mul", "b", np.array([0.0, np.inf, 1e-20, 3e-38], np.float32), output="y")
    half = checked(typed(net.proto("y"), "fp16"))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    least = np.float16(6e-8)
    np.testing.assert_array_equal(found["w1/fp16"], np.array([65504, -65504, least, -least], np.float16))
    np.testing.assert_array_equal(found["w2/fp16"], np.array([0, np.inf, least, least], np.float16))
    wide = typed(net.proto("y"), "bf16")
    kept = next(numpy_helper.to_array(t) for t in wide.graph.initializer if t.name == "w1/bf16")
    assert np.isclose(kept.astype(np.float32), [1e9, -1e9, 1e-9, -1e-9], rtol=1e-2).all()


def test_a_weight_that_both_precisions_read_is_there_twice_and_cast_once():
    net = Small()
    shared = net.weight(np.array([0.1, 0.2, 0.3, 0.4]))
    net("MatMul", "x", np.eye(4), output="a")
    net("Mul", "a", shared, output="b")
    net("Add", "b", shared, output="c")
    net("Pow", shared, "c", output="y")
    half = checked(typed(net.proto("y"), "fp16"))
    assert sorted(t.name for t in half.graph.initializer) == ["w0", "w0/fp16", "w1/fp16"]
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    wanted = np.power([0.1, 0.2, 0.3, 0.4], rows * [0.1, 0.2, 0.3, 0.4] + [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(on_onnxruntime(half, {"x": rows})["y"], wanted, rtol=5e-3)


def test_weights_that_are_listed_as_inputs_and_an_old_opset():
    net = Small(opset=9)
    net("MatMul", "x", np.eye(4), output="a")
    net("Relu", "a", output="y")
    half = checked(typed(net.proto("y", listed=True), "fp16"))
    assert [value.name for value in half.graph.input] == ["x"]
    assert half.opset_import[0].version == 9
    rows = np.float32([[1, -2, 3, -4]])
    np.testing.assert_array_equal(on_onnxruntime(half, {"x": rows})["y"], [[1, 0, 3, 0]])


def test_a_tapped_value_is_put_out_in_fp32_and_read_on_in_fp16():
    net = Small()
    net("MatMul", "x", np.eye(4), output="tap")
    net("Relu", "tap", output="half")
    net("Exp", "tap", output="whole")
    net("Add", "half", "whole", output="y")
    half = checked(typed(net.proto("y", "tap"), "fp16"))
    types, nodes = types_of(half), {node.name: node for node in half.graph.node}
    assert types["tap"] == types["y"] == TensorProto.FLOAT
    assert nodes["/half"].input[0] == "tap/fp16"
    assert nodes["/whole"].input[0] == "tap"


def test_casts_of_the_file_stay():
    net = Small()
    net("Cast", "x", to=TensorProto.FLOAT, output="float")
    net("MatMul", "float", np.eye(4), output="a")
    net("Cast", "a", to=TensorProto.INT32, output="whole")
    net("Cast", "whole", to=TensorProto.FLOAT, output="y")
    half = checked(typed(net.proto("y", dtype=np.uint8), "fp16", half_input=True))
    types = types_of(half)
    assert types["x"] == TensorProto.UINT8
    assert types["float"] == TensorProto.FLOAT
    assert types["whole"] == TensorProto.INT32
    np.testing.assert_array_equal(on_onnxruntime(half, {"x": np.uint8([[1, 2, 3, 200]])})["y"], [[1, 2, 3, 200]])


def test_inputs_that_an_operator_has_in_fp32_only():
    net = Small()
    net("Resize", net("Relu", "x", output="a"), "", np.float32([1, 1, 2, 2]), output="y", mode="nearest")
    half = checked(typed(net.proto("y", shape=("N", 1, 2, 2)), "fp16"))
    types = types_of(half)
    node = next(node for node in half.graph.node if node.op_type == "Resize")
    assert [types[name] for name in (node.input[0], node.input[2])] == [TensorProto.FLOAT16, TensorProto.FLOAT]


@pytest.mark.parametrize(("side", "precision"), [(8, TensorProto.FLOAT16), (40, TensorProto.FLOAT)])
def test_long_sums_stay_in_fp32(side, precision):
    for opset, axes in ((17, {"axes": [2, 3]}), (18, {})):
        net = Small(opset)
        x = net("Relu", "x", output="a")
        net("ReduceMean", x, *([] if axes else [np.array([2, 3])]), output="mean", keepdims=0, **axes)
        net("Relu", "mean", output="y")
        half = checked(typed(net.proto("y", shape=("N", 2, side, side)), "fp16"))
        assert types_of(half)["mean"] == precision


@pytest.mark.parametrize("precision", HALF)
def test_constants_that_are_nodes(precision):
    net = Small()
    net("Constant", output="two", value_float=2.0)
    net("Constant", output="some", value=numpy_helper.from_array(np.float32([1, 2, 3, 4])))
    net("Constant", output="shape", value_ints=[-1, 4])
    net("Reshape", "x", "shape", output="a")
    net("Mul", "a", "two", output="b")
    net("Add", "b", "some", output="y")
    half = typed(net.proto("y"), precision)
    onnx.checker.check_model(half, full_check=True)
    assert {t.data_type for t in half.graph.initializer} == {HALF[precision]}
    found = ReferenceEvaluator(half).run(None, {"x": np.float32([[1, 2, 3, 4]])})[0]
    np.testing.assert_array_equal(found, [[3, 6, 9, 12]])


def quantised() -> onnx.ModelProto:
    net = Small()
    scale, zero = net.weight(np.float32(0.1)), net.weight(np.int8(0))
    net("QuantizeLinear", "x", scale, zero, output="q")
    net("DequantizeLinear", "q", scale, zero, output="d")
    net("MatMul", "d", np.eye(4), output="y")
    return net.proto("y")


def native() -> onnx.ModelProto:
    net = Small()
    net("MatMul", "x", np.eye(4, dtype=np.float16), output="a")
    net("Softmax", "a", output="b")
    net("Cast", "b", to=TensorProto.FLOAT, output="y")
    return net.proto("y", dtype=np.float16)


@pytest.mark.parametrize("make", [quantised, native])
def test_files_that_are_left_as_they_are(make: Callable[[], onnx.ModelProto]):
    proto = make()
    assert typed(proto, "fp16") is proto
    assert typed(proto, "bf16") is proto


def test_a_graph_within_the_graph_is_refused_by_name():
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "b", [], [onnx.ValueInfoProto(name="z")])
    net = Small()
    net("If", np.bool_(True), output="y", then_branch=branch, else_branch=branch)
    with pytest.raises(ModelError, match=r"fp16: node '/y' is the operator If.*run the model in fp32"):
        typed(net.proto("y"), "fp16")


def test_what_is_made_does_not_change_its_source():
    proto = made.efficientnet()
    before = proto.SerializeToString()
    typed(proto, "fp16", half_input=True)
    assert proto.SerializeToString() == before


def test_another_policy_may_be_given():
    proto = made.resnet()
    whole = typed(proto, "fp16", stays=lambda node, values: True)
    assert not is_typed(whole)
    make = partial(typed, proto, "fp16", stays=lambda node, values: node.op_type == "Conv")
    types = types_of(make())
    kinds = {node.op_type: types[node.output[0]] for node in make().graph.node if node.op_type in ("Conv", "Relu")}
    assert kinds == {"Conv": TensorProto.FLOAT, "Relu": TensorProto.FLOAT16}

"""Shuffled weights: the same numbers in other places, found wherever a graph holds them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from heatmill.models.graph.shuffle import layers, shuffled
from heatmill.models.graph.tap import WEIGHTED


def tensors(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_only_the_named_change_and_keep_their_numbers(make_model):
    proto = onnx.load(make_model())
    before, after = tensors(proto), tensors(shuffled(proto, ["w2", "b2"], 0))
    for name, values in before.items():
        assert after[name].shape == values.shape
        assert after[name].dtype == values.dtype
        np.testing.assert_array_equal(np.sort(after[name], axis=None), np.sort(values, axis=None))
        assert np.array_equal(after[name], values) == (name not in ("w2", "b2"))
    assert shuffled(proto, ["w2"], 0) == shuffled(proto, ["w2"], 0)
    assert shuffled(proto, ["w2"], 0) != shuffled(proto, ["w2"], 1)
    np.testing.assert_array_equal(tensors(proto)["w2"], before["w2"])


def test_equal_tensors_get_orders_of_their_own():
    values = np.arange(24, dtype=np.float32)
    held = [numpy_helper.from_array(values, name) for name in "ab"]
    proto = helper.make_model(helper.make_graph([], "g", [], [], held))
    after = tensors(shuffled(proto, "ab", 0))
    assert not np.array_equal(after["a"], after["b"])


def quantised():
    """x -> Conv of dequantised weights -> Conv of cast ones -> MatMul of a Constant's, transposed -> scores."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "scale"], ["w"]),
        helper.make_node("Conv", ["input", "w"], ["c"]),
        helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["c", "single", "bias"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node(
            "Constant", [], ["held"], value=numpy_helper.from_array(rng.normal(size=(3, 4)).astype(np.float32))
        ),
        helper.make_node("Transpose", ["held"], ["turned"]),
        helper.make_node("MatMul", ["f", "turned"], ["scores"]),
        helper.make_node("Conv", ["input", "unused"], ["nowhere"]),
    ]
    held = {
        "w8": rng.integers(-9, 9, (4, 3, 1, 1)).astype(np.int8),
        "scale": np.array(0.1, np.float32),
        "half": rng.normal(size=(4, 4, 1, 1)).astype(np.float16),
        "bias": rng.normal(size=4).astype(np.float32),
        "unused": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 5, 5])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(values, name) for name, values in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_weights_are_found_behind_casts_scales_and_constants():
    proto = quantised()
    assert layers(proto, "scores") == [("held",), ("half", "bias"), ("w8",)]
    after = shuffled(proto, ["held", "w8", "half"], 0)
    onnx.checker.check_model(after)
    assert tensors(after)["w8"].dtype == np.int8
    held = next(node for node in after.graph.node if node.op_type == "Constant").attribute[0].t
    assert not np.array_equal(numpy_helper.to_array(held), numpy_helper.to_array(proto.graph.node[6].attribute[0].t))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_every_layer_of_a_real_network_is_found(shared_data, name):
    proto = onnx.load(shared_data / "models" / f"{name}.onnx")
    found = layers(proto, "logits")
    assert len(found) == sum(node.op_type in WEIGHTED for node in proto.graph.node)
    assert len(found[0]) == 2

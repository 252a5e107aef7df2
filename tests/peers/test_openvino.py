"""Why ways back do not run in OpenVINO: its CPU plugin takes one layout of a weight for the other."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize("shared", [True, False])
def test_a_square_weight_that_goes_both_ways_is_mistaken(shared):
    """A Conv and the ConvTranspose that is its adjoint, with one weight or with two copies that differ by little.

    Once OpenVINO gets the shared weight right, `FORWARD_ONLY` in engine/passes.py can go.
    """
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 16, 3, 3)).astype(np.float32)
    other = weight if shared else weight * np.float32(1 + 1e-6)
    window = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], **window),
        helper.make_node("ConvTranspose", ["y", "w" if shared else "v"], ["z"], **window),
    ]
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(other, "v")][: 1 if shared else 2]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 16, 9, 9]) for name in "xz"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    x = rng.normal(size=(2, 16, 9, 9)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(["z"], {"x": x})
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    (found,) = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", hint)({"x": x}).values()
    off = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert (off > 0.1) == shared

"""The graph behind a layer gives the scores that the whole graph gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from heatmill import ModelError
from heatmill.models.graph.backward import TARGETS, build
from heatmill.models.graph.canonize import canonize
from heatmill.models.graph.cut import head_of
from heatmill.models.graph.request import Request
from heatmill.models.load import open_model


@pytest.mark.parametrize("head", ["Gemm", "Reshape", "Dense", "Tokens"])
def test_the_head_continues_where_the_layer_ends(make_model, head):
    proto = onnx.load(make_model(head=head))
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info("features"))
    image = np.random.default_rng(0).normal(size=(3, 3, 33, 29)).astype(np.float32)
    whole = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, features = whole.run(["logits", "features"], {"input": image})
    cut = head_of(proto, "features", ["logits"], ["N", *features.shape[1:]], TensorProto.FLOAT)
    assert [inlet.name for inlet in cut.graph.input] == ["features"]
    assert not any(node.name in ("conv1", "conv2") for node in cut.graph.node)
    onnx.checker.check_model(cut)
    session = ort.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"features": features})[0], logits, atol=1e-5)


def test_a_way_back_is_cut_at_the_layer_too(make_model):
    """Fed the layer's own maps, the graph behind it gives the gradient there that the whole one gives."""
    model = open_model(make_model(head="Dense"))
    graph = canonize(model, (33, 29), "logits", ["features"])
    built = build(graph, [Request(at="features")], 1, keep=["features"])
    names = ["logits", *built.outputs[0].values]
    cut = head_of(built.proto, "features", names, ["N", 12, 9, 8], TensorProto.FLOAT, [TARGETS])
    assert [inlet.name for inlet in cut.graph.input] == ["features", TARGETS]
    onnx.checker.check_model(cut, full_check=True)
    feeds = {"input": np.random.default_rng(0).normal(size=(3, 3, 33, 29)).astype(np.float32)}
    feeds[TARGETS] = np.array([[1], [4], [0]])
    whole, head = (
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        for proto in (built.proto, cut)
    )
    *wanted, features = whole.run([*names, "features"], feeds)
    for found, value in zip(head.run(names, {"features": features, TARGETS: feeds[TARGETS]}), wanted, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_a_layer_that_is_gone_around_is_refused(make_model):
    proto = onnx.load(make_model(body="sum"))
    with pytest.raises(ModelError, match="goes around layer 'c2'"):
        head_of(proto, "c2", ["logits"], ["N", 12, 9, 8], TensorProto.FLOAT)

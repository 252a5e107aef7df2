"""The method l-cam against its formula, on a file with an attention of known weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from heatmill import Explainer, InputError
from heatmill.kernels import reference
from heatmill.models.find_spec import find_spec
from heatmill.models.graph.attention import with_attention
from heatmill.models.graph.tap import Reading
from heatmill.models.load import open_model


@pytest.fixture
def attended(make_model, tmp_path):
    """A classifier with a random attention, of which class 3 is untrained; the file, weight and bias."""
    model = open_model(make_model())
    spec, _ = find_spec(model)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 12)), rng.normal(size=5)
    tap = Reading(model, (33, 29)).choose(None)
    onnx.save(with_attention(model, spec, tap, weight, bias, {"untrained": [3]}), tmp_path / "lcam.onnx")
    return tmp_path / "lcam.onnx", weight, bias


def test_maps_are_the_formula_s(attended):
    path, weight, bias = attended
    images = np.random.default_rng(1).normal(size=(3, 3, 33, 29)).astype(np.float32)
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_empty_tensor_value_info("features"))
    net = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    features, theirs = net.run(
        ["features", "l-cam"], {"input": images, "l-cam/classes": np.array([[0, 1, 2, 3, 4]] * 3)}
    )
    found = Explainer(path, method="L-CAM").explain(images, "all")
    assert found.targets.tolist() == [[0, 1, 2, 3, 4]] * 3
    np.testing.assert_allclose(found.maps, theirs, rtol=1e-4, atol=1e-4)
    shown = found.saliency()
    for i, c in np.ndindex(3, 5):
        raw = sum(weight[c, k] * features[i, k].astype(np.float64) for k in range(12)) + bias[c]
        np.testing.assert_allclose(found.maps[i, c], raw, rtol=1e-4, atol=1e-4)
        scaled = (raw - raw.min()) / (raw.max() - raw.min())
        np.testing.assert_allclose(shown[i, c], reference.upsample(scaled[None], (33, 29))[0], atol=1e-5)
    assert [extras.get("warning") for extras in found.extras[0]] == [
        *[None] * 3,
        "no training image had this class: its map is untrained",
        None,
    ]
    assert all(extras["passes"] == 0 for extras in found.extras[0])


def test_it_needs_a_file_with_an_attention_and_its_layer(attended, make_model):
    with pytest.raises(InputError, match="l-cam can't run: its attention reads layer 'features'; leave --layer out"):
        Explainer(attended[0], method="l-cam", layer="r1")
    with pytest.raises(InputError, match="l-cam can't run: the file has no attention; heatmill train-lcam makes one"):
        Explainer(make_model("other.onnx"), method="l-cam")


def test_other_methods_do_not_mind_an_attention(attended, make_model):
    images = np.random.default_rng(1).normal(size=(2, 3, 33, 29)).astype(np.float32)
    for method in ("score-cam", "saliency", "recipro-cam"):
        with_it, without = (
            Explainer(path, method=method).explain(images) for path in (attended[0], make_model("m.onnx"))
        )
        np.testing.assert_allclose(with_it.maps, without.maps, rtol=1e-5, atol=1e-6)

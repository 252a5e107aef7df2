"""A classifier with an attention in its file: what it gives in ONNX Runtime, what the file says of itself."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from heatmill import ModelError
from heatmill.engine.opening import load
from heatmill.models.find_spec import METADATA_KEY, find_spec
from heatmill.models.graph.attention import (
    ATTENTION_KEY,
    BIAS,
    CLASSES,
    OUTPUT,
    WEIGHT,
    Attention,
    read_attention,
    with_attention,
)
from heatmill.models.graph.tap import Reading, with_outputs
from heatmill.models.load import open_model
from tests import architectures as made

SIZE = (33, 29)


def attended(path, layer, target, about=None, seed=0):
    """Write a file with a random attention on a layer; its tap, weight and bias."""
    model = open_model(path)
    spec, _ = find_spec(model)
    tap = Reading(model, spec.input_size[1:]).choose(layer)
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(model.classes, tap.channels)), rng.normal(size=model.classes)
    onnx.save(with_attention(model, spec, tap, weight, bias, about or {"untrained": [1]}), target)
    return tap, weight, bias


def session(proto):
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def save_vit(folder):
    onnx.save(made.vit(), folder / "vit.onnx")
    side = made.vit().graph.input[0].type.tensor_type.shape.dim[2].dim_value
    spec = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}
    (folder / "vit.json").write_text(json.dumps(spec))
    return folder / "vit.onnx", side


@pytest.mark.parametrize("case", ["nchw", "ntc", "nhwc", "prefix", "fixed", "old"])
def test_the_output_is_the_class_row_at_every_place(case, make_model, tmp_path):
    size, layer = SIZE, "features"
    if case == "prefix":
        (path, side), layer = save_vit(tmp_path), None
        size = (side, side)
    elif case == "ntc":
        path, layer = make_model(head="Tokens"), "tokens"
    else:
        path = make_model(batch=2 if case == "fixed" else "N")
    if case == "nhwc":
        proto = onnx.load(path)
        first = next(i for i, node in enumerate(proto.graph.node) if node.name == "pool")
        for there, back, at in (("features", "wide", 0), ("wide", "again", 1)):
            perm = [0, 2, 3, 1] if there == "features" else [0, 3, 1, 2]
            proto.graph.node.insert(first + at, helper.make_node("Transpose", [there], [back], perm=perm))
        proto.graph.node[first + 2].input[0] = "again"
        onnx.save(proto, path)
        layer = "wide"
    elif case == "old":
        proto = onnx.load(path)
        proto.ir_version = 3
        proto.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in proto.graph.initializer
        )
        onnx.save(proto, path)
    tap, weight, bias = attended(path, layer, tmp_path / "attended.onnx")
    assert tap.layout == {"ntc": "ntc", "nhwc": "nhwc", "prefix": "ntc"}.get(case, "nchw")
    assert (tap.prefix > 0) == (case == "prefix")
    images = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
    proto = onnx.load(tmp_path / "attended.onnx")
    onnx.checker.check_model(proto, full_check=case != "old")
    image, scores = (value[0].name for value in (proto.graph.input, proto.graph.output))
    proto.graph.output.append(helper.make_empty_tensor_value_info(tap.name))
    net, bare = session(proto), session(onnx.load(path))
    logits, maps, values = net.run([scores, OUTPUT, tap.name], {image: images})
    np.testing.assert_allclose(logits, bare.run([scores], {image: images})[0], atol=1e-5)
    features = tap.to_nchw(values)
    for i, predicted in enumerate(logits.argmax(axis=1)):
        expected = sum(weight[predicted, c] * features[i, c] for c in range(tap.channels)) + bias[predicted]
        np.testing.assert_allclose(maps[i, 0], expected, rtol=1e-4, atol=1e-4)
    asked = np.array([[2, -1, 0], [-1, 3, 3]])
    (maps,) = net.run([OUTPUT], {image: images, CLASSES: asked})
    assert maps.shape == (2, 3, *tap.grid)
    for i, k in np.ndindex(asked.shape):
        c = logits[i].argmax() if asked[i, k] < 0 else asked[i, k]
        np.testing.assert_allclose(maps[i, k], np.tensordot(weight[c], features[i], 1) + bias[c], rtol=1e-4, atol=1e-4)


def test_the_file_says_what_it_is(make_model, tmp_path):
    path = make_model(spec={"label_names": list("abcde")})
    tap, weight, bias = attended(path, "r1", tmp_path / "attended.onnx", {"untrained": [4, 2], "seed": 7})
    model = open_model(tmp_path / "attended.onnx")
    assert (model.output, model.classes, model.input.name) == ("logits", 5, "input")
    spec, where = find_spec(model)
    assert where.endswith(f"metadata {METADATA_KEY}")
    assert (spec.target_layer, spec.label_names) == ("r1", tuple("abcde"))
    loaded = load(tmp_path / "attended.onnx", ["l-cam"])
    found = loaded.facts.attention
    assert isinstance(found, Attention)
    assert loaded.tap == tap
    np.testing.assert_array_equal(found.weight, weight.astype(np.float32))
    np.testing.assert_array_equal(found.bias, bias.astype(np.float32))
    assert (found.layer, found.untrained) == ("r1", {2, 4})
    metadata = {entry.key: entry.value for entry in model.proto.metadata_props}
    assert json.loads(metadata[ATTENTION_KEY]) == {"untrained": [4, 2], "seed": 7, "layer": "r1"}
    assert read_attention(model, None) == "its attention reads layer 'r1'; leave --layer out"


def test_a_graph_cut_before_an_attention_needs_nothing_of_it(make_model, tmp_path):
    attended(make_model(), "features", tmp_path / "attended.onnx")
    cut = with_outputs(open_model(tmp_path / "attended.onnx").proto, ["logits"])
    assert [value.name for value in cut.graph.input] == ["input"]
    assert not {tensor.name for tensor in cut.graph.initializer}.intersection((WEIGHT, BIAS, CLASSES))


def test_what_can_not_have_an_attention(make_model, tmp_path):
    path = make_model()
    attended(path, "features", tmp_path / "attended.onnx")
    with pytest.raises(ModelError, match="has an attention already"):
        attended(tmp_path / "attended.onnx", "features", tmp_path / "twice.onnx")
    proto = onnx.load(path)
    proto.opset_import[0].version = 8
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"has opset 8, an attention needs 9"):
        attended(path, "features", tmp_path / "old.onnx")


def without(name):
    def change(proto):
        kept = [tensor for tensor in proto.graph.initializer if tensor.name != name]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        for node in proto.graph.node:
            if name in node.input:
                node.input[0] = "b3"

    return change


def replaced(name, values):
    def change(proto):
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(values, name))

    return change


def described(text):
    def change(proto):
        for entry in proto.metadata_props:
            if entry.key == ATTENTION_KEY:
                entry.value = text

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (described("{"), "its metadata heatmill.l-cam is damaged"),
        (described('{"layer": "features"}'), "its metadata heatmill.l-cam is damaged"),
        (without(BIAS), "its attention has no 'l-cam/bias'"),
        (replaced(WEIGHT, np.zeros((5, 11), np.float32)), r"weights \(5, 11\) for 12 channels"),
        (replaced(WEIGHT, np.full((5, 12), np.nan, np.float32)), "not finite float32"),
        (
            lambda proto: (replaced(WEIGHT, np.zeros((4, 12), "f4"))(proto), replaced(BIAS, np.zeros(4, "f4"))(proto)),
            "has 4 classes, the model 5",
        ),
    ],
)
def test_a_damaged_attention_is_refused_in_words(make_model, tmp_path, change, told):
    attended(make_model(), "features", tmp_path / "attended.onnx")
    proto = onnx.load(tmp_path / "attended.onnx")
    change(proto)
    onnx.save(proto, tmp_path / "attended.onnx")
    with pytest.raises(ModelError, match=told):
        load(tmp_path / "attended.onnx", ["l-cam"])

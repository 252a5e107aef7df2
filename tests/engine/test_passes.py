"""Backward passes as a run opens them: what is refused and when, which files they are made of, what they are told to
cost."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from heatmill import Explainer, InputError
from heatmill.engine.explainer import Engine
from heatmill.engine.jobs import probe as probing
from heatmill.engine.jobs.plan import image_seconds
from heatmill.engine.jobs.probe import probe
from heatmill.engine.opening import blank_batch, load, open_best
from heatmill.engine.passes import check_backward, open_passes, requests_of, row_seconds
from heatmill.engine.trial import Trial
from heatmill.engine.types import Item, Target
from tests import architectures as made

SPEC = {"mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}


@pytest.fixture
def vit(tmp_path):
    proto = made.vit()
    side = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    onnx.save(proto, tmp_path / "vit.onnx")
    (tmp_path / "vit.json").write_text(json.dumps({**SPEC, "input_size": [3, side, side]}))
    return tmp_path / "vit.onnx"


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, 3, 33, 29)).astype(np.float32)


def rewritten(path, change) -> None:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)


def halve(proto: onnx.ModelProto) -> None:
    """The file in half precision, its input too."""
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def quantise(proto: onnx.ModelProto) -> None:
    """The maps `features` rounded to 8 bits and back."""
    graph = proto.graph
    at = next(i for i, node in enumerate(graph.node) if "features" in node.output)
    graph.node[at].output[0] = "unrounded"
    graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "step"))
    graph.initializer.append(numpy_helper.from_array(np.uint8(0), "origin"))
    rounding = [
        helper.make_node("QuantizeLinear", ["unrounded", "step", "origin"], ["rounded"], name="round"),
        helper.make_node("DequantizeLinear", ["rounded", "step", "origin"], ["features"], name="back"),
    ]
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node[at + 1 :]]
    del graph.node[at + 1 :]
    graph.node.extend([*rounding, *rest])


@pytest.mark.parametrize("method", ["saliency", "lrp", "grad-cam", "integrated-gradients:steps=5"])
def test_half_precision_files_are_followed_back_in_single(make_model, method):
    whole = Explainer(make_model("whole.onnx", head="Tanh"), method=method).explain(images(), targets=[1, 3])
    path = make_model("half.onnx", head="Tanh")
    rewritten(path, halve)
    half = Explainer(path, method=method).explain(images(), targets=[1, 3])
    assert half.maps.dtype == np.float32
    apart = np.linalg.norm(half.maps - whole.maps) / np.linalg.norm(whole.maps)
    assert 0 < apart < 0.03, "as far as weights rounded to 11 bits are"


def test_gradients_pass_straight_through_quantisers_and_the_row_says_so(make_model):
    plain = Explainer(make_model("plain.onnx", head="Tanh"), method="saliency").explain(images(), targets=1)
    path = make_model("rounded.onnx", head="Tanh")
    rewritten(path, quantise)
    rounded = Explainer(path, method="saliency").explain(images(), targets=1)
    assert np.linalg.norm(rounded.maps - plain.maps) < 0.1 * np.linalg.norm(plain.maps)
    assert "straight through" in rounded.extras[0][0]["note"]
    assert "note" not in plain.extras[0][0]
    without = Explainer(path, method="score-cam").explain(images(), targets=1)
    assert "note" not in without.extras[0][0], "no gradient was taken"


def test_what_has_no_rule_is_refused_with_a_way_out(vit):
    check_backward(load(vit, ["saliency", "grad-cam", "score-cam"]))
    with pytest.raises(
        InputError, match=r"no backward graph: .*MatMul .*attention.*score-cam and rise need no way back"
    ):
        check_backward(load(vit, ["lrp"]))


def test_a_layer_from_which_the_way_is_free_is_named(make_model):
    path = make_model()

    def add_unknown(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if node.op_type == "Relu")
        node.output[0] = "plain"
        proto.graph.initializer.append(numpy_helper.from_array(np.int64(2), "axis"))
        proto.graph.node.insert(2, helper.make_node("CumSum", ["plain", "axis"], ["r1"], name="sums"))

    rewritten(path, add_unknown)
    check_backward(load(path, ["grad-cam", "lrp:at=layer"]))
    with pytest.raises(InputError, match=r"CumSum 'sums': .*the way to layer features is free"):
        check_backward(load(path, ["saliency"]))
    with pytest.raises(InputError, match=r"CumSum 'sums': .*: --layer features"):
        check_backward(load(path, ["lrp:at=layer"], layer="plain"))


def test_a_value_of_our_own_name_is_refused(make_model):
    path = make_model(head="Tanh")

    def rename(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = "heatmill/0/0" if name == "r1" else name

    rewritten(path, rename)
    with pytest.raises(InputError, match="has a value named 'heatmill/0/0'"):
        Explainer(path, method="saliency")


def test_equal_requests_of_several_methods_are_one(make_model):
    loaded = load(make_model(head="Tanh"), ["grad-cam", "layer-cam", "saliency", "smoothgrad", "hires-cam"])
    assert len(requests_of(loaded, loaded.calls, "backward")) == 2
    assert len(requests_of(loaded, loaded.calls, "through")) == 1
    session, targets = open_best(loaded, batch_size=4), [Target("top", 2), Target("class", 1)]
    passes = open_passes(loaded, session, targets, 4)
    assert passes.observe.batch_size == 4
    assert (passes.observe.targets, len(passes.observe.requests), len(passes.through)) == (3, 2, 1)
    assert [taken.targets for taken in passes.through.values()] == [1]
    observe, through, head = row_seconds(passes, blank_batch(loaded, 4))
    assert observe > 0
    assert through > 0
    assert head == 0


def test_what_the_head_takes_is_tried_where_it_runs_alone(make_model):
    loaded = load(make_model(head="Tanh"), ["ablation-cam"])
    assert loaded.needs_weights
    passes = open_passes(loaded, open_best(loaded, batch_size=4), [Target("predicted")], 4)
    observe, through, head = row_seconds(passes, blank_batch(loaded, 4))
    assert observe == through == 0
    assert head > 0
    assert not load(make_model("linear.onnx"), ["ablation-cam"]).needs_weights


def test_a_run_is_planned_by_what_its_backward_passes_take(make_model, monkeypatch):
    path = make_model(head="Tanh")
    loaded, opened = load(path, ["saliency"]), []
    monkeypatch.setattr(probing, "open_passes", lambda *given: opened.append(given) or open_passes(*given))
    probing._tried(loaded, [Target("top", 3)], ["auto", None, "auto", 4])
    assert opened[0][2] == [Target("top", 3)], "the run's own targets are tried"
    probed = probe({"model": str(path), "methods": ("grad-cam", "integrated-gradients:steps=9")})
    assert probed.observe_seconds > 0
    assert probed.through_seconds > 0
    assert probe({"model": str(path), "methods": ("score-cam",)}).observe_seconds == 0
    trial = Trial("b", "p", "fp32", "1", 8, True, 5, 10.0, {}, observe_seconds=0.5, through_seconds=2.0)
    one, three = (Target("predicted"),), (Target("top", 3),)

    def seconds(method: str, targets: tuple[Target, ...]) -> float:
        return image_seconds(load(path, [method]), targets, trial)

    assert seconds("rise:masks=20", one) == seconds("rise:masks=20", three) == pytest.approx(0.5 + 20 / 10)
    assert seconds("group-cam:groups=4", three) == pytest.approx(0.5 + 3 * 5 / 10), "masks that depend on the class"
    assert seconds("integrated-gradients:steps=9", three) == pytest.approx(0.5 + 3 * 10 * 2.0)


def test_ways_back_do_not_run_where_they_would_be_wrong(make_model):
    """On OpenVINO the network's rows, not its ways back; the row says where these ran."""
    loaded, targets = load(make_model(head="Tanh"), ["saliency", "score-cam"]), [Target("predicted")]
    session = open_best(loaded, batch_size=4)
    session.provider = "openvino"
    passes = open_passes(loaded, session, targets, 4)
    assert passes.observe.session.provider == "cpu"
    engine = Engine(loaded, session, targets, 4, passes=passes)
    back, forward = engine.stream([Item(0, images(1)[0])])
    assert back.extras["note"] == "the way back ran on provider cpu"
    assert "note" not in forward.extras


def test_infinite_slopes_do_not_pass_units_that_are_off(make_model):
    """A square root of what ReLU sets to zero: its slope is infinite there, and the unit sends nothing back."""
    path = make_model(head="Tanh")

    def root(proto: onnx.ModelProto) -> None:
        at = next(i for i, node in enumerate(proto.graph.node) if "features" in node.output)
        proto.graph.node[at].output[0] = "positive"
        proto.graph.node.insert(at + 1, helper.make_node("Sqrt", ["positive"], ["features"], name="root"))

    rewritten(path, root)
    result = Explainer(path, method="saliency").explain(images(), targets=[0, 1])
    assert (result.statuses == "ok").all()
    assert np.isfinite(result.maps).all()
    assert np.abs(result.maps).max() > 0


def test_what_comes_back_infinite_is_no_zero_map(make_model):
    """Where a unit is on and its slope is infinite, the row says so."""
    path = make_model(head="Tanh")

    def overflow(proto: onnx.ModelProto) -> None:
        proto.graph.node[-1].output[0] = "small"
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e38), "huge"))
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e-38), "tiny"))
        proto.graph.node.extend(
            [
                helper.make_node("Mul", ["small", "tiny"], ["low"], name="low"),
                helper.make_node("Mul", ["low", "huge"], ["same"], name="same"),
                helper.make_node("Mul", ["same", "huge"], ["far"], name="far"),
                helper.make_node("Tanh", ["far"], ["logits"], name="bound"),
            ]
        )

    rewritten(path, overflow)
    for method in ("grad-cam", "group-cam", "cf-cam"):
        result = Explainer(path, method=method).explain(images(), targets=[0, 1])
        finite = np.isfinite(result.maps).all(axis=(2, 3))
        assert ((result.statuses == "ok") == finite).all()


@pytest.mark.parametrize("batch", [1, "N"])
def test_files_made_for_one_row_are_followed_back_too(tmp_path, batch):
    """A class token that is not repeated for every row."""
    proto = made.vit()
    side = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    expand = next(node for node in proto.graph.node if node.op_type == "Expand")
    token, value = expand.input[0], expand.output[0]
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = token if name == value else name
    proto.graph.node.remove(expand)
    if batch == 1:
        for put in (*proto.graph.input, *proto.graph.output):
            put.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, tmp_path / "vit.onnx")
    (tmp_path / "vit.json").write_text(json.dumps({**SPEC, "input_size": [3, side, side]}))
    check_backward(load(tmp_path / "vit.onnx", ["saliency"]))
    rows = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    result = Explainer(tmp_path / "vit.onnx", method="saliency").explain(rows)
    assert np.isfinite(result.maps).all()


def test_softmax_contrasts_are_refused_where_scores_are_independent(make_model):
    with pytest.raises(InputError, match=r"method sglrp can't run: .*independent"):
        load(make_model(end="Sigmoid"), ["sglrp"])


def test_more_targets_than_one_graph_follows_back_are_refused(make_model, monkeypatch):
    monkeypatch.setattr("heatmill.engine.passes.MOST_WAYS", 4)
    explainer = Explainer(make_model(head="Dense"), method="grad-cam")
    with pytest.raises(InputError, match=r"5 targets: method grad-cam follows each back by itself, and 4 are the most"):
        explainer.explain(images(), "all")
    assert Explainer(make_model(), method="cam").explain(images(), "all").maps.shape == (3, 5, 9, 8)

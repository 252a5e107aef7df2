"""Which values are feature maps, and how their axes lie; graphs as the exporters write them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from heatmill import ModelError
from heatmill.models.graph.head import LinearHead, linear_head, raw_scores
from heatmill.models.graph.tap import Reading, Tap, with_outputs
from heatmill.models.load import open_model

RNG = np.random.default_rng(0)


class Graph:
    """A graph written line by line: g("Conv", "x", w(8, 3, 3, 3), out="y", strides=[2, 2])."""

    def __init__(self) -> None:
        self.nodes, self.weights = [], []

    def w(self, *shape: int) -> str:
        return self.const(RNG.normal(size=shape).astype(np.float32))

    def const(self, values) -> str:
        name = f"k{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def __call__(self, op: str, *inputs: str, out: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, out.split(), name=f"n_{out.split()[0]}", **attributes))
        return out

    def save(self, path, output: str, classes: int = 10, size: int = 32, batch="N"):
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, classes])],
            self.weights,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return Reading(open_model(path), (size, size))


def layer_norm(g: Graph, value: str, width: int, out: str) -> str:
    return g("LayerNormalization", value, g.w(width), g.w(width), out=out, axis=-1)


def attention(g: Graph, tokens: str, t: int, width: int, out: str, batch_dynamic: bool) -> str:
    """Self-attention as torch exports it, with its shape computed at run time, and the residual sum."""
    if batch_dynamic:
        rows = g("Shape", tokens, out=f"{out}_s")
        first = g("Gather", rows, g.const(np.array([0], np.int64)), out=f"{out}_n", axis=0)
        split = g("Concat", first, g.const(np.array([t, 2, width // 2], np.int64)), out=f"{out}_split", axis=0)
        back = g("Concat", first, g.const(np.array([t, width], np.int64)), out=f"{out}_back", axis=0)
    else:
        split, back = g.const(np.array([0, t, 2, width // 2])), g.const(np.array([0, t, width]))
    heads = []
    for name in "qkv":
        projected = g("MatMul", tokens, g.w(width, width), out=f"{out}_{name}p")
        heads.append(
            g("Transpose", g("Reshape", projected, split, out=f"{out}_{name}r"), out=f"{out}_{name}", perm=[0, 2, 1, 3])
        )
    keys = g("Transpose", heads[1], out=f"{out}_kt", perm=[0, 1, 3, 2])
    weights = g("Softmax", g("MatMul", heads[0], keys, out=f"{out}_qk"), out=f"{out}_w", axis=-1)
    mixed = g("Transpose", g("MatMul", weights, heads[2], out=f"{out}_m"), out=f"{out}_mt", perm=[0, 2, 1, 3])
    return g("Add", tokens, g("Reshape", mixed, back, out=f"{out}_mr"), out=out)


@pytest.mark.parametrize("batch_dynamic", [False, True])
def test_vision_transformer(tmp_path, batch_dynamic):
    g = Graph()
    patches = g("Conv", "x", g.w(16, 3, 8, 8), out="patches", kernel_shape=[8, 8], strides=[8, 8])
    flat = g("Reshape", patches, g.const(np.array([0, 16, -1])), out="flat")
    tokens = g("Transpose", flat, out="tokens", perm=[0, 2, 1])
    if batch_dynamic:
        rows = g("Shape", tokens, out="s")
        first = g("Gather", rows, g.const(np.array([0], np.int64)), out="n", axis=0)
        whole = g("Concat", first, g.const(np.array([1, 16], np.int64)), out="cls_shape", axis=0)
        cls = g("Expand", g.w(1, 1, 16), whole, out="cls")
    else:
        cls = g("Expand", g.w(1, 1, 16), g.const(np.array([1, 1, 16])), out="cls")
    value = g("Add", g("Concat", cls, tokens, out="with_cls", axis=1), g.w(1, 17, 16), out="placed")
    for block in range(2):
        value = attention(g, value, 17, 16, f"block{block}", batch_dynamic)
        inner = g("Relu", g("MatMul", value, g.w(16, 32), out=f"h{block}"), out=f"a{block}")
        value = g("Add", value, g("MatMul", inner, g.w(32, 16), out=f"p{block}"), out=f"mlp{block}")
    value = layer_norm(g, value, 16, "norm")
    first = g("Gather", value, g.const(np.array(0)), out="cls_token", axis=1)
    g("Gemm", first, g.w(10, 16), g.w(10), out="logits", transB=1)
    reading = g.save(tmp_path / "vit.onnx", "logits", batch="N" if batch_dynamic else 1)
    assert reading.choose("norm") == Tap("norm", "ntc", 16, (4, 4), prefix=1)
    assert reading.automatic().name == "mlp0", "of later maps the scores read the class token only"
    names = {tap.name for tap in reading.taps()}
    assert {"patches", "tokens", "placed", "block0", "mlp1", "norm"} <= names
    assert not {name for name in names if name.endswith(("_qk", "_w", "_q", "_kt"))}, "attention matrices are no maps"
    assert isinstance(linear_head(reading, reading.choose("norm"), "logits"), str)
    values = np.arange(2 * 17 * 16).reshape(2, 17, 16)
    np.testing.assert_array_equal(reading.automatic().to_nchw(values)[1, 3], values[1, 1:, 3].reshape(4, 4))


def test_windowed_transformer_with_patch_merging_and_pooled_tokens(tmp_path):
    """Swin's way: grids as (n, h, w, c), windows by reshaping, stride-2 slices joined along channels."""
    g = Graph()
    patches = g("Conv", "x", g.w(8, 3, 4, 4), out="patches", kernel_shape=[4, 4], strides=[4, 4])
    value = g("Transpose", patches, out="grid", perm=[0, 2, 3, 1])
    windows = g("Reshape", value, g.const(np.array([1, 2, 4, 2, 4, 8])), out="windows")
    windows = g("Transpose", windows, out="windows_t", perm=[0, 1, 3, 2, 4, 5])
    windows = g("Reshape", windows, g.const(np.array([4, 16, 8])), out="windows_flat")
    mixed = attention(g, windows, 16, 8, "window_block", False)
    back = g("Reshape", mixed, g.const(np.array([1, 2, 2, 4, 4, 8])), out="back")
    back = g("Transpose", back, out="back_t", perm=[0, 1, 3, 2, 4, 5])
    back = g("Reshape", back, g.const(np.array([1, 8, 8, 8])), out="back_grid")
    value = g("Add", value, back, out="stage0")
    corners = []
    for i, (y, x) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        corners.append(
            g(
                "Slice",
                value,
                g.const(np.array([y, x])),
                g.const(np.array([99, 99])),
                g.const(np.array([1, 2])),
                g.const(np.array([2, 2])),
                out=f"corner{i}",
            )
        )
    merged = g("Concat", *corners, out="merged", axis=-1)
    reduced = g("MatMul", merged, g.w(32, 16), out="reduced")
    normed = layer_norm(g, reduced, 16, "norm")
    pooled = g("ReduceMean", normed, out="pooled", axes=[1, 2], keepdims=0)
    biased = g("Add", g("MatMul", pooled, g.w(16, 10), out="product"), g.w(10), out="logits")
    reading = g.save(tmp_path / "swin.onnx", biased, batch=1)
    assert reading.automatic() == Tap("norm", "nhwc", 16, (4, 4))
    assert reading.tap("stage0") == Tap("stage0", "nhwc", 8, (8, 8))
    assert reading.tap("window_block") is None
    head = linear_head(reading, reading.automatic(), "logits")
    assert isinstance(head, LinearHead)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in reading.model.proto.graph.initializer}
    product = next(node for node in reading.graph.node if node.output[0] == "product")
    np.testing.assert_array_equal(head.weight, weights[product.input[1]].T)
    values = np.arange(4 * 4 * 16).reshape(1, 4, 4, 16)
    assert reading.automatic().to_nchw(values)[0, 5, 2, 3] == values[0, 2, 3, 5]


def test_a_pooling_before_flattening_is_not_the_choice(tmp_path):
    """VGG's way: the last map is what the last pooling reads."""
    g = Graph()
    last = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4), out="last")
    small = g("MaxPool", last, out="small", kernel_shape=[2, 2], strides=[2, 2])
    same = g("AveragePool", small, out="same", kernel_shape=[1, 1])
    g("Gemm", g("Flatten", same, out="flat"), g.w(10, 8 * 16 * 16), out="logits", transB=1)
    reading = g.save(tmp_path / "vgg.onnx", "logits")
    assert reading.automatic() == Tap("last", "nchw", 8, (32, 32))
    assert "feeds" not in str(linear_head(reading, reading.automatic(), "logits"))
    assert "stands between" in str(linear_head(reading, reading.automatic(), "logits"))


def test_a_map_of_class_scores_is_not_the_choice(tmp_path):
    """SqueezeNet's way: a convolution to classes, ReLU, pooled."""
    g = Graph()
    last = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[2, 2]), out="fire")
    scores = g("Relu", g("Conv", last, g.w(10, 8, 1, 1), out="class_conv"), out="class_map")
    g("Flatten", g("GlobalAveragePool", scores, out="pooled"), out="logits")
    reading = g.save(tmp_path / "squeeze.onnx", "logits")
    assert reading.automatic().name == "fire"
    assert reading.choose("class_map").channels == 10


def test_as_many_channels_as_classes_with_a_layer_after_is_a_feature_map(tmp_path):
    g = Graph()
    last = g("Relu", g("Conv", "x", g.w(10, 3, 3, 3), out="c", pads=[1] * 4, strides=[2, 2]), out="last")
    g("Gemm", g("Flatten", g("GlobalAveragePool", last, out="p"), out="f"), g.w(10, 10), out="logits", transB=1)
    assert g.save(tmp_path / "m.onnx", "logits").automatic().name == "last"


def test_gates_of_one_by_one_are_not_maps(tmp_path):
    g = Graph()
    value = g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[4, 4])
    squeeze = g("Sigmoid", g("Conv", g("GlobalAveragePool", value, out="s"), g.w(8, 8, 1, 1), out="e"), out="gate")
    gated = g("Mul", value, squeeze, out="gated")
    g("Gemm", g("Flatten", g("GlobalAveragePool", gated, out="p"), out="f"), g.w(10, 8), out="logits", transB=1)
    reading = g.save(tmp_path / "se.onnx", "logits")
    assert [tap.name for tap in reading.taps()] == ["c", "gated"]


def test_the_head_is_a_one_by_one_convolution(tmp_path):
    g = Graph()
    value = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[4, 4]), out="last")
    kernel, bias = g.w(10, 8, 1, 1), g.w(10)
    scores = g("Conv", g("GlobalAveragePool", value, out="p"), kernel, bias, out="s")
    g("Softmax", g("Reshape", scores, g.const(np.array([0, 10])), out="z"), out="probabilities", axis=1)
    reading = g.save(tmp_path / "m.onnx", "probabilities")
    assert raw_scores(reading.model) == "z"
    head = linear_head(reading, reading.automatic(), "z")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in reading.model.proto.graph.initializer}
    np.testing.assert_array_equal(head.weight, weights[kernel][:, :, 0, 0])
    np.testing.assert_array_equal(head.bias, weights[bias])


def test_weights_stored_in_half_precision_are_read_through_their_cast(tmp_path):
    g = Graph()
    value = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[4, 4]), out="last")
    half = RNG.normal(size=(10, 8)).astype(np.float16)
    cast = g("Cast", g.const(half), out="as_float", to=TensorProto.FLOAT)
    g("Gemm", g("Flatten", g("GlobalAveragePool", value, out="p"), out="f"), cast, out="logits", transB=1)
    reading = g.save(tmp_path / "m.onnx", "logits")
    np.testing.assert_array_equal(linear_head(reading, reading.automatic(), "logits").weight, half.astype(np.float32))


def test_any_value_or_node_can_be_asked_for(make_model):
    reading = Reading(open_model(make_model()), (33, 29))
    assert reading.automatic() == Tap("features", "nchw", 12, (9, 8))
    assert reading.choose("r1") == reading.choose("relu1") == Tap("r1", "nchw", 8, (17, 15))
    assert [tap.name for tap in reading.candidates()] == ["r1", "features"]
    with pytest.raises(ModelError, match=r"no layer 'relu3'; nearest: relu"):
        reading.choose("relu3")
    with pytest.raises(ModelError, match=r"layer 'flat' has shape \[1, 12\] and is not a feature map"):
        reading.choose("flat")
    with pytest.raises(ModelError, match="not a feature map"):
        reading.choose("classifier")


def test_a_channels_last_file_is_read_as_it_lies(make_model):
    reading = Reading(open_model(make_model(layout="NHWC")), (33, 29))
    assert reading.automatic() == Tap("features", "nchw", 12, (9, 8))
    assert reading.tap("first") == Tap("first", "nchw", 3, (33, 29))


def test_with_outputs_keeps_what_the_outputs_need_and_no_more(make_model):
    model = open_model(make_model(end="Softmax"))
    cut = with_outputs(model.proto, ["features"])
    assert [output.name for output in cut.graph.output] == ["features"]
    assert {node.op_type for node in cut.graph.node} == {"Conv", "Relu"}
    assert {tensor.name for tensor in cut.graph.initializer} == {"w1", "b1", "w2", "b2"}
    assert len(model.proto.graph.node) == 8, "the opened model is untouched"


@pytest.mark.parametrize(
    ("file", "layer", "channels", "side", "linear"),
    [
        ("resnet50", "activation_48", 2048, 7, True),
        ("efficientnet_lite0", "head_act", 1280, 7, True),
        ("mobilenet_v2", "conv_35_act", 1280, 7, True),
        ("squeezenet1.1", "fire9_concat", 512, 13, False),
    ],
)
def test_the_real_models(shared_data, file, layer, channels, side, linear):
    reading = Reading(open_model(shared_data / "models" / f"{file}.onnx"), (224, 224))
    assert reading.automatic() == Tap(layer, "nchw", channels, (side, side))
    assert isinstance(linear_head(reading, reading.automatic(), "logits"), LinearHead) == linear


def test_shapes_that_double_at_every_node_are_not_followed(tmp_path):
    g = Graph()
    value = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[4, 4]), out="last")
    shape = g("Shape", value, out="s0")
    for i in range(40):
        shape = g("Concat", shape, shape, out=f"s{i + 1}", axis=0)
    g("Gemm", g("Flatten", g("GlobalAveragePool", value, out="p"), out="f"), g.w(10, 8), out="logits", transB=1)
    assert g.save(tmp_path / "m.onnx", "logits").automatic().name == "last"


def test_what_a_convolution_or_pooling_reads_is_a_map_whatever_came_before(tmp_path):
    """ShuffleNet's and MaxViT's way: channels or windows are shuffled by reshaping to shapes computed at run time."""
    g = Graph()
    value = g("Relu", g("Conv", "x", g.w(8, 3, 3, 3), out="c", pads=[1] * 4, strides=[4, 4]), out="r")
    first = g("Gather", g("Shape", value, out="s"), g.const(np.array([0], np.int64)), out="n", axis=0)
    apart = g("Concat", first, g.const(np.array([2, 4, 8, 8], np.int64)), out="apart", axis=0)
    again = g("Concat", first, g.const(np.array([8, 8, 8], np.int64)), out="again", axis=0)
    shuffled = g("Transpose", g("Reshape", value, apart, out="groups"), out="swapped", perm=[0, 2, 1, 3, 4])
    shuffled = g("Reshape", shuffled, again, out="shuffled")
    g("Gemm", g("Flatten", g("GlobalAveragePool", shuffled, out="p"), out="f"), g.w(10, 8), out="logits", transB=1)
    reading = g.save(tmp_path / "m.onnx", "logits")
    assert reading.automatic() == Tap("shuffled", "nchw", 8, (8, 8))
    assert reading.tap("groups") is None
    assert isinstance(linear_head(reading, reading.automatic(), "logits"), LinearHead)

"""Opening ONNX files: a zoo of good ones, judged by ONNX Runtime, and of bad ones, judged by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from heatmill import ModelError
from heatmill.models.load import ImageInput, open_model, strip_weights

REAL_MODELS = Path(__file__).parents[3] / "shared/data/models"
FLOAT, FLOAT16, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8
OPEN = ("batch", "num_channels", "height", "width")
RNG = np.random.default_rng(0)


def weights(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def model(nodes, inputs, outputs, initializers=(), *, opset=17, ir=8, domains=()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def value(name: str, shape, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def classifier(
    tail=(), *, shape=("batch", 3, 8, 8), dtype=FLOAT, classes=10, output_shape="declared", opset=17, ir=8, domains=()
) -> onnx.ModelProto:
    """image -> convolution -> mean -> linear -> `tail` -> scores; NHWC where `shape` ends in 1 or 3."""
    nhwc = shape[-1] in (1, 3)
    channels = shape[-1] if nhwc else shape[1] if isinstance(shape[1], int) else 3
    numpy_dtype = "float16" if dtype == FLOAT16 else "float32"
    nodes, image = [], "image"
    if dtype == UINT8:
        nodes.append(helper.make_node("Cast", [image], ["cast"], to=FLOAT))
        image = "cast"
    if nhwc:
        nodes.append(helper.make_node("Transpose", [image], ["planes"], perm=[0, 3, 1, 2]))
        image = "planes"
    tail = list(tail)
    nodes += [
        helper.make_node("Conv", [image, "kernel"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["logits" if tail else "scores"]),
        *tail,
    ]
    initializers = [
        numpy_helper.from_array(weights(4, channels, 3, 3, dtype=numpy_dtype), "kernel"),
        numpy_helper.from_array(weights(4, classes, dtype=numpy_dtype), "matrix"),
        numpy_helper.from_array(weights(classes, dtype=numpy_dtype), "bias"),
    ]
    declared = [shape[0], classes] if output_shape == "declared" else output_shape
    scores = value("scores", declared, FLOAT16 if dtype == FLOAT16 else FLOAT)
    return model(nodes, [value("image", shape, dtype)], [scores], initializers, opset=opset, ir=ir, domains=domains)


def chain(*steps: tuple[str, dict]) -> list[onnx.NodeProto]:
    """Nodes from logits to scores, one input and one output each."""
    names = ["logits", *(f"step{i}" for i in range(1, len(steps))), "scores"]
    return [helper.make_node(op, [a], [b], **kw) for (op, kw), (a, b) in zip(steps, pairwise(names), strict=True)]


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def external(proto: onnx.ModelProto, folder: Path, location: str = "weights.bin", **entries) -> Path:
    """Saved with the kernel in `location`, whose entries are as given; writes no data file."""
    tensor = proto.graph.initializer[0]
    fields = {"location": location, "offset": 0, "length": len(tensor.raw_data), **entries}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in fields.items():
        tensor.external_data.add(key=key, value=str(entry))
    return save(proto, folder)


def kernel_bytes(proto: onnx.ModelProto) -> bytes:
    return bytes(proto.graph.initializer[0].raw_data)


# --- good files ---


def in_folder(folder: Path) -> Path:
    proto = classifier()
    (folder / "sub").mkdir()
    (folder / "sub/weights.bin").write_bytes(b"\0" * 64 + kernel_bytes(proto))
    return external(proto, folder, "sub/weights.bin", offset=64)


def without_length(folder: Path) -> Path:
    proto = classifier()
    (folder / "weights.bin").write_bytes(kernel_bytes(proto))
    path = external(proto, folder)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[0].external_data[1:]
    return save(proto, folder)


def download_cache(folder: Path) -> Path:
    """Hugging Face's layout: snapshots/REV/NAME links into blobs/HASH."""
    proto = classifier()
    (folder / "blobs").mkdir()
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "blobs/222").write_bytes(kernel_bytes(proto))
    external(proto, folder / "blobs", "model.onnx_data").rename(folder / "blobs/111")
    (folder / "snapshots/abc/model.onnx").symlink_to("../../blobs/111")
    (folder / "snapshots/abc/model.onnx_data").symlink_to("../../blobs/222")
    return folder / "snapshots/abc/model.onnx"


def data_beside_a_link(folder: Path) -> Path:
    proto = classifier()
    (folder / "real").mkdir()
    (folder / "weights.bin").write_bytes(kernel_bytes(proto))
    (folder / "link.onnx").symlink_to(external(proto, folder / "real"))
    return folder / "link.onnx"


def linked(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link.onnx").symlink_to(save(classifier(), folder / "real"))
    return folder / "link.onnx"


def initializers_as_inputs() -> onnx.ModelProto:
    proto = classifier(ir=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(value(tensor.name, tensor.dims, tensor.data_type))
    return proto


def quantised() -> onnx.ModelProto:
    tail = [
        helper.make_node("QuantizeLinear", ["logits", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Softmax", ["dq"], ["soft"]),
        helper.make_node("QuantizeLinear", ["soft", "fine", "zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "fine", "zero"], ["scores"]),
    ]
    proto = classifier(tail)
    for name, array in (("scale", np.float32(0.1)), ("fine", np.float32(1 / 255)), ("zero", np.uint8(0))):
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def integer_convolution() -> onnx.ModelProto:
    """Quantised without QuantizeLinear, and nothing fixed in the input."""
    nodes = [
        helper.make_node("QLinearConv", ["image", "one", "nil", "w", "one", "nil", "one", "nil"], ["conv"]),
        helper.make_node("Cast", ["conv"], ["cast"], to=FLOAT),
        helper.make_node("GlobalAveragePool", ["cast"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["scores"]),
    ]
    constants = {"one": np.float32(1), "nil": np.uint8(0), "w": np.ones((10, 3, 2, 2), "uint8")}
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    return model(nodes, [value("image", OPEN, UINT8)], [value("scores", ["batch", 10])], initializers)


def depthwise_first() -> onnx.ModelProto:
    """The first convolution has one group per channel, and nothing is fixed in the input."""
    proto = classifier(shape=OPEN)
    proto.graph.node[0].attribute.append(helper.make_attribute("group", 3))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights(3, 1, 3, 3), "kernel"))
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights(3, 10), "matrix"))
    return proto


def sliced() -> onnx.ModelProto:
    """Its classes stand in the declared output only: the slice's ends are computed."""
    nodes = [
        helper.make_node("Shape", ["logits"], ["ends"]),
        helper.make_node("Slice", ["logits", "starts", "ends"], ["scores"]),
    ]
    proto = classifier(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(2, "int64"), "starts"))
    return proto


def typed_fields() -> onnx.ModelProto:
    """Weights in float_data and int32_data instead of raw_data, as older exporters write them."""
    proto = classifier(chain(("Cast", {"to": FLOAT16}), ("Cast", {"to": FLOAT})))
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(helper.make_tensor(tensor.name, FLOAT, tensor.dims, numpy_helper.to_array(tensor).ravel()))
    half = helper.make_tensor("half", FLOAT16, [1], np.ones(1, "float16"))
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=half))
    packed = helper.make_tensor("packed", TensorProto.COMPLEX64, [2], [1 + 2j, 3j])
    proto.graph.node.append(helper.make_node("Constant", [], ["unused2"], value=packed))
    return proto


def branches() -> onnx.ModelProto:
    """An If whose branches scale the logits by weights of their own."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        tensor = numpy_helper.from_array(np.full((1, 10), factor, "float32"), f"{name}_weight")
        node = helper.make_node("Mul", ["logits", f"{name}_weight"], [name])
        return helper.make_graph([node], name, [], [value(name, ["batch", 10])], [tensor])

    yes = numpy_helper.from_array(np.asarray(True), "yes")
    proto = classifier(
        [helper.make_node("If", ["yes"], ["scores"], then_branch=branch("then", 1), else_branch=branch("else", 2))]
    )
    proto.graph.initializer.append(yes)
    return proto


def with_features(*, features_rank: int) -> onnx.ModelProto:
    proto = classifier()
    extra = value("pool", ["batch", 4, 1, 1]) if features_rank == 4 else value("flat", ["batch", 4])
    proto.graph.output.insert(0, extra)
    return proto


NCHW = ImageInput("image", "NCHW", "float32", None, 3, 8, 8)
GOOD: dict[str, tuple[onnx.ModelProto | Callable[[Path], Path], dict]] = {
    "nchw": (classifier(), {}),
    "nhwc": (classifier(shape=("n", 8, 6, 3)), {"input": ImageInput("image", "NHWC", "float32", None, 3, 8, 6)}),
    "uint8": (
        classifier(shape=(None, 8, 8, 3), dtype=UINT8),
        {"input": ImageInput("image", "NHWC", "uint8", None, 3, 8, 8)},
    ),
    "float16": (classifier(dtype=FLOAT16), {"input": ImageInput("image", "NCHW", "float16", None, 3, 8, 8)}),
    "fixed batch": (classifier(shape=(4, 3, 8, 8)), {"input": ImageInput("image", "NCHW", "float32", 4, 3, 8, 8)}),
    "minus one for a dynamic batch": (classifier(shape=(-1, 3, 8, 8)), {}),
    "dynamic sides": (
        classifier(shape=("n", 3, "h", "w")),
        {"input": ImageInput("image", "NCHW", "float32", None, 3, None, None)},
    ),
    "nothing fixed": (classifier(shape=OPEN), {"input": ImageInput("image", "NCHW", "float32", None, 3, None, None)}),
    "nothing fixed, uint8": (
        classifier(shape=OPEN, dtype=UINT8),
        {"input": ImageInput("image", "NCHW", "uint8", None, 3, None, None)},
    ),
    "nothing fixed, one group per channel": (
        depthwise_first(),
        {"input": ImageInput("image", "NCHW", "float32", None, 3, None, None)},
    ),
    "integer convolution": (
        integer_convolution(),
        {"input": ImageInput("image", "NCHW", "uint8", None, 3, None, None), "quantised": True},
    ),
    "classes only declared": (sliced(), {}),
    "three wide": (
        classifier(shape=("n", 3, 8, 3)),
        {"input": ImageInput("image", "NHWC", "float32", None, 3, 3, 8)},
    ),
    "grey": (classifier(shape=("n", 1, 8, 8)), {"input": ImageInput("image", "NCHW", "float32", None, 1, 8, 8)}),
    "softmax": (classifier(chain(("Softmax", {"axis": 1}))), {"output_kind": "probabilities"}),
    "softmax and identity": (
        classifier(chain(("Softmax", {}), ("Identity", {}), ("Cast", {"to": FLOAT}))),
        {"output_kind": "probabilities"},
    ),
    "softmax of opset 11": (
        classifier(chain(("Softmax", {})), opset=11),
        {"output_kind": "probabilities", "opset": 11},
    ),
    "softmax of opset 11 over all axes": (
        classifier(chain(("Unsqueeze", {"axes": [2, 3]}), ("Softmax", {}), ("Flatten", {})), opset=11),
        {"output_kind": "probabilities", "opset": 11},
    ),
    "softmax of opset 11 over one value": (
        classifier(chain(("Unsqueeze", {"axes": [2]}), ("Softmax", {"axis": 2}), ("Flatten", {})), opset=11),
        {"opset": 11},
    ),
    "softmax over a batch of ten": (
        classifier(chain(("Softmax", {"axis": 0})), shape=(10, 3, 8, 8)),
        {"input": ImageInput("image", "NCHW", "float32", 10, 3, 8, 8)},
    ),
    "softmax over the batch": (classifier(chain(("Softmax", {"axis": 0}))), {"output_kind": "logits"}),
    "log of softmax": (classifier(chain(("LogSoftmax", {}))), {"output_kind": "logits"}),
    "sigmoid": (classifier(chain(("Sigmoid", {}), ("Flatten", {}))), {"output_kind": "sigmoid"}),
    "softmax inside": (classifier(chain(("Softmax", {}), ("Log", {}))), {"output_kind": "logits"}),
    "one class": (classifier(chain(("Sigmoid", {})), classes=1), {"output_kind": "sigmoid", "classes": 1}),
    "shapes missing": (classifier(output_shape=None), {}),
    "classes not declared": (classifier(output_shape=["batch", "classes"]), {}),
    "initialisers as inputs": (initializers_as_inputs(), {}),
    "quantised": (quantised(), {"quantised": True, "output_kind": "probabilities"}),
    "typed fields": (typed_fields(), {}),
    "branches": (branches(), {}),
    "with a feature map": (with_features(features_rank=4), {}),
    "oldest opset": (classifier(opset=7, ir=3), {"opset": 7}),
    "operator of ONNX Runtime": (
        classifier(
            [helper.make_node("FastGelu", ["logits"], ["scores"], domain="com.microsoft")], domains=["com.microsoft"]
        ),
        {},
    ),
    "external data in its folder": (in_folder, {}),
    "external data without length": (without_length, {}),
    "download cache of links": (download_cache, {}),
    "link to a file elsewhere": (linked, {}),
    "external data beside a link": (data_beside_a_link, {}),
}


def made(case: onnx.ModelProto | Callable[[Path], Path], folder: Path) -> Path:
    return case(folder) if callable(case) else save(case, folder)


@pytest.mark.parametrize("case", GOOD)
def test_good_files_are_described(case, tmp_path):
    builder, expected = GOOD[case]
    path = made(builder, tmp_path)
    opened = open_model(path)
    expected = {"classes": 10, "output_kind": "logits", "quantised": False, "opset": 17, "input": NCHW, **expected}
    assert {name: getattr(opened, name) for name in expected} == expected
    assert (opened.path, opened.output) == (path, "scores")


@pytest.mark.parametrize("case", GOOD)
def test_the_description_is_true(case, tmp_path):
    path = made(GOOD[case][0], tmp_path)
    opened = open_model(path)
    image = opened.input
    batch, height, width = image.batch or 2, image.height or 9, image.width or 7
    planes = (image.channels, height, width)
    shape = (batch, *planes) if image.layout == "NCHW" else (batch, height, width, image.channels)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = RNG.uniform(0, 200, shape).astype(image.dtype)
    (scores,) = session.run([opened.output], {image.name: pixels})
    assert scores.shape == (batch, opened.classes)
    ranged = bool((scores >= 0).all() and (scores <= 1).all())
    summed = bool(np.allclose(scores.sum(axis=1), 1, atol=0.05))
    if opened.output_kind == "probabilities":
        assert ranged
        assert summed
    elif opened.output_kind == "sigmoid":
        assert ranged
    else:
        assert not (ranged and summed)


@pytest.mark.skipif(not REAL_MODELS.is_dir(), reason="needs the models next to the checkout")
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2", "resnet50", "squeezenet1.1"])
def test_real_models(name):
    opened = open_model(REAL_MODELS / f"{name}.onnx")
    assert opened.input == ImageInput("input", "NCHW", "float32", None, 3, 224, 224)
    assert (opened.output, opened.classes, opened.output_kind) == ("logits", 1000, "logits")
    assert (opened.quantised, opened.opset) == (False, 17)
    assert opened.sha256 == hashlib.sha256(opened.path.read_bytes()).hexdigest()


def test_classes_are_none_where_shapes_do_not_tell(tmp_path):
    unknown = helper.make_node("FastGelu", ["logits"], ["scores"], domain="com.microsoft")
    proto = classifier([unknown], output_shape=["batch", "classes"], domains=["com.microsoft"])
    assert open_model(save(proto, tmp_path)).classes is None


def test_scores_names_one_of_several_outputs(tmp_path):
    path = save(with_features(features_rank=2), tmp_path)
    opened = open_model(path, scores="flat")
    assert (opened.output, opened.classes) == ("flat", 4)
    assert open_model(path, scores="scores").classes == 10
    with pytest.raises(ModelError, match="no score output 'nothing'"):
        open_model(path, scores="nothing")
    with pytest.raises(ModelError, match="no score output 'pool'"):
        open_model(save(with_features(features_rank=4), tmp_path), scores="pool")


def test_external_data_is_part_of_the_hash_and_stays_on_disk(tmp_path):
    path = in_folder(tmp_path)
    opened = open_model(path)
    data = tmp_path / "sub/weights.bin"
    parts = hashlib.sha256(path.read_bytes()).digest()
    parts += b"sub/weights.bin\0" + hashlib.sha256(data.read_bytes()).digest()
    assert opened.sha256 == hashlib.sha256(parts).hexdigest()
    assert opened.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert not opened.proto.graph.initializer[0].raw_data
    assert opened.proto.graph.initializer[1].raw_data
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    assert open_model(path).sha256 != opened.sha256


def test_a_relative_path_is_kept_absolute_and_unresolved(tmp_path, monkeypatch):
    linked(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_model(Path("link.onnx")).path == tmp_path / "link.onnx"


# --- bad files ---


def written(data: bytes, name: str = "model.onnx") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return stream.getvalue()


def changed(change: Callable[[onnx.ModelProto], object], **kw) -> onnx.ModelProto:
    proto = classifier(**kw)
    change(proto)
    return proto


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


def endless(folder: Path) -> Path:
    (folder / "model.onnx").symlink_to("/dev/zero")
    return folder / "model.onnx"


def sparse(folder: Path) -> Path:
    with (folder / "model.onnx").open("wb") as file:
        file.truncate(2**31)
    return folder / "model.onnx"


def refers_to(location: str, **entries) -> Callable[[Path], Path]:
    """A model in `in/`, with enough data in `in/weights.bin` and beside the folder in `secret`."""

    def build(folder: Path) -> Path:
        (folder / "in/sub").mkdir(parents=True)
        for name in ("secret", "in/weights.bin", "in-other.bin"):
            (folder / name).write_bytes(b"s" * 1000)
        (folder / "in/linked").symlink_to("../secret")
        (folder / "in/up").symlink_to("..")
        (folder / "in/zero").symlink_to("/dev/zero")
        (folder / "in/loop").symlink_to("loop")
        os.mkfifo(folder / "in/fifo")
        return external(classifier(), folder / "in", location.replace("FOLDER", str(folder)), **entries)

    return build


def claims_more_than_held(folder: Path) -> Path:
    """Two tensors over the same bytes: each range is inside the file, their sum is not."""
    proto = classifier()
    (folder / "weights.bin").write_bytes(kernel_bytes(proto))
    twin = proto.graph.initializer.add()
    path = external(proto, folder)
    twin.CopyFrom(proto.graph.initializer[0])
    twin.name = "twin"
    return save(proto, path.parent)


def absent(folder: Path) -> Path:
    return folder / "none.onnx"


def a_folder(folder: Path) -> Path:
    return folder


def set_dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].dims[:] = dims

    return change


def looped(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "relu"


def nested(depth: int) -> bytes:
    """A model whose If nodes stand inside one another, deeper than any parser allows."""
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["y"])], "g", [], [value("y", None)])
    data = graph.SerializeToString()

    def field(number: int, payload: bytes) -> bytes:
        size, length = b"", len(payload)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + payload

    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, data)
        data = field(1, field(4, b"If") + field(5, attribute))
    return bytes([8, 8]) + field(7, data)


def sparse_weight(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.sparse_initializer.add()
    tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, "float32"), "bomb"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, "int64"), "at"))
    tensor.dims[:] = [2**40]


def sparse_constant(proto: onnx.ModelProto) -> None:
    node = proto.graph.node.add(op_type="Constant", output=["bomb"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims[:] = [2**40]


def local_function(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("pkg.torch", "Linear", ["a"], ["b"], [node], opsets))


def text_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Identity", ["rows"], ["y"]),
    ]
    inputs = [value("input_ids", ["b", "t"], TensorProto.INT64), value("attention_mask", ["b", "t"], TensorProto.INT64)]
    table = numpy_helper.from_array(weights(5, 4), "table")
    return model(nodes, inputs, [value("y", ["b", "t", 4])], [table])


def detector() -> onnx.ModelProto:
    proto = classifier()
    proto.graph.node.extend(
        [
            helper.make_node("Reshape", ["scores", "to"], ["boxes"]),
            helper.make_node("Identity", ["boxes"], ["more"]),
        ]
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray([0, 5, 2]), "to"))
    del proto.graph.output[:]
    proto.graph.output.extend([value("boxes", ["batch", 5, 2]), value("more", None)])
    return proto


def rebatched() -> onnx.ModelProto:
    proto = classifier([helper.make_node("Reshape", ["logits", "to"], ["scores"])], shape=(1, 3, 8, 8))
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray([5, 2]), "to"))
    proto.graph.output[0].CopyFrom(value("scores", [5, 2]))
    return proto


def endless_names() -> onnx.ModelProto:
    proto = classifier(chain(("FastGelu", {"domain": "com.microsoft"})), domains=["com.microsoft"])
    proto.graph.output[0].CopyFrom(value("scores", ["x" * 10_000] * 20))
    return proto


def unflattened() -> onnx.ModelProto:
    proto = classifier()
    proto.graph.output[0].CopyFrom(value("pool", ["batch", 4, 1, 1]))
    return proto


def score_type(kind: int) -> onnx.ModelProto:
    proto = classifier(chain(("Cast", {"to": kind})))
    proto.graph.output[0].type.tensor_type.elem_type = kind
    return proto


def image_type(kind: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Cast", ["image"], ["cast"], to=FLOAT), helper.make_node("Flatten", ["cast"], ["scores"])]
    return model(nodes, [value("image", ["n", 3, 8, 8], kind)], [value("scores", ["n", 192])])


def flattened(shape) -> onnx.ModelProto:
    return model(
        [helper.make_node("Flatten", ["image"], ["scores"])], [value("image", shape)], [value("scores", ["n", 192])]
    )


def sequence_input() -> onnx.ModelProto:
    tensor = helper.make_tensor_type_proto(FLOAT, ["n", 3, 8, 8])
    image = helper.make_value_info("image", helper.make_sequence_type_proto(tensor))
    nodes = [
        helper.make_node("ConcatFromSequence", ["image"], ["all"], axis=0),
        helper.make_node("Flatten", ["all"], ["y"]),
    ]
    return model(nodes, [image], [value("y", ["n", 192])])


def evil_names() -> onnx.ModelProto:
    proto = classifier([helper.make_node("Run\nError: \x1b[2J" * 50, ["logits"], ["scores"], domain="evil\nshell")])
    proto.opset_import.append(helper.make_opsetid("evil\nshell", 1))
    return proto


def bad_text() -> bytes:
    proto = classifier()
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "SCORES"
    return proto.SerializeToString().replace(b"SCORES", b"SC\xff\xfeES")


def inner_custom() -> onnx.NodeProto:
    node = helper.make_node("Run", ["logits"], ["y"], domain="evil")
    graph = helper.make_graph([node], "branch", [], [value("y", None)])
    return helper.make_node("If", ["yes"], ["unused"], then_branch=graph, else_branch=graph)


def huge_constant() -> onnx.NodeProto:
    tensor = TensorProto(name="big", data_type=FLOAT, dims=[2**33])
    return helper.make_node("Constant", [], ["unused"], value=tensor)


BAD: dict[str, tuple[onnx.ModelProto | Callable[[Path], Path], str]] = {
    "does not exist": (absent, "No such file or directory; check the path"),
    "folder": (a_folder, "is a folder; give the .onnx file in it"),
    "pipe": (fifo, "is not a regular file"),
    "/dev/zero": (endless, "is not a regular file"),
    "over 2 GiB": (sparse, "2.0 GiB, over protobuf's limit of 2 GiB; export it with external data"),
    "empty": (written(b""), "is empty; download or export it again"),
    "text": (written(b"import torch\nprint('hello')\n"), "is not ONNX, it looks like plain text"),
    "web page": (written(b"\n<!DOCTYPE html><html>404</html>"), "looks like a web page or XML; download the model"),
    "JSON": (written(b'{"input_size": [3, 224, 224]}'), "looks like JSON"),
    "Git LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "pickle": (written(pickle.dumps({"fc.weight": 1}, protocol=2)), "looks like a pickle, as PyTorch writes"),
    "zip": (written(zipped()), "looks like a zip archive, as PyTorch writes; export the model to ONNX first"),
    "gzip": (written(gzip.compress(b"x" * 100)), "looks like a gzip archive; unpack it"),
    "HDF5": (written(b"\x89HDF\r\n\x1a\n" + b"\0" * 50), "looks like a Keras HDF5 file"),
    "TensorFlow Lite": (written(b"\x1c\0\0\0TFL3" + b"\0" * 50), "looks like a TensorFlow Lite file"),
    "SavedModel": (written(b"\x08\x01\x12\xff\x05" + b"\0" * 50), "looks like a TensorFlow SavedModel"),
    "safetensors": (written(b"\x40\0\0\0\0\0\0\0" + b'{"fc.weight":{"dtype":"F32"'), "looks like a safetensors file"),
    "ORT format": (written(b"\x18\0\0\0ORTM" + b"\0" * 50), "looks like an ONNX Runtime .ort file"),
    "JPEG": (written(b"\xff\xd8\xff\xe0\0\x10JFIF"), "looks like a JPEG image; the model comes before the images"),
    "PNG": (written(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "looks like a PNG image"),
    "random bytes": (written(random.Random(1).randbytes(999)), "is not ONNX; give an .onnx file"),
    "truncated": (written(classifier().SerializeToString()[:-200]), "is a truncated or damaged ONNX file"),
    "truncated at the start": (written(classifier().SerializeToString()[:2]), "is a truncated or damaged ONNX file"),
    "nested too deep": (written(nested(2000)), "is a truncated or damaged ONNX file"),
    "names that are not UTF-8": (written(bad_text()), "damaged ONNX file"),
    "no nodes": (changed(lambda p: p.graph.ClearField("node")), "graph without nodes"),
    "IR version of the future": (changed(lambda p: setattr(p, "ir_version", 99)), "has IR version 99; 3 to "),
    "IR version 1": (changed(lambda p: setattr(p, "ir_version", 1)), "has IR version 1; 3 to "),
    "opset 99": (changed(lambda p: None, opset=99), f"has opset 99; 7 to {onnx.defs.onnx_opset_version()} are"),
    "opset 6": (changed(lambda p: None, opset=6), "has opset 6; 7 to "),
    "no opset": (changed(lambda p: p.ClearField("opset_import")), "names no ONNX opset, or several"),
    "two opsets": (changed(lambda p: p.opset_import.add(version=9)), "names no ONNX opset, or several"),
    "model-local function": (changed(local_function), "model-local functions ('pkg.torch::Linear'); inline them"),
    "custom operator": (
        classifier([helper.make_node("Run", ["logits"], ["scores"], name="last", domain="evil")], domains=["evil"]),
        "node 'last' is the custom operator 'evil::Run'",
    ),
    "custom operator with a long, many-lined name": (evil_names(), r"'evil\nshell::Run\nError: \x1b[2J"),
    "custom operator in a branch": (
        changed(lambda p: p.graph.node.append(inner_custom())),
        "is the custom operator 'evil::Run'",
    ),
    "unknown operator": (classifier([helper.make_node("Rum", ["logits"], ["scores"])]), "No Op registered for Rum"),
    "unknown attribute": (classifier(chain(("Relu", {"alpha": 1}))), "Unrecognized attribute: alpha"),
    "cycle": (changed(looped), "topologically sorted, however input 'relu'"),
    "dangling input": (changed(lambda p: p.graph.node[0].input.__setitem__(1, "gone")), "input 'gone'"),
    "dangling output": (changed(lambda p: setattr(p.graph.output[0], "name", "gone")), "Graph output 'gone'"),
    "name twice": (changed(lambda p: p.graph.node.append(p.graph.node[1])), "single static assignment"),
    "node without inputs": (
        classifier(
            [helper.make_node("DequantizeLinear", [], ["scores"], domain="com.microsoft")], domains=["com.microsoft"]
        ),
        "damaged ONNX file",
    ),
    # weights
    "negative dims": (changed(set_dims(-4, 3, 3, 3)), "'kernel' has impossible dims [-4, 3, 3, 3]"),
    "enormous dims": (changed(set_dims(2**40, 2**40, 3)), "'kernel' with dims [1099511627776, 1099511627776, 3]"),
    "dims over the data": (changed(set_dims(4, 3, 3, 4)), "stores 432 values or bytes where 576 belong"),
    "dims under the data": (changed(set_dims(4, 3, 3)), "stores 432 values or bytes where 144 belong"),
    "rank of thousands": (changed(set_dims(*[2] * 5000)), "'kernel' has impossible dims"),
    "no data at all": (changed(lambda p: p.graph.initializer[0].ClearField("raw_data")), "stores 0 values or bytes"),
    "unknown element type": (
        changed(lambda p: setattr(p.graph.initializer[0], "data_type", 77)),
        "'kernel' has the unknown element type 77",
    ),
    "dims over the data of a Constant": (changed(lambda p: p.graph.node.append(huge_constant())), "'big' with dims"),
    "sparse weights": (changed(sparse_weight), "sparse weights, which are not supported"),
    "sparse constant": (changed(sparse_constant), "sparse tensor, which is not supported"),
    # external data
    "external data missing": (refers_to("gone.bin"), "needs its external data 'gone.bin', which is missing"),
    "external data above": (refers_to("../secret"), "'../secret' outside the model's folder"),
    "external data above, in a detour": (refers_to("sub/../../secret"), "outside the model's folder"),
    "external data in a folder of the same beginning": (refers_to("../in-other.bin"), "outside the model's folder"),
    "external data by absolute path": (refers_to("FOLDER/in/weights.bin"), "must be a path inside the model's folder"),
    "external data by Windows path": (refers_to("C:\\weights.bin"), "must be a path inside the model's folder"),
    "external data by UNC path": (refers_to("\\\\host\\share"), "must be a path inside the model's folder"),
    "external data without location": (refers_to(""), "must be a path inside the model's folder"),
    "external data linked outside": (refers_to("linked"), "'linked' outside the model's folder"),
    "external data through a linked folder": (refers_to("up/secret"), "outside the model's folder"),
    "external data /dev/zero": (refers_to("/dev/zero"), "must be a path inside the model's folder"),
    "external data linked to /dev/zero": (refers_to("zero"), "'zero' outside the model's folder"),
    "external data in a pipe": (refers_to("fifo"), "'fifo', which is not a regular file"),
    "external data in a folder": (refers_to("sub"), "'sub', which is not a regular file"),
    "external data in a loop of links": (refers_to("loop"), ""),
    "external data with a zero byte": (refers_to("a\0b"), "null byte"),
    "external data in ONNX Runtime's memory": (refers_to("*/_ORT_MEM_ADDR_/*"), "which is missing"),
    "external offset beyond the end": (refers_to("weights.bin", offset=900), "ends at byte 1332 of 'weights.bin'"),
    "external offset negative": (refers_to("weights.bin", offset=-4), "external offset '-4', not a byte count"),
    "external offset enormous": (refers_to("weights.bin", offset="9" * 5000), "not a byte count"),
    "external offset in words": (refers_to("weights.bin", offset="1_0"), "external offset '1_0', not a byte count"),
    "external offset in other digits": (refers_to("weights.bin", offset="\u0660"), "not a byte count"),
    "external length negative": (refers_to("weights.bin", length=-1), "external length '-1', not a byte count"),
    "external length wrong": (refers_to("weights.bin", length=400), "has 432 bytes, its external length is 400"),
    "external data counted twice": (claims_more_than_held, "claims 864 bytes of external weights"),
    # inputs
    "text model": (text_model(), "is not an image classifier: it has 2 inputs ('input_ids', 'attention_mask')"),
    "no input": (
        model([helper.make_node("Constant", [], ["y"], value_float=1.0)], [], [value("y", [])]),
        "it has 0 inputs (none)",
    ),
    "flat input": (flattened(["n", 192]), "input 'image' is float32 (n, 192); an image input is"),
    "input without shape": (flattened(None), "input 'image' is float32 (of unknown rank)"),
    "sequence input": (sequence_input(), "is not a tensor"),
    "int64 input": (image_type(TensorProto.INT64), "int64 (n, 3, 8, 8); export it with one of float32, float16, uint8"),
    "double input": (image_type(TensorProto.DOUBLE), "is float64 (n, 3, 8, 8); export it with one of"),
    "two candidates for channels": (flattened(["n", 3, 64, 1]), "(n, 3, 64, 1): which axis holds 1 or 3 channels"),
    "no candidate for channels": (flattened(["n", "c", "h", "w"]), "(n, c, h, w): which axis holds 1 or 3 channels"),
    "four channels": (flattened(["n", 4, 8, 6]), "(n, 4, 8, 6): which axis holds 1 or 3 channels"),
    "enormous image": (classifier(shape=("n", 3, 2**20, 2**20)), "larger than any image"),
    "enormous batch": (classifier(shape=(2**40, 3, 8, 8)), "larger than any image"),
    # outputs
    "detector": (
        detector(),
        "is not a classifier: no output has the shape (batch, classes); where one holds class scores, export it with a "
        "Flatten behind: 'boxes' float32 (batch, 5, 2), 'more' float32 (1, 5, 2)",
    ),
    "output without the batch": (rebatched(), "is not a classifier: no output has the shape (batch, classes)"),
    "endless names": (endless_names(), "is not a classifier"),
    "two candidates for scores": (
        with_features(features_rank=2),
        "name one with --scores NAME: 'flat' float32 (batch, 4), 'scores' float32 (batch, 10)",
    ),
    "scores not flattened": (unflattened(), "(batch, 4, 1, 1)"),
    "labels only": (score_type(TensorProto.INT64), "is not a classifier"),
    "no output": (changed(lambda p: p.graph.ClearField("output")), ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case, tmp_path):
    builder, phrase = BAD[case]
    path = made(builder, tmp_path)
    with pytest.raises(ModelError) as caught:
        open_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert phrase in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 800


def test_no_damage_escapes_as_another_error(tmp_path):
    """Truncated, and with bytes overwritten at random: opened, or refused with a ModelError."""
    data = quantised().SerializeToString()
    rng = random.Random(0)
    refusals = []
    for trial in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / "model.onnx"
        path.write_bytes(bytes(damaged) if trial % 2 else data[: rng.randrange(1, len(data))])
        try:
            open_model(path)
        except ModelError as err:
            refusals.append(str(err))
    assert len(refusals) > 200
    assert all(message.isprintable() for message in refusals)


def test_empty_names_make_no_endless_walk(tmp_path):
    proto = classifier(domains=["com.microsoft"])
    proto.graph.node[-1].output[0] = "logits"
    for output in ("", "scores"):
        proto.graph.node.append(helper.make_node("DequantizeLinear", [""], [output], domain="com.microsoft"))
    assert open_model(save(proto, tmp_path)).output_kind == "logits"


def test_a_tower_of_concat_is_not_computed(tmp_path):
    """Sixty doublings of a shape: 2**62 numbers for whoever propagates them."""
    tower = [helper.make_node("Concat", [f"s{i}", f"s{i}"], [f"s{i + 1}"], axis=0) for i in range(60)]
    nodes = [helper.make_node("Shape", ["logits"], ["s0"]), *tower]
    nodes.append(helper.make_node("Reshape", ["logits", "s60"], ["scores"]))
    assert open_model(save(classifier(nodes), tmp_path)).classes == 10


def test_memory_that_runs_out_is_refused(tmp_path, monkeypatch):
    path = save(classifier(), tmp_path)

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(onnx.checker, "check_model", exhausted)
    with pytest.raises(ModelError, match="not enough memory"):
        open_model(path)


# --- skeletons ---


def test_skeletons_keep_shapes_and_drop_data():
    proto = branches()
    big = numpy_helper.from_array(weights(1000), "big")
    proto.graph.initializer.append(big)
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=big))
    inner = proto.graph.node[-2].attribute[0].g
    inner.initializer.append(big)
    before = proto.SerializeToString()
    slim = strip_weights(proto)
    assert proto.SerializeToString() == before
    assert slim.ByteSize() < len(before) - 3 * 4000
    assert [(t.name, list(t.dims), t.data_type) for t in slim.graph.initializer] == [
        (t.name, list(t.dims), t.data_type) for t in proto.graph.initializer
    ]
    assert not slim.graph.initializer[-1].raw_data
    assert not slim.graph.node[-1].attribute[0].t.raw_data
    assert slim.graph.initializer[0] == proto.graph.initializer[0]
    assert strip_weights(proto, keep_bytes=4000) == proto
    assert all(not tensor.raw_data for tensor in strip_weights(proto, keep_bytes=0).graph.initializer)


def test_skeletons_keep_everything_else():
    proto = classifier()
    proto.producer_name, proto.doc_string = "producer", "words"
    helper.set_model_props(proto, {"heatmill.spec": "{}"})
    local_function(proto)
    assert strip_weights(proto) == proto


def test_skeletons_leave_training_out(tmp_path):
    proto = classifier()
    secret = helper.make_tensor("w", FLOAT, [1000], weights(1000).tobytes(), raw=True)
    proto.training_info.add().initialization.initializer.append(secret)
    assert not strip_weights(proto).training_info
    assert open_model(save(proto, tmp_path)).output == "scores"


def test_skeletons_forget_external_data(tmp_path):
    proto = onnx.load(in_folder(tmp_path), load_external_data=False)
    tensor = strip_weights(proto).graph.initializer[0]
    assert (tensor.name, list(tensor.dims)) == ("kernel", [4, 3, 3, 3])
    assert tensor.data_location == TensorProto.DEFAULT
    assert not tensor.external_data


def test_opening_needs_no_runtime():
    code = "import sys, heatmill.models.find_spec; sys.exit('onnxruntime' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

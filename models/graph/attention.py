"""L-CAM's attention in a classifier's file: a 1x1 convolution from a layer's channels to the classes.

The file has one output more, `l-cam` (rows, asked classes, height, width): the attention's maps before the sigmoid.
Which classes are asked is an input that may be left out, `l-cam/classes` (rows, asked classes) int64; -1, its default,
is the predicted class. Only the rows of the asked classes are read, so a class costs a dot product per place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ... import ModelError
from ..find_spec import METADATA_KEY
from ..load import ModelFile, inline_external_data, read_external
from ..spec import ModelSpec
from .emit import Emitter
from .tap import Tap

Array = npt.NDArray[Any]

OUTPUT, CLASSES, WEIGHT, BIAS = "l-cam", "l-cam/classes", "l-cam/weight", "l-cam/bias"
ATTENTION_KEY = "heatmill.l-cam"
LEAST_OPSET, LEAST_IR = 9, 4
ABSENT = "the file has no attention; heatmill train-lcam makes one with it"


@dataclass(frozen=True, slots=True)
class Attention:
    """A trained attention.

    Attributes:
        weight: (classes, channels) float32.
        bias: (classes,) float32.
        layer: the value it reads.
        untrained: the classes that no training image had.
    """

    weight: Array
    bias: Array
    layer: str
    untrained: frozenset[int]


def with_attention(
    model: ModelFile, spec: ModelSpec, tap: Tap, weight: Array, bias: Array, about: Mapping[str, Any]
) -> onnx.ModelProto:
    """A classifier with an attention as a further output.

    Args:
        model: the classifier; it is not changed.
        spec: its spec, which the file will carry; the layer in it becomes the tap.
        weight, bias: (classes, channels) and (classes,).
        about: how it was made, as JSON values; `untrained` lists the classes without an image.

    Raises:
        ModelError: the file is of an opset before 9, or has values of these names already.
    """
    if model.opset < LEAST_OPSET:
        raise ModelError(
            f"{model.path}: has opset {model.opset}, an attention needs {LEAST_OPSET}; export it again, or convert it "
            "with onnx.version_converter"
        )
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inline_external_data(proto, model)
    graph = proto.graph
    names = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    if names.intersection((OUTPUT, CLASSES, WEIGHT, BIAS)):
        raise ModelError(f"{model.path}: has an attention already; give the classifier that it was made from")
    emit = Emitter(names)
    predicted = emit.op("ArgMax", model.output, axis=1, keepdims=1)
    asked = emit.op("Where", emit.op("Less", CLASSES, [0]), predicted, CLASSES)
    rows = emit.op("Gather", WEIGHT, asked, axis=0)
    shift = emit.op("Reshape", emit.op("Gather", BIAS, asked, axis=0), [0, 0, 1])
    maps = emit.op("Add", emit.op("MatMul", rows, _places(emit, tap)), shift)
    emit.named(OUTPUT, emit.op("Reshape", maps, [0, 0, *tap.grid]))
    graph.node.extend(emit.nodes)
    graph.initializer.extend(
        [
            *emit.constants,
            numpy_helper.from_array(weight.astype(np.float32), WEIGHT),
            numpy_helper.from_array(bias.astype(np.float32), BIAS),
            numpy_helper.from_array(np.full((1, 1), -1, np.int64), CLASSES),
        ]
    )
    if (
        proto.ir_version < LEAST_IR
    ):  # before, every weight had to stand among the inputs; here an input may have a default
        proto.ir_version = LEAST_IR
    graph.input.append(helper.make_tensor_value_info(CLASSES, TensorProto.INT64, ["asked rows", "asked"]))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", "asked", *tap.grid]))
    told = {METADATA_KEY: {**spec.to_json(), "target_layer": tap.name}, ATTENTION_KEY: {**about, "layer": tap.name}}
    kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key not in told]
    del proto.metadata_props[:]
    helper.set_model_props(proto, dict(kept) | {key: json.dumps(value) for key, value in told.items()})
    return proto


def _places(emit: Emitter, tap: Tap) -> str:
    """The tapped value as float (rows, channels, places)."""
    value, (h, w) = emit.op("Cast", tap.name, to=TensorProto.FLOAT), tap.grid
    if tap.layout == "nchw":
        return emit.op("Reshape", value, [0, tap.channels, h * w])
    if tap.layout == "nhwc":
        value = emit.op("Reshape", value, [0, h * w, tap.channels])
    else:
        places = np.arange(tap.prefix, tap.prefix + h * w, dtype=np.int64)
        value = emit.op("Gather", value, places, axis=tap.layout.index("t"))
    return value if tap.layout == "nct" else emit.op("Transpose", value, perm=[0, 2, 1])


def read_about(model: ModelFile) -> dict[str, Any] | None:
    """How a file's attention was made; None where it has none.

    Raises:
        ModelError: the metadata can't be read.
    """
    text = next((entry.value for entry in model.proto.metadata_props if entry.key == ATTENTION_KEY), None)
    if text is None:
        return None
    try:
        about: dict[str, Any] = json.loads(text)
        about["untrained"] = [int(found) for found in about["untrained"]]
        about["layer"] = str(about["layer"])
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{model.path}: its metadata {ATTENTION_KEY} is damaged; train it again") from None
    return about


def read_attention(model: ModelFile, tap: Tap | None) -> Attention | str:
    """A file's attention on the layer that is read, or the reason why there is none.

    Raises:
        ModelError: it is damaged.
    """
    about = read_about(model)
    if about is None:
        return ABSENT
    if tap is None or tap.name != about["layer"]:
        return f"its attention reads layer {about['layer']!r}; leave --layer out"
    tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer if tensor.name in (WEIGHT, BIAS)}
    arrays = []
    for name in (WEIGHT, BIAS):
        if name not in tensors:
            raise ModelError(f"{model.path}: its attention has no {name!r}; train it again")
        tensor = onnx.TensorProto()
        tensor.CopyFrom(tensors[name])
        read_external(tensor, model)
        arrays.append(numpy_helper.to_array(tensor))
    weight, bias = arrays
    if weight.ndim != 2 or weight.shape[1] != tap.channels or bias.shape != weight.shape[:1]:
        raise ModelError(f"{model.path}: its attention has weights {weight.shape} for {tap.channels} channels")
    if weight.dtype != np.float32 or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ModelError(f"{model.path}: its attention has weights that are not finite float32; train it again")
    if model.classes is not None and len(weight) != model.classes:
        raise ModelError(f"{model.path}: its attention has {len(weight)} classes, the model {model.classes}")
    return Attention(weight, bias, tap.name, frozenset(about["untrained"]))

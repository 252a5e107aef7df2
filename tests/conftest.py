"""A small real classifier as an ONNX file, photographs beside it, and the shared data where it is present."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.emulator import emulated

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZE = (33, 29)
CLASSES = 5
LABELS = ["ant", "bee", "cat", "great white", "emu"]


def classifier(
    *,
    size: tuple[int, int] = SIZE,
    batch: int | str = "N",
    end: str | None = None,
    head: str = "Gemm",
    dtype: int = TensorProto.FLOAT,
    layout: str = "NCHW",
    seed: int = 0,
    body: str = "plain",
) -> onnx.ModelProto:
    """conv-relu twice, global pooling, a linear layer. Of the 12 tapped maps `features`, 3 is dead, 5 equals 4 and
    6 is constant.

    Args:
        head: "Reshape" and "Tanh" lie between pooling and the linear layer; "Dense" is two dense layers without
            pooling; "Tokens" bends `tokens` (n, t, c) before they are averaged.
        body: "pool" has a max pool in the place of the second stride, "sum" a residual sum before the last ReLU, "norm"
            normalisation behind each convolution.
    """
    rng = np.random.default_rng(seed)

    def tensor(name: str, values: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(values.astype(np.float32), name)

    first = rng.normal(size=(8, 3, 3, 3)) * 0.4
    second = rng.normal(size=(12, 8, 3, 3)) * 0.3
    shift = rng.normal(size=12) * 0.1
    second[3], shift[3] = 0, -1
    second[5], shift[5] = second[4], shift[4]
    second[6], shift[6] = 0, 0.7
    linear = rng.normal(size=(CLASSES, 12)) * 3
    weights = [
        tensor("w1", first),
        tensor("b1", rng.normal(size=8) * 0.1),
        tensor("w2", second),
        tensor("b2", shift),
        tensor("w3", linear),
        tensor("b3", rng.normal(size=CLASSES)),
    ]
    grid = tuple(-(-n // 4) for n in size)
    more = {
        "ws": rng.normal(size=(12, 8, 1, 1)) * 0.4,
        "w4": rng.normal(size=(12, 12 * grid[0] * grid[1])) * 0.3,
        "b4": rng.normal(size=12) * 0.1,
    }
    for number, channels in ((1, 8), (2, 12)):
        more |= {
            f"scale{number}": rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1], channels),
            f"shift{number}": rng.normal(size=channels) * 0.3,
            f"mean{number}": rng.normal(size=channels) * 0.3,
            f"variance{number}": rng.uniform(0.5, 2, channels),
        }
    nodes = []
    value = "input"
    if dtype == TensorProto.UINT8:
        weights += [tensor("scale", np.array(64.0)), tensor("middle", np.array(2.0))]
        nodes += [
            helper.make_node("Cast", [value], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["as_float", "scale"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "middle"], ["centred"]),
        ]
        value = "centred"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [value], ["first"], perm=[0, 3, 1, 2]))
        value = "first"
    pads = [1, 1, 1, 1]
    nodes.append(helper.make_node("Conv", [value, "w1", "b1"], ["c1"], name="conv1", strides=[2, 2], pads=pads))
    nodes += _normalised(1, body)
    nodes.append(helper.make_node("Relu", ["n1" if body == "norm" else "c1"], ["r1"], name="relu1"))
    if body == "pool":
        nodes.append(helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[3, 3], strides=[2, 2], pads=pads))
        nodes.append(helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], name="conv2", pads=pads))
    else:
        nodes.append(helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", strides=[2, 2], pads=pads))
    if body == "sum":
        nodes.append(helper.make_node("Conv", ["r1", "ws"], ["skip"], name="skip", strides=[2, 2]))
        nodes.append(helper.make_node("Add", ["c2", "skip"], ["whole"], name="sum"))
    nodes += _normalised(2, body)
    before = {"norm": "n2", "sum": "whole"}.get(body, "c2")
    nodes.append(helper.make_node("Relu", [before], ["features"], name="relu2"))
    if head == "Reshape":
        weights.append(numpy_helper.from_array(np.array([batch if isinstance(batch, int) else 0, 12]), "flat_shape"))
        nodes.append(helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"))
        nodes.append(helper.make_node("Reshape", ["pooled", "flat_shape"], ["flat"]))
    elif head == "Tanh":
        nodes.append(helper.make_node("GlobalAveragePool", ["features"], ["pool"], name="pool"))
        nodes.append(helper.make_node("Tanh", ["pool"], ["bent"], name="bend"))
        nodes.append(helper.make_node("Flatten", ["bent"], ["flat"]))
    elif head == "Dense":
        nodes.append(helper.make_node("Flatten", ["features"], ["long"]))
        nodes.append(helper.make_node("Gemm", ["long", "w4", "b4"], ["hidden"], name="hidden", transB=1))
        nodes.append(helper.make_node("Relu", ["hidden"], ["flat"], name="relu3"))
    elif head == "Tokens":
        weights.append(numpy_helper.from_array(np.array([0, 12, -1]), "rows_of_tokens"))
        nodes.append(helper.make_node("Reshape", ["features", "rows_of_tokens"], ["rows"]))
        nodes.append(helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]))
        nodes.append(helper.make_node("Tanh", ["tokens"], ["bent"], name="bend"))
        nodes.append(helper.make_node("ReduceMean", ["bent"], ["flat"], axes=[1], keepdims=0))
    else:
        nodes.append(helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], name="classifier", transB=1))
    used = {name for node in nodes for name in node.input}
    weights += [tensor(name, values) for name, values in more.items() if name in used]
    output = "logits"
    if end:
        axis = {"axis": 1} if end == "Softmax" else {}
        nodes.append(helper.make_node(end, ["logits"], ["scores"], name="end", **axis))
        output = "scores"
    shape = [batch, 3, *size] if layout == "NCHW" else [batch, *size, 3]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _normalised(number: int, body: str) -> list[onnx.NodeProto]:
    if body != "norm":
        return []
    inputs = [f"c{number}", *(f"{name}{number}" for name in ("scale", "shift", "mean", "variance"))]
    return [helper.make_node("BatchNormalization", inputs, [f"n{number}"], name=f"norm{number}")]


SPEC = {
    "input_size": [3, *SIZE],
    "mean": [0.5, 0.45, 0.4],
    "std": [0.25, 0.2, 0.3],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "output": "logits",
    "label_names": LABELS,
}


def _save_model(path: Path, spec: dict | None = None, **options) -> Path:
    onnx.save(classifier(**options), path)
    spec = {"input_size": [3, *options.get("size", SIZE)], **(spec or {})}
    kind = {"Softmax": "probabilities", "Sigmoid": "sigmoid"}.get(options.get("end") or "", "logits")
    path.with_suffix(".json").write_text(json.dumps({**SPEC, "output": kind, **spec}))
    return path


def _save_photographs(folder: Path, count: int = 6) -> Path:
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(7)
    for i in range(count):
        h, w = rng.integers(40, 60, 2)
        y, x = np.mgrid[:h, :w] / 40
        field = np.stack(
            [np.sin(y * rng.uniform(1, 5) + phase) * np.cos(x * rng.uniform(1, 5)) for phase in range(3)], -1
        )
        blob = np.exp(-((y - rng.uniform(0.2, 1)) ** 2 + (x - rng.uniform(0.2, 1)) ** 2) / 0.05)[..., None]
        pixels = ((field * 0.4 + 0.5 + 0.5 * blob).clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("sub" if i % 2 else "") / f"photo{i}.png")
    return folder


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """save_model(path, spec={...}, **options of `classifier`) -> path, with its spec beside it."""
    return _save_model


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(spec={...}, **options of `classifier`) -> path of an ONNX file with its spec beside it."""

    def make(name: str = "model.onnx", spec: dict | None = None, **options) -> Path:
        return _save_model(tmp_path / name, spec, **options)

    return make


@pytest.fixture(scope="session")
def save_photographs() -> Callable[..., Path]:
    """save_photographs(folder, count=6) -> folder of small pictures: smooth colour fields with a bright blob, 40 to
    60 pixels a side; every second one stands in `sub`."""
    return _save_photographs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of six pictures of `save_photographs`."""
    return _save_photographs(tmp_path / "photographs")


@pytest.fixture(scope="session")
def _emulator() -> Path:
    if why := emulated.missing():
        pytest.skip(f"no emulator of the kernels: {why}")
    return emulated.build(sanitize=bool(os.environ.get("HEATMILL_SANITIZE")))


@pytest.fixture
def emulated_driver(_emulator: Path) -> emulated.EmulatedDriver:
    """A device in host memory; kernels run when their stream is waited for. See tests/emulator."""
    sanitized = bool(os.environ.get("HEATMILL_SANITIZE"))
    return emulated.EmulatedDriver(library=_emulator, guard=0 if sanitized else emulated.GUARD)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and photographs; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not beside the checkout")
    return SHARED

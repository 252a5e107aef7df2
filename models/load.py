"""Open, validate, bound and describe an ONNX classifier file. Knows no runtime."""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from .. import ModelError

OPSETS = (7, onnx.defs.onnx_opset_version())
IR_VERSIONS = (3, onnx.IR_VERSION)
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
INPUT_DTYPES = ("float32", "float16", "uint8")
SCORE_DTYPES = ("float32", "float16", "float64")
MAX_FILE_BYTES = 2**31 - 1
MAX_INPUT_VALUES = 2**28
MAX_RANK = 64

Shape = tuple[int | None, ...]

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model; run git lfs pull"),
    (0, b"PK\x03\x04", "a zip archive, as PyTorch writes; export the model to ONNX first"),
    *((0, bytes([0x80, n]), "a pickle, as PyTorch writes; export the model to ONNX first") for n in range(1, 6)),
    (0, b"\x89HDF", "a Keras HDF5 file; convert it to ONNX first"),
    (4, b"TFL3", "a TensorFlow Lite file; convert it to ONNX first"),
    (4, b"ORTM", "an ONNX Runtime .ort file; give the .onnx file it was made from"),
    (0, b"ftrt", "a TensorRT engine; give the .onnx file it was built from"),
    (8, b'{"', "a safetensors file; export the model to ONNX first"),
    (0, b"\x08\x01\x12", "a TensorFlow SavedModel; convert it to ONNX first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"\xff\xd8\xff", "a JPEG image; the model comes before the images"),
    (0, b"\x89PNG", "a PNG image; the model comes before the images"),
    (0, b"<", "a web page or XML; download the model file itself"),
    (0, b"{", "JSON; give the .onnx file"),
)
_BITS = {
    "COMPLEX128": 128,
    **dict.fromkeys(("INT64", "UINT64", "DOUBLE", "COMPLEX64", "STRING"), 64),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
}
_VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")

_SAME_VALUES = frozenset(
    ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "QuantizeLinear", "DequantizeLinear")
)
_PIXELWISE = frozenset(
    ("Identity", "Cast", "Add", "Sub", "Mul", "Div", "Clip", "Pad", "QuantizeLinear", "DequantizeLinear")
)
_KINDS = {
    "Softmax": "probabilities",
    "QLinearSoftmax": "probabilities",
    "Sigmoid": "sigmoid",
    "QLinearSigmoid": "sigmoid",
}
_QUANTISED = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QGemm")
)


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The one image input of a classifier; a size that the file leaves open is None."""

    name: str
    layout: str
    dtype: str
    batch: int | None
    channels: int
    height: int | None
    width: int | None


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A validated classifier file.

    `path` is absolute, links unresolved. `proto` has no external data loaded. `sha256` is that of the file;
    with external data, that of the file's digest followed by each data file's location (UTF-8, closed by a
    zero byte) and digest, in the order of the locations. `output_kind` is what the graph's last operator
    says: probabilities (Softmax over the classes), sigmoid, or else logits.
    """

    path: Path
    sha256: str
    proto: onnx.ModelProto
    input: ImageInput
    output: str
    classes: int | None
    output_kind: str
    quantised: bool
    opset: int


def open_model(path: Path, *, scores: str | None = None) -> ModelFile:
    """Read and check a classifier; `scores` names its score output where several could be it.

    Raises:
        ModelError: the file is missing, not ONNX, damaged, reaches outside its folder, needs operators
            that are not known here, or is not an image classifier.
    """
    path = Path(path).absolute()
    with _refusals(path):
        return _open(path, scores)


def strip_weights(proto: onnx.ModelProto, keep_bytes: int = 1024) -> onnx.ModelProto:
    """A copy whose tensors over `keep_bytes`, and all external ones, keep name, type and dims but no data."""
    slim = onnx.ModelProto()
    _copy(proto, slim, skip=("graph", "training_info"))
    _strip_graph(proto.graph, slim.graph, keep_bytes)
    return slim


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Every failure in here becomes a one-line ModelError that names the file."""
    try:
        yield
    except ModelError as err:
        raise ModelError(f"{path}: {str(err)[:600]}") from None
    except OSError as err:
        raise ModelError(f"{path}: {err.strerror or err}; check the path and its permissions") from None
    except MemoryError:
        raise ModelError(f"{path}: not enough memory to read the model") from None
    except (DecodeError, InferenceError, ValueError, TypeError, LookupError, OverflowError, RuntimeError) as err:
        raise ModelError(f"{path}: damaged ONNX file ({_line(err)}); export it again") from None


def inline_external_data(proto: onnx.ModelProto, model: ModelFile) -> None:
    """Read external weights into a graph made from `model`, in place: a changed graph no longer lies beside its data.

    Raises:
        ModelError: a data file is gone, or the graph with its weights exceeds protobuf's 2 GiB.
    """
    total = 0
    for graph in _graphs(proto.graph):
        for tensor in (*graph.initializer, *_attribute_tensors(graph)):
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            total += (_tensor_bits(tensor) + 7) // 8
            if total > MAX_FILE_BYTES:
                raise ModelError(f"{model.path}: has more than 2 GiB of weights, which one graph can't hold")
            read_external(tensor, model)


def read_external(tensor: onnx.TensorProto, model: ModelFile) -> None:
    """Give a tensor of `model` its bytes, where they lie in a data file, in place.

    Raises:
        ModelError: the data file is gone.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        with data_file(model.path, entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            tensor.raw_data = file.read((_tensor_bits(tensor) + 7) // 8)
    except (ModelError, OSError) as err:
        raise ModelError(f"{model.path}: {err}") from None
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _open(path: Path, scores: str | None) -> ModelFile:
    data = _read(path)
    digest = hashlib.sha256(data)
    proto = _parse(data)
    del data
    opset = _check_versions(proto)
    graphs = list(_graphs(proto.graph))
    files = _check_tensors(path, graphs)
    _check_operators(graphs)
    skeleton = strip_weights(proto)
    _check_structure(skeleton)
    image = _image_input(skeleton.graph)
    shapes = _infer_shapes(skeleton, image)
    output, classes = _score_output(skeleton.graph, shapes, image.batch, scores)
    if files:
        whole = hashlib.sha256(digest.digest())
        for location in sorted(files):
            with files[location].open("rb") as file:
                whole.update(location.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        digest = whole
    operators = {node.op_type for graph in graphs for node in graph.node}
    return ModelFile(
        path=path,
        sha256=digest.hexdigest(),
        proto=proto,
        input=image,
        output=output,
        classes=classes,
        output_kind=_output_kind(skeleton.graph, output, classes, shapes, opset),
        quantised=any(name in _QUANTISED or name.startswith("QLinear") for name in operators),
        opset=opset,
    )


def _read(path: Path) -> bytes:
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise ModelError("is a folder; give the .onnx file in it")
    if not stat.S_ISREG(info.st_mode):
        raise ModelError("is not a regular file; give an .onnx file")
    if info.st_size == 0:
        raise ModelError("is empty; download or export it again")
    if info.st_size > MAX_FILE_BYTES:
        raise ModelError(
            f"has {info.st_size / 2**30:.1f} GiB, over protobuf's limit of 2 GiB; export it with external data"
        )
    with path.open("rb") as file:
        return file.read(info.st_size)


def _parse(data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        if proto.HasField("graph") and proto.ir_version:
            return proto
    except DecodeError:
        pass
    head = data[:512]
    for offset, magic, words in _MAGIC:
        if (head if offset else head.lstrip())[offset:].startswith(magic):
            raise ModelError(f"is not ONNX, it looks like {words}")
    if head[:2] in {bytes((8, version)) for version in range(IR_VERSIONS[0], IR_VERSIONS[1] + 1)}:
        raise ModelError("is a truncated or damaged ONNX file; download or export it again")
    looks = ", it looks like plain text" if head.isascii() and min(head) >= 9 else ""
    raise ModelError(f"is not ONNX{looks}; give an .onnx file")


def _check_versions(proto: onnx.ModelProto) -> int:
    if not IR_VERSIONS[0] <= proto.ir_version <= IR_VERSIONS[1]:
        raise ModelError(
            f"has IR version {proto.ir_version}; {IR_VERSIONS[0]} to {IR_VERSIONS[1]} are read by onnx "
            f"{onnx.__version__}; export it again, or update onnx"
        )
    if not proto.graph.node:
        raise ModelError("holds a graph without nodes; export it again")
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise ModelError("names no ONNX opset, or several; export it again")
    if not OPSETS[0] <= versions[0] <= OPSETS[1]:
        raise ModelError(
            f"has opset {versions[0]}; {OPSETS[0]} to {OPSETS[1]} are supported with onnx {onnx.__version__}; "
            "export it again with another opset"
        )
    if proto.functions:
        function = proto.functions[0]
        raise ModelError(
            f"holds model-local functions ({_name(function.domain + '::' + function.name)}); inline them first "
            "with onnx.inliner.inline_local_functions"
        )
    return int(versions[0])


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _check_tensors(path: Path, graphs: list[onnx.GraphProto]) -> dict[str, Path]:
    """Bound every stored tensor by the bytes that stand behind it; the external files by location."""
    files: dict[str, Path] = {}
    claimed = 0
    for graph in graphs:
        if graph.sparse_initializer:
            raise ModelError("holds sparse weights, which are not supported; export it with dense ones")
        for tensor in (*graph.initializer, *_attribute_tensors(graph)):
            claimed += _check_tensor(path, tensor, files)
    held = sum(file.stat().st_size for file in set(files.values()))
    if claimed > held:
        raise ModelError(f"claims {claimed} bytes of external weights, its data files hold {held}; export it again")
    return files


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ModelError(f"node {_name(node.name)} holds a sparse tensor, which is not supported")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _tensor_bits(tensor: onnx.TensorProto) -> int:
    """Bits of a tensor as its dims declare them, packed."""
    known = tensor.data_type in onnx.TensorProto.DataType.values()
    kind = onnx.TensorProto.DataType.Name(tensor.data_type) if known else ""
    if kind not in _BITS:
        raise ModelError(f"tensor {_name(tensor.name)} has the unknown element type {tensor.data_type}")
    if len(tensor.dims) > MAX_RANK or any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {_name(tensor.name)} has impossible dims {list(tensor.dims[:8])}; export it again")
    return int(math.prod(tensor.dims) * _BITS[kind])


def _check_tensor(path: Path, tensor: onnx.TensorProto, files: dict[str, Path]) -> int:
    size = (_tensor_bits(tensor) + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_range(path, tensor, size, files)
        return size
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        wanted, stored = size, len(tensor.raw_data)
    else:
        parts = 2 if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128) else 1
        wanted = min(size, count * parts)
        stored = sum(len(getattr(tensor, name)) for name in _VALUES)
    if stored != wanted:
        raise ModelError(
            f"tensor {_name(tensor.name)} with dims {list(tensor.dims)} stores {stored} values or bytes where "
            f"{wanted} belong; the file is damaged, export it again"
        )
    return 0


def _check_range(path: Path, tensor: onnx.TensorProto, size: int, files: dict[str, Path]) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in files:
        files[location] = data_file(path, location)
    numbers = {}
    for key, default in (("offset", 0), ("length", size)):
        text = entries.get(key, str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise ModelError(f"tensor {_name(tensor.name)} has the external {key} {_name(text)}, not a byte count")
        numbers[key] = int(text)
    if numbers["length"] != size:
        raise ModelError(
            f"tensor {_name(tensor.name)} with dims {list(tensor.dims)} has {size} bytes, its external length is "
            f"{numbers['length']}; export it again"
        )
    held = files[location].stat().st_size
    if numbers["offset"] + size > held:
        raise ModelError(
            f"tensor {_name(tensor.name)} ends at byte {numbers['offset'] + size} of {_name(location)}, which has "
            f"{held}; download or export the data file again"
        )


def data_file(path: Path, location: str) -> Path:
    """The external data file at `location`, by ONNX Runtime's rule.

    It stands inside the model's folder or inside the folder of the model's real path: a download cache
    links both files into one folder of blobs.

    Raises:
        ModelError: it stands elsewhere, is missing, or is not a regular file.
    """
    if not location or PureWindowsPath(location).anchor:
        raise ModelError(f"names the external data {_name(location)}; it must be a path inside the model's folder")
    real = (path.parent / location).resolve()
    if not any(real.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise ModelError(f"names the external data {_name(location)} outside the model's folder; move it inside")
    try:
        info = real.stat()
    except FileNotFoundError:
        raise ModelError(f"needs its external data {_name(location)}, which is missing; put it beside it") from None
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"names the external data {_name(location)}, which is not a regular file")
    return real


def _check_operators(graphs: list[onnx.GraphProto]) -> None:
    for graph in graphs:
        for node in graph.node:
            if node.domain not in DOMAINS:
                raise ModelError(
                    f"node {_name(node.name)} is the custom operator {_name(node.domain + '::' + node.op_type)}; "
                    f"export without it (known domains: {', '.join(DOMAINS[1:])})"
                )


def _check_structure(skeleton: onnx.ModelProto) -> None:
    """Operators, attributes and order of nodes, by ONNX's checker.

    It is stricter than ONNX Runtime about what exporters leave out: shapes of outputs, and in IR version 3
    the initializers among the inputs.
    """
    hollow = strip_weights(skeleton, keep_bytes=0)
    hollow.ir_version = max(4, hollow.ir_version)
    for graph in _graphs(hollow.graph):
        for tensor in (*graph.initializer, *_attribute_tensors(graph)):
            tensor.dims[:] = [0]
        for value in (*graph.input, *graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(hollow)
    except ValidationError as err:
        raise ModelError(f"is not valid ONNX: {_line(err)}; export it again") from None


def _image_input(graph: onnx.GraphProto) -> ImageInput:
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(_name(value.name) for value in inputs[:8]) or "none"
        raise ModelError(f"is not an image classifier: it has {len(inputs)} inputs ({names}); export it with one image")
    name, shape, dtype = inputs[0].name, _shape(inputs[0]), _dtype(inputs[0])
    seen = f"input {_name(name)} is {dtype} {_show(inputs[0])}"
    if shape is None or len(shape) != 4:
        raise ModelError(
            f"{seen}; an image input is (batch, channels, height, width) or (batch, height, width, channels)"
        )
    if dtype not in INPUT_DTYPES:
        raise ModelError(f"{seen}; export it with one of {', '.join(INPUT_DTYPES)}")
    layouts = [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] in (1, 3)]
    if len(layouts) == 1:
        layout, channels = layouts[0], shape[1 if layouts[0] == "NCHW" else 3]
    else:
        layout, channels = _first_convolution(graph, name)
    batch, *rest = shape
    fixed, height, width = rest if layout == "NCHW" else (rest[2], *rest[:2])
    if channels not in (1, 3) or fixed not in (None, channels):
        raise ModelError(f"{seen}: which axis holds 1 or 3 channels is not clear; export it with a fixed channel axis")
    if math.prod(size or 1 for size in shape) > MAX_INPUT_VALUES:
        raise ModelError(f"{seen}, larger than any image; export it again")
    return ImageInput(name, layout, dtype, batch, channels, height, width)


def _first_convolution(graph: onnx.GraphProto, image: str) -> tuple[str, int | None]:
    """Layout and channels of an image whose own shape leaves them open, from the first convolution it reaches."""
    kernels: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    orders: dict[str, tuple[int, ...]] = {image: (0, 1, 2, 3)}
    layouts: dict[tuple[int, ...], str] = {(0, 1, 2, 3): "NCHW", (0, 3, 1, 2): "NHWC"}
    for node in graph.node:
        source = next((name for name in node.input if name in orders), None)
        if node.op_type == "Constant":
            kernels |= {name: tuple(a.t.dims) for a in node.attribute for name in node.output if a.name == "value"}
        elif source is None and node.op_type in _PIXELWISE and node.input[0] in kernels:
            kernels[node.output[0]] = kernels[node.input[0]]
        elif source is not None and node.op_type in _PIXELWISE:
            orders[node.output[0]] = orders[source]
        elif source is not None and node.op_type == "Transpose":
            perm = attribute(node, "perm", (3, 2, 1, 0))
            orders[node.output[0]] = tuple(orders[source][axis] for axis in perm)
        elif source is not None and node.op_type in ("Conv", "QLinearConv"):
            kernel = kernels.get(node.input[1 if node.op_type == "Conv" else 3], ())
            if len(kernel) == 4 and orders[source] in layouts:
                return layouts[orders[source]], kernel[1] * attribute(node, "group", 1)
            break
    return "NCHW", None


def _infer_shapes(skeleton: onnx.ModelProto, image: ImageInput) -> dict[str, Shape]:
    """What ONNX's shape inference says, for a batch of one and 224 pixels where the file leaves a size open.

    Data propagation stays off: a few dozen Concat nodes of a hostile file would fill the memory.
    """
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    graph = model.graph
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    channels, height, width = image.channels, image.height or 224, image.width or 224
    sizes = (channels, height, width) if image.layout == "NCHW" else (height, width, channels)
    for value in graph.input:
        if value.name == image.name:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, (image.batch or 1, *sizes), strict=True):
                dim.dim_value = size
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: shape for value in values if (shape := _shape(value)) is not None}


def _score_output(
    graph: onnx.GraphProto, shapes: dict[str, Shape], batch: int | None, scores: str | None
) -> tuple[str, int | None]:
    """Name and number of classes of the one output of shape (batch, classes)."""
    outputs = {value.name: value for value in graph.output}
    listed = ", ".join(
        f"{_name(name)} {_dtype(value)} {_show(value, shapes.get(name))}" for name, value in list(outputs.items())[:8]
    )
    found: dict[str, int | None] = {}
    for name, value in outputs.items():
        shape = shapes.get(name) or _shape(value)
        declared = _shape(value) or ()
        if shape is None or len(shape) != 2 or _dtype(value) not in SCORE_DTYPES:
            continue
        if shape[0] in (None, batch or 1):
            found[name] = shape[1] or (declared[1] if len(declared) == 2 else None)
    if scores is not None:
        found = {name: classes for name, classes in found.items() if name == scores}
        if not found:
            raise ModelError(f"has no score output {_name(scores)} of shape (batch, classes); it has {listed}")
    if not found:
        raise ModelError(
            "is not a classifier: no output has the shape (batch, classes); where one holds class scores, export it "
            f"with a Flatten behind: {listed}"
        )
    if len(found) > 1:
        raise ModelError(f"has several outputs of shape (batch, classes); name one with --scores NAME: {listed}")
    return next(iter(found.items()))


def _output_kind(graph: onnx.GraphProto, output: str, classes: int | None, shapes: dict[str, Shape], opset: int) -> str:
    producers = {name: node for node in graph.node for name in node.output if name}
    node = producers.get(output)
    while node is not None and node.op_type in _SAME_VALUES:
        node = producers.get(node.input[0])
    kind = "logits" if node is None else _KINDS.get(node.op_type, "logits")
    if node is None or kind != "probabilities":
        return kind
    shape = shapes.get(node.input[0], (None, None))
    axis = attribute(node, "axis", 1 if opset < 13 else -1)
    axis += len(shape) if axis < 0 else 0
    if opset < 13 and node.op_type == "Softmax":  # over all axes from this one on
        return kind if axis == 1 else "logits"
    over_classes = 0 < axis < len(shape) and (classes is None or shape[axis] in (None, classes))
    return kind if over_classes else "logits"


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """A node's attribute as a Python value."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    if kind not in onnx.TensorProto.DataType.values() or not kind:
        return "not a tensor"
    name: str = onnx.TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _show(value: onnx.ValueInfoProto, shape: Shape | None = None) -> str:
    if not value.type.tensor_type.HasField("shape"):
        dims = ["of unknown rank"] if shape is None else [str(size or "?") for size in shape]
    else:
        dims = [
            str(d.dim_value) if d.HasField("dim_value") else _name(d.dim_param)[1:-1] or "?"
            for d in value.type.tensor_type.shape.dim
        ]
    return f"({', '.join(dims[:8])})"


def _strip_graph(source: onnx.GraphProto, target: onnx.GraphProto, keep_bytes: int) -> None:
    _copy(source, target, skip=("node", "initializer"))
    for tensor in source.initializer:
        _strip_tensor(tensor, target.initializer.add(), keep_bytes)
    for node in source.node:
        copied = target.node.add()
        _copy(node, copied, skip=("attribute",))
        for attribute in node.attribute:
            _strip_attribute(attribute, copied.attribute.add(), keep_bytes)


def _strip_attribute(source: onnx.AttributeProto, target: onnx.AttributeProto, keep_bytes: int) -> None:
    _copy(source, target, skip=("t", "tensors", "g", "graphs"))
    if source.HasField("t"):
        _strip_tensor(source.t, target.t, keep_bytes)
    if source.HasField("g"):
        _strip_graph(source.g, target.g, keep_bytes)
    for tensor in source.tensors:
        _strip_tensor(tensor, target.tensors.add(), keep_bytes)
    for graph in source.graphs:
        _strip_graph(graph, target.graphs.add(), keep_bytes)


def _strip_tensor(source: onnx.TensorProto, target: onnx.TensorProto, keep_bytes: int) -> None:
    external = source.data_location == onnx.TensorProto.EXTERNAL
    if external or _tensor_bits(source) > 8 * keep_bytes:
        target.name, target.data_type = source.name, source.data_type
        target.dims.extend(source.dims)
    else:
        target.CopyFrom(source)


def _copy(source: Message, target: Message, skip: tuple[str, ...]) -> None:
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _name(text: str) -> str:
    """A name from a file, fit to print: quoted, escaped and short."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _line(err: BaseException) -> str:
    text = " ".join(str(err).split())[:240]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

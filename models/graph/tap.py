"""Taps: which inner values of a classifier are feature maps, and how their axes lie.

Every value gets a letter per axis by one forward walk from the image: `n` batch, `c` channels, `h` and `w` the
spatial grid, `t` the grid flattened to tokens. Operators that keep the shape keep the letters; the others have a row
in `AXES`. A residual sum restores what an attention block loses, so no table of architectures is needed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ... import ModelError
from ..load import ModelFile, attribute, strip_weights

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """The letters of a value's axes, the grid behind `t`, and how many tokens stand before the grid."""

    letters: str
    grid: tuple[int, int]
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Tap:
    """An inner value read as a feature map of `channels` maps on a `grid` (height, width)."""

    name: str
    layout: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0

    def to_nchw(self, values: Array) -> Array:
        """The tapped values as (n, channels, height, width) float32.

        Args:
            values: as the graph gives them: (n, c, h, w), (n, h, w, c), (n, t, c) or (n, c, t).
        """
        n, (h, w) = len(values), self.grid
        if self.layout == "nhwc":
            values = values.transpose(0, 3, 1, 2)
        elif self.layout == "ntc":
            values = values[:, self.prefix : self.prefix + h * w].transpose(0, 2, 1)
        elif self.layout == "nct":
            values = values[:, :, self.prefix : self.prefix + h * w]
        return np.ascontiguousarray(values, dtype=np.float32).reshape(n, self.channels, h, w)

    def from_nchw(self, maps: Array, tokens: int) -> Array:
        """Maps (n, channels, height, width) as the graph holds them; of `tokens` in all, those of no place get 0."""
        n, (h, w) = len(maps), self.grid
        if self.layout == "nchw":
            return maps
        if self.layout == "nhwc":
            return maps.transpose(0, 2, 3, 1)
        whole = np.zeros((n, self.channels, tokens), maps.dtype)
        whole[:, :, self.prefix : self.prefix + h * w] = maps.reshape(n, self.channels, h * w)
        return whole if self.layout == "nct" else whole.transpose(0, 2, 1)


MAX_CONSTANT = 4096

AxisRule = Callable[["Reading", onnx.NodeProto, Shape], Axes | None]


class Reading:
    """A classifier's graph with the shape and axes of every value, at the file's batch size or 1.

    Args:
        model: the opened file.
        size: (height, width) of the input, used where the file leaves them open.
    """

    def __init__(self, model: ModelFile, size: tuple[int, int]) -> None:
        self.model = model
        skeleton = strip_weights(model.proto)
        set_input(skeleton, model, batch=model.input.batch or 1, size=size)
        self.graph = skeleton.graph
        self.producer = {name: node for node in self.graph.node for name in node.output if name}
        known = Shapes(skeleton)
        self.shapes, self.constants = known.shapes, known.constants
        self.half = known.computes_in(TensorProto.FLOAT16, self.graph)
        h, w = size
        self.axes: dict[str, Axes] = {model.input.name: Axes(model.input.layout.lower(), (h, w))}
        self._from_image = {model.input.name}
        for node in self.graph.node:
            if self._from_image.intersection(node.input):
                self._from_image.update(node.output)
                self._read(node)

    def _read(self, node: onnx.NodeProto) -> None:
        if node.op_type in CHANNELS_FIRST and node.input[0] in self._from_image and node.input[0] not in self.axes:
            shape = self.shapes.get(node.input[0], ())
            if len(shape) == 4:
                self.axes[node.input[0]] = Axes("nchw", (shape[2], shape[3]))
        for output in node.output:
            shape = self.shapes.get(output, ())
            axes = AXES.get(node.op_type, same_shape)(self, node, shape) if shape else None
            if axes is not None:
                self.axes[output] = axes

    def ints(self, name: str) -> list[int] | None:
        """The integers of a constant, None where the value is computed."""
        value = self.constants.get(name)
        return None if value is None else [int(number) for number in value.ravel()]

    def tap(self, name: str) -> Tap | None:
        """The value as a feature map, or None where it is not one (no grid of at least 2 x 2)."""
        axes, shape = self.axes.get(name), self.shapes.get(name)
        if axes is None or shape is None or name == self.model.input.name or axes.letters not in LAYOUTS:
            return None
        letters = axes.letters
        grid = axes.grid if "t" in letters else (shape[letters.index("h")], shape[letters.index("w")])
        if min(grid) < 2:
            return None
        return Tap(name, letters, shape[letters.index("c")], grid, axes.prefix)

    def taps(self) -> list[Tap]:
        """Every feature map that the scores depend on, in the graph's order."""
        return list(self._taps)

    @cached_property
    def _taps(self) -> tuple[Tap, ...]:
        found = (self.tap(name) for node in self.graph.node for name in node.output if name in self._needed)
        return tuple(tap for tap in found if tap is not None)

    @cached_property
    def _needed(self) -> set[str]:
        """Every value that the scores depend on."""
        return ancestors([self.model.output], self.producer)

    @cached_property
    def waists(self) -> frozenset[str]:
        """The values that every path from the image to the scores passes."""
        nodes = [node for node in self.graph.node if self._needed.intersection(node.output) and node.op_type != "Shape"]
        last = {name: i for i, node in enumerate(nodes) for name in node.input if name in self._from_image}
        found, live = set(), {self.model.input.name}
        for i, node in enumerate(nodes):
            if self._from_image.isdisjoint(node.input):
                continue
            live = {name for name in live if last.get(name, -1) > i}
            live |= {name for name in node.output if last.get(name, -1) > i or name == self.model.output}
            if len(live) == 1:
                found |= live
        return frozenset(found)

    def candidates(self) -> list[Tap]:
        """The last feature map of every grid size, and the automatic choice: what a user would choose from."""
        last = {(tap.layout in ("ntc", "nct"), tap.grid): tap for tap in self.taps()}
        names = {tap.name for tap in last.values()}
        chosen = self.automatic()
        if chosen is not None:
            names.add(chosen.name)
        return [tap for tap in self.taps() if tap.name in names]

    def automatic(self) -> Tap | None:
        """The last feature map before the final pooling or flattening; None where the graph has no feature map.

        A map of class scores that is only pooled afterwards (SqueezeNet) is not a feature map: the choice is then what
        its convolution reads. Where the scores read a class token only, the last map is the one that its attention
        reads: no place of a later map has any influence.
        """
        taps = {tap.name: tap for tap in self.taps()}
        if not taps:
            return None
        read = next((name for name in reversed(taps) if self._grid_is_read(taps[name])), None)
        name = next(reversed(taps)) if read is None else self._before_projection(read, taps)
        if taps[name].channels == self.model.classes and not self._weighted_after(name):
            while self.producer[name].op_type not in WEIGHTED and self.producer[name].input[0] in taps:
                name = self.producer[name].input[0]
            name = self.producer[name].input[0] if self.producer[name].input[0] in taps else name
        while self.producer[name].op_type in POOLING | PASSING and self.producer[name].input[0] in taps:
            name = self.producer[name].input[0]
        return taps[self._dequantised(name, taps)]

    def _dequantised(self, name: str, taps: Mapping[str, Tap]) -> str:
        """In a quantised file, what comes back from the quantiser: a tap before it would split the integer operator."""
        for wanted in ("QuantizeLinear", "DequantizeLinear"):
            users = [node for node in self.graph.node if name in node.input]
            if len(users) != 1 or users[0].op_type != wanted or users[0].output[0] not in taps:
                return name
            name = users[0].output[0]
        return name

    def choose(self, layer: str | None) -> Tap:
        """The asked layer (a value or node name), or the automatic choice.

        Raises:
            ModelError: no such name (nearest offered), not a feature map (its shape), or nothing to choose from.
        """
        file = self.model.path.name
        if layer is None:
            chosen = self.automatic()
            if chosen is None:
                raise ModelError(
                    f"{file}: found no feature map to read; name one with --layer, or use a method without"
                )
            return chosen
        by_node = {node.name: node.output[0] for node in self.graph.node if node.name and node.output}
        name = layer if layer in self.producer else by_node.get(layer)
        if name is None:
            near = difflib.get_close_matches(layer, [*self.producer, *by_node], n=3, cutoff=0.4)
            near = list(dict.fromkeys(near)) or [tap.name for tap in self.candidates()][-3:]
            raise ModelError(f"{file}: no layer {layer!r}; nearest: {', '.join(near)} (heatmill inspect lists them)")
        tap = self.tap(name)
        if tap is None:
            shape = self.shapes.get(name)
            seen = f"has shape {list(shape)}" if shape else "has no known shape"
            raise ModelError(f"{file}: layer {layer!r} {seen} and is not a feature map; heatmill inspect lists those")
        if name not in self._needed:
            raise ModelError(f"{file}: layer {layer!r} does not lead to the scores {self.model.output!r}")
        return tap

    def _grid_is_read(self, tap: Tap) -> bool:
        """Whether anything but the tokens before the grid goes on from a map to the scores."""
        if not tap.prefix:
            return True
        waiting, seen = [tap.name], {tap.name}
        while waiting:
            name = waiting.pop()
            for node in self.graph.node:
                if name not in node.input or not self._needed.intersection(node.output) or node.op_type == "Shape":
                    continue
                after = [self.axes.get(output) for output in node.output]
                if all(axes is not None and "t" in axes.letters for axes in after):
                    fresh = [output for output in node.output if output not in seen]
                    waiting += fresh
                    seen.update(fresh)
                elif not self._takes_prefix(node, self.axes[name]):
                    return True
        return False

    def _before_projection(self, name: str, taps: Mapping[str, Tap]) -> str:
        """Of queries, keys or values the map that they are made from."""
        if not taps[name].prefix:
            return name
        value = name
        while (node := self.producer[value]).op_type in ("Add", "Identity"):
            inner = [source for source in node.input if source in taps]
            if len(inner) != 1 or self._joins(node):
                return name
            (value,) = inner
        return node.input[0] if node.op_type == "MatMul" and node.input[0] in taps else name

    def _joins(self, node: onnx.NodeProto) -> bool:
        """Whether a sum joins two values of the image, as a residual connection does."""
        return sum(source in self._from_image for source in node.input) > 1

    def _takes_prefix(self, node: onnx.NodeProto, axes: Axes) -> bool:
        """Whether a node picks only tokens that stand before the grid."""
        along = axes.letters.index("t")
        if node.op_type == "Gather" and attribute(node, "axis", 0) % len(axes.letters) == along:
            picked = self.ints(node.input[1])
            return picked is not None and all(0 <= index < axes.prefix for index in picked)
        if node.op_type == "Slice" and len(node.input) > 3:
            starts, ends, cut = (self.ints(name) for name in node.input[1:4])
            if starts is None or ends is None or cut is None or len(cut) != 1:
                return False
            return cut[0] % len(axes.letters) == along and starts[0] >= 0 and 0 < ends[0] <= axes.prefix
        return False

    def _weighted_after(self, name: str) -> bool:
        reached = {name}
        for node in self.graph.node:
            if reached.intersection(node.input) and self._needed.intersection(node.output):
                if node.op_type in WEIGHTED:
                    return True
                reached.update(node.output)
        return False


LAYOUTS = ("nchw", "nhwc", "ntc", "nct")
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})
POOLING = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "QLinearAveragePool"})
CHANNELS_FIRST = POOLING | {
    "Conv",
    "ConvTranspose",
    "ConvInteger",
    "QLinearConv",
    "BatchNormalization",
    "DepthToSpace",
    "SpaceToDepth",
}
PASSING = frozenset({"Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})


def ancestors(outputs: Iterable[str], producer: Mapping[str, onnx.NodeProto]) -> set[str]:
    """The names of all values that `outputs` are computed from, themselves included."""
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in producer:
            waiting.extend(reads(producer[name]))
    return found


# ----- the axes of what operators put out -----


def same_shape(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Operators that keep an input's shape keep its letters (activations, norms, sums, products, casts)."""
    for name in node.input:
        if name in reading.axes and reading.shapes.get(name) == shape:
            return reading.axes[name]
    return None


def channels_first(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Convolution and pooling read (n, c, h, w) by definition; the grid's size may change, the letters do not."""
    axes = reading.axes.get(node.input[0])
    return axes if axes is not None and axes.letters == "nchw" else None


def first_input(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Padding, slicing and resizing within the same axes."""
    axes = reading.axes.get(node.input[0])
    return axes if axes is not None and len(axes.letters) == len(shape) and "t" not in axes.letters else None


def transpose(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    axes = reading.axes.get(node.input[0])
    if axes is None:
        return None
    order = attribute(node, "perm", list(reversed(range(len(shape)))))
    return replace(axes, letters="".join(axes.letters[axis] for axis in order))


def reshape(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Flattening a grid to tokens, and the way back."""
    source = node.input[0]
    axes, before = reading.axes.get(source), reading.shapes.get(source)
    if axes is None or before is None:
        return None
    if before == shape:
        return axes
    size = dict(zip(axes.letters, before, strict=True))
    n, c = size["n"], size["c"]
    h, w = axes.grid if "t" in size else (size["h"], size["w"])
    whole = "t" not in size or size["t"] == h * w
    forms: dict[str, dict[Shape, str]] = {
        "nchw": {(n, c, h * w): "nct"},
        "nhwc": {(n, h * w, c): "ntc"},
        "nct": {(n, c, h, w): "nchw"} if whole else {},
        "ntc": {(n, h, w, c): "nhwc"} if whole else {},
    }
    letters = forms.get(axes.letters, {}).get(shape)
    return Axes(letters, (h, w)) if letters else None


def concat(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Along channels the letters stay; along tokens, what stands before the grid becomes prefix."""
    axis = attribute(node, "axis", 0) % len(shape)
    before = 0
    for name in node.input:
        axes = reading.axes.get(name)
        if axes is not None and len(axes.letters) == len(shape):
            if axes.letters[axis] == "c":
                return axes
            if axes.letters[axis] == "t":
                return replace(axes, prefix=axes.prefix + before)
            return None
        known = reading.shapes.get(name)
        if known is None or len(known) != len(shape):
            return None
        before += known[axis]
    return None


def cut_tokens(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """Slice: along tokens it may drop the prefix; along other axes the letters stay."""
    axes = reading.axes.get(node.input[0])
    if axes is None or "t" not in axes.letters:
        return first_input(reading, node, shape)
    before = reading.shapes[node.input[0]]
    axis = axes.letters.index("t")
    if before[axis] == shape[axis]:
        return axes
    starts, cut = reading.ints(node.input[1]), reading.ints(node.input[3]) if len(node.input) > 3 else None
    if starts is None or cut is None or len(starts) != 1 or cut[0] % len(shape) != axis:
        return None
    start = starts[0] % before[axis]
    h, w = axes.grid
    fits = start <= axes.prefix and shape[axis] >= axes.prefix - start + h * w
    return replace(axes, prefix=axes.prefix - start) if fits else None


def matmul(reading: Reading, node: onnx.NodeProto, shape: Shape) -> Axes | None:
    """A product with weights acts on the last axis, which must be the channels."""
    axes = reading.axes.get(node.input[0])
    weights = reading.shapes.get(node.input[1])
    if axes is None or weights is None or len(weights) != 2 or not axes.letters.endswith("c"):
        return None
    return axes


AXES: dict[str, AxisRule] = {
    **dict.fromkeys(sorted(CHANNELS_FIRST), channels_first),
    **dict.fromkeys(["Pad", "Resize", "Upsample", "Split"], first_input),
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": reshape,
    "Concat": concat,
    "Slice": cut_tokens,
    "MatMul": matmul,
}


# ----- shapes and the graph that is run -----


def set_input(proto: onnx.ModelProto, model: ModelFile, batch: int | str, size: tuple[int, int] | None) -> None:
    for value in proto.graph.input:
        if value.name == model.input.name:
            dims = value.type.tensor_type.shape.dim
            if isinstance(batch, str):
                dims[0].dim_param = batch
            else:
                dims[0].dim_value = batch
            if size is not None:
                first = 2 if model.input.layout == "NCHW" else 1
                dims[first].dim_value, dims[first + 1].dim_value = size


class Shapes:
    """The shape of every value of a graph with fixed input shapes, and the value of every small constant.

    Exporters compute the targets of their Reshapes at run time, from Shape onwards; with fixed inputs those are
    constants, and are worked out node by node. `constants` holds no more than MAX_CONSTANT numbers each.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, Array] = {}
        self._types: dict[str, onnx.TypeProto] = {value.name: value.type for value in proto.graph.input}
        self._opsets = list(proto.opset_import)
        self._versions = {opset.domain: opset.version for opset in proto.opset_import}
        self._ir_version = proto.ir_version
        for value in proto.graph.input:
            self._note(value.name)
        for tensor in proto.graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            self._note(tensor.name)
            stored = tensor.data_location != TensorProto.EXTERNAL
            count = math.prod(tensor.dims)
            if stored and count <= MAX_CONSTANT and (has_data(tensor) or not count):
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in proto.graph.node:
            self._infer(node)
            self._fold(node)

    def computes_in(self, kind: int, graph: onnx.GraphProto) -> bool:
        """Whether a weighted operator works on this element type."""
        inputs = [node.input[0] for node in graph.node if node.op_type in WEIGHTED]
        return any(self._types[name].tensor_type.elem_type == kind for name in inputs if name in self._types)

    def hollow(self, name: str) -> TensorProto | None:
        """A tensor of a value's type and shape without data; None where either is not known."""
        if name not in self.shapes:
            return None
        return TensorProto(name=name, data_type=self._types[name].tensor_type.elem_type, dims=self.shapes[name])

    def _infer(self, node: onnx.NodeProto) -> None:
        try:
            schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
            types = shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._types[name] for name in node.input if name in self._types},
                {name: self._tensor(name) for name in node.input if name in self.constants},
                opset_imports=self._opsets,
                ir_version=self._ir_version,
            )
        except Exception:  # an operator or form that inference does not know: its shape stays unknown
            return
        if node.op_type == "GroupNormalization" and node.input[0] in self._types:  # inference leaves its shape open
            types = {node.output[0]: self._types[node.input[0]]}
        self._types.update(types)
        for name in types:
            self._note(name)

    def _fold(self, node: onnx.NodeProto) -> None:
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape" and inputs[0] in self.shapes:
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            self.constants[node.output[0]] = np.array(self.shapes[inputs[0]][start:end], dtype=np.int64)
            return
        small = all(math.prod(self.shapes.get(name, (MAX_CONSTANT + 1,))) <= MAX_CONSTANT for name in node.output)
        if not small or not node.output or any(name not in self.constants for name in inputs):
            return
        try:
            evaluator = ReferenceEvaluator(node)
            values = evaluator.run(None, {name: self.constants[name] for name in inputs})
        except Exception:  # not a constant that can be worked out here
            return
        self.constants.update(zip(node.output, map(np.asarray, values), strict=False))

    def _tensor(self, name: str) -> TensorProto:
        return numpy_helper.from_array(self.constants[name], name)

    def _note(self, name: str) -> None:
        tensor = self._types[name].tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            self.shapes[name] = tuple(dim.dim_value for dim in tensor.shape.dim)


def has_data(tensor: TensorProto) -> bool:
    fields = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    return any(len(getattr(tensor, name)) for name in fields)


def with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the graph that puts out exactly `names`; nodes that lead to none of them are dropped.

    Weights are shared with `proto` as far as protobuf allows (they are copied once).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    defaults = {tensor.name for tensor in graph.initializer}
    known = {value.name: value for value in [*graph.output, *graph.value_info, *graph.input]}
    outputs = [known.get(name) or onnx.ValueInfoProto(name=name) for name in names]
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in outputs]
    producer = {name: node for node in graph.node for name in node.output if name}
    needed = ancestors(names, producer)
    kept = [node for node in graph.node if needed.intersection(node.output)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(kept) < len(graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)
    if len(weights) < len(graph.initializer):
        tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in weights]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
    unread = defaults.difference(needed)
    if any(value.name in unread for value in graph.input):  # without its default, an input would have to be fed
        inputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.input if v.name not in unread]
        del graph.input[:]
        graph.input.extend(inputs)
    del graph.output[:]
    graph.output.extend(outputs)
    del graph.value_info[:]
    return copy


def reads(node: onnx.NodeProto) -> list[str]:
    """Every name that a node reads, its inner graphs included."""
    return [*(name for name in node.input if name), *captured(node)]


def captured(node: onnx.NodeProto) -> list[str]:
    """What a node's inner graphs read, some of it from outside."""
    return [
        name
        for found in node.attribute
        for graph in (found.g, *found.graphs)
        for inner in graph.node
        for name in reads(inner)
    ]


def make_batch_dynamic(proto: onnx.ModelProto, model: ModelFile) -> None:
    """Open the batch axis of a file exported with a fixed one, in place.

    The input's first size becomes symbolic, and constant Reshape targets that start with the fixed batch copy the
    incoming one instead. Whether the graph then really treats rows apart is for the caller to try.
    """
    fixed = model.input.batch
    if fixed is None:
        return
    set_input(proto, model, "N", None)
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        if output.HasField("type"):
            output.type.tensor_type.ClearField("shape")
    targets = {node.input[1] for node in proto.graph.node if node.op_type == "Reshape" and len(node.input) > 1}
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name in targets]
    tensors += [
        found.t
        for node in proto.graph.node
        if node.op_type == "Constant" and targets.intersection(node.output)
        for found in node.attribute
        if found.name == "value"
    ]
    for tensor in tensors:
        target = numpy_helper.to_array(tensor).copy()
        if target.ndim == 1 and len(target) and target[0] == fixed:
            target[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(target, tensor.name))

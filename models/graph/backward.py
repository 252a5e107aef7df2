"""Backward graphs as plain ONNX: one reverse walk over a classifier, with a table of rules per operator.

The forward graph and what is derived from it stand in one file and share every value; nothing below the lowest asked
value is differentiated. The class is an input of the graph, so that every image has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ... import ModelError
from .canonize import Bounds, Graph, Op, product
from .emit import PREFIX, Emitter
from .relevance_facts import Facts
from .request import Request
from .tap import ancestors

Array = npt.NDArray[Any]
Grads = Sequence[str | None]
Rule = Callable[["Walk", Op, Grads], Sequence[str | None]]

TARGETS = f"{PREFIX}targets"
START = f"{PREFIX}start"
WEIGHTS = f"{PREFIX}weights"
CLASSES = f"{PREFIX}classes"
TINY = 1e-30


class Unsupported(ModelError):
    """An operator that no rule covers; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """The names under which a request's results come out, one per target: the values, and the conserved shares.

    `notes` is what a user should be told of the rules that were taken.
    """

    values: tuple[str, ...]
    kept: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A graph with its requests' outputs.

    Its inputs are the image, `TARGETS` (rows, targets) int64 - a class, or -r for the class of rank r - and, where
    they are fed, `START`, a map, and `WEIGHTS` (rows, classes). Beside the requests' outputs it gives the raw scores,
    the kept values, and `CLASSES` (rows, targets), the classes that the targets came to.
    """

    proto: onnx.ModelProto
    outputs: tuple[Outputs, ...]


class Walk:
    """What a rule may use: shapes, constants, the emitter, and what other rules have already emitted.

    Attributes:
        graph: the canonical classifier.
        emit: where nodes are written.
        portable: keep to operators that TensorRT takes too, where a rule has a faster form that only ONNX Runtime runs.
        bounds: the least and the greatest number of the image, one for all channels or one for each, where known.
        needed: the values that depend on what is asked for; a rule may leave out the others.
    """

    def __init__(
        self,
        graph: Graph,
        emit: Emitter,
        ends: Sequence[str],
        portable: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        self.graph = graph
        self.emit = emit
        self.portable = portable
        self.bounds = bounds
        self.ends = tuple(ends)
        self.needed = graph.dependents(ends)
        self._notes: list[tuple[str, Op]] = []
        self._memo: dict[Hashable, str] = {}

    def shape(self, name: str) -> tuple[int | None, ...]:
        """A value's sizes; None follows the batch."""
        return self.graph.shape(name)

    def constant(self, name: str) -> Array | None:
        """A constant's value; None where it is computed, or left out."""
        return self.graph.constant(name)

    @cached_property
    def facts(self) -> Facts:
        """What is known of the classifier's values."""
        return Facts(self.graph)

    def note(self, op: Op, text: str) -> None:
        """What a user should be told of the rule that an operator took."""
        self._notes.append((text, op))

    def told(self, end: str) -> tuple[str, ...]:
        """The notes of the operators on the way to an end."""
        on_the_way = self.graph.dependents([end])
        return tuple(dict.fromkeys(text for text, op in self._notes if not on_the_way.isdisjoint(op.inputs)))

    def wants(self, op: Op, position: int) -> bool:
        """Whether an input's share is asked for."""
        return position < len(op.inputs) and op.inputs[position] in self.needed

    def once(self, key: Hashable, make: Callable[[], str]) -> str:
        """A value that several targets or rules share: emitted at the first asking."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def total(self, values: Sequence[str]) -> str | None:
        """The sum of what several users of a value send back."""
        if not values:
            return None
        whole = values[0]
        for value in values[1:]:
            whole = self.emit.op("Add", whole, value)
        return whole

    def run(self, seeds: Mapping[str, str], rules: Mapping[str, Rule]) -> dict[str, str]:
        """Send `seeds` (value -> what stands there) back to every end.

        Raises:
            Unsupported: operators without a rule lie between; all of them are named.
        """
        found: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
        refused: dict[tuple[str, str], list[str]] = {}
        for op in reversed(self.graph.ops):
            if not any(found.get(name) for name in op.outputs) or self.needed.isdisjoint(op.inputs):
                continue
            sent = [self.total(found.get(name, [])) for name in op.outputs]
            try:
                if op.kind not in rules:
                    raise Unsupported(f"{op.kind} has no rule")
                parts = rules[op.kind](self, op, sent)
            except Unsupported as err:
                refused.setdefault((op.kind, str(err)), []).append(op.text)
                parts = [sent[0] for _ in op.inputs]  # only so that the walk goes on and finds the others
            for name, part in zip(op.inputs, parts, strict=False):
                if part is not None and name in self.needed:
                    found.setdefault(name, []).append(part)
        if refused:
            count = sum(map(len, refused.values()))
            lack = f"{count} operators on the way back have" if count > 1 else "1 operator on the way back has"
            alike = [
                f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
                for (_, reason), names in refused.items()
            ]
            raise Unsupported(f"{lack} no rule: {'; '.join(alike[:4])}{'; ...' if alike[4:] else ''}")
        results = {}
        for end in self.ends:
            whole = self.total(found.get(end, []))
            if whole is None:
                raise Unsupported(f"nothing leads from {', '.join(map(repr, seeds))} back to {end!r}")
            results[end] = whole
        return results


def build(
    graph: Graph,
    requests: Sequence[Request],
    targets: int,
    ranks: int = 0,
    keep: Sequence[str] = (),
    portable: bool = False,
    bounds: Bounds | None = None,
) -> Built:
    """Forward and backward in one graph.

    Args:
        graph: the classifier.
        requests: what is wanted for every image and target.
        targets: classes per image.
        ranks: the greatest rank that a target may ask for.
        keep: inner values to put out as well.
        portable: keep to operators that TensorRT takes too.
        bounds: the least and the greatest number of the image, one for all channels or one for each.

    Raises:
        Unsupported: an operator on the way has no rule.
    """
    emit = Emitter(graph.names | {TARGETS, START, WEIGHTS}, graph.dtype, graph.hollow)
    classes = _classes(graph, emit, targets, ranks)
    passes: dict[tuple[str, ...], list[str]] = {}
    for request in requests:
        passes.setdefault(same_pass(request), []).append(request.at or graph.image)
    walks = {key: Walk(graph, emit, list(dict.fromkeys(ends)), portable, bounds) for key, ends in passes.items()}
    columns = [emit.op("Slice", classes, [k], [k + 1], [1]) for k in range(targets)]
    done = {key: [_send(walk, key, column) for column in columns] for key, walk in walks.items()}
    outputs: list[Outputs] = []
    for number, request in enumerate(requests):
        end = request.at or graph.image
        values, kept = [], []
        for k, arrived in enumerate(done[same_pass(request)]):
            result, share = arrived[end]
            if share is not None:
                kept.append(emit.named(f"{PREFIX}{number}/{k}/kept", share))
            if request.times_input:
                result = emit.op("Mul", end, result)
            values.append(emit.named(f"{PREFIX}{number}/{k}", result))
        outputs.append(Outputs(tuple(values), tuple(kept), walks[same_pass(request)].told(end)))
    emit.named(CLASSES, classes)
    names = [graph.scores, *keep, *(name for output in outputs for name in (*output.values, *output.kept)), CLASSES]
    return Built(_assembled(graph, emit, requests, outputs, targets, names), tuple(outputs))


def same_pass(request: Request) -> tuple[str, ...]:
    """Requests that are alike in this are read off one reverse walk."""
    return (request.kind, request.composite, request.start, request.start_at)


def _send(walk: Walk, key: tuple[str, ...], chosen: str) -> Mapping[str, tuple[str, str | None]]:
    """One target's walk: what arrives at each end, and for relevance the share of it that did."""
    from .lrp import relevance
    from .vjp import gradient

    kind, composite, start, start_at = key
    if kind == "relevance":
        return relevance(walk, chosen, composite, start, start_at)
    seed = SEEDS[start](walk, chosen)
    return {end: (found, None) for end, found in gradient(walk, seed, guided=kind == "guided").items()}


def one_hot(walk: Walk, chosen: str) -> str:
    """1 at the class of each row, in the raw scores' own shape; `chosen` is (rows, 1)."""
    emit, count = walk.emit, product(walk.shape(walk.graph.scores)[1:])

    def make() -> str:
        numbers = emit.const(np.arange(count, dtype=np.int64)[None])
        return _as_scores(walk, emit.mask(emit.op("Equal", chosen, numbers)))

    return walk.once(("one hot", chosen), make)


def weights(walk: Walk) -> str:
    """The fed weights of the raw scores, in their own shape."""
    return walk.once("weights", lambda: _as_scores(walk, WEIGHTS))


def cross_entropy(walk: Walk, chosen: str) -> str:
    """The gradient of -log of the chosen class's posterior at the raw scores: the posteriors, less 1 at the class."""
    emit, scores = walk.emit, walk.graph.scores
    posteriors = walk.once("posteriors", lambda: _as_scores(walk, emit.op("Softmax", _flat(walk, scores), axis=1)))
    return emit.op("Sub", posteriors, one_hot(walk, chosen))


def cross_entropy_sigmoid(walk: Walk, chosen: str) -> str:
    """The same where every class has a sigmoid of its own: only the chosen one's counts."""
    emit = walk.emit
    posteriors = walk.once("sigmoids", lambda: emit.op("Sigmoid", walk.graph.scores))
    return emit.op("Mul", emit.op("Sub", posteriors, 1.0), one_hot(walk, chosen))


SEEDS: dict[str, Callable[[Walk, str], str]] = {
    "logit": one_hot,
    "weights": lambda walk, chosen: weights(walk),
    "cross-entropy": cross_entropy,
    "cross-entropy-sigmoid": cross_entropy_sigmoid,
}


def _flat(walk: Walk, scores: str) -> str:
    """The raw scores as (rows, classes)."""
    shape = walk.shape(scores)
    return scores if len(shape) == 2 else walk.emit.op("Reshape", scores, [-1, product(shape[1:])])


def _as_scores(walk: Walk, value: str) -> str:
    """(rows, classes) in the shape of the raw scores."""
    shape = walk.shape(walk.graph.scores)
    return value if len(shape) == 2 else walk.emit.op("Reshape", value, [-1, *(int(size or 1) for size in shape[1:])])


def _classes(graph: Graph, emit: Emitter, targets: int, ranks: int) -> str:
    """`TARGETS` with every rank replaced by the class that has it."""
    if not ranks:
        return emit.op("Max", TARGETS, [0])
    scores, shape = graph.scores, graph.shape(graph.scores)
    if len(shape) != 2:
        scores = emit.op("Reshape", scores, [-1, product(shape[1:])])
    _, ranked = emit.ops("TopK", 2, scores, [ranks], axis=1)
    place = emit.op("Sub", emit.op("Max", emit.op("Neg", TARGETS), [1]), [1])
    picked = emit.op("GatherElements", ranked, emit.op("Min", place, [ranks - 1]), axis=1)
    return emit.op("Where", emit.op("Less", TARGETS, [0]), picked, TARGETS)


def _assembled(
    graph: Graph,
    emit: Emitter,
    requests: Sequence[Request],
    outputs: Sequence[Outputs],
    targets: int,
    names: Sequence[str],
) -> onnx.ModelProto:
    """One file of the forward nodes that are needed and the emitted ones."""
    kind = helper.np_dtype_to_tensor_dtype(emit.dtype)
    nodes = [*graph.proto.graph.node, *emit.nodes]
    producer = {name: node for node in nodes for name in node.output if name}
    needed = ancestors(names, producer)
    fixed: int | None = graph.shape(graph.input)[0]
    rows: int | str = "N" if fixed is None else fixed
    inputs = [value for value in graph.proto.graph.input if value.name in needed or value.name == graph.input]
    inputs.append(helper.make_tensor_value_info(TARGETS, TensorProto.INT64, [rows, targets]))
    if any(request.start == "map" for request in requests):
        at = next(request.start_at for request in requests if request.start == "map")
        inputs.append(helper.make_tensor_value_info(START, kind, [rows, *graph.shape(at)[1:]]))
    if any(request.start == "weights" for request in requests):
        classes = product(graph.shape(graph.scores)[1:])
        inputs.append(helper.make_tensor_value_info(WEIGHTS, kind, [rows, classes]))
    shapes: dict[str, list[int | str | None]] = {CLASSES: [rows, targets]}
    for request, output in zip(requests, outputs, strict=True):
        whole = graph.shape(request.at or graph.image)
        shapes |= {name: [rows, *whole[1:]] for name in output.values} | {name: [rows] for name in output.kept}
    results = []
    for name in dict.fromkeys(names):
        shape = shapes.get(name) or [rows if size is None else size for size in graph.shape(name)]
        results.append(helper.make_tensor_value_info(name, TensorProto.INT64 if name == CLASSES else kind, shape))
    proto = onnx.ModelProto()
    proto.ir_version = graph.proto.ir_version
    proto.opset_import.extend(graph.proto.opset_import)
    proto.graph.name = "explain"
    proto.graph.input.extend(inputs)
    proto.graph.output.extend(results)
    proto.graph.node.extend(node for node in nodes if not needed.isdisjoint(node.output))
    weights = [*graph.proto.graph.initializer, *emit.constants]
    proto.graph.initializer.extend(tensor for tensor in weights if tensor.name in needed)
    return proto

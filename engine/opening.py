"""Opening a model: its file, spec, tap and methods, and a session that runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import BackendError, InputError, ModelError
from ..models.find_spec import find_spec
from ..models.graph.attention import read_attention
from ..models.graph.head import linear_head, raw_scores
from ..models.graph.tap import Reading, Tap, make_batch_dynamic, with_outputs
from ..models.load import ModelFile, inline_external_data, open_model
from ..models.spec import ModelSpec
from ..models.superpixels import Segmentation
from .backends import Profile, Session, choose, open_session
from .methods import parse_methods
from .types import Facts, MethodCall

Array = npt.NDArray[Any]

DEFAULT_BATCH = 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model file with everything that is decided before a session is opened.

    `own_precision` is the arithmetic that the file itself asks for: fp32, fp16, or int8 where it is quantised.
    """

    model: ModelFile
    spec: ModelSpec
    spec_source: str
    calls: tuple[MethodCall, ...]
    tap: Tap | None
    scores: str
    facts: Facts
    own_precision: str

    @property
    def posterior(self) -> str:
        """How raw scores become posteriors; see `Facts.posterior`."""
        return self.facts.posterior

    @property
    def needs_weights(self) -> bool:
        """Whether backward graphs, or a head alone, are still to be made from the file."""
        asks = ((call.method.backward, call.method.through, call.parameters) for call in self.calls)
        backward = any(back(self.facts, values) or through(self.facts, values) for back, through, values in asks)
        return backward or self.needs_head

    @property
    def needs_head(self) -> bool:
        """Whether rows go through the graph behind the layer alone."""
        return any(call.method.head(self.facts, call.parameters) for call in self.calls)

    @property
    def segmentations(self) -> tuple[Segmentation, ...]:
        """How the methods want pictures cut, each once."""
        return tuple(dict.fromkeys(how for call in self.calls for how in call.method.superpixels(call.parameters)))

    @property
    def bounds(self) -> tuple[Array, Array]:
        """The least and greatest value of each channel of the network's input."""
        if self.model.input.dtype == "uint8":
            return np.zeros(self.spec.input_size[0]), np.full(self.spec.input_size[0], 255.0)
        mean, std = np.asarray(self.spec.mean), np.asarray(self.spec.std)
        return -mean / std, (1 - mean) / std

    def release(self) -> None:
        """Free the file's weights: a session that is open has its own."""
        self.model.proto.Clear()

    def serialized(self, dynamic: bool) -> bytes:
        """The graph to run: raw scores and the tap as outputs, the batch axis open if asked."""
        proto = with_outputs(self.model.proto, [self.scores, *([self.tap.name] if self.tap else [])])
        if dynamic:
            make_batch_dynamic(proto, self.model)
        inline_external_data(proto, self.model)
        return bytes(proto.SerializeToString())


def load(
    model: str | Path,
    methods: Sequence[str],
    *,
    layer: str | None = None,
    preprocess: str | None = None,
    labels: str | Path | None = None,
    output: str | None = None,
    scores: str | None = None,
) -> Loaded:
    """Open a model file for some methods.

    Raises:
        ModelError: the file, its spec or the layer is refused.
        InputError: an unknown method or option, or a method that can't run on this model.
    """
    calls = parse_methods(methods)
    if len({call.text for call in calls}) < len(calls):
        raise InputError("a method was given twice with the same parameters")
    opened = open_model(Path(model), scores=scores)
    spec, source = find_spec(opened, preprocess=preprocess, labels=Path(labels) if labels else None, output=output)
    return load_opened(opened, spec, source, read_graph(opened, spec), calls, layer)


def read_graph(model: ModelFile, spec: ModelSpec) -> Reading:
    """The graph with the shapes and axes it has at the spec's input size."""
    return Reading(model, (spec.input_size[1], spec.input_size[2]))


def load_opened(
    model: ModelFile, spec: ModelSpec, source: str, reading: Reading, calls: Sequence[MethodCall], layer: str | None
) -> Loaded:
    """As `load`, from the parts."""
    needs_tap = layer is not None or any(call.needs_tap for call in calls)
    facts = read_facts(model, spec, reading, reading.choose(layer or spec.target_layer) if needs_tap else None)
    for call in calls:
        reason = call.method.refuses(facts, call.parameters)
        if reason:
            raise InputError(f"{model.path.name}: method {call.method.name} can't run: {reason}")
    own = "int8" if model.quantised else "fp16" if reading.half else "fp32"
    loaded = Loaded(model, spec, source, tuple(calls), facts.tap, raw_scores(model), facts, own)
    if model.classes is not None:
        require_classes(loaded, model.classes)
    return loaded


def read_facts(model: ModelFile, spec: ModelSpec, reading: Reading, tap: Tap | None) -> Facts:
    """What methods may know of a model, where `tap` is read."""
    raw = raw_scores(model)
    return Facts(
        size=(spec.input_size[1], spec.input_size[2]),
        output=spec.output,
        has_logits=spec.output == "logits" or raw != model.output,
        tap=tap,
        head=linear_head(reading, tap, raw) if tap else "the model has no feature map",
        attention=read_attention(model, tap),
        layers=tuple(reading.taps()),
        waists=reading.waists,
        operators=frozenset(node.op_type for node in reading.graph.node),
    )


def open_best(
    loaded: Loaded,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    threads: int | None = None,
    device: int = 0,
) -> Session:
    """A session that gives the asked precision; the fastest by a short trial where several do.

    A file with a fixed batch axis is opened with it free, unless `batch_size` is its own.

    Raises:
        BackendError: nothing on this machine gives the precision, or the runtime refuses the model.
    """
    graph = loaded.serialized(dynamic=batch_size != loaded.model.input.batch)
    feed = {loaded.model.input.name: blank_batch(loaded, batch_size)}
    fits = choose(backend, provider, precision, loaded.own_precision, device)
    sessions: list[tuple[float, Session]] = []
    refusals: list[BackendError] = []
    for name, door, kind in fits:
        try:
            profile = Profile(batch_size, kind, door, threads, device=device, input_shape=row_shape(loaded))
            session = open_session(name, graph, profile)
            if len(fits) == 1:
                return session
            sessions.append((_seconds(session, feed, loaded.scores), session))
        except BackendError as err:
            refusals.append(err)
        except Exception as err:  # a runtime's own error in the trial: another provider may do
            refusals.append(BackendError(f"{name} ({door}) can't run the model: {err}"))
    if not sessions:
        raise refusals[0]
    return min(sessions, key=lambda timed: timed[0])[1]


def _seconds(session: Session, feed: Mapping[str, Array], output: str) -> float:
    session.run(feed, [output])
    start = time.perf_counter()
    session.run(feed, [output])
    return time.perf_counter() - start


def blank_batch(loaded: Loaded, rows: int) -> Array:
    """A zero batch in the network's shape and type."""
    return np.zeros((rows, *row_shape(loaded)), dtype=loaded.model.input.dtype)


def row_shape(loaded: Loaded) -> tuple[int, int, int]:
    """The sizes of one image in the network's layout."""
    c, h, w = loaded.spec.input_size
    return (c, h, w) if loaded.model.input.layout == "NCHW" else (h, w, c)


def require_classes(loaded: Loaded, seen: int) -> None:
    """Refuse a model whose scores can't be what the spec says.

    Raises:
        ModelError: a softmax over one class, or another number of classes than label names.
    """
    name = loaded.model.path.name
    if seen == 1 and loaded.posterior == "softmax":
        raise ModelError(
            f"{name}: one score per image, and a softmax over one class is always 1; export a sigmoid head"
        )
    names = len(loaded.spec.label_names)
    if names and names != seen:
        raise ModelError(f"{name}: the model has {seen} classes, the spec {names} label names; correct the spec")

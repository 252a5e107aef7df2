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
from ..models.graph.head import linear_head, raw_scores
from ..models.graph.tap import Reading, Tap, make_batch_dynamic, with_outputs
from ..models.load import ModelFile, inline_external_data, open_model
from ..models.spec import ModelSpec
from .backends import Profile, Session, choose, open_session
from .methods import parse_method
from .types import Facts, MethodCall

Array = npt.NDArray[Any]

DEFAULT_BATCH = 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model file with everything that is decided before a session is opened."""

    model: ModelFile
    spec: ModelSpec
    spec_source: str
    reading: Reading
    calls: tuple[MethodCall, ...]
    tap: Tap | None
    scores: str
    facts: Facts

    @property
    def posterior(self) -> str:
        """How raw scores become posteriors: softmax, sigmoid, or none where the graph's own output is one."""
        if self.spec.output == "logits":
            return "softmax"
        if self.scores == self.model.output:
            return "none"
        return {"probabilities": "softmax", "sigmoid": "sigmoid"}[self.spec.output]

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
    calls = tuple(parse_method(text) for text in methods)
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
    tap = None
    if layer is not None or any(call.method.needs_tap for call in calls):
        tap = reading.choose(layer or spec.target_layer)
    raw = raw_scores(model)
    facts = Facts(
        size=(spec.input_size[1], spec.input_size[2]),
        output=spec.output,
        has_logits=spec.output == "logits" or raw != model.output,
        tap=tap,
        head=linear_head(reading, tap, raw) if tap else "the model has no feature map",
    )
    for call in calls:
        reason = call.method.refuses(facts, call.parameters)
        if reason:
            raise InputError(f"{model.path.name}: method {call.method.name} can't run: {reason}")
    loaded = Loaded(model, spec, source, reading, tuple(calls), tap, raw, facts)
    if model.classes is not None:
        require_classes(loaded, model.classes)
    return loaded


def open_best(
    loaded: Loaded,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int = DEFAULT_BATCH,
    threads: int | None = None,
) -> Session:
    """A session that gives the asked precision; the fastest by a short trial where several do.

    A file with a fixed batch axis is opened with it free. Where that fails, or a second row changes the first one's
    scores, the file's own batch size is kept: ask `fits_batch` before choosing one.

    Raises:
        BackendError: nothing on this machine gives the precision, or the runtime refuses the model.
    """
    fits = choose(backend, provider, precision, loaded.model.quantised)
    profiles = [(name, Profile(batch_size, kind, door, threads)) for name, door, kind in fits]
    graph = loaded.serialized(dynamic=batch_size != loaded.model.input.batch)
    sessions = [open_session(name, graph, profile) for name, profile in profiles]
    if len(sessions) == 1:
        return sessions[0]
    feed = {loaded.model.input.name: blank_batch(loaded, batch_size)}
    return min(sessions, key=lambda session: _seconds(session, feed, loaded.scores))


def _seconds(session: Session, feed: Mapping[str, Array], output: str) -> float:
    session.run(feed, [output])
    start = time.perf_counter()
    session.run(feed, [output])
    return time.perf_counter() - start


def batch_is_free(loaded: Loaded, backend: str, provider: str | None, precision: str) -> bool:
    """Whether rows can be packed to any batch size: the open batch axis works and keeps rows apart.

    Tried on two random rows: together in one batch, each must score as it does alone in the file as it is.
    """
    fixed = loaded.model.input.batch
    if fixed is None:
        return True
    name, door, kind = choose(backend, provider, precision, loaded.model.quantised)[0]
    rows = np.random.default_rng(0).random((2, *blank_batch(loaded, 1).shape[1:]))
    rows = (rows * (255 if loaded.model.input.dtype == "uint8" else 1)).astype(loaded.model.input.dtype)
    key = loaded.model.input.name
    try:
        opened = open_session(name, loaded.serialized(dynamic=True), Profile(2, kind, door))
        together = opened.run({key: rows}, [loaded.scores])[0]
    except BackendError:
        return False
    except Exception:  # a runtime's own error on a graph that was not made for this: the file's batch size is kept
        return False
    original = open_session(name, loaded.serialized(dynamic=False), Profile(fixed, kind, door))
    alone = [original.run({key: np.repeat(row[None], fixed, axis=0)}, [loaded.scores])[0][0] for row in rows]
    same = len(together) == 2 and np.allclose(together.reshape(2, -1), np.reshape(alone, (2, -1)), rtol=1e-3, atol=1e-4)
    return bool(same)


def blank_batch(loaded: Loaded, rows: int) -> Array:
    """A zero batch in the network's shape and type."""
    c, h, w = loaded.spec.input_size
    shape = (rows, c, h, w) if loaded.model.input.layout == "NCHW" else (rows, h, w, c)
    return np.zeros(shape, dtype=loaded.model.input.dtype)


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

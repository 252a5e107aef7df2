"""The backward passes of a run: graphs made for its methods and targets, and the sessions that run them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .. import InputError, ModelError
from ..kernels import host
from ..models.graph.backward import CLASSES, START, TARGETS, Built, Outputs, build, same_pass
from ..models.graph.canonize import Graph, canonize
from ..models.graph.composites import COMPOSITES
from ..models.graph.cut import head_of
from ..models.graph.request import Request
from ..models.graph.tap import Tap
from .backends import PORTABLE, Profile, Session, device_of, open_session
from .opening import Loaded
from .types import Array, MethodCall, Returned, Target

# OpenVINO 2026.4 takes one layout of a square weight for the other where a graph reads it both ways.
FORWARD_ONLY = {"openvino": "cpu"}
MOST_WAYS = 64  # targets of an image that are followed back in one graph
BUDGET = 5 << 29  # bytes of the values on a way back that are held at once: for 8 images of LRP on ResNet-50


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward and backward graph, open.

    Attributes:
        image: the name of its image input.
        channels_last: whether what comes back at the image is (n, h, w, c).
        scores: the name of the raw scores.
        tap: the layer that it puts out as well.
        layers: further ones.
        requests: the names under which each request comes out.
        ends: where each request's values lie; None is the image.
        batch_size: rows per call.
        start: the layer at which a map is fed, and its number of tokens.
    """

    session: Session
    image: str
    channels_last: bool
    scores: str
    tap: Tap | None
    requests: Mapping[Request, Outputs]
    ends: Mapping[Request, Tap | None]
    batch_size: int
    start: tuple[Tap, int] | None = None
    layers: tuple[Tap, ...] = ()

    @property
    def targets(self) -> int:
        """Classes per image."""
        return max((len(outputs.values) for outputs in self.requests.values()), default=1)

    def run(self, images: Array, targets: Array, starts: Array | None = None) -> Passed:
        """One batch.

        Args:
            images: (n, ...) in the network's layout and type.
            targets: (n, k) classes, or -r for rank r where the graph was made for ranks.
            starts: (n, c, h, w) maps, where the graph starts at one.
        """
        feeds = {self.image: images, TARGETS: targets.astype(np.int64)}
        if starts is not None and self.start is not None:
            feeds[START] = self.start[0].from_nchw(starts, self.start[1])
        names = [name for outputs in self.requests.values() for name in (*outputs.values, *outputs.kept)]
        kept_layers = dict.fromkeys([*([self.tap.name] if self.tap else []), *(tap.name for tap in self.layers)])
        wanted = [self.scores, CLASSES, *kept_layers, *names]
        found = dict(zip(wanted, self.session.run(feeds, wanted), strict=True))
        returned = {}
        for request, outputs in self.requests.items():
            end = self.ends[request]
            values = [self._oriented(found[name], end) for name in outputs.values]
            kept = [found[name] for name in outputs.kept]
            shares = np.array(kept, dtype=np.float32).reshape(-1, len(images)).T
            returned[request] = Returned(np.stack(values, axis=1), shares)
        features = self.tap.to_nchw(found[self.tap.name]) if self.tap else None
        layers = {tap.name: tap.to_nchw(found[tap.name]) for tap in self.layers}
        return Passed(found[self.scores].reshape(len(images), -1), found[CLASSES], features, returned, layers)

    def _oriented(self, values: Array, end: Tap | None) -> Array:
        if end is not None:
            return end.to_nchw(values)
        return values.transpose(0, 3, 1, 2) if self.channels_last else values


@dataclass(frozen=True, slots=True)
class Passed:
    """A batch, rows first: raw scores (n, classes), resolved targets (n, k), features, what came back, other layers."""

    raw: Array
    classes: Array
    features: Array | None
    returned: Mapping[Request, Returned]
    layers: Mapping[str, Array] = field(default_factory=dict)

    def wait(self) -> None:
        """It is there."""

    def alone(self, slot: int) -> Passed:
        """One row, its arrays the caller's to keep."""
        row = slice(slot, slot + 1)
        return Passed(
            self.raw[row].copy(),
            self.classes[row].copy(),
            None if self.features is None else self.features[row].copy(),
            {
                request: Returned(found.values[row].copy(), found.kept[row].copy())
                for request, found in self.returned.items()
            },
            {name: values[row].copy() for name, values in self.layers.items()},
        )

    def whole(self) -> Passed:
        """All rows."""
        return self

    def scores(self, slots: slice, classes: Array, kind: str) -> Array:
        """Posteriors (k, n) of some rows and classes; see `host.class_scores`."""
        return host.class_scores(self.raw[slots], classes, kind).T


@dataclass(frozen=True, slots=True)
class Head:
    """The graph behind the layer, open.

    Attributes:
        scores: the name of the raw scores.
        batch_size: rows per call.
    """

    session: Session
    tap: Tap
    scores: str
    dtype: np.dtype[Any]
    batch_size: int

    def run(self, features: Array) -> Array:
        """Raw scores (n, classes) of the layer's maps (n, c, h, w)."""
        values = self.tap.from_nchw(features, features.shape[2] * features.shape[3])
        feeds = {self.tap.name: np.ascontiguousarray(values, self.dtype)}
        return self.session.run(feeds, [self.scores])[0].reshape(len(features), -1)


@dataclass(frozen=True, slots=True)
class EntropyPass:
    """The graph from a layer, or from the image, to the raw scores and back with the gradient of cross-entropy, open.

    Attributes:
        inlet, gradient, scores: the names of what is fed, of what comes back there, and of the raw scores.
        batch_size: rows per call, at most.
        whole: whether every call must have so many.
        channels_last: whether what comes back at the image is (n, h, w, c).
    """

    session: Session
    inlet: str
    gradient: str
    scores: str
    dtype: np.dtype[Any]
    batch_size: int
    whole: bool
    channels_last: bool = False

    def run(self, values: Array, classes: Array) -> tuple[Array, Array]:
        """Raw scores (n, classes), and the gradient of each row's own cross-entropy at the values, in their layout.

        Args:
            values: (n, ...) of the layer as the graph holds it, or the network's input.
            classes: (n,).
        """
        raws, gradients = [], []
        for start in range(0, len(values), self.batch_size):
            part, chosen = values[start : start + self.batch_size], classes[start : start + self.batch_size]
            rows = len(part)
            if self.whole and rows < self.batch_size:
                missing = self.batch_size - rows
                part = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
                chosen = np.append(chosen, np.repeat(chosen[:1], missing))
            feeds = {self.inlet: np.ascontiguousarray(part, self.dtype), TARGETS: chosen.astype(np.int64)[:, None]}
            raw, gradient = self.session.run(feeds, [self.scores, self.gradient])
            raws.append(raw.reshape(len(raw), -1)[:rows])
            gradients.append(gradient[:rows])
        return np.concatenate(raws), np.concatenate(gradients)


@dataclass(frozen=True, slots=True)
class Passes:
    """What a run's graph does besides: `observe` goes with every image, `through` and `head` are what rows may take."""

    observe: Pass | None = None
    through: Mapping[Request, Pass] = field(default_factory=dict)
    head: Head | None = None


def open_passes(
    loaded: Loaded,
    session: Session,
    targets: Sequence[Target],
    batch_size: int,
    threads: int | None = None,
    budget: int = BUDGET,
) -> Passes:
    """Make and open what the run's methods need for these targets; nothing where the network alone is enough.

    They run on the session's own backend; backward passes in fp32 whatever its precision, and not on a provider that is
    known to get them wrong.

    Args:
        batch_size: rows per call, at most: as many as `budget` allows.
        budget: bytes that may be held of the values on the way, by `row_bytes`.

    Raises:
        InputError: an operator of the model has no rule, or there are too many targets.
        BackendError: the runtime refuses a graph.
    """
    check_targets(loaded, targets)
    observed = requests_of(loaded, loaded.calls, "backward")
    taken = requests_of(loaded, loaded.calls, "through")
    head = _open_head(loaded, session, batch_size, threads) if loaded.needs_head else None
    if not observed and not taken:
        return Passes(head=head)
    opener = _Opener(loaded, session.backend, session.provider, batch_size, threads, budget, device_of(session))
    count, ranks = _targets(targets)
    layers = tuple(tap for tap in (_tap(loaded, name) for name in layers_of(loaded)) if tap is not None)
    observe = opener.open(observed, count, ranks, layers) if observed else None
    return Passes(observe, {request: opener.open((request,), 1, 0) for request in taken}, head)


def graphs_to_build(
    loaded: Loaded, backend: str, provider: str, targets: Sequence[Target], batch_size: int
) -> Iterator[tuple[str, bytes, Profile]]:
    """What `open_passes` would open on a backend to follow scores back: a name, the serialized graph and how it is run.

    Raises:
        InputError: an operator of the model has no rule.
    """
    opener = _Opener(loaded, backend, provider, batch_size)
    observed = requests_of(loaded, loaded.calls, "backward")
    count, ranks = _targets(targets)
    if observed:
        layers = tuple(tap for tap in (_tap(loaded, name) for name in layers_of(loaded)) if tap is not None)
        made = opener.make(observed, count, ranks, layers)
        yield "observation", made.data, made.profile
    for number, request in enumerate(requests_of(loaded, loaded.calls, "through"), 1):
        made = opener.make((request,), 1, 0)
        yield f"rows {number}", made.data, made.profile


def check_targets(loaded: Loaded, targets: Sequence[Target]) -> None:
    """Refuse more targets than one graph has ways back for.

    Raises:
        InputError: names the method, and what explains every class at once.
    """
    count, _ = _targets(targets)
    back = [call.method.name for call in loaded.calls if call.method.backward(loaded.facts, call.parameters)]
    if back and count > MOST_WAYS:
        raise InputError(
            f"{count} targets: method {back[0]} follows each back by itself, and {MOST_WAYS} are the most; l-cam and "
            "cam explain every class in one pass"
        )


def _targets(targets: Sequence[Target]) -> tuple[int, int]:
    """Classes per image, and the greatest rank that is asked for."""
    ranks = max((max(target.count, 1) for target in targets if target.kind in ("predicted", "top")), default=0)
    return sum(target.count for target in targets), ranks


def row_bytes(graph: Graph, requests: Sequence[Request], targets: int) -> int:
    """About how many bytes an image needs on the way back: every value behind the shallowest end is held, and each way
    of each target has values of its own beside them, relevance about twice as many as a gradient.
    """
    whole = {request: _bytes_behind(graph, request.at or graph.image) for request in requests}
    ways: dict[tuple[str, ...], int] = {}
    for request, size in whole.items():
        key = same_pass(request)
        ways[key] = max(ways.get(key, 0), (2 if request.kind == "relevance" else 1) * size)
    return max(whole.values(), default=0) + targets * sum(ways.values())


def _bytes_behind(graph: Graph, end: str) -> int:
    """The size of one row of all values that depend on `end`."""
    behind = graph.dependents([end]) & graph.shapes.keys()
    counts = (math.prod(size or 1 for size in graph.shapes[name]) for name in behind)
    return sum(counts) * np.dtype(graph.dtype).itemsize


def _open_head(loaded: Loaded, session: Session, batch_size: int, threads: int | None) -> Head:
    """The graph behind the layer, in the session's own arithmetic."""
    tap = loaded.tap
    if tap is None:
        raise ValueError("a method runs the head alone, and there is no layer")
    fixed = batch_size == loaded.model.input.batch
    proto = onnx.ModelProto.FromString(loaded.serialized(dynamic=not fixed))
    (h, w), n = tap.grid, batch_size if fixed else "N"
    sizes: dict[str, int | str] = {"n": n, "c": tap.channels, "h": h, "w": w, "t": h * w}
    kind = np.dtype(np.float16 if loaded.own_precision == "fp16" else np.float32)
    shape = [sizes[letter] for letter in tap.layout]
    try:
        head = head_of(proto, tap.name, [loaded.scores], shape, helper.np_dtype_to_tensor_dtype(kind))
    except ModelError as err:
        raise InputError(f"{loaded.model.path.name}: {err}") from None
    profile = Profile(batch_size, session.precision, session.provider, threads, device=device_of(session))
    opened = open_session(session.backend, head.SerializeToString(), profile)
    return Head(opened, tap, loaded.scores, kind, batch_size)


def open_entropy(
    loaded: Loaded,
    session: Session,
    at: Tap | None,
    batch_size: int,
    free: bool = True,
    threads: int | None = None,
    budget: int = BUDGET,
) -> EntropyPass:
    """Open the way from a layer, or from the image where `at` is None, to the classes' cross-entropy and back.

    Args:
        session: what runs the network; the way back runs on its backend, in fp32.
        batch_size: rows per call, at most: as many as `budget` allows.
        free: whether the batch axis can be opened; where not, it is `batch_size` always.

    Raises:
        InputError: an operator of the model has no rule, or values go around the layer.
        BackendError: the runtime refuses the graph.
    """
    start = "cross-entropy-sigmoid" if loaded.posterior == "sigmoid" else "cross-entropy"
    request = Request(at=at.name if at else "", start=start)
    opener = _Opener(loaded, session.backend, session.provider, batch_size, threads, budget, device_of(session), free)
    made = opener.make((request,), 1, 0)
    gradient, shape = made.outputs[0].values[0], made.graph.shape(made.graph.image)
    last = shape[1:] == (*loaded.facts.size, loaded.spec.input_size[0])
    dtype = np.dtype(loaded.model.input.dtype)
    whole = made.graph.shape(made.graph.input)[0] is not None or not session.flexible
    data, inlet = made.data, loaded.model.input.name
    if at is not None:
        inlet, dtype = at.name, made.graph.dtype
        rows: list[int | str] = ["N" if size is None else size for size in made.graph.shape(at.name)]
        kind, proto = helper.np_dtype_to_tensor_dtype(dtype), onnx.ModelProto.FromString(made.data)
        try:
            head = head_of(proto, at.name, [loaded.scores, gradient], rows, kind, [TARGETS])
        except ModelError as err:
            raise InputError(f"{loaded.model.path.name}: {err}") from None
        data = head.SerializeToString()
    opened = open_session(session.backend, data, made.profile)
    return EntropyPass(opened, inlet, gradient, loaded.scores, dtype, made.profile.batch_size, whole, last)


def row_seconds(passes: Passes, batch: Array) -> tuple[float, float, float]:
    """Seconds per row of the observation's pass, of the slowest pass back that rows take, and of the head."""
    observe = _row_seconds(passes.observe, batch) if passes.observe else 0.0
    through = max((_row_seconds(taken, batch) for taken in passes.through.values()), default=0.0)
    return observe, through, _head_seconds(passes.head) if passes.head else 0.0


def _head_seconds(head: Head) -> float:
    features = np.zeros((head.batch_size, head.tap.channels, *head.tap.grid), np.float32)
    start = time.perf_counter()
    head.run(features)
    return (time.perf_counter() - start) / len(features)


def _row_seconds(taken: Pass, batch: Array) -> float:
    images = batch[: taken.batch_size]
    targets = np.zeros((len(images), taken.targets), np.int64)
    starts = None
    if taken.start is not None:
        tap = taken.start[0]
        starts = np.zeros((len(images), tap.channels, *tap.grid), np.float32)
    start = time.perf_counter()
    taken.run(images, targets, starts)
    return (time.perf_counter() - start) / len(images)


def layers_of(loaded: Loaded) -> tuple[str, ...]:
    """The layers that the methods read besides the tap, each once."""
    return tuple(
        dict.fromkeys(name for call in loaded.calls for name in call.method.layers(loaded.facts, call.parameters))
    )


def requests_of(loaded: Loaded, calls: Iterable[MethodCall], kind: str) -> tuple[Request, ...]:
    """What some methods ask of the observation ("backward") or of their rows ("through"), each once."""
    asked = [request for call in calls for request in getattr(call.method, kind)(loaded.facts, call.parameters)]
    return tuple(dict.fromkeys(asked))


@dataclass(frozen=True, slots=True)
class _Made:
    """A backward graph, and how it is run."""

    data: bytes
    profile: Profile
    outputs: tuple[Outputs, ...]
    graph: Graph


class _Opener:
    def __init__(
        self,
        loaded: Loaded,
        backend: str,
        provider: str,
        batch_size: int,
        threads: int | None = None,
        budget: int = BUDGET,
        device: int = 0,
        free: bool = True,
    ) -> None:
        self._loaded, self._backend, self._threads, self._device = loaded, backend, threads, device
        self._provider = FORWARD_ONLY.get(provider, provider)
        self._budget = budget
        self._batch_size = batch_size
        self._keep = [loaded.tap] if loaded.tap else []
        self._static = batch_size if not free or batch_size in (1, loaded.model.input.batch) else None
        self._graphs: dict[tuple[bool, tuple[str, ...]], Graph] = {}

    def make(self, requests: Sequence[Request], targets: int, ranks: int, layers: tuple[Tap, ...] = ()) -> _Made:
        loaded = self._loaded
        names = list(dict.fromkeys(tap.name for tap in (*self._keep, *layers)))
        graph = canonical(loaded, requests, names, self._static, self._graphs)
        portable = (self._backend, self._provider) in PORTABLE
        built = build_for(loaded, graph, requests, targets, ranks, names, portable)
        size = self._batch_size
        if self._static is None:
            size = max(1, min(size, self._budget // max(1, row_bytes(graph, requests, targets))))
        profile = Profile(size, "fp32", self._provider, self._threads, lean=True, device=self._device)
        return _Made(built.proto.SerializeToString(), profile, built.outputs, graph)

    def open(self, requests: Sequence[Request], targets: int, ranks: int, layers: tuple[Tap, ...] = ()) -> Pass:
        loaded = self._loaded
        made = self.make(requests, targets, ranks, layers)
        session = open_session(self._backend, made.data, made.profile)
        graph, outputs = made.graph, dict(zip(requests, made.outputs, strict=True))
        ends = {request: _tap(loaded, request.at) for request in requests}
        tap = loaded.tap
        last = graph.shape(graph.image)[1:] == (*loaded.facts.size, loaded.spec.input_size[0])
        start = next((_tap(loaded, request.start_at) for request in requests if request.start_at), None)
        begins = None if start is None else (start, _tokens(start, graph.shape(start.name)))
        size, image = made.profile.batch_size, loaded.model.input.name
        return Pass(session, image, last, loaded.scores, tap, outputs, ends, size, begins, layers)


def canonical(
    loaded: Loaded,
    requests: Sequence[Request],
    keep: Sequence[str],
    batch: int | None,
    known: dict[tuple[bool, tuple[str, ...]], Graph],
) -> Graph:
    """The model in the form that these requests are built on; kept in `known`."""
    fold = _folds(requests)
    values = [name for request in requests for name in (request.at, request.start_at) if name]
    kept = tuple(dict.fromkeys([*keep, *values]))
    if (fold, kept) not in known:
        known[fold, kept] = canonize(loaded.model, loaded.facts.size, loaded.scores, kept, batch=batch, fold_norm=fold)
    return known[fold, kept]


def build_for(
    loaded: Loaded,
    graph: Graph,
    requests: Sequence[Request],
    targets: int,
    ranks: int,
    keep: Sequence[str],
    portable: bool = False,
) -> Built:
    """`backward.build`, with refusals in the user's terms.

    Raises:
        InputError: an operator of the model has no rule.
    """
    try:
        return build(graph, requests, targets, ranks, keep, portable, loaded.bounds)
    except ModelError as err:
        raise InputError(f"{loaded.model.path.name}: no backward graph: {err}") from None


def check_backward(loaded: Loaded, known: dict[Request, str | None] | None = None) -> None:
    """Build every backward graph that the methods need, without weights: quick, and it says what can't be built.

    Args:
        known: what earlier calls found out, where one model is asked for many methods.

    Raises:
        InputError: an operator of the model has no rule; names a layer from which the way back is free, if one is.
    """
    known = {} if known is None else known
    file = loaded.model.path.name
    for call in loaded.calls:
        for request in requests_of(loaded, [call], "backward") + requests_of(loaded, [call], "through"):
            if request not in known:
                reason = _refusal(loaded, request)
                known[request] = None if reason is None else f"{reason}; {_way_out(loaded, request)}"
            if known[request] is not None:
                raise InputError(f"{file}: method {call.method.name} can't run: {known[request]}")


def _refusal(loaded: Loaded, request: Request) -> str | None:
    keep = [name for name in (request.at, request.start_at) if name]
    reason = None
    for batch in (None, loaded.model.input.batch or 1):  # where the axis can't be open, the run will have it fixed
        try:
            graph = canonize(
                loaded.model,
                loaded.facts.size,
                loaded.scores,
                keep,
                batch=batch,
                fold_norm=_folds((request,)),
                hollow=True,
            )
            build(graph, (request,), 1, 1, [], bounds=loaded.bounds)
        except ModelError as err:
            reason = reason or f"no backward graph: {err}"
        else:
            return None
    return reason


def _way_out(loaded: Loaded, request: Request) -> str:
    """What a user can do where a request is refused: the layer nearest to the scores, if the way to it is free."""
    whole = [tap.name for tap in loaded.facts.layers if not tap.prefix]  # after attention, class tokens read no place
    last = whole[-1] if whole else request.at
    if request.start_at or request.at == last or _refusal(loaded, replace(request, at=last)) is not None:
        return "score-cam and rise need no way back"
    if request.at:
        return f"the way to layer {last} is free: --layer {last}"
    return f"the way to layer {last} is free, for methods that stop at a layer (grad-cam, lrp:at=layer)"


def _folds(requests: Sequence[Request]) -> bool:
    """Whether normalisation is folded for these: not where a composite passes over it."""
    return all(COMPOSITES[request.composite].fold_norm for request in requests if request.composite)


def _tokens(tap: Tap, shape: tuple[int | None, ...]) -> int:
    return int(shape[tap.layout.index("t")] or 0) if "t" in tap.layout else 0


def _tap(loaded: Loaded, at: str) -> Tap | None:
    return next(tap for tap in loaded.facts.layers if tap.name == at) if at else None

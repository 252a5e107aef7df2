"""schedule -> paint -> run -> scatter -> combine: from images to raw saliency maps, over one open model."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import BackendError, HeatmillError, InputError, ModelError
from ..kernels import finish, foreign, host
from ..kernels.device import Driver
from ..models.graph.precision import HALF
from ..models.preprocess import ImageRefused, decode, denormalise, normalise, view
from ..models.spec import ModelSpec
from ..models.superpixels import Segmentation, cut
from .backends import DeviceSession, Session, device_of, first_line, open_driver
from .canvas import DeviceCanvas, HostCanvas, Ran, Wish, random_key
from .coincide import Asked, joined
from .opening import Loaded, blank_batch, load, open_best
from .passes import Passed, Passes, open_passes
from .schedule import HEAD, NETWORK, OBSERVE, Batch, Run, Scheduler
from .trial import try_model
from .types import (
    Bank,
    Combined,
    Expansion,
    Explanation,
    Item,
    MethodCall,
    Observation,
    Returned,
    Summed,
    TapBank,
    Target,
    parse_targets,
    target_rows,
)

Array = npt.NDArray[Any]

SPARE_ROWS = 8  # of a batch of the engine that does lost images again: there is little room beside the other

log = logging.getLogger("heatmill")


@dataclass(slots=True)
class Stages:
    """Where the time went, in seconds, and what was run."""

    prepare: float = 0.0
    perturb: float = 0.0
    network: float = 0.0
    score: float = 0.0
    combine: float = 0.0
    batches: int = 0
    rows: int = 0
    slots: int = 0


@dataclass(slots=True)
class _State:
    item: Item
    targets: list[tuple[int, str]] = field(default_factory=list)
    raw: Array | None = None
    observations: dict[int, Observation] = field(default_factory=dict)
    expansions: dict[int, Expansion] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)  # by the first of the methods that take from it
    segments: dict[Segmentation, Array] = field(default_factory=dict)
    results: dict[int, Array] = field(default_factory=dict)
    combined: dict[int, Combined] = field(default_factory=dict)
    left: int = 0


class Engine:
    """The loop: keeps batches full with the observations and perturbed rows of many images.

    Args:
        loaded: the model.
        session: opened on `loaded.serialized(...)`.
        targets: the classes asked of every image.
        batch_size: rows per call of the network.
        seed: of the random masks and noise.
        on_batch: called after every batch with its number of rows.
        passes: `open_passes` for the same targets, where a method needs a backward graph.
        spare: makes the engine that an image goes through again where this one gave a value that is not finite.
    """

    def __init__(
        self,
        loaded: Loaded,
        session: Session,
        targets: Sequence[Target],
        batch_size: int,
        seed: int = 0,
        on_batch: Callable[[int], None] = lambda rows: None,
        passes: Passes | None = None,
        spare: Callable[[], Engine] | None = None,
    ) -> None:
        self.loaded = loaded
        self.session = session
        self.targets = tuple(targets)
        self.batch_size = batch_size
        self.passes = passes or Passes()
        self.stages = Stages()
        self._on_batch = on_batch
        self._make_spare = spare
        self._spare: Engine | None = None
        self._seed = seed
        self._flexible = session.flexible and loaded.model.input.batch != batch_size
        facts = loaded.facts
        calls = loaded.calls
        self._shared = [
            call.method.share(facts, call.parameters, seed) if call.method.share else None for call in calls
        ]
        self._asked = [call.method.backward(facts, call.parameters) for call in calls]
        self._notes = [self._told(call) for call in calls]
        self._expected = sum(call.method.passes(facts, call.parameters) for call in calls)
        self._lanes: dict[Hashable, int] = {request: taken.batch_size for request, taken in self.passes.through.items()}
        if self.passes.head:
            self._lanes[HEAD] = self.passes.head.batch_size
        if self._lanes or self.passes.observe:
            self._lanes[OBSERVE] = self.passes.observe.batch_size if self.passes.observe else batch_size
        head = self.passes.head
        taps = (head.batch_size, head.tap.channels, *head.tap.grid) if head else (0,)
        self._host = HostCanvas(loaded, session, max([batch_size, *self._lanes.values()]), taps, seed)
        self._canvas: HostCanvas | DeviceCanvas = self._host
        if isinstance(session, DeviceSession):
            self._canvas = DeviceCanvas(loaded, session, batch_size, self._host)
        self._states: dict[Hashable, _State] = {}

    def _told(self, call: MethodCall) -> dict[str, str]:
        """What a row says of the rules that its backward passes took."""
        facts, values = self.loaded.facts, call.parameters
        used = [(self.passes.observe, request) for request in call.method.backward(facts, values)]
        used += [(self.passes.through.get(request), request) for request in call.method.through(facts, values)]
        notes = dict.fromkeys(note for taken, request in used if taken for note in taken.requests[request].notes)
        others = {taken.session.provider for taken, _ in used if taken} - {self.session.provider}
        notes |= dict.fromkeys(f"the way back ran on provider {name}" for name in sorted(others))
        return {"note": "; ".join(notes)} if notes else {}

    def stream(self, items: Iterable[Item]) -> Iterator[Explanation]:
        """Explanations of all items: an item's methods and targets come together, items as they finish.

        Items are drawn one by one, when the batches need them: memory does not grow with their number.
        """
        scheduler = Scheduler(self.batch_size, self._expected, self._lanes)
        source = iter(items)
        flying: deque[tuple[Batch, Ran]] = deque()
        exhausted = False
        while True:
            start = time.perf_counter()
            while not exhausted and scheduler.wants_images:
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                if item.key in self._states:
                    raise ValueError(f"item {item.key!r} was given twice")
                self._states[item.key] = _State(item, segments=dict(item.segments))
                scheduler.add_image(item.key)
            self.stages.prepare += time.perf_counter() - start
            batch = scheduler.next_batch(full=bool(flying))
            if batch is not None:
                flying.append((batch, self._submit(batch)))
            elif not flying:
                break
            ahead = self._canvas.ahead if batch is not None and self._alone(batch) else 0
            while len(flying) > ahead:
                yield from self._collect(scheduler, *flying.popleft())
        self.stages.slots += scheduler.slots_issued

    def _alone(self, batch: Batch) -> bool:
        """Whether a batch goes through the network alone."""
        return batch.lane == NETWORK or (batch.lane == OBSERVE and self.passes.observe is None)

    def _submit(self, batch: Batch) -> Ran:
        """Paint a batch and run it, or queue it."""
        alone = self._alone(batch)
        canvas = self._canvas if alone else self._host
        start = time.perf_counter()
        wishes: list[Wish] = []
        for run in batch.runs:
            if run.observe:
                canvas.put(run.slot, self._states[run.key].item.image)
                continue
            key, method = run.key
            state, rows = self._states[key], slice(run.start, run.stop)
            name, features = self.loaded.calls[method].method.name, state.observations[method].features
            canvas.paint(run.slots, state.item, state.asked[method], rows, name, features)
            if alone:
                wishes += [(run.slots, *self._wanted_of(state, taker)) for taker in state.asked[method].takers]
        painted = time.perf_counter()
        self.stages.perturb += painted - start
        rows_filled = max(run.slots.stop for run in batch.runs)
        if alone:
            size = rows_filled if self._flexible else batch.size
            ran: Ran = canvas.run(size, wishes, any(run.observe for run in batch.runs))
        else:
            ran = self._passed(batch, rows_filled)
        self.stages.network += time.perf_counter() - painted
        self.stages.batches += 1
        self.stages.rows += rows_filled
        return ran

    def _collect(self, scheduler: Scheduler, batch: Batch, ran: Ran) -> Iterator[Explanation]:
        """Take in what a batch gave."""
        start = time.perf_counter()
        ran.wait()
        clock = [time.perf_counter()]
        self.stages.network += clock[0] - start
        finished: list[Hashable] = []
        for run in batch.runs:
            if run.observe:
                finished += self._observe(scheduler, run, ran.alone(run.slot))
            elif batch.lane in (NETWORK, HEAD):
                finished += self._score(scheduler, run, ran)
            elif isinstance(ran, Passed):
                finished += self._sum(scheduler, run, ran)
        clock.append(time.perf_counter())
        done = [explanation for key in finished for explanation in self._explained(key)]
        clock.append(time.perf_counter())
        self.stages.score += clock[1] - clock[0]
        self.stages.combine += clock[2] - clock[1]
        self._on_batch(max(run.slots.stop for run in batch.runs))
        yield from done

    def _passed(self, batch: Batch, rows: int) -> Passed:
        """Run a batch of another lane than the network's through its graph."""
        head = self.passes.head
        if batch.lane == HEAD and head is not None:
            size = rows if self._flexible and head.session.flexible else batch.size
            return Passed(head.run(self._host.taps[:size]), np.empty((size, 0), np.int64), None, {})
        chosen = self.passes.observe if batch.lane == OBSERVE else self.passes.through[batch.lane]  # type: ignore[index]
        if chosen is None:
            raise RuntimeError(f"no graph for lane {batch.lane!r}")
        size = rows if self._flexible and chosen.session.flexible else batch.size
        targets = np.zeros((size, chosen.targets), int)
        starts: Array | None = None
        for run in batch.runs:
            if run.observe:
                targets[run.slot] = self._wanted(self._states[run.key].item)
                continue
            key, method = run.key
            state = self._states[key]
            expansion, taken = state.expansions[method], slice(run.start, run.stop)
            targets[run.slots, 0] = state.observations[method].targets[_of(expansion)[taken]]
            if expansion.starts is not None:
                starts = np.zeros((size, *expansion.starts.shape[1:]), np.float32) if starts is None else starts
                starts[run.slots] = expansion.starts[taken]
        return chosen.run(self._host.images[:size], targets, starts)

    def _wanted(self, item: Item) -> list[int]:
        """The targets as a backward graph takes them: classes, and -r for rank r."""
        if item.targets is not None:
            return list(item.targets)
        wanted: list[int] = []
        for target in self.targets:
            if target.kind == "top":
                wanted += [-rank for rank in range(1, target.value + 1)]
            elif target.kind == "label":
                wanted.append(_labelled(item.label))
            else:
                wanted.append(-1 if target.kind == "predicted" else target.value)
        return wanted

    def _segments(self, state: _State, wanted: tuple[Segmentation, ...]) -> tuple[Array, ...]:
        """How the image is cut; made here where it did not come with it."""
        for how in wanted:
            if how not in state.segments:
                state.segments[how] = cut(denormalise(state.item.image, self.loaded.spec), how)
        return tuple(state.segments[how] for how in wanted)

    def _observe(self, scheduler: Scheduler, run: Run, passed: Passed) -> list[Hashable]:
        """Take in an unperturbed image, the one row of `passed`, and queue what its methods ask for."""
        state = self._states[run.key]
        raw = passed.raw[0].astype(np.float32)
        features = None if passed.features is None else passed.features[0]
        state.raw = raw
        if not np.isfinite(raw).all() or (features is not None and not np.isfinite(features).all()):
            return [run.key]
        state.targets = self._resolve(raw, state.item, passed.classes[0])
        classes = np.array([target for target, _ in state.targets])
        first: dict[int, Expansion] = {}
        for method, call in enumerate(self.loaded.calls):
            returned = tuple(
                Returned(passed.returned[request].values[0], passed.returned[request].kept[0])
                for request in self._asked[method]
            )
            image = self._channels_first(state.item.image)
            segments = self._segments(state, call.method.superpixels(call.parameters))
            key = random_key(self._seed, state.item)
            names = call.method.layers(self.loaded.facts, call.parameters)
            layers = tuple(passed.layers[name][0] for name in names)
            given = state.item.given
            observation = Observation(image, raw, classes, features, returned, layers, segments, key, given)
            state.observations[method] = observation
            if not all(np.isfinite(found.values).all() for found in returned):
                state.expansions[method] = Expansion()  # without a map, its rows are nonfinite
                continue
            first[method] = call.method.expand(self.loaded.facts, observation, call.parameters, self._shared[method])
        self._expand(scheduler, state, first)
        return [] if state.left else [run.key]

    def _expand(self, scheduler: Scheduler, state: _State, expansions: Mapping[int, Expansion]) -> None:
        """Queue what methods ask for, equal rows of theirs once; what needs no row is combined at once."""
        banks: dict[int, tuple[Bank, str]] = {}
        for method, first in expansions.items():
            expansion = self._settled(state, method, first)
            if expansion is None:
                continue
            state.left += 1
            if expansion.through is None and expansion.bank is not None and not isinstance(expansion.bank, TapBank):
                banks[method] = (expansion.bank, expansion.baseline)
                continue
            state.asked[method] = Asked(expansion.bank, expansion.baseline, {method: None})
            scheduler.add_rows((state.item.key, method), _rows(expansion), expansion.through or HEAD)
        for group in joined(banks):
            method = next(iter(group.takers))
            state.asked[method] = group
            scheduler.add_rows((state.item.key, method), len(group))

    def _settled(self, state: _State, method: int, expansion: Expansion | None) -> Expansion | None:
        """Combine what needs no rows; the expansion that does, with room for what they give."""
        while expansion is not None:
            state.expansions[method] = expansion
            rows = _rows(expansion)
            if rows and expansion.through is not None:
                state.results.pop(method, None)  # the shape of the sums comes with the first row
                return expansion
            state.results[method] = np.zeros((len(_asked(state, method)), rows), dtype=np.float32)
            if rows:
                return expansion
            expansion = self._combine(state, method)
        return None

    def _combine(self, state: _State, method: int) -> Expansion | None:
        """Combine what a method's rows gave; returns the next rows where it wants more."""
        call, results = self.loaded.calls[method], state.results[method]
        observation, expansion = state.observations[method], state.expansions[method]
        if np.isfinite(results).all():
            combined = call.method.combine(self.loaded.facts, observation, expansion, results, call.parameters)
            if isinstance(combined, Expansion):
                return combined
            if isinstance(combined, Summed):
                combined = Combined(self._canvas.sums(combined), tuple({} for _ in combined.weights))
            state.combined[method] = combined
        return None

    def _resolve(self, raw: Array, item: Item, classes: Array) -> list[tuple[int, str]]:
        """The class and source of each target; a backward graph has already said which classes it took."""
        sources = [source for _, source in target_rows(self.targets, item.label)]
        if len(classes):
            return [(int(found), source) for found, source in zip(classes, sources, strict=True)]
        ranked = np.argsort(-raw, kind="stable")
        wanted = [int(ranked[-target - 1]) if target < 0 else target for target in self._wanted(item)]
        return list(zip(wanted, sources, strict=True))

    def _score(self, scheduler: Scheduler, run: Run, ran: Ran) -> list[Hashable]:
        """Give some rows' scores to every method that takes from them."""
        key, first = run.key
        state = self._states.get(key)
        takers = state.asked[first].takers if state is not None else {}
        if state is None or not takers:  # they were given up while these rows were on their way
            return []
        for method, places in list(takers.items()):
            scores = ran.scores(run.slots, *self._wanted_of(state, method))
            if places is None:
                state.results[method][:, run.start : run.stop] = scores
            else:
                rows = np.flatnonzero((places >= run.start) & (places < run.stop))
                scores = scores[:, places[rows] - run.start]
                state.results[method][:, rows] = scores
            if not np.isfinite(scores).all():
                self._drop(scheduler, run.key, method)
        return self._folded(scheduler, run)

    def _wanted_of(self, state: _State, method: int) -> tuple[Array, str]:
        """The classes and the kind of score that a method's rows are asked for."""
        kind = self.loaded.posterior if state.expansions[method].score == "posterior" else "none"
        return _asked(state, method), kind

    def _sum(self, scheduler: Scheduler, run: Run, passed: Passed) -> list[Hashable]:
        """Add what came back for some rows to their targets' sums."""
        key, method = run.key
        state, call = self._states[key], self.loaded.calls[method]
        expansion = state.expansions[method]
        (returned,) = passed.returned.values()
        of = _of(expansion)
        for row, slot in zip(range(run.start, run.stop), range(run.slots.start, run.slots.stop), strict=True):
            value = returned.values[slot, 0]
            if call.method.read is not None:
                shown = Observation(
                    image=self._channels_first(self._host.images[slot]),
                    raw=passed.raw[slot],
                    targets=state.observations[method].targets[of[row] : of[row] + 1],
                    features=None if passed.features is None else passed.features[slot],
                    returned=(Returned(returned.values[slot], returned.kept[slot]),),
                )
                value = call.method.read(self.loaded.facts, shown, row, expansion, call.parameters)
            if method not in state.results:
                state.results[method] = np.zeros((len(state.targets), *value.shape), dtype=np.float64)
            weight = 1.0 if expansion.weights is None else float(expansion.weights[row])
            state.results[method][of[row]] += weight * value
        if not np.isfinite(state.results[method]).all():
            self._drop(scheduler, run.key, method)
        return self._folded(scheduler, run)

    def _drop(self, scheduler: Scheduler, asked: tuple[Hashable, int], method: int) -> None:
        """No map can come of a method any more; its request ends where no other takes from it."""
        key, first = asked
        state = self._states[key]
        state.results[method][:] = np.nan
        state.left -= 1
        del state.asked[first].takers[method]
        if not state.asked[first].takers:
            scheduler.cancel(asked)

    def _folded(self, scheduler: Scheduler, run: Run) -> list[Hashable]:
        """After some rows of a request: which image is finished by them."""
        key, first = run.key
        state = self._states[key]
        takers = state.asked[first].takers
        if takers and scheduler.complete(run):
            state.left -= len(takers)
            following = {method: self._combine(state, method) for method in takers}
            self._expand(scheduler, state, {method: asked for method, asked in following.items() if asked is not None})
        return [] if state.left else [key]

    def _channels_first(self, image: Array) -> Array:
        image = image.astype(np.float32, copy=False)
        return image if self.loaded.spec.layout == "NCHW" else image.transpose(2, 0, 1)

    def _explained(self, key: Hashable) -> Iterator[Explanation]:
        state = self._states.pop(key)
        self._canvas.forget(state.item)
        found = list(self._told_of(key, state))
        if self._make_spare is not None and any(explanation.status == "nonfinite" for explanation in found):
            found = self._done_again(state.item, found)
        yield from found

    def _done_again(self, item: Item, found: Sequence[Explanation]) -> list[Explanation]:
        """An image through the spare engine; as it was, where there is no room for one."""
        note = f"{self.session.precision} gave a value that is not finite"
        try:
            if self._spare is None and self._make_spare is not None:
                self._spare = self._make_spare()
            again = list(self._spare.stream([item])) if self._spare is not None else []
        except BackendError as err:
            self._make_spare = self._spare = None
            log.warning("%s, and it can't be done again in fp32: %s", note, err)
            return [_noted(explanation, f"{note}, nor could it be done again in fp32") for explanation in found]
        precision = "" if self._spare is None else self._spare.session.precision
        return [_noted(explanation, f"{note}; done again in {precision}") for explanation in again]

    def _told_of(self, key: Hashable, state: _State) -> Iterator[Explanation]:
        raw = state.raw
        if raw is None:
            raise RuntimeError(f"item {key!r} finished before it was observed")
        if not state.targets:
            pred = int(np.nanargmax(raw)) if np.isfinite(raw).any() else -1
            for call in self.loaded.calls:
                for target, source in target_rows(self.targets, state.item.label):
                    known = -1 if target is None else target
                    yield self._nonfinite(key, call, known, source, float("nan"), pred, float("nan"))
            return
        classes = np.array([target for target, _ in state.targets])
        pred = int(np.argmax(raw))
        posterior = host.class_scores(raw[None], np.append(classes, pred), self.loaded.posterior)[0]
        for method, call in enumerate(self.loaded.calls):
            expansion, combined = state.expansions[method], state.combined.get(method)
            for k, (target, source) in enumerate(state.targets):
                raw_map = None if combined is None else np.ascontiguousarray(combined.maps[k], dtype=np.float32)
                if combined is None or raw_map is None or not np.isfinite(raw_map).all():
                    yield self._nonfinite(key, call, target, source, float(posterior[k]), pred, float(posterior[-1]))
                    continue
                extras = {**expansion.extras, **combined.extras[k], **self._notes[method]}
                if raw_map.size and finish.flat(raw_map[None])[0]:
                    extras.setdefault("reason", "flat: every position weighs the same")
                yield Explanation(
                    key,
                    call,
                    target,
                    source,
                    float(posterior[k]),
                    pred,
                    float(posterior[-1]),
                    "ok",
                    None,
                    raw_map if raw_map.size else None,
                    extras,
                    self.loaded.facts.size,
                    combined.arrays[k] if combined.arrays else {},
                )

    def _nonfinite(
        self, key: Hashable, call: MethodCall, target: int, source: str, score: float, pred: int, pred_score: float
    ) -> Explanation:
        error = "the network gave a value that is not finite"
        size = self.loaded.facts.size
        return Explanation(key, call, target, source, score, pred, pred_score, "nonfinite", error, None, {}, size)


def in_full(
    loaded: Loaded,
    reload: Callable[[], Loaded],
    session: Session,
    targets: Sequence[Target],
    batch_size: int,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Callable[[], Engine] | None:
    """How to make an engine like that of `session` in fp32, for an image that half precision loses.

    Args:
        reload: opens the model file anew.

    Returns:
        None where the session is not in half precision, or the file has no other.
    """
    if session.precision not in HALF or loaded.own_precision != "fp32":
        return None

    def make() -> Engine:
        loaded = reload()
        rows = batch_size if batch_size == loaded.model.input.batch else min(batch_size, SPARE_ROWS)
        arguments = (loaded, session.backend, session.provider)
        device = device_of(session)
        try:
            full = open_best(*arguments, "fp32", rows, device=device)
        except BackendError:  # a provider without a switch that keeps fp32 from being tf32
            full = open_best(*arguments, "tf32", rows, device=device)
        passes = open_passes(loaded, full, targets, rows)
        loaded.release()
        return Engine(loaded, full, targets, rows, seed, on_batch, passes)

    return make


def _noted(explanation: Explanation, note: str) -> Explanation:
    told = "; ".join(filter(None, [str(explanation.extras.get("note", "")), note]))
    return replace(explanation, extras={**explanation.extras, "note": told})


def _asked(state: _State, method: int) -> Array:
    """The classes whose scores a method's rows give."""
    observation = state.observations[method]
    return np.arange(len(observation.raw)) if state.expansions[method].every_class else observation.targets


def _rows(expansion: Expansion) -> int:
    """How many passes an expansion asks for."""
    rows = expansion.bank if expansion.bank is not None else expansion.starts
    return 0 if rows is None else len(rows)


def _of(expansion: Expansion) -> Array:
    """Which target each row of a backward pass belongs to."""
    if expansion.of is None:
        raise ValueError("rows through a backward pass must say which target each belongs to")
    return expansion.of


def _labelled(label: int | None) -> int:
    if label is None:
        raise InputError("target 'label' is asked, and an image has no label")
    return label


@dataclass(frozen=True, slots=True)
class Result:
    """Maps of n images and k targets each.

    Attributes:
        maps: (n, k, h, w) float32, raw: at the tap's resolution, or the input's for pixel methods. NaN where a row's
            network output was not finite.
        targets: (n, k) classes.
        scores: (n, k) float32 posteriors of the targets on the unperturbed images.
        predictions: (n,) classes.
        statuses: (n, k) strings, `ok` or `nonfinite`.
        extras: per image and target, counts and reasons.
        arrays: per image and target, what the method gives besides maps, by name.
    """

    maps: Array
    targets: Array
    scores: Array
    predictions: Array
    statuses: Array
    extras: tuple[tuple[Mapping[str, Any], ...], ...]
    size: tuple[int, int]
    finish: tuple[str, ...]
    arrays: tuple[tuple[Mapping[str, Array], ...], ...] = ()

    def upsampled(self) -> Array:
        """The raw maps at the input's resolution, (n, k, H, W): bilinear, half-pixel centres."""
        return self._each(())

    def saliency(self) -> Array:
        """The maps (n, k, H, W) finished as the method's source shows them (ReLU, min-max, in its order)."""
        return self._each(self.finish)

    def _each(self, steps: Sequence[str]) -> Array:
        n, k, h, w = self.maps.shape
        return finish.finish(self.maps.reshape(n * k, h, w), steps, self.size).reshape(n, k, *self.size)


Image = str | Path | Array


class Explainer:
    """An open model and one method, for use from Python.

    Args:
        model: path of an ONNX file.
        method: as on the command line, `NAME[:key=value,...]`.
        layer: value or node to tap; None is the automatic choice.
        backend, provider, precision, threads: as on the command line.
        device: number of the GPU; None is the first, where the backend is on one.
        batch_size: rows per network call; "auto" measures where one image needs enough passes, else takes 32.
        preprocess, labels, output: where the spec is not found beside the file.

    Raises:
        HeatmillError: the model, the method or the backend is refused.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        method: str = "score-cam",
        layer: str | None = None,
        backend: str = "auto",
        provider: str | None = None,
        precision: str = "auto",
        batch_size: int | str = "auto",
        threads: int | None = None,
        device: int | None = None,
        seed: int = 0,
        preprocess: str | None = None,
        labels: str | Path | None = None,
        output: str | None = None,
        scores: str | None = None,
    ) -> None:
        if not isinstance(method, str):
            raise InputError(f"method {method!r}: an Explainer has one method, as text; make one for each")
        self._load: Callable[[], Loaded] = partial(
            load,
            model,
            [method],
            layer=layer,
            preprocess=preprocess,
            labels=labels,
            output=output,
            scores=scores,
        )
        self._loaded = self._load()
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
            raise InputError(f'batch_size {batch_size!r}: give "auto" or a number from 1')
        call = self._loaded.calls[0]
        if len(self._loaded.calls) > 1:
            raise InputError(f"method {method!r} stands for several; an Explainer has one")
        asked = None if isinstance(batch_size, str) else batch_size
        passes = 1 + call.method.passes(self._loaded.facts, call.parameters)
        try:
            trial, self._session = try_model(self._loaded, backend, provider, precision, asked, passes, threads, device)
        except HeatmillError:
            raise
        except Exception as err:
            raise ModelError(f"{model}: running the model failed ({first_line(err)[:300]})") from err
        self._rows, self._seed, self._threads, self._device = trial.batch_size, seed, threads, device
        self._reader: tuple[Driver, int] | None = None  # of images that lie on a GPU
        self._passes: dict[tuple[str, ...], Passes] = {}
        if self._loaded.needs_weights:
            self._passes_for((Target("predicted"),))
        else:
            self._loaded.release()

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, as found."""
        return self._loaded.spec

    def explain(
        self, images: Sequence[Image] | Array, targets: str | int | Sequence[str | int] = "predicted"
    ) -> Result:
        """Maps of some images, in order.

        Args:
            images: paths and uint8 (H, W, c) pictures, which are preprocessed by the spec; or one float array
                (n, c, H, W) in the network's own layout and units, taken as it is. Arrays may also be CuPy's, PyTorch's
                or any other's that lies on a GPU.
            targets: `predicted`, `top3`, class numbers or names; the same for every image.

        Raises:
            InputError: an image that can't be read or has the wrong shape, or an unknown target.
        """
        if isinstance(images, str | Path):
            raise InputError(f"images is a list; for one image give [{str(images)!r}]")
        found: dict[Hashable, list[Explanation]] = {}
        for explanation in self.stream(images, targets):
            found.setdefault(explanation.key, []).append(explanation)
        rows = [found[key] for key in sorted(found)]  # type: ignore[type-var]
        if not rows:
            raise InputError("no images were given")
        shape = next((e.map.shape for row in rows for e in row if e.map is not None), (1, 1))
        blank = np.full(shape, np.nan, dtype=np.float32)
        return Result(
            maps=np.array([[blank if e.map is None else e.map for e in row] for row in rows]),
            targets=np.array([[e.target for e in row] for row in rows]),
            scores=np.array([[e.score for e in row] for row in rows], dtype=np.float32),
            predictions=np.array([row[0].pred for row in rows]),
            statuses=np.array([[e.status for e in row] for row in rows]),
            extras=tuple(tuple(e.extras for e in row) for row in rows),
            size=self._loaded.facts.size,
            finish=self._loaded.calls[0].method.finish(self._loaded.calls[0].parameters),
            arrays=tuple(tuple(e.arrays for e in row) for row in rows),
        )

    def stream(
        self, images: Iterable[Image], targets: str | int | Sequence[str | int] = "predicted"
    ) -> Iterator[Explanation]:
        """As `explain`, one explanation at a time and in bounded memory; `key` is the image's position."""
        loaded = self._loaded
        classes = loaded.model.classes or len(loaded.spec.label_names) or 2**31
        texts = [targets] if isinstance(targets, str | int | np.integer) else list(targets)
        parsed = parse_targets([str(text) for text in texts], classes, loaded.spec.label_names)
        if any(target.kind == "label" for target in parsed):
            raise InputError("target 'label' needs a manifest (heatmill explain); give the class here")
        spare = in_full(loaded, self._load, self._session, parsed, self._rows, self._seed)
        passes = self._passes_for(parsed)
        engine = Engine(loaded, self._session, parsed, self._rows, self._seed, passes=passes, spare=spare)
        return engine.stream(Item(i, self._input(i, image)) for i, image in enumerate(images))

    def _passes_for(self, targets: Sequence[Target]) -> Passes:
        """The backward graphs for as many targets and ranks as these; made once for each."""
        if not self._loaded.needs_weights:
            return Passes()
        key = tuple(target.text if target.kind in ("predicted", "top") else "class" for target in targets)
        if key not in self._passes:
            self._passes.clear()  # of one number of targets at a time: each holds the weights
            self._passes[key] = open_passes(self._loaded, self._session, targets, self._rows, self._threads)
        return self._passes[key]

    def _input(self, position: int, image: Image) -> Array:
        spec, dtype = self._loaded.spec, self._loaded.model.input.dtype
        if foreign.on_device(image):
            image = self._from_device(position, image)
        if isinstance(image, str | Path):
            try:
                image = decode(Path(image).read_bytes(), exif=spec.exif, color=spec.color)
            except (OSError, ImageRefused) as err:
                raise InputError(f"image {position}: {err}") from None
        elif not isinstance(image, np.ndarray):
            raise InputError(
                f"image {position} is a {type(image).__name__}; give a path, or an array of NumPy's or a GPU's"
            )
        elif np.issubdtype(image.dtype, np.floating):
            expected = blank_batch(self._loaded, 1).shape[1:]
            if not np.issubdtype(dtype, np.floating):
                raise InputError(f"image {position}: the network takes {dtype} pixels; give uint8 (H, W, c) pictures")
            if image.shape != expected:
                raise InputError(f"image {position} has shape {image.shape}; the network takes {expected}")
            return image.astype(dtype, copy=False)
        channels = spec.input_size[0]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
            told = f"pictures are uint8 (H, W, c) of {channels} channels, not {image.dtype} {image.shape}"
            raise InputError(f"image {position}: {told}")
        return normalise(view(image, spec)[0], spec, dtype)

    def _from_device(self, position: int, image: Any) -> Array:
        if self._reader is None:
            if isinstance(self._session, DeviceSession):
                self._reader = (self._session.driver, self._session.stream)
            else:
                driver = open_driver(self._device or 0)
                self._reader = (driver, driver.stream())
        try:
            return foreign.to_host(image, *self._reader)
        except ValueError as err:
            raise InputError(f"image {position}: {err}") from None

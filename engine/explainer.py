"""schedule -> perturb -> run -> scatter -> combine: from images to raw saliency maps, over one open model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from .. import HeatmillError, InputError, ModelError
from ..kernels import finish, host
from ..models.preprocess import ImageRefused, decode, denormalise, normalise, view
from ..models.spec import ModelSpec
from ..models.superpixels import Segmentation, cut
from .backends import Session, first_line
from .coincide import Asked, joined
from .opening import Loaded, blank_batch, load
from .passes import Passed, Passes, open_passes
from .schedule import HEAD, NETWORK, OBSERVE, Batch, Run, Scheduler
from .trial import try_model
from .types import (
    SEGMENT_MEAN,
    Bank,
    Combined,
    Expansion,
    Explanation,
    GridBank,
    Item,
    MapBank,
    MethodCall,
    Observation,
    PathBank,
    RankBank,
    Returned,
    SegmentBank,
    TapBank,
    Target,
    WindowBank,
    parse_targets,
    target_rows,
)

Array = npt.NDArray[Any]


def _black(image: Array, spec: ModelSpec) -> Array:
    pixels = np.zeros((*spec.input_size[1:], spec.input_size[0]), dtype=np.uint8)
    return normalise(pixels, spec, str(image.dtype))


def _mean(image: Array, spec: ModelSpec) -> Array:
    axes = (1, 2) if spec.layout == "NCHW" else (0, 1)
    return np.asarray(image.mean(axis=axes, keepdims=True, dtype=np.float64), dtype=np.float32)


def _blurred(image: Array, spec: ModelSpec, size: str = "51", sigma: str = "50") -> Array:
    """Kernel size and sigma are Group-CAM's where none are given."""
    kernel, deviation = int(size), float(sigma)
    if spec.layout == "NCHW":
        return host.blur(image.astype(np.float32), kernel, deviation)
    return host.blur(image.transpose(2, 0, 1).astype(np.float32), kernel, deviation).transpose(1, 2, 0)


def _rise_blurred(image: Array, spec: ModelSpec) -> Array:
    if spec.layout == "NCHW":
        return host.rise_blur(image.astype(np.float32))
    return host.rise_blur(image.transpose(2, 0, 1).astype(np.float32)).transpose(1, 2, 0)


def _segment_means(image: Array, spec: ModelSpec, segments: Array) -> Array:
    if spec.layout == "NCHW":
        return host.segment_means(image, segments)
    return host.segment_means(image.transpose(2, 0, 1), segments).transpose(1, 2, 0)


def _least(image: Array, spec: ModelSpec) -> Array:
    return np.array(image.min(), dtype=np.float32)


def _greatest(image: Array, spec: ModelSpec) -> Array:
    return np.array(image.max(), dtype=np.float32)


ROAD = "road"

BASELINES: dict[str, Callable[..., Array | None]] = {
    "zero": lambda image, spec: None,
    "black": _black,
    "mean": _mean,
    "blur": _blurred,
    "rise-blur": _rise_blurred,
    "least": _least,
    "greatest": _greatest,
}


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
    baselines: dict[Hashable, Array | None] = field(default_factory=dict)
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
    ) -> None:
        self.loaded = loaded
        self.session = session
        self.targets = tuple(targets)
        self.batch_size = batch_size
        self.passes = passes or Passes()
        self.stages = Stages()
        self._on_batch = on_batch
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
        self._buffer = blank_batch(loaded, max([batch_size, *self._lanes.values()]))
        self._masks = np.empty((len(self._buffer), *facts.size), dtype=np.float32)
        head = self.passes.head
        taps = (head.batch_size, head.tap.channels, *head.tap.grid) if head else (0,)
        self._taps = np.zeros(taps, dtype=np.float32)
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
            batch = scheduler.next_batch()
            if batch is None:
                break
            yield from self._run(scheduler, batch)
        self.stages.slots += scheduler.slots_issued

    def _run(self, scheduler: Scheduler, batch: Batch) -> Iterator[Explanation]:
        stages = self.stages
        clock = [time.perf_counter()]
        rows = max(run.slots.stop for run in batch.runs)
        for run in batch.runs:
            self._fill(run)
        clock.append(time.perf_counter())
        passed = self._passed(batch, rows)
        clock.append(time.perf_counter())
        finished: list[Hashable] = []
        for run in batch.runs:
            if run.observe:
                finished += self._observe(scheduler, run, passed)
            elif batch.lane in (NETWORK, HEAD):
                finished += self._score(scheduler, run, passed.raw[run.slots])
            else:
                finished += self._sum(scheduler, run, passed)
        clock.append(time.perf_counter())
        done = [explanation for key in finished for explanation in self._explained(key)]
        clock.append(time.perf_counter())
        stages.perturb += clock[1] - clock[0]
        stages.network += clock[2] - clock[1]
        stages.score += clock[3] - clock[2]
        stages.combine += clock[4] - clock[3]
        stages.batches += 1
        stages.rows += rows
        self._on_batch(rows)
        yield from done

    def _passed(self, batch: Batch, rows: int) -> Passed:
        """Run a batch through its lane's graph."""
        if batch.lane == NETWORK or (batch.lane == OBSERVE and self.passes.observe is None):
            tap = self.loaded.tap if any(run.observe for run in batch.runs) else None
            size = rows if self._flexible else batch.size
            names = [self.loaded.scores, *([tap.name] if tap else [])]
            outputs = self.session.run({self.loaded.model.input.name: self._buffer[:size]}, names)
            features = tap.to_nchw(outputs[1]) if tap else None
            return Passed(outputs[0].reshape(size, -1), np.empty((size, 0), np.int64), features, {})
        head = self.passes.head
        if batch.lane == HEAD and head is not None:
            size = rows if self._flexible and head.session.flexible else batch.size
            return Passed(head.run(self._taps[:size]), np.empty((size, 0), np.int64), None, {})
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
        return chosen.run(self._buffer[:size], targets, starts)

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

    def _fill(self, run: Run) -> None:
        place = self._buffer[run.slots]
        if run.observe:
            place[0] = self._states[run.key].item.image
            return
        key, method = run.key
        state = self._states[key]
        asked = state.asked[method]
        image = state.item.image
        bank, rows = asked.bank, slice(run.start, run.stop)
        if bank is None:
            place[:] = image
            return
        features = state.observations[method].features
        if isinstance(bank, TapBank) and features is not None:
            np.multiply(features, bank.masks[rows], out=self._taps[run.slots])
            return
        layout = self.loaded.spec.layout
        masks = self._masks[: run.stop - run.start]
        if isinstance(bank, RankBank):
            _rank_masks(bank, rows, masks)
        if asked.baseline == ROAD:
            noise = self._road_noise(state.item, bank, rows)
            host.impute(image, masks, noise, layout, out=place)
            return
        baseline = self._baseline(state, asked)
        if isinstance(bank, PathBank):
            masks[:] = bank.shares[rows, None, None]
            for i, draw in enumerate(bank.draws[rows]):
                start = image if draw < 0 else self._noisy(run.key, image, int(draw), bank.noise)
                host.blend(start, masks[i : i + 1], baseline, layout, out=place[i : i + 1])
            return
        if isinstance(bank, MapBank):
            host.upsample(bank.maps[rows], self.loaded.facts.size, bank.rule, out=masks)
        elif isinstance(bank, GridBank):
            host.grid_masks(bank.bits[rows], bank.offsets[rows], self.loaded.facts.size, out=masks)
        elif isinstance(bank, SegmentBank):
            host.segment_masks(bank.segments, bank.bits[rows], out=masks)
        elif isinstance(bank, WindowBank):
            host.window_masks(bank.boxes[rows], self.loaded.facts.size, out=masks)
        host.blend(image, masks, baseline, layout, out=place)

    def _baseline(self, state: _State, asked: Asked) -> Array | None:
        """What stands for absence; made once for an image, or once for each of its superpixels."""
        image, name, bank = state.item.image, asked.baseline, asked.bank
        key: Hashable = name
        if name == SEGMENT_MEAN and isinstance(bank, SegmentBank):
            key = (name, id(bank.segments))
            if key not in state.baselines:
                state.baselines[key] = _segment_means(image, self.loaded.spec, bank.segments)
        elif key not in state.baselines:
            kind, *options = name.split(":")
            state.baselines[key] = BASELINES[kind](image, self.loaded.spec, *options)
        return state.baselines[key]

    def _noisy(self, key: tuple[Hashable, int], image: Array, draw: int, share: float) -> Array:
        """The image plus a draw of Gaussian noise that depends on the seed, the image, the method and its number."""
        state, name = self._states[key[0]], self.loaded.calls[key[1]].method.name
        stream = [0, 0, crc32(name.encode()), draw]
        generator = np.random.Generator(np.random.Philox(key=self._key(state.item.identity), counter=stream))
        deviation = share * (float(image.max()) - float(image.min()))
        return np.asarray(image + deviation * generator.standard_normal(image.shape, dtype=np.float32))

    def _road_noise(self, item: Item, bank: Bank | None, rows: slice) -> Array:
        """Standard normal numbers for imputed rows; those of one image are the same for every map and order."""
        if not isinstance(bank, RankBank):
            raise ValueError("only rank masks are imputed")
        noise = np.empty((rows.stop - rows.start, *item.image.shape), dtype=np.float32)
        for out, threshold in zip(noise, bank.thresholds[rows], strict=True):
            stream = [0, 0, crc32(ROAD.encode()), int(threshold)]
            generator = np.random.Generator(np.random.Philox(key=self._key(item.identity), counter=stream))
            generator.standard_normal(dtype=np.float32, out=out)
        return noise

    def _key(self, identity: str) -> Array:
        """Philox's key for the random numbers of an image."""
        digest = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")
        return np.array([self._seed, digest], np.uint64)

    def _segments(self, state: _State, wanted: tuple[Segmentation, ...]) -> tuple[Array, ...]:
        """How the image is cut; made here where it did not come with it."""
        for how in wanted:
            if how not in state.segments:
                state.segments[how] = cut(denormalise(state.item.image, self.loaded.spec), how)
        return tuple(state.segments[how] for how in wanted)

    def _observe(self, scheduler: Scheduler, run: Run, passed: Passed) -> list[Hashable]:
        state, slot = self._states[run.key], run.slot
        raw = passed.raw[slot].astype(np.float32)
        features = None if passed.features is None else passed.features[slot].copy()
        state.raw = raw
        if not np.isfinite(raw).all() or (features is not None and not np.isfinite(features).all()):
            return [run.key]
        state.targets = self._resolve(raw, state.item, passed.classes[slot])
        classes = np.array([target for target, _ in state.targets])
        first: dict[int, Expansion] = {}
        for method, call in enumerate(self.loaded.calls):
            returned = tuple(
                Returned(passed.returned[request].values[slot].copy(), passed.returned[request].kept[slot].copy())
                for request in self._asked[method]
            )
            image = self._channels_first(state.item.image)
            segments = self._segments(state, call.method.superpixels(call.parameters))
            key = self._key(state.item.identity)
            names = call.method.layers(self.loaded.facts, call.parameters)
            layers = tuple(passed.layers[name][slot].copy() for name in names)
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

    def _score(self, scheduler: Scheduler, run: Run, raw: Array) -> list[Hashable]:
        """Give some rows' scores to every method that takes from them."""
        key, first = run.key
        state = self._states[key]
        takers = state.asked[first].takers
        for method, places in list(takers.items()):
            kind = self.loaded.posterior if state.expansions[method].score == "posterior" else "none"
            scores = host.class_scores(raw, _asked(state, method), kind).T
            if places is None:
                state.results[method][:, run.start : run.stop] = scores
            else:
                rows = np.flatnonzero((places >= run.start) & (places < run.stop))
                scores = scores[:, places[rows] - run.start]
                state.results[method][:, rows] = scores
            if not np.isfinite(scores).all():
                self._drop(scheduler, run.key, method)
        return self._folded(scheduler, run)

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
                    image=self._channels_first(self._buffer[slot]),
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


def _rank_masks(bank: RankBank, rows: slice, out: Array) -> None:
    """Masks of some rows; those of one order are made together."""
    of, thresholds = bank.of[rows], bank.thresholds[rows]
    for part in np.split(np.arange(len(of)), np.flatnonzero(np.diff(of)) + 1):
        host.rank_masks(bank.ranks[of[part[0]]], thresholds[part], out=out[part[0] : part[-1] + 1])


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
        seed: int = 0,
        preprocess: str | None = None,
        labels: str | Path | None = None,
        output: str | None = None,
        scores: str | None = None,
    ) -> None:
        if not isinstance(method, str):
            raise InputError(f"method {method!r}: an Explainer has one method, as text; make one for each")
        self._loaded = load(
            model, [method], layer=layer, preprocess=preprocess, labels=labels, output=output, scores=scores
        )
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
            raise InputError(f'batch_size {batch_size!r}: give "auto" or a number from 1')
        call = self._loaded.calls[0]
        if len(self._loaded.calls) > 1:
            raise InputError(f"method {method!r} stands for several; an Explainer has one")
        asked = None if isinstance(batch_size, str) else batch_size
        passes = 1 + call.method.passes(self._loaded.facts, call.parameters)
        try:
            trial, self._session = try_model(self._loaded, backend, provider, precision, asked, passes, threads)
        except HeatmillError:
            raise
        except Exception as err:
            raise ModelError(f"{model}: running the model failed ({first_line(err)[:300]})") from err
        self._rows, self._seed, self._threads = trial.batch_size, seed, threads
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
                (n, c, H, W) in the network's own layout and units, taken as it is.
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
        engine = Engine(loaded, self._session, parsed, self._rows, self._seed, passes=self._passes_for(parsed))
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
        if isinstance(image, str | Path):
            try:
                image = decode(Path(image).read_bytes(), exif=spec.exif, color=spec.color)
            except (OSError, ImageRefused) as err:
                raise InputError(f"image {position}: {err}") from None
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

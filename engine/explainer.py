"""schedule -> perturb -> run -> scatter -> combine: from images to raw saliency maps, over one open model."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import HeatmillError, InputError, ModelError
from ..kernels import finish, host
from ..models.preprocess import ImageRefused, decode, normalise, view
from ..models.spec import ModelSpec
from .backends import Session, first_line
from .opening import Loaded, blank_batch, load
from .schedule import Run, Scheduler
from .trial import try_model
from .types import (
    Expansion,
    Explanation,
    GridBank,
    Item,
    MapBank,
    MethodCall,
    Observation,
    Target,
    parse_targets,
    target_rows,
)

Array = npt.NDArray[Any]

BLUR = (51, 50.0)  # kernel size and sigma of the blurred baseline (Group-CAM's, METHODS section 2)


def _black(image: Array, spec: ModelSpec) -> Array:
    pixels = np.zeros((*spec.input_size[1:], spec.input_size[0]), dtype=np.uint8)
    return normalise(pixels, spec, str(image.dtype))


def _mean(image: Array, spec: ModelSpec) -> Array:
    axes = (1, 2) if spec.layout == "NCHW" else (0, 1)
    return np.asarray(image.mean(axis=axes, keepdims=True, dtype=np.float64), dtype=np.float32)


def _blurred(image: Array, spec: ModelSpec) -> Array:
    if spec.layout == "NCHW":
        return host.blur(image.astype(np.float32), *BLUR)
    return host.blur(image.transpose(2, 0, 1).astype(np.float32), *BLUR).transpose(1, 2, 0)


BASELINES: dict[str, Callable[[Array, ModelSpec], Array | None]] = {
    "zero": lambda image, spec: None,
    "black": _black,
    "mean": _mean,
    "blur": _blurred,
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
    observation: Observation | None = None
    expansions: dict[int, Expansion] = field(default_factory=dict)
    baselines: dict[str, Array | None] = field(default_factory=dict)
    scores: dict[int, Array] = field(default_factory=dict)
    left: int = 0


class Engine:
    """The loop: keeps a session's batches full with the observations and masked rows of many images.

    Args:
        loaded: the model.
        session: opened on `loaded.serialized(...)`.
        targets: the classes asked of every image.
        batch_size: rows per call.
        seed: of the random masks.
        on_batch: called after every batch with its number of rows.
    """

    def __init__(
        self,
        loaded: Loaded,
        session: Session,
        targets: Sequence[Target],
        batch_size: int,
        seed: int = 0,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.loaded = loaded
        self.session = session
        self.targets = tuple(targets)
        self.batch_size = batch_size
        self.stages = Stages()
        self._on_batch = on_batch
        self._flexible = session.flexible and loaded.model.input.batch != batch_size
        facts = loaded.facts
        calls = loaded.calls
        self._shared = [
            call.method.share(facts, call.parameters, seed) if call.method.share else None for call in calls
        ]
        self._expected = sum(call.method.passes(facts, call.parameters) for call in calls)
        self._buffer = blank_batch(loaded, batch_size)
        self._masks = np.empty((batch_size, *facts.size), dtype=np.float32)
        self._states: dict[Hashable, _State] = {}

    def stream(self, items: Iterable[Item]) -> Iterator[Explanation]:
        """Explanations of all items: an item's methods and targets come together, items as they finish.

        Items are drawn one by one, when the batches need them: memory does not grow with their number.
        """
        scheduler = Scheduler(self.batch_size, self._expected)
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
                self._states[item.key] = _State(item)
                scheduler.add_image(item.key)
            self.stages.prepare += time.perf_counter() - start
            batch = scheduler.next_batch()
            if not batch:
                break
            yield from self._run(scheduler, batch)
        self.stages.slots += scheduler.slots_issued

    def _run(self, scheduler: Scheduler, batch: tuple[Run, ...]) -> Iterator[Explanation]:
        stages, observing = self.stages, any(run.observe for run in batch)
        clock = [time.perf_counter()]
        rows = max(run.slots.stop for run in batch)
        for run in batch:
            self._fill(run)
        clock.append(time.perf_counter())
        names = [self.loaded.scores, *([self.loaded.tap.name] if self.loaded.tap and observing else [])]
        size = rows if self._flexible else self.batch_size
        outputs = self.session.run({self.loaded.model.input.name: self._buffer[:size]}, names)
        raw = outputs[0].reshape(size, -1)
        clock.append(time.perf_counter())
        finished = []
        for run in batch:
            if run.observe:
                features = self.loaded.tap.to_nchw(outputs[1][run.slots])[0].copy() if self.loaded.tap else None
                finished += self._observe(scheduler, run, raw[run.slot].astype(np.float32), features)
            else:
                finished += self._score(scheduler, run, raw[run.slots])
        clock.append(time.perf_counter())
        done = [explanation for key in finished for explanation in self._combine(key)]
        clock.append(time.perf_counter())
        stages.perturb += clock[1] - clock[0]
        stages.network += clock[2] - clock[1]
        stages.score += clock[3] - clock[2]
        stages.combine += clock[4] - clock[3]
        stages.batches += 1
        stages.rows += rows
        self._on_batch(rows)
        yield from done

    def _fill(self, run: Run) -> None:
        place = self._buffer[run.slots]
        if run.observe:
            place[0] = self._states[run.key].item.image
            return
        key, method = run.key
        state = self._states[key]
        expansion = state.expansions[method]
        masks = self._masks[: run.stop - run.start]
        bank, rows = expansion.bank, slice(run.start, run.stop)
        if isinstance(bank, MapBank):
            host.upsample(bank.maps[rows], self.loaded.facts.size, bank.rule, out=masks)
        elif isinstance(bank, GridBank):
            host.grid_masks(bank.bits[rows], bank.offsets[rows], self.loaded.facts.size, out=masks)
        image, name = state.item.image, expansion.baseline
        if name not in state.baselines:
            state.baselines[name] = BASELINES[name](image, self.loaded.spec)
        host.blend(image, masks, state.baselines[name], self.loaded.spec.layout, out=place)

    def _observe(self, scheduler: Scheduler, run: Run, raw: Array, features: Array | None) -> list[Hashable]:
        state = self._states[run.key]
        state.observation = Observation(state.item.image, raw, features)
        if not np.isfinite(raw).all() or (features is not None and not np.isfinite(features).all()):
            return [run.key]
        state.targets = self._resolve(raw, state.item.label)
        for method, call in enumerate(self.loaded.calls):
            shared = self._shared[method]
            expansion = call.method.expand(self.loaded.facts, state.observation, call.parameters, shared)
            state.expansions[method] = expansion
            rows = len(expansion.bank) if expansion.bank is not None else 0
            state.scores[method] = np.zeros((len(state.targets), rows), dtype=np.float32)
            if rows:
                scheduler.add_rows((run.key, method), rows)
                state.left += 1
        return [] if state.left else [run.key]

    def _resolve(self, raw: Array, label: int | None) -> list[tuple[int, str]]:
        ranked = np.argsort(-raw, kind="stable")
        resolved: list[tuple[int, str]] = []
        for target in self.targets:
            if target.kind == "predicted":
                resolved.append((int(ranked[0]), "predicted"))
            elif target.kind == "top":
                resolved += [(int(index), f"top{rank}") for rank, index in enumerate(ranked[: target.value], 1)]
            elif target.kind == "label":
                if label is None:
                    raise InputError("target 'label' is asked, and an image has no label")
                resolved.append((label, "label"))
            else:
                resolved.append((target.value, "class"))
        return resolved

    def _score(self, scheduler: Scheduler, run: Run, raw: Array) -> list[Hashable]:
        key, method = run.key
        state = self._states[key]
        kind = self.loaded.posterior if state.expansions[method].score == "posterior" else "none"
        classes = np.array([target for target, _ in state.targets])
        scores = host.class_scores(raw, classes, kind).T
        state.scores[method][:, run.start : run.stop] = scores
        finite = bool(np.isfinite(scores).all())
        if not finite:  # no map can come of it: its other passes are not run
            scheduler.cancel(run.key)
            state.scores[method][:] = np.nan
        if not finite or scheduler.complete(run):
            state.left -= 1
            return [] if state.left else [key]
        return []

    def _combine(self, key: Hashable) -> Iterator[Explanation]:
        state = self._states.pop(key)
        observation = state.observation
        if observation is None:
            raise RuntimeError(f"item {key!r} finished before it was observed")
        raw = observation.raw
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
            expansion, scores = state.expansions[method], state.scores[method]
            combined = call.method.combine(self.loaded.facts, observation, expansion, scores, classes, call.parameters)
            for k, (target, source) in enumerate(state.targets):
                raw_map = np.ascontiguousarray(combined.maps[k])
                if not np.isfinite(scores[k]).all() or not np.isfinite(raw_map).all():
                    yield self._nonfinite(key, call, target, source, float(posterior[k]), pred, float(posterior[-1]))
                    continue
                extras = {**expansion.extras, **combined.extras[k]}
                if finish.flat(raw_map[None])[0]:
                    extras["reason"] = "flat: every position weighs the same"
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
                    raw_map,
                    extras,
                    self.loaded.facts.size,
                )

    def _nonfinite(
        self, key: Hashable, call: MethodCall, target: int, source: str, score: float, pred: int, pred_score: float
    ) -> Explanation:
        error = "the network gave a value that is not finite"
        size = self.loaded.facts.size
        return Explanation(key, call, target, source, score, pred, pred_score, "nonfinite", error, None, {}, size)


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
    """

    maps: Array
    targets: Array
    scores: Array
    predictions: Array
    statuses: Array
    extras: tuple[tuple[Mapping[str, Any], ...], ...]
    size: tuple[int, int]
    finish: tuple[str, ...]

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
        self._loaded = load(
            model, [method], layer=layer, preprocess=preprocess, labels=labels, output=output, scores=scores
        )
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
            raise InputError(f'batch_size {batch_size!r}: give "auto" or a number from 1')
        (call,) = self._loaded.calls
        asked = None if isinstance(batch_size, str) else batch_size
        passes = 1 + call.method.passes(self._loaded.facts, call.parameters)
        try:
            trial, self._session = try_model(self._loaded, backend, provider, precision, asked, passes, threads)
        except HeatmillError:
            raise
        except Exception as err:
            raise ModelError(f"{model}: running the model failed ({first_line(err)[:300]})") from err
        self._loaded.release()
        self._rows, self._seed = trial.batch_size, seed

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
        engine = Engine(loaded, self._session, parsed, self._rows, self._seed)
        return engine.stream(Item(i, self._input(i, image)) for i, image in enumerate(images))

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

"""Metric rows beside a run's maps: what is missing is computed, block by block, and nothing else."""

from __future__ import annotations

import json
import math
import signal
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ... import IncompleteError, InputError
from ..evaluator import measuring, orders
from ..explainer import Engine
from ..metrics import parse_metrics
from ..opening import Loaded
from ..types import Array, Explanation, Item, Measured, MetricCall, Subject, nearest
from . import measures, store
from . import plan as plans
from .again import remade
from .ahead import ahead
from .job import Signals, lock
from .progress import Progress
from .store import Row
from .stored import Maps, Stored, refused, targets_of
from .table import check_slices
from .worker import Prepared

BLOCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the user asked for; every field is a flag of `heatmill evaluate`."""

    runs: tuple[Path, ...]
    metrics: tuple[str, ...] = ("standard",)
    methods: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    model: Path | None = None
    workers: int | None = None


@dataclass(slots=True)
class Evaluated:
    """How the evaluation of one run went.

    Attributes:
        methods: the calls that were evaluated.
        statuses: metric rows that there are now of what was asked, by status.
        computed: blocks of images that were evaluated now.
        shards: with maps, and of the whole run.
        stages: seconds of the engine's stages over the maps as they are, and of all of it but opening the model (wall);
            empty where nothing was computed.
    """

    run: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    statuses: dict[str, int] = field(default_factory=dict)
    computed: int = 0
    shards: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that the same methods lack, and the blocks of images that lack them: a block is one commit."""

    metrics: tuple[MetricCall, ...]
    methods: tuple[str, ...]
    blocks: tuple[range, ...]


def evaluate(job: Evaluation, style: str = "auto") -> list[Evaluated]:
    """Compute what is missing of the asked metrics; what an earlier call committed is kept.

    Args:
        style: of the progress, see `Progress`.

    Raises:
        HeatmillError: a run, a metric, a method or the model is refused; or stopped early and resumable.
        KeyboardInterrupt: interrupted; the blocks in flight are lost, the same command goes on.
    """
    metrics = parse_metrics(job.metrics)
    if not job.runs or not metrics:
        raise InputError("give a run, and a metric or preset")
    if len({path.absolute() for path in job.runs}) < len(job.runs):
        raise InputError("a run was given twice")
    opened = [store.open_run(path) for path in job.runs]
    chosen = [_chosen(run, job.methods) for run in opened]
    for asked in job.methods:
        if not any(store.names_call(asked, call) for calls in chosen for call in calls):
            known = list(dict.fromkeys(method["call"] for run in opened for method in run.settings["methods"]))
            raise InputError(f"no run has the method {asked!r}; {nearest(asked.casefold(), known)}")
    for run in opened:
        check_slices(run, job.by)
        if not store.committed(run.path):
            raise InputError(f"{run.path}: has no maps yet; heatmill explain makes them")
    with Signals() as signals:
        return [
            _resumable(run, metrics, methods, job, style, signals) for run, methods in zip(opened, chosen, strict=True)
        ]


def _resumable(
    run: store.Run,
    metrics: tuple[MetricCall, ...],
    methods: tuple[str, ...],
    job: Evaluation,
    style: str,
    signals: Signals,
) -> Evaluated:
    """One run under its lock; what ends it early says how to go on."""
    with lock(run.path):
        try:
            return _evaluate(run, metrics, methods, job, style)
        except KeyboardInterrupt:
            if signals.number in (None, signal.SIGINT):
                raise KeyboardInterrupt(f"{run.path}: interrupted; the same command resumes") from None
            name = signal.Signals(signals.number).name
            raise IncompleteError(f"{run.path}: stopped by {name}; the same command resumes") from None
        except OSError as err:
            raise IncompleteError(store.write_refusal(run.path, err)) from err


def _chosen(run: store.Run, asked: Sequence[str]) -> tuple[str, ...]:
    calls = [method["call"] for method in run.settings["methods"]]
    return tuple(call for call in calls if not asked or any(store.names_call(word, call) for word in asked))


def _evaluate(
    run: store.Run, metrics: tuple[MetricCall, ...], methods: tuple[str, ...], job: Evaluation, style: str
) -> Evaluated:
    began = time.perf_counter()
    shards = sorted(store.committed(run.path))
    groups = [group for calls in together(metrics) for group in missing(run, calls, methods, shards)]
    stages: Counter[str] = Counter()
    if groups:
        work = Stored(run, job.model, job.workers)
        with Progress(sum(len(block) for group in groups for block in group.blocks), style, "evaluating") as progress:
            if len(shards) < run.shards:
                progress.note(f"note: {run.path} has {len(shards)} of {run.shards} shards; they are evaluated")
            for group in groups:
                if group.metrics[0].metric.again is None:
                    measure(work, group, progress, stages)
                else:
                    measure_again(work, group, progress)
    table = measures.read(run, [call.text for call in metrics], methods)
    return Evaluated(
        run=str(run.path),
        methods=methods,
        metrics=tuple(call.text for call in metrics),
        statuses=dict(sorted(Counter(table["status"].to_pylist()).items())),
        computed=sum(len(group.blocks) for group in groups),
        shards=(len(shards), run.shards),
        seconds=time.perf_counter() - began,
        stages={name: round(value, 4) for name, value in stages.items()},
    )


def together(metrics: Sequence[MetricCall]) -> list[tuple[MetricCall, ...]]:
    """What is computed together: the metrics of maps as they are, and each of maps made again."""
    plain = tuple(call for call in metrics if call.metric.again is None)
    return [*([plain] if plain else []), *((call,) for call in metrics if call.metric.again is not None)]


def missing(
    run: store.Run, metrics: Sequence[MetricCall], methods: Sequence[str], shards: Sequence[int]
) -> list[Group]:
    """What is still to be computed, in blocks of images of about BLOCK_SECONDS."""
    whole, step = int(run.settings["shard_rows"]), block_rows(run, metrics, methods)
    have: dict[tuple[str, str, int], list[range]] = defaultdict(list)
    for pair, blocks in measures.done(run, metrics).items():
        for block in blocks:
            have[*pair, block.start // whole].append(block)
    lacking: dict[tuple[int, int], dict[str, list[MetricCall]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards:
        end = min((shard + 1) * whole, int(run.settings["images"]))
        for start in range(shard * whole, end, step):
            for method in methods:
                for call in metrics:
                    for block in uncovered(range(start, start + step), have[call.text, method, shard]):
                        if block.start < end:
                            lacking[block.start, min(block.stop, end)][method].append(call)
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[range]] = {}
    for place, by_method in sorted(lacking.items()):
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for method, calls in by_method.items():
            alike[tuple(call.text for call in calls)].append(method)
        for texts, names in alike.items():
            groups.setdefault((texts, tuple(names)), []).append(range(*place))
    by_text = {call.text: call for call in metrics}
    return [
        Group(tuple(by_text[text] for text in texts), names, tuple(found)) for (texts, names), found in groups.items()
    ]


def uncovered(block: range, done: Sequence[range]) -> list[range]:
    """The parts of a block, halved as often as need be, that no range holds; all are halves of halves of a shard."""
    near = [each for each in done if each.start < block.stop and block.start < each.stop]
    if not near:
        return [block]
    if len(block) == 1 or any(each.start <= block.start and block.stop <= each.stop for each in near):
        return []
    middle = (block.start + block.stop) // 2
    return uncovered(range(block.start, middle), near) + uncovered(range(middle, block.stop), near)


def block_rows(run: store.Run, metrics: Sequence[MetricCall], methods: Sequence[str]) -> int:
    """Images that take about BLOCK_SECONDS, a power of two and a shard at most.

    Maps made again take at least as long as a shard took: by noise, so many times; with shuffled weights a shard stays
    whole, as a session is opened for every stage.
    """
    whole, (first, *_) = int(run.settings["shard_rows"]), metrics
    if first.metric.again == "noise":
        return max(1, whole >> math.ceil(math.log2(int(first.parameters["samples"]) + 1)))
    if first.metric.again is not None:
        return whole
    targets = int(run.settings["rows_per_image"]) // len(run.settings["methods"])
    passes = 1 + len(methods) * targets * sum(call.metric.passes(call.parameters) for call in metrics)
    images = BLOCK_SECONDS * float(run.settings["rows_per_second"]) / passes
    return min(whole, 1 << math.floor(math.log2(max(images, 1))))


def measure(work: Stored, group: Group, progress: Progress, stages: Counter[str]) -> None:
    """Metrics of the maps as they are."""
    loaded = measuring(plans.load_for(work.plan, work.model), group.metrics, len(group.methods))
    session = work.open(loaded)
    loaded.release()
    engine = Engine(loaded, session, work.plan.targets, work.size, work.seed)
    collector = Collector(work, group, progress)
    began = time.perf_counter()
    with ThreadPoolExecutor(work.threads) as pool:
        try:
            items = _items(work, pool, group, loaded, collector)
            for key, explanations in groupby(engine.stream(items), key=lambda explanation: explanation.key):
                collector.add(int(key), [said(each) for each in explanations])
        finally:
            pool.shutdown(cancel_futures=True)
    stages.update({**asdict(engine.stages), "wall": time.perf_counter() - began})


def measure_again(work: Stored, group: Group, progress: Progress) -> None:
    """A metric of maps made again, a block at a time."""
    (call,) = group.metrics
    collector = Collector(work, group, progress)
    for block in group.blocks:
        found = remade(work, call, group.methods, block)
        for row, maps in work.images(block, group.methods):
            collector.waiting[row] = maps
            collector.add(row, [found[row, j, k] for j, each in enumerate(maps) for k, _ in enumerate(each)])


def _items(
    work: Stored, pool: ThreadPoolExecutor, group: Group, loaded: Loaded, collector: Collector
) -> Iterator[Item]:
    """The images whose maps can be judged; the others go to the collector at once."""
    waiting = (each for block in group.blocks for each in work.images(block, group.methods))

    def made(each: tuple[int, Maps]) -> tuple[Prepared, Given]:
        image = work.listed(each[0])
        prepared = work.prepared(image, each[1], loaded)
        return prepared, subjects(each[1], prepared, image["boxes"], work.run.input_size)

    for (row, maps), (prepared, given) in ahead(pool, 2 * work.threads + 2, waiting, made):
        collector.waiting[row] = maps
        targets = targets_of(maps)
        if prepared.image is None or targets is None:
            measured = [each for of_method in given for each in of_method if isinstance(each, Measured)]
            collector.add(row, measured * len(group.metrics))
            continue
        yield Item(row, prepared.image, name=maps[0][0].id, targets=targets, given=given)


Given = tuple[tuple[Subject | Measured, ...], ...]


def subjects(maps: Maps, prepared: Prepared, boxes: Any, size: tuple[int, int]) -> Given:
    """What metrics see of an image's maps; of those there are none of, or whose image is refused, why."""
    good = [row for rows in maps for row in rows if row.status == "ok" and prepared.image is not None]
    finished = [row.saliency() for row in good]
    ranks = orders(finished, size)
    seen, status = input_boxes(boxes, prepared.crop_box, size)
    known = {
        id(row): Subject(saliency, ranks, place, seen, status, row.extras)
        for place, (row, saliency) in enumerate(zip(good, finished, strict=True))
    }
    return tuple(tuple(known.get(id(row)) or refused(row, prepared) for row in rows) for rows in maps)


def input_boxes(boxes: Any, crop: tuple[float, ...] | None, size: tuple[int, int]) -> tuple[Array, str]:
    """Boxes of a photograph in pixels of the network's input (b, 4), cut to what it saw, and their status.

    Args:
        boxes: mappings x0 y0 x1 y1 in pixels of the photograph.
        crop: x0 y0 x1 y1 of what the network saw, in the same.
        size: (height, width) of the input.
    """
    if not boxes or crop is None:
        return np.empty((0, 4)), "no_boxes"
    corners = np.array([[box[side] for side in ("x0", "y0", "x1", "y1")] for box in boxes], dtype=np.float64)
    low, high = np.array(crop[:2]), np.array(crop[2:])
    ends = np.array([size[1], size[0]], dtype=np.float64)
    seen = ((corners.reshape(-1, 2, 2) - low) / (high - low) * ends).clip(0, ends).reshape(-1, 4)
    seen = seen[(seen[:, 2] > seen[:, 0]) & (seen[:, 3] > seen[:, 1])]
    return seen, "ok" if len(seen) else "box_outside"


def said(explanation: Explanation) -> Measured:
    """What a metric said of a map, or why the network gave it no numbers."""
    if explanation.status != "ok":
        return Measured(None, status=explanation.status, reason=explanation.error)
    measured: Measured = explanation.extras["measured"]
    return measured


class Collector:
    """Gathers metric rows by block and commits a block when its last image is done."""

    def __init__(self, work: Stored, group: Group, progress: Progress) -> None:
        self._work, self._group, self._progress = work, group, progress
        self._starts = [block.start for block in group.blocks]
        self._blocks: dict[range, dict[int, list[dict[str, Any]]]] = defaultdict(dict)
        self.waiting: dict[int, Maps] = {}

    def add(self, row: int, measured: Sequence[Measured]) -> None:
        """What the metrics say of one image of `waiting`: by metric, method and target."""
        maps, calls = self.waiting.pop(row), self._group.metrics
        flat = [each for rows in maps for each in rows]
        by_metric = [measured[m * len(flat) : (m + 1) * len(flat)] for m in range(len(calls))]
        block = self._group.blocks[bisect_right(self._starts, row) - 1]
        images = self._blocks[block]
        images[row] = [
            metric_row(each, call, by_metric[m][i]) for i, each in enumerate(flat) for m, call in enumerate(calls)
        ]
        self._progress.advance(1, any(each.status in store.STATUSES[1:] for each in measured))
        if len(images) == len(block):
            rows = [values for each in block for values in images[each]]
            measures.write(self._work.run, block, rows, calls, self._group.methods)
            del self._blocks[block]


def metric_row(row: Row, call: MetricCall, measured: Measured) -> dict[str, Any]:
    """A row of the store."""
    value, status, reason = measured.value, measured.status, measured.reason
    if value is not None and not math.isfinite(value):
        value, status, reason = None, "undefined", f"the metric is {value}"
    return {
        "row": row.row,
        "id": row.id,
        "method": row.method,
        "target": row.target,
        "target_source": row.target_source,
        "metric": call.text,
        "value": value,
        "curve": measured.curve,
        "status": status,
        "reason": reason,
        "direction": call.metric.better,
        **call.metric.conventions(call.parameters),
        "notes": json.dumps(dict(measured.notes)),
    }

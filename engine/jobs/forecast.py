"""What a run will cost before it is started: `heatmill plan` and `explain --dry-run`.

A rehearsal runs the engine itself over a few of the job's images. Of every graph only as many batches are run as it
takes to know its speed; the others are answered with what an earlier batch gave, so that every pass is counted and few
are run.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import HeatmillError, InputError
from ..backends import DeviceSession, usable_cores
from ..canvas import Ran
from ..explainer import Engine
from ..methods import METHODS
from ..opening import Loaded, open_best
from ..passes import Passed, check_backward, open_passes
from ..schedule import HEAD, NETWORK, OBSERVE, Batch, Scheduler
from ..types import Explanation, Item, MethodCall, Target
from . import plan as plans
from .bench import forget_peak, peak_mb
from .job import probe_job
from .plan import Job
from .sources import Source
from .store import committed, encode_arrays, encode_pixels
from .worker import prepare

IMAGES = 8
LANE_SECONDS = 6.0  # of every graph, so long is run
BRIEF_SECONDS = 1.5  # of those of methods that were not asked for
ROW_BYTES = 400  # of a row's columns beside its map, compressed
OFFERED = 5  # cheaper methods that are named
SPARE = 1.2  # times the budget: what is expected to take longer is not tried
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(slots=True)
class _Lane:
    """What is known of a graph: an answer, and how long how many rows took."""

    answer: Passed
    seconds: float = 0.0
    timed: int = 0

    @property
    def per_row(self) -> float:
        return self.seconds / max(self.timed, 1)


class Rehearsal(Engine):
    """An engine that runs of every lane no more than it takes to time it, and counts the rest."""

    def __init__(self, *given: Any, seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self.known: dict[Hashable, _Lane] = {}
        self.counts: Counter[tuple[int, Hashable]] = Counter()
        self.shared: Counter[int] = Counter()
        self.counting = True
        self._limit = seconds
        self._timed: deque[_Lane | None] = deque()  # of the batches in flight

    def _submit(self, batch: Batch) -> Ran:
        rows = max(run.slots.stop for run in batch.runs)
        known = self.known.get(batch.lane)
        observing = any(run.observe for run in batch.runs)
        if self.counting:
            self._count(batch)
        if known and known.timed and known.seconds >= self._limit and len(known.answer.raw) >= rows and not observing:
            self._timed.append(None)
            return known.answer
        start = time.perf_counter()
        ran = super()._submit(batch)
        passed = ran.whole()
        self._timed.append(known)
        if known is None:  # the first batch of a graph is its slowest
            self.known[batch.lane] = _Lane(passed)
            return ran
        known.seconds += time.perf_counter() - start
        known.timed += rows
        if len(passed.raw) > len(known.answer.raw):
            known.answer = passed
        return ran

    def _collect(self, scheduler: Scheduler, batch: Batch, ran: Ran) -> Iterator[Explanation]:
        timed = self._timed.popleft()
        start = time.perf_counter()
        yield from super()._collect(scheduler, batch, ran)
        if timed is not None:
            timed.seconds += time.perf_counter() - start

    def _count(self, batch: Batch) -> None:
        """A row that several methods take from is the first one's, and shared by the others."""
        for run in batch.runs:
            if run.observe:
                self.counts[-1, OBSERVE] += 1
                continue
            image, first = run.key
            taken = np.zeros(run.stop - run.start, bool)
            for method, places in self._states[image].asked[first].takers.items():
                rows = np.arange(run.start, run.stop) if places is None else np.unique(places)
                rows = rows[(rows >= run.start) & (rows < run.stop)] - run.start
                self.counts[method, batch.lane] += int((~taken[rows]).sum())
                self.shared[method] += int(taken[rows].sum())
                taken[rows] = True

    def seconds_of(self, lane: Hashable) -> float:
        """Per row; an observation that rides with other rows costs as much as they do."""
        known = self.known.get(lane) or self.known.get(NETWORK)
        return known.per_row if known else 0.0


def forecast(
    job: Job,
    budget: float | None = None,
    seconds: float = LANE_SECONDS,
    resume: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What a job will cost, as JSON values.

    Args:
        budget: seconds that the run may take; where it takes more, cheaper methods are tried and named.
        seconds: how long each graph is timed.
        resume: whether `job.out` may hold a run; what it has is not counted.
        tell: takes a line for each method that is tried.

    Raises:
        HeatmillError: the model, a method, a target or the input is refused, or the folder holds another run.
    """
    exists = resume and plans.check_folder(job.out, job.overwrite)
    loaded, source, targets = plans.open_job(job)
    images = source.table.num_rows
    if exists:
        plan = plans.reopen(job.out)
        plans.check_same(job.out, plan, plans.identity(job, loaded, targets))
        done = committed(job.out)
        images = sum(len(plan.rows(shard)) for shard in plan.shards if shard not in done)
    began = time.perf_counter()
    trial = probe_job(job, loaded, source, targets, None)
    tried = time.perf_counter() - began
    forget_peak()
    job = replace(job, backend=trial.backend, provider=trial.provider, precision=trial.precision)
    items, decoding = _sampled(loaded, source)
    costs = _Costs(job, targets, trial.batch_size, images, tried, decoding)
    found = costs.of(loaded, items, seconds)
    peak = peak_mb()
    answer = {
        "model": str(job.model),
        "images": images,
        "targets": [target.text for target in targets],
        "backend": trial.backend,
        "provider": trial.provider,
        "precision": trial.precision,
        "batch_size": trial.batch_size,
        "sampled": len(items),
        **found,
        "memory_mb": peak,
        "disk_mb": images * sum(each["bytes_per_image"] for each in found["methods"]) / 1e6,
        "budget": budget,
        "fits": None if budget is None else found["seconds"] <= budget,
        "cheaper": [],
    }
    if budget is not None and found["seconds"] > budget:
        answer["cheaper"] = _cheaper(costs, loaded, _with_a_layer(job, loaded), items, budget, found, tell)
    return answer


@dataclass(frozen=True, slots=True)
class _Costs:
    """What every forecast of a job shares: `tried` and `decoding` are seconds, of the trial and of an image."""

    job: Job
    targets: Sequence[Target]
    batch_size: int
    images: int
    tried: float
    decoding: float

    def of(self, loaded: Loaded, items: Sequence[Item], seconds: float) -> dict[str, Any]:
        """Rehearse some methods: their costs per image, and the seconds of all images.

        On the processor decoding and the network take turns at the cores; on GPUs the slower of both counts.
        """
        found = _rehearsed(loaded, self.job, self.targets, self.batch_size, items, seconds)
        opened, apart = found.pop("opened"), found.pop("on_device")
        decode = self.decoding / (self.job.workers or usable_cores())
        network = sum(each["seconds_per_image"] for each in found["methods"]) + found["observe_seconds_per_image"]
        network /= max(1, len(self.job.devices))
        per_image = max(decode, network) if apart else decode + network
        for each in found["methods"]:
            each["seconds"] = self.images * each["seconds_per_image"]
        return {
            "seconds": self.tried + opened + self.images * per_image,
            "start_seconds": self.tried + opened,
            "decode_seconds_per_image": decode,
            **found,
        }


def _sampled(loaded: Loaded, source: Source) -> tuple[list[Item], float]:
    """Some of the job's images, evenly taken, and the seconds that preparing one takes."""
    table = source.table
    places = np.unique(np.linspace(0, table.num_rows - 1, IMAGES).astype(int))
    items: list[Item] = []
    start = time.perf_counter()
    for place in places:
        row = table.slice(int(place), 1).to_pylist()[0]
        prepared = prepare(row, loaded.spec, loaded.model.input.dtype, loaded.segmentations)
        if prepared.image is not None:
            items.append(Item(int(place), prepared.image, row.get("target"), prepared.segments, row["id"]))
    if not items:
        raise InputError(f"none of {len(places)} sampled images can be read; heatmill explain says why in their rows")
    return items, (time.perf_counter() - start) / len(places)


def _rehearsed(
    loaded: Loaded, job: Job, targets: Sequence[Target], batch_size: int, items: Sequence[Item], seconds: float
) -> dict[str, Any]:
    start = time.perf_counter()
    session = open_best(loaded, job.backend, job.provider, job.precision, batch_size)
    passes = open_passes(loaded, session, targets, batch_size)
    opened = time.perf_counter() - start
    engine = Rehearsal(loaded, session, targets, batch_size, job.seed, passes=passes, seconds=seconds)
    sizes: Counter[str] = Counter()
    for explanation in engine.stream(items):
        sizes[explanation.method.text] += _bytes(explanation)
    engine.counting = False
    again = (
        items
        if any(engine.counts[-1, OBSERVE] < count for count in engine.counts.values())
        else _many(items, batch_size)
    )
    while any(lane.timed == 0 for lane in engine.known.values()):  # a graph that had no batch but its first
        for _ in engine.stream(again):
            pass
    methods = []
    for number, call in enumerate(loaded.calls):
        rows = {lane: count for (method, lane), count in engine.counts.items() if method == number}
        methods.append(
            {
                "method": call.text,
                "forward": sum(count for lane, count in rows.items() if lane == NETWORK) / len(items),
                "backward": sum(count for lane, count in rows.items() if lane in passes.through) / len(items),
                "head": sum(count for lane, count in rows.items() if lane == HEAD) / len(items),
                "shared": engine.shared[number] / len(items),
                "observation": "there and back" if call.method.backward(loaded.facts, call.parameters) else "forward",
                "seconds_per_image": sum(engine.seconds_of(lane) * count for lane, count in rows.items()) / len(items),
                "bytes_per_image": sizes[call.text] / len(items),
            }
        )
    return {
        "methods": methods,
        "observe_seconds_per_image": engine.seconds_of(OBSERVE),
        "opened": opened,
        "on_device": isinstance(session, DeviceSession),
    }


def _many(items: Sequence[Item], rows: int) -> list[Item]:
    """The images as often as it takes to fill batches, where nothing else does."""
    return [replace(item, key=(turn, item.key)) for turn in range(-(-2 * rows // len(items))) for item in items]


def _bytes(explanation: Explanation) -> int:
    if explanation.map is None:
        return ROW_BYTES
    extra = len(encode_arrays(explanation.arrays)) if explanation.arrays else 0
    if explanation.method.pixels:
        return ROW_BYTES + extra + len(encode_pixels(explanation.map)[0])
    return ROW_BYTES + extra + explanation.map.nbytes


def _with_a_layer(job: Job, loaded: Loaded) -> Loaded:
    """The model opened for methods that read a layer too, where it has one."""
    if loaded.facts.tap is not None:
        return loaded
    try:
        return plans.open_job(replace(job, methods=("score-cam",)))[0]
    except HeatmillError:
        return loaded


def _cheaper(
    costs: _Costs,
    loaded: Loaded,
    opened: Loaded,
    items: Sequence[Item],
    budget: float,
    asked: Mapping[str, Any],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Methods with their defaults that fit the budget alone, the costliest first.

    Those whose passes would take longer, at the pace of the asked methods, are not tried.
    """
    names, facts = {call.method.name for call in loaded.calls}, opened.facts
    passes = sum(each["forward"] + each["backward"] + each["head"] for each in asked["methods"])
    pace = sum(each["seconds_per_image"] for each in asked["methods"]) / max(passes, 1)
    candidates = []
    for name, method in METHODS.items():
        call = MethodCall(method, {key: parameter.default for key, parameter in method.parameters.items()})
        if name in names or (call.needs_tap and facts.tap is None):
            continue
        if not method.refuses(facts, call.parameters):
            candidates.append((method.passes(facts, call.parameters), call))
    found: list[dict[str, Any]] = []
    known: dict[Any, str | None] = {}
    for count, call in sorted(candidates, key=lambda candidate: -candidate[0]):
        if len(found) == OFFERED:
            break
        if costs.images * count * pace > SPARE * budget:
            continue
        other = replace(opened, calls=(call,))
        try:
            check_backward(other, known)
            tell(f"trying {call.text}")
            cost = costs.of(other, items[:2], BRIEF_SECONDS)
        except HeatmillError:
            continue
        if cost["seconds"] <= budget:
            found.append({**cost["methods"][0], "seconds": cost["seconds"]})
    return sorted(found, key=lambda cost: -float(cost["seconds"]))


def parse_budget(text: str) -> float:
    """Seconds from 90, 90s, 15m, 2h or 1d.

    Raises:
        InputError: it is none of these.
    """
    given = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    unit = (given[2] or "s") if given else ""
    if given is None or unit not in UNITS or float(given[1]) <= 0:
        raise InputError(f"--budget {text!r}: give a time as 90s, 15m, 2h or 1d")
    return float(given[1]) * UNITS[unit]


def forecast_text(found: Mapping[str, Any]) -> str:
    """The answer of `forecast` for people."""
    images = found["images"]
    lines = [
        f"{found['model']}: {images} images, targets {', '.join(found['targets'])}, {found['backend']} "
        f"({found['provider']}) {found['precision']}, batch {found['batch_size']}",
        f"time     about {duration(found['seconds'])}; {found['start_seconds']:.0f} s of it to start",
        f"memory   about {found['memory_mb']:.0f} MB",
        f"disk     about {found['disk_mb']:.2f} MB",
        f"an image, of {found['sampled']} sampled ones",
        f"  decoding: {_each(found['decode_seconds_per_image'], images)}",
    ]
    kinds = sorted({each["observation"] for each in found["methods"]})
    lines.append(f"  observation, {kinds[-1]}, once for all: {_each(found['observe_seconds_per_image'], images)}")
    lines += [f"  {_passes(each)}; {_each(each['seconds_per_image'], images)}" for each in found["methods"]]
    if found["budget"] is not None:
        fits = "fits" if found["fits"] else "does not fit"
        lines.append(f"budget   {duration(found['budget'])}: the run {fits}")
    if found["fits"] is False:
        told = "these would, each alone, all included" if found["cheaper"] else "no method with its defaults does"
        lines.append(f"         {told}")
        lines += [f"  {_passes(each)}; in all {duration(each['seconds'])}" for each in found["cheaper"]]
    return "\n".join(lines) + "\n"


def _passes(each: Mapping[str, Any]) -> str:
    kinds = (("forward", "forward"), ("backward", "there and back"), ("head", "through the head"), ("shared", "shared"))
    passes = ", ".join(f"{each[key]:.0f} {told}" for key, told in kinds if each[key])
    return f"{each['method']}: {passes or 'rides with the observation'}"


def _each(seconds: float, images: int) -> str:
    return f"{seconds:.3g} s, in all {duration(images * seconds)}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"

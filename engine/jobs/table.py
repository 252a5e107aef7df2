"""Means of metric rows with their uncertainty, and the differences between methods and runs on the same images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import InputError
from ..metrics import parse_metrics
from ..types import Array, MetricCall, Target, class_index, nearest, target_rows
from . import measures, store

RESAMPLES = 2000
CHUNK = 1 << 23  # draws of a resample held at once
SHOWN = 5  # images named as the best and the worst
MOST_SLICES = 30


@dataclass(frozen=True, slots=True)
class Entry:
    """What is compared: one method's maps of one kind of target in one run."""

    label: str
    run: int
    method: str
    source: str
    target: int | None = None

    @property
    def kind(self) -> tuple[str, int | None]:
        """What was explained: only entries of one kind are compared."""
        return self.source, self.target


Extreme = tuple[str, str, float]  # id, uri, value


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric of one entry: the mean over `n` images, its 95% bootstrap interval, and why others are left out."""

    n: int
    mean: float
    low: float
    high: float
    excluded: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of entry `a` less that of entry `b`, on the `n` images that both have.

    Attributes:
        wins: share of the images on which `a` is the better, ties counted half: the win rate.
        distinguishable: whether the interval leaves out 0.
    """

    metric: str
    a: int
    b: int
    n: int
    mean: float
    low: float
    high: float
    wins: float

    @property
    def distinguishable(self) -> bool:
        return self.n > 1 and not self.low <= 0 <= self.high


@dataclass(slots=True)
class Slice:
    """The cells of some of the images: `column` is what they share, `value` which; both empty for all."""

    column: str
    value: str
    images: int
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table.

    Attributes:
        better: by metric, lower or higher.
        slices: all images first, then the asked ones.
        curves: by metric and entry the mean (p,) of its rows' curves, where the metric runs along steps.
        extremes: by metric and entry the best and the worst images.
    """

    entries: tuple[Entry, ...]
    metrics: tuple[MetricCall, ...]
    slices: tuple[Slice, ...]
    differences: tuple[Difference, ...]
    curves: Mapping[tuple[str, int], Array]
    extremes: Mapping[tuple[str, int], tuple[list[Extreme], list[Extreme]]]
    notes: tuple[str, ...]

    def leader(self, metric: str, entry: int) -> int | None:
        """The entry with the best mean of a metric, among those of one entry's kind.

        Only those judged on the most images count: one that leaves hard images out would win by that. None where fewer
        than two are left to compare.
        """
        kind, cells = self.entries[entry].kind, self.slices[0].cells
        alike = [i for i, other in enumerate(self.entries) if other.kind == kind]
        most = max(cells[metric, i].n for i in alike)
        means = {i: cells[metric, i].mean for i in alike if cells[metric, i].n == most}
        if len(means) < 2 or not most:
            return None
        better = next(call.metric.better for call in self.metrics if call.text == metric)
        return (max if better == "higher" else min)(means, key=means.__getitem__)

    def level(self, metric: str, entry: int) -> bool:
        """Whether an entry can't be told from the best of a metric."""
        best = self.leader(metric, entry)
        if best is None:
            return False
        pairs = (d for d in self.differences if d.metric == metric and {d.a, d.b} == {best, entry})
        return entry == best or any(not d.distinguishable for d in pairs)


@dataclass(frozen=True, slots=True)
class _Column:
    """A metric of an entry over all images: values (n,), and what the rows say; NaN where there is no value.

    `curves` is (n, p) where the metric has some, `statuses` (n,) places in STATUSES, -1 without a row.
    """

    values: Array
    curves: Array | None
    statuses: Array
    terms: Array


def check_slices(run: store.Run, by: Sequence[str]) -> None:
    """Refuse to slice by what a run does not know.

    Raises:
        InputError: it has no such column, or no labels.
    """
    plan = store.read_plan(run.path, run.settings)
    for column in by:
        if column == "correct" and not any(plan["label"].to_pylist()):
            raise InputError(f"--by correct: the images of {run.path} have no labels; a manifest can give them")
        if column not in ("class", "correct", "label"):
            _extra(run, plan, column)


def _unsaid(runs: Sequence[store.Run], methods: Sequence[Sequence[str]]) -> list[str]:
    """What the table leaves out of the runs: images without maps yet, and runs without a method that was asked for."""
    notes = []
    for run, calls in zip(runs, methods, strict=True):
        done = len(store.committed(run.path))
        if done < run.shards:
            notes.append(f"{run.path}: {done} of {run.shards} shards have maps; the images of the others are left out")
        if not calls:
            notes.append(f"{run.path}: has none of the methods that were asked for, and is left out")
    return notes


def compare_metrics(
    runs: Sequence[store.Run],
    metrics: Sequence[str],
    methods: Sequence[Sequence[str]],
    by: Sequence[str] = (),
    resamples: int = RESAMPLES,
) -> Comparison:
    """The table of what is stored.

    Args:
        metrics: as `heatmill evaluate` takes them.
        methods: of each run, the calls that are compared.
        by: class (the class explained), correct (whether the prediction is the label), label, or a column of the
            manifest, to slice by.

    Raises:
        InputError: a column that there is none of, or no metric row at all.
    """
    calls = parse_metrics(metrics)
    for run in runs:
        check_slices(run, by)
    entries = _entries(runs, methods)
    tables = [measures.read(run, [call.text for call in calls]) for run in runs]
    if not sum(table.num_rows for table in tables):
        raise InputError("no run has rows of these metrics")
    names = sorted({name for run in runs for name in store.read_plan(run.path, run.settings)["id"].to_pylist()})
    place = {name: i for i, name in enumerate(names)}
    columns = {
        (call.text, i): _column(tables[entry.run], entry, call, place)
        for call in calls
        for i, entry in enumerate(entries)
    }
    whole = [np.ones(len(names), bool)] * len(entries)
    everything = Slice("", "", len(names), _cells(calls, entries, columns, whole, resamples))
    slices: list[Slice] = [everything]
    notes = _unsaid(runs, methods)
    for column in by:
        labels = [_slicing(runs[entry.run], entry, column, place) for entry in entries]
        counts = Counter(value for value in labels[0] if value is not None)
        if len(counts) > MOST_SLICES:
            notes.append(f"{column}: the {MOST_SLICES} largest of {len(counts)} slices are shown")
        for value, count in counts.most_common(MOST_SLICES):
            masks = [np.array([each == value for each in of_entry], bool) for of_entry in labels]
            slices.append(Slice(column, value, count, _cells(calls, entries, columns, masks, resamples)))
    return Comparison(
        entries=entries,
        metrics=calls,
        slices=tuple(slices),
        differences=tuple(_differences(calls, entries, columns, resamples)),
        curves=_curves(calls, entries, columns),
        extremes=_extremes(runs, calls, entries, columns, names),
        notes=tuple(notes),
    )


def _entries(runs: Sequence[store.Run], methods: Sequence[Sequence[str]]) -> tuple[Entry, ...]:
    found = [
        (i, method, source, target)
        for i, (run, calls) in enumerate(zip(runs, methods, strict=True))
        for method in calls
        for target, source in target_rows([Target(*each) for each in run.settings["targets"]], None)
    ]
    shown = _distinct([run.path.absolute().parts for run in runs])
    sources = {(source, target) for _, _, source, target in found}
    entries = []
    for i, method, source, target in found:
        kind = f"class {target}" if source == "class" else source
        parts = [f"{shown[i]}: " if len(runs) > 1 else "", method, f" ({kind})" if len(sources) > 1 else ""]
        entries.append(Entry("".join(parts), i, method, source, target if source == "class" else None))
    return tuple(entries)


def _distinct(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    for count in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(path[-count:]) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends


def _of_entry(table: pa.Table, entry: Entry) -> pa.Table:
    """The rows of an entry."""
    mask = pc.and_(pc.equal(table["method"], entry.method), pc.equal(table["target_source"], entry.source))
    if entry.target is not None:
        mask = pc.and_(mask, pc.equal(table["target"], entry.target))
    return table.filter(mask)


def _column(table: pa.Table, entry: Entry, call: MetricCall, place: Mapping[str, int]) -> _Column:
    rows = _of_entry(table.filter(pc.equal(table["metric"], call.text)), entry)
    at = np.array([place[name] for name in rows["id"].to_pylist()], dtype=np.intp)
    statuses = np.full(len(place), -1)
    statuses[at] = pc.index_in(rows["status"], pa.array(measures.STATUSES)).to_numpy(zero_copy_only=False)
    values = np.full(len(place), np.nan)
    values[at] = rows["value"].to_numpy(zero_copy_only=False)
    curves = _stacked(rows["curve"], at, len(place))
    good = np.flatnonzero(np.isfinite(values))
    known = call.metric.terms(values[good], None if curves is None else curves[good], call.parameters)
    terms = np.full((len(place), known.shape[1] if len(good) else 1), np.nan)
    if len(good):
        terms[good] = known
    return _Column(values, curves, statuses, terms)


def _stacked(column: pa.ChunkedArray, at: Array, count: int) -> Array | None:
    """Rows' curves (count, p) at their places; None where there are none, or of several lengths."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    known = np.isfinite(lengths.astype(np.float64))
    if not known.any() or len(set(lengths[known].tolist())) > 1:
        return None
    curves = np.full((count, int(lengths[known][0])), np.nan)
    curves[at[known]] = pc.list_flatten(column).to_numpy(zero_copy_only=False).reshape(int(known.sum()), -1)
    return curves


def _cells(
    calls: Sequence[MetricCall],
    entries: Sequence[Entry],
    columns: Mapping[tuple[str, int], _Column],
    masks: Sequence[Array],
    resamples: int,
) -> dict[tuple[str, int], Cell]:
    """The cells of the images of each entry's mask."""
    cells = {}
    for call in calls:
        mine = [columns[call.text, i] for i in range(len(entries))]
        within = [mask & np.isfinite(column.values) for mask, column in zip(masks, mine, strict=True)]
        for images, members in _alike(within):
            terms = [mine[i].terms[images] for i in members]
            drawn = resampled(terms, resamples, call.text)
            for i, whole, of_member in zip(members, terms, drawn.T, strict=True):
                seen = mine[i].statuses[masks[i]]
                left = np.bincount(seen[seen >= 0], minlength=len(measures.STATUSES))
                excluded = {
                    status: int(count)
                    for status, count in sorted(zip(measures.STATUSES, left, strict=True))
                    if count and status != "ok"
                }
                low, high = interval(of_member) if len(whole) else (float("nan"),) * 2
                mean = float(whole.mean(axis=0).max()) if len(whole) else float("nan")
                cells[call.text, i] = Cell(len(whole), mean, low, high, excluded)
    return cells


def _alike(masks: Sequence[Array]) -> Iterator[tuple[Array, list[int]]]:
    """The distinct masks, each as places, and whose they are."""
    groups: dict[bytes, list[int]] = {}
    for i, mask in enumerate(masks):
        groups.setdefault(mask.tobytes(), []).append(i)
    for members in groups.values():
        yield np.flatnonzero(masks[members[0]]), members


def resampled(terms: Sequence[Array], resamples: int, key: str) -> Array:
    """The figures (resamples, m) of m lists of terms (n, p) of the same images, which are drawn anew n times each time.

    A figure is the greatest of the p means. The draws depend on `key` and n alone.
    """
    whole = np.concatenate(terms, axis=1)
    n = len(whole)
    ends = np.cumsum([0, *(each.shape[1] for each in terms)])
    generator = np.random.Generator(np.random.Philox(key=[0, crc32(key.encode())]))
    out = np.zeros((resamples, len(terms)))
    step = max(1, CHUNK // max(n, 1))
    for start in range(0, resamples if n else 0, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        means = weights @ whole / n
        out[start : start + rows] = np.maximum.reduceat(means, ends[:-1], axis=1)
    return out


def interval(figures: Array) -> tuple[float, float]:
    """The middle 95% of resampled figures."""
    low, high = np.quantile(figures, [0.025, 0.975])
    return float(low), float(high)


def _differences(
    calls: Sequence[MetricCall],
    entries: Sequence[Entry],
    columns: Mapping[tuple[str, int], _Column],
    resamples: int,
) -> Iterator[Difference]:
    for call in calls:
        mine = [columns[call.text, i] for i in range(len(entries))]
        pairs = [(a, b) for a, b in combinations(range(len(entries)), 2) if entries[a].kind == entries[b].kind]
        within = [np.isfinite(mine[a].values) & np.isfinite(mine[b].values) for a, b in pairs]
        sign = 1 if call.metric.better == "higher" else -1
        found = []
        for images, members in _alike(within) if pairs else ():
            if not len(images):
                continue
            used = sorted({i for member in members for i in pairs[member]})
            terms = [mine[i].terms[images] for i in used]
            drawn = dict(zip(used, resampled(terms, resamples, call.text).T, strict=True))
            means = {i: float(each.mean(axis=0).max()) for i, each in zip(used, terms, strict=True)}
            for a, b in (pairs[member] for member in members):
                low, high = interval(drawn[a] - drawn[b])
                rises = sign * (mine[a].values[images] - mine[b].values[images])
                wins = float(((rises > 0) + 0.5 * (rises == 0)).mean())
                found.append(Difference(call.text, a, b, len(images), means[a] - means[b], low, high, wins))
        yield from sorted(found, key=lambda each: (each.a, each.b))


def _curves(
    calls: Sequence[MetricCall], entries: Sequence[Entry], columns: Mapping[tuple[str, int], _Column]
) -> dict[tuple[str, int], Array]:
    return {
        (call.text, i): np.nanmean(curves, axis=0)
        for call in calls
        for i in range(len(entries))
        if (curves := columns[call.text, i].curves) is not None and curves.shape[1] > 1
    }


def _extremes(
    runs: Sequence[store.Run],
    calls: Sequence[MetricCall],
    entries: Sequence[Entry],
    columns: Mapping[tuple[str, int], _Column],
    names: Sequence[str],
) -> dict[tuple[str, int], tuple[list[Extreme], list[Extreme]]]:
    """The best and the worst images of every metric whose values are not all alike."""
    uris: dict[str, str] = {}
    for run in runs:
        table = store.read_plan(run.path, run.settings)
        uris.update(zip(table["id"].to_pylist(), table["uri"].to_pylist(), strict=True))
    found = {}
    for call in calls:
        for i in range(len(entries)):
            values = columns[call.text, i].values
            good = np.flatnonzero(np.isfinite(values))
            if len(good) < 2 or not np.ptp(values[good]) > 0:
                continue
            order = good[np.argsort(values[good], kind="stable")]
            order = order if call.metric.better == "lower" else order[::-1]
            ends = (order[:SHOWN], order[::-1][:SHOWN])
            best, worst = ([(names[j], uris[names[j]], float(values[j])) for j in end] for end in ends)
            found[call.text, i] = (best, worst)
    return found


def _slicing(run: store.Run, entry: Entry, column: str, place: Mapping[str, int]) -> list[str | None]:
    """For every image which slice it is in, for an entry of this run; None where that is not known."""
    plan = store.read_plan(run.path, run.settings)
    found: list[str | None] = [None] * len(place)
    if column in ("class", "correct"):
        rows = _of_entry(run.table(), entry)
        names = tuple(run.settings["spec"].get("label_names") or ())
        labels = dict(zip(plan["id"].to_pylist(), plan["label"].to_pylist(), strict=True))
        for name, target, pred in zip(*(rows[key].to_pylist() for key in ("id", "target", "pred")), strict=True):
            if column == "class" and target is not None:
                found[place[name]] = names[target] if target < len(names) else str(target)
            elif column == "correct" and labels[name] is not None and pred is not None:
                right = class_index(labels[name], len(names) or 2**31, names) == pred
                found[place[name]] = "correct" if right else "incorrect"
        return found
    values = plan["label"].to_pylist() if column == "label" else _extra(run, plan, column)
    for name, value in zip(plan["id"].to_pylist(), values, strict=True):
        found[place[name]] = None if value is None else str(value)
    return found


def _extra(run: store.Run, plan: pa.Table, column: str) -> list[Any]:
    """A column of the manifest."""
    rows = [json.loads(text) if text else {} for text in plan["extra"].to_pylist()]
    known = list(dict.fromkeys(key for row in rows for key in row))
    if column not in known:
        told = nearest(column, ["class", "correct", "label", *known])
        raise InputError(f"--by {column!r}: no such column in the manifest of {run.path}; {told}")
    return [row.get(column) for row in rows]

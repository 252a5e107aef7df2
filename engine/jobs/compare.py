"""Two runs beside each other: which rows belong together, how alike their maps are, where the predictions differ."""

from __future__ import annotations

import heapq
import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ... import InputError, RunError
from ...kernels.finish import flat
from ...kernels.similarity import cosine, spearman, top_overlap
from .report import placed, relative_box, replacing, safe_name
from .store import Row, Run

Array = npt.NDArray[Any]
Key = tuple[str | int | None, ...]

MEASURES = ("spearman", "cosine", "overlap")
TOP = 0.15
WORST, WORST_TOLD = 24, 5
SAME_VIEW = 0.01  # boxes that differ by less than this share of the view are one: a network's rounding of its crop
PAIRS_HELD, VALUES_HELD = 1024, 1 << 19

PAIRS = pa.schema(
    [
        ("id", pa.string()),
        *(
            (f"{name}_{side}", kind)
            for name, kind in (
                ("method", pa.string()),
                ("target_source", pa.string()),
                ("target", pa.int32()),
                ("label_name", pa.string()),
                ("score", pa.float32()),
                ("pred", pa.int32()),
                ("pred_score", pa.float32()),
            )
            for side in "ab"
        ),
        *((name, pa.float64()) for name in MEASURES),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows that belong together.

    Attributes:
        values: the MEASURES; NaN where the maps can't be measured.
        reason: why the pair does not count in the figures, None where it does.
    """

    first: Row
    second: Row
    values: tuple[float, ...]
    reason: str | None

    def record(self) -> dict[str, Any]:
        """The pair as a row of PAIRS."""
        record: dict[str, Any] = {"id": self.first.id, "reason": self.reason}
        for side, row in zip("ab", (self.first, self.second), strict=True):
            record |= {
                f"method_{side}": row.method,
                f"target_source_{side}": row.target_source,
                f"target_{side}": row.target,
                f"label_name_{side}": row.label_name,
                f"score_{side}": row.score,
                f"pred_{side}": row.prediction,
                f"pred_score_{side}": row.prediction_score,
            }
        return record | {name: _number(value) for name, value in zip(MEASURES, self.values, strict=True)}


@dataclass(slots=True)
class Comparison:
    """What was found; `told` is what `heatmill compare --json` prints."""

    told: dict[str, Any]
    worst: list[Pair]
    flips: list[tuple[Row, Row]]


@dataclass(slots=True)
class _Group:
    """The pairs of one method and one kind of target in each run."""

    values: array[float] = field(default_factory=lambda: array("d"))
    moved: array[float] = field(default_factory=lambda: array("d"))
    excluded: Counter[str] = field(default_factory=Counter)


def compare(
    first: Run,
    second: Run,
    out: Path | None = None,
    *,
    method_a: str | None = None,
    method_b: str | None = None,
    top: float = TOP,
    by: str = "spearman",
    worst: int = WORST,
) -> Comparison:
    """Measure every pair of rows of two runs; writes pairs.parquet and summary.json.

    Images are matched by id. The rows of an image are matched by method (with its parameters) and by what was asked as
    target; where each run has one method, by target alone, and where each has one target, by method alone. Pairs whose
    targets are different classes are measured but do not count in the figures.

    The raw maps are compared on the finer of the two grids, over the part of the photograph that both networks saw;
    where grid and view are the same, as they are.

    Args:
        out: the folder; RUN_A/report/compare/RUN_B if None.
        method_a, method_b: only the rows of this method of a run, by name or whole call.
        top: the share of the highest places whose overlap is told.
        by: of MEASURES, what the worst pairs are chosen by.
        worst: how many of the worst pairs, and of the flipped predictions, are kept.

    Raises:
        InputError: a method that a run has not, nothing in common, or the folder can't be written.
        RunError: a part is damaged, or a run is not in the order of its ids.
    """
    if not 0 < top <= 1:
        raise InputError(f"--top {100 * top:g}: give a percentage above 0, at most 100")
    calls_a, calls_b = _calls(first, method_a, "--method-a"), _calls(second, method_b, "--method-b")
    folder = out or first.path / "report" / "compare" / safe_name(second.path.absolute().name)
    classes = _Classes(first, second)
    one_method = len(calls_a) == len(calls_b) == 1
    one_target = _targets(first) == _targets(second) == 1
    if not one_method and not set(calls_a) & set(calls_b):
        have = f"{first.path} has {', '.join(calls_a)}; {second.path} has {', '.join(calls_b)}"
        raise InputError(f"no method in both runs: {have}; choose one of each with --method-a and --method-b")

    matching = _Matching((first, second), (calls_a, calls_b), classes, one_method, one_target, worst)
    groups: dict[tuple[str, str, str, str], _Group] = defaultdict(_Group)
    lowest = _Lowest(worst)
    column = MEASURES.index(by)
    found = _measured(matching.pairs(), classes, top)
    beginning = next(found, None)
    if beginning is None:
        raise InputError(_nothing(first, second, matching.images))
    with replacing(folder / "pairs.parquet") as file, pq.ParquetWriter(file, PAIRS, compression="zstd") as writer:
        for pairs in chain([beginning], found):
            writer.write_table(pa.Table.from_pylist([pair.record() for pair in pairs], schema=PAIRS))
            for pair in pairs:
                a, b = pair.first, pair.second
                group = groups[a.method, b.method, a.target_source, b.target_source]
                if pair.reason is not None:
                    group.excluded[pair.reason] += 1
                    continue
                group.values.extend(pair.values)
                if a.score is not None and b.score is not None:
                    group.moved.append(b.score - a.score)
                lowest.add(pair.values[column], pair)

    told = {
        "run_a": str(first.path),
        "run_b": str(second.path),
        "out": str(folder),
        "top": top,
        "images": dict(matching.images),
        "complete": {"a": _complete(first), "b": _complete(second)},
        "differences": differences(first.settings, second.settings),
        "predictions": matching.predictions(),
        "groups": [_told(key, group) for key, group in groups.items()],
        "unmatched": {side: dict(rows) for side, rows in zip("ab", matching.alone, strict=True)},
        "worst_by": by,
        "worst": [_told_pair(pair) for pair in lowest.kept()],
    }
    with replacing(folder / "summary.json") as file:
        file.write((json.dumps(told, indent=1, allow_nan=False) + "\n").encode())
    return Comparison(told, lowest.kept(), matching.flips.kept())


class _Matching:
    """The rows of two runs that belong together, and what was seen on the way.

    Attributes:
        images: how many are in both, and in one only.
        alone: of each run the rows without a counterpart, by method and target.
        flips: the surest of the images whose predictions differ, a row of each run.
    """

    def __init__(
        self,
        runs: tuple[Run, Run],
        calls: tuple[Sequence[str], Sequence[str]],
        classes: _Classes,
        one_method: bool,
        one_target: bool,
        most: int,
    ) -> None:
        self._runs, self._calls, self._classes = runs, calls, classes
        self._loose = one_method, one_target
        self.images: Counter[str] = Counter(common=0, only_a=0, only_b=0)
        self.alone: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self.flips = _Lowest(most)
        self._judged = self._flipped = 0

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        first, second = (_by_image(run, calls) for run, calls in zip(self._runs, self._calls, strict=True))
        for rows_a, rows_b in _common_images(first, second, self.images):
            self._judge(rows_a[0], rows_b[0])
            keyed_a, keyed_b = (_keyed(rows, *self._loose) for rows in (rows_a, rows_b))
            for keyed, others, alone in ((keyed_a, keyed_b, self.alone[0]), (keyed_b, keyed_a, self.alone[1])):
                alone.update(f"{row.method}, {_asked(row)}" for key, row in keyed.items() if key not in others)
            yield from ((row, keyed_b[key]) for key, row in keyed_a.items() if key in keyed_b)

    def _judge(self, first: Row, second: Row) -> None:
        """Count whether two rows of an image have one prediction."""
        if first.prediction is None or second.prediction is None:
            return
        self._judged += 1
        if not self._classes.same(first.prediction, second.prediction):
            self._flipped += 1
            self.flips.add(-min(first.prediction_score or 0, second.prediction_score or 0), (first, second))

    def predictions(self) -> dict[str, Any]:
        share = self._flipped / self._judged if self._judged else None
        return {"compared": self._judged, "flipped": self._flipped, "share": share}


class _Lowest:
    """The so many least things of a stream; of equals those that came first."""

    def __init__(self, most: int) -> None:
        self._most, self._order = most, count()
        self._heap: list[tuple[float, int, Any]] = []

    def add(self, value: float, thing: Any) -> None:
        entry = (-value, -next(self._order), thing)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def kept(self) -> list[Any]:
        """From the least on."""
        return [thing for *_, thing in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


class _Classes:
    """Whether a class of one run is a class of the other: by number, or by name where the runs have other names."""

    def __init__(self, first: Run, second: Run) -> None:
        self._names = [run.settings["spec"].get("label_names", ()) for run in (first, second)]
        self._by_name = all(self._names) and list(self._names[0]) != list(self._names[1])

    def same(self, first: int | None, second: int | None) -> bool:
        a, b = self._names
        if self._by_name and first is not None and second is not None and first < len(a) and second < len(b):
            return bool(a[first] == b[second])
        return first == second


def _calls(run: Run, wanted: str | None, flag: str) -> list[str]:
    calls = run.calls(wanted)
    if not calls:
        raise InputError(f"{flag} {wanted!r}: {run.path} has {', '.join(run.calls())}")
    return calls


def _targets(run: Run) -> int:
    """How many targets each image has."""
    return int(run.settings["rows_per_image"]) // len(run.settings["methods"])


def _complete(run: Run) -> bool:
    return len(run.parts()) == run.shards


def _by_image(run: Run, calls: Sequence[str]) -> Iterator[list[Row]]:
    """The rows of each image, of some methods, in the order of the ids."""
    before = None
    for _, rows in groupby(run.rows(), key=lambda row: row.row):
        kept = [row for row in rows if row.method in calls]
        if not kept:
            continue
        if before is not None and kept[0].id <= before:
            raise RunError(f"{run.path}: {kept[0].id!r} comes after {before!r}; a run is in the order of its ids")
        before = kept[0].id
        yield kept


def _common_images(
    first: Iterator[list[Row]], second: Iterator[list[Row]], seen: Counter[str]
) -> Iterator[tuple[list[Row], list[Row]]]:
    """The rows of the images that are in both runs; all are counted in `seen`."""
    a, b = next(first, None), next(second, None)
    while a is not None and b is not None:
        if a[0].id == b[0].id:
            seen["common"] += 1
            yield a, b
            a, b = next(first, None), next(second, None)
        elif a[0].id < b[0].id:
            seen["only_a"] += 1
            a = next(first, None)
        else:
            seen["only_b"] += 1
            b = next(second, None)
    seen["only_a"] += (a is not None) + sum(1 for _ in first)
    seen["only_b"] += (b is not None) + sum(1 for _ in second)


def _keyed(rows: Sequence[Row], one_method: bool, one_target: bool) -> dict[Key, Row]:
    """An image's rows by what makes two of them belong together."""
    keyed: dict[Key, Row] = {}
    times: Counter[Key] = Counter()
    for row in rows:
        asked: Key = () if one_target else (row.target_source, row.target if row.target_source == "class" else None)
        key: Key = (*(() if one_method else (row.method,)), *asked)
        keyed[*key, times[key]] = row
        times[key] += 1
    return keyed


def _asked(row: Row) -> str:
    return f"class {row.target}" if row.target_source == "class" else row.target_source


def _measured(matched: Iterator[tuple[Row, Row]], classes: _Classes, top: float) -> Iterator[list[Pair]]:
    """The pairs with their measures, some at a time."""
    held: list[tuple[Row, Row]] = []
    values = 0
    for rows in matched:
        held.append(rows)
        values += max(row.map.size if row.map is not None else 0 for row in rows)
        if len(held) == PAIRS_HELD or values >= VALUES_HELD:
            yield measure(held, classes, top)
            held, values = [], 0
    if held:
        yield measure(held, classes, top)


def measure(matched: Sequence[tuple[Row, Row]], classes: _Classes, top: float) -> list[Pair]:
    """The pairs of rows with their measures, in their order."""
    reasons: list[str | None] = [None] * len(matched)
    values = np.full((len(matched), len(MEASURES)), np.nan)
    maps: dict[tuple[int, ...], list[tuple[int, Array, Array]]] = defaultdict(list)
    for position, (a, b) in enumerate(matched):
        reasons[position] = _sides("" if a.status == "ok" else a.status, "" if b.status == "ok" else b.status)
        if reasons[position] is None:
            on_one = common_maps(a, b)
            if on_one is None:
                reasons[position] = "no common part"
            else:
                maps[on_one[0].shape].append((position, *on_one))
    for shape, found in maps.items():
        places = [position for position, *_ in found]
        both = [np.stack(each) for each in zip(*(each for _, *each in found), strict=True)]
        broken = [~np.isfinite(each).all(axis=(1, 2)) for each in both]
        level = [flat(np.where(bad[:, None, None], 0, each)) & ~bad for each, bad in zip(both, broken, strict=True)]
        for position, *sides in zip(places, *broken, *level, strict=True):
            words = [
                "not finite" if bad else "flat" if even else "" for bad, even in zip(sides[:2], sides[2:], strict=True)
            ]
            reasons[position] = _sides(*words)
        measured = [i for i, position in enumerate(places) if reasons[position] is None]
        first, second = (each[measured].reshape(len(measured), math.prod(shape)) for each in both)
        if measured:
            columns = spearman(first, second), cosine(first, second), top_overlap(first, second, top)
            values[[places[i] for i in measured]] = np.stack(columns, axis=1)
    for position, (a, b) in enumerate(matched):
        if reasons[position] is None and not classes.same(a.target, b.target):
            reasons[position] = "other class"
    return [
        Pair(a, b, tuple(found.tolist()), reason)
        for (a, b), found, reason in zip(matched, values, reasons, strict=True)
    ]


def _sides(first: str, second: str) -> str | None:
    """What is wrong with the maps of two runs, in words; None where nothing is."""
    if not first and not second:
        return None
    if first == second:
        return f"{first} in both"
    return ", ".join(f"{what} in {side}" for what, side in ((first, "A"), (second, "B")) if what)


def common_maps(first: Row, second: Row) -> tuple[Array, Array] | None:
    """Two raw maps on one grid (h, w), the finer of theirs, over the part of the photograph that both networks saw.

    None where there is no such part.
    """
    maps = np.asarray(first.map), np.asarray(second.map)
    boxes = np.array([relative_box(first), relative_box(second)])
    sides = boxes[:, 2:] - boxes[:, :2]
    if np.abs(boxes[0] - boxes[1]).max() <= SAME_VIEW * sides.min():
        boxes[1], sides[1] = boxes[0], sides[0]
        if maps[0].shape == maps[1].shape:
            return maps
    corner, end = boxes[:, :2].max(axis=0), boxes[:, 2:].min(axis=0)
    if (end <= corner).any():
        return None
    fineness = np.max([np.array(values.shape[::-1]) / side for values, side in zip(maps, sides, strict=True)], axis=0)
    columns, rows = (max(2, round(n)) for n in fineness * (end - corner))
    scale = np.array([columns, rows, columns, rows]) / np.tile(end - corner, 2)
    a, b = (
        placed(values, (rows, columns), tuple((box - np.tile(corner, 2)) * scale))[0]
        for values, box in zip(maps, boxes, strict=True)
    )
    return a, b


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings in which two runs differ: (name, of A, of B)."""
    told = [_settings(settings) for settings in (first, second)]
    names = dict.fromkeys([*told[0], *told[1]])
    found = [(name, told[0].get(name, "none"), told[1].get(name, "none")) for name in names]
    return [line for line in found if line[1] != line[2]]


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    spec = {key: value for key, value in settings["spec"].items() if key != "label_names"}
    names = settings["spec"].get("label_names", ())
    named = {
        "model": Path(settings["model"]["path"]).name,
        "model sha256": settings["model"]["sha256"][:16],
        "methods": [method["call"] for method in settings["methods"]],
        "targets": [" ".join(str(part) for part in target if part is not None) for target in settings["targets"]],
        "layer": settings.get("layer"),
        "grid": settings["grid"],
        **{key: settings.get(key) for key in ("backend", "provider", "precision", "batch_size", "seed", "images")},
        **{f"spec: {key}": value for key, value in spec.items()},
        "spec: label_names": f"{len(names)} names, sha256 {sha256(json.dumps(list(names)).encode()).hexdigest()[:16]}",
        **{f"version: {key}": value for key, value in settings.get("versions", {}).items()},
    }
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for key, value in named.items()
    }


def _told(key: tuple[str, str, str, str], group: _Group) -> dict[str, Any]:
    values = np.array(group.values).reshape(-1, len(MEASURES))
    moved = np.abs(np.array(group.moved))
    return {
        **dict(zip(("method_a", "method_b", "target_a", "target_b"), key, strict=True)),
        "pairs": len(values) + group.excluded.total(),
        "compared": len(values),
        "excluded": dict(group.excluded.most_common()),
        **{name: _spread(column) for name, column in zip(MEASURES, values.T, strict=True)},
        "score_difference": {"mean": float(moved.mean()), "greatest": float(moved.max())} if len(moved) else None,
    }


def _spread(values: Array) -> dict[str, float] | None:
    if not len(values):
        return None
    low, middle = np.quantile(values, [0.05, 0.5])
    told = {"mean": values.mean(), "median": middle, "p05": low, "least": values.min()}
    return {name: float(value) for name, value in told.items()}


def _told_pair(pair: Pair) -> dict[str, Any]:
    record = pair.record()
    told = {"target_a": record["target_source_a"], "target_b": record["target_source_b"], "class": record["target_a"]}
    return {**{name: record[name] for name in ("id", "method_a", "method_b", *MEASURES)}, **told}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nothing(first: Run, second: Run, images: Mapping[str, int]) -> str:
    if not images["common"]:
        told = f"{images['only_a']} only in {first.path}, {images['only_b']} only in {second.path}"
        return (
            f"no image in both runs: {told}; images are matched by id, the path below the folder or the manifest's id"
        )
    asked = [
        ", ".join(" ".join(str(part) for part in target) for target in run.settings["targets"])
        for run in (first, second)
    ]
    return f"no target in both runs: {first.path} has {asked[0]}; {second.path} has {asked[1]}"


def compare_text(found: Mapping[str, Any]) -> str:
    """A comparison for people."""
    images, predictions = found["images"], found["predictions"]
    lines = [
        f"A {found['run_a']}",
        f"B {found['run_b']}",
        *(f"  {name}: {a} | {b}" for name, a, b in found["differences"]),
        f"images: {images['common']} in both, {images['only_a']} only in A, {images['only_b']} only in B",
        *(f"{side.upper()} is not complete" for side, whole in found["complete"].items() if not whole),
    ]
    if predictions["compared"]:
        lines.append(
            f"predictions: {predictions['flipped']} of {predictions['compared']} flipped ({predictions['share']:.2%})"
        )
    for group in found["groups"]:
        lines += ["", f"{pair_name(group)}: {group['compared']} of {group['pairs']} pairs compared"]
        lines += [f"  not counted: {reason} ({number})" for reason, number in group["excluded"].items()]
        if group["compared"]:
            lines.append(f"  {'':<18}{'mean':>9}{'median':>9}{'5%':>9}{'least':>9}")
            for name in MEASURES:
                lines.append(
                    f"  {measure_name(name, found['top']):<18}"
                    + "".join(f"{value:>9.4f}" for value in group[name].values())
                )
        if moved := score_text(group):
            lines.append(f"  {moved}")
    if found["worst"]:
        lines += ["", f"lowest {measure_name(found['worst_by'], found['top'])}:"]
        for pair in found["worst"][:WORST_TOLD]:
            lines.append(f"  {pair[found['worst_by']]:.4f} {pair['id']} ({pair_name(pair)})")
    for side, alone in found["unmatched"].items():
        lines += [f"only in {side.upper()}: {number} rows of {what}" for what, number in alone.items()]
    return "\n".join(lines) + "\n"


def pair_name(group: Mapping[str, Any]) -> str:
    """What two runs' rows are, in words."""
    parts = [(group["method_a"], group["method_b"]), (group["target_a"], group["target_b"])]
    return ", ".join(a if a == b else f"{a} with {b}" for a, b in parts)


def score_text(group: Mapping[str, Any]) -> str:
    """How far the targets' scores moved, in words; empty where nothing was compared."""
    moved = group["score_difference"]
    if not moved:
        return ""
    if not moved["greatest"]:
        return "the scores are the same"
    return f"the score moved by {moved['mean']:.2e} on average, by {moved['greatest']:.2e} at most"


def measure_name(name: str, top: float) -> str:
    """What one of MEASURES is called."""
    return {"spearman": "rank correlation", "cosine": "cosine", "overlap": f"top-{100 * top:g}% overlap"}[name]

"""The process that does a run's shards: decodes ahead, explains, commits each shard when its last row is done.

It may die at any moment and is then replaced (`job.py`); the rows it had in flight stand in shared memory, so that an
image that kills it is found.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ... import BackendError, HeatmillError, IncompleteError
from ...kernels.device import OutOfMemory
from ...models.preprocess import ImageRefused, decode, normalise, view
from ...models.spec import ModelSpec
from ...models.superpixels import Segmentation, cut
from ..backends import usable_cores
from ..explainer import Engine, in_full
from ..opening import Loaded, open_best
from ..passes import open_passes
from ..trial import ran_out_of_memory
from ..types import Array, Explanation, Item, target_rows
from . import plan as plans
from . import sources, store
from .ahead import ahead
from .child import settle

REPORT_SECONDS = 0.2


class Marks:
    """Shared memory that outlives a worker: the plan rows in flight, when it last got anything done, the wish to stop.

    Without locks: a worker killed inside one would hold it for ever.
    """

    SLOTS = 1 << 14

    def __init__(self, context: Any) -> None:
        self._rows = context.RawArray("q", [-1] * self.SLOTS)
        self._beat = context.RawValue("d", time.monotonic())
        self._stop = context.RawValue("b", 0)
        self._slot: dict[int, int] = {}
        self._free = list(range(self.SLOTS))

    def add(self, row: int) -> None:
        slot = self._slot[row] = self._free.pop()
        self._rows[slot] = row

    def remove(self, row: int) -> None:
        slot = self._slot.pop(row)
        self._rows[slot] = -1
        self._free.append(slot)

    def stop(self) -> None:
        """Ask the worker to end after the batch in flight."""
        self._stop.value = 1

    @property
    def stopping(self) -> bool:
        return bool(self._stop.value)

    def beat(self) -> None:
        self._beat.value = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the worker last finished a batch or an image."""
        return time.monotonic() - float(self._beat.value)

    def rows(self) -> list[int]:
        """The rows in flight."""
        return sorted(row for row in self._rows if row >= 0)


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do.

    Attributes:
        model: where the model file is now.
        todo: the shards.
        crashed: rows that have killed workers; they are written as such, not tried.
        careful: one image in flight at a time.
        threads: that decode; None is one per core.
        device: number of the GPU.
    """

    run: Path
    model: Path
    todo: tuple[int, ...]
    crashed: frozenset[int]
    careful: bool
    threads: int | None
    device: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded image and how it is cut, or why there is none."""

    image: Array | None
    width: int | None = None
    height: int | None = None
    crop_box: tuple[float, float, float, float] | None = None
    status: str = "ok"
    error: str | None = None
    segments: Mapping[Segmentation, Array] = field(default_factory=dict)


class _Drained(Exception):
    """The supervisor asked to stop; what is not committed is dropped."""


def prepare(row: Mapping[str, Any], spec: ModelSpec, dtype: str, wanted: Sequence[Segmentation] = ()) -> Prepared:
    """Read, decode, preprocess and cut one image of the plan."""
    try:
        pixels = decode(sources.read(row["uri"], row["size"], row["mtime_ns"]), exif=spec.exif, color=spec.color)
        shown, box = view(pixels, spec)
        segments = {how: cut(shown, how) for how in wanted}
    except ImageRefused as err:
        return Prepared(None, status=err.status, error=err.reason)
    except MemoryError:
        return Prepared(None, status="too_large", error="there is not enough memory to decode it")
    image = normalise(shown, spec, dtype)
    return Prepared(image, pixels.shape[1], pixels.shape[0], box, segments=segments)


class Collector:
    """Gathers rows by shard and commits a shard when its last image is done."""

    def __init__(self, run: Path, plan: plans.Plan, loaded: Loaded, conn: Connection, marks: Marks) -> None:
        self._run, self._plan, self._loaded, self._conn, self._marks = run, plan, loaded, conn, marks
        self._names = loaded.spec.label_names
        self._grid = plan.settings["grid"]
        self._schema = store.schema(
            tuple(self._grid) if self._grid else None,
            any(call.pixels for call in loaded.calls),
            any(call.method.arrays for call in loaded.calls),
        )
        self._rows: dict[int, dict[int, list[dict[str, Any]]]] = {}
        self._each = int(plan.settings["rows_per_image"])
        self._done = 0
        self._bad = 0
        self._reported = 0.0
        self.prepared: dict[int, Prepared] = {}

    def refuse(self, row: int, prepared: Prepared) -> None:
        """An image that can't be explained: its rows, with the reason."""
        image = self._image(row)
        targets = target_rows(self._plan.targets, image.get("target"))
        self._add(
            row,
            [
                self._values(image, prepared, call.text, target, source, None)
                for call in self._loaded.calls
                for target, source in targets
            ],
        )

    def add(self, explanation: Explanation) -> None:
        """One finished map."""
        row = int(explanation.key)  # type: ignore[call-overload]
        image, prepared = self._image(row), self.prepared[row]
        source = explanation.target_source
        values = self._values(image, prepared, explanation.method.text, explanation.target, source, explanation)
        self._add(row, [values])

    def _image(self, row: int) -> dict[str, Any]:
        values: dict[str, Any] = self._plan.images.slice(row, 1).to_pylist()[0]
        return values

    def _values(
        self,
        image: Mapping[str, Any],
        prepared: Prepared,
        method: str,
        target: int | None,
        source: str,
        explanation: Explanation | None,
    ) -> dict[str, Any]:
        target = None if target is not None and target < 0 else target
        named = target is not None and target < len(self._names)
        values: dict[str, Any] = {
            "row": image["row"],
            "id": image["id"],
            "uri": image["uri"],
            "method": method,
            "target": target,
            "target_source": source,
            "label_name": self._names[target] if named and target is not None else None,
            "status": prepared.status,
            "error": prepared.error,
            "width": prepared.width,
            "height": prepared.height,
            "crop_box": prepared.crop_box,
        }
        if explanation is not None:
            values |= {
                "score": _finite(explanation.score),
                "pred": explanation.pred if explanation.pred >= 0 else None,
                "pred_score": _finite(explanation.pred_score),
                "status": explanation.status,
                "error": explanation.error,
                "extras": json.dumps(dict(explanation.extras)),
            }
        if explanation is not None and explanation.map is not None:
            values["map_shape"] = explanation.map.shape
            if explanation.method.pixels:
                packed, scale, offset = store.encode_pixels(explanation.map)
                column = store.pixel_column(tuple(self._grid) if self._grid else None)
                values |= {column: packed, "map_scale": scale, "map_offset": offset}
            else:
                values["map"] = explanation.map.ravel()
        if explanation is not None and explanation.arrays:
            values["arrays"] = store.encode_arrays(explanation.arrays)
        return values

    def _add(self, row: int, values: list[dict[str, Any]]) -> None:
        shard = row // self._plan.shard_rows
        images = self._rows.setdefault(shard, {})
        images.setdefault(row, []).extend(values)
        if len(images[row]) < self._each:
            return
        self.prepared.pop(row, None)
        self._marks.remove(row)
        self._marks.beat()
        self._done += 1
        self._bad += any(value["status"] != "ok" for value in images[row])
        expected = self._plan.rows(shard)
        if len(images) == len(expected) and all(len(images[each]) == self._each for each in expected):
            self._commit(shard)
        if time.monotonic() - self._reported > REPORT_SECONDS:
            self.report()

    def _commit(self, shard: int) -> None:
        images = self._rows.pop(shard)
        rows = [values for row in self._plan.rows(shard) for values in images[row]]
        settings = self._plan.settings
        footer = {
            "format": store.FORMAT,
            "plan_hash": settings["plan_hash"],
            "shard": shard,
            "upsample": store.UPSAMPLE,
            "map": "float32 (h, w) at the tap's grid; pixel maps: offset + scale * float16, byte planes apart, zstd",
            "layer": settings["layer"],
            "methods": settings["methods"],
            "model": settings["model"]["sha256"],
            "spec": {key: value for key, value in settings["spec"].items() if key != "label_names"},
            **{key: settings[key] for key in ("backend", "provider", "precision", "seed", "versions")},
        }
        try:
            store.write_part(self._run, shard, rows, self._schema, json.dumps(footer, sort_keys=True))
        except OSError as err:
            raise IncompleteError(store.write_refusal(self._run, err)) from err
        self._conn.send(("committed", shard))

    def report(self) -> None:
        """Tell the supervisor how far it is."""
        if self._done:
            self._conn.send(("progress", self._done, self._bad))
            self._done = self._bad = 0
        self._reported = time.monotonic()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(order: Order, conn: Connection, marks: Marks) -> None:
    """Do an order; every message to the supervisor goes through `conn`."""
    settle()
    try:
        conn.send(_answer(order, conn, marks))
    except BrokenPipeError:  # nobody is left to be told
        os._exit(1)


def _answer(order: Order, conn: Connection, marks: Marks) -> tuple[Any, ...]:
    try:
        return ("done", _work(order, conn, marks))
    except _Drained:
        return ("stopped",)
    except OutOfMemory as err:
        return ("refused", "IncompleteError", f"{order.run}: {err}")
    except HeatmillError as err:
        return ("refused", type(err).__name__, str(err))
    except BrokenPipeError:
        raise
    except Exception as err:
        if ran_out_of_memory(err):
            return ("refused", "IncompleteError", f"{order.run}: out of memory; a smaller --batch-size needs less")
        return ("failed", f"{type(err).__name__}: {err}", traceback.format_exc())


def _work(order: Order, conn: Connection, marks: Marks) -> dict[str, float]:
    start = time.perf_counter()
    plan = plans.reopen(order.run)
    loaded = plans.load_for(plan, order.model)
    settings = plan.settings
    size = settings["batch_size"]
    if order.careful and size != loaded.model.input.batch:
        size = 1  # no other image may be in the batch that kills, and a batch that is too large must not look like one
    session = open_best(
        loaded, settings["backend"], settings["provider"], settings["precision"], size, device=order.device
    )
    passes = open_passes(loaded, session, plan.targets, size)
    loaded.release()

    def on_batch(rows: int) -> None:
        marks.beat()
        if marks.stopping:
            raise _Drained

    reload = partial(plans.load_for, plan, order.model)
    spare = in_full(loaded, reload, session, plan.targets, size, settings["seed"], on_batch)
    engine = Engine(loaded, session, plan.targets, size, settings["seed"], on_batch, passes, spare)
    collector = Collector(order.run, plan, loaded, conn, marks)
    marks.beat()
    conn.send(("ready", time.perf_counter() - start, session.version))
    threads = order.threads or usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        items = _items(pool, 1 if order.careful else 2 * threads + 2, order, plan, loaded, collector, marks)
        try:
            if order.careful:
                for item in items:
                    for explanation in engine.stream([item]):
                        collector.add(explanation)
            else:
                for explanation in engine.stream(items):
                    collector.add(explanation)
        except BackendError as err:  # it has run before: a device that is lost, or full
            raise IncompleteError(f"{order.run}: {err}; the same command resumes") from err
        finally:
            pool.shutdown(cancel_futures=True)
    collector.report()
    return {**asdict(engine.stages), "wall": time.perf_counter() - start}


def _items(
    pool: ThreadPoolExecutor,
    window: int,
    order: Order,
    plan: plans.Plan,
    loaded: Loaded,
    collector: Collector,
    marks: Marks,
) -> Iterator[Item]:
    """The images of the shards in order; bad ones go to the collector at once."""

    def wanted() -> Iterator[dict[str, Any]]:
        for row in (row for shard in order.todo for row in plan.rows(shard)):
            marks.add(row)
            if row in order.crashed:
                told = "the image killed the worker twice"
                collector.refuse(row, Prepared(None, status="worker_crash", error=told))
                continue
            yield plan.images.slice(row, 1).to_pylist()[0]

    for image, prepared in prepared_ahead(pool, window, wanted(), loaded):
        if marks.stopping:
            raise _Drained
        if prepared.image is None:
            collector.refuse(image["row"], prepared)
            continue
        collector.prepared[image["row"]] = Prepared(None, prepared.width, prepared.height, prepared.crop_box)
        yield Item(image["row"], prepared.image, image.get("target"), prepared.segments, image["id"])


def prepared_ahead(
    pool: ThreadPoolExecutor, window: int, rows: Iterable[dict[str, Any]], loaded: Loaded
) -> Iterator[tuple[dict[str, Any], Prepared]]:
    """Rows of a plan in their order, prepared by threads while those before them are used; at most `window` wait."""
    how = (loaded.spec, loaded.model.input.dtype, loaded.segmentations)
    return ahead(pool, window, rows, lambda row: prepare(row, *how))

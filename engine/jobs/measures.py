"""A run's metric rows, beside its maps: parts committed by one rename, and the reader of what they hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ... import RunError, __version__
from ..types import MetricCall
from . import store

FORMAT = 1
AGAIN = "heatmill evaluate with the same metrics"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("method", pa.string()),
        ("target", pa.int32()),
        ("target_source", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("curve", pa.list_(pa.float32())),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("direction", pa.string()),
        ("baseline", pa.string()),
        ("mask_space", pa.string()),
        ("score", pa.string()),
        ("steps", pa.int32()),
        ("notes", pa.string()),
    ]
)
STATUSES = (
    *store.STATUSES,
    *("flat", "undefined", "no_boxes", "box_outside", "not_stated"),
)

Pair = tuple[str, str]


def described(call: MetricCall) -> dict[str, Any]:
    """A metric as parts name it: with every parameter, whatever the defaults will be."""
    return {"call": call.text, "name": call.metric.name, "parameters": dict(call.parameters)}


def write(
    run: store.Run,
    block: range,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[MetricCall],
    methods: Sequence[str],
) -> None:
    """Commit what some metrics say of some methods' maps of a block of images."""
    settings = run.settings
    told = {
        "format": FORMAT,
        "plan_hash": settings["plan_hash"],
        "images": [block.start, block.stop],
        "metrics": [described(call) for call in metrics],
        "methods": list(methods),
        "heatmill": __version__,
        **{key: settings[key] for key in ("backend", "provider", "precision", "seed")},
    }
    footer = json.dumps(told, sort_keys=True)
    key = json.dumps([told[name] for name in ("images", "metrics", "methods")], sort_keys=True)
    named = hashlib.sha256(key.encode()).hexdigest()[:8]
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata({b"heatmill": footer.encode()}))
    store.commit(run.path, f"metrics/part-{block.start:09d}-{named}.parquet", store.parquet_bytes(table))


def parts(run: store.Run) -> list[tuple[Path, dict[str, Any]]]:
    """The committed parts in plan order, each with its footer.

    Raises:
        RunError: one is damaged, or of another run.
    """
    found = []
    for path in sorted((run.path / "metrics").glob("part-*.parquet")):
        if not re.fullmatch(r"part-\d{9,}-[0-9a-f]{8}\.parquet", path.name):
            continue
        with store.naming(path, AGAIN):
            footer = json.loads((pq.read_schema(path).metadata or {})[b"heatmill"])
            belongs = footer["plan_hash"] == run.settings["plan_hash"] and footer["format"] == FORMAT
        if not belongs:
            raise RunError(f"{path}: belongs to another run; delete it, and {AGAIN} makes its own")
        found.append((path, footer))
    return sorted(found, key=lambda part: (part[1]["images"], part[0].name))


def done(run: store.Run, metrics: Sequence[MetricCall]) -> dict[Pair, list[range]]:
    """By metric and method, the images that have their rows."""
    known = {json.dumps(described(call), sort_keys=True): call.text for call in metrics}
    found: dict[Pair, list[range]] = defaultdict(list)
    for _, footer in parts(run):
        for text in (known.get(json.dumps(each, sort_keys=True)) for each in footer["metrics"]):
            for method in footer["methods"] if text else ():
                found[str(text), method].append(range(*footer["images"]))
    return found


def read(run: store.Run, metrics: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> pa.Table:
    """The metric rows of a run, in plan order; of all metrics and methods where none are named.

    Raises:
        RunError: a part is damaged, or of another run.
    """
    tables = []
    for path, _ in parts(run):
        with store.naming(path, AGAIN):
            table = pq.read_table(path, page_checksum_verification=True).replace_schema_metadata()
            if table.schema != SCHEMA:
                raise ValueError("its columns are not those of metrics")
        for column, wanted in (("metric", metrics), ("method", methods)):
            if wanted is not None:
                table = table.filter(pc.is_in(table[column], pa.array(list(wanted), pa.string())))
        tables.append(table)
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def verify(run: store.Run) -> int:
    """Read every byte of the metric rows; returns how many there are.

    Raises:
        RunError: the first damage found, with the part's name.
    """
    settings = run.settings
    images = store.read_plan(run.path, settings)["id"].to_pylist()
    each = int(settings["rows_per_image"]) // len(settings["methods"])
    count = 0
    for path, footer in parts(run):
        with store.naming(path, AGAIN):
            table = pq.read_table(path, page_checksum_verification=True)
            calls = [metric["call"] for metric in footer["metrics"]]
            expected = [
                (name, method, call)
                for name in images[slice(*footer["images"])]
                for method in footer["methods"]
                for _ in range(each)
                for call in calls
            ]
            found = list(zip(*(table[key].to_pylist() for key in ("id", "method", "metric")), strict=True))
            values = table["value"].to_numpy(zero_copy_only=False)
            good = np.array([status == "ok" for status in table["status"].to_pylist()], bool)
            if found != expected or set(table["status"].to_pylist()) - set(STATUSES):
                raise ValueError(f"its {len(found)} rows are not the {len(expected)} expected in order")
            if not np.isfinite(values[good]).all() or np.isfinite(values[~good].astype(float)).any():
                raise ValueError("values and statuses do not agree")
        count += len(found)
    return count

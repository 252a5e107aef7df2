"""What every export shares: which rows are taken, what was passed by and why, manifests, work in threads."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ...backends.base import usable_cores
from ..ahead import ahead
from ..report import placed
from ..store import Row, Run

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Made = TypeVar("Made")

MANIFEST = "manifest.csv"
ABOUT = ("method", "explained", "explained_name", "asked", "score", "prediction", "prediction_score", "view", "remark")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be asked of an export; None where the default of the kind holds."""

    method: str | None = None
    limit: int | None = None
    threshold: float | None = None
    padding: float | None = None
    fill: str | None = None
    format: str | None = None
    size: str | None = None


@dataclass(slots=True)
class Selection:
    """The rows of a run to export; counts what was written and what was passed by."""

    run: Run
    options: Options
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def images(self) -> Iterator[list[Row]]:
        """The rows with a map of each image, in plan order; the others are counted by their status."""
        rows = islice(self.run.rows(method=self.options.method), self.options.limit)
        for _, group in groupby(rows, key=lambda row: row.row):
            kept = []
            for row in group:
                if row.map is None:
                    self.skipped[row.status] += 1
                else:
                    kept.append(row)
            if kept:
                yield kept


def about(row: Row) -> dict[str, Any]:
    """What a manifest says of a row's map. No key is `label` or `target`, which would be read as the image's label."""
    values = (
        row.method,
        row.target,
        row.label_name,
        row.target_source,
        _decimal(row.score),
        row.prediction,
        _decimal(row.prediction_score),
        numbers(row.crop_box or ()),
        row.extras.get("reason") or row.extras.get("warning"),
    )
    return dict(zip(ABOUT, values, strict=True))


def _decimal(value: float | None) -> str | None:
    """A float32 in as few digits as say it."""
    return None if value is None else str(np.float32(value))


def numbers(values: Iterable[float]) -> str:
    """Numbers as manifests hold them: "x0 y0 x1 y1"."""
    return " ".join(f"{value:g}" for value in values)


@contextmanager
def manifest(folder: Path, columns: Iterable[str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A manifest in a folder, as a function that adds a line; a key that is no column is left out."""
    with open(folder / MANIFEST, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        yield writer.writerow


def in_threads(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """What `make` gives for each of many items, in their order; a few are in work at a time."""
    workers = usable_cores()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for _, made in ahead(pool, 2 * workers + 1, items, make):
                yield made
        finally:
            pool.shutdown(cancel_futures=True)


def grey(saliency: Array) -> tuple[Array, float]:
    """A finished map as levels 0..1, and the level of zero: min-max, or zero in the middle of a signed map."""
    low, high = float(saliency.min()), float(saliency.max())
    if low < 0:
        return saliency / (2 * max(-low, high)) + 0.5, 0.5
    return (saliency - low) / (high - low or 1), 0.0


def grey_picture(row: Row, shape: tuple[int, int] | None = None) -> Array:
    """A finished map as uint8 at the network's input size, or where it lies on the photograph drawn at `shape`."""
    levels, zero = grey(row.saliency())
    if shape is not None:
        box = np.array(row.crop_box or (0, 0, row.width, row.height), dtype=np.float64)
        scale = np.array([shape[1], shape[0]] * 2) / np.array([row.width, row.height] * 2)
        values, seen = placed(levels, shape, tuple(box * scale))
        levels = np.where(seen, values, zero)
    return np.asarray(np.rint(levels * 255), dtype=np.uint8)

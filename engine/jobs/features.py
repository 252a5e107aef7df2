"""The features of a training run's images: computed once, kept in half precision in its folder, mapped into memory."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ... import IncompleteError, InputError, RunError
from ...kernels import host
from ..backends import Session, usable_cores
from ..opening import Loaded
from ..types import Array
from . import store
from .job import Signals
from .worker import Prepared, prepared_ahead

PART_BYTES, MAX_PART_ROWS = 64 << 20, 4096
FOLDER = "features"
OPEN_PARTS = 256


@dataclass(frozen=True, slots=True)
class Known:
    """Of every image its class (n,), the class's posterior (n,) and whether it can be used (n,); how many have which
    status, and the first bad one with its reason."""

    classes: Array
    scores: Array
    good: Array
    statuses: Mapping[str, int]
    first_bad: tuple[int, str] | None


class Features:
    """The layer's values of every image as the graph holds them, with each image's class and its posterior.

    A part is two files, `part-NNNNNN.npy` (rows, ...) float16 and `part-NNNNNN.json`; the second is the commit.

    Args:
        run: the run's folder.
        images: how many there are.
        shape: the sizes of one image's values.
    """

    def __init__(self, run: Path, images: int, shape: Sequence[int]) -> None:
        self.run, self.images, self.shape = run, images, tuple(shape)
        one = 2 * int(np.prod(self.shape))
        self.part_rows = min(max(1, PART_BYTES // one), MAX_PART_ROWS)
        self.bytes = one * images
        self._open: dict[int, Array] = {}

    @property
    def parts(self) -> range:
        return range(-(-self.images // self.part_rows))

    def missing(self) -> list[int]:
        """The parts that are still to be computed."""
        return [part for part in self.parts if not (self.run / self._name(part, "json")).exists()]

    def rows(self, part: int) -> range:
        return range(part * self.part_rows, min((part + 1) * self.part_rows, self.images))

    def commit(self, part: int, values: Array, about: dict[str, list[Any]]) -> None:
        file = io.BytesIO()
        np.save(file, values)
        store.commit(self.run, self._name(part, "npy"), file.getvalue())
        store.commit(self.run, self._name(part, "json"), json.dumps(about).encode())

    @cached_property
    def known(self) -> Known:
        """What is known of the images besides.

        Raises:
            RunError: a part is damaged.
        """
        classes, scores, good = np.empty(self.images, np.int64), np.empty(self.images), np.empty(self.images, bool)
        statuses: Counter[str] = Counter()
        first_bad: tuple[int, str] | None = None
        for part in self.parts:
            about, rows = self._about(part), self.rows(part)
            classes[rows], scores[rows] = about["class"], about["score"]
            good[rows] = np.array(about["status"]) == "ok"
            statuses.update(about["status"])
            bad = np.flatnonzero(~good[rows])
            if first_bad is None and len(bad):
                first_bad = (rows[bad[0]], str(about["error"][bad[0]]))
        return Known(classes, scores, good, dict(sorted(statuses.items())), first_bad)

    def _part(self, part: int) -> Array:
        """A part's values; only so many are open, since each holds a file."""
        if part not in self._open:
            if len(self._open) >= OPEN_PARTS:
                self._open.pop(next(iter(self._open)))
            self._open[part] = self._opened(part)
        return self._open[part]

    def sound(self) -> bool:
        """Whether every part that is there can be read."""
        try:
            for part in set(self.parts).difference(self.missing()):
                self._about(part)
                self._opened(part)
        except RunError:
            return False
        return True

    def _about(self, part: int) -> dict[str, list[Any]]:
        name = self._name(part, "json")
        try:
            about: dict[str, list[Any]] = json.loads((self.run / name).read_text())
            if any(len(about[key]) != len(self.rows(part)) for key in ("status", "error", "class", "score")):
                raise ValueError("it has another number of rows")
        except (OSError, ValueError, LookupError, TypeError) as err:
            raise self._damaged(name, err) from None
        return about

    def _opened(self, part: int) -> Array:
        name = self._name(part, "npy")
        try:
            values: Array = np.load(self.run / name, mmap_mode="r", allow_pickle=False)
            if values.shape != (len(self.rows(part)), *self.shape) or values.dtype != np.float16:
                raise ValueError(f"it holds {values.dtype} {values.shape}")
        except (OSError, ValueError, EOFError) as err:
            raise self._damaged(name, err) from None
        return values

    def take(self, rows: Array) -> Array:
        """The values of some images, (n, ...) float32.

        Raises:
            RunError: a part is damaged.
        """
        out = np.empty((len(rows), *self.shape), np.float32)
        for i in np.argsort(rows, kind="stable").tolist():  # part by part
            row = int(rows[i])
            out[i] = self._part(row // self.part_rows)[row % self.part_rows]
        return out

    def _name(self, part: int, kind: str) -> str:
        return f"{FOLDER}/part-{part:06d}.{kind}"

    def _damaged(self, name: str, err: Exception) -> RunError:
        return RunError(
            f"{self.run / name}: damaged ({' '.join(str(err).split())[:160]}); start again with --overwrite"
        )


def forward(session: Session, loaded: Loaded, batch: Array, size: int, outputs: Sequence[str]) -> list[Array]:
    """Run up to `size` images; the batch is filled up where the session takes whole ones only."""
    rows = len(batch)
    if rows < size and (not session.flexible or loaded.model.input.batch == size):
        batch = np.concatenate([batch, np.repeat(batch[:1], size - rows, axis=0)])
    return [values[:rows] for values in session.run({loaded.model.input.name: batch}, outputs)]


def compute(
    features: Features,
    loaded: Loaded,
    session: Session,
    images: pa.Table,
    size: int,
    workers: int | None,
    advance: Callable[[int, int], None],
    signals: Signals,
) -> None:
    """Compute the parts that are missing.

    Args:
        images: the plan; where it has a column `target`, it is the class, else the predicted one is.
        size: rows per call of the network.
        advance: told of (images, bad ones) as they are done.
        signals: one of them ends it; what is committed stays.

    Raises:
        InputError: the disk has no room for them, or a label is of no class.
        IncompleteError: no space was left all the same.
        KeyboardInterrupt: it was stopped.
    """
    missing = features.missing()
    needed = features.bytes * len(missing) // max(1, len(features.parts))
    free = shutil.disk_usage(features.run).free
    if needed > free:
        raise InputError(
            f"{features.run}: features of {features.images} images need {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; give --run on another disk, or --limit"
        )
    threads = workers or usable_cores()
    for part in missing:
        rows = features.rows(part)
        values = np.zeros((len(rows), *features.shape), np.float16)
        about: dict[str, list[Any]] = {"status": ["ok"] * len(rows), "error": [""] * len(rows)}
        about |= {"class": [-1] * len(rows), "score": [0.0] * len(rows)}
        listed = images.slice(rows.start, len(rows)).to_pylist()
        with ThreadPoolExecutor(threads) as pool:
            coming = prepared_ahead(pool, 2 * threads + size, listed, loaded)
            try:
                for batch in _batches((prepared for _, prepared in coming), size, about, advance):
                    if signals.number is not None:
                        raise KeyboardInterrupt
                    _observe(loaded, session, batch, size, listed, values, about)
                    advance(len(batch), sum(about["status"][place] != "ok" for place, _ in batch))
            finally:
                pool.shutdown(cancel_futures=True)
        try:
            features.commit(part, values, about)
        except OSError as err:
            raise IncompleteError(store.write_refusal(features.run, err)) from err


def _batches(
    coming: Iterable[Prepared], size: int, about: dict[str, list[Any]], advance: Callable[[int, int], None]
) -> Iterator[list[tuple[int, Array]]]:
    """Good images with their places in the part, `size` at a time; bad ones are noted."""
    waiting: list[tuple[int, Array]] = []
    for place, prepared in enumerate(coming):
        if prepared.image is None:
            about["status"][place], about["error"][place] = prepared.status, str(prepared.error)
            advance(1, 1)
            continue
        waiting.append((place, prepared.image))
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _observe(
    loaded: Loaded,
    session: Session,
    waiting: Sequence[tuple[int, Array]],
    size: int,
    listed: Sequence[Mapping[str, Any]],
    values: Array,
    about: dict[str, list[Any]],
) -> None:
    """One batch through the network, into its part."""
    if loaded.tap is None:
        raise ValueError("features are read at a layer")
    batch = np.stack([image for _, image in waiting])
    raw, found = forward(session, loaded, batch, size, [loaded.scores, loaded.tap.name])
    raw = raw.reshape(len(raw), -1).astype(np.float32)
    with np.errstate(over="ignore"):
        halves = found.astype(np.float16)
    finite = np.isfinite(raw).all(axis=1) & np.isfinite(halves.reshape(len(halves), -1)).all(axis=1)
    for k, (place, _) in enumerate(waiting):
        if not finite[k]:
            told = "the network gave scores, or features in half precision, that are not finite"
            about["status"][place], about["error"][place] = "nonfinite", told
            continue
        label = listed[place].get("target")
        if label is not None and label >= raw.shape[1]:
            told = f"class {label}; the model has classes 0 to {raw.shape[1] - 1}"
            raise InputError(f"label of {listed[place]['id']!r}: {told}")
        chosen = int(raw[k].argmax()) if label is None else label
        score = host.class_scores(raw[k : k + 1], np.array([chosen]), loaded.posterior)[0, 0]
        values[place] = halves[k]
        about["class"][place], about["score"][place] = chosen, float(score)

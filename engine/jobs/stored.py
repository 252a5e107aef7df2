"""A run looked at again: its maps by image, the images themselves, and the model as the run had it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ... import RunError
from ..backends import Session, usable_cores
from ..opening import Loaded, open_best
from ..types import Measured
from . import plan as plans
from . import store
from .store import Row
from .worker import Prepared, prepare

Maps = tuple[tuple[Row, ...], ...]  # of one image, by method and target


class Stored:
    """A run's maps, images and model.

    Attributes:
        model: where the model file is now.
        threads: that decode images.
        size: rows per call of the network.
    """

    def __init__(self, run: store.Run, model: Path | None = None, workers: int | None = None) -> None:
        self.run, self.plan = run, plans.reopen(run.path)
        self.model = model or Path(run.settings["model"]["path"])
        self.threads = workers or usable_cores()
        self.size, self.seed = int(run.settings["batch_size"]), int(run.settings["seed"])

    def open(self, loaded: Loaded) -> Session:
        """A session as the run's was."""
        settings = self.plan.settings
        return open_best(loaded, settings["backend"], settings["provider"], settings["precision"], self.size)

    def images(self, block: range, methods: Sequence[str]) -> Iterator[tuple[int, Maps]]:
        """Images of one shard by their place in the plan, with the rows of some methods' maps."""
        for row, rows in groupby(self.run.rows_of(block), key=lambda each: each.row):
            by_method = {call: tuple(each) for call, each in groupby(rows, key=lambda each: each.method)}
            yield row, tuple(by_method[call] for call in methods)

    def listed(self, row: int) -> dict[str, Any]:
        """What the plan says of an image."""
        values: dict[str, Any] = self.plan.images.slice(row, 1).to_pylist()[0]
        return values

    def prepared(self, image: Mapping[str, Any], maps: Maps, loaded: Loaded) -> Prepared:
        """An image read again; one without a map is left alone, as it may be what killed the run's worker."""
        if all(row.status != "ok" for rows in maps for row in rows):
            return Prepared(None)
        return prepare(image, loaded.spec, loaded.model.input.dtype, loaded.segmentations)


def refused(row: Row, prepared: Prepared) -> Measured:
    """What is said of a map that can't be judged."""
    if row.status != "ok":
        return Measured(None, status=row.status, reason=row.error)
    return Measured(None, status=prepared.status, reason=prepared.error)


def targets_of(maps: Maps) -> tuple[int, ...] | None:
    """The classes of an image's maps, which are the same for every method; None where no map is good."""
    good = [tuple(row.target for row in rows) for rows in maps if any(row.status == "ok" for row in rows)]
    if not good:
        return None
    if len(set(good)) > 1 or None in good[0]:
        raise RunError(f"image {maps[0][0].id!r}: its methods do not have the same targets; heatmill verify says more")
    return tuple(target for target in good[0] if target is not None)

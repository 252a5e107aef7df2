"""Maps made again: of noisy images, and by the network with shuffled weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Any
from zlib import crc32

import numpy as np
import onnx

from ...models.graph.head import raw_scores
from ...models.graph.shuffle import layers, shuffled, stages
from ...models.load import ModelFile, inline_external_data
from ..explainer import Engine
from ..opening import Loaded
from ..passes import open_passes
from ..types import Array, Item, Measured, MetricCall, Subject
from . import plan as plans
from .ahead import ahead
from .stored import Maps, Stored, refused, targets_of
from .worker import Prepared

Place = tuple[int, int, int]  # plan row, method, target
NOTHING = Subject(np.empty((0, 0)), np.empty((0, 0, 0)), 0, np.empty((0, 4)), "no_boxes", {})


def remade(work: Stored, call: MetricCall, methods: Sequence[str], block: range) -> dict[Place, Measured]:
    """What a metric of maps made again says of every map of some images."""
    chosen = [method for method in work.plan.settings["methods"] if method["call"] in methods]
    plan = replace(work.plan, settings={**work.plan.settings, "methods": chosen})
    again = Again(work, plan, call, methods, block)
    if call.metric.again == "noise":
        again.by_noise()
    else:
        again.by_shuffling(cascade=call.metric.again == "cascade")
    return again.measured()


class Again:
    """Some images: their maps made again, and compared as they come."""

    def __init__(self, work: Stored, plan: plans.Plan, call: MetricCall, methods: Sequence[str], block: range) -> None:
        self._work, self._plan, self._call, self._methods, self._block = work, plan, call, methods, block
        self._compared: dict[Place, list[float]] = defaultdict(list)
        self._refused: dict[Place, Measured] = {}
        self._stored: dict[int, Maps] = {}  # of the images in flight

    def measured(self) -> dict[Place, Measured]:
        """What the metric makes of the comparisons."""
        metric, values = self._call.metric, self._call.parameters
        found = dict(self._refused)
        for place, compared in self._compared.items():
            if metric.again == "noise" and not np.isfinite(compared).all():
                found[place] = Measured(None, status="nonfinite", reason="a map made again is not finite")
            else:
                found[place] = metric.measure(NOTHING, float("nan"), np.array(compared), values)
        return found

    def by_noise(self) -> None:
        """The map of the image, then those of noisy copies, in one stream; the first is compared with the others."""
        samples, radius = int(self._call.parameters["samples"]), float(self._call.parameters["radius"])
        first: dict[int, list[Array | None]] = {}
        early: dict[int, list[list[Array | None]]] = defaultdict(list)
        left: dict[int, int] = {}

        def spread(items: Iterator[Item]) -> Iterator[Item]:
            for item in items:
                left[int(item.key)] = samples + 1  # type: ignore[call-overload]
                for sample in range(samples + 1):
                    noisy = item.image if not sample else self._noisy(item, sample, radius)
                    yield replace(item, key=(item.key, sample), image=noisy, name=item.identity, segments={})

        for key, maps in self._stream(None, spread):
            row, sample = key
            left[row] -= 1
            if sample == 0:
                first[row] = maps
            else:
                early[row].append(maps)
            if row in first:
                for others in early.pop(row, []):
                    self._compare(row, first[row], others)
            if not left[row]:
                del first[row], left[row], self._stored[row]

    def by_shuffling(self, cascade: bool) -> None:
        """The stored maps beside those of the network with a stage shuffled, or with all stages from the scores on."""
        loaded = plans.load_for(self._plan, self._work.model)
        parts = stages(layers(loaded.model.proto, raw_scores(loaded.model)), int(self._call.parameters["stages"]))
        for stage in range(len(parts)):
            names = [name for part in (parts[: stage + 1] if cascade else [parts[stage]]) for name in part]

            def change(model: ModelFile, names: Sequence[str] = names) -> onnx.ModelProto:
                proto = onnx.ModelProto()
                proto.CopyFrom(model.proto)
                inline_external_data(proto, model)
                return shuffled(proto, names, self._work.seed)

            for key, maps in self._stream(change, iter):
                self._compare(key, [each.map for rows in self._stored.pop(key) for each in rows], maps)

    def _compare(self, row: int, before: Sequence[Array | None], after: Sequence[Array | None]) -> None:
        compare, count = self._call.metric.compare, len(before) // len(self._methods)
        if compare is None:
            raise ValueError(f"{self._call.text} compares no maps")
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            place = (row, i // count, i % count)
            if place not in self._refused:
                value = float("nan")
                if one is not None and other is not None:
                    value = compare(one, other, self._call.parameters)
                self._compared[place].append(value)

    def _stream(
        self,
        change: Callable[[ModelFile], onnx.ModelProto] | None,
        spread: Callable[[Iterator[Item]], Iterator[Item]],
    ) -> Iterator[tuple[Any, list[Array | None]]]:
        """Every item's key, and its maps by method and target."""
        work = self._work
        loaded = plans.load_for(self._plan, work.model, change)
        session = work.open(loaded)
        passes = open_passes(loaded, session, work.plan.targets, work.size)
        loaded.release()
        engine = Engine(loaded, session, work.plan.targets, work.size, work.seed, passes=passes)
        with ThreadPoolExecutor(work.threads) as pool:
            try:
                explanations = engine.stream(spread(self._items(pool, loaded)))
                for key, found in groupby(explanations, key=lambda each: each.key):
                    yield key, [each.map for each in found]
            finally:
                pool.shutdown(cancel_futures=True)

    def _items(self, pool: ThreadPoolExecutor, loaded: Loaded) -> Iterator[Item]:
        def made(each: tuple[int, Maps]) -> Prepared:
            return self._work.prepared(self._work.listed(each[0]), each[1], loaded)

        images = self._work.images(self._block, self._methods)
        for (row, maps), prepared in ahead(pool, 2 * self._work.threads + 2, images, made):
            targets = targets_of(maps)
            for j, rows in enumerate(maps):
                for k, each in enumerate(rows):
                    if each.status != "ok" or prepared.image is None:
                        self._refused[row, j, k] = refused(each, prepared)
            if prepared.image is not None and targets is not None:
                self._stored[row] = maps
                listed = self._work.listed(row)
                yield Item(row, prepared.image, listed.get("target"), prepared.segments, listed["id"], targets)

    def _noisy(self, item: Item, sample: int, radius: float) -> Array:
        """The image plus uniform noise, of the seed, the image and its number; for uint8 in shares of 255."""
        digest = int.from_bytes(hashlib.blake2b(item.identity.encode(), digest_size=8).digest(), "little")
        stream = [0, 0, crc32(b"max-sensitivity"), sample]
        key = np.array([self._work.seed, digest], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=stream))
        noise = generator.uniform(-radius, radius, item.image.shape)
        if item.image.dtype == np.uint8:
            return np.clip(np.rint(item.image + 255 * noise), 0, 255).astype(np.uint8)
        return np.asarray(item.image + noise, dtype=item.image.dtype)

"""Where a batch is painted and run: in the host's memory, or in a GPU's.

A canvas turns masks in their smallest form into perturbed images, straight in what the network reads. On a GPU images,
banks and baselines are sent there once, and of a batch only the asked scores come back.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from ..kernels import host
from ..kernels.cuda import Kernels
from ..kernels.device import DeviceArray
from ..kernels.masks import Grids, Maps, Masks, Ranks, Segments, Windows
from ..models.preprocess import normalise
from ..models.spec import ModelSpec
from .backends import DeviceSession, Session
from .coincide import Asked
from .opening import Loaded, blank_batch
from .passes import Passed
from .types import (
    SEGMENT_MEAN,
    Array,
    Bank,
    GridBank,
    Item,
    MapBank,
    PathBank,
    RankBank,
    SegmentBank,
    Summed,
    TapBank,
    WindowBank,
)


def _channels_first(image: Array, spec: ModelSpec, make: Callable[[Array], Array]) -> Array:
    """What `make` gives of an image (c, H, W), in the network's own layout."""
    return make(image) if spec.layout == "NCHW" else make(image.transpose(2, 0, 1)).transpose(1, 2, 0)


def _black(image: Array, spec: ModelSpec) -> Array:
    pixels = np.zeros((*spec.input_size[1:], spec.input_size[0]), dtype=np.uint8)
    return normalise(pixels, spec, str(image.dtype))


def _mean(image: Array, spec: ModelSpec) -> Array:
    axes = (1, 2) if spec.layout == "NCHW" else (0, 1)
    return np.asarray(image.mean(axis=axes, keepdims=True, dtype=np.float64), dtype=np.float32)


def _blurred(image: Array, spec: ModelSpec, size: str = "51", sigma: str = "50") -> Array:
    """Kernel size and sigma are Group-CAM's where none are given."""
    return _channels_first(image, spec, lambda each: host.blur(each.astype(np.float32), int(size), float(sigma)))


def _rise_blurred(image: Array, spec: ModelSpec) -> Array:
    return _channels_first(image, spec, lambda each: host.rise_blur(each.astype(np.float32)))


def _segment_means(image: Array, spec: ModelSpec, segments: Array) -> Array:
    return _channels_first(image, spec, lambda each: host.segment_means(each, segments))


def _least(image: Array, spec: ModelSpec) -> Array:
    return np.array(image.min(), dtype=np.float32)


def _greatest(image: Array, spec: ModelSpec) -> Array:
    return np.array(image.max(), dtype=np.float32)


BASELINES: dict[str, Callable[..., Array | None]] = {
    "zero": lambda image, spec: None,
    "black": _black,
    "mean": _mean,
    "blur": _blurred,
    "rise-blur": _rise_blurred,
    "least": _least,
    "greatest": _greatest,
}

ROAD = "road"  # no baseline: what is hidden is filled in from around it

Wish = tuple[slice, Array, str]  # rows of a batch, classes, kind of score


class Ran(Protocol):
    """What a batch gives."""

    def wait(self) -> None:
        """Until it is there."""
        ...

    def alone(self, slot: int) -> Passed:
        """All that is known of one row."""
        ...

    def whole(self) -> Passed:
        """The scores of all rows."""
        ...

    def scores(self, slots: slice, classes: Array, kind: str) -> Array:
        """Posteriors (k, n) of some rows and classes."""
        ...


class HostCanvas:
    """Rows in the host's memory.

    Attributes:
        images: (rows, ...) what the network reads.
        taps: (rows, c, h, w) what the head reads.
        ahead: how many batches are queued before the first is waited for.
    """

    ahead = 0

    def __init__(self, loaded: Loaded, session: Session, rows: int, taps: tuple[int, ...], seed: int) -> None:
        self._loaded, self._session, self._seed = loaded, session, seed
        self.images = blank_batch(loaded, rows)
        self.taps = np.zeros(taps, np.float32)
        self._masks = np.empty((rows, *loaded.facts.size), np.float32)
        self._baselines: dict[Hashable, dict[Hashable, Array | None]] = {}

    def put(self, slot: int, image: Array) -> None:
        """An image as it is."""
        self.images[slot] = image

    def paint(
        self, slots: slice, item: Item, asked: Asked, rows: slice, name: str = "", features: Array | None = None
    ) -> None:
        """Some rows of what is asked of an image.

        Args:
            name: of the method, for its random numbers.
            features: the image's maps at the layer, where these are changed.
        """
        bank, image, place = asked.bank, item.image, self.images[slots]
        if bank is None:
            place[:] = image
            return
        if isinstance(bank, TapBank) and features is not None:
            np.multiply(features, bank.masks[rows], out=self.taps[slots])
            return
        layout, size = self._loaded.spec.layout, self._loaded.facts.size
        masks = self._masks[: rows.stop - rows.start]
        if isinstance(bank, RankBank):
            _rank_masks(bank, rows, masks)
        if asked.baseline == ROAD:
            host.impute(image, masks, self._road_noise(item, bank, rows), layout, out=place)
            return
        baseline = self.baseline(item, asked)
        if isinstance(bank, PathBank):
            masks[:] = bank.shares[rows, None, None]
            for i, draw in enumerate(bank.draws[rows]):
                start = image if draw < 0 else self._noisy(item, name, int(draw), bank.noise)
                host.blend(start, masks[i : i + 1], baseline, layout, out=place[i : i + 1])
            return
        if isinstance(bank, MapBank):
            host.upsample(bank.maps[rows], size, bank.rule, out=masks)
        elif isinstance(bank, GridBank):
            host.grid_masks(bank.bits[rows], bank.offsets[rows], size, out=masks)
        elif isinstance(bank, SegmentBank):
            host.segment_masks(bank.segments, bank.bits[rows], out=masks)
        elif isinstance(bank, WindowBank):
            host.window_masks(bank.boxes[rows], size, out=masks)
        host.blend(image, masks, baseline, layout, out=place)

    def run(self, rows: int, wishes: Sequence[Wish], observed: bool) -> Passed:
        """Run the network on the first `rows`; with `observed` the tapped layer is read too."""
        loaded = self._loaded
        tap = loaded.tap if observed else None
        names = [loaded.scores, *([tap.name] if tap else [])]
        outputs = self._session.run({loaded.model.input.name: self.images[:rows]}, names)
        features = tap.to_nchw(outputs[1]) if tap else None
        return Passed(outputs[0].reshape(rows, -1), np.empty((rows, 0), np.int64), features, {})

    def sums(self, summed: Summed) -> Array:
        """Weighted sums (k, H, W) of masks at the network's size."""
        bank = summed.bank
        return host.accumulate_grid(bank.bits, bank.offsets, summed.weights, self._loaded.facts.size)

    def forget(self, item: Item) -> None:
        """The image is done."""
        self._baselines.pop(item.key, None)

    def baseline(self, item: Item, asked: Asked) -> Array | None:
        """What stands for absence; made once for an image, or once for each of its superpixels."""
        known = self._baselines.setdefault(item.key, {})
        name, bank, spec = asked.baseline, asked.bank, self._loaded.spec
        key: Hashable = name
        if name == SEGMENT_MEAN and isinstance(bank, SegmentBank):
            key = (name, id(bank.segments))
            if key not in known:
                known[key] = _segment_means(item.image, spec, bank.segments)
        elif key not in known:
            kind, *options = name.split(":")
            known[key] = BASELINES[kind](item.image, spec, *options)
        return known[key]

    def _noisy(self, item: Item, name: str, draw: int, share: float) -> Array:
        """The image plus a draw of Gaussian noise that depends on the seed, the image, the method and its number."""
        generator = self._random(item, name, draw)
        deviation = share * (float(item.image.max()) - float(item.image.min()))
        return np.asarray(item.image + deviation * generator.standard_normal(item.image.shape, dtype=np.float32))

    def _random(self, item: Item, name: str, number: int) -> np.random.Generator:
        """Random numbers of an image, a stream for each name and number."""
        stream = [0, 0, crc32(name.encode()), number]
        return np.random.Generator(np.random.Philox(key=random_key(self._seed, item), counter=stream))

    def _road_noise(self, item: Item, bank: Bank, rows: slice) -> Array:
        """Standard normal numbers for imputed rows; those of one image are the same for every map and order."""
        if not isinstance(bank, RankBank):
            raise ValueError("only rank masks are imputed")
        noise = np.empty((rows.stop - rows.start, *item.image.shape), dtype=np.float32)
        for out, threshold in zip(noise, bank.thresholds[rows], strict=True):
            self._random(item, ROAD, int(threshold)).standard_normal(dtype=np.float32, out=out)
        return noise


def _rank_masks(bank: RankBank, rows: slice, out: Array) -> None:
    """Masks of some rows; those of one order are made together."""
    of, thresholds = bank.of[rows], bank.thresholds[rows]
    for part in np.split(np.arange(len(of)), np.flatnonzero(np.diff(of)) + 1):
        host.rank_masks(bank.ranks[of[part[0]]], thresholds[part], out=out[part[0] : part[-1] + 1])


def random_key(seed: int, item: Item) -> Array:
    """Philox's key for the random numbers of an image."""
    digest = int.from_bytes(hashlib.blake2b(item.identity.encode(), digest_size=8).digest(), "little")
    return np.array([seed, digest], np.uint64)


class DeviceCanvas:
    """Rows in a GPU's memory, in the network's own type; one batch is queued while another is waited for.

    Raises:
        BackendError: there are no kernels for the GPU.
    """

    ahead = 1

    def __init__(self, loaded: Loaded, session: DeviceSession, rows: int, on_host: HostCanvas) -> None:
        self._loaded, self._session, self._on_host = loaded, session, on_host
        if session not in _TOOLS:
            _TOOLS[session] = _Tools(session)
        self._tools = _TOOLS[session]
        self._kernels, self._stream, self._copies = self._tools.kernels, session.stream, self._tools.copies
        self._images = self._kernels.empty((rows, *on_host.images.shape[1:]), session.input_dtype)
        self._sent: dict[tuple[int, str], DeviceArray] = {}
        self._made: dict[Hashable, dict[str, DeviceArray]] = {}  # baselines, by image

    def put(self, slot: int, image: Array) -> None:
        """An image as it is."""
        whole = Maps(self._kernels.constant("whole", lambda: np.ones((1, 1, 1), np.float32), self._stream))
        self._blend(slice(slot, slot + 1), image, whole, None)

    def paint(
        self, slots: slice, item: Item, asked: Asked, rows: slice, name: str = "", features: Array | None = None
    ) -> None:
        """Some rows of what is asked of an image."""
        bank = asked.bank
        if bank is None:
            raise ValueError("rows without masks are not for the network alone")
        if asked.baseline == ROAD:
            self._on_host.paint(slots, item, asked, rows, name, features)
            painted = np.ascontiguousarray(self._on_host.images[slots], self._images.dtype)
            out = self._images.rows(slots.start, slots.stop)
            self._kernels.upload(painted, out=out, stream=self._stream)
            self._kernels.driver.synchronize(self._stream)
            return
        if isinstance(bank, RankBank):
            self._paint_ranks(slots, item, asked, bank, rows)
            return
        self._blend(slots, item.image, self._masks(bank, rows), self._baseline(item, asked))

    def run(self, rows: int, wishes: Sequence[Wish], observed: bool) -> Ran:
        """Queue the network, and the scores that are wished for.

        A batch is always whole: a library may make kernels for every new shape.
        """
        loaded, kernels, stream = self._loaded, self._kernels, self._stream
        kernels.turn()
        self._tools.sides.reverse()
        side = self._tools.sides[0]
        tap = loaded.tap if observed else None
        names = [loaded.scores, *([tap.name] if tap else [])]
        feeds = {loaded.model.input.name: self._images}
        kinds = self._session.described(feeds, names)
        outputs = {name: side.take(name, *kind) for name, kind in zip(names, kinds, strict=True)}
        self._session.run_on_device(feeds, outputs)
        raw = outputs[loaded.scores]
        raw = DeviceArray(raw.pointer, (raw.shape[0], int(np.prod(raw.shape[1:]))), raw.dtype, raw.owner)
        found: dict[Hashable, DeviceArray] = {}
        for slots, classes, kind in wishes:
            key = _wish(slots, classes, kind)
            if key in found:
                continue
            of, n = raw.rows(slots.start, slots.stop), slots.stop - slots.start
            out = side.take((len(found), "scores"), (n, len(classes)), np.dtype(np.float32))
            if np.array_equal(classes, np.arange(raw.shape[1])):
                found[key] = kernels.posteriors(of, kind, out, stream=stream)
                continue
            targets = side.take((len(found), "targets"), out.shape, np.dtype(np.int32))
            rows_of = side.hold(len(found), np.tile(classes.astype(np.int32), (n, 1)))
            kernels.upload(rows_of, out=targets, stream=stream)
            found[key] = kernels.class_scores(of, targets, kind, out, stream=stream)
        self._session.driver.record(side.event, stream)
        return _OnDevice(kernels, side.event, self._copies, raw, outputs[tap.name] if tap else None, loaded, found)

    def sums(self, summed: Summed) -> Array:
        """Weighted sums (k, H, W) of masks at the network's size, beside what is queued."""
        bank, kernels, stream = summed.bank, self._kernels, self._copies
        weights = self._send(summed.weights.astype(np.float32))
        bits, offsets = self._on_device(bank.bits, "uint8"), self._on_device(bank.offsets, "int32")
        found = kernels.accumulate_grid(bits, offsets, weights, self._loaded.facts.size, stream=stream)
        return kernels.download(found, stream=stream)

    def forget(self, item: Item) -> None:
        """The image is done."""
        self._on_host.forget(item)
        self._made.pop(item.key, None)

    def _blend(self, slots: slice, image: Array, masks: Masks, baseline: DeviceArray | None) -> None:
        out, layout = self._images.rows(slots.start, slots.stop), self._loaded.spec.layout
        self._kernels.blend(self._on_device(image, "float32"), masks, baseline, layout, out, stream=self._stream)

    def _paint_ranks(self, slots: slice, item: Item, asked: Asked, bank: RankBank, rows: slice) -> None:
        """Rows of one order of the pixels are painted together."""
        orders, thresholds = self._on_device(bank.ranks, "int32"), self._on_device(bank.thresholds, "int32")
        baseline, of = self._baseline(item, asked), bank.of[rows]
        for part in np.split(np.arange(len(of)), np.flatnonzero(np.diff(of)) + 1):
            first, last = int(part[0]), int(part[-1]) + 1
            one = orders.rows(int(of[first]), int(of[first]) + 1)
            ranks = DeviceArray(one.pointer, one.shape[1:], one.dtype, one.owner)
            masks = Ranks(ranks, thresholds.rows(rows.start + first, rows.start + last))
            self._blend(slice(slots.start + first, slots.start + last), item.image, masks, baseline)

    def _masks(self, bank: Bank, rows: slice) -> Masks:
        def some(array: Array, kind: str) -> DeviceArray:
            return self._on_device(array, kind).rows(rows.start, rows.stop)

        if isinstance(bank, MapBank):
            return Maps(some(bank.maps, "float32"), bank.rule)
        if isinstance(bank, GridBank):
            return Grids(some(bank.bits, "uint8"), some(bank.offsets, "int32"))
        if isinstance(bank, SegmentBank):
            return Segments(self._on_device(bank.segments, "int32"), some(bank.bits, "uint8"))
        if isinstance(bank, WindowBank):
            return Windows(some(bank.boxes, "int32"))
        raise ValueError(f"no kernel paints a {type(bank).__name__}")

    def _baseline(self, item: Item, asked: Asked) -> DeviceArray | None:
        kind, *options = asked.baseline.split(":")
        made = self._made.setdefault(item.key, {})
        if kind == "blur":
            if asked.baseline not in made:
                size, sigma = options or ("51", "50")
                image, layout = self._on_device(item.image, "float32"), self._loaded.spec.layout
                made[asked.baseline] = self._kernels.blur(image, int(size), float(sigma), layout, stream=self._stream)
            return made[asked.baseline]
        baseline = self._on_host.baseline(item, asked)
        if baseline is None:
            return None
        channels = self._loaded.spec.input_size[0]
        if baseline.size in (1, channels):  # the same everywhere
            if asked.baseline not in made:
                made[asked.baseline] = self._send(np.resize(baseline.astype(np.float32), channels))
            return made[asked.baseline]
        return self._on_device(baseline, "float32")

    def _on_device(self, array: Array, kind: str) -> DeviceArray:
        """An array of the host's, sent once and kept for as long as the host's own is."""
        key = (id(array), kind)
        if key not in self._sent:
            self._sent[key] = self._send(np.ascontiguousarray(array, kind))
            weakref.finalize(array, self._sent.pop, key, None).atexit = False
        return self._sent[key]

    def _send(self, array: Array) -> DeviceArray:
        """An array of the host's, there for every stream; what is queued is not waited for."""
        sent = self._kernels.upload(array, stream=self._copies)
        self._kernels.driver.synchronize(self._copies)
        return sent


class _Tools:
    """What all canvases of a session share: the kernels, a stream for copies, memory for two batches' results."""

    def __init__(self, session: DeviceSession) -> None:
        self.kernels = Kernels(session.driver, pooled=True)
        self.copies = session.driver.stream()
        self.sides = [_Side(self.kernels), _Side(self.kernels)]


_TOOLS: weakref.WeakKeyDictionary[DeviceSession, _Tools] = weakref.WeakKeyDictionary()


class _Side:
    """Memory for what one batch gives, while the next is queued."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._held: dict[Hashable, DeviceArray] = {}
        self._read: dict[Hashable, Array] = {}
        self.event = kernels.driver.event()

    def take(self, name: Hashable, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array that grows with the largest that was asked."""
        wanted = DeviceArray(0, shape, dtype)
        held = self._held.get(name)
        if held is None or held.nbytes < wanted.nbytes:
            held = self._held[name] = self._kernels.empty((wanted.nbytes,), np.uint8)
        return DeviceArray(held.pointer, shape, dtype, held)

    def hold(self, name: Hashable, array: Array) -> Array:
        """Keep what is being copied."""
        self._read[name] = array
        return array


class _OnDevice:
    """What a queued batch gives; read on a stream of its own, so that the next batch is not waited for."""

    def __init__(
        self,
        kernels: Kernels,
        event: int,
        stream: int,
        raw: DeviceArray,
        features: DeviceArray | None,
        loaded: Loaded,
        found: Mapping[Hashable, DeviceArray],
    ) -> None:
        self._kernels, self._event, self._stream = kernels, event, stream
        self._raw, self._features, self._loaded, self._found = raw, features, loaded, found

    def wait(self) -> None:
        self._kernels.driver.wait(self._stream, self._event)
        self._kernels.driver.synchronize(self._stream)

    def alone(self, slot: int) -> Passed:
        features = None
        if self._features is not None and self._loaded.tap is not None:
            features = self._loaded.tap.to_nchw(self._read(self._features.rows(slot, slot + 1)))
        return Passed(self._read(self._raw.rows(slot, slot + 1)), np.empty((1, 0), np.int64), features, {})

    def whole(self) -> Passed:
        raw = self._read(self._raw).astype(np.float32)
        return Passed(raw, np.empty((len(raw), 0), np.int64), None, {})

    def scores(self, slots: slice, classes: Array, kind: str) -> Array:
        return self._read(self._found[_wish(slots, classes, kind)]).T

    def _read(self, array: DeviceArray) -> Array:
        self._kernels.driver.wait(self._stream, self._event)
        return self._kernels.download(array, stream=self._stream)


def _wish(slots: slice, classes: Array, kind: str) -> Hashable:
    return slots.start, classes.tobytes(), kind

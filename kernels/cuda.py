"""The kernels on a device: the names and arguments of `reference`, over arrays in device memory.

Types, shapes and layouts are checked here, at the launch; the kernels trust what they get. Everything is queued on the
caller's stream. Without `out`, a result gets memory of its own, which goes back when its array is dropped.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from . import host
from .binaries import binary_for
from .device import Argument, DeviceArray, Driver, OutOfMemory
from .masks import Grids, Masks, checked, corner_places, places

Array = npt.NDArray[Any]

FLOATS = ("float32", "float16", "bfloat16")
TYPES = (*FLOATS, "uint8")
LAYOUTS = ("NCHW", "NHWC")
KINDS = {"none": 0, "sigmoid": 1, "softmax": 2}

# the entry points of every file of `src`
KERNELS: dict[str, tuple[str, ...]] = {
    "accumulate": ("accumulate_maps", "accumulate_grid", "accumulate_splits"),
    "blend": tuple(f"blend_{masks.source}_{kind}" for masks in get_args(Masks) for kind in TYPES),
    "blur": ("blur",),
    "extrema": ("extrema",),
    "normalise": tuple(f"normalise_{kind}" for kind in TYPES),
    "scores": tuple(f"{name}_{kind}" for name in ("scores", "nonfinite") for kind in FLOATS),
}

BLOCK = 256  # threads, as in src/common.cuh
STORE = 16  # bytes of one vector store
MOST_ROWS = 65535  # of a grid's second axis
CHUNK = 64  # masks that one thread sums at least
MOST_SPLITS = 32  # of a weighted sum; each needs a copy of the result
POOL_STEP, POOL_BYTES = 1 << 20, 1 << 28  # sizes above are rounded to it; what is kept at most
WORKSPACE = 1 << 28  # bytes that a weighted sum holds at most, unless one class needs more


class _Pool:
    """Device memory that is used again, since to free it a driver waits for all that runs.

    What is given back may still be read by what is queued: it is used again after two turns.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._ready: dict[int, list[int]] = {}
        self._given: tuple[list[tuple[int, int]], ...] = ([], [])
        self._kept = 0
        self._closed = False

    def take(self, nbytes: int) -> tuple[int, int]:
        """A pointer, and the size it stands for."""
        size = 1 << (nbytes - 1).bit_length() if nbytes <= POOL_STEP else -(-nbytes // POOL_STEP) * POOL_STEP
        if self._ready.get(size):
            self._kept -= size
            return self._ready[size].pop(), size
        try:
            return self._driver.alloc(size), size
        except OutOfMemory:
            self.empty()
            return self._driver.alloc(size), size

    def give(self, pointer: int, size: int) -> None:
        if self._closed:
            self._driver.free(pointer)
        else:
            self._given[1].append((pointer, size))

    def turn(self) -> None:
        """Another batch is queued."""
        older, newer = self._given
        self._given = (newer, [])
        for pointer, size in older:
            if self._kept + size > POOL_BYTES:
                self._driver.free(pointer)
                continue
            self._ready.setdefault(size, []).append(pointer)
            self._kept += size

    def empty(self) -> None:
        """Free all that nothing refers to."""
        for pointer, _ in [*self._given[0], *self._given[1]]:
            self._driver.free(pointer)
        for pointers in self._ready.values():
            for pointer in pointers:
                self._driver.free(pointer)
        self._ready, self._given, self._kept = {}, ([], []), 0

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self.empty()


class _Memory:
    """Device memory that goes back when nothing refers to it."""

    def __init__(self, driver: Driver, pool: _Pool | None, nbytes: int) -> None:
        if pool is None:
            self.pointer = driver.alloc(max(nbytes, 1))
            weakref.finalize(self, driver.free, self.pointer).atexit = False
            return
        self.pointer, size = pool.take(max(nbytes, 1))
        weakref.finalize(self, pool.give, self.pointer, size).atexit = False


class Kernels:
    """The kernels of one device, compiled once. One thread at a time may use it.

    Args:
        pooled: whether memory is used again. Then `turn` is called for every batch that is queued, and what is dropped
            before a batch is queued must have been read when the next but one is.

    Raises:
        BackendError: there is no cubin for the device's architecture, and NVRTC can't make one.
    """

    def __init__(self, driver: Driver, pooled: bool = False) -> None:
        self.driver = driver
        self._pool = _Pool(driver) if pooled else None
        if self._pool is not None:
            weakref.finalize(self, self._pool.close).atexit = False
        self._module = driver.load(binary_for(driver.architecture))
        self._functions: dict[str, int] = {}
        self._constants: dict[Hashable, DeviceArray] = {}
        self._workspaces: dict[int, DeviceArray] = {}

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """An array whose values are undefined."""
        kind = np.dtype(dtype)
        memory = _Memory(self.driver, self._pool, math.prod(shape) * kind.itemsize)
        return DeviceArray(memory.pointer, shape, kind, memory)

    def turn(self) -> None:
        """Another batch is queued."""
        if self._pool is not None:
            self._pool.turn()

    def upload(self, array: Array, *, stream: int, out: DeviceArray | None = None) -> DeviceArray:
        """A host array on the device."""
        array = np.ascontiguousarray(array)
        out = self._out(out, array.shape, (array.dtype.name,), array.dtype)
        self.driver.to_device(out.pointer, array, stream)
        return out

    def download(self, array: DeviceArray, *, stream: int) -> Array:
        """A device array on the host, once it is there."""
        result = np.empty(array.shape, array.dtype)
        self.driver.to_host(result, array.pointer, stream)
        self.driver.synchronize(stream)
        return result

    def blend(
        self,
        image: DeviceArray,
        masks: Masks,
        baseline: DeviceArray | None = None,
        layout: str = "NCHW",
        out: DeviceArray | None = None,
        *,
        stream: int,
    ) -> DeviceArray:
        """`x * m + b * (1 - m)`: one image under n masks, as (n, *image.shape); see `reference.blend`.

        Args:
            image: (c, H, W) or, for layout NHWC, (H, W, c), float32.
            baseline: float32, (c,) or as the image; None is zero.
            out: of any of TYPES; uint8 is rounded and clipped. Without it the result is float32.
        """
        checked("image", image, ("float32",), (None, None, None))
        channels, height, width = _sides(image.shape, layout)
        n, more = masks.arguments((height, width), partial(self._places, stream=stream))
        if n > MOST_ROWS or math.prod(image.shape) >= 2**31:
            raise ValueError(f"{n} rows of {image.shape}: at most {MOST_ROWS} of fewer than 2**31 elements")
        out = self._out(out, (n, *image.shape), TYPES)
        if baseline is None:
            baseline = self.constant(("zeros", channels), lambda: np.zeros(channels, np.float32), stream)
        per_element = baseline.shape == image.shape
        checked("baseline", baseline, ("float32",), image.shape if per_element else (channels,))
        span = height * width * (channels if layout == "NHWC" else 1)
        lanes = STORE // out.dtype.itemsize
        arguments: list[Argument] = [
            out.pointer,
            image.pointer,
            baseline.pointer,
            *_ints(per_element, channels, height, width, layout == "NHWC"),
            *more,
        ]
        self._launch(f"blend_{masks.source}_{out.dtype.name}", (_blocks(span, BLOCK * lanes), n), arguments, stream)
        return out

    def extrema(
        self, maps: DeviceArray, size: tuple[int, int], rule: str = "half-pixel", *, stream: int
    ) -> tuple[DeviceArray, DeviceArray]:
        """Least and greatest value (n,) float32 of every resized map (n, h, w); see `reference.extrema`."""
        n, h, w = checked("maps", maps, ("float32",), (None, None, None))
        low, high = self.empty((n,), np.float32), self.empty((n,), np.float32)
        tables = [
            self.constant(("corners", n_in, n_out, rule), partial(corner_places, n_in, n_out, rule), stream)
            for n_in, n_out in zip((h, w), size, strict=True)
        ]
        arguments = [low.pointer, high.pointer, maps.pointer, *_ints(h, w)]
        for table in tables:
            arguments += [table.pointer, np.int32(table.shape[0])]
        self._launch("extrema", (n, 1), arguments, stream)
        return low, high

    def blur(
        self,
        image: DeviceArray,
        kernel_size: int,
        sigma: float,
        layout: str = "NCHW",
        out: DeviceArray | None = None,
        *,
        stream: int,
    ) -> DeviceArray:
        """Gaussian blur of an image float32, reflected borders; see `reference.blur`."""
        checked("image", image, ("float32",), (None, None, None))
        channels, height, width = _sides(image.shape, layout)
        _counted("image", image.shape)
        if kernel_size < 1 or kernel_size % 2 == 0 or not sigma > 0:
            raise ValueError(f"a blur of {kernel_size} samples, sigma {sigma}: the size is odd, sigma above 0")
        out = self._out(out, image.shape, ("float32",))
        taps = self.constant(
            ("gaussian", kernel_size, sigma), lambda: host.gaussian(kernel_size, sigma).astype(np.float32), stream
        )
        elements, step = math.prod(image.shape), channels if layout == "NHWC" else 1
        between = self._workspace(elements * 4, stream)
        for to, source, length, stride in (
            (between, image.pointer, height, width * step),
            (out.pointer, between, width, step),
        ):
            arguments = [to, source, taps.pointer, *_ints(kernel_size // 2, elements, length, stride)]
            self._launch("blur", (_blocks(elements), 1), arguments, stream)
        return out

    def posteriors(self, raw: DeviceArray, kind: str, out: DeviceArray | None = None, *, stream: int) -> DeviceArray:
        """Raw scores (n, classes) of FLOATS as posteriors float32; see `reference.posteriors`."""
        return self._scores(raw, None, kind, out, stream)

    def class_scores(
        self, raw: DeviceArray, targets: DeviceArray, kind: str, out: DeviceArray | None = None, *, stream: int
    ) -> DeviceArray:
        """Posteriors (n, k) float32 of each row's `targets` (n, k) int32; NaN for what is no class.

        See `reference.class_scores`.
        """
        return self._scores(raw, targets, kind, out, stream)

    def nonfinite(self, raw: DeviceArray, out: DeviceArray | None = None, *, stream: int) -> DeviceArray:
        """How many of each row's scores (n, classes) of FLOATS are NaN or infinite, (n,) int32."""
        n, classes = checked("raw", raw, FLOATS, (None, None))
        out = self._out(out, (n,), ("int32",), np.int32)
        arguments = [out.pointer, raw.pointer, *_ints(classes)]
        self._launch(f"nonfinite_{raw.dtype.name}", (n, 1), arguments, stream, _threads(classes))
        return out

    def accumulate_maps(
        self, maps: DeviceArray, weights: DeviceArray, out: DeviceArray | None = None, *, stream: int
    ) -> DeviceArray:
        """Weighted sums (k, h, w) float32 of maps (n, h, w) under weights (k, n), equal to the bit each time."""
        n, h, w = checked("maps", maps, ("float32",), (None, None, None))
        return self._accumulate("accumulate_maps", n, weights, (h, w), [maps.pointer], out, stream)

    def accumulate_grid(
        self,
        bits: DeviceArray,
        offsets: DeviceArray,
        weights: DeviceArray,
        size: tuple[int, int],
        out: DeviceArray | None = None,
        *,
        stream: int,
    ) -> DeviceArray:
        """Weighted sums (k, H, W) of RISE masks under weights (k, n); see `Grids` and `accumulate_maps`."""
        n, arguments = Grids(bits, offsets).arguments(size, partial(self._places, stream=stream))
        return self._accumulate("accumulate_grid", n, weights, size, arguments, out, stream)

    def normalise(
        self,
        pixels: DeviceArray,
        mean: Sequence[float],
        std: Sequence[float],
        layout: str = "NCHW",
        dtype: npt.DTypeLike = np.float32,
        out: DeviceArray | None = None,
        *,
        stream: int,
    ) -> DeviceArray:
        """The network's input of TYPES for decoded uint8 (h, w, c) pixels; see `reference.normalise`."""
        h, w, c = checked("pixels", pixels, ("uint8",), (None, None, None))
        if len(mean) != c or len(std) != c:
            raise ValueError(f"mean has {len(mean)} and std {len(std)} values for {c} channels")
        _sides((h, w, c), layout)
        _counted("pixels", pixels.shape)
        kind = np.dtype(dtype)
        out = self._out(out, (c, h, w) if layout == "NCHW" else (h, w, c), (kind.name,), kind)
        if kind.name not in TYPES:
            raise ValueError(f"input type {kind.name}: use one of {', '.join(TYPES)}")
        statistics = [
            self.constant(tuple(values), partial(np.array, values, np.float32), stream).pointer
            for values in (mean, std)
        ]
        arguments = [
            out.pointer,
            pixels.pointer,
            *(statistics if kind != np.uint8 else (0, 0)),
            *_ints(c, h * w, layout == "NHWC"),
        ]
        self._launch(f"normalise_{kind.name}", (_blocks(c * h * w), 1), arguments, stream)
        return out

    def _scores(
        self, raw: DeviceArray, targets: DeviceArray | None, kind: str, out: DeviceArray | None, stream: int
    ) -> DeviceArray:
        n, classes = checked("raw", raw, FLOATS, (None, None))
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: use one of {', '.join(KINDS)}")
        k = classes if targets is None else checked("targets", targets, ("int32",), (n, None))[1]
        out = self._out(out, (n, k), ("float32",))
        pointer = 0 if targets is None else targets.pointer
        arguments = [out.pointer, raw.pointer, pointer, *_ints(classes, k, KINDS[kind])]
        self._launch(f"scores_{raw.dtype.name}", (n, 1), arguments, stream, _threads(classes))
        return out

    def _accumulate(
        self,
        name: str,
        n: int,
        weights: DeviceArray,
        size: tuple[int, int],
        more: Sequence[Argument],
        out: DeviceArray | None,
        stream: int,
    ) -> DeviceArray:
        k, _ = checked("weights", weights, ("float32",), (None, n))
        _counted("sums", (k, *size))
        out = self._out(out, (k, *size), ("float32",))
        chunk = max(CHUNK, -(-n // MOST_SPLITS))
        splits, pixels = _blocks(n, chunk), math.prod(size)
        each = max(1, WORKSPACE // max(1, splits * pixels * 4))
        for start in range(0, k, each):
            rows = min(each, k - start)
            partial = self._workspace(splits * rows * pixels * 4, stream)
            some = weights.rows(start, start + rows)
            arguments = [partial, some.pointer, *_ints(n, rows, chunk, *size), *more]
            self._launch(name, (_blocks(pixels), splits, _blocks(rows, 8)), arguments, stream)
            arguments = [out.rows(start, start + rows).pointer, partial, *_ints(splits, rows * pixels)]
            self._launch("accumulate_splits", (_blocks(rows * pixels), 1), arguments, stream)
        return out

    def _out(
        self, out: DeviceArray | None, shape: tuple[int, ...], kinds: tuple[str, ...], kind: npt.DTypeLike = np.float32
    ) -> DeviceArray:
        if out is None:
            return self.empty(shape, kind)
        checked("out", out, kinds, shape)
        return out

    def _places(self, shape: tuple[int, int], size: tuple[int, int], rule: str, stream: int) -> tuple[int, int]:
        """Pointers to the places of both axes."""
        rows, columns = (
            self.constant((n_in, n_out, rule), partial(places, n_in, n_out, rule), stream)
            for n_in, n_out in zip(shape, size, strict=True)
        )
        return rows.pointer, columns.pointer

    def constant(self, key: Hashable, make: Callable[[], Array], stream: int) -> DeviceArray:
        """A small table that stays on the device; at its first use the stream is waited for, so that any other may
        read it."""
        if key not in self._constants:
            self._constants[key] = self.upload(make(), stream=stream)
            self.driver.synchronize(stream)
        return self._constants[key]

    def _workspace(self, nbytes: int, stream: int) -> int:
        """Memory for what passes between the launches of one call; each stream has its own."""
        kept = self._workspaces.get(stream)
        if kept is None or kept.nbytes < nbytes:
            self.driver.synchronize(stream)
            self._workspaces.pop(stream, None)
            kept = self._workspaces[stream] = self.empty((nbytes,), np.uint8)
        return kept.pointer

    def _launch(
        self, name: str, grid: tuple[int, ...], arguments: Sequence[Argument], stream: int, threads: int = BLOCK
    ) -> None:
        x, y, z = (*grid, 1)[:3]
        if x * y * z == 0:
            return
        if name not in self._functions:
            self._functions[name] = self.driver.function(self._module, name)
        self.driver.launch(self._functions[name], (x, y, z), (threads, 1, 1), arguments, stream)


def _counted(what: str, shape: tuple[int, ...]) -> None:
    """Refuse what the kernels' 32-bit places do not reach."""
    if math.prod(shape) >= 2**31:
        raise ValueError(f"{what} of {shape}: the kernels take fewer than 2**31 elements at once")


def _sides(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Channels, height and width of an image's shape."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: use one of {', '.join(LAYOUTS)}")
    channels, height, width = shape if layout == "NCHW" else (shape[2], shape[0], shape[1])
    return channels, height, width


def _ints(*values: int) -> list[Argument]:
    return [np.int32(value) for value in values]


def _blocks(work: int, each: int = BLOCK) -> int:
    return -(-work // each)


def _threads(work: int) -> int:
    """A power of two from a warp to a block."""
    return min(BLOCK, max(32, 1 << (work - 1).bit_length()))

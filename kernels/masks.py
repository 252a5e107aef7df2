"""The mask sources of the blend kernels: what makes n masks of an image's size, in device memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .device import Argument, DeviceArray
from .host import corners
from .reference import RULES, source_position

Array = npt.NDArray[Any]

# (shape of the maps, size after the resize, rule) -> pointers to the places of both axes
Places = Callable[[tuple[int, int], tuple[int, int], str], tuple[int, int]]

PLACE = np.dtype([("first", np.int32), ("fraction", np.float32)])


def places(n_in: int, n_out: int, rule: str) -> Array:
    """Where the output samples of a resize lie along one axis, (n_out,) of PLACE: the sample before, and the share of
    the way to the next one.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: use one of {', '.join(RULES)}")
    table = np.zeros(n_out, PLACE)
    for i in range(n_out):
        position = source_position(i, n_in, n_out, rule)
        first = min(int(position), max(n_in - 2, 0))
        table[i] = first, position - first
    return table


def corner_places(n_in: int, n_out: int, rule: str) -> Array:
    """Those of `places` where a resized map can have its extremes along this axis."""
    return np.asarray(places(n_in, n_out, rule)[corners(n_in, n_out, rule)])


@dataclass(frozen=True, slots=True)
class Maps:
    """Masks as low-resolution maps (n, h, w) float32, resized by `rule`."""

    source: ClassVar[str] = "maps"
    maps: DeviceArray
    rule: str = "half-pixel"

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        """How many masks there are, and what their kernel takes of them."""
        n, h, w = checked("maps", self.maps, ("float32",), (None, None, None))
        rows, columns = places((h, w), size, self.rule)
        return n, [self.maps.pointer, np.int32(h), np.int32(w), rows, columns]


@dataclass(frozen=True, slots=True)
class Grids:
    """RISE masks: grids of bits (n, s, s) uint8 and offsets (n, 2) int32 within a cell; see `reference.grid_masks`."""

    source: ClassVar[str] = "grids"
    bits: DeviceArray
    offsets: DeviceArray

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        n, s, _ = checked("bits", self.bits, ("uint8",), (None, None, None))
        if self.bits.shape[2] != s:
            raise ValueError(f"bits is {self.bits.shape}; grids are square, (n, s, s)")
        checked("offsets", self.offsets, ("int32",), (n, 2))
        full = ((s + 1) * math.ceil(size[0] / s), (s + 1) * math.ceil(size[1] / s))
        rows, columns = places((s, s), full, "mirror")
        return n, [self.bits.pointer, self.offsets.pointer, np.int32(s), rows, columns]


@dataclass(frozen=True, slots=True)
class Segments:
    """Masks of whole segments: ids (H, W) int32, below the number of columns of bits (n, segments) uint8."""

    source: ClassVar[str] = "segments"
    ids: DeviceArray
    bits: DeviceArray

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        checked("ids", self.ids, ("int32",), size)
        n, segments = checked("bits", self.bits, ("uint8",), (None, None))
        return n, [self.ids.pointer, self.bits.pointer, np.int32(segments)]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Masks that are 1 where rank >= threshold: ranks (H, W) int32, thresholds (n,) int32."""

    source: ClassVar[str] = "ranks"
    ranks: DeviceArray
    thresholds: DeviceArray

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        checked("ranks", self.ranks, ("int32",), size)
        (n,) = checked("thresholds", self.thresholds, ("int32",), (None,))
        return n, [self.ranks.pointer, self.thresholds.pointer]


@dataclass(frozen=True, slots=True)
class Path:
    """Points on the way from the baseline to the image: shares (n,) float32."""

    source: ClassVar[str] = "path"
    shares: DeviceArray

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        (n,) = checked("shares", self.shares, ("float32",), (None,))
        return n, [self.shares.pointer]


@dataclass(frozen=True, slots=True)
class Windows:
    """Masks that hide rectangles: boxes (n, 4) int32 of top, left, bottom, right, the latter two outside."""

    source: ClassVar[str] = "windows"
    boxes: DeviceArray

    def arguments(self, size: tuple[int, int], places: Places) -> tuple[int, list[Argument]]:
        n, _ = checked("boxes", self.boxes, ("int32",), (None, 4))
        return n, [self.boxes.pointer]


Masks = Maps | Grids | Segments | Ranks | Path | Windows


def checked(what: str, array: DeviceArray, kinds: tuple[str, ...], shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The array's shape, if it is as asked; None is any number from 1, or from 0 on the first axis."""
    fits = len(array.shape) == len(shape) and all(
        side == asked if asked is not None else side >= (axis > 0)
        for axis, (side, asked) in enumerate(zip(array.shape, shape, strict=False))
    )
    if array.dtype.name not in kinds or not fits:
        wanted = "(" + ", ".join("*" if side is None else str(side) for side in shape) + ")"
        raise ValueError(f"{what} is {array.dtype.name} {array.shape}; give {' or '.join(kinds)} {wanted}")
    if array.pointer % array.dtype.itemsize:
        raise ValueError(f"{what} begins at an address that is no multiple of its {array.dtype.itemsize} byte elements")
    return array.shape

"""From a raw map to the saliency map that a method's source shows: upsampling, ReLU and min-max in its own order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .host import upsample

Array = npt.NDArray[Any]

FINISHES = ("upsample", "relu", "minmax")


FLAT = 1e-6  # a map whose range is below this share of its size holds rounding only


def flat(maps: Array) -> Array:
    """Which of (n, h, w) weigh every position the same, as (n,) bool."""
    return np.asarray(np.ptp(maps, axis=(1, 2)) <= FLAT * np.abs(maps).max(axis=(1, 2)))


def minmax(maps: Array) -> Array:
    """Each of (n, h, w) scaled to 0..1; a flat map becomes zero."""
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return np.asarray((maps - low) / np.where(flat(maps)[:, None, None], np.inf, high - low))


def finish(maps: Array, steps: Sequence[str], size: tuple[int, int]) -> Array:
    """Raw maps (n, h, w) as saliency maps (n, H, W) float32 by `steps` of FINISHES; upsampled last if not before."""
    for step in steps:
        if step == "upsample":
            maps = upsample(maps, size)
        elif step == "relu":
            maps = np.maximum(maps, 0)
        else:
            maps = minmax(maps)
    return maps if maps.shape[1:] == size else upsample(maps, size)

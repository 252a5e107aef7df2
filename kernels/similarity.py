"""How alike two maps are: the order of their values, their direction, and their highest places."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Array = npt.NDArray[Any]


def spearman(first: Array, second: Array) -> Array:
    """Spearman's rank correlation of each pair of maps (n, p), as (n,) float64; equal values share their mean rank.

    NaN where a map has one value everywhere.
    """
    ranks = [rankdata(maps, axis=1) for maps in (first, second)]
    return cosine(*(each - each.mean(axis=1, keepdims=True) for each in ranks))


def cosine(first: Array, second: Array) -> Array:
    """The cosine of the angle between each pair of maps (n, p), as (n,) float64; NaN where one is zero."""
    first, second = _unit(first), _unit(second)
    return np.asarray((first * second).sum(axis=1).clip(-1, 1))


def _unit(maps: Array) -> Array:
    scaled = maps.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled /= np.abs(scaled).max(axis=1, keepdims=True)  # squares of tiny values would be lost
        return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))


def top_overlap(first: Array, second: Array, share: float) -> Array:
    """The share of the highest places of each pair of maps (n, p) that both have, as (n,) float64.

    `share` of the places count, at least one; of equal values at the cut those that come first. Unrelated maps have
    `share` in common. The top-k intersection of Ghorbani, Abid and Zou 2019.
    """
    both = _top(first, share) & _top(second, share)
    return np.asarray(both.sum(axis=1) / top_count(first.shape[1], share))


def top_count(places: int, share: float) -> int:
    """How many places `share` of them are."""
    return max(1, round(share * places))


def _top(maps: Array, share: float) -> Array:
    count = top_count(maps.shape[1], share)
    cut = np.partition(maps, -count, axis=1)[:, -count, None]
    above, level = maps > cut, maps == cut
    left = count - above.sum(axis=1, keepdims=True)
    return np.asarray(above | (level & (level.cumsum(axis=1) <= left)))

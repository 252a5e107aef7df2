"""What the methods that mask by feature maps share: masks from maps, and equal masks once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels import host
from ..types import MapBank

Array = npt.NDArray[Any]


def scaled_after_upsampling(maps: Array, size: tuple[int, int], rule: str = "half-pixel", eps: float = 0.0) -> Array:
    """Min-max of the upsampled map, in low-resolution form: upsampling is linear and keeps constants."""
    low, high = host.extrema(maps, size, rule)
    return scaled(maps, low, high, eps)


def scaled(maps: Array, low: Array, high: Array, eps: float) -> Array:
    """(map - low) / (high - low + eps); a constant map becomes zero."""
    span = np.where(np.ptp(maps, axis=(1, 2)) > 0, high - low + eps, np.inf)
    shifted = maps - low[:, None, None].astype(np.float64)
    return np.asarray((shifted / span[:, None, None]).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Once:
    """Different masks (n, h, w), and for every mask that was given which of them it is; -1 is one without a pass."""

    masks: Array
    uses: Array


def once(masks: Array, live: Array) -> Once:
    """Equal masks once, in the order of their bytes; those that are not `live` never.

    Args:
        masks: (c, h, w).
        live: (c,) bool.
    """
    masks = masks + np.float32(0)  # -0.0 and 0.0 are one mask
    rows = np.ascontiguousarray(masks[live]).reshape(int(live.sum()), masks[0].size)
    _, first, inverse = np.unique(rows.view(f"V{rows.shape[1] * 4}").ravel(), return_index=True, return_inverse=True)
    uses = np.full(len(masks), -1)
    uses[live] = inverse.ravel()
    return Once(rows[first].reshape(len(first), *masks.shape[1:]), uses)


def summary(once_masks: Once, constant: int, channels: int) -> dict[str, Any]:
    """The counts for a row."""
    live = int((once_masks.uses >= 0).sum())
    return {
        "passes": len(once_masks.masks),
        "channels": channels,
        "constant": constant,
        "duplicate": live - len(once_masks.masks),
    }


def weights_of(scores: Array, uses: Array) -> Array:
    """Each mask's score (k, c) from those of the different masks (k, n); 0 where it had no pass."""
    weights = np.zeros((len(scores), len(uses)))
    live = uses >= 0
    weights[:, live] = scores[:, uses[live]]
    return weights


def over_baseline(found: Once) -> MapBank | None:
    """The bank of some masks behind an empty one, which shows the baseline alone; None where there are no masks."""
    if not len(found.masks):
        return None
    return MapBank(np.concatenate([np.zeros_like(found.masks[:1]), found.masks]))


def rises(scores: Array, uses: Array) -> Array:
    """How far each mask of `over_baseline` lifts its own target's score over the baseline's, (k, c); 0 without a pass.

    Args:
        scores: (k, 1 + n).
        uses: (k, c), of `Once.uses`.
    """
    risen = np.zeros(uses.shape)
    for k, use in enumerate(uses):
        live = use >= 0
        risen[k, live] = scores[k, use[live] + 1].astype(np.float64) - scores[k, :1]
    return risen

"""Pictures cut into superpixels, by scikit-image: the one door to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Segmentation:
    """How a picture is cut: `kind` of KINDS, and its size in that kind's own measure."""

    kind: str = "slic"
    size: int = 40


def _skimage() -> Any:
    return import_module("skimage.segmentation")  # not at the top: it takes longer than most commands


def slic(picture: Array, size: int) -> Array:
    """About `size` clusters of colour and place (Achanta et al. 2012), each in one piece."""
    return np.asarray(_skimage().slic(picture, n_segments=size, compactness=10, sigma=1, start_label=0))


def quickshift(picture: Array, size: int) -> Array:
    """Modes of colour and place (Vedaldi and Soatto 2008) under a kernel of `size` pixels; the rest is LIME's."""
    return np.asarray(_skimage().quickshift(picture, kernel_size=size, max_dist=200, ratio=0.2, rng=0))


def felzenszwalb(picture: Array, size: int) -> Array:
    """Graph-based (Felzenszwalb and Huttenlocher 2004) at scale `size`; range and constants are XRAI's."""
    low, span = float(picture.min()), max(float(np.ptp(picture)), 1.0)
    return np.asarray(_skimage().felzenszwalb((picture - low) / span * 2 - 1, scale=size, sigma=0.8, min_size=150))


KINDS: dict[str, Callable[[Array, int], Array]] = {
    "slic": slic,
    "quickshift": quickshift,
    "felzenszwalb": felzenszwalb,
}


def cut(picture: Array, how: Segmentation) -> Array:
    """The segment of every pixel, (H, W) int32, numbered from 0 without gaps.

    Args:
        picture: uint8 (H, W, c), RGB or grey.
    """
    colours = np.broadcast_to(picture, (*picture.shape[:2], 3))
    labels = KINDS[how.kind](colours, how.size)
    _, numbers = np.unique(labels, return_inverse=True)
    return numbers.reshape(labels.shape).astype(np.int32)

"""Whether a map points at the object that boxes mark. Boxes and maps are compared in pixels of the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..types import Array, Measured, Metric, Parameter, Parameters, Subject
from .faithfulness import FLAT

REASONS = {"no_boxes": "the image has no boxes", "box_outside": "no box covers a pixel that the model saw"}


def box_mask(boxes: Array, size: tuple[int, int]) -> Array:
    """Which pixels (H, W) have their centre in one of the boxes (b, 4): x0 y0 x1 y1."""
    y, x = np.arange(size[0])[:, None] + 0.5, np.arange(size[1])[None] + 0.5
    mask = np.zeros(size, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
    return mask


def _boxed(subject: Subject) -> Measured | Array:
    """The pixels of the boxes, or what to say where there are none, or the map is flat."""
    if subject.boxes_status != "ok":
        return Measured(None, status=subject.boxes_status, reason=REASONS[subject.boxes_status])
    if not subject.saliency.max() > max(float(subject.saliency.min()), 0.0):
        return FLAT
    mask = box_mask(subject.boxes, subject.saliency.shape)
    if not mask.any():
        return Measured(None, status="box_outside", reason=REASONS["box_outside"])
    return mask


# --- pointing -------------------------------------------------------------------------------------------------


def hits(saliency: Array, mask: Array, tolerance: float) -> bool:
    """Whether the greatest value lies on the mask, or nearer to it than `tolerance` pixels. The first of several."""
    y, x = np.unravel_index(int(np.argmax(saliency)), saliency.shape)
    if mask[y, x]:
        return True
    v, u = np.nonzero(mask)
    return bool(((v - y) ** 2 + (u - x) ** 2).min() < tolerance**2)


def _pointing(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    mask = _boxed(subject)
    if isinstance(mask, Measured):
        return mask
    hit = hits(subject.saliency, mask, float(parameters["tolerance"]))
    return Measured(float(hit), notes={"box_area": float(mask.mean())})


def energy(saliency: Array, mask: Array) -> float:
    """`sum of the positive map on the mask / its sum`."""
    above = np.maximum(saliency, 0).astype(np.float64)
    return float(above[mask].sum() / above.sum())


def _energy(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    mask = _boxed(subject)
    if isinstance(mask, Measured):
        return mask
    return Measured(energy(subject.saliency, mask), notes={"box_area": float(mask.mean())})


# --- boxes of the map -----------------------------------------------------------------------------------------


def largest_box(mask: Array) -> tuple[int, int, int, int] | None:
    """x0 y0 x1 y1 of the largest component of a mask (pixels that touch, corners too), the latter two outside."""
    ndimage: Any = import_module("scipy.ndimage")  # not at the top: it takes longer than most commands
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return None
    largest = int(np.argmax(np.bincount(labels.ravel())[1:]))
    rows, columns = ndimage.find_objects(labels)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def overlap(box: tuple[float, ...], others: Array) -> float:
    """The greatest intersection over union of a box with any of the others (b, 4)."""
    x0, y0, x1, y1 = others.T
    wide = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
    tall = np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
    both = wide * tall
    union = (box[2] - box[0]) * (box[3] - box[1]) + (x1 - x0) * (y1 - y0) - both
    return float((both / union).max())


def overlaps(saliency: Array, boxes: Array, thresholds: Sequence[float]) -> Array:
    """At each threshold, a share of the greatest value, how the map's box meets the given ones."""
    top = float(saliency.max())
    found = [largest_box(np.maximum(saliency, 0) >= threshold * top) for threshold in thresholds]
    return np.array([0.0 if box is None else overlap(box, boxes) for box in found], dtype=np.float32)


def _box_error(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    mask = _boxed(subject)
    if isinstance(mask, Measured):
        return mask
    met = float(overlaps(subject.saliency, subject.boxes, [float(parameters["threshold"])])[0])
    return Measured(float(met < float(parameters["iou"])), notes={"iou": met})


def _box_accuracy(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    """The value is the best overlap at any threshold; the table takes one threshold for all images."""
    mask = _boxed(subject)
    if isinstance(mask, Measured):
        return mask
    curve = overlaps(subject.saliency, subject.boxes, thresholds(int(parameters["thresholds"])))
    return Measured(float(curve.max()), curve)


def thresholds(count: int) -> list[float]:
    """`count` evenly spaced numbers from 0 on, below 1."""
    return [i / count for i in range(count)]


def _accuracy_terms(values: Array, curves: Array | None, parameters: Parameters) -> Array:
    """At each threshold whether the box is met."""
    if curves is None:
        return np.zeros((len(values), 1))
    return (curves >= float(parameters["iou"])).astype(np.float64)


LOCALIZATION = (
    Metric(
        name="pointing-game",
        summary="whether the map's greatest value lies on a box, or nearer to it than the tolerance",
        citation="Zhang et al., Excitation Backprop, ECCV 2016",
        parameters={"tolerance": Parameter(15.0, "pixels of the input within which a miss counts as a hit", least=0)},
        better="higher",
        measure=_pointing,
    ),
    Metric(
        name="energy-pointing-game",
        summary="share of the map's positive sum that lies in the boxes",
        citation="Wang et al., Score-CAM, CVPRW 2020",
        parameters={},
        better="higher",
        measure=_energy,
    ),
    Metric(
        name="box-error",
        summary="whether the box around the map's largest part above a threshold misses every given box",
        citation="Selvaraju et al., Grad-CAM, ICCV 2017",
        parameters={
            "threshold": Parameter(0.15, "share of the greatest value above which the map is cut", least=0, most=1),
            "iou": Parameter(0.5, "overlap from which a box is met", least=0.01, most=1),
        },
        better="lower",
        measure=_box_error,
        conventions=lambda parameters: {"steps": 1},
    ),
    Metric(
        name="max-box-acc",
        summary="share of images whose box is met, at the threshold that is best for all of them",
        citation="Choe et al., Evaluating weakly supervised object localization, CVPR 2020",
        parameters={
            "iou": Parameter(0.5, "overlap from which a box is met", least=0.01, most=1),
            "thresholds": Parameter(20, "evenly spaced thresholds that are tried", least=1, most=1000),
        },
        better="higher",
        measure=_box_accuracy,
        terms=_accuracy_terms,
        conventions=lambda parameters: {"steps": int(parameters["thresholds"])},
    ),
)

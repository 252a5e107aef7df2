"""What the class score does where a map's pixels are taken away, or are all that is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..types import Array, Bank, MapBank, Measured, Metric, Parameter, Parameters, RankBank, Subject

BASELINES = ("zero", "black", "mean", "blur", "rise-blur")
FLAT = Measured(
    None, status="flat", reason="no position of the finished map weighs more than another, or none is positive"
)
PERCENTS = tuple(range(10, 100, 10))
MASK_SPACE = {"black": "pixel"}  # a mask over black is the same in pixels and in the network's units


def as_mask(saliency: Array) -> Array:
    """A finished map as a mask (H, W): as it is within 0..1, else its positive part over its greatest value."""
    if saliency.min() >= 0 and saliency.max() <= 1:
        return np.asarray(saliency, dtype=np.float32)
    above = np.maximum(saliency, 0)
    return np.asarray(above / max(float(above.max()), np.finfo(np.float32).tiny), dtype=np.float32)


def quota(share: float, pixels: int) -> int:
    """How many pixels a share of them is, rounded up."""
    return math.ceil(round(share * pixels, 6))


def counts(steps: int, pixels: int) -> Array:
    """How many pixels are taken at each of steps + 1 points from none to all, as evenly as whole numbers go."""
    return np.rint(np.arange(steps + 1) * pixels / steps).astype(np.int32)


def area(curve: Array) -> float:
    """Area under a curve of evenly spaced points over 0..1: `(sum - first/2 - last/2) / (points - 1)`."""
    return float((curve.sum() - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))


def without_first(subject: Subject, counts: Array) -> RankBank:
    """Rows without so many of the first pixels."""
    return _from_rank(subject, np.full(len(counts), subject.place), counts)


def only_first(subject: Subject, counts: Array) -> RankBank:
    """Rows with nothing but so many of the first pixels."""
    reversed_place = len(subject.ranks) // 2 + subject.place
    return _from_rank(subject, np.full(len(counts), reversed_place), subject.saliency.size - counts)


def _from_rank(subject: Subject, of: Array, thresholds: Array) -> RankBank:
    """Rows of a bank; of those that show none or all, the order does not matter."""
    whole = (thresholds <= 0) | (thresholds >= subject.saliency.size)
    return RankBank(subject.ranks, np.where(whole, 0, of).astype(np.int32), thresholds.astype(np.int32))


# --- the masked image: average drop and its kin ---------------------------------------------------------------


def cut(saliency: Array, ranks: Array, keep: float) -> Array:
    """The mask (H, W) of `as_mask`, zero outside of the share of pixels that rank first."""
    mask = as_mask(saliency)
    return np.where(ranks < quota(keep, mask.size), mask, np.float32(0))


def _masked(subject: Subject, parameters: Parameters) -> Bank | None:
    keep = float(parameters["keep"])
    if not subject.saliency.max() > 0 or (keep < 1 and _even(subject)):  # no pixel comes before another
        return None
    return MapBank(cut(subject.saliency, subject.ranks[subject.place], keep)[None])


def drop(full: float, masked: float) -> float | None:
    """`max(0, Y - O) / Y`."""
    return max(0.0, full - masked) / full if full > 0 else None


def increase(full: float, masked: float) -> float | None:
    """1 where O > Y, else 0."""
    return float(masked > full)


def gain(full: float, masked: float) -> float | None:
    """`max(0, O - Y) / (1 - Y)`; 0 where Y is 1, as nothing can be gained."""
    return max(0.0, masked - full) / (1 - full) if full < 1 else 0.0


def _of_masked(formula: Callable[[float, float], float | None]) -> Callable[..., Measured]:
    def measure(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
        if not len(scores):
            return FLAT
        value = formula(full, float(scores[0]))
        notes = {"full": full, "masked": float(scores[0])}
        if value is None:
            return Measured(None, status="undefined", reason="the image's own posterior is 0", notes=notes)
        return Measured(value, notes=notes)

    return measure


def _masked_conventions(parameters: Parameters) -> Mapping[str, Any]:
    baseline = str(parameters["baseline"])
    return {"baseline": baseline, "mask_space": MASK_SPACE.get(baseline, "normalized"), "score": "posterior"}


KEEP = {
    "keep": Parameter(1.0, "share of the pixels that stay, those that rank first", least=0.001, most=1),
    "baseline": Parameter("zero", "what is seen where the map is 0", BASELINES),
}


def _masked_metric(
    name: str, summary: str, citation: str, better: str, formula: Callable[[float, float], float | None]
) -> Metric:
    return Metric(
        name=name,
        summary=summary,
        citation=citation,
        parameters=KEEP,
        better=better,
        measure=_of_masked(formula),
        bank=_masked,
        baseline=lambda parameters: str(parameters["baseline"]),
        passes=lambda parameters: 1,
        conventions=_masked_conventions,
    )


MASKED = (
    _masked_metric(
        "average-drop",
        "share of the class score that is lost where only the map's part of the image is seen",
        "Chattopadhay et al., Grad-CAM++, WACV 2018",
        "lower",
        drop,
    ),
    _masked_metric(
        "increase",
        "whether the class score rises where only the map's part of the image is seen",
        "Chattopadhay et al., Grad-CAM++, WACV 2018",
        "higher",
        increase,
    ),
    _masked_metric(
        "average-gain",
        "share of what the class score lacks to 1 that is won where only the map's part of the image is seen",
        "Zhang et al., Opti-CAM, CVIU 2024",
        "higher",
        gain,
    ),
)


# --- curves: deletion, insertion ------------------------------------------------------------------------------


def _deleted(subject: Subject, parameters: Parameters) -> Bank | None:
    taken = counts(int(parameters["steps"]), subject.saliency.size)[1:]
    return None if _even(subject) else without_first(subject, taken)


def _inserted(subject: Subject, parameters: Parameters) -> Bank | None:
    shown = counts(int(parameters["steps"]), subject.saliency.size)[:-1]
    return None if _even(subject) else only_first(subject, shown)


def _even(subject: Subject) -> bool:
    """Whether the map ranks no pixel before another."""
    return not np.ptp(subject.saliency) > 0


def _deletion(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    return _along(np.concatenate([[full], scores])) if len(scores) else FLAT


def _insertion(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    return _along(np.concatenate([scores, [full]])) if len(scores) else FLAT


def _along(curve: Array) -> Measured:
    return Measured(area(curve.astype(np.float64)), curve.astype(np.float32))


def _curve_conventions(parameters: Parameters) -> Mapping[str, Any]:
    return {**_masked_conventions(parameters), "steps": int(parameters["steps"])}


def _curve(name: str, summary: str, better: str, baseline: str, bank: Any, measure: Any) -> Metric:
    return Metric(
        name=name,
        summary=summary,
        citation="Petsiuk, Das, Saenko, RISE, BMVC 2018",
        parameters={
            "steps": Parameter(28, "steps from none to all pixels", least=2, most=1000),
            "baseline": Parameter(baseline, "what is seen where pixels are taken away", BASELINES),
        },
        better=better,
        measure=measure,
        bank=bank,
        baseline=lambda parameters: str(parameters["baseline"]),
        passes=lambda parameters: int(parameters["steps"]),
        conventions=_curve_conventions,
    )


CURVES = (
    _curve(
        "deletion",
        "area under the class score while the pixels are taken away, those that rank first first",
        "lower",
        "zero",
        _deleted,
        _deletion,
    ),
    _curve(
        "insertion",
        "area under the class score while the pixels appear, those that rank first first",
        "higher",
        "rise-blur",
        _inserted,
        _insertion,
    ),
)


# --- ROAD -----------------------------------------------------------------------------------------------------


def _removed(subject: Subject, parameters: Parameters) -> Bank | None:
    if _even(subject):
        return None
    pixels = subject.saliency.size
    removed = np.array([quota(percent / 100, pixels) for percent in PERCENTS])
    first, last = without_first(subject, removed), only_first(subject, pixels - removed)
    of, thresholds = np.concatenate([first.of, last.of]), np.concatenate([first.thresholds, last.thresholds])
    return RankBank(subject.ranks, of, thresholds)


def _road(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    """`mean over q of (p without the last q% - p without the first q%) / 2`; the curve has it at each q."""
    if not len(scores):
        return FLAT
    first, last = np.split(scores.astype(np.float64), 2)
    notes = {"without_first": first.tolist(), "without_last": last.tolist()}
    curve = (last - first) / 2
    return Measured(float(curve.mean()), curve.astype(np.float32), notes=notes)


ROAD = Metric(
    name="road",
    summary="class score without the last pixels less that without the first, what is removed filled in from around it",
    citation="Rong et al., ROAD, ICML 2022",
    parameters={},
    better="higher",
    measure=_road,
    bank=_removed,
    baseline=lambda parameters: "road",
    passes=lambda parameters: 2 * len(PERCENTS),
    conventions=lambda parameters: {
        "baseline": "noisy linear imputation",
        "mask_space": "normalized",
        "score": "posterior",
        "steps": len(PERCENTS),
    },
)

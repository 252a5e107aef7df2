"""Whether a map stays where the image hardly changes, and changes where the network does: maps made again."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from ..types import Array, Measured, Metric, Parameter, Parameters, Subject


def relative_change(before: Array, after: Array, parameters: Parameters) -> float:
    """`||after - before|| / ||before||` of two raw maps, by their Euclidean norms; NaN where the first is zero."""
    norm = float(np.linalg.norm(before.astype(np.float64)))
    return float(np.linalg.norm(after.astype(np.float64) - before)) / norm if norm else float("nan")


def rank_correlation(before: Array, after: Array, parameters: Parameters) -> float:
    """Spearman's correlation of two raw maps, of their sizes where `sign` is ignored; equal values share a rank.

    NaN where one of them is flat.
    """
    stats: Any = import_module("scipy.stats")  # not at the top: it takes longer than most commands
    if parameters["sign"] == "ignored":
        before, after = np.abs(before), np.abs(after)
    ranks = [stats.rankdata(each.ravel()) for each in (before, after)]
    ranks = [each - each.mean() for each in ranks]
    size = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size > 0 else float("nan")


def _most(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    if not np.isfinite(scores).all():
        return Measured(None, scores.astype(np.float32), "flat", "the map is zero: no change can be seen beside it")
    return Measured(float(scores.max()), scores.astype(np.float32))


def _mean_similarity(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    """The mean over the stages whose map was not flat; the curve has them all, from the scores downwards."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return Measured(None, scores.astype(np.float32), "flat", "the map is flat, or every map made again is")
    return Measured(float(known.mean()), scores.astype(np.float32), notes={"flat_stages": len(scores) - len(known)})


def _noise_conventions(parameters: Parameters) -> Mapping[str, Any]:
    return {"baseline": f"uniform noise within {parameters['radius']:g}", "steps": int(parameters["samples"])}


def _stage_conventions(parameters: Parameters) -> Mapping[str, Any]:
    return {"baseline": "weights shuffled", "steps": int(parameters["stages"])}


def _sanity(name: str, which: str, again: str) -> Metric:
    return Metric(
        name=name,
        summary=f"rank correlation of the map with those of the network whose layers are shuffled, {which}",
        citation="Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018",
        parameters={
            "stages": Parameter(6, "stages into which the layers with weights are divided", least=1, most=1000),
            "sign": Parameter("kept", "whether the sign of a map counts", ("kept", "ignored")),
        },
        better="lower",
        measure=_mean_similarity,
        conventions=_stage_conventions,
        again=again,
        compare=rank_correlation,
    )


ROBUSTNESS = (
    Metric(
        name="max-sensitivity",
        summary="greatest relative change of the map under uniform noise on the image",
        citation="Yeh et al., On the (in)fidelity and sensitivity of explanations, NeurIPS 2019",
        parameters={
            "radius": Parameter(0.02, "greatest change of a number of the network's input", least=1e-6, most=1e6),
            "samples": Parameter(10, "noisy images", least=1, most=10_000),
        },
        better="lower",
        measure=_most,
        conventions=_noise_conventions,
        again="noise",
        compare=relative_change,
    ),
    _sanity("sanity-cascade", "from the scores downwards, one stage more each time", "cascade"),
    _sanity("sanity-independent", "one stage at a time", "independent"),
)

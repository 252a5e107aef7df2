"""What a map's own numbers say: how concentrated it is, and whether its parts add up to the score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..types import Array, Measured, Metric, Parameters, Subject
from .faithfulness import FLAT


def gini(values: Array) -> float:
    """The Gini index of the sizes of some numbers: 0 where all are equal, towards 1 where one holds all."""
    sizes = np.sort(np.abs(values.astype(np.float64)).ravel())
    n = len(sizes)
    return float(((2 * np.arange(1, n + 1) - n - 1) @ sizes) / (n * sizes.sum()))


def _sparseness(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
    return Measured(gini(subject.saliency)) if subject.saliency.any() else FLAT


def _stated(key: str, told: str, error: Callable[[float], float]) -> Callable[..., Measured]:
    def measure(subject: Subject, full: float, scores: Array, parameters: Parameters) -> Measured:
        if key not in subject.extras:
            return Measured(None, status="not_stated", reason=f"the method says nothing of its {told}")
        return Measured(error(float(subject.extras[key])))

    return measure


STATISTICS = (
    Metric(
        name="sparseness",
        summary="Gini index of the map: 0 where all positions are equal, towards 1 where one holds all",
        citation="Chalasani et al., Concise explanations of neural networks, ICML 2020",
        parameters={},
        better="higher",
        measure=_sparseness,
    ),
    Metric(
        name="conservation",
        summary="how far the relevance that arrived is from all of it, as a share; of LRP and its kin",
        citation="Bach et al., Layer-wise relevance propagation, PLoS ONE 2015",
        parameters={},
        better="lower",
        measure=_stated("kept", "conservation", lambda kept: abs(kept - 1)),
    ),
    Metric(
        name="completeness",
        summary="how far the map's sum is from what the score rose by, as a share; of CAM and integrated gradients",
        citation="Sundararajan, Taly, Yan, Integrated gradients, ICML 2017",
        parameters={},
        better="lower",
        measure=_stated("completeness_error", "completeness", abs),
    ),
)

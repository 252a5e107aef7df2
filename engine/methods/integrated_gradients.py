"""Integrated gradients: the gradient's mean on the straight path from a baseline to the image, times their difference.

Sundararajan, Taly, Yan, ICML 2017 (arXiv 1703.01365). The path's points are chosen by Gauss-Legendre quadrature.
"""

from __future__ import annotations

import numpy as np

from ...models.graph.request import Request
from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    Method,
    Observation,
    Parameter,
    Parameters,
    PathBank,
    always,
    never,
)
from .one_pass import refuses
from .saliency import channels, one_map

GRADIENT = Request()
BASELINES = ("zero", "black", "mean", "blur")


def quadrature(steps: int) -> tuple[Array, Array]:
    """Points and weights of Gauss-Legendre quadrature on 0..1."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """For each target the path's points, and the baseline itself for its score."""
    points, weights = quadrature(int(parameters["steps"]))
    count = len(observation.targets)
    shares = np.tile(np.append(0.0, points), count).astype(np.float32)
    return Expansion(
        PathBank(shares, np.full(len(shares), -1)),
        str(parameters["baseline"]),
        through=GRADIENT,
        of=np.repeat(np.arange(count), len(points) + 1),
        weights=np.tile(np.append(1.0, weights), count),
        carry=shares,
        extras={"passes": len(shares)},
    )


def read(facts: Facts, shown: Observation, row: int, expansion: Expansion, parameters: Parameters) -> Array:
    """Of a point on the path its gradient; of the baseline the baseline itself and its score."""
    gradient = shown.returned[0].values[0].ravel()
    if expansion.carry[row] > 0:
        return np.concatenate([gradient, np.zeros(gradient.size + 1, gradient.dtype)])
    return np.concatenate([np.zeros_like(gradient), shown.image.ravel(), shown.raw[shown.targets]])


def attributions(observation: Observation, sums: Array) -> Array:
    """`(x - x') * mean gradient`, (k, c, H, W) float64."""
    shape = (len(sums), *observation.image.shape)
    size = observation.image.size
    baseline = sums[:, size : 2 * size].reshape(shape)
    return np.asarray((observation.image.astype(np.float64)[None] - baseline) * sums[:, :size].reshape(shape))


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, sums: Array, parameters: Parameters
) -> Combined:
    """The attributions as one map, and how far their sum is from the scores' difference, as a share of that."""
    values = attributions(observation, sums)
    risen = observation.raw[observation.targets] - sums[:, -1]
    off = np.abs(values.sum(axis=(1, 2, 3)) - risen) / np.maximum(np.abs(risen), 1e-6)
    extras = tuple({"completeness_error": float(f"{error:.3g}")} for error in off)
    return Combined(one_map(values, parameters), extras)


INTEGRATED_GRADIENTS = Method(
    name="integrated-gradients",
    summary="the gradient averaged on the way from a baseline to the image, times their difference",
    citation="Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks, ICML 2017",
    parameters={
        "steps": Parameter(50, "points of the path", least=1, most=1000),
        "baseline": Parameter("zero", "where the path begins", BASELINES),
        **channels("sum"),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("relu", "minmax"),
    passes=lambda facts, parameters: 1 + int(parameters["steps"]),
    refuses=refuses,
    through=lambda facts, parameters: (GRADIENT,),
    read=read,
    needs_tap=never,
    pixels=always,
)

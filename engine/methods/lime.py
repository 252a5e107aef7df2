"""LIME: a weighted linear fit of the score to which superpixels are shown.

Ribeiro, Singh, Guestrin, KDD 2016 (arXiv 1602.04938), with the constants of the authors' code: quickshift, hidden parts
in their mean colour, cosine distances under a kernel of width 0.25, ridge regression of penalty 1 with an intercept.
"""

from __future__ import annotations

import numpy as np

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
    SegmentBank,
    always,
    never,
)
from .segments import (
    ONE_SEGMENT,
    SAME_SCORE,
    coin_flips,
    distinct,
    painted,
    refuses_coalitions,
    segments_of,
    steady,
    superpixel_options,
    superpixels,
)

SEGMENTS = 50


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 shows everything; the others each part with an even chance."""
    segments, count = segments_of(observation)
    bits = coin_flips(observation, int(parameters["samples"]), count)
    bits[0] = 1
    once, uses = distinct(bits)
    extras = {"passes": len(once), "segments": count}
    return Expansion(SegmentBank(segments, once), str(parameters["baseline"]), carry=(bits, uses), extras=extras)


def nearness(bits: Array, width: float) -> Array:
    """`sqrt(exp(-d^2 / width^2))`, d the cosine distance to the row that shows everything; 1 where nothing is shown."""
    distance = 1 - np.sqrt(bits.sum(axis=1) / bits.shape[1])
    return np.asarray(np.sqrt(np.exp(-(distance**2) / width**2)))


def ridge(bits: Array, scores: Array, weights: Array, penalty: float) -> tuple[Array, float]:
    """Coefficients of weighted ridge regression with a free intercept, and the share of variance it explains."""
    share = weights / weights.sum()
    centred, risen = bits - share @ bits, scores - share @ scores
    weighed = centred * weights[:, None]
    found = np.linalg.solve(weighed.T @ centred + penalty * np.eye(bits.shape[1]), weighed.T @ risen)
    left = weights @ (risen - centred @ found) ** 2
    whole = weights @ risen**2
    return np.asarray(found), float(1 - left / whole) if whole > 0 else 0.0


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    bits, uses = expansion.carry
    segments, count = segments_of(observation)
    weights = nearness(bits, float(parameters["width"]))
    values, extras = np.zeros((len(scores), count)), []
    for k, row in enumerate(scores.astype(np.float64)[:, uses]):
        values[k], fit = ridge(bits.astype(np.float64), row, weights, float(parameters["penalty"]))
        told: dict[str, str | float] = {"fit": float(f"{fit:.4g}")}
        if count == 1 or steady(row):
            told["reason"], values[k] = ONE_SEGMENT if count == 1 else SAME_SCORE, 0
        extras.append(told)
    return Combined(painted(segments, values), tuple(extras))


LIME = Method(
    name="lime",
    summary="a weighted linear fit of the score to which superpixels are shown",
    citation="Ribeiro, Singh, Guestrin, Why Should I Trust You?, KDD 2016",
    parameters={
        "samples": Parameter(1000, "random pictures", least=2, most=100_000),
        "width": Parameter(0.25, "width of the kernel of distances", least=0.01, most=100),
        "penalty": Parameter(1.0, "of the ridge regression", least=0, most=1e6),
        **superpixel_options("quickshift", SEGMENTS, "segment-mean"),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("relu", "minmax"),
    passes=lambda facts, parameters: int(parameters["samples"]),
    refuses=lambda facts, parameters: refuses_coalitions(int(parameters["samples"]), parameters, SEGMENTS),
    superpixels=superpixels,
    needs_tap=never,
    pixels=always,
)

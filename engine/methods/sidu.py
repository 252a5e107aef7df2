"""SIDU: feature maps cut to 0 or 1 mask the image; what keeps the scores and is unlike the other masks weighs most.

Muddamsetty et al., ICIP 2020 and Pattern Recognition 2022 (arXiv 2101.10710), with the constants of the authors' code.
"""

from __future__ import annotations

import numpy as np

from ...kernels import host
from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    MapBank,
    Method,
    Observation,
    Parameter,
    Parameters,
    always,
)
from .masks import once

RULE = "mirror"  # scikit-image's, which the authors resize with
SIGMA = 0.25
SHOWN = 0.5  # the share of shown places that the sum is divided by
ROUNDING = 1e-12  # of the squares of two rows, what their squared distance is only rounding below


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Equal masks once; what everything shown gives is the observation's."""
    features = observation.features
    if features is None:
        raise ValueError("sidu needs tapped features")
    masks = (features > float(parameters["threshold"])).astype(np.float32)
    found = once(masks, np.ones(len(masks), bool))
    bank = MapBank(found.masks, RULE)
    counts = np.bincount(found.uses)
    extras = {"passes": len(bank), "channels": len(masks), "duplicate": len(masks) - len(found.masks)}
    return Expansion(bank, every_class=True, carry=counts, extras=extras)


def distances(rows: Array) -> Array:
    """Euclidean distances (n, n) between rows (n, c), by their Gram matrix."""
    rows = rows.astype(np.float64)
    squares = (rows**2).sum(axis=1)
    both = squares[:, None] + squares
    found = both - 2 * (rows @ rows.T)
    return np.asarray(np.sqrt(np.where(found > ROUNDING * both, found, 0)))


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`sum_k exp(-(p - p_k)^2 / (2 sigma^2)) minmax(sum_j |P_k - P_j|) M_k / (C / 2)`, P the scores of all classes."""
    bank = expansion.bank
    if not isinstance(bank, MapBank):
        raise ValueError("sidu combines masks")
    counts: Array = expansion.carry
    rows, shown = scores.T, host.posteriors(observation.raw[None], facts.posterior)[0]
    unlike = distances(rows) @ counts
    span = float(np.ptp(unlike))
    told = {}
    if span == 0:
        told = {"reason": "every mask leaves the same scores: none is unlike the others"}
        unlike, span = np.zeros_like(unlike), 1.0
    falls = (shown - rows).astype(np.float64)
    if parameters["difference"] == "class":
        kept = np.exp(-(falls[:, observation.targets] ** 2) / (2 * SIGMA**2)).T
    else:
        kept = np.exp(-(falls**2).sum(axis=1) / (2 * SIGMA**2))[None].repeat(len(observation.targets), axis=0)
    weights = kept * (unlike - unlike.min()) / span * counts / (counts.sum() * SHOWN)
    maps = host.accumulate_maps(bank.maps, weights)
    return Combined(host.upsample(maps, facts.size, RULE), tuple(dict(told) for _ in maps))


SIDU = Method(
    name="sidu",
    summary="feature maps as 0/1 masks; what keeps the scores and is unlike the other masks weighs most",
    citation="Muddamsetty et al., SIDU, ICIP 2020",
    parameters={
        "threshold": Parameter(0.1, "where a feature map is cut; the paper has 0.5", least=0, most=1e6),
        "difference": Parameter(
            "class", "what must be kept: the class's posterior (authors' code) or all (paper)", ("class", "all")
        ),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("minmax",),
    passes=lambda facts, parameters: 1 + (facts.tap.channels if facts.tap else 0),
    refuses=lambda facts, parameters: None,
    pixels=always,
)

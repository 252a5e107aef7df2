"""Score-CAM's kin, each a row of KIN: which masks are tried, and which score weighs which feature map.

Like Score-CAM's authors' code they weigh by the class's posterior under a mask, without a softmax over channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...kernels import host
from ..types import (
    BASELINE_NAMES,
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
)
from .masks import once, scaled_after_upsampling
from .segments import random_of

ROUNDS = 50  # of k-means, at most

Tried = tuple[Array, Array]
Trying = Callable[[Array, Array, tuple[int, int], Parameters, np.random.Generator], Tried]


def spread_most(
    features: Array, live: Array, size: tuple[int, int], parameters: Parameters, random: np.random.Generator
) -> Tried:
    """The channels of greatest standard deviation only."""
    spread = np.where(live, features.std(axis=(1, 2), dtype=np.float64), -1)
    chosen = np.zeros(len(features), bool)
    chosen[np.argsort(-spread, kind="stable")[: int(parameters["channels"])]] = True
    found = once(scaled_after_upsampling(features, size), live & chosen)
    return found.masks[:, None], found.uses


def clustered(
    features: Array, live: Array, size: tuple[int, int], parameters: Parameters, random: np.random.Generator
) -> Tried:
    """The mean masks of k-means clusters, scaled anew; a channel's weight is its cluster's."""
    from scipy.cluster.vq import kmeans2

    found = once(scaled_after_upsampling(features, size), live)
    masks = found.masks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster has no mask and no channel
        points = masks.reshape(len(masks), -1).astype(np.float64)
        centres, labels = kmeans2(points, min(int(parameters["clusters"]), len(points)), iter=1, minit="++", rng=random)
        for _ in range(ROUNDS - 1):  # scipy's own rounds go on when nothing changes any more
            before = labels
            centres, labels = kmeans2(points, centres, iter=1, minit="matrix")
            if np.array_equal(labels, before):
                break
    _, labels = np.unique(labels, return_inverse=True)
    means = np.stack([masks[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    uses = np.where(found.uses >= 0, labels[found.uses], -1)
    return scaled_after_upsampling(means, size)[:, None], uses


def noisy(
    features: Array, live: Array, size: tuple[int, int], parameters: Parameters, random: np.random.Generator
) -> Tried:
    """Copies of each map with noise added before it is scaled to a mask."""
    found = once(features, live)
    n, h, w = found.masks.shape
    copies = int(parameters["samples"])
    noise = float(parameters["noise"]) * random.standard_normal((n, copies, h, w), dtype=np.float32)
    masks = scaled_after_upsampling((found.masks[:, None] + noise).reshape(n * copies, h, w), size)
    return masks.reshape(n, copies, h, w), found.uses


def dimmed(
    features: Array, live: Array, size: tuple[int, int], parameters: Parameters, random: np.random.Generator
) -> Tried:
    """Each mask at equal steps from dark to full."""
    found = once(scaled_after_upsampling(features, size), live)
    copies = int(parameters["steps"])
    steps = np.arange(1, copies + 1, dtype=np.float32) / np.float32(copies)
    return found.masks[:, None] * steps[:, None, None], found.uses


@dataclass(frozen=True, slots=True)
class Row:
    """One method.

    Attributes:
        trying: (features, which of them vary, size, parameters, random) -> masks (n, copies, h, w), and for every
            channel which of the n weighs it, -1 for none. The weight is the mean score of the copies.
        most: parameters -> at most how many masks for a number of channels.
    """

    name: str
    summary: str
    citation: str
    parameters: dict[str, Parameter]
    trying: Trying
    most: Callable[[int, Parameters], int]


KIN = (
    Row(
        "faster-score-cam",
        "Score-CAM of the feature maps that vary most",
        "tabayashi0117, Faster-Score-CAM (github.com/tabayashi0117/Score-CAM), 2020",
        {"channels": Parameter(10, "how many maps are tried", least=1, most=100_000)},
        spread_most,
        lambda channels, parameters: min(channels, int(parameters["channels"])),
    ),
    Row(
        "cluster-cam",
        "Score-CAM of clusters of feature maps, one mask for each",
        "after Feng et al., Cluster-CAM, Neural Networks 2024 (arXiv 2302.01642)",
        {"clusters": Parameter(10, "clusters of k-means", least=1, most=4096)},
        clustered,
        lambda channels, parameters: min(channels, int(parameters["clusters"])),
    ),
    Row(
        "ss-cam",
        "Score-CAM, each map's score averaged over noisy copies of it",
        "Wang et al., SS-CAM: Smoothed Score-CAM, arXiv 2006.14255",
        {
            "samples": Parameter(35, "noisy copies of each map", least=1, most=1000),
            "noise": Parameter(2.0, "deviation of the noise, in the map's own units", least=0, most=1e6),
        },
        noisy,
        lambda channels, parameters: channels * int(parameters["samples"]),
    ),
    Row(
        "is-cam",
        "Score-CAM, each map's score averaged on the way from a dark mask to the full one",
        "Naidu et al., IS-CAM: Integrated Score-CAM, arXiv 2010.03023",
        {"steps": Parameter(10, "steps on the way", least=1, most=1000)},
        dimmed,
        lambda channels, parameters: channels * int(parameters["steps"]),
    ),
)


def _method(row: Row) -> Method:
    def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
        features = observation.features
        if features is None:
            raise ValueError(f"{row.name} needs tapped features")
        live = np.ptp(features, axis=(1, 2)) > 0
        extras = {"passes": 0, "channels": len(features), "constant": int((~live).sum())}
        if not live.any():
            return Expansion(carry=np.full(len(features), -1), extras=extras)
        masks, uses = row.trying(features, live, facts.size, parameters, random_of(observation, row.name))
        extras["passes"] = masks.shape[0] * masks.shape[1]
        bank = MapBank(masks.reshape(-1, *masks.shape[2:]))
        return Expansion(bank, str(parameters["baseline"]), carry=uses, extras=extras)

    def combine(
        facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
    ) -> Combined:
        uses: Array = expansion.carry
        if observation.features is None:
            raise ValueError(f"{row.name} needs tapped features")
        weights = np.zeros((len(scores), len(uses)))
        live = uses >= 0
        if live.any():
            means = scores.astype(np.float64).reshape(len(scores), uses.max() + 1, -1).mean(axis=2)
            weights[:, live] = means[:, uses[live]]
        return Combined(host.accumulate_maps(observation.features, weights), tuple({} for _ in scores))

    return Method(
        name=row.name,
        summary=row.summary,
        citation=row.citation,
        parameters={
            **row.parameters,
            "baseline": Parameter("zero", "what a mask shows where it is 0", BASELINE_NAMES),
        },
        expand=expand,
        combine=combine,
        finish=lambda parameters: ("upsample", "relu", "minmax"),
        passes=lambda facts, parameters: row.most(facts.tap.channels if facts.tap else 0, parameters),
        refuses=lambda facts, parameters: None,
    )


SCORE_CAM_KIN = tuple(_method(row) for row in KIN)

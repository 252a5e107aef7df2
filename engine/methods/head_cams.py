"""The CAMs that change a layer's maps and run only the head behind it: Ablation-CAM and Recipro-CAM.

Where the head is pooling and one linear layer, both are known without a pass.
"""

from __future__ import annotations

import math

import numpy as np

from ...kernels import host
from ..types import Array, Bank, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters, TapBank

SMALLEST = 1e-6  # a raw score nearer to zero is taken as this when the falls are divided by it


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    """The layer must be all that the head reads."""
    if facts.tap is None:
        return None
    if facts.tap.prefix:
        return f"layer {facts.tap.name} has tokens that stand at no place, and the head reads them"
    if facts.tap.name not in facts.waists:
        return f"the scores are also computed from what goes around layer {facts.tap.name}"
    return None


def refuses_probabilities(facts: Facts, parameters: Parameters) -> str | None:
    if not facts.has_logits:
        return f"it weighs by raw scores, and the model gives {facts.output} only"
    return refuses(facts, parameters)


def bent(facts: Facts, parameters: Parameters) -> bool:
    """Whether the head must be run."""
    return isinstance(facts.head, str)


def ablate(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 changes nothing; then every map that is not zero anyway is set to zero."""
    features = observation.features
    if features is None:
        raise ValueError("ablation-cam needs tapped features")
    live = np.flatnonzero(features.any(axis=(1, 2)))
    extras = {"passes": 0, "channels": len(features), "constant": len(features) - len(live)}
    if not bent(facts, parameters) or not len(live):
        return Expansion(carry=live, extras=extras)
    masks = np.ones((1 + len(live), len(features), 1, 1), np.uint8)
    masks[np.arange(1, len(masks)), live] = 0
    return Expansion(TapBank(masks), score="logit", carry=live, extras=extras | {"passes": len(masks)})


def weigh(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`sum_c (y - y without A_c) / |y| A_c`."""
    features, live = observation.features, expansion.carry
    if features is None:
        raise ValueError("ablation-cam needs tapped features")
    falls = np.zeros((len(observation.targets), len(features)))
    if expansion.bank is not None:
        whole = scores[:, 0].astype(np.float64)
        falls[:, live] = whole[:, None] - scores[:, 1:]
    elif not isinstance(facts.head, str):
        whole = observation.raw[observation.targets].astype(np.float64)
        falls = facts.head.weight[observation.targets] * features.mean(axis=(1, 2), dtype=np.float64)
    else:
        whole = np.ones(len(falls))
    weights = falls / np.maximum(np.abs(whole), SMALLEST)[:, None]
    return Combined(host.accumulate_maps(features, weights), tuple({} for _ in falls))


KERNEL = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16


def places(grid: tuple[int, int], spread: bool) -> Array:
    """A mask for every place of the grid, (places, 1, h, w): it alone, or with its neighbours by a 3 x 3 Gaussian."""
    h, w = grid
    masks = np.zeros((h * w, 1, h + 2, w + 2), np.float32)
    for place, mask in enumerate(masks):
        y, x = divmod(place, w)
        if spread:
            mask[0, y : y + 3, x : x + 3] = KERNEL
        else:
            mask[0, y + 1, x + 1] = 1
    return masks[:, :, 1:-1, 1:-1]


def share(facts: Facts, parameters: Parameters, seed: int) -> TapBank:
    if facts.tap is None:
        raise ValueError("recipro-cam needs a layer")
    return TapBank(places(facts.tap.grid, parameters["spread"] == "gaussian"))


def show_each(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    if not isinstance(shared, TapBank):
        raise ValueError("recipro-cam needs its shared masks")
    if bent(facts, parameters):
        return Expansion(shared, extras={"passes": len(shared)})
    return Expansion(carry=shared, extras={"passes": 0})


def arrange(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """The score of each place, at that place."""
    if facts.tap is None or observation.features is None:
        raise ValueError("recipro-cam needs a layer")
    if not isinstance(facts.head, str):
        masks = expansion.carry.masks.reshape(math.prod(facts.tap.grid), -1)
        shown = masks @ observation.features.reshape(len(observation.features), -1).T / masks.shape[1]
        raw = shown @ facts.head.weight.T + facts.head.bias
        scores = host.class_scores(raw, observation.targets, facts.posterior).T
    return Combined(scores.reshape(-1, *facts.tap.grid), tuple({} for _ in scores))


HEAD_CAMS = (
    Method(
        name="ablation-cam",
        summary="each feature map weighed by how far the raw score falls without it; only the head runs again",
        citation="Desai and Ramaswamy, Ablation-CAM, WACV 2020",
        parameters={},
        expand=ablate,
        combine=weigh,
        finish=lambda parameters: ("relu", "upsample", "minmax"),
        passes=lambda facts, parameters: 1 + facts.tap.channels if facts.tap and bent(facts, parameters) else 0,
        refuses=refuses_probabilities,
        head=bent,
    ),
    Method(
        name="recipro-cam",
        summary="the score that each place of the layer leaves when it alone is shown; only the head runs again",
        citation="Byun and Lee, Recipro-CAM, CVPR Workshops 2024",
        parameters={
            "spread": Parameter("gaussian", "a place with its neighbours, or it alone", ("gaussian", "none")),
        },
        expand=show_each,
        combine=arrange,
        finish=lambda parameters: ("minmax", "upsample"),
        passes=lambda facts, parameters: math.prod(facts.tap.grid) if facts.tap and bent(facts, parameters) else 0,
        refuses=refuses,
        share=share,
        head=bent,
    ),
)

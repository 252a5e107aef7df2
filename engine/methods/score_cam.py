"""Score-CAM: each feature map masks the image; the class score it leaves is its weight.

Wang et al., CVPR Workshops 2020 (arXiv 1910.01279). The published sources disagree; `variant` names which is followed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels import host
from ..types import (
    BASELINE_NAMES,
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
from .masks import once, scaled, scaled_after_upsampling, summary, weights_of

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """What the sources do differently.

    Attributes:
        masks: (features, size, rule) -> maps whose upsampling is the mask.
        rule: how masks are upsampled.
        score: what a masked pass is asked for.
        channel_softmax: weights are the softmax of the scores over channels.
        skip_constant: constant channels get weight 0 and no pass.
        sums: what the weights sum up, features or masks.
        finish: raw map to saliency map.
    """

    masks: Callable[[Array, tuple[int, int], str], Array]
    rule: str = "half-pixel"
    score: str = "posterior"
    channel_softmax: bool = False
    skip_constant: bool = True
    sums: str = "features"
    finish: tuple[str, ...] = ("upsample", "relu", "minmax")


def scaled_before_upsampling(features: Array, size: tuple[int, int], rule: str) -> Array:
    return scaled(features, features.min(axis=(1, 2)), features.max(axis=(1, 2)), 1e-8)


def positive_over_range(features: Array, size: tuple[int, int], rule: str) -> Array:
    """ReLU, then divided by the range of the upsampled map without subtracting its minimum."""
    positive = np.maximum(features, 0)
    low, high = host.extrema(positive, size, rule)
    span = np.where(np.ptp(positive, axis=(1, 2)) > 0, high - low, 1.0)
    return np.asarray((positive / span[:, None, None]).astype(np.float32))


VARIANTS: dict[str, Variant] = {
    "official": Variant(scaled_after_upsampling),
    "paper": Variant(scaled_after_upsampling, channel_softmax=True, skip_constant=False),
    "grad-cam": Variant(
        lambda features, size, rule: scaled_after_upsampling(features, size, rule, eps=1e-8),
        rule="align-corners",
        score="logit",
        channel_softmax=True,
        skip_constant=False,
        finish=("relu", "minmax", "upsample", "minmax"),
    ),
    "torchcam": Variant(
        scaled_before_upsampling,
        score="logit",
        channel_softmax=True,
        skip_constant=False,
        finish=("relu", "minmax", "upsample"),
    ),
    "yiskw713": Variant(positive_over_range, skip_constant=False, sums="masks"),
}


def _variant(parameters: Parameters) -> Variant:
    return VARIANTS[str(parameters["variant"])]


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """One mask per live channel; equal masks are one pass, `carry` says which channel uses which (-1: none)."""
    variant = _variant(parameters)
    features = observation.features
    if features is None:
        raise ValueError("score-cam needs tapped features")
    masks = variant.masks(features, facts.size, variant.rule)
    constant = np.ptp(features, axis=(1, 2)) == 0
    live = ~constant if variant.skip_constant else np.ones(len(features), dtype=bool)
    found = once(masks, live)
    extras = summary(found, int(constant.sum()), len(features))
    bank = MapBank(found.masks, variant.rule) if len(found.masks) else None
    carry = (found.uses, masks if variant.sums == "masks" else features)
    return Expansion(bank, str(parameters["baseline"]), variant.score, carry=carry, extras=extras)


def combine(
    facts: Facts,
    observation: Observation,
    expansion: Expansion,
    scores: Array,
    parameters: Parameters,
) -> Combined:
    """Weighted sum of the feature maps, at the tap's resolution (upsampling commutes with the sum)."""
    uses, summed = expansion.carry
    weights = weights_of(scores, uses)
    if _variant(parameters).channel_softmax:
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
    return Combined(host.accumulate_maps(summed, weights), tuple({} for _ in scores))


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    if _variant(parameters).score == "logit" and not facts.has_logits:
        return f"variant {parameters['variant']} weighs logits, and the model gives {facts.output} only"
    return None


SCORE_CAM = Method(
    name="score-cam",
    summary="each feature map masks the image; the class score it leaves is its weight",
    citation="Wang et al., Score-CAM, CVPR Workshops 2020",
    parameters={
        "variant": Parameter(
            "official", "whose formula: the authors' code, the paper, or a library's", tuple(VARIANTS)
        ),
        "baseline": Parameter("zero", "what a mask shows where it is 0", BASELINE_NAMES),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: _variant(parameters).finish,
    passes=lambda facts, parameters: facts.tap.channels if facts.tap else 0,
    refuses=refuses,
)

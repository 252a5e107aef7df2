"""Group-CAM: maps weighed by their gradients, summed in groups; what each group shows of the image weighs it.

Zhang, Rao, Yang, 2021 (arXiv 2103.13859): groups of neighbouring channels, the image blurred behind the masks. The
sources disagree; `variant` names which is followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...kernels import host
from ..types import Array, Bank, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters
from .grad_cam import gradients_at_tap, tap_gradient
from .masks import once, over_baseline, rises, scaled_after_upsampling
from .one_pass import refuses


@dataclass(frozen=True, slots=True)
class Variant:
    """What the sources do differently.

    Attributes:
        percentile: of each group's map, what is not above it is cut to 0.
        sums: what the weights sum up, maps or masks.
        positive: weights below 0 count as 0.
        finish: raw map to saliency map.
    """

    percentile: float | None
    sums: str
    positive: bool
    finish: tuple[str, ...]


VARIANTS = {
    "paper": Variant(None, "maps", True, ("upsample", "minmax")),
    "official": Variant(70.0, "masks", False, ("upsample", "relu", "minmax")),
}


def _variant(parameters: Parameters) -> Variant:
    return VARIANTS[str(parameters["variant"])]


def grouped(weighed: Array, groups: int) -> Array:
    """Positive sums (k, g, h, w) over neighbouring channels of (k, c, h, w).

    There are at most `groups`, and all but the last have equally many channels.
    """
    step = math.ceil(weighed.shape[1] / groups)
    return np.maximum(np.add.reduceat(weighed, np.arange(0, weighed.shape[1], step), axis=1), 0)


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 is the baseline alone; then every target's group masks, equal ones once."""
    if observation.features is None:
        raise ValueError("group-cam needs the layer's maps")
    weights = gradients_at_tap(facts, observation).mean(axis=(2, 3))
    sums = grouped(weights[:, :, None, None] * observation.features, int(parameters["groups"]))
    variant = _variant(parameters)
    if variant.percentile is not None:
        sums = np.where(sums > np.percentile(sums, variant.percentile, axis=(2, 3), keepdims=True), sums, np.float32(0))
    k, groups, h, w = sums.shape
    flat = sums.reshape(k * groups, h, w)
    live = np.ptp(flat, axis=(1, 2)) > 0
    masks = scaled_after_upsampling(flat, facts.size)
    found = once(masks, live)
    bank = over_baseline(found)
    extras = {"passes": len(bank) if bank else 0, "groups": groups, "constant": int((~live).sum())}
    summed = masks.reshape(sums.shape) if variant.sums == "masks" else sums
    return Expansion(bank, "blur:51:50", carry=(found.uses.reshape(k, groups), summed), extras=extras)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`sum_g s_g V_g`, `s_g = p(x m_g + b (1 - m_g)) - p(b)`, positive or signed, of maps or masks."""
    uses, summed = expansion.carry
    weights = rises(scores, uses)
    if _variant(parameters).positive:
        weights = np.maximum(weights, 0)
    maps = np.stack([host.accumulate_maps(each, row[None])[0] for each, row in zip(summed, weights, strict=True)])
    return Combined(maps, tuple({} for _ in maps))


GROUP_CAM = Method(
    name="group-cam",
    summary="maps weighed by gradients and summed in groups; what each group shows of the image weighs it",
    citation="Zhang, Rao, Yang, Group-CAM, arXiv 2103.13859",
    parameters={
        "groups": Parameter(32, "groups of neighbouring channels", least=1, most=4096),
        "variant": Parameter("paper", "whose formula: the paper's, or the authors' code", tuple(VARIANTS)),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: _variant(parameters).finish,
    passes=lambda facts, parameters: 1 + int(parameters["groups"]),
    refuses=refuses,
    backward=tap_gradient,
)

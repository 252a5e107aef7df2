"""Group-CAM: maps weighed by their gradients, summed in groups; what each group shows of the image weighs it.

Zhang, Rao, Yang, 2021 (arXiv 2103.13859): 32 neighbouring groups, the image blurred behind the masks. Versions of its
code differ; this one cuts no map at a percentile, takes positive weights, and sums the groups' maps.
"""

from __future__ import annotations

import numpy as np

from ...kernels import host
from ..types import Array, Bank, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters
from .grad_cam import gradients_at_tap, tap_gradient
from .masks import once, over_baseline, rises, scaled_after_upsampling
from .one_pass import refuses


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 is the baseline alone; then every target's group masks, equal ones once."""
    if observation.features is None:
        raise ValueError("group-cam needs the layer's maps")
    weights = gradients_at_tap(facts, observation).mean(axis=(2, 3))
    weighed = weights[:, :, None, None] * observation.features
    groups = min(int(parameters["groups"]), weighed.shape[1])
    sums = np.stack([part.sum(axis=1) for part in np.array_split(weighed, groups, axis=1)], axis=1)
    sums = np.maximum(sums, 0)
    k, _, h, w = sums.shape
    flat = sums.reshape(k * groups, h, w)
    live = np.ptp(flat, axis=(1, 2)) > 0
    found = once(scaled_after_upsampling(flat, facts.size), live)
    bank = over_baseline(found)
    extras = {"passes": len(bank) if bank else 0, "groups": groups, "constant": int((~live).sum())}
    return Expansion(bank, "blur:51:50", carry=(found.uses.reshape(k, groups), sums), extras=extras)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`sum_g relu(p(x m_g + b (1 - m_g)) - p(b)) V_g`."""
    uses, sums = expansion.carry
    weights = np.maximum(rises(scores, uses), 0)
    maps = np.stack([host.accumulate_maps(each, weight[None])[0] for each, weight in zip(sums, weights, strict=True)])
    return Combined(maps, tuple({} for _ in maps))


GROUP_CAM = Method(
    name="group-cam",
    summary="maps weighed by gradients and summed in groups; what each group shows of the image weighs it",
    citation="Zhang, Rao, Yang, Group-CAM, arXiv 2103.13859",
    parameters={"groups": Parameter(32, "groups of neighbouring channels", least=1, most=4096)},
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("upsample", "minmax"),
    passes=lambda facts, parameters: 1 + int(parameters["groups"]),
    refuses=refuses,
    backward=tap_gradient,
)

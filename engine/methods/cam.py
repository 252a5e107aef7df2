"""CAM: where the scores are a linear layer on the pooled feature map, the class's weights on the map itself.

Zhou et al., CVPR 2016 (arXiv 1512.04150). No masked pass; equals Grad-CAM times the grid's size on such heads.
"""

from __future__ import annotations

import numpy as np

from ...kernels import host
from ..types import Array, Combined, Expansion, Facts, Method, Observation, Parameters
from .one_pass import expand


def combine(
    facts: Facts,
    observation: Observation,
    expansion: Expansion,
    scores: Array,
    parameters: Parameters,
) -> Combined:
    """`sum_k w_ck A_k`; its mean plus the bias is the logit, and `completeness_error` says how nearly."""
    if isinstance(facts.head, str) or observation.features is None:
        raise ValueError("cam needs a linear head and its feature map")
    targets = observation.targets
    maps = host.accumulate_maps(observation.features, facts.head.weight[targets])
    logits = observation.raw[targets].astype(np.float64)
    off = np.abs(maps.mean(axis=(1, 2)) + facts.head.bias[targets] - logits) / np.maximum(np.abs(logits), 1e-6)
    return Combined(maps, tuple({"completeness_error": float(f"{error:.3g}")} for error in off))


CAM = Method(
    name="cam",
    summary="the class's weights on the feature map; one pass, for heads of pooling and one linear layer",
    citation="Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016",
    parameters={},
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("upsample", "relu", "minmax"),
    passes=lambda facts, parameters: 0,
    refuses=lambda facts, parameters: facts.head if isinstance(facts.head, str) else None,
)

"""L-CAM: an attention that was trained on the frozen classifier, a 1x1 convolution at the layer; no further pass.

Gkartzonika, Gkalelis and Mezaris, ECCV workshops 2022. `heatmill train-lcam` trains it and writes the file that is
read here. As the authors do, the map is read before the sigmoid and scaled to 0..1 before it is upsampled.
"""

from __future__ import annotations

from ...kernels import host
from ..types import Array, Combined, Expansion, Facts, Method, Observation, Parameters
from .one_pass import expand

UNTRAINED = "no training image had this class: its map is untrained"


def combine(
    facts: Facts,
    observation: Observation,
    expansion: Expansion,
    scores: Array,
    parameters: Parameters,
) -> Combined:
    """`sum_k w_ck A_k + b_c`; a class without a training image warns."""
    attention = facts.attention
    if isinstance(attention, str) or observation.features is None:
        raise ValueError("l-cam needs an attention and its feature map")
    targets = observation.targets
    maps = host.accumulate_maps(observation.features, attention.weight[targets])
    maps += attention.bias[targets][:, None, None]
    extras = tuple({"warning": UNTRAINED} if int(target) in attention.untrained else {} for target in targets)
    return Combined(maps, extras)


L_CAM = Method(
    name="l-cam",
    summary="an attention trained on the frozen classifier; one pass, for files of heatmill train-lcam",
    citation="Gkartzonika, Gkalelis and Mezaris, Learning Visual Explanations for DCNN-Based Image Classifiers Using "
    "an Attention Mechanism, ECCV Workshops 2022",
    parameters={},
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("minmax", "upsample"),
    passes=lambda facts, parameters: 0,
    refuses=lambda facts, parameters: facts.attention if isinstance(facts.attention, str) else None,
)

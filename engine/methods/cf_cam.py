"""CF-CAM: contrastive relevance masks the feature maps, what each then lets through of the image weighs it.

Sun, Shi, Wang, JEIT 2023 (doi 10.11999/JEIT220113), Algorithm 1; a reconstruction: the mask's scaling, the rules of
the relevance pass and the blur's size are not written there.
"""

from __future__ import annotations

import numpy as np

from ...kernels import host
from ...models.graph.request import Request
from ..types import Array, Bank, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters
from .lrp import kept
from .masks import once, over_baseline, rises, scaled_after_upsampling
from .one_pass import refuses

ROUNDING = 1e-7  # a channel's relevance below this share of the greatest is fp32's rounding


def backward(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    layer = facts.tap.name if facts.tap else ""
    return (Request("relevance", at=layer, start=str(parameters["start"]), composite="z-plus"),)


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 is the baseline alone; then every target's masks, equal ones once.

    A channel whose relevance is nowhere positive, or positive by rounding only, has an empty mask, shows the baseline,
    and weighs exactly nothing.
    """
    features, relevance = observation.features, observation.returned[0].values
    if features is None:
        raise ValueError("cf-cam needs the layer's maps")
    if parameters["relevance"] == "channel":
        relevance = relevance.mean(axis=(2, 3), keepdims=True)
    products = relevance * features
    if parameters["signed"] == "no":
        products = np.maximum(products, 0)
    k, c, h, w = products.shape
    products = products.reshape(k * c, h, w)
    ranges = np.ptp(products, axis=(1, 2)).reshape(k, c)
    live = (ranges > ROUNDING * ranges.max(axis=1, keepdims=True)).ravel()
    masks = np.zeros_like(products)
    if live.any():
        masks[live] = scaled_after_upsampling(products[live], facts.size)
    found = once(masks, live)
    bank = over_baseline(found)
    extras = {
        "passes": len(bank) if bank else 0,
        "channels": c,
        "skipped": int(k * c - live.sum()),
        "duplicate": int(live.sum()) - len(found.masks),
    }
    baseline = f"blur:{parameters['ksize']}:{parameters['sigma']}"
    carry = (found.uses.reshape(k, c), masks.reshape(k, c, h, w))
    return Expansion(bank, baseline, str(parameters["score"]), carry=carry, extras=extras)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`sum_c (f(x m_c + b (1 - m_c)) - f(b)) m_c`; the difference keeps its sign."""
    uses, masks = expansion.carry
    risen = rises(scores, uses)
    maps = np.stack([host.accumulate_maps(mask, weights[None])[0] for mask, weights in zip(masks, risen, strict=True)])
    extras = [kept(float(share)) for share in observation.returned[0].kept]
    for told, use in zip(extras, uses, strict=True):
        if (use < 0).all():
            told["reason"] = "no channel has positive relevance for the target"
    return Combined(maps, tuple(extras))


CF_CAM = Method(
    name="cf-cam",
    summary="contrastive relevance masks the maps; what each shows of the image, over a blurred one, weighs it",
    citation="Sun, Shi, Wang, CF-CAM, Journal of Electronics and Information Technology 2023",
    parameters={
        "relevance": Parameter("pixel", "relevance at every position, or averaged by channel", ("pixel", "channel")),
        "start": Parameter("clrp1", "the contrast", ("clrp1", "clrp1-code", "clrp2", "sglrp")),
        "signed": Parameter(
            "no", "keep negative relevance in the masks, as Algorithm 1 reads literally", ("no", "yes")
        ),
        "score": Parameter("posterior", "what a masked pass is asked for", ("posterior", "logit")),
        "ksize": Parameter(51, "size of the blur's kernel", least=3, most=501),
        "sigma": Parameter(50.0, "standard deviation of the blur", least=0.1, most=1000),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("upsample", "relu", "minmax"),
    passes=lambda facts, parameters: 1 + (facts.tap.channels if facts.tap else 0),
    refuses=lambda facts, parameters: (
        (f"ksize {parameters['ksize']} is even: a kernel has a middle" if int(parameters["ksize"]) % 2 == 0 else None)
        or refuses(facts, parameters)
    ),
    backward=backward,
)

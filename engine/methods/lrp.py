"""Layer-wise relevance propagation, and the contrasts and presets that build on it.

The share of the relevance that arrives is in every row: rules absorb it in biases and stabilisers, and on folded
depthwise networks hardly any may be left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...models.graph.request import Request
from ..types import Array, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters, always
from .one_pass import expand, refuses

Combine = Callable[[Facts, Observation, Expansion, Array, Parameters], Combined]

LEAST_KEPT = 0.01
COMPOSITES = (
    "epsilon",
    "epsilon-plus",
    "epsilon-plus-flat",
    "epsilon-gamma-box",
    "epsilon-alpha2-beta1",
    "z-plus",
    "zero",
)
AT = {"at": Parameter("image", "where relevance is shown: at the image, or at the layer", ("image", "layer"))}


def kept(share: float) -> dict[str, Any]:
    """What a row says of the share of relevance that arrived."""
    told: dict[str, Any] = {"kept": float(f"{share:.4g}")}
    if abs(share) < LEAST_KEPT:
        told["warning"] = f"only {abs(share):.1g} of the relevance arrived: trust the map's shape, not its size"
    return told


def relevance_request(composite: str, start: str) -> Callable[[Facts, Parameters], tuple[Request, ...]]:
    """A request at the image or the layer, as the parameter `at` says."""

    def ask(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
        layer = facts.tap.name if parameters["at"] == "layer" and facts.tap else ""
        rules = str(parameters.get("composite", composite))
        begins = str(parameters.get("variant", start))
        return (Request("relevance", at=layer, start=begins, composite=rules),)

    return ask


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """The channels' relevance summed up."""
    (returned,) = observation.returned
    maps = returned.values.sum(axis=1, dtype=np.float64).astype(np.float32)
    return Combined(maps, tuple(kept(float(share)) for share in returned.kept))


def where_score(holds: Callable[[Array, float], Array], word: str) -> Combine:
    """As `combine`; a raw score that is not so has nothing to divide, and its map is zero."""

    def combine_some(
        facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
    ) -> Combined:
        combined = combine(facts, observation, expansion, scores, parameters)
        divided = holds(observation.raw[observation.targets], 0.0)
        maps = np.where(divided[:, None, None], combined.maps, np.float32(0))
        nothing = {"reason": f"the target's raw score is {word}: there is nothing to divide"}
        extras = (
            told if yes else {"kept": told["kept"], **nothing}
            for told, yes in zip(combined.extras, divided, strict=True)
        )
        return Combined(maps, tuple(extras))

    return combine_some


def refuses_sigmoid(facts: Facts, parameters: Parameters) -> str | None:
    if facts.output == "sigmoid":
        return "its contrast is a softmax over the classes, and the model's scores are independent (sigmoid)"
    return refuses(facts, parameters)


def _method(
    name: str,
    summary: str,
    citation: str,
    ask: Callable[[Facts, Parameters], tuple[Request, ...]],
    parameters: dict[str, Parameter],
    combining: Combine = combine,
    refusing: Callable[[Facts, Parameters], str | None] = refuses,
) -> Method:
    return Method(
        name=name,
        summary=summary,
        citation=citation,
        parameters={**parameters, **AT},
        expand=expand,
        combine=combining,
        finish=lambda parameters: ("relu", "minmax"),
        passes=lambda facts, parameters: 0,
        refuses=refusing,
        backward=ask,
        needs_tap=lambda parameters: parameters["at"] == "layer",
        pixels=always,
    )


RELEVANCES = (
    _method(
        "lrp",
        "the score divided among the pixels, layer by layer",
        "Bach et al., On Pixel-Wise Explanations by Layer-Wise Relevance Propagation, PLOS ONE 2015",
        relevance_request("epsilon-plus", "logit"),
        {"composite": Parameter("epsilon-plus", "which rule for which layers", COMPOSITES)},
        where_score(np.not_equal, "0"),
    ),
    _method(
        "clrp",
        "contrastive LRP: what speaks for the class more than for the others",
        "Gu, Yang, Tresp, Understanding Individual Decisions of CNNs via Contrastive Backpropagation, ACCV 2018",
        relevance_request("clrp", "clrp1"),
        {
            "variant": Parameter(
                "clrp1",
                "the others: all evenly, by their scores as in the authors' code, or the class's negative weights",
                ("clrp1", "clrp1-code", "clrp2"),
            )
        },
    ),
    _method(
        "sglrp",
        "contrastive LRP, the others weighed by their probabilities",
        "Iwana, Kuroki, Uchida, Explaining CNNs using Softmax Gradient LRP, ICCV Workshops 2019",
        relevance_request("deep-taylor", "sglrp"),
        {},
        refusing=refuses_sigmoid,
    ),
    _method(
        "deep-taylor",
        "LRP by deep Taylor decomposition: positive parts only, pixels bounded",
        "Montavon et al., Explaining Nonlinear Classification Decisions with Deep Taylor Decomposition, 2017",
        relevance_request("deep-taylor", "logit"),
        {},
        where_score(np.greater, "not positive"),
    ),
)

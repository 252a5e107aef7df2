"""SmoothGrad: a method's map averaged over noisy copies of the image.

Smilkov et al., 2017 (arXiv 1706.03825). The noise's deviation is a share of the image's own range; the classes are the
clean image's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...models.graph.request import Request
from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    Method,
    Observation,
    Parameter,
    Parameters,
    PathBank,
    always,
)
from .grad_cam import GRADIENT_CAMS
from .integrated_gradients import INTEGRATED_GRADIENTS, quadrature
from .lrp import RELEVANCES, kept
from .saliency import SALIENCIES, one_map

BASES: dict[str, Method] = {method.name: method for method in (*SALIENCIES, *GRADIENT_CAMS, *RELEVANCES)}
PATH = INTEGRATED_GRADIENTS.name
SHARED = frozenset(method.name for method in RELEVANCES)  # whose passes say what share arrived
STEPS = 25  # points of each noisy copy's path


def _base(parameters: Parameters) -> tuple[Method, Parameters]:
    method = BASES.get(str(parameters["base"]), INTEGRATED_GRADIENTS)
    return method, {key: parameter.default for key, parameter in method.parameters.items()}


def through(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    """The base's own pass; a head that spares it for one image does so for none of many."""
    method, values = _base(parameters)
    return method.through(facts, values) or method.backward(replace(facts, head="every copy has its own"), values)


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """For each target the same noisy copies; for integrated gradients the points of each copy's path from zero."""
    count, samples = len(observation.targets), int(parameters["samples"])
    if parameters["base"] == PATH:
        points, weights = quadrature(STEPS)
        shares, draws = np.tile(points, samples), np.repeat(np.arange(samples), STEPS)
        weights = np.tile(weights, samples) / samples
    else:
        shares, draws, weights = np.ones(samples), np.arange(samples), np.full(samples, 1 / samples)
    bank = PathBank(np.tile(shares, count).astype(np.float32), np.tile(draws, count), float(parameters["noise"]))
    (request,) = through(facts, parameters)
    return Expansion(
        bank,
        through=request,
        of=np.repeat(np.arange(count), len(shares)),
        weights=np.tile(weights, count),
        carry=bank.shares,
        extras={"passes": len(bank), "samples": samples},
    )


def read(facts: Facts, shown: Observation, row: int, expansion: Expansion, parameters: Parameters) -> Array:
    """One copy's map, and behind a relevance map's numbers the share that arrived; for integrated gradients the copy,
    which is its point divided by its share, times gradient.
    """
    if parameters["base"] == PATH:
        gradient = shown.returned[0].values[0].astype(np.float64)
        return np.asarray(shown.image * gradient / float(expansion.carry[row]))
    method, values = _base(parameters)
    combined = method.combine(facts, shown, Expansion(), np.zeros((1, 0)), values)
    if not isinstance(combined, Combined):
        raise TypeError(f"{method.name} needs more than one pass")
    whole: Array = combined.maps[0]
    return np.append(whole.ravel(), shown.returned[0].kept[0]) if parameters["base"] in SHARED else whole


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, sums: Array, parameters: Parameters
) -> Combined:
    if parameters["base"] in SHARED:
        maps = sums[:, :-1].reshape(len(sums), *facts.size).astype(np.float32)
        return Combined(maps, tuple(kept(float(share)) for share in sums[:, -1]))
    path = parameters["base"] == PATH
    maps = one_map(sums, _base(parameters)[1]) if path else sums.astype(np.float32)
    return Combined(maps, tuple({} for _ in maps))


def refuses_here(facts: Facts, parameters: Parameters) -> str | None:
    method, values = _base(parameters)
    return method.refuses(facts, values)


def finish(parameters: Parameters) -> tuple[str, ...]:
    method, values = _base(parameters)
    return method.finish(values)


def needs_tap(parameters: Parameters) -> bool:
    method, values = _base(parameters)
    return method.needs_tap(values)


SMOOTHGRAD = Method(
    name="smoothgrad",
    summary="a gradient or relevance method averaged over noisy copies of the image",
    citation="Smilkov et al., SmoothGrad, arXiv 1706.03825",
    parameters={
        "base": Parameter("saliency", "the method that is averaged", (*BASES, PATH)),
        "samples": Parameter(50, "noisy copies", least=1, most=10000),
        "noise": Parameter(0.15, "the noise's deviation, as a share of the image's range", least=0, most=2),
    },
    expand=expand,
    combine=combine,
    finish=finish,
    passes=lambda facts, parameters: int(parameters["samples"]) * (STEPS if parameters["base"] == PATH else 1),
    refuses=refuses_here,
    through=through,
    read=read,
    needs_tap=needs_tap,
    pixels=always,
)

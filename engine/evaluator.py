"""Metrics through the engine's loop: every metric of every map of an image, their masked images in full batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ..kernels import host
from .coincide import concatenated
from .opening import Loaded
from .types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    Measured,
    Method,
    MethodCall,
    MetricCall,
    Observation,
    Parameters,
    Subject,
    never,
)

Given = Sequence[Sequence[Subject | Measured]]


def orders(saliencies: Sequence[Array], size: tuple[int, int]) -> Array:
    """The rank of every pixel in each of m maps, and reversed, (2 m, H, W) int32: 0 for the greatest value.

    Of equal values the last in scan order comes first: `flip(argsort(...))` of a stable sort, as the authors of RISE
    have it.
    """
    ranks = np.empty((2, len(saliencies), size[0] * size[1]), dtype=np.int32)
    down = np.arange(size[0] * size[1] - 1, -1, -1, dtype=np.int32)
    for saliency, forward in zip(saliencies, ranks[0], strict=True):
        forward[np.argsort(saliency.ravel(), kind="stable")] = down
    np.subtract(len(down) - 1, ranks[0], out=ranks[1])
    return ranks.reshape(-1, *size)


def measuring(loaded: Loaded, metrics: Sequence[MetricCall], methods: int) -> Loaded:
    """A model whose calls are the metrics, each for the maps of each of so many methods, in this order.

    Items carry as `given` what is to be measured, by method and target: a `Subject`, or a `Measured` for a map that
    there is none of. An explanation of theirs has no map, and its `extras["measured"]` is a `Measured`.
    """
    calls = [_as_method(metric, place, loaded.posterior) for metric in metrics for place in range(methods)]
    return replace(loaded, calls=tuple(calls), tap=None)


def _as_method(call: MetricCall, place: int, posterior: str) -> MethodCall:
    metric, values = call.metric, call.parameters

    def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
        given: Given = observation.given
        banks = [metric.bank(each, values) if isinstance(each, Subject) else None for each in given[place]]
        ends = np.cumsum([0, *(0 if bank is None else len(bank) for bank in banks)])
        known = [bank for bank in banks if bank is not None]
        bank = concatenated(known) if known else None
        return Expansion(bank, metric.baseline(values), carry=[slice(*each) for each in pairwise(ends.tolist())])

    def combine(
        facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
    ) -> Combined:
        full = host.class_scores(observation.raw[None], observation.targets, posterior)[0]
        given: Given = observation.given
        found = [
            each if isinstance(each, Measured) else metric.measure(each, float(whole), row[own], values)
            for each, whole, row, own in zip(given[place], full, scores, expansion.carry, strict=True)
        ]
        return Combined(np.empty((len(found), 0, 0)), tuple({"measured": each} for each in found))

    method = Method(
        name=f"{call.text} of {place}",
        summary=metric.summary,
        citation=metric.citation,
        parameters={},
        expand=expand,
        combine=combine,
        finish=lambda parameters: (),
        passes=lambda facts, parameters: metric.passes(values),
        refuses=lambda facts, parameters: None,
        needs_tap=never,
    )
    return MethodCall(method, {})

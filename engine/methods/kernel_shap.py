"""Kernel SHAP: Shapley values of superpixels by weighted least squares over coalitions.

Lundberg and Lee, NeurIPS 2017 (arXiv 1705.07874), theorem 2. As in the authors' code, coalitions of the smallest and
largest sizes are taken whole while the samples suffice, and the sizes between are drawn in pairs of opposites.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

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
    SegmentBank,
    always,
    never,
)
from .segments import (
    ONE_SEGMENT,
    SAME_SCORE,
    distinct,
    painted,
    random_of,
    refuses_coalitions,
    segments_of,
    steady,
    superpixel_options,
    superpixels,
)

SEGMENTS = 50


def coalitions(count: int, samples: int, random: np.random.Generator) -> tuple[Array, Array]:
    """Which of `count` parts are shown, (n, count) uint8, and the kernel's weight of each (n,); neither none nor all.

    Sizes s and count - s are one layer; its weight is the Shapley kernel's, summed over its coalitions.
    """
    layers = range(1, count // 2 + 1)
    mass = {s: (count - 1) / (s * (count - s)) * (1 if 2 * s == count else 2) for s in layers}
    rows: list[Array] = []
    weights: list[float] = []
    left = samples
    for s in layers:
        number = math.comb(count, s) * (1 if 2 * s == count else 2)
        if left * mass[s] / sum(mass.values()) < number * (1 - 1e-12):
            break
        for parts in combinations(range(count), s):
            row = np.zeros(count, np.uint8)
            row[list(parts)] = 1
            rows += [row] if 2 * s == count else [row, 1 - row]
        weight = mass.pop(s)
        weights += [weight / number] * number
        left -= number
    draws = left // 2 if mass else 0
    if draws:
        sizes = random.choice(list(mass), draws, p=np.array(list(mass.values())) / sum(mass.values()))
        for order, size in zip(random.random((draws, count)).argsort(axis=1), sizes, strict=True):
            row = np.zeros(count, np.uint8)
            row[order[:size]] = 1
            rows += [row, 1 - row]
        weights += [sum(mass.values()) / (2 * draws)] * (2 * draws)
    return np.array(rows, np.uint8).reshape(-1, count), np.array(weights)


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """Row 0 shows nothing, row 1 everything; then coalitions, equal ones once with their weights' sum."""
    segments, count = segments_of(observation)
    bits, weights = coalitions(count, int(parameters["samples"]), random_of(observation, "kernel-shap"))
    once, uses = distinct(bits) if len(bits) else (bits, np.zeros(0, np.intp))
    weights = np.bincount(uses, weights, len(once))
    ends = np.repeat(np.array([[0], [1]], np.uint8), count, axis=1)
    bank = SegmentBank(segments, np.concatenate([ends, once]))
    extras = {"passes": len(bank), "segments": count}
    return Expansion(bank, str(parameters["baseline"]), carry=weights, extras=extras)


def values_of(bits: Array, weights: Array, risen: Array, whole: float) -> Array:
    """The values (count,) of least weighted squares whose sum is `whole`.

    Args:
        bits: (n, count) float.
        risen: (n,) scores over that of the empty coalition.
    """
    even = whole / bits.shape[1]
    roots = np.sqrt(weights)[:, None]
    free = bits - bits.mean(axis=1, keepdims=True)  # of values that sum to nothing, a common part has no effect
    found = np.linalg.lstsq(roots * free, roots[:, 0] * (risen - even * bits.sum(axis=1)), rcond=None)[0]
    return np.asarray(even + found)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    bank = expansion.bank
    if not isinstance(bank, SegmentBank):
        raise ValueError("kernel-shap combines coalitions")
    segments, count = segments_of(observation)
    bits = bank.bits[2:].astype(np.float64)
    values, extras = np.zeros((len(scores), count)), []
    for k, row in enumerate(scores.astype(np.float64)):
        told: dict[str, str | float] = {"base": float(f"{row[0]:.6g}")}
        values[k] = values_of(bits, expansion.carry, row[2:] - row[0], row[1] - row[0])
        if count == 1 or steady(row):
            told["reason"], values[k] = ONE_SEGMENT if count == 1 else SAME_SCORE, 0
        extras.append(told)
    return Combined(painted(segments, values), tuple(extras))


KERNEL_SHAP = Method(
    name="kernel-shap",
    summary="Shapley values of superpixels, by weighted least squares over coalitions",
    citation="Lundberg and Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017",
    parameters={
        "samples": Parameter(1000, "coalitions", least=2, most=100_000),
        **superpixel_options("slic", SEGMENTS, "mean"),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("relu", "minmax"),
    passes=lambda facts, parameters: 2 + int(parameters["samples"]),
    refuses=lambda facts, parameters: refuses_coalitions(int(parameters["samples"]), parameters, SEGMENTS),
    superpixels=superpixels,
    needs_tap=never,
    pixels=always,
)

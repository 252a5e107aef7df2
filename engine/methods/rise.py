"""RISE: random coarse masks, weighted by the class score each leaves.

Petsiuk, Das, Saenko, BMVC 2018 (arXiv 1806.07421). One set of masks serves every image and every class.
"""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np

from ..types import (
    BASELINE_NAMES,
    Array,
    Bank,
    Expansion,
    Facts,
    GridBank,
    Method,
    Observation,
    Parameter,
    Parameters,
    Summed,
    always,
    never,
)

BLOCK = 4096
MAX_BITS = 1 << 28


def share(facts: Facts, parameters: Parameters, seed: int) -> GridBank:
    """The masks, equal ones once. Row r has the counters after row r - 1's: fewer masks are a prefix of more."""
    masks, s, p = int(parameters["masks"]), int(parameters["cells"]), float(parameters["p"])
    generator = np.random.Generator(np.random.Philox(key=[seed, crc32(b"rise")]))
    cells = np.array([math.ceil(side / s) for side in facts.size])
    bits, offsets = np.empty((masks, s * s), dtype=np.uint8), np.empty((masks, 2), dtype=np.int32)
    for start in range(0, masks, BLOCK):
        rows = slice(start, min(start + BLOCK, masks))
        draws = generator.random((rows.stop - start, s * s + 2))
        bits[rows] = draws[:, : s * s] < p
        offsets[rows] = np.minimum(draws[:, s * s :] * cells, cells - 1)
    offsets[bits.min(axis=1) == bits.max(axis=1)] = 0  # a uniform grid is the same mask at every offset
    whole = np.ascontiguousarray(np.hstack([np.packbits(bits, axis=1), offsets.view(np.uint8)]))
    _, first, counts = np.unique(whole.view(f"V{whole.shape[1]}").ravel(), return_index=True, return_counts=True)
    order = np.argsort(first)
    first = first[order]
    return GridBank(bits[first].reshape(-1, s, s), offsets[first], counts[order])


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """The shared masks."""
    if not isinstance(shared, GridBank):
        raise ValueError("rise needs its shared masks")
    masks = int(parameters["masks"])
    extras = {"passes": len(shared), "masks": masks, "duplicate": masks - len(shared)}
    return Expansion(shared, str(parameters["baseline"]), extras=extras)


def combine(
    facts: Facts,
    observation: Observation,
    expansion: Expansion,
    scores: Array,
    parameters: Parameters,
) -> Summed:
    """`1 / (N p) * sum_n score_n m_n`, the estimate of the score's mean where a pixel is shown."""
    bank = expansion.bank
    if not isinstance(bank, GridBank):
        raise ValueError("rise combines grid masks")
    weights = scores * bank.counts / (float(parameters["masks"]) * float(parameters["p"]))
    return Summed(bank, weights)


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    bits = int(parameters["masks"]) * int(parameters["cells"]) ** 2
    return f"masks x cells x cells is {bits}, at most {MAX_BITS} are kept" if bits > MAX_BITS else None


RISE = Method(
    name="rise",
    summary="random coarse masks, weighted by the class score each leaves",
    citation="Petsiuk, Das, Saenko, RISE, BMVC 2018",
    parameters={
        "masks": Parameter(4000, "number of random masks", least=1, most=1_000_000),
        "cells": Parameter(7, "cells of the grid per side", least=1, most=64),
        "p": Parameter(0.5, "probability that a cell is shown", least=0.001, most=1),
        "baseline": Parameter("zero", "what a mask shows where it is 0", BASELINE_NAMES),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("minmax",),
    passes=lambda facts, parameters: int(parameters["masks"]),
    refuses=refuses,
    share=share,
    needs_tap=never,
    pixels=always,
)

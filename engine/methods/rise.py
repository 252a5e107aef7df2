"""RISE: random coarse masks, weighted by the class score each leaves.

Petsiuk, Das, Saenko, BMVC 2018 (arXiv 1806.07421). One set of masks serves every image and every class.
"""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np

from ...kernels import host
from ..types import (
    BASELINE_NAMES,
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    GridBank,
    Method,
    Observation,
    Parameter,
    Parameters,
)


def share(facts: Facts, parameters: Parameters, seed: int) -> GridBank:
    """The masks: row r is drawn from the counters after row r - 1's, so fewer masks are a prefix of more."""
    masks, s, p = int(parameters["masks"]), int(parameters["cells"]), float(parameters["p"])
    draws = np.random.Generator(np.random.Philox(key=[seed, crc32(b"rise")])).random((masks, s * s + 2))
    bits = (draws[:, : s * s] < p).astype(np.uint8).reshape(masks, s, s)
    cells = np.array([math.ceil(side / s) for side in facts.size])
    return GridBank(bits, np.minimum(draws[:, s * s :] * cells, cells - 1).astype(np.int64))


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """The shared masks, equal ones once; `carry` is how often each was drawn."""
    if not isinstance(shared, GridBank):
        raise ValueError("rise needs its shared masks")
    flat = shared.bits.reshape(len(shared), -1)
    uniform = flat.min(axis=1) == flat.max(axis=1)
    offsets = np.where(uniform[:, None], 0, shared.offsets)
    _, first, count = np.unique(np.hstack([flat, offsets]), axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    first, count = first[order], count[order]
    bank = GridBank(shared.bits[first], offsets[first])
    extras = {"passes": len(bank), "masks": len(shared), "duplicate": len(shared) - len(bank)}
    return Expansion(bank, str(parameters["baseline"]), carry=count, extras=extras)


def combine(
    facts: Facts,
    observation: Observation,
    expansion: Expansion,
    scores: Array,
    targets: Array,
    parameters: Parameters,
) -> Combined:
    """`1 / (N p) * sum_n score_n m_n`, the estimate of the score's mean where a pixel is shown."""
    bank = expansion.bank
    if not isinstance(bank, GridBank):
        raise ValueError("rise combines grid masks")
    weights = scores * expansion.carry / (float(parameters["masks"]) * float(parameters["p"]))
    maps = host.accumulate_grid(bank.bits, bank.offsets, weights, facts.size)
    return Combined(maps, tuple({} for _ in targets))


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
    refuses=lambda facts, parameters: None,
    share=share,
    needs_tap=False,
    pixels=True,
)

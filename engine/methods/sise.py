"""SISE and Ada-SISE: masks from the maps of several layers, chosen by gradient, and joined from fine to coarse.

Sattarzadeh et al., AAAI 2021 (arXiv 2010.00672); Sudhakar et al., ICASSP 2021 (arXiv 2102.07799).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ...kernels import finish, host
from ...models.graph.request import Request
from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    MapBank,
    Method,
    Observation,
    Parameter,
    Parameters,
    always,
)
from .masks import once, scaled_after_upsampling, weights_of
from .one_pass import refuses

STEEP = 100.0  # of the soft threshold in the code
FEW = 0.1  # the share of pixels below which the code's threshold is raised
NO_GRADIENT = "no layer has a map with a positive gradient whose mask tells places apart"


def blocks(facts: Facts, parameters: Parameters) -> tuple[str, ...]:
    """The last layer of every grid that no path goes around, from fine to coarse, and the one that is read."""
    if facts.tap is None:
        return ()
    names = [tap.name for tap in facts.layers]
    before = facts.layers[: names.index(facts.tap.name)] if facts.tap.name in names else ()
    last = {tap.grid: tap.name for tap in before if tap.name in facts.waists and not tap.prefix}
    last.pop(facts.tap.grid, None)
    return (*last.values(), facts.tap.name)[-int(parameters["layers"]) :]


def backward(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    return tuple(Request(at=name) for name in blocks(facts, parameters))


def otsu(values: Array) -> float:
    """Otsu's threshold of values that differ, by 256 bins."""
    filters: Any = import_module("skimage.filters")  # not at the top: it takes longer than most commands
    return float(filters.threshold_otsu(values))


def positive(slopes: Array) -> Array:
    """Which maps have a positive mean gradient (SISE, with its threshold at 0)."""
    return np.asarray(slopes > 0)


def above_otsu(slopes: Array) -> Array:
    """Which lie above Otsu's threshold of the positive ones; all of these where they are alike."""
    kept = positive(slopes)
    if kept.any() and np.ptp(slopes[kept]) > finish.FLAT * slopes[kept].max():
        kept &= slopes / slopes.max() > otsu(slopes[kept] / slopes.max())
    return kept


def join(below: Array | None, layer: Array, threshold: str) -> Array:
    """`(E + V) B(V)`, V a layer's map 0..1, B its places above Otsu's threshold; the first layer's is V itself."""
    if below is None:
        return layer
    level = otsu(layer)
    if threshold == "hard":
        return np.asarray((below + layer) * (layer > level))
    raised = 1.5 * level
    level = raised if (layer > raised).mean() < FEW else level
    return np.asarray((below + layer) / (1 + np.exp(np.clip(-STEEP * (layer - level), -700, 700))))


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer on the way.

    Attributes:
        layer: its number.
        masks: (c, h, w), zero for those that no target keeps.
        uses: which different one each of them is, -1 for none.
        weights: (k, c) what the score of each map's mask is multiplied by: 1 / its sum where the target keeps it.
        joined: each target's map so far; None before the first layer that tells anything.
    """

    layer: int
    masks: Array
    uses: Array
    weights: Array
    joined: tuple[Array | None, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One method: its name, and (c,) mean gradients -> which maps are kept."""

    name: str
    summary: str
    citation: str
    chosen: Callable[[Array], Array]


ROWS = (
    Row(
        "sise",
        "maps of several layers with positive gradients as masks, layer by layer joined",
        "Sattarzadeh et al., SISE, AAAI 2021",
        positive,
    ),
    Row(
        "ada-sise",
        "SISE of the maps whose gradients stand out, about half of them",
        "Sudhakar et al., Ada-SISE, ICASSP 2021",
        above_otsu,
    ),
)


def _method(row: Row) -> Method:
    def stage(
        facts: Facts, observation: Observation, layer: int, joined: tuple[Array | None, ...], extras: Mapping[str, Any]
    ) -> Expansion:
        """The masks of one layer that any target keeps, equal ones once."""
        features = observation.layers[layer]
        slopes = observation.returned[layer].values.mean(axis=(2, 3), dtype=np.float64)
        kept = np.stack([row.chosen(each) for each in slopes]) & (np.ptp(features, axis=(1, 2)) > 0)
        live = kept.any(axis=0)
        masks = np.zeros_like(features)
        if live.any():
            masks[live] = scaled_after_upsampling(features[live], facts.size)
        found = once(masks, live)
        sides = zip(features.shape[1:], facts.size, strict=True)
        rows, columns = (host.resize_matrix(low, high, "half-pixel").sum(axis=0) for low, high in sides)
        sums = np.einsum("chw,h,w->c", masks, rows, columns)
        weights = kept / np.where(live, sums, 1.0)
        told = {
            "passes": extras.get("passes", 0) + len(found.masks),
            "channels": extras.get("channels", 0) + len(features),
            "skipped": extras.get("skipped", 0) + int((~live).sum()),
        }
        bank = MapBank(found.masks) if len(found.masks) else None
        return Expansion(bank, carry=Stage(layer, masks, found.uses, weights, joined), extras=told)

    def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
        return stage(facts, observation, 0, (None,) * len(observation.targets), {})

    def combine(
        facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
    ) -> Combined | Expansion:
        """`V = minmax(sum_k p(x M_k) M_k / sum(M_k))` of the layer, joined to what the finer ones gave."""
        done: Stage = expansion.carry
        joined = list(done.joined)
        if expansion.bank is not None:
            maps = host.accumulate_maps(done.masks, weights_of(scores, done.uses) * done.weights)
            full = host.upsample(maps, facts.size)
            for k, flat in enumerate(finish.flat(full)):
                if not flat:
                    joined[k] = join(joined[k], finish.minmax(full[k : k + 1])[0], str(parameters["threshold"]))
        if done.layer + 1 < len(observation.layers):
            return stage(facts, observation, done.layer + 1, tuple(joined), expansion.extras)
        zero = np.zeros(facts.size, np.float32)
        extras = tuple({"reason": NO_GRADIENT} if each is None else {} for each in joined)
        return Combined(np.stack([zero if each is None else each.astype(np.float32) for each in joined]), extras)

    def passes(facts: Facts, parameters: Parameters) -> int:
        channels = {tap.name: tap.channels for tap in facts.layers}
        return sum(channels.get(name, 0) for name in blocks(facts, parameters))

    return Method(
        name=row.name,
        summary=row.summary,
        citation=row.citation,
        parameters={
            "layers": Parameter(5, "how many layers, counted from the one that is read", least=1, most=20),
            "threshold": Parameter("hard", "0 or 1 by Otsu (paper), or soft as in the code", ("hard", "soft")),
        },
        expand=expand,
        combine=combine,
        finish=lambda parameters: ("minmax",),
        passes=passes,
        refuses=refuses,
        backward=backward,
        layers=blocks,
        pixels=always,
    )


SISES = tuple(_method(row) for row in ROWS)

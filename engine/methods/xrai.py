"""XRAI: regions in the order of the attribution that each adds per pixel.

Kapishnikov et al., ICCV 2019 (arXiv 1906.02825): integrated gradients from a black and a white baseline (the image's
least and greatest number), averaged, of the greatest channel; Felzenszwalb's segments at six scales, each dilated by 5
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...models.superpixels import Segmentation
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
    always,
    never,
)
from . import integrated_gradients as path
from .one_pass import refuses

SCALES = (50, 100, 150, 250, 500, 1200)
DILATED = 5
LEAST_NEW = 50  # pixels that a region must add


def superpixels(parameters: Parameters) -> tuple[Segmentation, ...]:
    return tuple(Segmentation("felzenszwalb", scale) for scale in SCALES)


def regions(segmentations: Sequence[Array]) -> Any:
    """Every segment dilated by a disk, (regions, pixels) as a sparse array of ones."""
    from scipy import ndimage, sparse

    y, x = np.mgrid[-DILATED : DILATED + 1, -DILATED : DILATED + 1]
    disk = x**2 + y**2 <= DILATED**2
    found = []
    for segments in segmentations:
        for number, box in enumerate(ndimage.find_objects(segments + 1)):
            around = tuple(slice(max(side.start - DILATED, 0), side.stop + DILATED) for side in box)
            rows, columns = np.nonzero(ndimage.binary_dilation(segments[around] == number, disk))
            found.append((rows + around[0].start) * segments.shape[1] + columns + around[1].start)
    ends = np.cumsum([0, *(len(pixels) for pixels in found)])
    shape = (len(found), segmentations[0].size)
    return sparse.csr_array((np.ones(ends[-1]), np.concatenate(found), ends), shape)


def ranked(attribution: Array, candidates: Any) -> tuple[Array, int]:
    """The pixels' densities by region, and how many regions were taken.

    The region with the greatest mean over the pixels that it adds is taken, and its pixels get that mean; regions that
    add less than 50 pixels are passed by, and what no region covers gets its own mean.

    Args:
        attribution: (pixels,).
        candidates: (regions, pixels), a sparse array of ones by rows.
    """
    values = np.zeros(attribution.shape)
    covered = np.zeros(attribution.shape, bool)
    by_pixel = candidates.tocsc()
    counts, sums = np.diff(candidates.indptr), candidates @ attribution
    taken = 0
    while (eligible := counts >= LEAST_NEW).any():
        gains = np.where(eligible, sums / np.maximum(counts, 1), -np.inf)
        best = int(gains.argmax())
        pixels = candidates.indices[candidates.indptr[best] : candidates.indptr[best + 1]]
        new = pixels[~covered[pixels]]
        values[new] = gains[best]
        covered[new] = True
        within = by_pixel[:, new]
        counts = counts - np.rint(within.sum(axis=1)).astype(int)
        sums = sums - within @ attribution[new]
        taken += 1
    if not covered.all():
        values[~covered] = attribution[~covered].mean()
    return values, taken


def _walk(
    facts: Facts, observation: Observation, parameters: Parameters, baseline: str, before: Array | None
) -> Expansion:
    """The path from one baseline; `carry` is its shares and what the other path gave."""
    steps = path.expand(facts, observation, {**parameters, "baseline": baseline}, None)
    return replace(steps, carry=(steps.carry, before))


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    return _walk(facts, observation, parameters, "least", None)


def read(facts: Facts, shown: Observation, row: int, expansion: Expansion, parameters: Parameters) -> Array:
    return path.read(facts, shown, row, replace(expansion, carry=expansion.carry[0]), parameters)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, sums: Array, parameters: Parameters
) -> Combined | Expansion:
    values, before = path.attributions(observation, sums), expansion.carry[1]
    if before is None:
        return _walk(facts, observation, parameters, "greatest", values)
    density = ((values + before) / 2).max(axis=1)
    candidates = regions(observation.segments)
    maps, extras = [], []
    for each in density:
        found, taken = ranked(each.ravel(), candidates)
        maps.append(found.reshape(facts.size).astype(np.float32))
        extras.append({"passes": 2 * len(expansion.carry[0]), "segments": candidates.shape[0], "regions": taken})
    return Combined(np.stack(maps), tuple(extras))


XRAI = Method(
    name="xrai",
    summary="regions in the order of the integrated gradients that each adds per pixel",
    citation="Kapishnikov et al., XRAI: Better Attributions Through Regions, ICCV 2019",
    parameters={"steps": Parameter(100, "points of each of the two paths", least=1, most=1000)},
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("minmax",),
    passes=lambda facts, parameters: 2 * (1 + int(parameters["steps"])),
    refuses=refuses,
    through=lambda facts, parameters: (path.GRADIENT,),
    read=read,
    superpixels=superpixels,
    needs_tap=never,
    pixels=always,
)

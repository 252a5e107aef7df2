"""What the methods share that show and hide superpixels."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from ...kernels import host
from ...models.superpixels import KINDS, Segmentation
from ..types import BASELINE_NAMES, SEGMENT_MEAN, Array, Observation, Parameter, Parameters

ONE_SEGMENT = "the picture is one superpixel: there are no parts to tell apart"
SAME_SCORE = "the score is the same whatever is hidden"
STEADY = 1e-10  # a score whose variance is below this share of its mean square is one number, and rounding
MOST_BITS = 1 << 28  # of all coalitions of an image
SIZES = {"quickshift": 4, "felzenszwalb": 250}  # SLIC's is the number of segments


def superpixel_options(kind: str, segments: int, baseline: str) -> dict[str, Parameter]:
    """The options of how a picture is cut and what stands for a part that is hidden."""
    names = (*BASELINE_NAMES, SEGMENT_MEAN)
    return {
        "superpixels": Parameter(kind, "how the picture is cut", tuple(KINDS)),
        "segments": Parameter(segments, "how many are asked of slic", least=2, most=1000),
        "baseline": Parameter(baseline, "what stands for a part that is hidden", names),
    }


def superpixels(parameters: Parameters) -> tuple[Segmentation, ...]:
    kind = str(parameters["superpixels"])
    return (Segmentation(kind, SIZES.get(kind, int(parameters["segments"]))),)


def refuses_coalitions(samples: int, parameters: Parameters, usual: int) -> str | None:
    """What is told of superpixels that are asked in a number that nothing reads, or of too many coalitions."""
    kind, asked = str(parameters["superpixels"]), int(parameters["segments"])
    if kind in SIZES and asked != usual:
        return f"segments={asked} is a number of slic's; {kind} finds its own (superpixels=slic)"
    if kind not in SIZES and samples * asked > MOST_BITS:
        return f"{samples} pictures of {asked} segments each are too many: at most {MOST_BITS} bits are kept"
    return None


def steady(scores: Array) -> bool:
    """Whether scores (n,) are the same but for rounding."""
    return bool(scores.var() <= STEADY * np.mean(scores**2))


def segments_of(observation: Observation) -> tuple[Array, int]:
    """The segment of every pixel, and how many there are."""
    (segments,) = observation.segments
    return segments, int(segments.max()) + 1


def random_of(observation: Observation, stream: str) -> np.random.Generator:
    """The random numbers of this image, a stream for each name."""
    return np.random.Generator(np.random.Philox(key=observation.key, counter=[0, 0, 0, crc32(stream.encode())]))


def coin_flips(observation: Observation, samples: int, count: int) -> Array:
    """Coalitions that show each of `count` parts with an even chance, (samples, count) uint8.

    They are the same for every method, and fewer are the first of more: methods asked together share their passes.
    """
    return np.asarray(random_of(observation, "coin flips").random((samples, count)) < 0.5, np.uint8)


def distinct(bits: Array) -> tuple[Array, Array]:
    """Equal rows of (n, segments) bits once, and for every row which of them it is."""
    packed = np.ascontiguousarray(np.packbits(bits, axis=1))
    _, first, inverse = np.unique(packed.view(f"V{packed.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return bits[first], inverse.ravel()


def painted(segments: Array, values: Array) -> Array:
    """Each segment's value on its pixels, (k, H, W) float32 from (k, segments)."""
    return host.accumulate_segments(segments, np.eye(values.shape[1], dtype=np.uint8), values)

"""The NumPy definition of every kernel: slow, obvious, the oracle of the others.

Resizing rules (`rule`), for output position i of n_out over n_in samples:
    half-pixel     source (i + 0.5) * n_in / n_out - 0.5, clamped to the first and last sample (ONNX, torch, OpenCV)
    align-corners  source i * (n_in - 1) / (n_out - 1)
    mirror         half-pixel, reflected about the centres of the border samples (scikit-image, as RISE uses it)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RULES = ("half-pixel", "align-corners", "mirror")


def source_position(i: int, n_in: int, n_out: int, rule: str) -> float:
    """Where output sample `i` lies among the input samples, 0 .. n_in - 1."""
    if rule == "align-corners":
        return i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    position = (i + 0.5) * n_in / n_out - 0.5
    if rule == "mirror":
        position = abs(position)
        if position > n_in - 1:
            position = 2 * (n_in - 1) - position
    return min(max(position, 0.0), n_in - 1.0)


def upsample(maps: Array, size: tuple[int, int], rule: str = "half-pixel") -> Array:
    """Bilinear resize of (n, h, w) maps to (n, H, W), in float64."""
    n, h, w = maps.shape
    maps = maps.astype(np.float64)
    out = np.zeros((n, *size))
    for y in range(size[0]):
        for x in range(size[1]):
            v, u = source_position(y, h, size[0], rule), source_position(x, w, size[1], rule)
            i, j = min(int(v), max(h - 2, 0)), min(int(u), max(w - 2, 0))
            below, right = min(i + 1, h - 1), min(j + 1, w - 1)
            dv, du = v - i, u - j
            out[:, y, x] = (
                maps[:, i, j] * (1 - dv) * (1 - du)
                + maps[:, i, right] * (1 - dv) * du
                + maps[:, below, j] * dv * (1 - du)
                + maps[:, below, right] * dv * du
            )
    return out


def extrema(maps: Array, size: tuple[int, int], rule: str = "half-pixel") -> tuple[Array, Array]:
    """Least and greatest value (n,) of every upsampled map."""
    full = upsample(maps, size, rule)
    return full.min(axis=(1, 2)), full.max(axis=(1, 2))


def grid_masks(bits: Array, offsets: Array, size: tuple[int, int]) -> Array:
    """RISE masks (n, H, W): grids (n, s, s) of 0/1 resized to (s + 1) cells, cut at an offset (n, 2) within a cell.

    Source: Petsiuk et al. 2018, section 3.2 and the authors' code (mirror resize, offset below one cell).
    """
    s = bits.shape[1]
    cell_y, cell_x = math.ceil(size[0] / s), math.ceil(size[1] / s)
    full = upsample(bits, ((s + 1) * cell_y, (s + 1) * cell_x), "mirror")
    cut = [mask[y : y + size[0], x : x + size[1]] for mask, (y, x) in zip(full, offsets, strict=True)]
    return np.array(cut).reshape(len(bits), *size)


def segment_masks(segments: Array, bits: Array) -> Array:
    """Masks (n, H, W): 1 where the segment (H, W) of a pixel is one that the row's bits (n, segments) keep."""
    out = np.zeros((len(bits), *segments.shape))
    for n, row in enumerate(bits):
        for segment, kept in enumerate(row):
            out[n][segments == segment] = kept
    return out


def window_masks(boxes: Array, size: tuple[int, int]) -> Array:
    """Masks (n, H, W): 0 in the row's rectangle (top, left, bottom, right), 1 outside."""
    out = np.ones((len(boxes), *size))
    for n, (top, left, bottom, right) in enumerate(boxes):
        out[n, top:bottom, left:right] = 0
    return out


def segment_means(image: Array, segments: Array) -> Array:
    """A (c, H, W) image, each channel averaged over each segment (H, W)."""
    out = np.zeros(image.shape)
    for segment in np.unique(segments):
        inside = segments == segment
        for channel, values in enumerate(image.astype(np.float64)):
            out[channel][inside] = values[inside].mean()
    return out.astype(np.float32)


def rank_masks(ranks: Array, thresholds: Array) -> Array:
    """Masks (n, H, W) that are 1 where rank >= threshold, for `ranks` (H, W) and `thresholds` (n,).

    With rank 0 for what counts most, threshold t takes the t first pixels away: deletion. The complement, which keeps
    only them, is the mask of the ranks H * W - 1 - rank at H * W - t: insertion.
    """
    return np.array([[[float(rank >= t) for rank in line] for line in ranks] for t in thresholds])


def blend(image: Array, masks: Array, baseline: Array | None = None, layout: str = "NCHW") -> Array:
    """`x * m + b * (1 - m)`: one image under (n, H, W) masks, as (n, *image.shape) in the image's dtype.

    Args:
        image: (c, H, W) or, for layout NHWC, (H, W, c).
        baseline: what stands for absence, broadcast to the image; None is zero.
    """
    out = np.zeros((len(masks), *image.shape))
    below = np.zeros_like(image) if baseline is None else np.broadcast_to(baseline, image.shape)
    for n, mask in enumerate(masks):
        m = mask[None] if layout == "NCHW" else mask[:, :, None]
        out[n] = image.astype(np.float64) * m + below.astype(np.float64) * (1.0 - m)
    if image.dtype == np.uint8:
        out = np.clip(np.rint(out), 0, 255)
    return out.astype(image.dtype)


def blur(image: Array, kernel_size: int, sigma: float) -> Array:
    """Gaussian blur of a (c, H, W) image, kernel of odd `kernel_size`, borders reflected about the edge samples.

    The convention is kornia's `gaussian_blur2d`, which CF-CAM and Group-CAM use as baseline.
    """
    half = kernel_size // 2
    taps = [math.exp(-(d * d) / (2 * sigma * sigma)) for d in range(-half, half + 1)]
    taps = [tap / sum(taps) for tap in taps]
    _, h, w = image.shape
    out = np.zeros(image.shape)
    for axis_size, axis in ((h, 1), (w, 2)):
        source = image.astype(np.float64) if axis == 1 else out.copy()
        result = np.zeros(image.shape)
        for i in range(axis_size):
            for d, tap in zip(range(-half, half + 1), taps, strict=True):
                j = reflect(i + d, axis_size)
                result[(slice(None),) * axis + (i,)] += tap * source[(slice(None),) * axis + (j,)]
        out = result
    return out.astype(image.dtype)


def rise_taps() -> Array:
    """The 11 taps of `rise_blur` along one axis; they sum to 1.

    The authors' `gkern(11, 5)` filters an 11 x 11 dirac by SciPy's Gaussian of sigma 5, cut at 4 sigma, which mirrors
    at the edges: what leaves on one side comes back on the other, and little of a Gaussian is left.
    """
    bell = [math.exp(-(d * d) / 50) for d in range(-20, 21)]
    taps = np.zeros(11)
    for i in range(11):
        taps[i] = sum(bell[d + 20] for d in range(-20, 21) if (i + d - 5) % 11 == 0)
    return np.asarray(taps / taps.sum())


def rise_blur(image: Array) -> Array:
    """A (c, H, W) image under `rise_taps` along both axes, zeros outside of it.

    Source: Petsiuk et al. 2018, the authors' evaluation (start of insertion).
    """
    taps = rise_taps()
    c, h, w = image.shape
    padded = np.zeros((c, h + 10, w + 10))
    padded[:, 5 : 5 + h, 5 : 5 + w] = image
    out = np.zeros(image.shape)
    for dy in range(11):
        for dx in range(11):
            out += taps[dy] * taps[dx] * padded[:, dy : dy + h, dx : dx + w]
    return out.astype(image.dtype)


def impute(image: Array, masks: Array, noise: Array, layout: str = "NCHW") -> Array:
    """One image under (n, H, W) masks of 0 and 1, what they hide interpolated from what they leave.

    Every hidden pixel is the mean of its eight neighbours, 1/6 the direct and 1/12 the diagonal ones (of those inside
    the image, scaled to a sum of 1), plus 0.01 of `noise` (n, *image.shape), in pixels for uint8. Where nothing is left
    it is zero.

    Source: Rong et al., ROAD, ICML 2022, noisy linear imputation.
    """
    planes = (image if layout == "NCHW" else image.transpose(2, 0, 1)).astype(np.float64)
    _, h, w = planes.shape
    steps = [(y, x, 1 / 12 if y and x else 1 / 6) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    out = np.zeros((len(masks), *image.shape))
    for n, mask in enumerate(masks):
        hidden = {place: i for i, place in enumerate(zip(*np.nonzero(mask == 0), strict=True))}
        system, right = np.eye(len(hidden)), np.zeros((len(hidden), len(planes)))
        for (y, x), i in hidden.items():
            near = [(y + dy, x + dx, weight) for dy, dx, weight in steps if 0 <= y + dy < h and 0 <= x + dx < w]
            total = sum(weight for _, _, weight in near)
            for v, u, weight in near:
                if (v, u) in hidden:
                    system[i, hidden[v, u]] -= weight / total
                else:
                    right[i] += weight / total * planes[:, v, u]
        filled = planes.copy()
        solved = np.linalg.solve(system, right) if len(hidden) < h * w else right
        for (y, x), i in hidden.items():
            filled[:, y, x] = solved[i]
        unit = 255 if image.dtype == np.uint8 else 1
        shift = 0.01 * unit * (noise[n] if layout == "NCHW" else noise[n].transpose(2, 0, 1))
        filled += np.where(mask == 0, shift, 0)
        out[n] = filled if layout == "NCHW" else filled.transpose(1, 2, 0)
    if image.dtype == np.uint8:
        out = np.clip(np.rint(out), 0, 255)
    return out.astype(image.dtype)


def reflect(i: int, n: int) -> int:
    """Index `i` folded into 0 .. n - 1 by reflection about the end samples."""
    if n == 1:
        return 0
    i = abs(i) % (2 * (n - 1))
    return min(i, 2 * (n - 1) - i)


def posteriors(raw: Array, kind: str) -> Array:
    """Raw network scores (n, classes) as posteriors, in float32.

    Args:
        kind: "softmax" and "sigmoid" turn logits into posteriors; "none" leaves the raw scores.
    """
    out = np.zeros(raw.shape, dtype=np.float32)
    for n, row in enumerate(raw.astype(np.float64)):
        if kind == "softmax":
            top = max(row)
            total = math.fsum(math.exp(value - top) for value in row)
            row = np.array([math.exp(value - top) / total for value in row])
        elif kind == "sigmoid":
            row = np.array([1 / (1 + math.exp(-value)) if value > -700 else 0.0 for value in row])
        out[n] = row
    return out


def class_scores(raw: Array, targets: Array, kind: str) -> Array:
    """Posteriors (n, k) of the classes `targets`, (k,) for all rows or (n, k) for each; see `posteriors`."""
    targets = np.broadcast_to(targets, (len(raw), targets.shape[-1]))
    return np.array([row[wanted] for row, wanted in zip(posteriors(raw, kind), targets, strict=True)])


def nonfinite(raw: Array) -> Array:
    """How many of each row's scores (n, classes) are NaN or infinite, (n,) int32."""
    return np.array([sum(not math.isfinite(value) for value in row) for row in raw], dtype=np.int32)


def normalise(pixels: Array, mean: Array, std: Array, layout: str = "NCHW", dtype: npt.DTypeLike = np.float32) -> Array:
    """The network's input for decoded uint8 (h, w, c) pixels: (pixels / 255 - mean) / std; uint8 keeps the pixels.

    Args:
        mean: (c,), in the order of the pixels' channels, as `std`.
        layout: NCHW gives (c, h, w), NHWC (h, w, c).
    """
    scaled = pixels if dtype == np.uint8 else (pixels / 255.0 - np.asarray(mean)) / np.asarray(std)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1) if layout == "NCHW" else scaled).astype(dtype)


def accumulate_maps(maps: Array, weights: Array) -> Array:
    """Weighted sums (k, h, w) of maps (n, h, w) under weights (k, n)."""
    out = np.zeros((len(weights), *maps.shape[1:]))
    for k, row in enumerate(weights):
        for n, weight in enumerate(row):
            out[k] += float(weight) * maps[n].astype(np.float64)
    return out.astype(np.float32)


def accumulate_grid(bits: Array, offsets: Array, weights: Array, size: tuple[int, int]) -> Array:
    """Weighted sums (k, H, W) of RISE masks under weights (k, n)."""
    return accumulate_maps(grid_masks(bits, offsets, size), weights)


def accumulate_segments(segments: Array, bits: Array, weights: Array) -> Array:
    """Weighted sums (k, H, W) of superpixel masks under weights (k, n)."""
    return accumulate_maps(segment_masks(segments, bits), weights)


def accumulate_windows(boxes: Array, weights: Array, size: tuple[int, int]) -> Array:
    """Sums (k, H, W) of the weights (k, n) of the rectangles that a pixel lies in."""
    return accumulate_maps(1 - window_masks(boxes, size), weights)

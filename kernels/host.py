"""The fast CPU twin of `reference`: every resize, crop and blur is a small matrix, so BLAS does the work."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference import reflect, rise_taps, source_position

Array = npt.NDArray[Any]

CACHE_BYTES = 1 << 20  # masked images are made in pieces that stay in a core's cache
IMPUTE_TOLERANCE = 1e-3
IMPUTE_ROUNDS = 100
COARSEST = 4  # pixels of a side below which the multigrid cycle solves by sweeps alone


@lru_cache(maxsize=64)
def resize_matrix(n_in: int, n_out: int, rule: str) -> Array:
    """Bilinear resize along one axis as a (n_out, n_in) float64 matrix; its rows sum to 1."""
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        position = source_position(i, n_in, n_out, rule)
        first = min(int(position), max(n_in - 2, 0))
        matrix[i, first] += 1 - (position - first)
        matrix[i, min(first + 1, n_in - 1)] += position - first
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=64)
def _resize_matrix32(n_in: int, n_out: int, rule: str) -> Array:
    return resize_matrix(n_in, n_out, rule).astype(np.float32)


@lru_cache(maxsize=64)
def corners(n_in: int, n_out: int, rule: str) -> Array:
    """The output positions where a bilinear surface can have its extremes: next to the source samples.

    Between two samples the surface is linear along each axis, so its extremes over the rows that fall there are at the
    first and last of them.
    """
    positions = np.array([source_position(i, n_in, n_out, rule) for i in range(n_out)])
    cells = np.minimum(positions.astype(int), max(n_in - 2, 0))
    order = np.lexsort((positions, cells))
    edge = np.diff(cells[order], prepend=-1, append=n_in) != 0
    return np.unique(np.concatenate([order[edge[:-1]], order[edge[1:]]]))


@lru_cache(maxsize=64)
def _corner_rows(n_in: int, n_out: int, rule: str) -> Array:
    return np.asarray(resize_matrix(n_in, n_out, rule)[corners(n_in, n_out, rule)])


def upsample(maps: Array, size: tuple[int, int], rule: str = "half-pixel", out: Array | None = None) -> Array:
    """Bilinear resize of (n, h, w) maps to (n, H, W) float32; see `reference.upsample`."""
    n, h, w = maps.shape
    rows, columns = _resize_matrix32(h, size[0], rule), _resize_matrix32(w, size[1], rule)
    wide = maps.reshape(n * h, w).astype(np.float32, copy=False) @ columns.T
    return np.matmul(rows, wide.reshape(n, h, size[1]), out=out)


def extrema(maps: Array, size: tuple[int, int], rule: str = "half-pixel") -> tuple[Array, Array]:
    """Least and greatest value (n,) float64 of every upsampled map, without upsampling; see `reference.extrema`."""
    n, h, w = maps.shape
    rows, columns = _corner_rows(h, size[0], rule), _corner_rows(w, size[1], rule)
    wide = maps.reshape(n * h, w).astype(np.float64) @ columns.T
    corners = np.matmul(rows, wide.reshape(n, h, len(columns)))
    return corners.min(axis=(1, 2)), corners.max(axis=(1, 2))


@lru_cache(maxsize=8)
def _shifted_rows(s: int, n: int) -> Array:
    """RISE's resize along one axis at every offset: (cell, n, s) float32."""
    cell = math.ceil(n / s)
    matrix = resize_matrix(s, (s + 1) * cell, "mirror").astype(np.float32)
    return np.ascontiguousarray(np.stack([matrix[offset : offset + n] for offset in range(cell)]))


def grid_masks(bits: Array, offsets: Array, size: tuple[int, int], out: Array | None = None) -> Array:
    """RISE masks (n, H, W) float32; see `reference.grid_masks`."""
    s = bits.shape[1]
    rows, columns = _shifted_rows(s, size[0])[offsets[:, 0]], _shifted_rows(s, size[1])[offsets[:, 1]]
    wide = np.matmul(bits.astype(np.float32), columns.transpose(0, 2, 1))
    return np.matmul(rows, wide, out=out)


def segment_masks(segments: Array, bits: Array, out: Array | None = None) -> Array:
    """Superpixel masks (n, H, W) float32; see `reference.segment_masks`."""
    return np.take(bits.astype(np.float32), segments, axis=1, out=out, mode="clip")


def window_masks(boxes: Array, size: tuple[int, int], out: Array | None = None) -> Array:
    """Masks (n, H, W) float32 with a rectangle hidden; see `reference.window_masks`."""
    masks = np.empty((len(boxes), *size), np.float32) if out is None else out
    masks[:] = 1
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 0
    return masks


def segment_means(image: Array, segments: Array) -> Array:
    """A (c, H, W) image averaged over each segment, float32; see `reference.segment_means`."""
    places = segments.ravel()
    pixels = np.maximum(np.bincount(places), 1)
    means = [np.bincount(places, channel.ravel().astype(np.float64)) / pixels for channel in image]
    return np.stack(means)[:, segments].astype(np.float32)


def rank_masks(ranks: Array, thresholds: Array, out: Array | None = None) -> Array:
    """Masks (n, H, W) float32 of the ranks from a threshold on; see `reference.rank_masks`."""
    masks = np.empty((len(thresholds), *ranks.shape), np.float32) if out is None else out
    return np.greater_equal(ranks, thresholds[:, None, None], out=masks, casting="unsafe")


def blend(
    image: Array, masks: Array, baseline: Array | None = None, layout: str = "NCHW", out: Array | None = None
) -> Array:
    """One image under (n, H, W) masks, written to `out` (n, *image.shape); see `reference.blend`."""
    if out is None:
        out = np.empty((len(masks), *image.shape), dtype=image.dtype)
    masks = masks[:, None] if layout == "NCHW" else masks[..., None]
    image32 = image.astype(np.float32, copy=False)
    below = None if baseline is None else np.asarray(baseline, dtype=np.float32)
    above = image32 if below is None else image32 - below
    step = max(1, CACHE_BYTES // (4 * image.size))
    direct = out.dtype == np.float32
    for start in range(0, len(masks), step):
        part = out[start : start + step]
        target = part if direct else np.empty(part.shape, dtype=np.float32)
        np.multiply(above, masks[start : start + step], out=target)
        if below is not None:
            target += below
        if not direct:
            if out.dtype == np.uint8:
                np.clip(np.rint(target, out=target), 0, 255, out=target)
            part[...] = target
    return out


def gaussian(kernel_size: int, sigma: float) -> Array:
    """The taps (kernel_size,) float64 of a Gaussian; they sum to 1."""
    half = kernel_size // 2
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma * sigma))
    return np.asarray(taps / taps.sum())


@lru_cache(maxsize=8)
def _blur_matrix(n: int, kernel_size: int, sigma: float) -> Array:
    taps = gaussian(kernel_size, sigma)
    matrix = np.zeros((n, n))
    for i in range(n):
        for d, tap in enumerate(taps, -(kernel_size // 2)):
            matrix[i, reflect(i + d, n)] += tap
    return matrix.astype(np.float32)


def blur(image: Array, kernel_size: int, sigma: float) -> Array:
    """Gaussian blur of a (c, H, W) image with reflected borders; see `reference.blur`."""
    _, h, w = image.shape
    rows, columns = _blur_matrix(h, kernel_size, sigma), _blur_matrix(w, kernel_size, sigma)
    return np.asarray(rows @ (image.astype(np.float32) @ columns.T), dtype=image.dtype)


@lru_cache(maxsize=8)
def _rise_matrix(n: int) -> Array:
    matrix = np.zeros((n, n), dtype=np.float32)
    for d, tap in enumerate(rise_taps(), -5):
        matrix += np.diag(np.full(max(n - abs(d), 0), tap, dtype=np.float32), d) if abs(d) < n else 0
    return matrix


def rise_blur(image: Array) -> Array:
    """The blur of RISE's evaluation of a (c, H, W) image; see `reference.rise_blur`."""
    _, h, w = image.shape
    return np.asarray(_rise_matrix(h) @ (image.astype(np.float32) @ _rise_matrix(w)), dtype=image.dtype)


def impute(image: Array, masks: Array, noise: Array, layout: str = "NCHW", out: Array | None = None) -> Array:
    """One image, what (n, H, W) masks hide interpolated, written to `out`; see `reference.impute`.

    The system is solved to about IMPUTE_TOLERANCE of the image's greatest value, well below its noise.
    """
    if out is None:
        out = np.empty((len(masks), *image.shape), dtype=image.dtype)
    last = layout != "NCHW"
    planes = np.ascontiguousarray(image.transpose(2, 0, 1) if last else image, dtype=np.float32)
    unit = 0.01 * (255 if image.dtype == np.uint8 else 1)
    for mask, shift, place in zip(masks, noise, out, strict=True):
        hidden = mask < 0.5
        filled = _interpolated(planes, ~hidden)
        filled += np.float32(unit) * hidden * (shift.transpose(2, 0, 1) if last else shift)
        if image.dtype == np.uint8:
            np.clip(np.rint(filled, out=filled), 0, 255, out=filled)
        place[...] = filled.transpose(1, 2, 0) if last else filled
    return out


def _interpolated(planes: Array, known: Array) -> Array:
    """Planes (c, h, w) whose unknown pixels are the mean of their neighbours.

    Conjugate gradients, preconditioned by one multigrid cycle: what it makes of the residual is nearly the error.
    """
    if known.all() or not known.any():
        return np.where(known, planes, np.float32(0))
    levels = _levels(known)
    free, total = levels[0]
    x = _filled(planes, known)
    left = free * (_neighbours(x) - total * x)
    limit = IMPUTE_TOLERANCE * max(float(np.abs(planes).max()), 1e-12)
    direction, before = np.zeros_like(x), np.zeros(len(x), np.float32)
    for _ in range(IMPUTE_ROUNDS):
        error = _cycle(left, levels)
        fit = np.einsum("chw,chw->c", left, error)
        direction *= _ratio(fit, before)
        direction += error
        turned = free * (total * direction - _neighbours(direction))
        step = _ratio(fit, np.einsum("chw,chw->c", direction, turned))
        x += step * direction
        if float(np.abs(error).max()) <= limit:
            break
        left -= step * turned
        before = fit
    return x


def _ratio(above: Array, below: Array) -> Array:
    """above / below as (c, 1, 1), 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)[:, None, None]


def _halved(planes: Array, shape: tuple[int, int]) -> Array:
    """Sums of 2 x 2 pixels of planes (c, h, w); beyond the edge is nothing."""
    h, w = planes.shape[1:]
    padded = np.pad(planes, ((0, 0), (0, 2 * shape[0] - h), (0, 2 * shape[1] - w)))
    return np.asarray(padded.reshape(len(planes), shape[0], 2, shape[1], 2).sum(axis=(2, 4)))


def _half(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // 2), -(-shape[1] // 2)


def _doubled(planes: Array, shape: tuple[int, int]) -> Array:
    """Bilinear resize of planes (c, h, w) to twice the size, cut to `shape`; no BLAS, whose threads would contend with
    a runtime's between its calls."""
    wide = _stretched(planes.swapaxes(1, 2))[:, : shape[1]].swapaxes(1, 2)
    return _stretched(wide)[:, : shape[0]]


def _stretched(planes: Array) -> Array:
    """Planes (c, h, w) at twice the height."""
    out = np.empty((planes.shape[0], 2 * planes.shape[1], planes.shape[2]), np.float32)
    near, far = np.float32(0.75) * planes, np.float32(0.25) * planes
    out[:, 0::2] = near
    out[:, 1::2] = near
    out[:, 2::2] += far[:, :-1]
    out[:, 1:-1:2] += far[:, 1:]
    out[:, 0] += far[:, 0]
    out[:, -1] += far[:, -1]
    return out


def _gathered(planes: Array, half: tuple[int, int]) -> Array:
    """The transpose of `_doubled`, from planes (c, h, w)."""
    short = _squeezed(planes, half[0])
    return _squeezed(short.swapaxes(1, 2), half[1]).swapaxes(1, 2)


def _squeezed(planes: Array, height: int) -> Array:
    """The transpose of `_stretched`, to a height of which twice is at most one more than the planes'."""
    even, odd = planes[:, 0::2], planes[:, 1::2]
    out = np.float32(0.75) * even
    out[:, : odd.shape[1]] += np.float32(0.75) * odd
    quarter = np.float32(0.25) * odd
    out[:, :-1] += np.float32(0.25) * even[:, 1:]
    out[:, 1:] += quarter[:, : height - 1]
    out[:, 0] += np.float32(0.25) * even[:, 0]
    if odd.shape[1] == height:
        out[:, -1] += quarter[:, -1]
    return out


def _filled(planes: Array, known: Array) -> Array:
    """Planes whose unknown pixels are filled from coarser means of the known ones: a start for the solver."""
    if known.all() or known.shape == (1, 1):
        return planes
    half = _half(known.shape)
    share = _halved(known[None].astype(np.float32), half)
    means = _halved(np.where(known, planes, np.float32(0)), half) / np.maximum(share, 1)
    return np.where(known, planes, _doubled(_filled(means, share[0] > 0), known.shape))


def _levels(known: Array) -> list[tuple[Array, Array]]:
    """From fine to coarse which pixels are free, and the sum of each one's weights; a pixel whose finer ones are not
    all free is not."""
    free, levels = (~known).astype(np.float32), []
    while True:
        levels.append((free, _neighbours(np.ones((1, *free.shape), np.float32))[0]))
        if min(free.shape) <= COARSEST:
            return levels
        half = _half(free.shape)
        whole = _halved(np.ones((1, *free.shape), np.float32), half)
        free = (_halved(free[None], half)[0] == whole[0]).astype(np.float32)
        if not free.any():
            return levels


def _cycle(left: Array, levels: list[tuple[Array, Array]]) -> Array:
    """Nearly the error behind a residual: Jacobi's step, the coarser level's correction, Jacobi's step."""
    free, total = levels[0]
    error = left / total
    if len(levels) > 1:
        rest = left - free * (total * error - _neighbours(error))
        coarse = levels[1][0] * _gathered(rest, _half(free.shape))
        error += free * _doubled(_cycle(coarse, levels[1:]), free.shape)
    elif min(free.shape) <= COARSEST:
        for _ in range(2 * max(free.shape)):
            error += free * (left - total * error + _neighbours(error)) / total
    error += free * (left - total * error + _neighbours(error)) / total
    return error


def _neighbours(x: Array) -> Array:
    """Sums of the eight neighbours, 1/6 the direct and 1/12 the diagonal ones, of planes (c, h, w)."""
    tall = 2 * x
    tall[:, 1:] += x[:, :-1]
    tall[:, :-1] += x[:, 1:]
    wide = 2 * tall
    wide[:, :, 1:] += tall[:, :, :-1]
    wide[:, :, :-1] += tall[:, :, 1:]
    wide -= 4 * x
    wide *= np.float32(1 / 12)
    return wide


def posteriors(raw: Array, kind: str) -> Array:
    """Posteriors (n, classes) float32 of raw scores; see `reference.posteriors`."""
    raw = raw.astype(np.float32, copy=False)
    if kind == "softmax":
        powers = np.exp(raw - raw.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    return _sigmoid(raw) if kind == "sigmoid" else raw


def class_scores(raw: Array, targets: Array, kind: str) -> Array:
    """Scores (n, k) float32 of the asked classes; see `reference.class_scores`."""
    raw = raw.astype(np.float32, copy=False)
    picked = np.take_along_axis(raw, np.broadcast_to(targets, (len(raw), targets.shape[-1])), axis=1)
    if kind == "softmax":
        top = raw.max(axis=1, keepdims=True)
        total = np.exp(raw - top).sum(axis=1, keepdims=True)
        return np.asarray(np.exp(picked - top) / total, dtype=np.float32)
    return _sigmoid(picked) if kind == "sigmoid" else picked


def _sigmoid(logits: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), dtype=np.float32)


def nonfinite(raw: Array) -> Array:
    """How many of each row's scores are not finite, (n,) int32; see `reference.nonfinite`."""
    return np.asarray(np.count_nonzero(~np.isfinite(raw), axis=1), dtype=np.int32)


def accumulate_maps(maps: Array, weights: Array) -> Array:
    """Weighted sums (k, h, w) float32 of maps (n, h, w); see `reference.accumulate_maps`."""
    total = weights.astype(np.float64) @ maps.reshape(len(maps), -1).astype(np.float64)
    return total.reshape(len(weights), *maps.shape[1:]).astype(np.float32)


def accumulate_grid(bits: Array, offsets: Array, weights: Array, size: tuple[int, int]) -> Array:
    """Weighted sums (k, H, W) float32 of RISE masks; see `reference.accumulate_grid`.

    Masks with equal offsets are summed as grids of s x s bits first, so no mask is made: the sum over all offsets is
    then one product with the shifted resize matrices from both sides.
    """
    s = bits.shape[1]
    rows, columns = _shifted_rows(s, size[0]), _shifted_rows(s, size[1])
    cell_y, cell_x = len(rows), len(columns)
    place = offsets[:, 0] * cell_x + offsets[:, 1]
    flat = bits.reshape(len(bits), s * s).astype(np.float64)
    left = rows.transpose(1, 0, 2).reshape(size[0], cell_y * s).astype(np.float64)
    right = columns.transpose(1, 0, 2).reshape(size[1], cell_x * s).astype(np.float64)
    out = np.empty((len(weights), *size), dtype=np.float32)
    for k, row in enumerate(weights):
        sums = np.zeros((cell_y * cell_x, s * s))
        np.add.at(sums, place, flat * row[:, None].astype(np.float64))
        grid = sums.reshape(cell_y, cell_x, s, s).transpose(0, 2, 1, 3).reshape(cell_y * s, cell_x * s)
        out[k] = left @ grid @ right.T
    return out


def accumulate_segments(segments: Array, bits: Array, weights: Array) -> Array:
    """Weighted sums (k, H, W) float32 of superpixel masks; see `reference.accumulate_segments`."""
    sums = weights.astype(np.float64) @ bits.astype(np.float64)
    return sums[:, segments].astype(np.float32)


def accumulate_windows(boxes: Array, weights: Array, size: tuple[int, int]) -> Array:
    """Sums (k, H, W) float32 of rectangles' weights; see `reference.accumulate_windows`.

    Each rectangle is four corners, and the running sums along both axes fill it.
    """
    corners = np.zeros((len(weights), size[0] + 1, size[1] + 1))
    top, left, bottom, right = boxes.T
    for plane, row in zip(corners, weights.astype(np.float64), strict=True):
        for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(plane, (y, x), sign * row)
    return corners.cumsum(axis=1).cumsum(axis=2)[:, :-1, :-1].astype(np.float32)

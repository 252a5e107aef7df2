"""host.py against reference.py, and reference.py against what it claims to define."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from heatmill.kernels import host, reference

SIDES = st.integers(1, 13)
SIZES = st.tuples(st.integers(1, 31), st.integers(1, 31))


def maps_of(seed: int, n: int, h: int, w: int, kind: str = "normal") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "constant":
        return np.broadcast_to(rng.normal(size=(n, 1, 1)), (n, h, w)).astype(np.float32)
    maps = rng.normal(size=(n, h, w)).astype(np.float32)
    return np.maximum(maps, 0) if kind == "relu" else maps


def test_every_reference_kernel_has_a_host_twin_with_the_same_arguments():
    for name, kernel in inspect.getmembers(reference, inspect.isfunction):
        if name in ("reflect", "source_position", "normalise"):  # the last one's twin is models.preprocess.normalise
            continue
        twin = getattr(host, name)
        mine, its = list(inspect.signature(kernel).parameters), list(inspect.signature(twin).parameters)
        assert its[: len(mine)] == mine
        assert set(its[len(mine) :]) <= {"out"}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 4),
    h=SIDES,
    w=SIDES,
    size=SIZES,
    rule=st.sampled_from(reference.RULES),
    kind=st.sampled_from(["normal", "constant", "relu"]),
)
def test_upsample_and_extrema(seed, n, h, w, size, rule, kind):
    maps = maps_of(seed, n, h, w, kind)
    full = reference.upsample(maps, size, rule)
    np.testing.assert_allclose(host.upsample(maps, size, rule), full, atol=2e-6)
    low, high = host.extrema(maps, size, rule)
    np.testing.assert_allclose(low, full.min(axis=(1, 2)), atol=1e-12)
    np.testing.assert_allclose(high, full.max(axis=(1, 2)), atol=1e-12)


def test_half_pixel_is_pillows_bilinear():
    small = maps_of(0, 1, 7, 5)[0]
    pillow = np.asarray(Image.fromarray(small, mode="F").resize((33, 50), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(reference.upsample(small[None], (50, 33))[0], pillow, atol=1e-5)


def test_align_corners_keeps_the_corner_samples():
    maps = maps_of(1, 2, 4, 3)
    full = reference.upsample(maps, (10, 9), "align-corners")
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_allclose(full[:, y, x], maps[:, y, x], atol=1e-12)


def test_mirror_differs_from_half_pixel_only_within_half_a_cell_of_the_border():
    bits = np.random.default_rng(3).integers(0, 2, (3, 7, 7)).astype(np.float32)
    mirror, clamp = (reference.upsample(bits, (56, 56), rule) for rule in ("mirror", "half-pixel"))
    assert np.abs(mirror - clamp)[:, 4:-4, 4:-4].max() == 0
    assert np.abs(mirror - clamp).max() > 0.2


def test_mirror_is_what_skimage_does():
    transform = pytest.importorskip("skimage.transform")
    bits = np.random.default_rng(3).integers(0, 2, (1, 7, 7)).astype(np.float64)
    theirs = transform.resize(bits[0], (256, 256), order=1, mode="reflect", anti_aliasing=False)
    np.testing.assert_allclose(reference.upsample(bits, (256, 256), "mirror")[0], theirs, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 5), s=st.integers(1, 8), size=SIZES, k=st.integers(1, 3))
def test_grid_masks_and_their_sums(seed, n, s, size, k):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (n, s, s)).astype(np.uint8)
    cells = [math.ceil(side / s) for side in size]
    offsets = np.stack([rng.integers(0, cell, n) for cell in cells], axis=1)
    masks = reference.grid_masks(bits, offsets, size)
    np.testing.assert_allclose(host.grid_masks(bits, offsets, size), masks, atol=1e-6)
    weights = rng.normal(size=(k, n)).astype(np.float32)
    np.testing.assert_allclose(
        host.accumulate_grid(bits, offsets, weights, size),
        reference.accumulate_grid(bits, offsets, weights, size),
        atol=1e-5,
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 5),
    c=st.sampled_from([1, 3]),
    size=SIZES,
    dtype=st.sampled_from(["float32", "float16", "uint8"]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    baseline=st.sampled_from(["none", "constant", "image"]),
)
def test_blend(seed, n, c, size, dtype, layout, baseline):
    rng = np.random.default_rng(seed)
    shape = (c, *size) if layout == "NCHW" else (*size, c)
    image = (rng.uniform(0, 255, shape)).astype(dtype) if dtype == "uint8" else rng.normal(size=shape).astype(dtype)
    below = {"none": None, "constant": np.array(3, dtype), "image": image[::-1].copy()}[baseline]
    masks = rng.uniform(0, 1, (n, *size)).astype(np.float32)
    ours = host.blend(image, masks, below, layout)
    theirs = reference.blend(image, masks, below, layout)
    assert ours.dtype == theirs.dtype == image.dtype
    tolerance = {"float32": 1e-5, "float16": 4e-3, "uint8": 1}[dtype]
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=tolerance)


def test_blend_writes_into_strided_places():
    image = np.random.default_rng(0).normal(size=(3, 9, 7)).astype(np.float32)
    masks = np.random.default_rng(1).uniform(size=(4, 9, 7)).astype(np.float32)
    batch = np.full((9, 3, 9, 7), np.nan, np.float32)
    host.blend(image, masks, out=batch[1:9:2])
    np.testing.assert_allclose(batch[1:9:2], image * masks[:, None], atol=1e-6)
    assert np.isnan(batch[::2]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9), c=st.sampled_from([1, 3]), size=SIZES, half=st.integers(0, 9), sigma=st.floats(0.3, 50))
def test_blur(seed, c, size, half, sigma):
    image = np.random.default_rng(seed).normal(size=(c, *size)).astype(np.float32)
    ours, theirs = host.blur(image, 2 * half + 1, sigma), reference.blur(image, 2 * half + 1, sigma)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_blur_is_a_reflected_convolution():
    image = np.random.default_rng(0).normal(size=(1, 20, 20))
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 2.0**2))
    taps /= taps.sum()
    padded = np.pad(image[0], 3, mode="reflect")
    rows = np.apply_along_axis(lambda line: np.convolve(line, taps, "valid"), 1, padded)
    both = np.apply_along_axis(lambda line: np.convolve(line, taps, "valid"), 0, rows)
    np.testing.assert_allclose(reference.blur(image, 7, 2.0)[0], both, atol=1e-12)


def test_blur_keeps_a_constant_image():
    image = np.full((3, 8, 11), 0.7, np.float32)
    np.testing.assert_allclose(host.blur(image, 51, 50.0), image, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 4),
    classes=st.integers(1, 9),
    kind=st.sampled_from(["softmax", "sigmoid", "none"]),
    scale=st.sampled_from([1.0, 100.0, 1e4]),
)
def test_class_scores(seed, n, classes, kind, scale):
    rng = np.random.default_rng(seed)
    raw = (rng.normal(size=(n, classes)) * scale).astype(np.float32)
    targets = rng.integers(0, classes, 3)
    ours, theirs = host.class_scores(raw, targets, kind), reference.class_scores(raw, targets, kind)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7 * (1 if kind != "none" else 0))


def test_half_precision_scores_are_normalised_in_float32():
    raw = np.linspace(-30, 30, 1000, dtype=np.float16)[None]
    every = np.arange(1000)
    assert abs(host.class_scores(raw, every, "softmax").sum() - 1) < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 40), h=SIDES, w=SIDES, k=st.integers(1, 4))
def test_accumulate_maps(seed, n, h, w, k):
    maps = maps_of(seed, n, h, w)
    weights = np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)
    np.testing.assert_allclose(
        host.accumulate_maps(maps, weights), reference.accumulate_maps(maps, weights), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 5), count=st.integers(1, 9), size=SIZES, k=st.integers(1, 3))
def test_segment_masks_their_sums_and_means(seed, n, count, size, k):
    rng = np.random.default_rng(seed)
    segments = rng.integers(0, count, size).astype(np.int32)
    bits = rng.integers(0, 2, (n, count)).astype(np.uint8)
    masks = reference.segment_masks(segments, bits)
    np.testing.assert_array_equal(host.segment_masks(segments, bits), masks)
    weights = rng.normal(size=(k, n)).astype(np.float32)
    sums = host.accumulate_segments(segments, bits, weights)
    np.testing.assert_allclose(sums, reference.accumulate_segments(segments, bits, weights), atol=1e-5)
    image = rng.normal(size=(3, *size)).astype(np.float32)
    means = host.segment_means(image, segments)
    np.testing.assert_allclose(means, reference.segment_means(image, segments), atol=1e-5)
    np.testing.assert_allclose(means.sum(axis=(1, 2)), image.sum(axis=(1, 2)), atol=1e-2)


def test_a_segment_mask_keeps_the_pixels_of_the_kept_segments():
    segments = np.array([[0, 0, 2], [1, 1, 2]], np.int32)
    bits = np.array([[1, 0, 1], [0, 0, 0]], np.uint8)
    masks = reference.segment_masks(segments, bits)
    np.testing.assert_array_equal(masks, [[[1, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 6), size=SIZES, k=st.integers(1, 3))
def test_window_masks_and_their_sums(seed, n, size, k):
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.integers(0, np.array(size)[:, None] + 1, (n, 2, 2)), axis=2)
    boxes = np.concatenate([edges[:, :, 0], edges[:, :, 1]], axis=1).astype(np.int32)
    np.testing.assert_array_equal(host.window_masks(boxes, size), reference.window_masks(boxes, size))
    weights = rng.normal(size=(k, n)).astype(np.float32)
    sums = host.accumulate_windows(boxes, weights, size)
    np.testing.assert_allclose(sums, reference.accumulate_windows(boxes, weights, size), atol=1e-5)


def test_a_window_hides_what_lies_in_its_box():
    mask = reference.window_masks(np.array([[1, 0, 2, 2]]), (3, 3))[0]
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1], [1, 1, 1]])

"""The CUDA kernels against reference.py: on the emulator always, on a device through each driver where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import pytest

from heatmill import BackendError
from heatmill.kernels import cuda, masks, reference
from heatmill.kernels.binaries import SOURCES
from heatmill.kernels.cuda import KERNELS, TYPES, Kernels
from heatmill.kernels.device import DeviceArray, Driver, OutOfMemory
from heatmill.kernels.drivers import DRIVERS, open_driver
from heatmill.models.preprocess import normalise
from heatmill.models.spec import ModelSpec
from tests.emulator import fake_cuda

# height and width of the maps, of the image, channels
SIZES = [
    ((1, 1), (5, 7), 3),
    ((3, 5), (32, 48), 3),
    ((7, 7), (57, 33), 1),
    ((4, 6), (3, 4), 5),
    ((1, 9), (16, 16), 3),
]
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in TYPES}
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2, "uint8": 1}


@dataclass
class Rig:
    driver: Driver
    kernels: Kernels
    stream: int

    def up(self, values) -> DeviceArray:
        return self.kernels.upload(np.asarray(values), stream=self.stream)

    def down(self, array: DeviceArray) -> np.ndarray:
        return self.kernels.download(array, stream=self.stream)


@pytest.fixture(params=["emulated", *DRIVERS])
def rig(request, monkeypatch, emulated_driver) -> Rig:
    """Through every driver: on its device where there is one, else with a stand-in for its package."""
    driver: Driver = emulated_driver
    if request.param != "emulated":
        try:
            driver = open_driver(request.param)
        except BackendError:
            driver = fake_cuda.install(monkeypatch, request.param, emulated_driver).open(0)
    return Rig(driver, Kernels(driver), driver.stream())


@pytest.fixture
def emulated(emulated_driver) -> Rig:
    return Rig(emulated_driver, Kernels(emulated_driver), emulated_driver.stream())


def full_masks(rig: Rig, source: str, rng, n: int, shape, size) -> tuple[masks.Masks, np.ndarray]:
    """A mask source on the device, and its masks as the reference makes them."""
    if source == "maps":
        maps = rng.uniform(0, 1, (n, *shape)).astype(np.float32)
        rule = str(rng.choice(reference.RULES))
        return masks.Maps(rig.up(maps), rule), reference.upsample(maps, size, rule)
    if source == "grids":
        s = shape[1]
        bits = rng.integers(0, 2, (n, s, s)).astype(np.uint8)
        offsets = np.stack([rng.integers(0, math.ceil(side / s), n) for side in size], 1).astype(np.int32)
        return masks.Grids(rig.up(bits), rig.up(offsets)), reference.grid_masks(bits, offsets, size)
    if source == "segments":
        ids = rng.integers(0, 6, size).astype(np.int32)
        bits = rng.integers(0, 2, (n, 6)).astype(np.uint8)
        return masks.Segments(rig.up(ids), rig.up(bits)), reference.segment_masks(ids, bits)
    if source == "ranks":
        ranks = rng.permutation(math.prod(size)).reshape(size).astype(np.int32)
        thresholds = rng.integers(0, math.prod(size) + 1, n).astype(np.int32)
        return masks.Ranks(rig.up(ranks), rig.up(thresholds)), reference.rank_masks(ranks, thresholds)
    if source == "windows":
        ends = [np.sort(rng.integers(-2, side + 3, (n, 2)), axis=1) for side in size]
        boxes = np.stack([ends[0][:, 0], ends[1][:, 0], ends[0][:, 1], ends[1][:, 1]], 1).astype(np.int32)
        return masks.Windows(rig.up(boxes)), reference.window_masks(boxes.clip(0), size)
    shares = rng.uniform(0, 1, n).astype(np.float32)
    return masks.Path(rig.up(shares)), np.broadcast_to(shares[:, None, None].astype(np.float64), (n, *size))


def blend_case(source: str, dtype: str, rig: Rig) -> None:
    rng = np.random.default_rng(len(source))
    for i, (shape, size, channels) in enumerate(SIZES):
        for layout, n in (("NCHW", 3), ("NHWC", 1)):
            chw = (channels, *size) if layout == "NCHW" else (*size, channels)
            image, below = (rng.uniform(-20, 275, chw).astype(np.float32) for _ in range(2))
            if dtype != "uint8":
                image, below = image / 100, below / 100
            constants = below.reshape(channels, -1)[:, 0].copy()
            kept = (None, constants, below)[i % 3]
            wide = kept if i % 3 != 1 else constants[:, None, None] if layout == "NCHW" else constants
            source_masks, full = full_masks(rig, source, rng, n, shape, size)
            out = rig.kernels.empty((n, *chw), DTYPES[dtype])
            place = None if kept is None else rig.up(kept)
            result = rig.kernels.blend(rig.up(image), source_masks, place, layout, out, stream=rig.stream)
            assert result is out
            expected = reference.blend(image.astype(np.float64), full, wide, layout)
            if dtype == "uint8":
                expected = np.clip(np.rint(expected), 0, 255)
            ours = rig.down(out).astype(np.float64)
            np.testing.assert_allclose(ours, expected, atol=TOLERANCE[dtype])
            if dtype == "uint8":
                assert np.count_nonzero(ours != expected) <= max(1, ours.size // 500)  # halves, rounded either way


def extrema_case(rig: Rig) -> None:
    rng = np.random.default_rng(0)
    for (shape, size, _), rule in zip(SIZES, [*reference.RULES, *reference.RULES], strict=False):
        maps = rng.normal(size=(3, *shape)).astype(np.float32)
        low, high = rig.kernels.extrema(rig.up(maps), size, rule, stream=rig.stream)
        expected = reference.extrema(maps, size, rule)
        np.testing.assert_allclose(rig.down(low), expected[0], atol=1e-6)
        np.testing.assert_allclose(rig.down(high), expected[1], atol=1e-6)


def blur_case(rig: Rig) -> None:
    rng = np.random.default_rng(0)
    for (_, size, channels), kernel_size in zip(SIZES, (1, 5, 11, 21, 3), strict=True):
        image = rng.normal(size=(channels, *size)).astype(np.float32)
        expected = reference.blur(image, kernel_size, 2.5)
        ours = rig.kernels.blur(rig.up(image), kernel_size, 2.5, stream=rig.stream)
        np.testing.assert_allclose(rig.down(ours), expected, atol=1e-5)
        last = np.ascontiguousarray(image.transpose(1, 2, 0))
        ours = rig.kernels.blur(rig.up(last), kernel_size, 2.5, "NHWC", stream=rig.stream)
        np.testing.assert_allclose(rig.down(ours), expected.transpose(1, 2, 0), atol=1e-5)


def scores_case(dtype: str, rig: Rig) -> None:
    rng = np.random.default_rng(0)
    for classes, k, scale in ((1, 1, 1), (5, 3, 100), (257, 2, 5), (1001, 4, 5)):
        raw = (rng.normal(size=(3, classes)) * scale).astype(DTYPES[dtype])
        targets = rng.integers(0, classes, (3, k)).astype(np.int32)
        for kind in ("softmax", "sigmoid", "none"):
            ours = rig.down(rig.kernels.class_scores(rig.up(raw), rig.up(targets), kind, stream=rig.stream))
            expected = reference.class_scores(raw, targets, kind)
            np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)
            every = rig.down(rig.kernels.posteriors(rig.up(raw), kind, stream=rig.stream))
            np.testing.assert_allclose(every, reference.posteriors(raw, kind), rtol=2e-5, atol=1e-7)
    strange = np.array([[classes, -1, 0]], np.int32)
    ours = rig.down(rig.kernels.class_scores(rig.up(raw[:1]), rig.up(strange), "softmax", stream=rig.stream))
    assert np.isnan(ours[0, :2]).all()
    assert np.isfinite(ours[0, 2])


def nonfinite_case(dtype: str, rig: Rig) -> None:
    raw = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    raw[1, [0, 299]] = np.nan
    raw[2, [5, 6, 7]] = np.inf, -np.inf, np.nan
    raw[3, 4] = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    with np.errstate(over="ignore"):
        raw = raw.astype(DTYPES[dtype])
    counts = rig.down(rig.kernels.nonfinite(rig.up(raw), stream=rig.stream))
    assert counts.tolist() == reference.nonfinite(raw).tolist() == [0, 2, 3, 0]
    posteriors = rig.down(rig.kernels.posteriors(rig.up(raw), "softmax", stream=rig.stream))
    assert np.isnan(posteriors[1:3]).all()


def accumulate_case(grid: bool, rig: Rig) -> None:
    rng = np.random.default_rng(0)
    for n, k, ((h, w), size, _) in zip((1, 65, 150, 2100, 0), (1, 3, 9, 2, 2), SIZES, strict=True):
        weights = rng.normal(size=(k, n)).astype(np.float32)
        if grid:
            bits = rng.integers(0, 2, (n, w, w)).astype(np.uint8)
            offsets = np.stack([rng.integers(0, math.ceil(side / w), n) for side in size], 1).astype(np.int32)
            expected = reference.accumulate_grid(bits, offsets, weights, size)
            arguments = rig.up(bits), rig.up(offsets), rig.up(weights), size
            run = partial(rig.kernels.accumulate_grid, *arguments, stream=rig.stream)
        else:
            maps = rng.normal(size=(n, h, w)).astype(np.float32)
            expected = reference.accumulate_maps(maps, weights)
            run = partial(rig.kernels.accumulate_maps, rig.up(maps), rig.up(weights), stream=rig.stream)
        ours = rig.down(run())
        np.testing.assert_allclose(ours, expected, atol=1e-6 * (10 + n))
        assert rig.down(run()).tobytes() == ours.tobytes()


def normalise_case(dtype: str, rig: Rig) -> None:
    rng = np.random.default_rng(0)
    for _, size, channels in SIZES:
        pixels = rng.integers(0, 256, (*size, channels)).astype(np.uint8)
        mean, std = rng.uniform(0.3, 0.6, channels).tolist(), rng.uniform(0.2, 0.3, channels).tolist()
        for layout in ("NCHW", "NHWC"):
            kind = DTYPES[dtype]
            ours = rig.kernels.normalise(rig.up(pixels), mean, std, layout, kind, stream=rig.stream)
            expected = reference.normalise(pixels, mean, std, layout, kind)
            ours = rig.down(ours)
            assert ours.dtype == expected.dtype
            tolerance = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2, "uint8": 0}[dtype]
            np.testing.assert_allclose(ours.astype(np.float64), expected.astype(np.float64), atol=tolerance)


CASES: dict[str, Callable[[Rig], None]] = {
    **{
        f"blend_{source}_{dtype}": partial(blend_case, source, dtype)
        for source in ("maps", "grids", "segments", "ranks", "path", "windows")
        for dtype in ("float32", "float16", "bfloat16", "uint8")
    },
    "extrema": extrema_case,
    "blur": blur_case,
    **{f"scores_{dtype}": partial(scores_case, dtype) for dtype in ("float32", "float16", "bfloat16")},
    **{f"nonfinite_{dtype}": partial(nonfinite_case, dtype) for dtype in ("float32", "float16", "bfloat16")},
    "accumulate_maps": partial(accumulate_case, False),
    "accumulate_grid": partial(accumulate_case, True),
    "accumulate_splits": partial(accumulate_case, False),
    **{f"normalise_{dtype}": partial(normalise_case, dtype) for dtype in ("float32", "float16", "bfloat16", "uint8")},
}


@pytest.mark.parametrize("name", [name for names in KERNELS.values() for name in names])
def test_kernel(name, rig):
    CASES[name](rig)  # KeyError: a kernel without a case
    assert name in getattr(rig.driver, "launches", [name])


def test_the_table_is_what_the_sources_hold(emulated):
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(KERNELS)
    for stem, names in KERNELS.items():
        text = (SOURCES / f"{stem}.cu").read_text()
        assert len(names) == len(set(names))
        for family in {re.sub(f"_({'|'.join(TYPES)})$", "", name).split("_")[0] for name in names}:
            assert family in text
    assert {mask.source for mask in get_args(masks.Masks)} == {
        name.split("_")[1] for name in KERNELS["blend"]
    }  # fmt: skip


def test_many_channels(rig):
    rng = np.random.default_rng(0)
    image, maps = rng.normal(size=(67, 9, 5)).astype(np.float32), rng.uniform(size=(2, 3, 3)).astype(np.float32)
    full = reference.upsample(maps, (9, 5))
    for layout, array in (("NCHW", image), ("NHWC", np.ascontiguousarray(image.transpose(1, 2, 0)))):
        ours = rig.down(rig.kernels.blend(rig.up(array), masks.Maps(rig.up(maps)), None, layout, stream=rig.stream))
        np.testing.assert_allclose(ours, reference.blend(array, full, None, layout), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_blend_writes_its_rows_of_a_batch_and_nothing_else(rig, dtype, layout):
    kind = DTYPES[dtype]
    chw = (3, 11, 13) if layout == "NCHW" else (11, 13, 3)
    batch = rig.up(np.full((5, *chw), 77, kind))
    image = np.random.default_rng(0).uniform(0, 1, chw).astype(np.float32)
    shares = rig.up(np.array([0, 1], np.float32))
    rig.kernels.blend(rig.up(image), masks.Path(shares), None, layout, batch.rows(1, 3), stream=rig.stream)
    ours = rig.down(batch)
    assert (ours[[0, 3, 4]] == 77).all()
    assert (ours[1] == 0).all()
    kept = image if dtype != "uint8" else np.rint(image)
    assert (ours[2] == kept.astype(kind)).all()  # a mask of 1 gives the image itself


def test_uint8_is_rounded_to_even_and_clipped(rig):
    values = np.array([[[-3, 0.5, 1.5, 2.5, 254.6, 255.4, 300, np.nan]]], np.float32)
    out = rig.kernels.empty((1, *values.shape), np.uint8)
    shares = rig.up(np.ones(1, np.float32))
    rig.kernels.blend(rig.up(values), masks.Path(shares), None, "NCHW", out, stream=rig.stream)
    assert rig.down(out).ravel().tolist() == [0, 0, 2, 2, 255, 255, 255, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_as_numpy_does(rig, dtype):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(1, 40, 100)) * 10.0 ** rng.integers(-9, 6, (1, 40, 100))).astype(np.float32)
    values[0, 0, :4] = np.inf, -np.inf, np.nan, 0
    out = rig.kernels.empty((1, *values.shape), DTYPES[dtype])
    shares = rig.up(np.ones(1, np.float32))
    below = rig.up(np.zeros(1, np.float32))
    rig.kernels.blend(rig.up(values), masks.Path(shares), below, "NCHW", out, stream=rig.stream)
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES[dtype])
    np.testing.assert_array_equal(rig.down(out)[0].astype(np.float32), expected.astype(np.float32))


def test_normalise_is_the_host_s_bit_for_bit(rig):
    spec = ModelSpec(input_size=(3, 12, 10), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), output="logits")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    for dtype in ("float32", "float16", "uint8"):
        ours = rig.kernels.normalise(rig.up(pixels), spec.mean, spec.std, spec.layout, dtype, stream=rig.stream)
        assert rig.down(ours).tobytes() == normalise(pixels, spec, dtype).tobytes()


def test_deletion_and_insertion_are_complements(rig):
    ranks = np.random.default_rng(0).permutation(35).reshape(5, 7).astype(np.int32)
    ones = rig.up(np.ones((1, 5, 7), np.float32))
    thresholds = np.array([0, 10, 35], np.int32)
    kept = rig.kernels.blend(ones, masks.Ranks(rig.up(ranks), rig.up(thresholds)), stream=rig.stream)
    first = rig.kernels.blend(ones, masks.Ranks(rig.up(34 - ranks), rig.up(35 - thresholds)), stream=rig.stream)
    kept, first = rig.down(kept), rig.down(first)
    assert kept.sum(axis=(1, 2, 3)).tolist() == [35, 25, 0]
    assert (kept + first == 1).all()
    assert (first[1, 0] == (ranks < 10)).all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda k, a: k.blend(a("float16", 3, 8, 8), masks.Path(a("float32", 1)), stream=1), "image is float16"),
        (lambda k, a: k.blend(a("float32", 8, 8), masks.Path(a("float32", 1)), stream=1), "image is float32 (8, 8)"),
        (lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Path(a("float32", 1)), layout="CHW", stream=1), "'CHW'"),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Path(a("float32", 1)), a("float32", 8, 8), stream=1),
            "baseline is float32 (8, 8)",
        ),
        (
            lambda k, a: k.blend(
                a("float32", 3, 8, 8), masks.Path(a("float32", 2)), None, "NCHW", a("float32", 1, 3, 8, 8), stream=1
            ),
            "out is float32 (1, 3, 8, 8)",
        ),
        (
            lambda k, a: k.blend(
                a("float32", 3, 8, 8), masks.Path(a("float32", 1)), None, "NCHW", a("int32", 1, 3, 8, 8), stream=1
            ),
            "out is int32",
        ),
        (lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Path(a("float32", 65536)), stream=1), "at most 65535"),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Maps(a("float32", 1, 2, 2), "cubic"), stream=1),
            "rule 'cubic'",
        ),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Grids(a("uint8", 1, 2, 3), a("int32", 1, 2)), stream=1),
            "grids are square",
        ),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Grids(a("uint8", 2, 2, 2), a("int32", 1, 2)), stream=1),
            "offsets is int32 (1, 2)",
        ),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Segments(a("int32", 8, 7), a("uint8", 1, 4)), stream=1),
            "ids is int32 (8, 7)",
        ),
        (
            lambda k, a: k.blend(a("float32", 3, 8, 8), masks.Ranks(a("int64", 8, 8), a("int32", 1)), stream=1),
            "ranks is int64",
        ),
        (lambda k, a: k.extrema(a("float64", 1, 2, 2), (4, 4), stream=1), "maps is float64"),
        (lambda k, a: k.extrema(a("float32", 1, 0, 2), (4, 4), stream=1), "maps is float32 (1, 0, 2)"),
        (lambda k, a: k.extrema(a("float32", 1, 2, 2), (4, 4), "cubic", stream=1), "rule 'cubic'"),
        (lambda k, a: k.blur(a("float32", 1, 4, 4), 4, 1.0, stream=1), "blur of 4 samples"),
        (lambda k, a: k.blur(a("float32", 3, 1 << 15, 1 << 15), 3, 1.0, stream=1), "fewer than 2**31"),
        (lambda k, a: k.normalise(a("uint8", 1 << 15, 1 << 15, 3), [0] * 3, [1] * 3, stream=1), "fewer than 2**31"),
        (
            lambda k, a: k.accumulate_maps(a("float32", 1, 1 << 14, 1 << 14), a("float32", 8, 1), stream=1),
            "fewer than 2**31",
        ),
        (lambda k, a: k.posteriors(a("uint8", 1, 4), "softmax", stream=1), "raw is uint8"),
        (lambda k, a: k.posteriors(a("float32", 1, 4), "logit", stream=1), "kind 'logit'"),
        (
            lambda k, a: k.class_scores(a("float32", 2, 4), a("int32", 3, 1), "none", stream=1),
            "targets is int32 (3, 1)",
        ),
        (
            lambda k, a: k.accumulate_maps(a("float32", 2, 4, 4), a("float32", 1, 3), stream=1),
            "weights is float32 (1, 3)",
        ),
        (lambda k, a: k.normalise(a("uint8", 4, 4, 3), [0.5], [0.5], stream=1), "mean has 1"),
        (lambda k, a: k.normalise(a("uint8", 4, 4, 1), [0.5], [0.5], dtype=np.int8, stream=1), "input type int8"),
        (lambda k, a: k.upload(np.zeros(3), out=a("float32", 3), stream=1), "out is float32 (3,)"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(emulated, call, told):
    def array(dtype, *shape):
        return DeviceArray(256, shape, np.dtype(dtype))

    with pytest.raises(ValueError, match=re.escape(told)):
        call(emulated.kernels, array)
    assert emulated.driver.launches == []


def test_no_rows_are_no_launch(rig):
    image = rig.up(np.zeros((3, 4, 4), np.float32))
    none = rig.kernels.blend(image, masks.Path(rig.up(np.zeros(0, np.float32))), stream=rig.stream)
    assert none.shape == (0, 3, 4, 4)
    assert rig.down(rig.kernels.nonfinite(rig.up(np.zeros((0, 5), np.float32)), stream=rig.stream)).shape == (0,)


def test_an_address_between_elements_is_refused(emulated):
    image = emulated.up(np.zeros((3, 4, 4), np.float32))
    crooked = DeviceArray(image.pointer + 1, (1, 3, 4), np.dtype(np.float32))
    with pytest.raises(ValueError, match="no multiple"):
        emulated.kernels.blur(crooked, 3, 1.0, stream=emulated.stream)


def test_memory_goes_back_with_the_array(emulated):
    before = emulated.driver.memory()[0]
    array = emulated.kernels.empty((1000,), np.float32)
    part = array.rows(10, 20)
    assert emulated.driver.memory()[0] == before - 4000
    del array
    assert emulated.driver.memory()[0] == before - 4000
    del part
    assert emulated.driver.memory()[0] == before


def test_two_streams_share_tables_and_not_their_workspace(emulated):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 20, 9)).astype(np.float32)
    streams = emulated.stream, emulated.driver.stream()
    results = [
        emulated.kernels.blur(emulated.kernels.upload(image, stream=s), 5, 1.5, stream=s)
        for image, s in zip(images, streams, strict=True)
    ]
    for image, result, s in zip(images, results, streams, strict=True):
        ours = emulated.kernels.download(result, stream=s)
        np.testing.assert_allclose(ours, reference.blur(image, 5, 1.5), atol=1e-5)


def test_sources_are_ascii():
    """g++ and NVRTC agree on nothing else."""
    for path in [*SOURCES.iterdir(), *Path(__file__).parents[1].glob("emulator/*.[hc]*")]:
        assert path.read_text().isascii()


# ----- drivers -----


@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_says_what_it_is(monkeypatch, emulated_driver, name):
    opened = fake_cuda.install(monkeypatch, name, emulated_driver).open(0)
    assert (opened.name, opened.index, opened.device, opened.architecture) == (name, 0, "a GPU", "sm_90")


@pytest.mark.parametrize("name", DRIVERS)
def test_what_a_driver_refuses_is_one_line(monkeypatch, emulated_driver, name):
    door = fake_cuda.install(monkeypatch, name, emulated_driver, count=2)
    with pytest.raises(BackendError, match="no GPU 2: this machine has 2"):
        door.open(2)
    with pytest.raises(OutOfMemory, match="smaller --batch-size"):
        door.open(1).alloc(1 << 40)


def test_an_old_driver_is_told(monkeypatch, emulated_driver):
    door = fake_cuda.install(monkeypatch, "cuda-bindings", emulated_driver, version=12060)
    with pytest.raises(BackendError, match=r"knows CUDA 12\.6; CUDA 13 is needed"):
        door.open(0)


@pytest.mark.parametrize("name", DRIVERS)
def test_events_order_streams_and_tell_the_time_between(monkeypatch, emulated_driver, name):
    driver = fake_cuda.install(monkeypatch, name, emulated_driver).open(0)
    first, second = driver.stream(), driver.stream()
    begun, done = driver.event(), driver.event()
    memory = driver.alloc(8)
    driver.record(begun, first)
    driver.to_device(memory, np.array([3.0]), first)
    driver.record(done, first)
    driver.wait(second, done)
    seen = np.zeros(1)
    driver.to_host(seen, memory, second)
    driver.synchronize(second)
    assert seen[0] == 3
    assert driver.seconds(begun, done) >= 0


def test_unknown_drivers_are_refused():
    with pytest.raises(BackendError, match="no driver 'cupy'; known: auto, cuda-bindings, pycuda"):
        open_driver("cupy")


# ----- the emulator -----


@pytest.mark.parametrize(
    ("name", "threads", "arguments", "told"),
    [
        ("divergent_barrier", 32, (), "a barrier that only some threads of the block reach"),
        ("unexpected_barrier", 32, (), "a barrier in a kernel that declares none"),
        ("overrun", 64, (np.int32(32),), "wrote outside an allocation of 128 bytes"),
    ],
)
def test_the_emulator_notices_what_no_kernel_may_do(emulated_driver, name, threads, arguments, told):
    if name == "overrun" and not emulated_driver._guard:
        pytest.skip("AddressSanitizer ends the process at an overrun")
    stream, memory = emulated_driver.stream(), emulated_driver.alloc(128)
    emulated_driver.launch(emulated_driver.function(1, name), (1, 1, 1), (threads, 1, 1), [memory, *arguments], stream)
    with pytest.raises(RuntimeError, match=told):
        emulated_driver.synchronize(stream)


@pytest.mark.parametrize("grid", [False, True])
def test_weighted_sums_of_many_classes_hold_a_bounded_workspace(emulated, monkeypatch, grid):
    monkeypatch.setattr(cuda, "WORKSPACE", 4 * 4 * 33 * 29 * 3)  # of three classes
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(11, 200)).astype(np.float32)
    if grid:
        bits = rng.integers(0, 2, (200, 4, 4)).astype(np.uint8)
        offsets = rng.integers(0, 7, (200, 2)).astype(np.int32)
        found = emulated.kernels.accumulate_grid(
            emulated.up(bits), emulated.up(offsets), emulated.up(weights), (33, 29), stream=emulated.stream
        )
        expected = reference.accumulate_grid(bits, offsets, weights, (33, 29))
    else:
        maps = rng.normal(size=(200, 33, 29)).astype(np.float32)
        found = emulated.kernels.accumulate_maps(emulated.up(maps), emulated.up(weights), stream=emulated.stream)
        expected = reference.accumulate_maps(maps, weights)
    np.testing.assert_allclose(emulated.down(found), expected, atol=1e-4)
    assert emulated.kernels._workspaces[emulated.stream].nbytes <= cuda.WORKSPACE

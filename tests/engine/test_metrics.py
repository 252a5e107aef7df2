"""Every metric against a slow literal reading of its formula, by itself and through the engine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zlib import crc32

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from scipy import ndimage, stats

from heatmill import InputError
from heatmill.engine.evaluator import measuring, orders
from heatmill.engine.explainer import Engine
from heatmill.engine.jobs.evaluate import said
from heatmill.engine.metrics import METRICS, PRESETS, parse_metrics
from heatmill.engine.metrics.faithfulness import area, as_mask, counts, cut, drop, gain, increase, quota
from heatmill.engine.metrics.localization import box_mask, energy, hits, largest_box, overlap
from heatmill.engine.metrics.robustness import rank_correlation, relative_change
from heatmill.engine.metrics.statistics import gini
from heatmill.engine.opening import load, open_best
from heatmill.engine.types import Item, Measured, Subject, Target
from heatmill.kernels import host, reference
from tests.engine.test_methods import Classifier, pictures
from tests.graphs import without_scores_in_the_dark

ROOT = Path(__file__).resolve().parents[2]
SIZE = (33, 29)
PIXELS = SIZE[0] * SIZE[1]
RNG = np.random.default_rng(3)


def ranked(saliency: np.ndarray) -> np.ndarray:
    return orders([saliency], saliency.shape)[0]


def smooth_maps(n: int) -> np.ndarray:
    """Finished maps: 0..1, with zeros of several pixels, and no other value twice."""
    maps = np.maximum(pictures(n, SIZE, seed=4)[:, 0], 0)
    return maps / maps.max(axis=(1, 2), keepdims=True)


def subjects(maps, boxes=None, extras=None, box_status="ok"):
    ranks = orders(maps, SIZE)
    boxes = np.array([[4.0, 5.0, 20.0, 25.0]]) if boxes is None else boxes
    return [Subject(each, ranks, i, boxes, box_status, extras or {}) for i, each in enumerate(maps)]


def measured(path, metrics, given, images, targets=((1, 3),), batch_size=7, seed=0):
    """Of each metric, image, method and target what is measured; also the engine."""
    loaded = measuring(load(path, []), parse_metrics(metrics), len(given[0]))
    kinds = [Target("class", 0)] * len(targets[0])
    engine = Engine(loaded, open_best(loaded, batch_size=batch_size), kinds, batch_size, seed)
    items = [
        Item(i, image, name=f"image {i}", targets=targets[i % len(targets)], given=given[i])
        for i, image in enumerate(images)
    ]
    found: dict = {}
    for e in engine.stream(items):
        found.setdefault((e.method.method.name, e.key), []).append(said(e))
    return found, engine


@pytest.fixture(scope="module")
def path(tmp_path_factory, save_model):
    return save_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def net(path):
    return Classifier(path)


# --- what the image shows, literally --------------------------------------------------------------------------


def official_order(saliency):
    """The authors of RISE: `np.flip(np.argsort(...))`, with a stable sort."""
    return np.flip(np.argsort(saliency.ravel(), kind="stable"))


def literal_curve(net, x, target, saliency, steps, start, finish):
    """The authors' loop: the first pixels of `start` become those of `finish`, a step at a time."""
    order = official_order(saliency)
    canvas, scores = start.copy().reshape(3, -1), []
    for t in range(steps + 1):
        taken = order[: round(t * PIXELS / steps)]
        canvas[:, taken] = finish.reshape(3, -1)[:, taken]
        scores.append(net.posterior(canvas.reshape(x.shape))[target])
    scores = np.array(scores)
    return (scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1), scores


def gkern(klen=11, nsig=5):
    """The authors' kernel, by SciPy as they have it."""
    inp = np.zeros((klen, klen))
    inp[klen // 2, klen // 2] = 1
    return ndimage.gaussian_filter(inp, nsig)


def blurred(x):
    return np.stack([ndimage.convolve(plane.astype(np.float64), gkern(), mode="constant") for plane in x])


def lcam_cut(saliency, muted):
    """L-CAM: what lies below the value at rank HW * muted is zero; then ties in scan order, until the rest is left."""
    flat = saliency.ravel().copy()
    rank = int(PIXELS * muted)
    if rank:
        value = np.sort(flat)[rank - 1]
        flat[flat < value] = 0
        keep = int(np.ceil(round((1 - muted) * PIXELS, 6)))
        for i in range(PIXELS):
            if np.count_nonzero(flat) <= keep:
                break
            if flat[i] == value:
                flat[i] = 0
    return flat.reshape(saliency.shape)


def test_rises_blur_is_the_authors_kernel():
    x = pictures(1, SIZE)[0]
    np.testing.assert_allclose(np.outer(reference.rise_taps(), reference.rise_taps()), gkern(), atol=1e-12)
    np.testing.assert_allclose(reference.rise_blur(x), blurred(x), atol=1e-6)
    np.testing.assert_allclose(host.rise_blur(x), blurred(x), atol=1e-6)
    assert gkern()[5, 5] / gkern()[0, 0] == pytest.approx(1.14, abs=0.01)


@pytest.mark.parametrize("steps", [28, 13])
def test_deletion_and_insertion_are_the_literal_loops(path, net, steps):
    images, maps = pictures(3, SIZE), smooth_maps(4)
    given = [[subjects(maps)[:2], subjects(maps)[2:]] for _ in images]
    metrics = [f"deletion:steps={steps}", f"insertion:steps={steps}", f"deletion:steps={steps},baseline=mean"]
    found, _ = measured(path, metrics, given, images, targets=((1, 3), (0, 2), (4, 1)))
    texts = [call.text for call in parse_metrics(metrics)]
    for i, x in enumerate(images):
        mean = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
        for m in range(2):
            for k, target in enumerate(((1, 3), (0, 2), (4, 1))[i]):
                s = maps[2 * m + k]
                wanted = (
                    literal_curve(net, x, target, s, steps, x, np.zeros_like(x)),
                    literal_curve(net, x, target, s, steps, blurred(x), x),
                    literal_curve(net, x, target, s, steps, x, mean),
                )
                for text, (value, curve) in zip(texts, wanted, strict=True):
                    ours = found[f"{text} of {m}", i][k]
                    np.testing.assert_allclose(ours.curve, curve, atol=1e-5)
                    assert ours.value == pytest.approx(value, abs=1e-5)
                    assert ours.status == "ok"


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.15])
def test_average_drop_and_its_kin_are_the_literal_formulas(path, net, keep):
    images, maps = pictures(2, SIZE), smooth_maps(2)
    names = [f"{name}:keep={keep},baseline=black" for name in ("average-drop", "increase", "average-gain")]
    found, engine = measured(path, names, [[subjects(maps)] for _ in images], images)
    mean, std = (np.array(v)[:, None, None] for v in ((0.5, 0.45, 0.4), (0.25, 0.2, 0.3)))
    for i, x in enumerate(images):
        for k, target in enumerate((1, 3)):
            mask = lcam_cut(maps[k], 1 - keep)
            before = net.posterior(x)[target]
            after = net.posterior((((x * std + mean) * mask) - mean) / std)[target]  # masked in pixels, over black
            ours = [found[f"{call.text} of 0", i][k].value for call in parse_metrics(names)]
            wanted = [max(0, before - after) / before, float(after > before), max(0, after - before) / (1 - before)]
            np.testing.assert_allclose(ours, wanted, atol=2e-5)
    assert engine.stages.rows == len(images) * (1 + 2), "the three share the masked image"


def test_a_cut_keeps_exactly_its_share():
    """L-CAM's numbers at 224, also where values are equal."""
    for saliency in (RNG.random((224, 224), dtype=np.float32), np.ones((224, 224), np.float32)):
        kept = [np.count_nonzero(cut(saliency, ranked(saliency), keep)) for keep in (1.0, 0.5, 0.15)]
        assert kept == [50_176, 25_088, 7_527]
    few = np.zeros((224, 224), np.float32)
    few[3, :9] = 1
    assert np.count_nonzero(cut(few, ranked(few), 0.5)) == 9
    assert (quota(0.1, 30), quota(0.5, 3)) == (3, 2)
    with_ties = np.round(smooth_maps(1)[0], 1)
    for muted in (0.5, 0.85):
        literal = lcam_cut(with_ties, muted) > 0
        np.testing.assert_array_equal(cut(with_ties, ranked(with_ties), 1 - muted) > 0, literal)


def test_maps_within_0_and_1_are_masks_as_they_are():
    half = smooth_maps(1)[0] / 2
    np.testing.assert_array_equal(as_mask(half), half.astype(np.float32))
    signed = half * 8 - 0.5
    wanted = [max(v, 0) / signed.max() for v in signed.ravel()]
    np.testing.assert_allclose(as_mask(signed).ravel(), wanted, rtol=1e-6)
    assert not as_mask(-half - 0.1).any()


def test_a_map_of_ones_loses_and_wins_nothing(path):
    images = pictures(2, SIZE)
    ones = subjects([np.ones(SIZE, np.float32)])
    names = ["average-drop", "increase", "average-gain"]
    found, _ = measured(path, names, [[ones] for _ in images], images, targets=((2,),))
    for name in names:
        for i in range(2):
            (only,) = found[f"{name} of 0", i]
            assert only.value == pytest.approx(0, abs=1e-6) if name != "increase" else only.value in (0, 1)
            assert only.notes["masked"] == pytest.approx(only.notes["full"], abs=1e-6)
    assert (drop(0.4, 0.4), increase(0.4, 0.4), gain(0.4, 0.4)) == (0, 0, 0)
    assert (drop(0.4, 0.1), increase(0.4, 0.5), gain(0.5, 0.75)) == (pytest.approx(0.75), 1, 0.5)
    assert (drop(0.0, 0.3), gain(1.0, 0.3)) == (None, 0)


def test_curves_begin_and_end_where_they_must(path, net):
    x, maps = pictures(1, SIZE)[0], smooth_maps(1)
    found, _ = measured(path, ["deletion", "insertion"], [[subjects(maps)]], [x], targets=((3,),))
    (deleted,), (inserted,) = found["deletion of 0", 0], found["insertion of 0", 0]
    full, zero, start = (net.posterior(each)[3] for each in (x, x * 0, blurred(x)))
    np.testing.assert_allclose([deleted.curve[0], inserted.curve[-1]], full, atol=1e-6)
    np.testing.assert_allclose([deleted.curve[-1], inserted.curve[0]], [zero, start], atol=1e-6)
    assert area(np.array([1.0, 1, 1])) == 1
    assert area(np.array([1.0, 0])) == 0.5
    assert counts(28, 224 * 224).tolist() == [1792 * t for t in range(29)]


def test_rows_of_many_maps_are_shared_and_their_batch_does_not_matter(path):
    images, maps = pictures(3, SIZE), smooth_maps(3)
    names = ["deletion:steps=5", "insertion:steps=5", "deletion:steps=10", "average-drop", "increase:keep=0.1"]
    given = [[subjects(maps)[:1], subjects(maps)[1:2], subjects(maps)[2:]] for _ in images]
    for each in given:  # one stack of ranks for an image, as a run's are
        whole = each[0][0].ranks
        each[:] = [[Subject(s.saliency, whole, s.place, s.boxes, "ok", {}) for s in row] for row in each]
    wide, engine = measured(path, names, given, images, targets=((1,),), batch_size=16)
    # each map: 9 deleted, 4 inserted, 2 masked; for all of them one all grey and one all blurred
    assert engine.stages.rows == len(images) * (1 + 3 * (9 + 4 + 2) + 2)
    narrow, _ = measured(path, names, given, images, targets=((1,),), batch_size=1)
    for key, row in wide.items():
        for one, other in zip(row, narrow[key], strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-6)


def test_road_is_the_literal_imputation(path, net):
    x, maps = pictures(1, SIZE)[0], smooth_maps(1)
    found, _ = measured(path, ["road"], [[subjects(maps)]], [x], targets=((3,),), seed=9)
    digest = int.from_bytes(hashlib.blake2b(b"image 0", digest_size=8).digest(), "little")
    key = np.array([9, digest], np.uint64)
    order = official_order(maps[0])
    scores = {"first": [], "last": []}
    for percent in range(10, 100, 10):
        count = int(np.ceil(round(percent / 100 * PIXELS, 6)))
        for which, gone in (("first", order[:count]), ("last", order[PIXELS - count :])):
            mask = np.ones(PIXELS)
            mask[gone] = 0
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, crc32(b"road"), count]))
            noise = generator.standard_normal((1, *x.shape), dtype=np.float32)
            filled = reference.impute(x, mask.reshape(1, *SIZE), noise)[0]
            scores[which].append(net.posterior(filled)[3])
    (ours,) = found["road of 0", 0]
    np.testing.assert_allclose(ours.notes["without_first"], scores["first"], atol=2e-3)
    np.testing.assert_allclose(ours.notes["without_last"], scores["last"], atol=2e-3)
    np.testing.assert_allclose(ours.curve, (np.array(scores["last"]) - scores["first"]) / 2, atol=2e-3)
    assert ours.value == pytest.approx((np.mean(scores["last"]) - np.mean(scores["first"])) / 2, abs=1e-3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_imputation_solves_what_it_defines(layout, dtype):
    size = (14, 9)
    x = pictures(1, size)[0] if dtype == np.float32 else RNG.integers(0, 256, (3, *size)).astype(np.uint8)
    x = x if layout == "NCHW" else np.ascontiguousarray(x.transpose(1, 2, 0))
    masks = (RNG.random((4, *size)) > np.array([0.1, 0.5, 0.9, 1.1])[:, None, None]).astype(np.float32)
    noise = RNG.normal(size=(4, *x.shape)).astype(np.float32)
    wanted = reference.impute(x, masks, noise, layout)
    ours = host.impute(x, masks, noise, layout)
    np.testing.assert_allclose(ours, wanted, atol=1 if dtype == np.uint8 else 2e-3)
    kept = masks[1].astype(bool)
    np.testing.assert_array_equal((ours[1] if layout == "NHWC" else ours[1].transpose(1, 2, 0))[kept],
                                  (x if layout == "NHWC" else x.transpose(1, 2, 0))[kept])  # fmt: skip


def test_the_layout_and_the_kind_of_input_do_not_matter(path, tmp_path, save_model):
    """Channels last, and pixels in bytes: the same network behind them."""
    last = save_model(tmp_path / "last.onnx", layout="NHWC", spec={"layout": "NHWC"})
    images, maps = pictures(2, SIZE), smooth_maps(2)
    names = ["deletion:steps=5", "insertion:steps=5", "average-drop:baseline=black", "road"]
    given = [[subjects(maps)] for _ in images]
    first, _ = measured(path, names, given, images)
    turned, _ = measured(last, names, given, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    for key, row in first.items():
        for one, other in zip(row, turned[key], strict=True):
            assert one.value == pytest.approx(other.value, abs=0.02 if key[0].startswith("road") else 1e-5)

    of_bytes = save_model(tmp_path / "bytes.onnx", dtype=TensorProto.UINT8, spec={"mean": [0] * 3, "std": [1] * 3})
    pixels = np.clip(images * 40 + 128, 0, 255).astype(np.uint8)
    found, _ = measured(of_bytes, names, given, pixels)
    session = onnxruntime.InferenceSession(str(of_bytes), providers=["CPUExecutionProvider"])
    canvas, order, scores = pixels[0].copy().reshape(3, -1), official_order(maps[0]), []
    for step in range(6):
        canvas[:, order[: round(step * PIXELS / 5)]] = 0
        logits = session.run(None, {"input": canvas.reshape(1, 3, *SIZE)})[0][0].astype(np.float64)
        scores.append((np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[1])
    np.testing.assert_allclose(found["deletion:steps=5 of 0", 0][0].curve, scores, atol=1e-5)


# --- boxes ----------------------------------------------------------------------------------------------------


def test_pointing_game():
    saliency = np.zeros((20, 30), np.float32)
    saliency[4, 7] = 1
    mask = box_mask(np.array([[10.0, 0.0, 15.0, 20.0]]), saliency.shape)
    assert [int(mask.sum()), mask[0].nonzero()[0].tolist()] == [100, [10, 11, 12, 13, 14]]
    # three columns away: a disc of radius below 3 does not reach, one above does
    assert [hits(saliency, mask, tolerance) for tolerance in (0, 2.9, 3, 3.1)] == [False, False, False, True]
    saliency[4, 10] = 1
    assert not hits(saliency, mask, 0), "the first of equal values"
    saliency[4, 7] = 0
    assert hits(saliency, mask, 0)


def test_random_maps_point_by_chance():
    mask = box_mask(np.array([[3.0, 4.0, 19.0, 20.0]]), (24, 26))
    found = [hits(RNG.random((24, 26)), mask, 0) for _ in range(4000)]
    chance = mask.mean()
    assert np.mean(found) == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / 4000))


def test_energy_is_the_share_in_the_boxes():
    saliency = smooth_maps(1)[0] - 0.2
    boxes = np.array([[2.0, 3.0, 12.0, 9.0], [8.0, 5.0, 20.0, 30.0]])
    inside = total = 0.0
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            value = max(float(saliency[y, x]), 0)
            total += value
            if any(x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes):
                inside += value
    assert energy(saliency, box_mask(boxes, SIZE)) == pytest.approx(inside / total)
    assert energy(np.ones(SIZE), box_mask(boxes, SIZE)) == pytest.approx(box_mask(boxes, SIZE).mean())


def literal_component_box(mask):
    """The box of the largest part, by flooding from every pixel."""
    left, best = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        wave = [left.pop()]
        part = list(wave)
        while wave:
            y, x = wave.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            wave += near
            part += near
        best = max(best, part, key=len)
    ys, xs = zip(*best, strict=True)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def test_boxes_of_maps_meet_boxes(path):
    maps = smooth_maps(3)
    boxes = np.array([[1.0, 2.0, 14.0, 16.5], [10.0, 12.0, 29.0, 33.0]])
    given = [[subjects(maps, boxes)]]
    names = ["box-error:threshold=0.3,iou=0.3", "max-box-acc:thresholds=10,iou=0.3"]
    found, engine = measured(path, names, given, pictures(1, SIZE), targets=((0, 1, 2),))
    assert engine.stages.rows == 1
    for k, saliency in enumerate(maps):
        met = []
        for t in range(10):
            x0, y0, x1, y1 = literal_component_box(saliency >= t / 10)
            ious = []
            for a0, b0, a1, b1 in boxes:
                both = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
                ious.append(both / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - both))
            met.append(max(ious))
        error, accuracy = (found[f"{call.text} of 0", 0][k] for call in parse_metrics(names))
        np.testing.assert_allclose(accuracy.curve, met, atol=1e-6)
        assert (error.value, error.notes["iou"]) == (float(met[3] < 0.3), pytest.approx(met[3], abs=1e-6))
    terms = METRICS["max-box-acc"].terms(np.zeros(2), np.array([[0.2, 0.5], [0.6, 0.5]]), {"iou": 0.5})
    assert terms.tolist() == [[0, 1], [1, 1]]
    assert largest_box(np.zeros((3, 3))) is None
    assert overlap((0, 0, 2, 2), np.array([[0.0, 0, 2, 2]])) == 1


# --- the map alone, and maps made again -----------------------------------------------------------------------


def test_sparseness_is_the_gini_index():
    values = RNG.normal(size=(6, 7))
    sizes = np.abs(values).ravel()
    pairs = sum(abs(a - b) for a in sizes for b in sizes)
    assert gini(values) == pytest.approx(pairs / (2 * len(sizes) ** 2 * sizes.mean()))
    assert gini(np.ones(50)) == pytest.approx(0)
    assert gini(np.eye(1, 50)) == pytest.approx(1 - 1 / 50)


def test_what_a_method_states_of_its_sums(path):
    given = [[subjects(smooth_maps(1), extras={"kept": 0.75, "completeness_error": 0.02})]]
    found, _ = measured(path, ["conservation", "completeness"], given, pictures(1, SIZE), targets=((0,),))
    assert found["conservation of 0", 0][0].value == pytest.approx(0.25)
    assert found["completeness of 0", 0][0].value == pytest.approx(0.02)


def test_maps_made_again_are_compared():
    a, b = RNG.normal(size=(2, 5, 6))
    wanted = np.sqrt(sum((x - y) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)))
    assert relative_change(a, b, {}) == pytest.approx(wanted / np.sqrt((a**2).sum()))
    assert np.isnan(relative_change(np.zeros((2, 2)), np.ones((2, 2)), {})), "beside a zero map nothing can be said"
    tied = np.round(b, 0)
    for sign, f in (("kept", lambda v: v), ("ignored", np.abs)):
        wanted = stats.spearmanr(f(a).ravel(), f(tied).ravel()).statistic
        assert rank_correlation(a, tied, {"sign": sign}) == pytest.approx(wanted)
    assert np.isnan(rank_correlation(a, np.ones((5, 6)), {"sign": "kept"}))


# --- rows without a value -------------------------------------------------------------------------------------

PLAIN = [name for name, metric in METRICS.items() if metric.again is None]
STATED = {"conservation", "completeness"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_flat_map_is_no_value(path, name):
    flat = subjects([np.zeros(SIZE, np.float32)])
    found, _ = measured(path, [name], [[flat]], pictures(1, SIZE), targets=((0,),))
    (only,) = found[f"{name} of 0", 0]
    assert only.value is None
    assert only.status == ("not_stated" if name in STATED else "flat")
    assert only.reason


@pytest.mark.parametrize(
    ("name", "flat"), [("average-drop:keep=0.5", True), ("average-drop", False), ("deletion", True)]
)
def test_an_even_map_puts_no_pixel_before_another(path, name, flat):
    even = subjects([np.full(SIZE, 0.7, np.float32)])
    found, _ = measured(path, [name], [[even]], pictures(1, SIZE), targets=((0,),))
    (only,) = found[f"{name} of 0", 0]
    assert (only.status == "flat") == flat
    assert (only.value is None) == flat


@pytest.mark.parametrize("status", ["no_boxes", "box_outside"])
def test_no_boxes_are_no_value(path, status):
    given = [[subjects(smooth_maps(1), np.empty((0, 4)), box_status=status)]]
    names = ["pointing-game", "energy-pointing-game", "box-error", "max-box-acc"]
    found, _ = measured(path, names, given, pictures(1, SIZE), targets=((0,),))
    assert {found[f"{name} of 0", 0][0].status for name in names} == {status}
    assert all(found[f"{name} of 0", 0][0].reason for name in names)


def test_a_map_that_there_is_none_of_leaves_the_others_alone(path):
    images = pictures(2, SIZE)
    bad = Measured(None, status="nonfinite", reason="no map")
    good = subjects(smooth_maps(1))
    found, _ = measured(path, ["deletion", "sparseness"], [[[bad, good[0]]], [[good[0], bad]]], images)
    for name in ("deletion", "sparseness"):
        statuses = [[each.status for each in found[f"{name} of 0", i]] for i in range(2)]
        assert statuses == [["nonfinite", "ok"], ["ok", "nonfinite"]]


def test_a_network_that_gives_no_number_is_no_value(make_model):
    """Masked images are dark; the first image is so from the start."""
    dark = make_model()
    without_scores_in_the_dark(dark)
    images = np.abs(pictures(2, SIZE)) + np.array([-3, 3], np.float32)[:, None, None, None]
    names = ["deletion:steps=3", "increase:keep=0.1", "sparseness"]
    found, _ = measured(dark, names, [[subjects(smooth_maps(1))]] * 2, images, targets=((1,),))
    statuses = {key: row[0].status if row else None for key, row in found.items() if key[1] == 1}
    assert list(statuses.values()) == ["nonfinite", "nonfinite", "ok"]
    assert all(found[f"{name} of 0", 0][0].status == "nonfinite" for name in names)
    assert found["deletion:steps=3 of 0", 1][0].reason


# --- names ----------------------------------------------------------------------------------------------------


def test_presets_are_the_published_settings():
    texts = {name: [call.text for call in parse_metrics([name])] for name in PRESETS}
    assert texts["rise"] == ["deletion", "insertion"]
    assert METRICS["deletion"].parameters["steps"].default == 28
    assert texts["scorecam"] == ["average-drop:keep=0.5", "increase:keep=0.5", "average-gain:keep=0.5"]
    assert texts["l-cam"][:3] == [
        "average-drop:baseline=black",
        "increase:baseline=black",
        "average-drop:keep=0.5,baseline=black",
    ]
    assert len(parse_metrics(["standard", "rise", "RISE", "Deletion:steps=28"])) == len(PRESETS["standard"])


@pytest.mark.parametrize("text", ["pointing", "deletion:stepz=3", "deletion:steps=1", "l-cam:keep=1", ""])
def test_unknown_metrics_are_refused(text):
    with pytest.raises(InputError, match="metric"):
        parse_metrics([text])


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name):
    metric = METRICS[name]
    assert metric.better in ("higher", "lower")
    assert metric.summary
    assert metric.citation
    assert (metric.again is None) == (metric.compare is None)
    told = (ROOT / "docs" / "metrics.md").read_text()
    heading = next(line for line in told.splitlines() if line.startswith("### ") and name in line)
    assert f"({metric.better} is better)" in heading

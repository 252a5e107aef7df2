"""SISE, Ada-SISE and XRAI against slow literal readings; gradients are central differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from scipy import ndimage, sparse
from skimage.filters import threshold_otsu

from heatmill import Explainer
from heatmill.engine.methods.sise import above_otsu, join
from heatmill.engine.methods.xrai import SCALES, ranked, regions
from heatmill.models.preprocess import denormalise
from heatmill.models.superpixels import Segmentation, cut
from tests.engine.test_gradient_methods import Network, on_the_path, pictures, scale, up

SIZE = (17, 13)


def literal_sise(net: Network, x: np.ndarray, c: int, layers: list[str], ada: bool, threshold: str) -> np.ndarray:
    fused = None
    for layer in layers:
        A = net.at(layer, x)
        slopes = net.slopes(A, layer)[c].mean(axis=(1, 2))
        least = 0.0
        if ada:
            rising = slopes[slopes > 0] / slopes.max()
            least = threshold_otsu(rising)
        total = np.zeros(SIZE)
        for a, slope in zip(A, slopes, strict=True):
            if slope > 0 and slope / slopes.max() > least and a.max() > a.min():
                mask = scale(up(a, SIZE))
                total += net.posterior(x * mask)[c] * mask / mask.sum()
        V = scale(total)
        if fused is None:
            fused = V
            continue
        level = threshold_otsu(V)
        if threshold == "hard":
            fused = (fused + V) * (level < V)
        else:
            level = 1.5 * level if (1.5 * level < V).mean() < 0.1 else level
            fused = (fused + V) / (1 + np.exp(-100 * (V - level)))
    return fused


@pytest.mark.parametrize("head", ["Tanh", "Gemm"])
@pytest.mark.parametrize("threshold", ["hard", "soft"])
@pytest.mark.parametrize("name", ["sise", "ada-sise"])
def test_sise_is_the_literal_loop(make_model, name, threshold, head):
    path = make_model(head=head, size=SIZE)
    net, images = Network(path), 0.5 * pictures(2)
    result = Explainer(path, method=f"{name}:threshold={threshold}", batch_size=5).explain(images, targets=["top2", 4])
    assert result.extras[0][0]["channels"] == 8 + 12
    assert 0 < result.extras[0][0]["passes"] <= 20 - result.extras[0][0]["skipped"]
    for i, x in enumerate(images):
        for k, c in enumerate(result.targets[i]):
            literal = literal_sise(net, x, c, ["r1", "features"], name == "ada-sise", threshold)
            assert np.ptp(literal) > 0.5
            # where a pixel lies on the threshold, rounding may put it on either side
            off = np.abs(result.maps[i, k] - literal) > 2e-3
            assert off.sum() <= 1


def test_sise_reads_as_many_layers_as_asked_and_no_further_than_the_tap(make_model):
    path, x = make_model(size=SIZE), pictures(1)
    assert Explainer(path, method="sise:layers=1").explain(x).extras[0][0]["channels"] == 12
    assert Explainer(path, method="sise", layer="r1").explain(x).extras[0][0]["channels"] == 8


def test_sise_without_a_positive_gradient_is_a_zero_map_with_its_reason(make_model):
    """A class whose weights are all negative on a linear head of one layer."""
    path = make_model(size=SIZE)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            weights = onnx.numpy_helper.to_array(tensor).copy()
            weights[1] = -np.abs(weights[1])
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights, "w3"))
    onnx.save(model, path)
    for name in ("sise", "ada-sise"):
        result = Explainer(path, method=f"{name}:layers=1").explain(pictures(1), targets=[1, 2])
        assert "positive gradient" in result.extras[0][0]["reason"]
        assert not result.maps[0, 0].any()
        assert "reason" not in result.extras[0][1]
        assert result.maps[0, 1].any()


def test_alike_gradients_are_all_kept():
    np.testing.assert_array_equal(above_otsu(np.array([0.5, 0.5, -1.0])), [True, True, False])
    np.testing.assert_array_equal(above_otsu(np.array([-0.5, -0.1])), [False, False])
    two_kinds = np.concatenate([np.linspace(0.1, 0.2, 50), np.linspace(0.8, 1, 50), [-1]])
    kept = above_otsu(two_kinds)
    assert kept[50:100].all()
    assert kept[:49].sum() == kept[100] == 0


def test_the_first_layer_that_tells_anything_is_taken_as_it_is():
    layer = np.linspace(0, 1, 12).reshape(3, 4)
    assert join(None, layer, "hard") is layer


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_xrai_is_the_literal_greedy_choice(make_model, layout):
    path = make_model(size=(33, 29), layout=layout, spec={"layout": layout})
    net = Network(make_model("plain.onnx", size=(33, 29)))
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.normal(size=(3, 2, 2)), np.ones((1, 17, 15)))[:, :33, :29]
    x = (0.4 * (blocks + 0.2 * rng.normal(size=blocks.shape))).astype(np.float32)
    explainer = Explainer(path, method="xrai:steps=3", batch_size=4)
    result = explainer.explain((x if layout == "NCHW" else x.transpose(1, 2, 0))[None], targets=[2])
    attribution = sum(on_the_path(net, x.astype(float), np.full(x.shape, end), 2, 3) for end in (x.min(), x.max())) / 2
    attribution = attribution.max(axis=0)
    picture = denormalise(x if layout == "NCHW" else x.transpose(1, 2, 0), explainer.spec)
    y, z = np.mgrid[-5:6, -5:6]
    disk = y**2 + z**2 <= 25
    masks = []
    for scale_ in SCALES:
        segments = cut(picture, Segmentation("felzenszwalb", scale_))
        masks += [ndimage.binary_dilation(segments == number, disk) for number in range(segments.max() + 1)]
    expected, covered, taken = np.full(x.shape[1:], np.nan), np.zeros(x.shape[1:], bool), 0
    while masks:
        masks = [mask for mask in masks if (mask & ~covered).sum() >= 50]
        if not masks:
            break
        gains = [attribution[mask & ~covered].mean() for mask in masks]
        best = masks.pop(int(np.argmax(gains)))
        expected[best & ~covered] = max(gains)
        covered |= best
        taken += 1
    if not covered.all():
        expected[~covered] = attribution[~covered].mean()
    assert taken >= 2
    told = result.extras[0][0]
    assert (told["regions"], told["passes"]) == (taken, 8)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(result.maps[0, 0], expected, atol=1e-4 * np.abs(expected).max())


def test_a_region_that_adds_too_little_is_passed_by_and_the_rest_has_its_mean():
    attribution = np.zeros(300)
    attribution[:100], attribution[100:140], attribution[140:] = 2, 9, np.arange(160)
    candidates = np.zeros((3, 300), bool)
    candidates[0, 20:100] = candidates[1, 60:140] = candidates[2, 120:140] = True
    values, taken = ranked(attribution, sparse.csr_array(candidates.astype(float)))
    assert taken == 1
    np.testing.assert_allclose(values[60:140], (40 * 2 + 40 * 9) / 80)
    np.testing.assert_allclose(values[140:], np.concatenate([attribution[:60], attribution[140:]]).mean())


def test_a_picture_of_one_region_is_flat_and_says_so(make_model):
    result = Explainer(make_model(), method="xrai:steps=2").explain(np.zeros((1, 3, 33, 29), np.float32))
    assert result.statuses[0, 0] == "ok"
    assert result.extras[0][0]["reason"].startswith("flat")


def test_regions_reach_five_pixels_beyond_their_segment():
    segments = np.zeros((20, 20), np.int32)
    segments[9:11, 9:11] = 1
    found = regions([segments]).toarray().astype(bool).reshape(2, 20, 20)
    inner = ndimage.distance_transform_edt(segments != 1) <= 5
    np.testing.assert_array_equal(found[1], inner)
    assert found[0].all()

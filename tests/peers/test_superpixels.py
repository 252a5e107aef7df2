"""LIME's regression, Kernel SHAP's values and XRAI's order against the packages lime, shap and saliency."""

from __future__ import annotations

import numpy as np
import pytest

from heatmill.engine.methods.kernel_shap import coalitions, values_of
from heatmill.engine.methods.lime import nearness, ridge
from heatmill.engine.methods.xrai import SCALES, ranked, regions
from heatmill.kernels import reference
from heatmill.models.superpixels import Segmentation, cut

pytestmark = pytest.mark.peers


def curved(bits: np.ndarray) -> np.ndarray:
    """A score of shown parts that does not just add up."""
    worth = np.random.default_rng(5).normal(size=bits.shape[1])
    return np.tanh(bits @ worth) + bits[:, 0] * bits[:, 1]


def test_the_regression_is_lime_s():
    lime_base = pytest.importorskip("lime.lime_base")
    metrics = pytest.importorskip("sklearn.metrics")
    bits = np.random.default_rng(0).integers(0, 2, (300, 12))
    bits[0], bits[7] = 1, 0
    scores = curved(bits)
    distances = metrics.pairwise_distances(bits, bits[:1], metric="cosine").ravel()
    weights = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    np.testing.assert_allclose(nearness(bits, 0.25), weights, atol=1e-12)
    base = lime_base.LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / 0.25**2)))
    labels = np.stack([1 - scores, scores], axis=1)
    _, found, fit, _ = base.explain_instance_with_data(bits, labels, distances, 1, 12, feature_selection="auto")
    theirs = np.array([value for _, value in sorted(found)])
    ours, share = ridge(bits.astype(float), scores, weights, 1.0)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert share == pytest.approx(fit)


@pytest.mark.parametrize("count", [5, 9])
def test_the_values_over_all_coalitions_are_shap_s(count):
    shap = pytest.importorskip("shap")
    explainer = shap.KernelExplainer(curved, np.zeros((1, count)))
    theirs = explainer.shap_values(np.ones((1, count)), nsamples=5000, l1_reg=False, silent=True)[0]
    bits, weights = coalitions(count, 5000, np.random.default_rng(0))
    empty, whole = curved(np.stack([np.zeros(count), np.ones(count)]))
    ours = values_of(bits.astype(float), weights, curved(bits.astype(float)) - empty, whole - empty)
    np.testing.assert_allclose(ours, theirs, atol=1e-8)


def smooth_picture() -> np.ndarray:
    fields = reference.upsample(np.random.default_rng(2).uniform(0, 255, (3, 9, 9)), (224, 224))
    return fields.transpose(1, 2, 0).astype(np.uint8)


def test_the_regions_and_their_order_are_saliency_s():
    xrai = pytest.importorskip("saliency.core.xrai")
    picture = smooth_picture()
    theirs = xrai._get_segments_felzenszwalb(picture.astype(np.float64), resize_image=False, dilation_rad=5)
    ours = regions([cut(picture, Segmentation("felzenszwalb", scale)) for scale in SCALES])
    np.testing.assert_array_equal(ours.toarray().reshape(-1, 224, 224).astype(bool), np.array(theirs))
    attribution = reference.upsample(np.random.default_rng(3).normal(size=(1, 14, 14)), (224, 224))[0]
    details = xrai.XRAI().GetMaskWithDetails(
        picture.astype(np.float64),
        call_model_function=lambda *given, **named: {},
        segments=list(theirs),
        base_attribution=np.repeat(attribution[:, :, None], 3, axis=2),
        extra_parameters=xrai.XRAIParameters(area_threshold=1.0, algorithm="full"),
    )
    found, taken = ranked(attribution.ravel(), ours)
    np.testing.assert_allclose(found.reshape(224, 224), details.attribution_mask, atol=1e-9)
    assert taken >= 3

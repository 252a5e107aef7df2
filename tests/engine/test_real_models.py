"""Identities that hold for any network, on trained ones and photographs."""

from __future__ import annotations

import numpy as np
import pytest

from heatmill import Explainer

MODELS = ["resnet50", "efficientnet_lite0", "mobilenet_v2", "squeezenet1.1"]
POOLED = MODELS[:3]  # a linear head on the pooled last map


@pytest.fixture
def photographs(shared_data):
    return sorted((shared_data / "images" / "ccby").glob("*.jpg"))[10:12]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", POOLED)
def test_the_cams_are_one_map_up_to_a_factor(shared_data, photographs, name):
    """By the head's weights and by the backward graph, which averages over copies without noise take."""
    path = shared_data / "models" / f"{name}.onnx"
    cells = 49
    plain = Explainer(path, method="cam", batch_size=4).explain(photographs).maps
    for method in ("grad-cam", "hires-cam", "xgrad-cam"):
        by_head = Explainer(path, method=method, batch_size=4).explain(photographs).maps
        assert relative(by_head * cells, plain) < 1e-4
    back = Explainer(path, method="smoothgrad:base=grad-cam,samples=1,noise=0", batch_size=4).explain(photographs).maps
    assert relative(back * cells, plain) < 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in POOLED[::2] else name for name in MODELS]
)
def test_cf_cam_over_the_image_itself_is_zero(shared_data, photographs, name):
    """A blur too narrow to change anything: what a mask shows is the same image, and no score rises."""
    path = shared_data / "models" / f"{name}.onnx"
    call = "cf-cam:ksize=3,sigma=0.1,score=logit"
    result = Explainer(path, method=call, batch_size=16).explain(photographs[:1])
    blurred = Explainer(path, method="cf-cam:score=logit", batch_size=16).explain(photographs[:1])
    assert result.extras[0][0]["passes"] > 1
    assert np.abs(result.maps).max() < 1e-4 * np.abs(blurred.maps).max()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1.1"])
def test_integrated_gradients_sum_to_the_scores_rise(shared_data, photographs, name):
    path = shared_data / "models" / f"{name}.onnx"
    coarse, fine = (
        Explainer(path, method=f"integrated-gradients:steps={steps}", batch_size=16).explain(photographs[:1])
        for steps in (4, 64)
    )
    assert fine.extras[0][0]["completeness_error"] < 0.1
    assert correlation(fine.maps, coarse.maps) > 0.3


@pytest.mark.parametrize("name", POOLED)
def test_deep_relevance_conserves(shared_data, photographs, name):
    """z+ without a bias keeps all of a score on the way to the last layer, whatever it loses further down."""
    path = shared_data / "models" / f"{name}.onnx"
    result = Explainer(path, method="lrp:composite=z-plus,at=layer", batch_size=4).explain(photographs)
    for (extras,) in result.extras:
        assert extras["kept"] == pytest.approx(1, abs=1e-3)

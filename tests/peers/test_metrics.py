"""Metrics beside other packages, where their conventions and ours are the same."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest

from heatmill.engine.evaluator import orders
from heatmill.engine.metrics.localization import box_mask, energy, hits
from heatmill.engine.metrics.robustness import rank_correlation
from heatmill.engine.metrics.statistics import gini
from heatmill.engine.types import Subject
from heatmill.kernels import host, reference
from tests.engine.test_metrics import measured
from tests.peers.test_peers import SIZE, images, model, network  # noqa: F401

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers
RNG = np.random.default_rng(5)


def low_maps(n: int) -> np.ndarray:
    """Low-resolution maps 0..1 without equal values."""
    maps = RNG.random((n, 6, 8))
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return ((maps - low) / (high - low)).astype(np.float32)


# --- torchcam -------------------------------------------------------------------------------------------------


class Given:
    """What torchcam's metrics need of an extractor, giving ready-made maps."""

    def __init__(self, net, maps):
        self.model, self.maps = net, torch.from_numpy(maps)

    def __call__(self, *_, **__):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return nullcontext()


def of_ours(path, metrics, maps, x, targets):
    finished = reference.upsample(maps, SIZE).astype(np.float32)
    given = [[[Subject(each, orders([each], SIZE), 0, np.empty((0, 4)), "no_boxes", {})]] for each in finished]
    found, _ = measured(path, metrics, given, x.numpy(), targets=[(int(target),) for target in targets])
    return {metric: np.array([found[f"{metric} of 0", i][0].value for i in range(len(x))]) for metric in metrics}


def test_average_drop_and_increase_are_torchcams(network, model):  # noqa: F811
    metrics = pytest.importorskip("torchcam.metrics")
    x, maps = images(6), low_maps(6)
    with torch.no_grad():
        targets = network(x).argmax(1)
    theirs = metrics.ClassificationMetric(Given(network, maps), partial(torch.softmax, dim=-1))
    theirs.update(x, targets.tolist())
    ours = of_ours(model, ["average-drop", "increase"], maps, x, targets)
    found = theirs.summary()
    assert 0 < found["avg_drop"] < 1
    assert ours["average-drop"].mean() == pytest.approx(found["avg_drop"], abs=1e-5)
    assert ours["increase"].mean() == found["conf_increase"]


def test_deletion_and_insertion_are_torchcams(network, model):  # noqa: F811
    """Zeros for both, steps that divide the pixels; equal values, which clamped edges have, are ordered otherwise."""
    metrics = pytest.importorskip("torchcam.metrics")
    if not hasattr(metrics, "DeletionInsertionMetric"):
        pytest.skip("this torchcam has no deletion and insertion")
    x, maps, steps = images(4), low_maps(4), 15
    assert SIZE[0] * SIZE[1] % steps == 0
    with torch.no_grad():
        targets = network(x).argmax(1)
    theirs = metrics.DeletionInsertionMetric(Given(network, maps), partial(torch.softmax, dim=-1), steps=steps)
    theirs.update(x, targets.tolist())
    names = ["deletion:steps=15", "insertion:steps=15,baseline=zero"]
    ours = of_ours(model, names, maps, x, targets)
    found = list(theirs.summary().values())
    np.testing.assert_allclose([ours[name].mean() for name in names], found[:2], atol=3e-4)


# --- pytorch-grad-cam -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_roads_filling_is_pytorch_grad_cams(share):
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    size = (40, 53)
    x = reference.upsample(RNG.normal(size=(3, 6, 5)), size).astype(np.float32)
    smooth, rough = reference.upsample(RNG.random((1, 7, 7)), size)[0], RNG.random(size)
    for order in orders([smooth, rough], size)[:2]:
        mask = (order >= share * order.size).astype(np.float32)
        theirs = road.NoisyLinearImputer(noise=0)(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
        ours = host.impute(x, mask[None], np.zeros((1, *x.shape), np.float32))[0]
        np.testing.assert_allclose(ours, theirs, atol=4e-3 * np.abs(x).max())
        assert np.abs(ours - x).max() > 0.1, "there is something to fill"


def test_the_definition_of_filling_is_pytorch_grad_cams():
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    x = RNG.normal(size=(3, 11, 8)).astype(np.float32)
    mask = (RNG.random((11, 8)) > 0.6).astype(np.float32)
    theirs = road.NoisyLinearImputer(noise=0)(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
    ours = reference.impute(x, mask[None], np.zeros((1, *x.shape)))[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- Quantus --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantus():
    return pytest.importorskip("quantus")


def asked(metric, maps, masks=None):
    """A Quantus metric of ready-made maps (n, H, W); no model is looked at."""
    x = np.zeros((len(maps), 3, *maps.shape[1:]), np.float32)
    y = np.zeros(len(maps), int)
    s = None if masks is None else masks[:, None]
    return metric(model=None, x_batch=x, y_batch=y, a_batch=maps[:, None], s_batch=s)


def test_sparseness_is_quantus(quantus):
    maps = RNG.random((5, 20, 24))
    theirs = asked(quantus.Sparseness(normalise=False, abs=True, disable_warnings=True), maps)
    np.testing.assert_allclose([gini(each) for each in maps], theirs, atol=1e-6)


def test_localisation_is_quantus(quantus):
    """Its masks are any pixels; its pointing game has no tolerance."""
    maps = RNG.random((40, 20, 24))
    masks = np.array([box_mask(np.array([[x, y, x + 9, y + 8]]), (20, 24)) for x, y in RNG.integers(0, 12, (40, 2))])
    how = {"normalise": False, "abs": False, "disable_warnings": True}
    pointed = asked(quantus.PointingGame(**how), maps, masks)
    mass = asked(quantus.RelevanceMassAccuracy(**how), maps, masks)
    assert [hits(*each, 0) for each in zip(maps, masks, strict=True)] == [bool(each) for each in pointed]
    assert 0 < np.mean(pointed) < 1
    np.testing.assert_allclose([energy(*each) for each in zip(maps, masks, strict=True)], mass, atol=1e-6)


def test_rank_correlation_is_quantus(quantus):
    a, b = RNG.random((2, 400))
    theirs = quantus.similarity_func.correlation_spearman(a, b)
    assert rank_correlation(a, b, {"sign": "kept"}) == pytest.approx(float(theirs))

"""The attention's loss against finite differences and literal loops, its optimiser against a dense reading of SGD."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from heatmill.kernels import host
from heatmill.kernels.attention import (
    Loss,
    Nesterov,
    attend,
    attend_pairs,
    cross_entropy,
    regularise,
    sigmoid,
    upsample_back,
)

EPSILON = 1e-5


def differences(function, values):
    """Central differences of a function of an array, number by number."""
    found = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        moved = [values.copy(), values.copy()]
        moved[0][place] += EPSILON
        moved[1][place] -= EPSILON
        found[place] = (function(moved[0]) - function(moved[1])) / (2 * EPSILON)
    return found


def test_a_map_is_the_class_row_at_every_place():
    rng = np.random.default_rng(0)
    features, weight, bias = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 4)), rng.normal(size=3)
    own, pairs = attend(features, weight, bias), attend_pairs(features, weight, bias)
    for i, j, p in itertools.product(range(3), range(3), range(6)):
        expected = sum(weight[j, c] * features[i, c, p] for c in range(4)) + bias[j]
        assert pairs[i, j, p] == pytest.approx(expected)
        if i == j:
            assert own[i, p] == pytest.approx(expected)
    np.testing.assert_allclose(sigmoid(own), 1 / (1 + np.exp(-own)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_cross_entropy_and_its_gradient(kind):
    rng = np.random.default_rng(1)
    raw, classes = rng.normal(size=(4, 5)) * 3, np.array([0, 4, 2, 2])
    posteriors = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True) if kind == "softmax" else 1 / (1 + np.exp(-raw))
    value, gradient = cross_entropy(raw, classes, kind)
    np.testing.assert_allclose(value, -np.log(posteriors[range(4), classes]))
    measured = differences(lambda moved: cross_entropy(moved, classes, kind)[0].sum(), raw)
    np.testing.assert_allclose(gradient, measured, atol=1e-8)
    assert np.isfinite(cross_entropy(np.array([[1e4, -1e4]]), np.array([1]), kind)[0]).all()


def literal(maps, images, loss):
    """Area and variation, place by place."""
    area = variation = 0.0
    _, h, w = maps.shape
    for k, y, x in np.ndindex(maps.shape):
        a = maps[k, y, x]
        area += (a + loss.shift) ** loss.power
        if y + 1 < h:
            variation += (maps[k, y + 1, x] - a) ** 2
        if x + 1 < w:
            variation += (maps[k, y, x + 1] - a) ** 2
        variation += loss.border * ((y == 0) + (y == h - 1) + (x == 0) + (x == w - 1)) * a**2
    return loss.area * area / maps.size, loss.variation * variation / (2 * images)


@pytest.mark.parametrize("images", [3, 2])
def test_area_and_variation_and_their_gradient(images):
    maps, loss = np.random.default_rng(2).uniform(0.05, 0.95, size=(3, 4, 3)), Loss(variation=0.3)
    area, variation, gradient = regularise(maps, images, loss)
    np.testing.assert_allclose((area, variation), literal(maps, images, loss))
    measured = differences(lambda moved: sum(regularise(moved, images, loss)[:2]), maps)
    np.testing.assert_allclose(gradient, measured, atol=1e-7)


def test_the_way_back_from_an_upsampled_map_is_its_transpose():
    rng = np.random.default_rng(3)
    maps, beyond = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 13, 17))
    there = (host.upsample(maps, (13, 17)) * beyond).sum()
    assert there == pytest.approx((maps * upsample_back(beyond, (4, 3))).sum(), rel=1e-5)


def dense(values, steps, momentum, decay):
    """SGD as torch.optim.SGD describes it, over every row."""
    velocity = np.zeros_like(values)
    for rate, which, gradients in steps:
        whole = np.zeros_like(values)
        for row, gradient in zip(which, gradients, strict=True):
            whole[row] += gradient
        whole += decay * values
        velocity = momentum * velocity + whole
        values = values - rate * (whole + momentum * velocity)
    return values, velocity


@pytest.mark.parametrize("shape", [(7, 3), (7,)])
def test_rows_that_rest_end_where_a_dense_step_takes_them(shape):
    rng = np.random.default_rng(4)
    values = rng.normal(size=shape)
    steps = []
    for number in range(40):
        which = rng.integers(0, 5, size=4)  # rows 5 and 6 never have a gradient
        steps.append((0.05 if number < 25 else 0.02, which, rng.normal(size=(4, *shape[1:]))))
    sgd = Nesterov(values.copy(), 0.05, momentum=0.9, decay=0.01)
    for number, (rate, which, gradients) in enumerate(steps, 1):
        sgd.set_rate(rate)
        sgd.step(which, gradients)
        if number == 11:
            expected, _ = dense(values, steps[:number], 0.9, 0.01)
            np.testing.assert_allclose(sgd.rows(np.array([6, 0, 6])), expected[[6, 0, 6]], rtol=1e-10)
    expected, velocity = dense(values, steps, 0.9, 0.01)
    np.testing.assert_allclose(sgd.settle(), expected, rtol=1e-10)
    np.testing.assert_allclose(sgd.velocity, velocity, rtol=1e-9, atol=1e-12)

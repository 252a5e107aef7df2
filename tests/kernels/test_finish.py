from __future__ import annotations

import numpy as np
from PIL import Image

from heatmill.kernels.finish import finish, flat, minmax

MAPS = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
SIZE = (20, 17)


def resized(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))


def test_steps_are_taken_in_their_order():
    after = finish(MAPS, ("upsample", "relu", "minmax"), SIZE)
    before = finish(MAPS, ("relu", "minmax", "upsample"), SIZE)
    for i, values in enumerate(MAPS):
        full = np.maximum(resized(values), 0)
        np.testing.assert_allclose(after[i], (full - full.min()) / np.ptp(full), atol=1e-6)
        low = np.maximum(values, 0)
        np.testing.assert_allclose(before[i], resized((low - low.min()) / np.ptp(low)), atol=1e-6)
    assert np.abs(after - before).max() > 0.01


def test_no_step_upsamples_and_nothing_else():
    np.testing.assert_allclose(finish(MAPS, (), SIZE)[1], resized(MAPS[1]), atol=1e-6)


def test_a_flat_map_does_not_become_its_rounding():
    third = np.full((1, 5, 4), 1 / 3, np.float32)
    third[0, 2, 2] += 2e-8
    assert flat(third).all()
    assert flat(np.zeros((1, 2, 2))).all()
    assert not flat(MAPS).any()
    assert not minmax(third).any()
    assert not finish(third, ("upsample", "relu", "minmax"), SIZE).any()

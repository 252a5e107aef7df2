"""What superpixels promise whoever masks by them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from heatmill.models.superpixels import KINDS, Segmentation, cut

SIZES = {"slic": 20, "quickshift": 3, "felzenszwalb": 50}


def halves(height: int, width: int, channels: int) -> np.ndarray:
    picture = np.full((height, width, channels), 30, np.uint8)
    picture[:, width // 2 :] = 220
    return picture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_segments_are_numbered_without_gaps_and_respect_an_edge(kind, channels):
    picture = halves(40, 48, channels)
    segments = cut(picture, Segmentation(kind, SIZES[kind]))
    assert segments.shape == (40, 48)
    assert segments.dtype == np.int32
    assert set(np.unique(segments)) == set(range(segments.max() + 1))
    left, right = np.unique(segments[:, :22]), np.unique(segments[:, 26:])
    assert not set(left) & set(right)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_is_cut_the_same_way(kind):
    picture = np.random.default_rng(0).integers(0, 256, (30, 34, 3)).astype(np.uint8)
    first, second = (cut(picture, Segmentation(kind, SIZES[kind])) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_slic_makes_about_as_many_as_asked_each_in_one_piece():
    rng = np.random.default_rng(1)
    picture = ndimage.gaussian_filter(rng.integers(0, 256, (64, 64, 3)).astype(float), (4, 4, 0)).astype(np.uint8)
    segments = cut(picture, Segmentation("slic", 25))
    assert 12 <= segments.max() + 1 <= 40
    for number in range(segments.max() + 1):
        assert ndimage.label(segments == number, np.ones((3, 3)))[1] == 1

"""Rank correlation, cosine and top overlap against slow readings of their formulas."""

import math

import numpy as np
import pytest

from heatmill.kernels.similarity import cosine, spearman, top_count, top_overlap


def rank(values):
    """1 + how many are less, and half of the others that are equal."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def angle(first, second):
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    lengths = [math.sqrt(math.fsum(a * a for a in values)) for values in (first, second)]
    return dot / (lengths[0] * lengths[1])


def correlation(first, second):
    first, second = ([value - math.fsum(values) / len(values) for value in values] for values in (first, second))
    return angle(first, second)


def shared(first, second, share):
    count = max(1, round(share * len(first)))
    tops = [set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]) for values in (first, second)]
    return len(tops[0] & tops[1]) / count


@pytest.fixture(params=["free", "ties", "signed and sparse"])
def pairs(request):
    """Five pairs of maps of 40 places."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 5, 40)).astype(np.float32)
    if request.param == "ties":
        first, second = np.round(first), np.round(second)
    elif request.param == "signed and sparse":
        first, second = np.maximum(first, 0) * 1e-12, np.minimum(second, 0) * 1e20
    return first, second


def test_rank_correlation(pairs):
    expected = [correlation(rank(a), rank(b)) for a, b in zip(*(each.tolist() for each in pairs), strict=True)]
    np.testing.assert_allclose(spearman(*pairs), expected, atol=1e-12)


def test_cosine(pairs):
    expected = [angle(a, b) for a, b in zip(*(each.tolist() for each in pairs), strict=True)]
    np.testing.assert_allclose(cosine(*pairs), expected, atol=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.15, 0.5, 1])
def test_top_overlap(pairs, share):
    expected = [shared(a, b, share) for a, b in zip(*(each.tolist() for each in pairs), strict=True)]
    assert top_overlap(*pairs, share).tolist() == expected
    assert top_count(40, share) == {0.01: 1, 0.05: 2, 0.15: 6, 0.5: 20, 1: 40}[share]


def test_a_map_with_itself_reversed_and_beside_nothing():
    ramp = np.arange(12, dtype=np.float32)[None]
    assert spearman(ramp, np.exp(ramp)) == pytest.approx(1, abs=1e-12)
    assert spearman(ramp, -ramp) == pytest.approx(-1, abs=1e-12)
    assert cosine(ramp, 7 * ramp) == pytest.approx(1, abs=1e-12)
    assert top_overlap(ramp, -ramp, 0.5) == 0
    tiny = ramp * np.float32(1e-44)
    assert cosine(tiny, tiny) == pytest.approx(1, abs=1e-12)
    level = np.full((1, 12), 3, np.float32)
    assert np.isnan(spearman(ramp, level)).all()
    assert np.isnan(cosine(ramp, 0 * ramp)).all()

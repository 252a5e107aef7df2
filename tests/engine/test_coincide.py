"""Methods asked together run equal pictures once, and say what they say alone."""

from __future__ import annotations

import numpy as np
import pytest

from heatmill.engine.coincide import joined
from heatmill.engine.explainer import Engine
from heatmill.engine.opening import load, open_best
from heatmill.engine.passes import open_passes
from heatmill.engine.types import (
    Bank,
    GridBank,
    Item,
    MapBank,
    PathBank,
    SegmentBank,
    TapBank,
    Target,
    WindowBank,
)
from tests.engine.test_methods import pictures
from tests.graphs import without_scores_in_the_dark

SIZE = (33, 29)
TARGETS = [Target("top", 2), Target("class", 3)]
SLIC = "superpixels=slic,segments=9,baseline=zero"
SEGMENTS = np.arange(35, dtype=np.int32).reshape(5, 7) % 4
RNG = np.random.default_rng(0)


def streamed(path, methods, images, batch_size: int = 16):
    loaded = load(path, methods)
    session = open_best(loaded, batch_size=batch_size)
    passes = open_passes(loaded, session, TARGETS, batch_size)
    engine = Engine(loaded, session, TARGETS, batch_size, seed=5, passes=passes)
    found: dict[str, list] = {}
    for e in engine.stream(Item(i, image) for i, image in enumerate(images)):
        found.setdefault(e.method.text, []).append(e)
    return found, engine.stages.rows


def distinct(path, methods, images) -> int:
    """How many different rows of 0/1 masks the methods ask of all images, by a set of their bytes."""
    loaded = load(path, methods)
    session = open_best(loaded, batch_size=4)
    seen: set[tuple[int, bytes]] = set()

    class Noting(Engine):
        def _submit(self, batch):
            ran = super()._submit(batch)
            for run in batch.runs:
                image = run.key if run.observe else run.key[0]
                seen.update((image, row.tobytes()) for row in self._host.images[run.slots])
            return ran

    engine = Noting(loaded, session, TARGETS, 4, seed=5, passes=open_passes(loaded, session, TARGETS, 4))
    list(engine.stream(Item(i, image) for i, image in enumerate(images)))
    return len(seen)


@pytest.mark.parametrize(
    "methods",
    [
        ["rise:masks=60", "rise:masks=90", "rise:masks=20"],
        [f"lime:samples=40,{SLIC}", f"ablation-ca:samples=64,{SLIC}"],
        [f"kernel-shap:samples=30,{SLIC}", f"ablation-ca:samples=20,score=logit,{SLIC}"],
        ["score-cam", "faster-score-cam", "is-cam:steps=3"],
        ["occlusion:window=12,stride=5", "occlusion:window=12,stride=10", "occlusion:window=9,stride=5"],
    ],
)
def test_methods_together_run_what_they_share_once(make_model, methods):
    path, images = make_model(), pictures(3, SIZE)
    together, rows = streamed(path, methods, images)
    apart = 0
    for method in methods:
        alone, alone_rows = streamed(path, [method], images)
        (name,) = alone
        apart += alone_rows - len(images)
        for one, other in zip(together[name], alone[name], strict=True):
            assert (one.key, one.target, one.extras) == (other.key, other.target, other.extras)
            np.testing.assert_allclose(one.map, other.map, rtol=1e-5, atol=1e-6)
    shared = apart + len(images) - rows
    assert shared > 0
    if "score-cam" not in methods:  # of maps that are scaled, equal ones are also told by their bits
        assert rows <= distinct(path, methods, images) + 2 * len(images), "the whole image may be a row besides"


@pytest.mark.parametrize(
    "methods",
    [
        ["rise:masks=30", "rise:masks=30,p=0.3"],
        ["rise:masks=30", "rise:masks=30,baseline=mean"],
        ["rise:masks=30", "rise:masks=30,cells=5"],
        [f"lime:samples=30,{SLIC}", "lime:samples=30,superpixels=felzenszwalb,baseline=zero"],
    ],
)
def test_methods_that_differ_share_nothing_they_should_not(make_model, methods):
    path, images = make_model(), pictures(2, SIZE)
    together, _ = streamed(path, methods, images)
    for method in methods:
        alone, _ = streamed(path, [method], images)
        (name,) = alone
        for one, other in zip(together[name], alone[name], strict=True):
            np.testing.assert_allclose(one.map, other.map, rtol=1e-5, atol=1e-6)


def test_a_method_that_is_lost_takes_no_other_with_it(make_model):
    """Masked pictures below a brightness give no score: three masks are bright enough, 300 are not."""
    path = make_model()
    without_scores_in_the_dark(path)
    image = np.full((3, *SIZE), 1.5, np.float32)
    for methods in (["rise:masks=3", "rise:masks=300"], ["rise:masks=300", "rise:masks=3"]):
        found, _ = streamed(path, methods, [image])
        assert {e.status for e in found["rise:masks=300"]} == {"nonfinite"}
        assert {e.status for e in found["rise:masks=3"]} == {"ok"}
        alone, _ = streamed(path, ["rise:masks=3"], [image])
        for one, other in zip(found["rise:masks=3"], alone["rise:masks=3"], strict=True):
            np.testing.assert_allclose(one.map, other.map, rtol=1e-5, atol=1e-6)


def some(kind: type) -> tuple[Bank, Bank, list]:
    """Two banks of a kind whose rows 1 and 4, and 0 and 2, are equal, and what tells all their rows apart."""
    n = 6
    if kind is MapBank:
        first, second = RNG.random((n, 2, 3), np.float32), RNG.random((4, 2, 3), np.float32)
        second[2], second[0] = first[0], first[5]
        return MapBank(first), MapBank(second), [*first, *second]
    if kind is GridBank:
        bits = RNG.integers(0, 2, (n + 4, 8, 8), np.uint8)
        offsets = RNG.integers(0, 9, (n + 4, 2)).astype(np.int32)
        bits[n + 2], offsets[n + 2] = bits[0], offsets[0]
        bits[n + 1] = bits[1]  # at another place
        offsets[n + 1] = offsets[1] + 1
        counts = np.arange(n + 4)
        rows = [np.append(b, o) for b, o in zip(bits, offsets, strict=True)]
        cut = slice(0, n), slice(n, None)
        first, second = (GridBank(bits[part], offsets[part], counts[part]) for part in cut)
        return first, second, rows
    if kind is SegmentBank:
        bits = RNG.integers(0, 2, (n + 4, 12), np.uint8)
        bits[n + 3] = bits[n]
        bits[n + 1] = bits[2]
        return SegmentBank(SEGMENTS, bits[:n]), SegmentBank(SEGMENTS, bits[n:]), list(bits)
    boxes = RNG.integers(0, 99, (n + 4, 4)).astype(np.int32)
    boxes[n] = boxes[3]
    return WindowBank(boxes[:n]), WindowBank(boxes[n:]), list(boxes)


@pytest.mark.parametrize("kind", [MapBank, GridBank, SegmentBank, WindowBank])
def test_every_row_is_answered_by_its_equal(kind):
    first, second, rows = some(kind)
    (asked,) = joined({3: (first, "zero"), 1: (second, "zero")})
    assert list(asked.takers) == [3, 1]
    assert len(asked) == len({row.tobytes() for row in rows}) < len(rows)
    names = {MapBank: ["maps"], GridBank: ["bits", "offsets"], SegmentBank: ["bits"], WindowBank: ["boxes"]}[kind]
    for method, bank in ((3, first), (1, second)):
        places = asked.takers[method]
        for name in names:
            np.testing.assert_array_equal(getattr(asked.bank, name)[places], getattr(bank, name))
    apart = joined({3: (first, "zero"), 1: (second, "mean")})
    assert [each.takers for each in apart] == [{3: None}, {1: None}]
    assert [each.bank for each in apart] == [first, second]


def test_what_is_not_compared_stays_apart():
    paths = PathBank(np.ones(2), np.zeros(2))
    taps = TapBank(np.ones((2, 3, 1, 1)))
    other = SegmentBank(SEGMENTS.copy(), np.ones((2, 4), np.uint8))
    banks = [paths, paths, taps, other, SegmentBank(SEGMENTS, other.bits), MapBank(np.ones((2, 2, 2), np.float32))]
    banks.append(MapBank(banks[-1].maps, "mirror"))
    found = joined({i: (bank, "zero") for i, bank in enumerate(banks)})
    assert [each.takers for each in found] == [{i: None} for i in range(len(banks))]

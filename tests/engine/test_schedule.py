from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heatmill.engine.schedule import NETWORK, OBSERVE, Scheduler


def drive(
    scheduler: Scheduler, images: list[tuple[int, int]], rng: random.Random, cancel: float, delay: int, other=NETWORK
):
    """Run a scheduler like the engine does; images are (further rows, requests); -1 rows is an image that fails.

    Every second request of an image goes to the lane `other`.

    Batches finish in any order, `delay` of them late. Returns what was issued per request and what completed.
    """
    waiting = list(enumerate(images))
    issued: dict = {}
    completed, cancelled, flight = [], set(), []
    batches = 0
    while True:
        while waiting and scheduler.wants_images:
            scheduler.add_image(waiting.pop(0)[0])
        batch = scheduler.next_batch()
        batches += 1
        assert batches < 10_000
        if batch:
            slots = [slot for run in batch.runs for slot in range(run.slots.start, run.slots.stop)]
            assert slots == list(range(len(slots))), "slots are dense and disjoint"
            assert len(slots) <= batch.size
            assert all(run.observe for run in batch.runs) or batch.lane != OBSERVE
            flight.append(batch)
        if not batch and not flight:
            break
        while flight and (len(flight) > delay or not batch):
            for run in flight.pop(rng.randrange(len(flight))).runs:
                if run.observe:
                    rows, requests = images[run.key]
                    if rows > 0:
                        for request in range(requests):
                            scheduler.add_rows((run.key, request), rows, other if request % 2 else NETWORK)
                    continue
                if run.key in cancelled:
                    assert not scheduler.complete(run)
                    continue
                issued.setdefault(run.key, []).extend(range(run.start, run.stop))
                if rng.random() < cancel:
                    scheduler.cancel(run.key)
                    cancelled.add(run.key)
                elif scheduler.complete(run):
                    completed.append(run.key)
            batch = batch and ()
    assert not waiting
    return issued, completed, cancelled


@settings(max_examples=200, deadline=None)
@given(
    images=st.lists(st.tuples(st.sampled_from([-1, 0, 1, 2, 5, 31, 32, 33, 100]), st.integers(1, 3)), max_size=25),
    batch_size=st.integers(1, 40),
    expected=st.sampled_from([0, 1, 50, 2048]),
    delay=st.integers(0, 3),
    cancel=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**16),
    apart=st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))),
)
def test_no_row_is_lost_doubled_or_mixed_up(images, batch_size, expected, delay, cancel, seed, apart):
    scheduler = Scheduler(batch_size, expected, {OBSERVE: apart[0], "back": apart[1]} if apart else None)
    other = "back" if apart else NETWORK
    issued, completed, cancelled = drive(scheduler, images, random.Random(seed), cancel, delay, other)
    wanted = {(i, r): rows for i, (rows, requests) in enumerate(images) if rows > 0 for r in range(requests)}
    for key, rows in wanted.items():
        if key in cancelled:
            assert len(set(issued[key])) == len(issued[key])
        else:
            assert sorted(issued[key]) == list(range(rows))
    assert sorted(completed) == sorted(set(wanted) - cancelled)
    assert set(issued) <= set(wanted)


def test_batches_stay_full_over_many_images_of_many_rows():
    rng = random.Random(1)
    scheduler = Scheduler(32, 2048)
    drive(scheduler, [(rng.randint(300, 2048), 1) for _ in range(200)], rng, 0.0, 0)
    assert scheduler.slots_filled / scheduler.slots_issued >= 0.99


def test_one_pass_methods_fill_whole_batches():
    scheduler = Scheduler(32, 0)
    drive(scheduler, [(0, 1)] * 320, random.Random(0), 0.0, 0)
    assert scheduler.slots_issued == scheduler.slots_filled == 320


@pytest.mark.parametrize("expected", [0, 300, 2048])
def test_few_images_are_held_at_once(expected):
    """Memory is bounded by the batch: images are asked for only when their rows are needed."""
    scheduler = Scheduler(32, expected)
    held, most, given = 0, 0, 0
    while given < 100 or held:
        while given < 100 and scheduler.wants_images:
            scheduler.add_image(given)
            given, held = given + 1, held + 1
            most = max(most, held)
        for run in scheduler.next_batch().runs:
            if run.observe and expected:
                scheduler.add_rows((run.key, 0), expected)
            elif run.observe or scheduler.complete(run):
                held -= 1
    assert most <= (3 if expected else 32)


def test_observations_ride_with_masked_rows():
    scheduler = Scheduler(8, 20)
    for key in ("a", "b"):
        scheduler.add_image(key)
    assert [run.observe for run in scheduler.next_batch().runs] == [True, True]
    scheduler.add_rows(("a", 0), 20)
    scheduler.add_image("c")
    scheduler.next_batch()
    batch = scheduler.next_batch().runs
    assert [run.observe for run in batch] == [True, False]
    assert batch[1].slots == slice(1, 8)


def test_rows_are_added_once_and_not_empty():
    scheduler = Scheduler(4, 1)
    scheduler.add_rows("a", 3)
    with pytest.raises(ValueError, match="added twice"):
        scheduler.add_rows("a", 3)
    with pytest.raises(ValueError, match="0 rows"):
        scheduler.add_rows("b", 0)


def test_batches_fill_where_images_bring_fewer_rows_than_expected():
    scheduler = Scheduler(32, 1280)
    drive(scheduler, [(5, 1)] * 400, random.Random(0), 0.0, 0)
    assert scheduler.slots_filled / scheduler.slots_issued >= 0.9


def test_lanes_fill_their_batches_apart():
    """A method with rows in the network and one with rows in a backward graph, observed in batches of 8."""
    rng = random.Random(1)
    scheduler = Scheduler(32, 300, {OBSERVE: 8, "back": 8})
    drive(scheduler, [(rng.randint(20, 300), 2) for _ in range(200)], rng, 0.0, 0, "back")
    assert scheduler.slots_filled / scheduler.slots_issued >= 0.99


def test_few_images_are_held_at_once_where_observations_run_apart():
    scheduler = Scheduler(32, 100, {OBSERVE: 8})
    held, most, given = 0, 0, 0
    while given < 100 or held:
        while given < 100 and scheduler.wants_images:
            scheduler.add_image(given)
            given, held = given + 1, held + 1
            most = max(most, held)
        for run in scheduler.next_batch().runs:
            if run.observe:
                scheduler.add_rows((run.key, 0), 100)
            elif scheduler.complete(run):
                held -= 1
    assert most <= 8 + 1

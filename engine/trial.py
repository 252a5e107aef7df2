"""One short try of a model before anything is planned on it: does it run, does it keep rows apart, how fast is it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import BackendError, ModelError
from ..kernels.device import DeviceArray
from .backends import DeviceSession, Session, choose, open_session
from .backends.base import Profile
from .opening import DEFAULT_BATCH, Loaded, blank_batch, open_best, require_classes, row_shape
from .types import Array

TRIAL_SIZES = (8, 16, 32, 64)
DEVICE_SIZES = (32, 64, 256)  # on a GPU: steps of TensorRT's plans
ROUNDS = 2  # of a batch that is timed; the best counts
SHARE = 0.5  # of a GPU's free memory, what a batch may need of it
TRIAL_SECONDS = 8.0  # a trial batch predicted to take longer is not tried
WORTH = 20 * DEFAULT_BATCH  # rows of planned work from which measuring batch sizes pays
GAIN = 1.03  # a larger batch must be this much faster per row to be worth its memory
TOP = 5  # classes that half precision should leave in front
SLACK = 0.02  # of the range of a row's scores: two that are nearer than this may change places
NO_MEMORY = ("failed to allocate memory", "bad_alloc", "out of memory", "out_of_memory", "alloc_failed")

log = logging.getLogger("heatmill")


@dataclass(frozen=True, slots=True)
class Trial:
    """What one try of a model told: how it will be run, and how fast it is.

    `observe_seconds` and `through_seconds` are what an image's and a row's backward pass takes, where there is one, and
    `head_seconds` what a row takes through the head alone. `notes` is what a user was told of it.
    """

    backend: str
    provider: str
    precision: str
    version: str
    batch_size: int
    free_batch: bool
    classes: int
    rows_per_second: float
    trials: Mapping[int, float] = field(default_factory=dict)
    observe_seconds: float = 0.0
    through_seconds: float = 0.0
    head_seconds: float = 0.0
    notes: tuple[str, ...] = ()


def try_model(
    loaded: Loaded,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    batch_size: int | None = None,
    rows: int = 0,
    threads: int | None = None,
    device: int | None = None,
) -> tuple[Trial, Session]:
    """Open a model and run it on a few synthetic rows.

    Args:
        batch_size: rows per call; None measures which is best, where `rows` (the work planned) is worth it.
        device: number of the GPU; None is the first, where there is one.

    Raises:
        ModelError: scores that depend on the other rows, or are not what the spec says.
        BackendError: nothing on this machine gives the precision, or the runtime refuses the model.
    """
    fixed = loaded.model.input.batch
    free = batch_is_free(loaded, backend, provider, precision, device or 0)

    def opened(size: int) -> Session:
        session = open_best(loaded, backend, provider, precision, size, threads, device or 0)
        if device is not None and not isinstance(session, DeviceSession):
            raise BackendError(
                f"a device is asked for, and {session.backend} ({session.provider}) runs on the processor; give "
                "--backend tensorrt or --provider cuda, or leave --device out"
            )
        if isinstance(session, DeviceSession):  # which takes memory for values when it first runs
            names = [loaded.scores, *([loaded.tap.name] if loaded.tap else [])]
            session.run({loaded.model.input.name: blank_batch(loaded, size)}, names)
        return session

    size = batch_size or DEFAULT_BATCH
    if not free and fixed is not None:
        size = fixed
    asked = size
    size, session = _largest(opened, size, free and batch_size is None)
    notes = (
        [] if size == asked else [f"the memory does not hold a batch of {asked} rows; it is run in batches of {size}"]
    )
    short = session.flexible and free and size != fixed  # a batch may be part-filled
    try:
        apart = _rows_apart(loaded, session, min(size, 2) if short else size)
    except Exception as err:
        if fixed is not None or ran_out_of_memory(err):
            raise
        apart = False  # the graph hard-codes a batch of 1 behind an axis that it calls open
    if not apart:
        if fixed is not None:
            raise ModelError(
                f"{loaded.model.path.name}: in its batch of {fixed}, an image's scores depend on the other images; "
                "export it with a dynamic batch, or a batch of 1"
            )
        size, free, short, session = 1, False, False, opened(1)
    classes = _check(loaded, session, 2 if short and size > 1 else size)
    notes += check_scores(loaded, session, 2 if short and size > 1 else size)
    for note in notes:
        log.warning("%s: %s", loaded.model.path.name, note)
    trials: dict[int, float] = {}
    if free and batch_size is None and rows > WORTH:
        measured = session
        trials = _measure(lambda count: _best(loaded, measured if short else opened(count), count), _sizes(session))
        size = next(count for count, speed in trials.items() if speed * GAIN >= max(trials.values()))
        session, speed = opened(size), trials[size]  # anew: the one that was measured keeps the largest batch's memory
    else:
        count = min(size, 8) if short else size
        speed = count / _best(loaded, session, count)
    found = (session.backend, session.provider, session.precision, session.version, size, free, classes, speed, trials)
    return Trial(*found, notes=tuple(notes)), session


def ran_out_of_memory(err: Exception) -> bool:
    """Whether an error of Python or of a runtime says that no memory was left."""
    text = str(err).lower()
    return isinstance(err, MemoryError) or any(words in text for words in NO_MEMORY)


def _largest(opened: Callable[[int], Session], size: int, smaller: bool) -> tuple[int, Session]:
    """A session for `size` rows; for half as many, again and again, where the memory does not hold them and they may
    be fewer."""
    while True:
        try:
            return size, opened(size)
        except Exception as err:
            if not smaller or size == 1 or not ran_out_of_memory(err):
                raise
            size //= 2


def check_scores(loaded: Loaded, session: Session, rows: int) -> list[str]:
    """Hold a session in half precision, made of a file in fp32, against the file on the CPU in fp32.

    Both score a few smooth random images. Scores that are no longer numbers, or another class in front by more than
    SLACK of the row's range, are refused; one of the first TOP classes lost by more than SLACK is a warning, which is
    returned. Other sessions are not looked at.

    Args:
        rows: rows of a batch of the session.

    Raises:
        BackendError: the scores are not the model's.
    """
    if session.precision not in ("fp16", "bf16") or loaded.own_precision != "fp32":
        return []
    batch, key, count = _smooth_rows(loaded, rows), loaded.model.input.name, min(rows, 4)
    plain = open_session("onnxruntime", loaded.serialized(dynamic=True), Profile(count, provider="cpu"))
    found = session.run({key: batch}, [loaded.scores])[0][:count].reshape(count, -1).astype(np.float64)
    wanted = plain.run({key: batch[:count]}, [loaded.scores])[0].reshape(count, -1).astype(np.float64)
    name, way = f"{loaded.model.path.name}: in {session.precision}", "run it with --precision fp32"
    if np.isfinite(wanted).all() and not np.isfinite(found).all():
        raise BackendError(f"{name} some scores are not numbers; {way}")
    for number, (half, full) in enumerate(zip(found, wanted, strict=True), 1):
        slack = SLACK * (full.max() - full.min())
        if full.max() - full[half.argmax()] > slack:
            raise BackendError(
                f"{name} class {half.argmax()} comes first on trial image {number}, "
                f"in fp32 class {full.argmax()}; {way}"
            )
        least = np.sort(full)[-min(TOP, len(full))]
        if full[np.argsort(half)[-TOP:]].min() < least - slack:
            return [f"in {session.precision} the first {TOP} classes are not those of fp32 on trial image {number}"]
    return []


def batch_is_free(loaded: Loaded, backend: str, provider: str | None, precision: str, device: int = 0) -> bool:
    """Whether the batch axis is open, or can be opened: then rows are packed to any batch size.

    A fixed axis is tried on two random rows: together in one batch, each must score as it does alone in the file as
    it is.
    """
    fixed = loaded.model.input.batch
    if fixed is None:
        return True
    name, door, kind = choose(backend, provider, precision, loaded.own_precision, device)[0]
    rows = _random_rows(loaded, 2)
    key = loaded.model.input.name
    try:
        opened = open_session(
            name, loaded.serialized(dynamic=True), Profile(2, kind, door, device=device, input_shape=row_shape(loaded))
        )
        together = opened.run({key: rows}, [loaded.scores])[0]
    except BackendError:
        return False
    except Exception:  # a runtime's own error on a graph that was not made for this: the file's batch size is kept
        return False
    original = open_session(
        name, loaded.serialized(dynamic=False), Profile(fixed, kind, door, device=device, input_shape=row_shape(loaded))
    )
    alone = [original.run({key: np.repeat(row[None], fixed, axis=0)}, [loaded.scores])[0][0] for row in rows]
    same = len(together) == 2 and np.allclose(together.reshape(2, -1), np.reshape(alone, (2, -1)), rtol=1e-3, atol=1e-4)
    return bool(same)


def _sizes(session: Session) -> Sequence[int]:
    """The batch sizes to try: on a GPU larger ones, as far as its free memory holds what they need."""
    if not isinstance(session, DeviceSession):
        return TRIAL_SIZES
    room = SHARE * session.driver.memory()[0]
    return [rows for rows in DEVICE_SIZES if rows * session.memory_per_row <= room] or DEVICE_SIZES[:1]


def _measure(seconds: Callable[[int], float], sizes: Sequence[int]) -> dict[int, float]:
    """Rows per second by batch size, until a batch would take too long."""
    speeds: dict[int, float] = {}
    for count in sizes:
        if speeds and count / max(speeds.values()) > TRIAL_SECONDS:
            break
        try:
            speeds[count] = count / seconds(count)
        except Exception as err:
            if not speeds or not ran_out_of_memory(err):
                raise
            break
    return speeds


def _best(loaded: Loaded, session: Session, rows: int) -> float:
    """Seconds of a batch; on a GPU the first is not counted, in which libraries choose or make their kernels."""
    first = 1 if isinstance(session, DeviceSession) else 0
    return min([batch_seconds(loaded, session, rows) for _ in range(first + ROUNDS)][first:])


def batch_seconds(loaded: Loaded, session: Session, rows: int) -> float:
    """Seconds of one batch of the network; on a GPU of one that is there already, as in a run."""
    batch = blank_batch(loaded, rows)
    if isinstance(session, DeviceSession):
        return _device_seconds(loaded, session, batch)
    start = time.perf_counter()
    session.run({loaded.model.input.name: batch}, [loaded.scores])
    return time.perf_counter() - start


def _device_seconds(loaded: Loaded, session: DeviceSession, batch: Array) -> float:
    driver, held = session.driver, []

    def room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        array = DeviceArray(0, shape, dtype)
        held.append(driver.alloc(array.nbytes))
        return replace(array, pointer=held[-1])

    try:
        rows = np.ascontiguousarray(batch, session.input_dtype)
        feeds = {loaded.model.input.name: room(rows.shape, rows.dtype)}
        driver.to_device(feeds[loaded.model.input.name].pointer, rows, session.stream)
        ((shape, dtype),) = session.described(feeds, [loaded.scores])
        outputs = {loaded.scores: room(shape, dtype)}
        driver.synchronize(session.stream)
        start = time.perf_counter()
        session.run_on_device(feeds, outputs)
        driver.synchronize(session.stream)
        return time.perf_counter() - start
    finally:
        for pointer in held:
            driver.free(pointer)


def _random_rows(loaded: Loaded, rows: int, scale: float = 1.0) -> Array:
    """Random images in 0 .. `scale`, the same ones at every call; for uint8 networks in pixels."""
    values = np.random.default_rng(0).random(blank_batch(loaded, rows).shape) * scale
    return (values * 255 if loaded.model.input.dtype == "uint8" else values).astype(loaded.model.input.dtype)


def _smooth_rows(loaded: Loaded, rows: int) -> Array:
    """Random images that are smooth, as photographs are, in the network's range, the same ones at every call."""
    low, high = (np.asarray(bound, np.float64) for bound in loaded.bounds)
    (c, h, w), last = loaded.spec.input_size, loaded.model.input.layout == "NHWC"
    grid = np.random.default_rng(0).random((rows, c, 8, 8))
    y, x = (np.linspace(0, 7, side) for side in (h, w))
    across = np.maximum(0, 1 - np.abs(y[:, None] - np.arange(8))), np.maximum(0, 1 - np.abs(x[:, None] - np.arange(8)))
    images = low[:, None, None] + (high - low)[:, None, None] * np.einsum("ncij,hi,wj->nchw", grid, *across)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1) if last else images).astype(loaded.model.input.dtype)


def _rows_apart(loaded: Loaded, session: Session, rows: int) -> bool:
    """Whether the first of `rows` keeps its scores when the others change.

    The others are ten times brighter, which also shows where one scale is computed for the whole batch.
    """
    dark, bright = _random_rows(loaded, rows, 0.1), _random_rows(loaded, rows, 1.0)
    bright[0] = dark[0]
    alone, beside = (
        session.run({loaded.model.input.name: batch}, [loaded.scores])[0].reshape(rows, -1)[0].astype(np.float64)
        for batch in (dark, bright)
    )
    size = float(np.abs(np.nan_to_num(alone)).max())
    return bool(np.allclose(alone, beside, rtol=1e-2, atol=1e-3 * size, equal_nan=True))


def _check(loaded: Loaded, session: Session, rows: int) -> int:
    """What comes out must be what the graph and the spec say. Returns the number of classes."""
    name = loaded.model.path.name
    outputs = [loaded.scores, *([loaded.tap.name] if loaded.tap else [])]
    values = session.run({loaded.model.input.name: _random_rows(loaded, rows)}, outputs)
    raw = values[0].reshape(rows, -1).astype(np.float64)
    require_classes(loaded, raw.shape[1])
    within = bool(np.isfinite(raw).all() and raw.min() >= -1e-3 and raw.max() <= 1 + 1e-3)
    sums_to_one = within and bool(np.abs(raw.sum(axis=1) - 1).max() < 1e-2)
    if loaded.posterior == "none" and loaded.spec.output == "probabilities" and not sums_to_one:
        raise ModelError(f"{name}: the spec says probabilities, and a row of scores sums to {raw[0].sum():.3g}")
    if loaded.posterior == "none" and loaded.spec.output == "sigmoid" and not within:
        raise ModelError(f"{name}: the spec says sigmoid, and the scores reach from {raw.min():.3g} to {raw.max():.3g}")
    if loaded.spec.output == "logits" and raw.shape[1] > 1 and sums_to_one:
        raise ModelError(f"{name}: the spec says logits, and every row sums to 1; say --output probabilities")
    if loaded.tap is not None:
        loaded.tap.to_nchw(values[1])
    return int(raw.shape[1])

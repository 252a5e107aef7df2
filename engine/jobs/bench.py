"""A method's speed beside the bare network's, in one run."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ... import InputError
from ..backends import Profile, Session, open_session, usable_cores
from ..explainer import Engine, Stages
from ..opening import Loaded, blank_batch, load
from ..passes import open_passes
from ..trial import batch_seconds, try_model
from ..types import Item, Target
from .child import settle, shielded
from .sources import list_source
from .worker import prepared_ahead

BARE_SECONDS = 3.0


def bench(
    model: Path,
    inputs: Sequence[Path] = (),
    *,
    method: str = "score-cam",
    limit: int = 4,
    rounds: int = 3,
    batch_size: int | None = None,
    backend: str = "auto",
    provider: str | None = None,
    precision: str = "auto",
    device: int | None = None,
    layer: str | None = None,
    preprocess: str | None = None,
    labels: Path | None = None,
    output: str | None = None,
    scores: str | None = None,
) -> dict[str, Any]:
    """Measure `rounds` times, alternating: the bare network on full batches, then the method over the images.

    Decoding and cutting into superpixels are in the measured time, in threads beside the network as in a run; opening
    the model is not.

    Returns:
        Medians over the rounds; `outside_network` is the share of the method's wall time not spent in the network's
        calls, `slots_filled` the share of batch rows that were real, `peak_mb` the rounds' peak memory over that of
        one which opens the file and runs the bare network on the same batch (None where it can't be opened so).

    Raises:
        HeatmillError: the model, the method, the backend or the input is refused.
    """
    loaded = load(model, [method], layer=layer, preprocess=preprocess, labels=labels, output=output, scores=scores)
    rows = 1 + loaded.calls[0].method.passes(loaded.facts, loaded.calls[0].parameters)
    trial, session = try_model(loaded, backend, provider, precision, batch_size, rows * limit, None, device)
    size = trial.batch_size
    targets = [Target("predicted")]
    passes = open_passes(loaded, session, targets, size)
    loaded.release()
    batch = blank_batch(loaded, size)
    feed = {loaded.model.input.name: batch}
    session.run(feed, [loaded.scores])
    bare: list[float] = []
    speeds: list[float] = []
    outside: list[float] = []
    all_stages: list[Stages] = []
    explained = 0
    bare_peak = _bare_peak(Path(model), session, feed, loaded.scores)
    forget_peak()
    for _ in range(rounds):
        bare.append(_bare(loaded, session, size))
        engine = Engine(loaded, session, targets, size, passes=passes)
        start = time.perf_counter()
        explained = sum(1 for _ in engine.stream(_items(loaded, inputs, limit)))
        wall = time.perf_counter() - start
        speeds.append(wall)
        outside.append(1 - engine.stages.network / wall)
        all_stages.append(engine.stages)
    middle = sorted(range(rounds), key=lambda i: speeds[i])[rounds // 2]
    stages, wall, network = all_stages[middle], speeds[middle], statistics.median(bare)
    return {
        "model": Path(model).name,
        "method": loaded.calls[0].text,
        "backend": session.backend,
        "provider": session.provider,
        "precision": session.precision,
        "version": session.version,
        "machine": platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "batch_size": size,
        "batch_trials": {str(rows): round(speed, 2) for rows, speed in trial.trials.items()},
        "images": explained,
        "rounds": rounds,
        "images_per_second": explained / wall,
        "rows_per_second": stages.rows / wall,
        "bare_rows_per_second": network,
        "of_bare": stages.rows / wall / network,
        "rows_per_image": stages.rows / explained,
        "outside_network": statistics.median(outside),
        "slots_filled": stages.rows / stages.slots,
        "peak_mb": None if bare_peak is None else peak_mb() - bare_peak,
        "seconds": {
            **{name: value for name, value in asdict(stages).items() if isinstance(value, float)},
            "wall": wall,
        },
    }


def _bare(loaded: Loaded, session: Session, size: int) -> float:
    """Rows per second of full batches of ready-made inputs."""
    times: list[float] = []
    while sum(times) < BARE_SECONDS or len(times) < 3:
        times.append(batch_seconds(loaded, session, size))
    return size / statistics.median(times)


def _bare_peak(model: Path, session: Session, feed: dict[str, Any], output: str) -> float | None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    how = (str(model), session.backend, session.provider, session.precision, feed, output)
    child = context.Process(target=_run_bare, args=(theirs, *how), daemon=True)
    with shielded():
        child.start()
    theirs.close()
    try:
        peak: float = ours.recv()
    except EOFError:
        return None
    finally:
        child.join()
    return peak


def _run_bare(
    answer: Connection, model: str, backend: str, provider: str, precision: str, feed: dict[str, Any], output: str
) -> None:
    settle()
    rows = len(next(iter(feed.values())))
    session = open_session(backend, Path(model).read_bytes(), Profile(rows, precision, provider))
    for _ in range(2):
        session.run(feed, [output])
    answer.send(peak_mb())


def _items(loaded: Loaded, inputs: Sequence[Path], limit: int) -> Iterator[Item]:
    if not inputs:
        rng = np.random.default_rng(0)
        blank = blank_batch(loaded, 1)[0]
        for i in range(limit):
            noise = rng.normal(size=blank.shape)
            yield Item(i, (noise * 50 + 127 if blank.dtype == np.uint8 else noise).astype(blank.dtype))
        return
    threads = usable_cores()
    rows = list_source(list(inputs), limit=limit).table.to_pylist()
    with ThreadPoolExecutor(threads) as pool:
        for i, (row, prepared) in enumerate(prepared_ahead(pool, 2 * threads + 2, rows, loaded)):
            if prepared.image is None:
                raise InputError(f"{row['id']}: {prepared.status}: {prepared.error}; bench needs good images")
            yield Item(i, prepared.image, segments=prepared.segments)


def forget_peak() -> None:
    """Begin the peak anew, without what opening and trying the model took (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The process's peak resident memory so far."""
    try:  # getrusage would count what the parent held when it started this process
        status = Path("/proc/self/status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def bench_text(found: dict[str, Any]) -> str:
    """The answer of `bench` for people."""
    seconds = found["seconds"]
    peak = "not known" if found["peak_mb"] is None else f"{found['peak_mb']:+.0f} MB over the bare network's process"
    stages = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    return (
        f"{found['model']}, {found['method']}, {found['backend']} ({found['provider']}) {found['precision']}, "
        f"batch {found['batch_size']}, {found['cores']} cores, median of {found['rounds']} rounds\n"
        f"images/s         {found['images_per_second']:.4g} ({found['rows_per_image']:.1f} rows per image)\n"
        f"rows/s           {found['rows_per_second']:.4g}, bare network {found['bare_rows_per_second']:.4g} "
        f"({found['of_bare']:.1%})\n"
        f"outside network  {found['outside_network']:.2%} of the wall time\n"
        f"slots filled     {found['slots_filled']:.2%}\n"
        f"peak memory      {peak}\n"
        f"seconds          {stages}\n"
    )

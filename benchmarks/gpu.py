"""Everything that only a GPU can tell, by one command; needs no network, and says what is missing.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json [--data ../shared/data] [--only kernels methods]

checks     the kernels against their reference, by the test suite, through each driver that is there
kernels    times of the kernels, beside the bytes they must move at the measured speed of a copy
networks   rows/s of the bare network, inputs on the device, for each backend, provider and precision
methods    Score-CAM, CF-CAM and RISE: images/s, share of the time outside the network (observations and ways back
           count as outside), memory of the GPU that is in use afterwards
peers      pytorch-grad-cam and torchcam on the same GPU: plain, and in half precision, channels last, compiled
accuracy   maps of the other precisions beside those of fp32: rank correlation, cosine, overlap of the top 5%; not
           int8, which needs a quantised file

Every measurement runs in a process of its own and is written at once; started again, only what is missing is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
MODELS = {"resnet50": ("resnet50.onnx", "activation_48"), "efficientnet-lite0": ("efficientnet_lite0.onnx", "head_act")}
METHODS = ("score-cam", "cf-cam", "rise:masks=4000")
ROWS, SIZE, GRID = 256, 224, 7
ROUNDS = 20
Report = dict[str, Any]
How = tuple[str, str, str]  # backend, provider, precision


def driver_of(device: int) -> Any:
    from heatmill.engine.backends.base import open_driver

    return open_driver(device)


def machine(device: int) -> Report:
    """The GPU and the versions; what can't be loaded is told under its name."""
    packages = ("heatmill", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "pycuda")
    versions = {}
    for name in (*packages, "torch", "grad-cam", "torchcam", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    driver = driver_of(device)
    free, total = driver.memory()
    found = {
        "device": driver.device,
        "architecture": driver.architecture,
        "memory_mb": total >> 20,
        "free_mb": free >> 20,
    }
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as err:
        found["nvidia_smi"] = f"missing: {err}"
    return {**found, "packages": versions, "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}


# ---- the kernels


def checks(device: int) -> Report:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--no-header",
        str(HERE.parent / "tests/kernels/test_cuda.py"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    return {"passed": ended.returncode == 0, "said": lines[-6:]}


def timed(driver: Any, stream: int, queue: Callable[[], object]) -> float:
    """Median seconds of one call, by events on the stream."""
    for _ in range(3):
        queue()
    seconds = []
    for _ in range(ROUNDS):
        start, stop = driver.event(), driver.event()
        driver.record(start, stream)
        queue()
        driver.record(stop, stream)
        driver.synchronize(stream)
        seconds.append(driver.seconds(start, stop))
    return statistics.median(seconds)


def copy_bandwidth(driver: Any, stream: int, kernels: Any) -> float:
    """Bytes per second, read and written, of a copy within the device."""
    from cuda.bindings import driver as cuda

    nbytes = 1 << 29
    one, other = (kernels.empty((nbytes,), np.uint8) for _ in range(2))
    seconds = timed(driver, stream, lambda: cuda.cuMemcpyDtoDAsync(other.pointer, one.pointer, nbytes, stream))
    return 2 * nbytes / seconds


def kernels(device: int) -> Report:
    import ml_dtypes

    from heatmill.kernels.cuda import Kernels
    from heatmill.kernels.masks import Grids, Maps, Segments, Windows

    driver = driver_of(device)
    found, stream, rng = Kernels(driver), driver.stream(), np.random.default_rng(0)
    up = partial(found.upload, stream=stream)
    image, blurred = (up(rng.normal(size=(3, SIZE, SIZE)).astype(np.float32)) for _ in range(2))
    maps = up(rng.random((ROWS, GRID, GRID), np.float32))
    bits = up(rng.integers(0, 2, (ROWS, GRID, GRID), np.uint8))
    offsets = up(rng.integers(0, SIZE // GRID, (ROWS, 2)).astype(np.int32))
    ids = up((np.arange(SIZE * SIZE, dtype=np.int32) % 40).reshape(SIZE, SIZE))
    shown = up(rng.integers(0, 2, (ROWS, 40), np.uint8))
    boxes = up(np.tile(np.array([20, 30, 60, 90], np.int32), (ROWS, 1)))
    sources = {
        "maps": Maps(maps),
        "grids": Grids(bits, offsets),
        "segments": Segments(ids, shown),
        "windows": Windows(boxes),
    }
    bandwidth: float | None = None
    results: Report = {}
    try:
        results["copy_bytes_per_second"] = bandwidth = copy_bandwidth(driver, stream, found)
    except ImportError as err:
        results["copy_bytes_per_second"] = f"missing: {err}"

    def note(name: str, nbytes: int, queue: Callable[[], object]) -> None:
        seconds = timed(driver, stream, queue)
        of_copy = None if bandwidth is None else nbytes / seconds / bandwidth
        results[name] = {"seconds": seconds, "bytes": nbytes, "of_copy": of_copy}

    for dtype in (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        out = found.empty((ROWS, 3, SIZE, SIZE), dtype)
        for name, masks in sources.items():
            call = partial(found.blend, image, masks, blurred, "NCHW", out, stream=stream)
            note(f"blend_{name}_{dtype.name}", out.nbytes, call)
    last = up(rng.normal(size=(SIZE, SIZE, 3)).astype(np.float32))
    for dtype in (np.dtype(np.float16), np.dtype(np.uint8)):
        out = found.empty((ROWS, SIZE, SIZE, 3), dtype)
        call = partial(found.blend, last, sources["maps"], None, "NHWC", out, stream=stream)
        note(f"blend_maps_{dtype.name} NHWC", out.nbytes, call)
    pixels = up(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    ready = found.empty((3, SIZE, SIZE), np.float16)
    constants = ([0.5] * 3, [0.25] * 3, "NCHW", np.float16)
    note("normalise to float16", ready.nbytes, partial(found.normalise, pixels, *constants, ready, stream=stream))
    many = up(rng.random((2048, GRID, GRID), np.float32))
    note("extrema of 2048 maps", many.nbytes, partial(found.extrema, many, (SIZE, SIZE), stream=stream))
    note("blur 51", image.nbytes * 4, partial(found.blur, image, 51, 50.0, stream=stream))
    raw = up(rng.normal(size=(ROWS, 1000)).astype(np.float32))
    targets = up(np.zeros((ROWS, 1), np.int32))
    note("softmax and gather", raw.nbytes, partial(found.class_scores, raw, targets, "softmax", stream=stream))
    n = 4000
    grids = up(rng.integers(0, 2, (n, GRID, GRID), np.uint8))
    shifts = up(rng.integers(0, SIZE // GRID, (n, 2)).astype(np.int32))
    weights = up(rng.random((1, n), np.float32))
    call = partial(found.accumulate_grid, grids, shifts, weights, (SIZE, SIZE), stream=stream)
    note(f"sum of {n} RISE masks", grids.nbytes, call)
    return results


# ---- networks and methods


def offers() -> Iterator[How]:
    """Every backend, provider and precision that runs on the GPU here."""
    from heatmill.engine.backends import survey

    for offer in survey():
        if offer.on_device:
            yield from ((offer.backend, offer.provider, kind) for kind in offer.precisions if kind != "int8")


def opened(model: Path, layer: str, method: str, how: How, rows: int, device: int) -> tuple[Any, Any]:
    from heatmill.engine.opening import load, open_best

    loaded = load(model, [method], layer=None if method.startswith("rise") else layer)
    return loaded, open_best(loaded, *how, rows, device=device)


def network_seconds(loaded: Any, session: Any, rows: int) -> float:
    """Seconds of a whole batch, inputs on the device."""
    from heatmill.kernels.cuda import Kernels

    made = Kernels(session.driver)
    shape = (rows, *loaded.spec.input_size)
    feeds = {loaded.model.input.name: made.upload(np.zeros(shape, session.input_dtype), stream=session.stream)}
    ((out, dtype),) = session.described(feeds, [loaded.scores])
    outputs = {loaded.scores: made.empty(out, dtype)}
    return timed(session.driver, session.stream, lambda: session.run_on_device(feeds, outputs))


def network(model: Path, layer: str, how: How, device: int) -> Report:
    loaded, session = opened(model, layer, "rise:masks=2", how, ROWS, device)
    return {"rows_per_second": ROWS / network_seconds(loaded, session, ROWS), "version": session.version}


def items(loaded: Any, data: Path, count: int) -> list[Any]:
    from heatmill.engine.jobs.bench import _items

    return list(_items(loaded, [data / "images" / "ccby"], count))


def maps_of(loaded: Any, session: Any, images: list[Any], device: int) -> tuple[list[Any], Report]:
    from heatmill.engine.explainer import Engine
    from heatmill.engine.passes import open_passes
    from heatmill.engine.types import Target

    class Counting(Engine):
        """Counts the batches of the network alone: a way back is another graph, with a time of its own."""

        alone = 0

        def _submit(self, batch: Any) -> Any:
            self.alone += self._alone(batch)
            return super()._submit(batch)

    targets = [Target("predicted")]
    passes = open_passes(loaded, session, targets, ROWS)
    list(Engine(loaded, session, targets, ROWS, passes=passes).stream(images[:1]))
    engine = Counting(loaded, session, targets, ROWS, passes=passes)
    start = time.perf_counter()
    found = list(engine.stream(images))
    wall = time.perf_counter() - start
    batch = network_seconds(loaded, session, ROWS)
    free, total = session.driver.memory()
    found.sort(key=lambda explanation: explanation.key)
    return found, {
        "images": len(images),
        "images_per_second": len(images) / wall,
        "rows_per_image": engine.stages.rows / len(images),
        "network_seconds_per_batch": batch,
        "outside_network": 1 - engine.alone * batch / wall,
        "device_mb_used_by_all_afterwards": (total - free) >> 20,
        "stages": asdict(engine.stages),
    }


def method(model: Path, layer: str, name: str, how: How, data: Path, count: int, device: int) -> Report:
    loaded, session = opened(model, layer, name, how, ROWS, device)
    return maps_of(loaded, session, items(loaded, data, count), device)[1]


def accuracy(model: Path, layer: str, how: How, data: Path, count: int, device: int) -> Report:
    """Score-CAM's maps in a precision beside fp32's."""
    from scipy.stats import spearmanr

    maps = []
    for kind in ("fp32", how[2]):
        loaded, session = opened(model, layer, "score-cam", (*how[:2], kind), ROWS, device)
        maps.append(maps_of(loaded, session, items(loaded, data, count), device)[0])
        del session
    ranks, cosines, tops, flips = [], [], [], 0
    for whole, half in zip(*maps, strict=True):
        flips += whole.target != half.target
        if whole.map is None or half.map is None or whole.target != half.target:
            continue
        one, other = (np.asarray(each.map, np.float64).ravel() for each in (whole, half))
        ranks.append(spearmanr(one, other).statistic)
        cosines.append(one @ other / np.sqrt(one @ one * (other @ other)))
        k = max(1, round(one.size / 20))
        tops.append(len(set(np.argsort(-one)[:k]) & set(np.argsort(-other)[:k])) / k)
    told = {name: [float(np.median(x)), float(np.min(x))] for name, x in
            (("spearman", ranks), ("cosine", cosines), ("top_5_percent", tops)) if x}  # fmt: skip
    return {"images": len(maps[0]), "compared": len(ranks), "predictions_that_differ": flips, "median_and_least": told}


# ---- peers


def peer(model: Path, layer: str, package: str, way: str, data: Path, count: int, device: int) -> Report:
    """Score-CAM of another package, its images on the GPU; `way` is plain, autocast with channels_last, or compiled."""
    import torch
    from torch_models import import_torchvision, layer_name, torch_model

    from heatmill.engine.opening import load

    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = way != "plain"
    network = torch_model(model).cuda()
    tapped = network.get_submodule(layer_name(layer))
    if way != "plain":
        network = network.to(memory_format=torch.channels_last)
    run = torch.compile(network) if way == "compiled" else network
    images = [torch.from_numpy(item.image)[None].cuda() for item in items(load(model, ["cam"]), data, count + 1)]
    if package == "pytorch-grad-cam":
        import_torchvision()
        from pytorch_grad_cam import ScoreCAM

        cam = ScoreCAM(model=run, target_layers=[tapped])
        cam.batch_size = ROWS
        explain = lambda x: cam(input_tensor=x, targets=None)  # noqa: E731
    else:
        from torchcam.methods import ScoreCAM

        extractor = ScoreCAM(run, target_layer=tapped, batch_size=ROWS, input_shape=(3, SIZE, SIZE))

        def explain(x: Any) -> Any:
            out = run(x)
            return extractor(out.squeeze(0).argmax().item(), out)

    def each(some: list[Any]) -> float:
        start = time.perf_counter()
        with torch.autocast("cuda", torch.float16, enabled=way != "plain"):
            for x in some:
                explain(x)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    each(images[:1])
    return {
        "images_per_second": count / each(images[1:]),
        "peak_mb": torch.cuda.max_memory_allocated() >> 20,
        "batch": ROWS,
        "torch": torch.__version__,
    }


# ---- the report


def tasks(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[..., Report], tuple[Any, ...]]]:
    """Section, name, function and arguments of every measurement."""
    device = options.device
    yield "checks", "kernels", checks, (device,)
    yield "kernels", "all", kernels, (device,)
    known = list(apart(all_offers)) if {"networks", "methods", "accuracy"} & set(options.only) else []
    for name in options.models:
        model, layer = options.data / "models" / MODELS[name][0], MODELS[name][1]
        for how in known:
            yield "networks", f"{name} {' '.join(how)}", network, (model, layer, how, device)
        for how in known:
            for text in METHODS:
                arguments = (model, layer, text, how, options.data, options.images, device)
                yield "methods", f"{name} {text} {' '.join(how)}", method, arguments
        for how in known:
            if how[2] != "fp32" and (*how[:2], "fp32") in known:
                yield "accuracy", f"{name} {' '.join(how)}", accuracy, (model, layer, how, options.data, 20, device)
        for package in ("pytorch-grad-cam", "torchcam"):
            for way in ("plain", "autocast and channels last", "compiled"):
                arguments = (model, layer, package, way, options.data, options.peer_images, device)
                yield "peers", f"{name} {package} {way}", peer, arguments


def all_offers() -> list[How]:
    return list(offers())


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    sections = ["checks", "kernels", "networks", "methods", "accuracy", "peers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, default=16, help="that the methods explain")
    parser.add_argument("--peer-images", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    options = parser.parse_args()
    try:
        report = json.loads(options.json.read_text())
    except FileNotFoundError:
        report = {"command": "python benchmarks/gpu.py"}
    try:
        report["machine"] = apart(machine, options.device)
    except Exception as err:
        raise SystemExit(f"no GPU to measure on: {err}") from None
    for section, name, function, arguments in tasks(options):
        kept = report.setdefault(section, {})
        if section not in options.only or ("missing" not in kept.get(name, {"missing": ""})):
            continue
        try:
            kept[name] = apart(function, *arguments)
        except Exception as err:  # a library, a GPU's memory or a whole process that is lost: told, and gone on
            kept[name] = {"missing": f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"}
        print(section, name, json.dumps(kept[name]), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Times heatmill beside pytorch-grad-cam, torchcam and DIANNA on one network, and compares their maps first.

    python benchmarks/peers.py --model resnet50 --images 3 --json build/peers-resnet50.json
    python benchmarks/peers.py --quick            # a small network, to try the script itself; its times mean nothing
    python benchmarks/peers.py --list             # the rows

Every measurement runs in a fresh process (its peak memory is its own), one after another, rows in turn for each image.
The report is written after each: started again with the same settings, the script measures only what is missing.
`others` is how many cores other processes kept busy meanwhile: anything above 0.05 spoils a time, PyTorch's most.
Nothing is extrapolated: each time is of a whole explanation, on whatever number of images the report says. The peers'
work does not depend on the image (as many passes as channels or masks, always), so that one image is a fair sample.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

Report = dict[str, Any]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = {"resnet50": ("resnet50.onnx", "activation_48"), "efficientnet-lite0": ("efficientnet_lite0.onnx", "head_act")}
SMALL_LAYER = "/8/Relu_output_0"
PACKAGES = ("heatmill", "grad-cam", "torchcam", "dianna", "torch", "onnxruntime", "onnxruntime-ep-openvino", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
CELLS, P_KEEP = 8, 0.5
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One image and all that a row may need; `softmax_model` is the same network with its posteriors as output."""

    model: Path
    softmax_model: Path
    layer: str
    image: np.ndarray  # (1, 3, H, W) float32, normalised
    masks: int
    batches: tuple[int, ...]
    torchvision: bool
    fastest: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Something measured: `needs` is a processor flag, `peer` marks the slow ones that `--peer-images` limits."""

    about: str
    measure: Callable[[Case], Report]
    needs: str = ""
    peer: bool = True


# ---- the clock


def busy_seconds() -> float:
    """Processor time of everything on this machine since it started, time stolen by its host included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Seconds from its making to `opened` and from there to `stop`, and how many cores others kept busy in these."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def opened(self) -> None:
        self.busy, self.own = busy_seconds(), time.process_time()
        self.open = time.perf_counter()

    def stop(self) -> Report:
        seconds = time.perf_counter() - self.open
        others = busy_seconds() - self.busy - (time.process_time() - self.own)
        busy = round(max(others, 0) / seconds, 2)
        return {"setup_seconds": self.open - self.start, "seconds": seconds, "other_cores_busy": busy}


# ---- heatmill


def explain(case: Case, model: Path, method: str, precision: str = "fp32") -> tuple[Any, Report]:
    from heatmill import Explainer

    layer = case.layer if method.startswith(("score-cam", "ablation-cam")) else None
    watch = Watch()
    explainer = Explainer(model, method=method, layer=layer, precision=precision)
    watch.opened()
    result = explainer.explain(case.image)
    saliency = result.saliency()[0, 0]
    run = watch.stop()
    extras = dict(result.extras[0][0])
    return result, {**run, "target": int(result.targets[0, 0]), "extras": extras, "map": saliency}


def heatmill_score_cam(variant: str, precision: str = "fp32") -> Callable[[Case], Report]:
    return lambda case: explain(case, case.model, f"score-cam:variant={variant}", precision)[1]


def heatmill_ablation_cam(case: Case) -> Report:
    return explain(case, case.model, "ablation-cam")[1]


def rise_method(case: Case) -> str:
    return f"rise:masks={case.masks},cells={CELLS},p={P_KEEP}"


def heatmill_rise(precision: str = "fp32") -> Callable[[Case], Report]:
    def measure(case: Case) -> Report:
        result, run = explain(case, case.softmax_model, rise_method(case), precision)
        return {**run, "map": result.maps[0, 0]}

    return measure


# ---- pytorch-grad-cam and torchcam


def keep_memory() -> None:
    """Have the allocator keep what is freed: torch maps every large tensor anew, half the time of a small network.

    PyTorch's tuning guide reaches the same by preloading another allocator.
    """
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise OSError("mallopt refuses its thresholds")


def at_best(case: Case, precision: str) -> tuple[Any, int]:
    """The network, its batches run the fastest way of row `forward/kept-memory`, one image plainly for the hooks."""
    import torch
    from torch_models import fast_forward, torch_model

    keep_memory()
    best = case.fastest[precision]
    plain = torch_model(case.model)
    fast = fast_forward(plain, best["forward"], torch.from_numpy(case.image).repeat(best["batch"], 1, 1, 1))

    class AtBest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = plain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x) if len(x) == 1 else fast(x)

    model = AtBest().eval()
    model(torch.from_numpy(case.image).repeat(best["batch"], 1, 1, 1))  # compiled before the clock starts
    return model, best["batch"]


def grad_cam(precision: str = "") -> Callable[[Case], Report]:
    """pytorch-grad-cam's ScoreCAM; without a precision as its README uses it, else at its best in that precision."""

    def measure(case: Case) -> Report:
        import torch
        from torch_models import import_torchvision, layer_name, torch_model

        import_torchvision()
        from pytorch_grad_cam import ScoreCAM

        watch = Watch()
        model, batch = at_best(case, precision) if precision else (torch_model(case.model), 16)
        layer = model.get_submodule(("network." if precision else "") + layer_name(case.layer))
        x = torch.from_numpy(case.image)
        watch.opened()
        with ScoreCAM(model=model, target_layers=[layer]) as cam:
            if precision:
                cam.batch_size = batch
            saliency = cam(input_tensor=x, targets=None)[0]
            target = int(cam.outputs.argmax())
        run = watch.stop()
        return {**run, "target": target, "extras": {"batch": batch, **case.fastest.get(precision, {})}, "map": saliency}

    return measure


def grad_cam_ablation(case: Case) -> Report:
    """pytorch-grad-cam's AblationCAM as its README uses it: batch 32, a pass through the whole network per channel."""
    import torch
    from torch_models import import_torchvision, layer_name, torch_model

    import_torchvision()
    from pytorch_grad_cam import AblationCAM

    watch = Watch()
    model = torch_model(case.model)
    x = torch.from_numpy(case.image)
    watch.opened()
    with AblationCAM(model=model, target_layers=[model.get_submodule(layer_name(case.layer))]) as cam:
        saliency = cam(input_tensor=x, targets=None)[0]
        target = int(cam.outputs.argmax())
    run = watch.stop()
    return {**run, "target": target, "extras": {"batch": cam.batch_size}, "map": saliency}


def torchcam(precision: str = "") -> Callable[[Case], Report]:
    """torchcam's ScoreCAM; without a precision as its README uses it, else at its best in that precision."""

    def measure(case: Case) -> Report:
        import torch
        from torch_models import layer_name, torch_model
        from torchcam.methods import ScoreCAM

        watch = Watch()
        model, batch = at_best(case, precision) if precision else (torch_model(case.model), 32)
        x = torch.from_numpy(case.image)
        options = {"batch_size": batch, "target_layer": "network." + layer_name(case.layer)} if precision else {}
        watch.opened()
        with ScoreCAM(model, input_shape=tuple(x.shape[1:]), **options) as extractor:
            out = model(x)
            target = out.squeeze(0).argmax().item()
            maps = extractor(target, out)[0][None]
            layer = extractor.target_names[0]
        run = watch.stop()
        saliency = torch.nn.functional.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)
        extras = {"batch": batch, "layer": layer, **case.fastest.get(precision, {})}
        return {**run, "target": target, "extras": extras, "map": saliency[0, 0].detach().numpy()}

    return measure


# ---- DIANNA


def dianna_rise(one_session: bool = False, same_masks: bool = False) -> Callable[[Case], Report]:
    """DIANNA's RISE; it opens the file anew for every batch unless it is given a function that holds one session."""

    def measure(case: Case) -> Report:
        import dianna
        import dianna.methods.rise_image as module
        import onnxruntime

        watch = Watch()
        model = str(case.softmax_model)
        if one_session:
            session = onnxruntime.InferenceSession(str(case.softmax_model))
            name = session.get_inputs()[0].name

            def model(rows: np.ndarray) -> np.ndarray:
                return session.run(None, {name: rows})[0]

        if same_masks:
            drawn = heatmill_masks(case)
            module.generate_interpolated_float_masks_for_image = lambda *_: drawn
        target = top_class(case)
        options = {"n_masks": case.masks, "feature_res": CELLS, "p_keep": P_KEEP}
        watch.opened()
        maps = dianna.explain_image(model, case.image[0], "RISE", [target], axis_labels={0: "channels"}, **options)
        run = watch.stop()
        return {**run, "target": target, "extras": {"batch": 100}, "map": np.asarray(maps[0])}

    return measure


def top_class(case: Case) -> int:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(case.model))
    return int(session.run(None, {session.get_inputs()[0].name: case.image})[0].argmax())


def heatmill_masks(case: Case) -> np.ndarray:
    """The grids and offsets that heatmill draws, enlarged by DIANNA's own code (n, H, W, 1)."""
    from dianna.utils.maskers import _upscale

    from heatmill.engine.methods.rise import share
    from heatmill.engine.opening import load

    loaded = load(case.softmax_model, [rise_method(case)])
    bank = share(loaded.facts, loaded.calls[0].parameters, 0)
    height, width = case.image.shape[2:]
    size = [(CELLS + 1) * np.ceil(side / CELLS) for side in (height, width)]
    cut = [
        _upscale(grid.astype(np.float32), size)[y : y + height, x : x + width]
        for grid, (y, x) in zip(bank.bits, bank.offsets, strict=True)
    ]
    return np.stack(cut).astype(np.float32)[..., None]


# ---- the network alone


def forwards_with_kept_memory(case: Case) -> Report:
    keep_memory()
    return forwards(case)


def forwards(case: Case) -> Report:
    """Images per second of the network alone, each way in turn, and how far its scores are from plain PyTorch's."""
    import onnxruntime
    import torch
    from torch_models import FORWARDS, fast_forward, import_torchvision, torch_model

    watch = Watch()
    model = torch_model(case.model)
    session = onnxruntime.InferenceSession(str(case.model))
    name = session.get_inputs()[0].name
    generator = torch.Generator().manual_seed(0)
    ways: dict[tuple[str, int], Callable[[], Any]] = {}
    off: dict[tuple[str, int], float] = {}
    failed: dict[str, str] = {}
    for batch in case.batches:
        masks = torch.rand(batch, 1, *case.image.shape[2:], generator=generator)
        x = torch.from_numpy(case.image) * masks
        with torch.no_grad():
            scores = model(x)
        ways["onnxruntime-fp32", batch] = lambda x=x: session.run(None, {name: x.numpy()})[0]
        for forward in FORWARDS:
            try:
                fast = fast_forward(model, forward, x)
                fast(x)
            except Exception as err:
                failed[forward] = f"{type(err).__name__}: {err}".splitlines()[0]
                continue
            ways[forward, batch] = lambda fast=fast, x=x: fast(x)
        if case.torchvision:
            resnet = import_torchvision().models.resnet50().eval()
            ways["torchvision-resnet50-random-weights-fp32", batch] = torch.no_grad()(
                lambda resnet=resnet, x=x: resnet(x)
            )
        for way, run in ways.items():
            if way[1] == batch and "random-weights" not in way[0]:
                off[way] = float(np.abs(np.asarray(run()) - scores.numpy()).max())
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    watch.opened()
    for _ in range(ROUNDS):
        for way, run in ways.items():
            begun = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begun)
    run = watch.stop()
    table = [
        {
            "forward": way[0],
            "batch": way[1],
            "images_per_second": way[1] / statistics.median(times),
            "max_abs_diff": off.get(way),
        }
        for way, times in seconds.items()
    ]
    fastest = {}
    for precision in ("fp32", "bf16"):
        fit = [line for line in table if line["forward"] in FORWARDS and line["forward"].endswith(precision)]
        if fit:
            fastest[precision] = max(fit, key=lambda line: line["images_per_second"])
    return {**run, "table": table, "fastest": fastest, "failed": failed}


ROWS: dict[str, Row] = {
    "forward": Row("the network alone in ONNX Runtime and eight ways in PyTorch", forwards),
    "forward/kept-memory": Row(
        "the same, the allocator keeping freed memory; finds what is best for the peers", forwards_with_kept_memory
    ),
    "heatmill/grad-cam": Row("Score-CAM as pytorch-grad-cam defines it", heatmill_score_cam("grad-cam"), peer=False),
    "heatmill/torchcam": Row("Score-CAM as torchcam defines it", heatmill_score_cam("torchcam"), peer=False),
    "heatmill/official": Row("Score-CAM as its authors' code defines it", heatmill_score_cam("official"), peer=False),
    "heatmill/grad-cam/bf16": Row("in bf16", heatmill_score_cam("grad-cam", "bf16"), "amx_bf16", peer=False),
    "heatmill/torchcam/bf16": Row("in bf16", heatmill_score_cam("torchcam", "bf16"), "amx_bf16", peer=False),
    "heatmill/official/bf16": Row("in bf16", heatmill_score_cam("official", "bf16"), "amx_bf16", peer=False),
    "pytorch-grad-cam/readme": Row("ScoreCAM as its README has it: batch 16", grad_cam()),
    "pytorch-grad-cam/best-fp32": Row("ScoreCAM over the fastest fp32 forward, memory kept", grad_cam("fp32")),
    "pytorch-grad-cam/best-bf16": Row("ScoreCAM over the fastest bf16 forward, memory kept", grad_cam("bf16")),
    "torchcam/readme": Row("ScoreCAM as its README has it: batch 32, layer found by itself", torchcam()),
    "torchcam/best-fp32": Row("ScoreCAM over the fastest fp32 forward, memory kept", torchcam("fp32")),
    "torchcam/best-bf16": Row("ScoreCAM over the fastest bf16 forward, memory kept", torchcam("bf16")),
    "heatmill/ablation-cam": Row("Ablation-CAM; here the head is linear: no passes", heatmill_ablation_cam, peer=False),
    "pytorch-grad-cam/ablation-cam": Row("AblationCAM as its README has it: batch 32", grad_cam_ablation),
    "heatmill/rise": Row("RISE", heatmill_rise(), peer=False),
    "heatmill/rise/bf16": Row("RISE in bf16", heatmill_rise("bf16"), "amx_bf16", peer=False),
    "dianna/readme": Row("RISE given the file, as its README has it, p_keep fixed", dianna_rise()),
    "dianna/one-session": Row("RISE given a function that holds one session", dianna_rise(one_session=True)),
    "dianna/same-masks": Row(
        "as one-session with heatmill's masks, for its map", dianna_rise(one_session=True, same_masks=True)
    ),
}
SAME_MAPS = (
    ("heatmill/grad-cam", "pytorch-grad-cam/readme"),
    ("heatmill/grad-cam", "pytorch-grad-cam/best-bf16"),
    ("heatmill/grad-cam/bf16", "pytorch-grad-cam/readme"),
    ("heatmill/torchcam", "torchcam/readme"),
    ("heatmill/torchcam", "torchcam/best-bf16"),
    ("heatmill/torchcam/bf16", "torchcam/readme"),
    ("heatmill/ablation-cam", "pytorch-grad-cam/ablation-cam"),
    ("heatmill/rise", "dianna/same-masks"),
    ("heatmill/rise", "dianna/readme"),
    ("heatmill/rise/bf16", "heatmill/rise"),
)
SAME_WORK = (
    ("heatmill/grad-cam", "pytorch-grad-cam/readme"),
    ("heatmill/grad-cam", "pytorch-grad-cam/best-fp32"),
    ("heatmill/grad-cam", "pytorch-grad-cam/best-bf16"),
    ("heatmill/grad-cam/bf16", "pytorch-grad-cam/readme"),
    ("heatmill/grad-cam/bf16", "pytorch-grad-cam/best-bf16"),
    ("heatmill/torchcam", "torchcam/readme"),
    ("heatmill/torchcam", "torchcam/best-fp32"),
    ("heatmill/torchcam", "torchcam/best-bf16"),
    ("heatmill/torchcam/bf16", "torchcam/readme"),
    ("heatmill/torchcam/bf16", "torchcam/best-bf16"),
    ("heatmill/ablation-cam", "pytorch-grad-cam/ablation-cam"),
    ("heatmill/rise", "dianna/readme"),
    ("heatmill/rise", "dianna/one-session"),
    ("heatmill/rise/bf16", "dianna/one-session"),
)


# ---- one measurement, in a process of its own


def measure_row(row: str, case: Case) -> Report:
    """A row's report on one image, with the peak memory of the process."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # the peers' bars
        report = ROWS[row].measure(case)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"at": at, "peak_rss_mib": round(peak / 1024), **report}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- inputs


def small_network(path: Path) -> None:
    from torch_models import save_small_network

    save_small_network(path)
    spec = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}
    path.with_suffix(".json").write_text(json.dumps(spec))


def photographs(model: Path, folder: Path, count: int) -> dict[str, np.ndarray]:
    """Network inputs (1, 3, H, W) of photographs spread evenly over the folder."""
    from heatmill.models.find_spec import find_spec
    from heatmill.models.load import open_model
    from heatmill.models.preprocess import decode, normalise, view

    spec, _ = find_spec(open_model(model))
    paths = sorted(folder.rglob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder}: no photographs; give --data")
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    return {path.name: normalise(view(decode(path.read_bytes()), spec)[0], spec, "float32")[None] for path in chosen}


def with_softmax(model: Path, path: Path) -> None:
    """The network with a softmax at its end and its spec beside it: DIANNA explains whatever the file puts out."""
    import onnx

    from heatmill.models.find_spec import find_spec
    from heatmill.models.load import open_model

    spec, _ = find_spec(open_model(model))
    proto = onnx.load(model)
    logits = proto.graph.output[0]
    proto.graph.node.append(onnx.helper.make_node("Softmax", [logits.name], ["posteriors"], axis=-1))
    logits.name = "posteriors"
    onnx.save(proto, path)
    path.with_suffix(".json").write_text(json.dumps({**spec.to_json(), "output": "probabilities"}))


def threads() -> Report:
    import torch

    from heatmill.engine.backends import usable_cores

    return {"heatmill": usable_cores(), "torch": torch.get_num_threads(), "DIANNA": "onnxruntime's default"}


def machine() -> Report:
    """The processor and the versions, which a resumed report must share."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in cpuinfo if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": {flag: flag in flags for flag in FLAGS},
        "threads": apart(threads),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(),
        "versions": {name: installed.get(name, "not installed") for name in PACKAGES},
    }


# ---- the report


def compare(ours: np.ndarray, theirs: np.ndarray) -> Report:
    """Cosine, greatest difference and Spearman's rank correlation of two maps."""
    from scipy.stats import rankdata

    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    spearman = float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    return {"cosine": cosine, "max_abs_diff": float(np.abs(a - b).max()), "spearman": spearman}


def summarise(report: Report, maps: Path) -> None:
    """The comparisons and ratios of what has been measured so far."""
    runs: dict[str, dict[str, Report]] = report["runs"]
    report["maps"] = [
        {
            "ours": ours,
            "theirs": theirs,
            "image": image,
            **compare(*(load_map(maps, row, image) for row in (ours, theirs))),
        }
        for ours, theirs in SAME_MAPS
        for image in runs.get(ours, {})
        if image in runs.get(theirs, {})
    ]
    report["times"] = {
        row: {
            "n": len(images),
            "median_seconds": statistics.median(run["seconds"] for run in images.values()),
            "median_setup_seconds": statistics.median(run["setup_seconds"] for run in images.values()),
            "peak_rss_mib": max(run["peak_rss_mib"] for run in images.values()),
            "other_cores_busy": max(run["other_cores_busy"] for run in images.values()),
            "passes": [run["extras"]["passes"] for run in images.values() if "passes" in run["extras"]],
        }
        for row, images in runs.items()
        if not row.startswith("forward") and images
    }
    times = report["times"]
    report["ratios"] = [
        {
            "ours": ours,
            "theirs": theirs,
            "times_faster": times[theirs]["median_seconds"] / times[ours]["median_seconds"],
            "n": [times[ours]["n"], times[theirs]["n"]],
        }
        for ours, theirs in SAME_WORK
        if ours in times and theirs in times
    ]


def map_path(maps: Path, row: str, image: str) -> Path:
    return maps / f"{row.replace('/', '.')}.{Path(image).stem}.npy"


def load_map(maps: Path, row: str, image: str) -> np.ndarray:
    return np.load(map_path(maps, row, image))


def write(report: Report, path: Path) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(report, indent=1))
    os.replace(unfinished, path)


def show(report: Report) -> None:
    print(json.dumps({"settings": report["settings"], "machine": report["machine"]}, indent=1))
    print("\nMaps (ours, theirs, image): cosine, max abs diff, Spearman")
    for line in report["maps"]:
        found = f"{line['cosine']:.7f}  {line['max_abs_diff']:.2e}  {line['spearman']:.6f}"
        print(f"  {line['ours']:24} {line['theirs']:28} {line['image']:24} {found}")
    for row in ("forward", "forward/kept-memory"):
        run = report["runs"].get(row, {}).get("all")
        if run is None:
            continue
        print(f"\nThe network alone, median of {ROUNDS} ({row}; others {run['other_cores_busy']:.2f})")
        for line in run["table"]:
            off = "" if line["max_abs_diff"] is None else f"  max abs diff of scores {line['max_abs_diff']:.1e}"
            print(f"  {line['forward']:42} batch {line['batch']:3} {line['images_per_second']:8.1f} images/s{off}")
        for forward, reason in run["failed"].items():
            print(f"  {forward:42} failed: {reason}")
    print("\nTimes per image: median seconds (opening not counted), n, peak MiB, cores that others kept busy, passes")
    for row, line in report["times"].items():
        found = f"{line['median_seconds']:9.2f} s  n={line['n']}  {line['peak_rss_mib']} MiB"
        found += f"  others {line['other_cores_busy']:.2f}"
        print(f"  {row:28} {found}  {line['passes'] or ''}")
    for row, reason in report["missing"].items():
        print(f"  not measured: {row}: {reason}")
    if report["settings"]["model"] == "quick":
        print("\nNo ratios: the times of the small network mean nothing")
        return
    print("\nRatios of median times (n ours, n theirs)")
    for line in report["ratios"]:
        print(f"  {line['ours']:24} {line['times_faster']:6.2f} x faster than {line['theirs']} {tuple(line['n'])}")


# ---- the command


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet50")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with models/ and images/")
    parser.add_argument("--images", type=int, default=3, help="photographs for heatmill's rows")
    parser.add_argument("--peer-images", type=int, default=1, help="photographs for the peers' rows, the first of them")
    parser.add_argument("--masks", type=int, default=1000, help="RISE masks")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64], help="batch sizes that the forward rows try"
    )
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), metavar="ROW", help="rows, or beginnings of their names"
    )
    parser.add_argument(
        "--json", type=Path, help="the report, default build/peers-MODEL.json; OUT.maps/ lies beside it"
    )
    parser.add_argument("--quick", action="store_true", help="a small network and noise, to try the script itself")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    return parser.parse_args()


def open_report(path: Path, settings: Report) -> Report:
    """The report to go on with; refused if it was made elsewhere or otherwise."""
    fresh: Report = {"settings": settings, "machine": machine(), "runs": {}, "missing": {}}
    if not path.exists():
        return fresh
    report: Report = json.loads(path.read_text())
    for part in ("settings", "machine"):
        differing = [key for key, value in fresh[part].items() if report[part].get(key) != value]
        if differing:
            raise SystemExit(f"{path} was measured with another {', '.join(differing)}; give another --json")
    return report


def main() -> None:
    args = options()
    if args.list:
        print("\n".join(f"{row:28} {entry.about}" for row, entry in ROWS.items()))
        return
    rows = [row for row in ROWS if any(row == asked or row.startswith(asked + "/") for asked in args.rows)]
    if not rows:
        raise SystemExit(f"no such row; known: {', '.join(ROWS)}")
    name = "quick" if args.quick else args.model
    out = (args.json or Path("build") / f"peers-{name}.json").absolute()
    maps = out.with_suffix(".maps")
    maps.mkdir(parents=True, exist_ok=True)
    if args.quick:
        model, layer = maps / "small.onnx", SMALL_LAYER
        apart(small_network, model)
        noise = np.random.default_rng(0).standard_normal((args.images, 1, 3, 64, 64), dtype=np.float32)
        images = {f"noise-{i}": image for i, image in enumerate(noise)}
    else:
        model, layer = args.data / "models" / MODELS[args.model][0], MODELS[args.model][1]
        images = apart(photographs, model, args.data / "images", args.images)
    softmax_model = maps / f"{model.stem}-softmax.onnx"
    apart(with_softmax, model, softmax_model)
    settings = {
        "model": name,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "images": list(images),
        "masks": args.masks,
        "cells": CELLS,
        "p_keep": P_KEEP,
        "batches": args.batches,
    }
    report = open_report(out, settings)
    first = Case(
        model, softmax_model, layer, next(iter(images.values())), args.masks, tuple(args.batches), not args.quick
    )
    todo = [(row, "all", first) for row in rows if row.startswith("forward")]
    for i, (image, array) in enumerate(images.items()):
        for row in rows:
            if not row.startswith("forward") and (i < args.peer_images or not ROWS[row].peer):
                todo.append((row, image, replace(first, image=array)))
    for row, image, case in todo:
        if image in report["runs"].get(row, {}):
            continue
        step(report, maps, row, image, case)
        summarise(report, maps)
        write(report, out)
    show(report)
    print(f"\n{out}", file=sys.stderr)


def step(report: Report, maps: Path, row: str, image: str, case: Case) -> None:
    """Measure a row on an image into the report, or say why not."""
    fastest = report["runs"].get("forward/kept-memory", {}).get("all", {}).get("fastest", {})
    precision = row.rpartition("best-")[2]
    if ROWS[row].needs and not report["machine"]["flags"][ROWS[row].needs]:
        report["missing"][row] = f"no {ROWS[row].needs} on this processor"
        return
    if "/best-" in row and precision not in fastest:
        report["missing"][row] = "needs row forward/kept-memory first"
        return
    print(f"{time.strftime('%H:%M:%S')} {row} {image}", file=sys.stderr)
    try:
        run = apart(measure_row, row, replace(case, fastest=fastest))
    except Exception as err:
        report["missing"][row] = f"{type(err).__name__}: {err}".splitlines()[0]
        return
    report["missing"].pop(row, None)
    if "map" in run:
        np.save(map_path(maps, row, image), run.pop("map"))
    report["runs"].setdefault(row, {})[image] = run


if __name__ == "__main__":
    main()

"""What following scores back costs: backward graphs beside the bare network, and beside PyTorch's packages.

    python benchmarks/backward.py --model resnet50 --json build/backward-resnet50.json
    python benchmarks/backward.py --rows ours/grad-cam ours/gradient      # some rows only

Every row runs in a fresh process. Ours time the bare network and the backward graph in turn on the same batch; `ratio`
is of their medians. The peers explain the same batch of photographs with the same weights on torch CPU in fp32; their
seconds are compared by image. `memory` is how the peak grows with the batch, beside what the graph's forward values
take. `bench` rows are `heatmill bench` on a photograph. Run it on a quiet machine: `others` is how many
cores other processes kept busy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import DATA, MODELS, Watch, apart, machine, photographs, write

ROUNDS = 7
Report = dict[str, Any]

OURS = {
    "ours/grad-cam": ("grad-cam", 32),
    "ours/grad-cam-graph": ("grad-cam without its head's closed form", 32),
    "ours/gradient": ("saliency", 8),
    "ours/gradient-32": ("saliency", 32),
    "ours/epsilon-plus": ("lrp:composite=epsilon-plus", 8),
    "ours/z-plus": ("lrp:composite=z-plus", 8),
    "ours/clrp": ("clrp", 8),
    "ours/deep-tap": ("lrp:composite=epsilon-plus,at=layer", 32),
}
SAME_WORK = {
    "peers/pytorch-grad-cam": "ours/grad-cam",
    "peers/captum-saliency": "ours/gradient",
    "peers/zennit-epsilon-plus": "ours/epsilon-plus",
}


def batch_of(model: Path, data: Path, count: int) -> np.ndarray:
    return np.concatenate(list(photographs(model, data / "images", count).values()))


def ours(model: Path, layer: str, batch: np.ndarray, method: str) -> Report:
    """Medians of the bare network and of the observation's pass on one batch, in turn."""
    from dataclasses import replace

    from heatmill.engine.opening import load, open_best
    from heatmill.engine.passes import open_passes
    from heatmill.engine.types import Target

    name = method.split()[0]
    loaded = load(model, [name], layer=layer)
    bare_graph = load(model, ["rise"])
    bare = open_best(bare_graph, batch_size=len(batch))
    if " " in method:
        loaded = replace(loaded, facts=replace(loaded.facts, head="measured without it"))
    session = open_best(loaded, batch_size=len(batch))
    passes = open_passes(loaded, session, [Target("predicted")], len(batch), budget=1 << 60)
    key = loaded.model.input.name
    targets = np.full((len(batch), 1), -1)

    def explain() -> None:
        if passes.observe is not None:
            passes.observe.run(batch, targets)
        else:
            session.run({key: batch}, [loaded.scores, layer])

    ways: dict[str, Callable[[], Any]] = {"bare": lambda: bare.run({key: batch}, [loaded.scores]), "pass": explain}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    watch = Watch()
    watch.opened()
    for _ in range(ROUNDS):
        for way, run in ways.items():
            begun = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - begun)
    found = watch.stop()
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "method": method,
        "batch": len(batch),
        "bare_seconds": middle["bare"],
        "seconds": middle["pass"],
        "ratio": middle["pass"] / middle["bare"],
        "seconds_per_image": middle["pass"] / len(batch),
        "backward_graph": passes.observe is not None,
        "others": found["other_cores_busy"],
    }


def peer(name: str, model: Path, layer: str, batch: np.ndarray) -> Report:
    """Median seconds of a package's own call on one batch."""
    import torch
    from torch_models import import_torchvision, layer_name, torch_model

    torchvision = import_torchvision()
    x = torch.from_numpy(batch)
    network = torch_model(model)
    with torch.no_grad():
        targets = network(x).argmax(1)
    if name == "pytorch-grad-cam":
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        cam = GradCAM(model=network, target_layers=[network.get_submodule(layer_name(layer))])
        asked = [ClassifierOutputTarget(int(target)) for target in targets]
        run = lambda: cam(input_tensor=x, targets=asked)  # noqa: E731
    elif name == "captum-saliency":
        from captum.attr import Saliency

        explainer = Saliency(network)
        run = lambda: explainer.attribute(x, target=targets)  # noqa: E731
    else:
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlus
        from zennit.torchvision import ResNetCanonizer

        network = torchvision.models.resnet50().eval()  # its canonizer knows torchvision's modules
        hot = torch.eye(1000)[targets]
        composite = EpsilonPlus(canonizers=[ResNetCanonizer()])

        def run() -> Any:
            with Gradient(model=network, composite=composite) as attributor:
                return attributor(x, hot)

    run()
    watch = Watch()
    watch.opened()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    found = watch.stop()
    middle = statistics.median(seconds)
    return {
        "batch": len(batch),
        "seconds": middle,
        "seconds_per_image": middle / len(batch),
        "others": found["other_cores_busy"],
    }


def peak_mb() -> float:
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def memory(model: Path, layer: str, batch: np.ndarray, method: str) -> Report:
    """The peak of a pass over `batch` in MB, and what the forward values that it keeps take per image."""
    from heatmill.engine.opening import load, open_best
    from heatmill.engine.passes import canonical, open_passes
    from heatmill.engine.types import Target

    loaded = load(model, [method], layer=layer)
    session = open_best(loaded, batch_size=1)
    graph = canonical(loaded, loaded.calls[0].method.backward(loaded.facts, loaded.calls[0].parameters), [], None, {})
    values = [op.outputs[0] for op in graph.ops]
    stored = sum(4 * math.prod(size or 1 for size in graph.shape(name)) for name in values) / 2**20
    del graph
    passes = open_passes(loaded, session, [Target("predicted")], len(batch), budget=1 << 60)
    loaded.release()
    if passes.observe is None:
        raise SystemExit(f"{method} needs no backward graph")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mb()
    for _ in range(2):
        passes.observe.run(batch, np.full((len(batch), 1), -1))
    return {"batch": len(batch), "peak_mb": peak_mb(), "before_mb": before, "stored_mb_per_image": stored}


def growth(model: Path, layer: str, data: Path, method: str) -> Report:
    """MB per image, by the difference of two batch sizes, each in a process of its own."""
    few, many = (apart(memory, model, layer, batch_of_apart(model, data, count), method) for count in (4, 16))
    slope = (many["peak_mb"] - few["peak_mb"]) / (many["batch"] - few["batch"])
    stored = many["stored_mb_per_image"]
    return {"method": method, "mb_per_image": slope, "stored_mb_per_image": stored, "of_stored": slope / stored}


def batch_of_apart(model: Path, data: Path, count: int) -> np.ndarray:
    found: np.ndarray = apart(batch_of, model, data, count)
    return found


def bench(model: Path, data: Path, method: str) -> Report:
    """`heatmill bench` on one photograph."""
    photograph = sorted((data / "images" / "ccby").glob("*.jpg"))[0]
    arguments = ["bench", model, photograph, "--method", method, "--limit", 1, "--json"]
    command = [sys.executable, "-c", "from heatmill.cli import main; main()", *map(str, arguments)]
    found: Report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: found[key] for key in ("method", "images_per_second", "rows_per_image", "outside_network", "peak_mb")}


def quietly(function: Callable[..., Report], *arguments: Any) -> Report:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet50")
    parser.add_argument("--data", type=Path, default=DATA)
    rows = [*OURS, *SAME_WORK, "memory/gradient", "memory/epsilon-plus", "bench/cf-cam", "bench/score-cam"]
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows, metavar="ROW")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file, layer = MODELS[args.model]
    model = args.data / "models" / file
    out = (args.json or Path("build") / f"backward-{args.model}.json").absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    report: Report = json.loads(out.read_text()) if out.exists() else {"model": args.model, "runs": {}}
    report["machine"] = apart(machine)
    batches = {count: batch_of_apart(model, args.data, count) for count in (8, 32)}
    for row in args.rows:
        kind, _, name = row.partition("/")
        if kind == "ours":
            method, count = OURS[row]
            found = apart(quietly, ours, model, layer, batches[count], method)
        elif kind == "peers":
            if args.model != "resnet50" and name.startswith("zennit"):
                continue
            found = apart(quietly, peer, name, model, layer, batches[OURS[SAME_WORK[row]][1]])
            mine = report["runs"].get(SAME_WORK[row])
            if mine:
                found["times_slower_than_ours"] = found["seconds_per_image"] / mine["seconds_per_image"]
        elif kind == "memory":
            found = growth(model, layer, args.data, "saliency" if name == "gradient" else "lrp")
        else:
            found = bench(model, args.data, name)
        report["runs"][row] = found
        print(row, json.dumps(found), flush=True)
        write(report, out)


if __name__ == "__main__":
    main()

"""The table of methods x metrics on real models over the photographs with boxes, and what evaluating costs.

    python benchmarks/metrics.py table --model efficientnet_lite0 [--method NAME ...] [--limit N]
    python benchmarks/metrics.py overhead [--limit 100]
    python benchmarks/metrics.py parity

table      explains and evaluates (presets standard, scorecam; road with --road) and writes the table to
           benchmarks/results/metrics-MODEL.json and .md
overhead   deletion and insertion, 28 steps each, of CAM maps on both models: share of time outside the network; and
           ROAD on a tenth of the images
parity     deletion and insertion against a literal reading of RISE's evaluation code, with ONNX Runtime alone

All take --data ../shared/data. Times are of one run; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from figures import HERE, MODELS, cli, literal_upsample, machine

STAGES = ("prepare", "perturb", "network", "score", "combine", "wall")
METHODS = {
    "efficientnet_lite0": (
        *("cam", "grad-cam++", "layer-cam", "faster-score-cam", "group-cam", "cf-cam"),
        *("saliency", "lrp", "clrp"),
    ),
    "resnet50": ("cam", "grad-cam++", "layer-cam", "lrp"),
}


def manifest(data: Path, folder: Path) -> Path:
    """The photographs with boxes and their labels."""
    with (data / "images" / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["boxes"]]
    path = folder / "boxed.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("uri", "id", "label", "boxes"))
        for row in rows:
            name = row["file"]
            writer.writerow(((data / "images" / name).resolve(), name, row["imagenet_class_index"], row["boxes"]))
    return path


def table(data: Path, model: str, methods: list[str], limit: int | None, road: bool) -> None:
    path = (data / "models" / f"{model}.onnx").resolve()
    chosen = methods or list(METHODS[model])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = [each for method in chosen for each in ("-m", method)]
        few = ["--limit", limit] if limit else []
        explained = cli("explain", path, manifest(data, folder), "-o", folder / "run", *asked, *few, "--quiet")
        metrics = ["--metric", "standard", "--metric", "scorecam", *(["--metric", "road"] if road else [])]
        found = cli("evaluate", folder / "run", *metrics, "-o", folder / "table", "--quiet")
        run = found["runs"][0]
        stages = run["stages"]
        result: dict[str, Any] = {
            "model": path.name,
            "images": explained["images"],
            "methods": run["methods"],
            "metrics": run["metrics"],
            "statuses": run["statuses"],
            "explain_seconds": explained["seconds"],
            "evaluate_seconds": round(run["seconds"], 1),
            "evaluate_rows": int(stages["rows"]),
            "outside_network": round(1 - stages["network"] / stages["wall"], 4),
            "table": found["table"],
            "differences": found["differences"],
            "machine": machine(),
        }
        name = f"metrics-{model.replace('_', '-')}"
        write(name, result)
        shutil.copy(folder / "table" / "table.md", HERE / "results" / f"{name}.md")
        print((folder / "table" / "table.md").read_text())


def overhead(data: Path, limit: int) -> None:
    results: dict[str, Any] = {}
    for model in MODELS:
        path = (data / "models" / f"{model}.onnx").resolve()
        results[model] = {}
        for metric, count in (("rise", limit), ("road", max(1, limit // 10))):
            with tempfile.TemporaryDirectory() as temporary:
                run = Path(temporary) / "run"
                cli("explain", path, data / "images" / "ccby", "-o", run, "-m", "cam", "--limit", count, "--quiet")
                stages = cli("evaluate", run, "--metric", metric, "--quiet")["runs"][0]["stages"]
            results[model][metric] = {
                "images": count,
                "rows": int(stages["rows"]),
                "slots_filled": round(stages["rows"] / stages["slots"], 4),
                "outside_network": round(1 - stages["network"] / stages["wall"], 4),
                "seconds": {
                    name: stages[name] for name in ("prepare", "perturb", "network", "score", "combine", "wall")
                },
            }
            print(model, metric, json.dumps(results[model][metric]))
    write("metrics-overhead", {"models": results, "machine": machine()})


def parity(data: Path, images: int = 4) -> None:
    import onnxruntime as ort
    from scipy import ndimage

    from heatmill import open_run
    from heatmill.engine.jobs import measures
    from heatmill.models.preprocess import decode, normalise, view
    from heatmill.models.spec import ModelSpec

    dirac = np.zeros((11, 11))
    dirac[5, 5] = 1
    kernel = ndimage.gaussian_filter(dirac, 5)
    results = {}
    for model in MODELS:
        path = (data / "models" / f"{model}.onnx").resolve()
        net = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def posterior(image: np.ndarray, net: Any = net) -> np.ndarray:
            z = net.run(["logits"], {"input": image[None].astype(np.float32)})[0][0].astype(np.float64)
            e = np.exp(z - z.max())
            return np.asarray(e / e.sum())

        worst = 0.0
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary) / "run"
            cli("explain", path, data / "images" / "ccby", "-o", place, "-m", "cam", "--limit", images, "--quiet")
            cli("evaluate", place, "--metric", "rise", "--quiet")
            run = open_run(place)
            ours = {(row["id"], row["metric"]): row["value"] for row in measures.read(run).to_pylist()}
            spec = ModelSpec.from_json(run.settings["spec"], "run.json")
            for row in run.rows(status="ok"):
                x = normalise(view(decode(Path(row.path).read_bytes()), spec)[0], spec, "float32")
                raw = np.maximum(literal_upsample(row.map.astype(np.float64), x.shape[1:]), 0)
                order = np.flip(np.argsort(((raw - raw.min()) / np.ptp(raw)).ravel(), kind="stable"))
                soft = np.stack([ndimage.convolve(plane.astype(np.float64), kernel, mode="constant") for plane in x])
                pairs = (("deletion", x, np.zeros_like(x)), ("insertion", soft, x))
                for metric, start, finish in pairs:
                    canvas, scores = start.copy().reshape(3, -1), []
                    for step in range(29):
                        taken = order[: step * 224 * 8]
                        canvas[:, taken] = finish.reshape(3, -1)[:, taken]
                        scores.append(posterior(canvas.reshape(x.shape))[row.target])
                    auc = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / 28
                    worst = max(worst, abs(auc - ours[row.id, metric]))
        results[model] = {"images": images, "max_abs_auc_difference": worst}
        print(model, worst)
    write("metrics-parity", {"preset": "rise", "models": results, "machine": machine()})


def write(name: str, result: dict[str, Any]) -> None:
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "overhead", "parity"))
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--model", choices=tuple(METHODS), default="efficientnet_lite0")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--road", action="store_true")
    given = parser.parse_args()
    if given.what == "table":
        table(given.data, given.model, given.method, given.limit, given.road)
    elif given.what == "overhead":
        overhead(given.data, given.limit or 100)
    else:
        parity(given.data)


if __name__ == "__main__":
    main()

"""The figures of the README, each by one command; every figure goes to a JSON file under benchmarks/results.

    python benchmarks/figures.py accuracy overhead methods memory startup settings plan resume [--data ../shared/data]

accuracy   Score-CAM official on the real models against a literal full-resolution loop
overhead   share of wall time outside the network, Score-CAM and RISE (4000 masks), `heatmill bench`
methods    share of wall time outside the network on ResNet-50, each method at its default, `heatmill bench`
memory     peak memory over the bare session's, for 512 and 2048 masks and for 10 and 1000 images
startup    `heatmill methods` from the shell
settings   ONNX Runtime's threads, spinning and arena, rows/s of the bare network
plan       what `heatmill plan` says beside what `heatmill explain` then takes
resume     20 kill -9 at random moments of a 60-image run; the store equals an undisturbed run's

Peers are in peers.py. Times are ratios within one run; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODELS = ("efficientnet_lite0", "resnet50")
HEATMILL = [sys.executable, "-c", "from heatmill.cli import main; main()"]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from heatmill.engine.jobs.describe import doctor

    found = doctor()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cpu_flags": found["cpu_flags"],
        "cores": found["cores"]["usable"],
        "python": found["python"],
        "packages": found["packages"],
        "heatmill": found["heatmill"],
        "date": time.strftime("%Y-%m-%d"),
    }


def photographs(data: Path) -> list[Path]:
    return sorted((data / "images" / "ccby").glob("*.jpg"))


def cli(*arguments: object) -> dict[str, Any]:
    """Run heatmill in a process of its own; its JSON answer."""
    done = subprocess.run(
        [*HEATMILL, *map(str, arguments), "--json"], stdout=subprocess.PIPE, check=True, cwd=tempfile.gettempdir()
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def accuracy(data: Path) -> dict[str, Any]:
    import onnx
    import onnxruntime as ort

    from heatmill import Explainer
    from heatmill.models.preprocess import decode, normalise, view

    results = {}
    for name in MODELS:
        path = data / "models" / f"{name}.onnx"
        explainer = Explainer(path)
        tap = explainer._loaded.tap.name
        model = onnx.load(path)
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tap))
        net = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        image = view(decode(photographs(data)[3].read_bytes()), explainer.spec)[0]
        x = normalise(image, explainer.spec, "float32")
        logits, features = net.run(["logits", tap], {"input": x[None]})
        c = int(logits[0].argmax())
        total = np.zeros(x.shape[1:])
        for a in features[0]:
            u = literal_upsample(a.astype(np.float64), x.shape[1:])
            if u.max() == u.min():
                continue
            z = net.run(["logits"], {"input": (x * ((u - u.min()) / (u.max() - u.min()))).astype(np.float32)[None]})[0][
                0
            ]
            e = np.exp(z.astype(np.float64) - z.max())
            total += (e / e.sum())[c] * u
        literal = np.maximum(total, 0)
        literal = (literal - literal.min()) / (literal.max() - literal.min())
        ours = explainer.explain(x[None])
        results[name] = {
            "image": photographs(data)[3].name,
            "class": c,
            "max_abs_difference_of_range": float(np.abs(ours.saliency()[0, 0] - literal).max()),
            "passes": ours.extras[0][0],
        }
    return results


def literal_upsample(a: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel bilinear upsampling with clamped edges, a pixel's four neighbours at a time."""

    def places(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, n_in - 1), at - low

    y0, y1, v = places(a.shape[0], size[0])
    x0, x1, u = places(a.shape[1], size[1])
    v = v[:, None]
    top = a[np.ix_(y0, x0)] * (1 - u) + a[np.ix_(y0, x1)] * u
    bottom = a[np.ix_(y1, x0)] * (1 - u) + a[np.ix_(y1, x1)] * u
    return top * (1 - v) + bottom * v


def overhead(data: Path) -> dict[str, Any]:
    results = {}
    for name in MODELS:
        for method in ("score-cam", "rise:masks=4000"):
            model, images = data / "models" / f"{name}.onnx", data / "images" / "ccby"
            rounds = 1 if name == "resnet50" else 3  # a round of ResNet-50 is minutes long
            results[f"{name} {method}"] = cli("bench", model, images, "-m", method, "--limit", 1, "--rounds", rounds)
    return results


def methods(data: Path) -> dict[str, Any]:
    """One image where a method makes hundreds of passes, 48 where it makes few: starting is not what is asked."""
    many = (
        "score-cam",
        "cf-cam",
        "sidu",
        "sise",
        "ada-sise",
        "occlusion",
        "lime",
        "kernel-shap",
        "ablation-ca",
        "xrai",
    )
    few = ("group-cam", "faster-score-cam", "cluster-cam", "ablation-cam", "recipro-cam", "grad-cam")
    asked = {**dict.fromkeys((*many, "ablation-ca", "rise:masks=2048"), 1), **dict.fromkeys(few, 48)}
    model, images = data / "models" / "resnet50.onnx", data / "images" / "ccby"
    return {
        method: cli("bench", model, images, "-m", method, "--limit", limit, "--rounds", 1)
        for method, limit in asked.items()
    }


def memory(data: Path) -> dict[str, Any]:
    model = data / "models" / "efficientnet_lite0.onnx"
    cases = {
        "score-cam, 2 images": ("score-cam", 2),
        "rise 512 masks, 2 images": ("rise:masks=512", 2),
        "rise 2048 masks, 2 images": ("rise:masks=2048", 2),
        "cam, 10 images": ("cam", 10),
        "cam, 1000 images": ("cam", 1000),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, (method, limit) in cases.items():
            images = enough(data, Path(folder), limit)
            found = cli("bench", model, images, "-m", method, "--limit", limit, "--rounds", 1, "--batch-size", 32)
            results[case] = {"peak_mb": found["peak_mb"], "images": found["images"], "batch_size": found["batch_size"]}
    resnet, images = data / "models" / "resnet50.onnx", data / "images" / "ccby"
    found = cli("bench", resnet, images, "-m", "rise:masks=256", "--limit", 1, "--rounds", 1, "--batch-size", 32)
    return {**results, "resnet50 rise 256 masks, 1 image": {"peak_mb": found["peak_mb"]}}


def enough(data: Path, folder: Path, count: int) -> Path:
    """The photographs, as a manifest that repeats them where there are fewer than `count`."""
    manifest = folder / f"{count}.csv"
    files = photographs(data)
    rows = [f"{i:05d},{files[i % len(files)]}" for i in range(count)]
    manifest.write_text("\n".join(["id,uri", *rows]) + "\n")
    return manifest


def startup(data: Path) -> dict[str, Any]:
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        subprocess.run(
            [str(Path(sys.executable).parent / "heatmill"), "methods"], stdout=subprocess.DEVNULL, check=True
        )
        seconds.append(time.perf_counter() - start)
    return {"seconds_median": statistics.median(seconds), "seconds_most": max(seconds)}


def settings(data: Path) -> dict[str, Any]:
    import onnxruntime as ort

    def session(path: Path, threads: int, spinning: str, arena: bool) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = arena
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    cores = len(os.sched_getaffinity(0))
    variants = {
        f"{cores} threads": (cores, "1", True),
        f"{cores} threads, no spinning": (cores, "0", True),
        f"{cores} threads, no arena": (cores, "1", False),
        "1 thread": (1, "1", True),
    }
    results: dict[str, Any] = {}
    for name in MODELS:
        path = data / "models" / f"{name}.onnx"
        sessions = {variant: session(path, *values) for variant, values in variants.items()}
        for size in (1, 8, 16, 32, 64):
            batch = np.random.default_rng(0).normal(size=(size, 3, 224, 224)).astype(np.float32)
            speeds: dict[str, list[float]] = {variant: [] for variant in sessions}
            for _ in range(5):
                for variant, opened in sessions.items():
                    if size in (1, 32) or variant == f"{cores} threads":
                        start = time.perf_counter()
                        opened.run(["logits"], {"input": batch})
                        speeds[variant].append(size / (time.perf_counter() - start))
            results[f"{name} batch {size}"] = {
                variant: round(statistics.median(values[1:]), 2) for variant, values in speeds.items() if values
            }
    return results


def plan(data: Path) -> dict[str, Any]:
    """Predicted seconds over those of the run that follows at once, for jobs of a minute or so."""
    jobs = {
        "efficientnet_lite0 score-cam": ("score-cam", 12),
        "efficientnet_lite0 cf-cam": ("cf-cam", 40),
        "efficientnet_lite0 integrated-gradients": ("integrated-gradients", 40),
        "efficientnet_lite0 grad-cam": ("grad-cam", 711),
        "mobilenet_v2 rise:masks=1000": ("rise:masks=1000", 6),
        "resnet50 group-cam": ("group-cam", 30),
        "resnet50 ablation-cam": ("ablation-cam", 20),
    }
    results = {}
    for case, (method, limit) in jobs.items():
        name = case.split()[0]
        asked = (data / "models" / f"{name}.onnx", data / "images" / "ccby", "-m", method, "--limit", limit)
        told = cli("plan", *asked)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            ran = cli("explain", *asked, "-o", Path(folder) / "run", "--quiet")
            wall = time.perf_counter() - start
            disk = sum(path.stat().st_size for path in (Path(folder) / "run").rglob("*") if path.is_file())
        results[case] = {
            "images": ran["images"],
            "predicted_seconds": told["seconds"],
            "seconds": ran["seconds"],
            "seconds_with_the_process": wall,
            "predicted_over_real": told["seconds"] / ran["seconds"],
            "predicted_mb": told["disk_mb"],
            "mb": disk / 1e6,
        }
        print(case, json.dumps(results[case]), file=sys.stderr, flush=True)
    return results


def resume(data: Path, kills: int = 20, images: int = 60) -> dict[str, Any]:
    from heatmill import open_run

    def store(run: Path) -> list[tuple[Any, ...]]:
        rows = open_run(run).rows()
        return [(row.row, row.id, row.method, row.target, row.status, row.map) for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        model = data / "models" / "efficientnet_lite0.onnx"
        short = "from heatmill.engine.jobs import plan; plan.SHARD_SECONDS = 1.0; from heatmill.cli import main; main()"
        command = [
            sys.executable,
            "-c",
            short,
            "explain",
            str(model),
            str(data / "images" / "ccby"),
            "-m",
            "rise:masks=100",
            "--quiet",
        ]
        command += ["--limit", str(images)]
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        start = time.perf_counter()
        subprocess.run([*command, "-o", str(whole)], check=True, stdout=subprocess.DEVNULL)
        undisturbed = time.perf_counter() - start
        shards = len(list((whole / "data").iterdir()))
        rng = random.Random(0)
        done = 0
        before_kills: list[int] = []
        committed: dict[str, int] = {}
        redone = 0
        for _ in range(kills):
            child = subprocess.Popen([*command, "-o", str(broken)], stdout=subprocess.DEVNULL, start_new_session=True)
            time.sleep(rng.uniform(0.2, 1.5 + undisturbed / 8))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                done += 1
                before_kills.append(len(list((broken / "data").glob("part-*.parquet"))))
            child.wait()
            for part in (broken / "data").glob("part-*.parquet"):
                stamp = part.stat().st_mtime_ns
                redone += committed.setdefault(part.name, stamp) != stamp
        finished = subprocess.run([*command, "-o", str(broken)], stdout=subprocess.DEVNULL)
        left, right = store(whole), store(broken)
        differences = [np.abs(a[-1] - b[-1]).max() for a, b in zip(left, right, strict=True)]
        return {
            "kills": done,
            "images": images,
            "shards": shards,
            "shards_committed_at_each_kill": before_kills,
            "exit_code_at_the_end": finished.returncode,
            "same_rows": [row[:-1] for row in left] == [row[:-1] for row in right],
            "max_abs_difference": float(max(differences)),
            "committed_parts_written_again": redone,
        }


FIGURES = {
    "accuracy": accuracy,
    "overhead": overhead,
    "methods": methods,
    "memory": memory,
    "startup": startup,
    "settings": settings,
    "plan": plan,
    "resume": resume,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[[], *FIGURES], default=list(FIGURES))
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.results.mkdir(exist_ok=True)
    for name in options.figures:
        found = {"command": f"python benchmarks/figures.py {name}", "machine": machine()}
        found["figures"] = FIGURES[name](options.data.resolve())
        (options.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()

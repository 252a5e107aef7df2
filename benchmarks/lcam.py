"""L-CAM beside Grad-CAM and Score-CAM on held-out photographs, and what training and explaining cost.

    python benchmarks/lcam.py compare --model efficientnet_lite0 [--variant fm img] [--seeds 3] [--score-cam 40]
    python benchmarks/lcam.py speed --model resnet50

compare  trains on 500 of the photographs and measures average drop and increase in confidence on all others, with the
         whole map and with its highest 50% and 15% of pixels; for every seed, for untrained classes apart, and on the
         first images that Score-CAM explains too
speed    images/s of `fm` from cached features, the time of `img` in forward passes, and of explaining beside the bare
         network

Masked pictures are over black, a kept pixel stays soft, the class is the model's own prediction (METHODS of the L-CAM
authors). Every figure goes to benchmarks/results/lcam-MODEL.json; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import HERE, machine, photographs

from heatmill import Explainer
from heatmill.engine.jobs.train import train
from heatmill.engine.jobs.train_settings import TrainJob
from heatmill.engine.jobs.trainer import Trainer
from heatmill.engine.opening import Loaded, load, open_best
from heatmill.kernels import host
from heatmill.models.graph.attention import read_about
from heatmill.models.load import open_model
from heatmill.models.preprocess import decode, normalise, view

TRAINED = 500
SHARES = (100, 50, 15)
BATCH = 32


def split(data: Path) -> tuple[list[Path], list[Path]]:
    """500 photographs to train on, and the others: the same for every seed."""
    listed = photographs(data)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(listed))
    return [listed[i] for i in sorted(order[:TRAINED])], [listed[i] for i in sorted(order[TRAINED:])]


def kept(saliency: np.ndarray, share: int) -> np.ndarray:
    """A map (H, W) with all but its highest `share` percent of pixels at 0."""
    flat = saliency.ravel()
    count = math.ceil(share / 100 * flat.size)
    cut = np.zeros_like(flat)
    highest = np.argsort(-flat, kind="stable")[:count]
    cut[highest] = flat[highest]
    return cut.reshape(saliency.shape)


class Judge:
    """The classifier that masked pictures are shown to."""

    def __init__(self, model: Path, images: list[Path]) -> None:
        self.loaded: Loaded = load(model, [])
        self.session = open_best(self.loaded, batch_size=BATCH)
        spec = self.loaded.spec
        views = [view(decode(path.read_bytes()), spec)[0] for path in images]
        self.inputs = np.stack([normalise(shown, spec, "float32") for shown in views])
        raw = self.scores(self.inputs)
        self.classes = raw.argmax(axis=1)
        self.whole = self.posteriors(raw)

    def scores(self, inputs: np.ndarray) -> np.ndarray:
        name, output = self.loaded.model.input.name, [self.loaded.scores]
        parts = [self.session.run({name: inputs[i : i + BATCH]}, output)[0] for i in range(0, len(inputs), BATCH)]
        return np.concatenate(parts)

    def posteriors(self, raw: np.ndarray) -> np.ndarray:
        rows = np.arange(len(raw))
        return host.posteriors(raw, self.loaded.posterior)[rows, self.classes[rows]].astype(np.float64)

    def judge(self, maps: np.ndarray) -> Callable[..., dict[str, float]]:
        """Of finished maps (n, H, W), what gives average drop and increase in % at every share, of some rows or all."""
        black = self.loaded.bounds[0].astype(np.float32)[:, None, None]
        left = {}
        for share in SHARES:
            masks = np.stack([kept(saliency, share) for saliency in maps])[:, None].astype(np.float32)
            left[share] = self.posteriors(self.scores(black + masks * (self.inputs[: len(maps)] - black)))

        def told(which: np.ndarray | None = None) -> dict[str, float]:
            rows, found = np.ones(len(maps), bool) if which is None else which, {}
            for share, scores in left.items():
                whole = self.whole[: len(maps)]
                drops = np.maximum(0, whole - scores) / whole
                found[f"drop_{share}"] = round(100 * float(drops[rows].mean()), 2)
                found[f"increase_{share}"] = round(100 * float((scores > whole)[rows].mean()), 2)
            return found

        return told


def explained(model: Path, method: str, images: list[Path]) -> np.ndarray:
    explainer = Explainer(model, method=method, batch_size=BATCH)
    return np.concatenate([explainer.explain([path]).saliency()[:, 0] for path in images])


def compare(
    data: Path,
    model: Path,
    variants: list[str],
    losses: list[str],
    seeds: int,
    score_cam: int,
    schedule: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """`save` is given what is known after every step; `schedule` differs from the preset."""
    training, testing = split(data)
    judge = Judge(model, testing)
    result: dict[str, Any] = {"trained_on": len(training), "judged_on": len(testing)}
    first = np.arange(len(testing)) < score_cam
    told = judge.judge(explained(model, "grad-cam", testing))
    result["grad-cam"] = told()
    save(result)
    if score_cam:
        result["first"] = {"images": score_cam, "grad-cam": told(first)}
        result["first"]["score-cam"] = judge.judge(explained(model, "score-cam", testing[:score_cam]))()
        save(result)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing = folder / "training.csv"
        listing.write_text("\n".join(["uri", *map(str, training)]))
        for variant in variants:
            for loss in losses:
                found = []
                for seed in range(seeds):
                    out = folder / "lcam.onnx"
                    how = {"variant": variant, "loss": loss, "seed": seed, **schedule}
                    job = TrainJob(model=model, inputs=(listing,), out=out, overwrite=True, **how)
                    start = time.perf_counter()
                    told = train(job, "quiet")
                    seconds = time.perf_counter() - start
                    about = read_about(open_model(out)) or {}
                    fresh = np.isin(judge.classes, about["untrained"])
                    judged = judge.judge(explained(out, "l-cam", testing))
                    found.append(
                        {
                            "seed": seed,
                            "epochs": told.epochs,
                            "best_epoch": told.best_epoch,
                            "seconds": round(seconds, 1),
                            **judged(),
                            "trained classes": {"images": int((~fresh).sum()), **judged(~fresh)},
                            "untrained classes": {"images": int(fresh.sum()), **judged(fresh)},
                            **({"first": judged(first)} if score_cam else {}),
                        }
                    )
                    keys = [f"{name}_{share}" for share in SHARES for name in ("drop", "increase")]
                    values = {key: [each[key] for each in found] for key in keys}
                    changed = "".join(f", {key} {value}" for key, value in schedule.items())
                    result[f"l-cam {variant} {loss}{changed}"] = {
                        "mean": {key: round(statistics.mean(each), 2) for key, each in values.items()},
                        "range": {key: round(max(each) - min(each), 2) for key, each in values.items()},
                        "seeds": found,
                    }
                    save(result)


class Caught(Exception):
    """A trainer, stopped before its first batch."""


def opened(job: TrainJob) -> Trainer:
    def stop(self: Trainer, style: str, signals: Any) -> None:
        raise Caught(self)

    run, Trainer.run = Trainer.run, stop  # type: ignore[method-assign]
    try:
        train(job, "quiet")
    except Caught as caught:
        trainer: Trainer = caught.args[0]
        return trainer
    finally:
        Trainer.run = run  # type: ignore[method-assign]
    raise RuntimeError("the training never began")


def clocks(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that something takes, on the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def epoch(trainer: Trainer) -> tuple[float, float]:
    """Seconds per image of an epoch."""

    def work() -> None:
        for rows, values in trainer._ahead(trainer.trained):
            trainer.batch(rows, values)

    wall, processor = clocks(work)
    return wall / len(trainer.trained), processor / len(trainer.trained)


def speed(data: Path, model: Path) -> dict[str, Any]:
    """Medians; beside each time on the clock the processor's, which other work on the machine hardly changes (with
    OPENBLAS_NUM_THREADS=1: threads of NumPy that wait for each other would count)."""
    training, _ = split(data)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listing, few = folder / "training.csv", folder / "few.csv"
        listing.write_text("\n".join(["uri", *map(str, training)]))
        few.write_text("\n".join(["uri", *map(str, training[:36])]))
        trainer = opened(TrainJob(model=model, inputs=(listing,), out=folder / "fm.onnx"))
        epoch(trainer)
        walls, processors = zip(*(epoch(trainer) for _ in range(7)), strict=True)
        result["fm_images_per_second"] = round(1 / statistics.median(walls), 1)
        result["fm_images_per_second_at_best"] = round(1 / min(walls), 1)
        result["fm_images_per_processor_second"] = round(1 / statistics.median(processors), 1)
        judge = Judge(model, training[:BATCH])
        trainer = opened(TrainJob(model=model, inputs=(few,), out=folder / "img.onnx", variant="img", batch_size=BATCH))
        ratios, processor_ratios = [], []
        for _ in range(3):
            forward, work = clocks(lambda: judge.scores(judge.inputs))
            wall, processor = epoch(trainer)
            ratios.append(wall / (forward / BATCH))
            processor_ratios.append(processor / (work / BATCH))
        result["img_in_forward_passes"] = round(statistics.median(ratios), 2)
        result["img_in_forward_passes_of_processor_time"] = round(statistics.median(processor_ratios), 2)
        told = train(TrainJob(model=model, inputs=(few,), out=folder / "lcam.onnx", epochs=1), "quiet")
        explainer = Explainer(told.out, method="l-cam", batch_size=BATCH)
        for target in ("predicted", "7"):
            found = []
            for _ in range(7):
                bare, work = clocks(lambda: judge.scores(judge.inputs))
                wall, processor = clocks(lambda target=target: explainer.explain(judge.inputs, target))
                found.append((wall / bare, processor / work))
            walls, processors = zip(*found[1:], strict=True)
            result[f"explain_{target}_of_bare"] = round(statistics.median(walls), 3)
            result[f"explain_{target}_of_bare_processor_time"] = round(statistics.median(processors), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", choices=["compare", "speed"])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--variant", nargs="+", default=["fm"])
    parser.add_argument("--loss", nargs="+", default=["own-map", "faithful"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--score-cam", type=int, default=0, help="images of those judged that Score-CAM explains too")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    given = parser.parse_args()
    model = given.data / "models" / f"{given.model}.onnx"
    path = HERE / "results" / f"lcam-{given.model}.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def save(what: str, found: dict[str, Any]) -> None:
        results[what] = {**results.get(what, {}), **found}
        results["machine"] = machine()
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(found), flush=True)

    for what in given.what:
        if what == "compare":
            schedule = {key: getattr(given, key) for key in ("epochs", "rate") if getattr(given, key) is not None}
            how = (given.variant, given.loss, given.seeds, given.score_cam, schedule)
            compare(given.data, model, *how, lambda found: save("compare", found))
        else:
            save(what, speed(given.data, model))


if __name__ == "__main__":
    main()

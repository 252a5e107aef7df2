"""Training L-CAM's attention on a frozen classifier: the job, its folder, and the file that comes out.

Gkartzonika, Gkalelis and Mezaris, ECCV workshops 2022; losses, gradients and optimiser are in `kernels/attention.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ... import IncompleteError, InputError, ModelError, RunError, __version__
from ...models.find_spec import find_spec
from ...models.graph.attention import read_about, with_attention
from ...models.graph.tap import Reading, Tap
from ...models.load import open_model
from ..opening import Loaded, load_opened, read_graph
from ..trial import try_model
from . import plan as plans
from . import store
from .features import FOLDER, Features, compute
from .job import EXIT_BAD, EXIT_COMPLETE, Signals, lock, resumable
from .progress import Progress
from .report import replacing
from .sources import Source, list_source
from .train_page import write_page
from .train_settings import TrainJob
from .trainer import Trainer

RUN_FILES = ("_tmp", "plan", FOLDER, "report", "train.json", "checkpoint.npz", "summary.json")
FEATURES_BY = (
    *("heatmill", "model", "spec", "input", "--limit", "--layer", "--scores", "--target", "--backend", "--provider"),
)


@dataclass(frozen=True, slots=True)
class Trained:
    """How a call of `train` ended; written to RUN/summary.json."""

    out: str
    run: str
    page: str
    exit_code: int
    images: int
    bad: int
    statuses: dict[str, int]
    trained: int
    held_out: int
    classes: int
    untrained: int
    epochs: int
    best_epoch: int
    history: list[dict[str, Any]]


def train(job: TrainJob, style: str = "auto") -> Trained:
    """Train an attention and write the classifier with it to `job.out`; what an earlier call did is kept.

    Args:
        style: of the progress, see `Progress`.

    Raises:
        HeatmillError: refused, or incomplete and resumable; `exit_code` says which.
        KeyboardInterrupt: interrupted by the user, after a checkpoint.
    """
    with resumable(job.folder) as signals:
        return _train(job, style, signals)


def _train(job: TrainJob, style: str, signals: Signals) -> Trained:
    _check_out(job)
    exists = _check_folder(job.folder, job.overwrite)
    loaded, source = open_training(job)
    asked = identity(job, loaded)
    with lock(job.folder):
        settings = _begin(job, loaded, source, asked, exists)
        images = _read_plan(job.folder)
        trial, session = try_model(loaded, job.backend, job.provider, "auto", None, 0)
        features = Features(job.folder, images.num_rows, settings["shape"])
        signals.busy = True
        with Progress(images.num_rows, style, "reading features") as progress:
            progress.start(images.num_rows - sum(len(features.rows(part)) for part in features.missing()))
            compute(features, loaded, session, images, trial.batch_size, job.workers, progress.advance, signals)
        trainer = Trainer(job, loaded, session, features, images, trial.batch_size, trial.free_batch, trial.classes)
        for note in trainer.notes:
            Progress(0, style).note(f"note: {note}")
        trainer.run(style, signals)
        signals.busy = False
        return _finish(job, loaded, trainer)


def open_training(job: TrainJob) -> tuple[Loaded, Source]:
    """Everything that can be refused without running the model.

    Raises:
        HeatmillError: the model, its layer or the input is refused.
    """
    model = open_model(job.model, scores=job.scores)
    if read_about(model) is not None:
        raise InputError(f"{model.path.name}: has an attention already; give the classifier that it was made from")
    spec, where = find_spec(model, preprocess=job.preprocess, labels=job.labels, output=job.output)
    reading = read_graph(model, spec)
    tap = choose_layer(reading, job.layer, spec.target_layer, job.variant)
    loaded = load_opened(model, spec, where, reading, (), tap.name)
    if loaded.posterior == "none":
        raise InputError(
            f"{model.path.name}: gives {spec.output} and its raw scores are not known, so that there is no way back; "
            "export it with logits"
        )
    inputs = [path.absolute() if os.path.exists(path) else path for path in job.inputs]
    source = list_source(inputs, limit=job.limit)
    if job.target == "label":
        classes = model.classes or len(spec.label_names) or 2**31 - 1
        source = plans.with_classes(source, classes, spec.label_names)
    if source.table.num_rows < 2:
        raise InputError("1 image is not enough: some are trained on, some are held out; give a folder of images")
    return loaded, source


def choose_layer(reading: Reading, layer: str | None, default: str | None, variant: str) -> Tap:
    """The layer that the attention reads: the asked one, else the automatic choice. `fm` runs what lies behind it
    alone, so that nothing may go around it: it then takes the last layer before it for which that holds.

    Raises:
        ModelError: no such layer, or no feature map at all.
        InputError: values go around the layer.
    """
    try:
        tap = reading.choose(layer or default)
    except ModelError as err:
        if layer is not None:
            raise
        raise ModelError(f"{err}; an attention needs a spatial layer") from None
    if variant == "img" or tap.name in reading.waists:
        return tap
    names = [found.name for found in reading.taps()]
    before = [found for found in reading.taps()[: names.index(tap.name)] if found.name in reading.waists]
    if layer is None and before:
        return before[-1]
    way = f"--layer {before[-1].name}, or " if before else ""
    raise InputError(
        f"{reading.model.path.name}: values go around layer {tap.name!r}, so that what lies behind can't run alone; "
        f"{way}--variant img, which runs the whole network"
    )


def identity(job: TrainJob, loaded: Loaded) -> dict[str, Any]:
    """What two calls must share to be one run; the names are the user's words, for the refusal."""
    return {
        "heatmill": ".".join(__version__.split(".")[:2]),
        "model": loaded.model.sha256,
        "spec": loaded.spec.to_json(),
        "--layer": loaded.tap.name if loaded.tap else None,
        "--scores": loaded.model.output,
        "--target": job.target,
        "--backend": job.backend,
        "--provider": job.provider,
        "--limit": job.limit,
        "input": [os.path.abspath(path) for path in job.inputs],
        "--variant": job.variant,
        "--loss": job.loss,
        "--seed": job.seed,
        "--held-out": job.held_out,
        "--patience": job.patience,
        "schedule": asdict(job.schedule),
    }


def _check_out(job: TrainJob) -> None:
    if job.out.suffix != ".onnx":
        raise InputError(f"{job.out}: -o takes the name of an .onnx file")
    if job.out.is_dir():
        raise InputError(f"{job.out}: is a folder; -o takes the name of an .onnx file")
    if job.out.exists() and job.out.resolve() == Path(job.model).resolve():
        raise InputError(f"{job.out}: is the model itself; give another name with -o")
    if not job.out.exists() or job.overwrite:
        return
    begun = (job.folder / "train.json").exists()
    if not begun or _read_settings(job.folder).get("out") != str(job.out.resolve()):
        raise InputError(f"{job.out}: is there already, and not of a run here; give another name, or --overwrite")


def _check_folder(run: Path, overwrite: bool) -> bool:
    """Whether the folder holds a training to go on with.

    Raises:
        InputError: it is a file, or holds other things.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is a file; --run takes a folder")
    exists = (run / "train.json").exists()
    foreign = sorted(path.name for path in run.iterdir() if path.name not in RUN_FILES) if run.is_dir() else []
    if foreign:
        raise InputError(f"{run}: holds {foreign[0]!r}, which is not of a training; give another folder with --run")
    return exists and not overwrite


def _begin(job: TrainJob, loaded: Loaded, source: Source, asked: Mapping[str, Any], exists: bool) -> dict[str, Any]:
    """The run's settings: those it has, or new ones; features that are still right stay.

    Raises:
        RunError: it belongs to other settings, or is damaged.
        IncompleteError: the folder can't be written.
    """
    run = job.folder
    if exists:
        old = _read_settings(run)
        plans.check_same(run, plans.Plan(old, source.table), asked)
        return old
    if loaded.tap is None:
        raise ValueError("a training reads a layer")
    reading = read_graph(loaded.model, loaded.spec)
    settings = {
        "format": store.FORMAT,
        "identity": json.loads(json.dumps(asked)),
        "model": {"path": str(loaded.model.path), "sha256": loaded.model.sha256},
        "spec": loaded.spec.to_json(),
        "out": str(job.out.resolve()),
        "shape": list(reading.shapes[loaded.tap.name][1:]),
        "versions": plans.versions(),
    }
    try:
        kept = _same_features(run, settings, source)
        for name in ("train.json", "checkpoint.npz", "summary.json"):
            (run / name).unlink(missing_ok=True)
        for name in ("report", *([] if kept else [FOLDER])):
            shutil.rmtree(run / name, ignore_errors=True)
        store.commit(run, store.PLAN, store.parquet_bytes(source.table))
        store.commit(run, "train.json", (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as err:
        raise IncompleteError(store.write_refusal(run, err)) from err
    return settings


def _same_features(run: Path, settings: Mapping[str, Any], source: Source) -> bool:
    """Whether the features of an earlier training there are those that new settings ask for, and can be read."""
    try:
        old, images = _read_settings(run)["identity"], _read_plan(run)
    except RunError:  # none, or damaged
        return False
    same = all(old.get(key) == settings["identity"][key] for key in FEATURES_BY) and images.equals(source.table)
    return same and Features(run, images.num_rows, settings["shape"]).sound()


def _read_settings(run: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((run / "train.json").read_text())
        if not isinstance(settings["identity"], dict) or not isinstance(settings["shape"], list):
            raise ValueError("it is not a training's")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunError(f"{run / 'train.json'}: damaged ({err}); start again with --overwrite") from None
    return settings


def _read_plan(run: Path) -> pa.Table:
    path = run / store.PLAN
    with store.naming(path):
        return pq.read_table(path, page_checksum_verification=True)


def _finish(job: TrainJob, loaded: Loaded, trainer: Trainer) -> Trained:
    """Write the classifier with its attention, the report and the summary."""
    at, untrained = trainer.at, trainer.untrained
    best = at.history[at.best]
    model = open_model(job.model, scores=job.scores)
    if model.sha256 != loaded.model.sha256:
        raise RunError(f"{model.path}: the file has changed since the training began; put it back")
    statuses = dict(trainer.features.known.statuses)
    bad = len(trainer.images) - statuses.get("ok", 0)
    measured = next((e for e in reversed(at.history[: at.best + 1]) if "average_drop" in e), at.history[-1])
    about = {
        "format": 1,
        "heatmill": __version__,
        "model": {"name": model.path.name, "sha256": model.sha256},
        "variant": job.variant,
        "loss": job.loss,
        "constants": asdict(trainer.loss),
        "schedule": asdict(job.schedule),
        "seed": job.seed,
        "target": job.target,
        "images": len(trainer.trained),
        "held_out": len(trainer.held),
        "best_epoch": best["epoch"],
        "held_out_loss": best["held_out"],
        "measured_epoch": measured["epoch"],
        "average_drop": measured["average_drop"],
        "increase": measured["increase"],
        "untrained": untrained,
    }
    proto = with_attention(model, loaded.spec, trainer.tap, *trainer.best, about)
    with replacing(job.out) as file:
        file.write(proto.SerializeToString())
    page = write_page(job, trainer)
    result = Trained(
        out=str(job.out),
        run=str(job.folder),
        page=str(page),
        exit_code=EXIT_BAD if bad > job.max_bad * len(trainer.images) else EXIT_COMPLETE,
        images=len(trainer.images),
        bad=bad,
        statuses=statuses,
        trained=len(trainer.trained),
        held_out=len(trainer.held),
        classes=trainer.count - len(untrained),
        untrained=len(untrained),
        epochs=at.epoch,
        best_epoch=best["epoch"],
        history=at.history,
    )
    store.commit(job.folder, "summary.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result

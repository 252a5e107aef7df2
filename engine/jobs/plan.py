"""What a run will do, decided before it starts: settings, the ordered images, the shards."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa

from ... import IncompleteError, InputError, RunError, __version__
from ...models.load import ModelFile, open_model
from ...models.spec import ModelSpec
from ..methods import parse_method
from ..opening import Loaded, load, load_opened, read_graph
from ..passes import check_backward, check_targets
from ..trial import Trial
from ..types import Target, class_index, parse_targets
from . import store
from .sources import Source, list_source

SHARD_SECONDS = 60.0
MAX_SHARD_ROWS = 4096
RUN_NAMES = ("_tmp", "plan", "data", "metrics", "events", "report", "run.json", "summary.json")
UNBORN_NAMES = ("_tmp", "plan", "data", "events")  # what a call leaves that was killed before it wrote run.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the user asked for; every field is a flag of `heatmill explain`."""

    model: Path
    inputs: tuple[Path, ...]
    out: Path
    methods: tuple[str, ...] = ("score-cam",)
    targets: tuple[str, ...] = ("predicted",)
    layer: str | None = None
    backend: str = "auto"
    provider: str | None = None
    precision: str = "auto"
    batch_size: int | None = None
    seed: int = 0
    limit: int | None = None
    workers: int | None = None
    devices: tuple[int, ...] = ()
    preprocess: str | None = None
    labels: Path | None = None
    output: str | None = None
    scores: str | None = None
    max_bad: float = 0.01
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A frozen run: what `run.json` says, and the table of its images."""

    settings: Mapping[str, Any]
    images: pa.Table

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(kind, value) for kind, value in self.settings["targets"])

    @property
    def shard_rows(self) -> int:
        return int(self.settings["shard_rows"])

    @property
    def shards(self) -> range:
        return range(-(-self.images.num_rows // self.shard_rows))

    def rows(self, shard: int) -> range:
        """The plan rows of one shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.images.num_rows))


def open_job(job: Job) -> tuple[Loaded, Source, tuple[Target, ...]]:
    """Everything that can be refused without running the model.

    Raises:
        HeatmillError: the output folder, the model, a method, a target or the input is refused.
    """
    loaded = load(
        job.model,
        job.methods,
        layer=job.layer,
        preprocess=job.preprocess,
        labels=job.labels,
        output=job.output,
        scores=job.scores,
    )
    check_backward(loaded)
    classes = loaded.model.classes or len(loaded.spec.label_names) or 2**31 - 1
    targets = parse_targets(job.targets, classes, loaded.spec.label_names)
    check_targets(loaded, targets)
    inputs = [path.absolute() if os.path.exists(path) else path for path in job.inputs]
    source = list_source(inputs, limit=job.limit)
    if any(target.kind == "label" for target in targets):
        source = with_classes(source, classes, loaded.spec.label_names)
    return loaded, source, targets


def with_classes(source: Source, classes: int, label_names: tuple[str, ...]) -> Source:
    if not source.has_labels:
        raise InputError("target 'label' needs a manifest with a column 'label' or 'target'; the input has none")
    labels = source.table["label"].to_pylist()
    unlabelled = [i for i, label in enumerate(labels) if label is None]
    if unlabelled:
        first = source.table["id"][unlabelled[0]].as_py()
        raise InputError(f"target 'label': {len(unlabelled)} images have no label, the first is {first!r}")
    known: dict[str, int] = {}
    for label, identity in zip(labels, source.table["id"].to_pylist(), strict=True):
        if label not in known:
            try:
                known[label] = class_index(label, classes, label_names)
            except InputError as err:
                raise InputError(f"label of {identity!r}: {err}") from None
    column = pa.array([known[label] for label in labels], pa.int32())
    return Source(source.table.append_column("target", column), source.has_labels)


def freeze(job: Job, loaded: Loaded, source: Source, targets: tuple[Target, ...], trial: Trial) -> Plan:
    """The plan of a new run."""
    seconds = image_seconds(loaded, targets, trial)
    rows_per_image = len(loaded.calls) * sum(target.count for target in targets)
    images = max(1.0, min(SHARD_SECONDS / seconds, MAX_SHARD_ROWS / rows_per_image))
    shard_rows = 2 ** math.floor(math.log2(images))
    grid_methods = any(not call.pixels for call in loaded.calls)
    settings: dict[str, Any] = {
        "format": store.FORMAT,
        "identity": identity(job, loaded, targets),
        "images": source.table.num_rows,
        "rows_per_image": rows_per_image,
        "shard_rows": shard_rows,
        "model": {"path": str(loaded.model.path), "sha256": loaded.model.sha256, "scores": loaded.model.output},
        "spec": loaded.spec.to_json(),
        "spec_source": loaded.spec_source,
        "methods": [{"call": call.text, "parameters": dict(call.parameters)} for call in loaded.calls],
        "targets": [[target.kind, target.value] for target in targets],
        "layer": loaded.tap.name if loaded.tap else None,
        "grid": list(loaded.tap.grid) if loaded.tap and grid_methods else None,
        "backend": trial.backend,
        "provider": trial.provider,
        "precision": trial.precision,
        "batch_size": trial.batch_size,
        "rows_per_second": round(trial.rows_per_second, 3),
        "batch_trials": {str(rows): round(speed, 3) for rows, speed in trial.trials.items()},
        "seed": job.seed,
        "versions": {**versions(), "backend": trial.version},
    }
    settings["plan_hash"] = store.plan_hash(settings["identity"], shard_rows, source.table)
    position = pa.array(range(source.table.num_rows), pa.int64())
    return Plan(settings, source.table.add_column(0, "row", position))


def image_seconds(loaded: Loaded, targets: tuple[Target, ...], trial: Trial) -> float:
    """What one image is expected to take: masks that depend on the class are run for each target."""
    facts, count, network = loaded.facts, sum(target.count for target in targets), 1 / trial.rows_per_second
    seconds = trial.observe_seconds or network
    for call in loaded.calls:
        method, values = call.method, call.parameters
        each = trial.through_seconds if method.through(facts, values) else network
        each = trial.head_seconds if method.head(facts, values) else each
        per_class = method.backward(facts, values) or method.through(facts, values)
        seconds += each * method.passes(facts, values) * (count if per_class else 1)
    return seconds


def versions() -> dict[str, str]:
    """What is installed here."""
    return {
        "heatmill": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
    }


def identity(job: Job, loaded: Loaded, targets: tuple[Target, ...]) -> dict[str, Any]:
    """What two calls must share to be one run; the names are the user's words, for the refusal."""
    return {
        "heatmill": ".".join(__version__.split(".")[:2]),
        "model": loaded.model.sha256,
        "spec": loaded.spec.to_json(),
        "--method": [{"name": call.method.name, **call.parameters} for call in loaded.calls],
        "--target": [target.text for target in targets],
        "--layer": loaded.tap.name if loaded.tap else None,
        "--scores": loaded.model.output,
        "--backend": job.backend,
        "--provider": job.provider,
        "--precision": job.precision,
        "--batch-size": job.batch_size or "auto",
        "--seed": job.seed,
        "--limit": job.limit,
        "input": [os.path.abspath(path) for path in job.inputs],
    }


def create(run: Path, plan: Plan) -> None:
    """Write the plan; `run.json` comes last and makes the folder a run."""
    (run / "data").mkdir(parents=True, exist_ok=True)
    (run / "events").mkdir(exist_ok=True)
    store.commit(run, store.PLAN, store.parquet_bytes(plan.images))
    store.commit(run, "run.json", (json.dumps(plan.settings, indent=1) + "\n").encode())


def check_folder(out: Path, overwrite: bool) -> bool:
    """Whether `out` holds a run to go on with.

    Raises:
        InputError: it is a file, or holds other things than a run, or can't be written.
        IncompleteError: it holds a run and can't be written.
    """
    exists = (out / "run.json").exists()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; -o takes a folder for the run")
    if out.is_dir() and not (exists and not overwrite):
        known = RUN_NAMES if exists else UNBORN_NAMES
        foreign = [f"{path.name}" for path in out.iterdir() if path.name not in known]
        if not exists and (out / "data").is_dir():
            foreign += [f"data/{path.name}" for path in (out / "data").iterdir()]
        if foreign and exists:
            raise InputError(
                f"{out}: holds {min(foreign)!r} besides the run; move it away, --overwrite would remove it"
            )
        if foreign:
            raise InputError(f"{out}: holds {min(foreign)!r} and is not a run; give a new or empty folder with -o")
    nearest = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        if exists:
            raise IncompleteError(f"{out}: can't be written; make it writable, then the same command resumes")
        raise InputError(f"{out}: can't be written ({nearest} is not writable); give another folder with -o")
    return exists and not overwrite


def clear(run: Path) -> None:
    """Remove a run; `run.json` goes last, so that no part is ever left without it."""
    for name in ("summary.json", "report", "metrics", "data", "events", "plan", "run.json"):
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same(run: Path, plan: Plan, asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        RunError: names the differing fields with both values.
    """
    old, new = plan.settings["identity"], json.loads(json.dumps(asked))
    differing = [name for name in new if new[name] != old.get(name)]
    if differing:
        told = "; ".join(_difference(name, old.get(name), new[name]) for name in differing)
        raise RunError(f"{run}: belongs to other settings ({told}); give another folder with -o, or --overwrite")


def reopen(run: Path) -> Plan:
    """The plan of an existing run.

    Raises:
        RunError: not a run, or damaged.
    """
    settings = store.open_run(run).settings
    return Plan(settings, store.read_plan(run, settings))


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return ", ".join(_difference(f"{name} {key}", old.get(key), new.get(key)) for key in parts)
    texts = [text if len(text) <= 60 else text[:57] + "..." for text in map(str, (old, new))]
    return f"{name}: {texts[0]} in the run, {texts[1]} asked"


def load_for(plan: Plan, path: Path, change: Callable[[ModelFile], onnx.ModelProto] | None = None) -> Loaded:
    """The model of a run, opened again from `path` by what `run.json` resolved.

    Args:
        change: makes another graph of the file's, with the same values by the same names.

    Raises:
        RunError: the model's file is not the one the run began with.
    """
    settings = plan.settings
    model = open_model(path, scores=settings["model"]["scores"])
    if model.sha256 != settings["model"]["sha256"]:
        raise RunError(
            f"{model.path}: the file has changed since the run began; put it back, or start with --overwrite"
        )
    if change is not None:
        model = replace(model, proto=change(model))
    spec = ModelSpec.from_json(settings["spec"], "run.json")
    calls = [parse_method(method["call"]) for method in settings["methods"]]
    return load_opened(model, spec, settings["spec_source"], read_graph(model, spec), calls, settings["layer"])

"""Maps as ViRelAy and CoRelAy read them: HDF5 files as their database specification has it, and project files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from .... import InputError
from ....models.preprocess import ImageRefused, decode, view
from ....models.spec import ModelSpec
from ...types import class_index
from ..report import marked, safe_name
from ..sources import read
from ..store import Row, Run, read_plan
from .base import Selection, in_threads

Array = npt.NDArray[Any]

INPUT, LABELS = "input.h5", "label-map.json"
STRATEGIES = {"label": "true_label", "predicted": "predicted_label", "top1": "predicted_label"}


def write_virelay(selection: Selection, folder: Path) -> None:
    """Write input.h5 with what the network saw, an attribution file per method and target, and a project of each.

    `attribution` (samples, 3, H, W) float32 are the raw maps at the network's input size, a third in each channel:
    ViRelAy sums the channels and does not draw a single one. `label` are the classes that they explain, `index` the
    samples of input.h5, `prediction` (samples, classes) the scores: a run keeps those of the predicted and of the
    explained class, the others are 0. The label of an input sample is the manifest's, or where there is none the
    predicted class.

    Raises:
        InputError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise InputError("--as hdf5-virelay needs h5py: pip install 'heatmill[hdf5]'") from None
    run = selection.run
    names = _class_names(run)
    views = _Views(run, names)

    def prepare(rows: list[Row]) -> tuple[list[Row], tuple[Array, int] | str]:
        try:
            return rows, views.sample(rows[0])
        except ImageRefused as refusal:
            return rows, f"photograph {refusal.status}"

    strategies: dict[str, tuple[str, str]] = {}
    attributions: dict[str, _Columns] = {}
    with ExitStack() as files:

        def create(name: str) -> _Columns:
            columns = _Columns(files.enter_context(h5py.File(folder / name, "w")))
            files.callback(columns.flush)
            return columns

        samples = create(INPUT)
        for rows, sample in in_threads(prepare, selection.images()):
            if isinstance(sample, str):
                selection.skipped[sample] += len(rows)
                continue
            pixels, label = sample
            index = samples.add({"data": pixels, "label": np.uint16(label)})
            for row in rows:
                asked = f"class-{row.target}" if row.target_source == "class" else row.target_source
                call = row.method.replace(":", ",", 1)
                name = f"{marked(safe_name(call), call)}--{asked}"
                if name not in attributions:
                    attributions[name] = create(f"{name}.attribution.h5")
                    strategies[name] = row.method, STRATEGIES.get(row.target_source, asked)
                scores = np.zeros(len(names), np.float32)
                for position, score in ((row.target, row.score), (row.prediction, row.prediction_score)):
                    if position is not None and score is not None:
                        scores[position] = score
                attributions[name].add(
                    {
                        "index": np.uint32(index),
                        "attribution": np.repeat(row.upsampled()[None] / np.float32(3), 3, axis=0),
                        "label": np.uint16(row.target or 0),
                        "prediction": scores,
                    }
                )
                selection.written += 1
    labels = [{"index": i, "word_net_id": "", "name": name} for i, name in enumerate(names)]
    (folder / LABELS).write_text(json.dumps(labels, indent=1) + "\n")
    for name, (method, strategy) in strategies.items():
        (folder / f"{name}.yaml").write_text(json.dumps(_project(run, name, method, strategy), indent=1) + "\n")


def _project(run: Run, name: str, method: str, strategy: str) -> dict[str, Any]:
    """A project file; JSON is YAML."""
    height, width = run.input_size
    model = Path(run.settings["model"]["path"]).name
    dataset = {
        "name": run.path.absolute().name,
        "type": "hdf5",
        "path": INPUT,
        "input_width": width,
        "input_height": height,
        "up_sampling_method": "none",
        "down_sampling_method": "none",
    }
    attributions = {
        "attribution_method": method,
        "attribution_strategy": strategy,
        "sources": [f"{name}.attribution.h5"],
    }
    project = {"name": f"{model}, {method}", "model": model, "label_map": LABELS}
    return {"project": {**project, "dataset": dataset, "attributions": attributions}}


def _class_names(run: Run) -> list[str]:
    """A name for every class: the spec's, or numbers up to the greatest class of the run."""
    if names := run.settings["spec"].get("label_names"):
        return list(names)
    table = run.table()
    greatest = max((pc.max(table[name]).as_py() or 0 for name in ("target", "pred")), default=0)
    return [f"class {i}" for i in range(greatest + 1)]


class _Views:
    """What the network saw of the images of a run, and their labels."""

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        self._plan = read_plan(run.path, run.settings)
        self._spec = ModelSpec.from_json(run.settings["spec"], "run.json")
        self._names = tuple(names)

    def sample(self, row: Row) -> tuple[Array, int]:
        """A view as uint8 (3, H, W), and its label.

        Raises:
            ImageRefused: the photograph is gone, or not what it was.
        """
        size, mtime_ns = (self._plan[name][row.row].as_py() for name in ("size", "mtime_ns"))
        data = read(row.path, size, mtime_ns)
        pixels, _ = view(decode(data, exif=self._spec.exif, color=self._spec.color), self._spec)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels), self._label(row)

    def _label(self, row: Row) -> int:
        text = self._plan["label"][row.row].as_py()
        if text is not None:
            try:
                return class_index(text, len(self._names), self._names)
            except InputError:
                pass  # a label that is no class of the model
        return row.prediction or 0


class _Columns:
    """Datasets of an HDF5 file that grow by a row at a time, written in blocks."""

    BLOCK = 64

    def __init__(self, file: Any) -> None:
        self._file, self._count = file, 0
        self._held: list[Mapping[str, Any]] = []

    def add(self, values: Mapping[str, Any]) -> int:
        """Append a row; its index."""
        self._held.append(values)
        if len(self._held) == self.BLOCK:
            self.flush()
        return self._count + len(self._held) - 1

    def flush(self) -> None:
        """Write the rows that are held."""
        if not self._held:
            return
        for name in self._held[0]:
            block = np.stack([values[name] for values in self._held])
            if name not in self._file:
                wide = {"chunks": (1, *block.shape[1:]), "compression": "gzip", "compression_opts": 1, "shuffle": True}
                self._file.create_dataset(
                    name,
                    shape=(0, *block.shape[1:]),
                    maxshape=(None, *block.shape[1:]),
                    dtype=block.dtype,
                    **(wide if block.ndim > 1 else {"chunks": (1024,)}),
                )
            self._file[name].resize(self._count + len(block), axis=0)
            self._file[name][self._count :] = block
        self._count += len(self._held)
        self._held = []

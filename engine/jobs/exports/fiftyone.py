"""A data set that FiftyOne imports: its serialised samples in JSON, the maps as Heatmap labels beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image

from ..report import overlay_name
from ..store import Row, read_plan
from .base import Selection, grey_picture, in_threads

Array = npt.NDArray[Any]

MAP_SIDE = 256


def write_fiftyone(selection: Selection, folder: Path) -> None:
    """Write metadata.json, samples.json and fields/: a sample per image, for

        fiftyone.Dataset.from_dir(OUT, dataset_type=fiftyone.types.FiftyOneDataset)

    Each method and target is a field: a Heatmap in the frame of the whole photograph, at most MAP_SIDE pixels long
    (FiftyOne stretches it), and beside it the class that it explains. The photographs stay where they are.
    """
    run = selection.run
    plan = read_plan(run.path, run.settings)
    labels = plan["label"] if "label" in plan.column_names else None
    names = run.settings["spec"].get("label_names", ())
    fields = _Fields()

    def make(rows: list[Row]) -> dict[str, Any]:
        first = rows[0]
        sample: dict[str, Any] = {"filepath": first.path, "tags": [], "heatmill_id": first.id}
        truth = labels[first.row].as_py() if labels is not None else None
        if truth is not None:
            sample["ground_truth"] = _classification(truth, None)
        if first.prediction is not None:
            sample["prediction"] = _classification(_name(first.prediction, names), first.prediction_score)
        for row in rows:
            field = fields.name(row)
            scale = MAP_SIDE / max(row.width or 1, row.height or 1)
            shape = max(1, round((row.height or 1) * scale)), max(1, round((row.width or 1) * scale))
            path = f"fields/{field}/{overlay_name(row)}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey_picture(row, shape)).save(folder / path, "PNG", compress_level=4)
            sample[field] = {"_cls": "Heatmap", "map_path": path}
            sample[f"{field}_class"] = _classification(row.label_name or _name(row.target, names), row.score)
        return sample

    def named() -> Any:
        for rows in selection.images():
            if rows[0].path.startswith("file:///"):
                selection.skipped["photograph whose name is not UTF-8"] += len(rows)
                continue
            for row in rows:
                fields.add(row)
            yield rows

    with open(folder / "samples.json", "w", encoding="utf-8") as file:
        file.write('{"samples": [')
        for i, sample in enumerate(in_threads(make, named())):
            file.write(f"{',' if i else ''}\n{json.dumps(sample)}")
            selection.written += sum("map_path" in value for value in sample.values() if isinstance(value, Mapping))
        file.write("\n]}\n")
    model = Path(run.settings["model"]["path"]).name
    info = {"model": model, "methods": run.calls(), "heatmaps": fields.asked()}
    metadata = {"name": f"{model} explained", "media_type": "image", "info": info}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


class _Fields:
    """Field names: a method and what was asked, in letters, digits and `_`; no two are one."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    @staticmethod
    def _key(row: Row) -> tuple[str, str]:
        return row.method, f"class {row.target}" if row.target_source == "class" else row.target_source

    def add(self, row: Row) -> None:
        key = self._key(row)
        if key in self._names:
            return
        plain = re.sub(r"\W+", "_", " ".join(key).replace("+", "p"), flags=re.ASCII)
        taken = set(self._names.values())
        numbered = (plain if i == 1 else f"{plain}_{i}" for i in range(1, len(taken) + 2))
        self._names[key] = next(name for name in numbered if name not in taken)

    def name(self, row: Row) -> str:
        return self._names[self._key(row)]

    def asked(self) -> dict[str, list[str]]:
        """The method and the target of each field."""
        return {name: list(key) for key, name in self._names.items()}


def _name(index: int | None, names: Sequence[str]) -> str:
    return names[index] if index is not None and index < len(names) else f"class {index}"


def _classification(label: str, score: float | None) -> dict[str, Any]:
    return {"_cls": "Classification", "label": label, "confidence": score}

"""Photographs cut to, or without, what a map shows: new images for training, in the manner of attention cropping and
dropping (Hu et al. 2019), which CF-CAM's authors report for fine-grained classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageFilter

from ....kernels.finish import flat
from ....models.preprocess import ImageRefused, mean_color
from ....models.spec import ModelSpec
from ..report import Photographs, overlay_name, placed
from ..store import Row, read_plan
from .base import ABOUT, Selection, about, in_threads, manifest, numbers

Array = npt.NDArray[Any]
Box = tuple[int, int, int, int]

THRESHOLD = 0.5
PADDING = 0.1
FILLS = ("mean", "black", "blur")
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": (".jpg", {"quality": 95, "subsampling": 0}),
    "png": (".png", {"compress_level": 4}),
}
JPEG_SIDE = 65500
BLUR = 0.05
STRIP = 256


def strength(saliency: Array) -> Array | None:
    """A finished map as the share of its greatest value, 0..1: the positive part of a signed one, min-max of others.

    None where it is flat, or nowhere positive.
    """
    low, high = float(saliency.min()), float(saliency.max())
    if high <= 0 or flat(saliency[None])[0]:
        return None
    return np.maximum(saliency, 0) / high if low < 0 else (saliency - low) / (high - low)


def salient_box(levels: Array, threshold: float, padding: float, view: Sequence[float], size: tuple[int, int]) -> Box:
    """The box around all places whose level is at least `threshold`, in whole pixels of the photograph.

    Args:
        levels: (H, W) of `strength`.
        padding: added on each side, as a share of the box's side.
        view: (x0, y0, x1, y1) of the map in the photograph.
        size: (width, height) of the photograph, to which the box is clipped.

    Returns:
        (x0, y0, x1, y1), the last two outside; without extent where the region lies beside the photograph.
    """
    inside = levels >= threshold
    sides = []
    for axis, (low, high), most in ((0, view[::2], size[0]), (1, view[1::2], size[1])):
        places = np.flatnonzero(inside.any(axis=axis))
        scale = (high - low) / levels.shape[1 - axis]
        begin, end = low + places[0] * scale, low + (places[-1] + 1) * scale
        more = padding * (end - begin)
        begin, end = np.clip([np.floor(round(begin - more, 6)), np.ceil(round(end + more, 6))], 0, most)
        sides.append((int(begin), int(end)))
    (x0, x1), (y0, y1) = sides
    return x0, y0, x1, y1


def erase(
    photograph: Array, levels: Array, threshold: float, view: Sequence[float], filling: Array
) -> tuple[Array, float]:
    """A photograph (h, w, 3) with `filling` (broadcast to it) where the map's level is at least `threshold`.

    Returns:
        the picture, and the share of its pixels that were replaced.
    """
    height, width = photograph.shape[:2]
    erased, filling = photograph.copy(), np.broadcast_to(filling, photograph.shape)
    count = 0
    for top in range(0, height, STRIP):
        rows = slice(top, min(top + STRIP, height))
        box = view[0], view[1] - top, view[2], view[3] - top
        values, seen = placed(levels, (rows.stop - top, width), box)
        gone = (values >= threshold) & seen
        erased[rows][gone] = filling[rows][gone]
        count += int(gone.sum())
    return erased, count / (height * width)


def write_crops(selection: Selection, folder: Path) -> None:
    """Write a crop per row, and the manifest."""
    threshold, padding = selection.options.threshold, selection.options.padding
    threshold = THRESHOLD if threshold is None else threshold
    padding = PADDING if padding is None else padding

    def crop(row: Row, levels: Array, photograph: Image.Image) -> tuple[Image.Image, dict[str, Any]] | str:
        box = salient_box(levels, threshold, padding, _view(row), photograph.size)
        if box[0] >= box[2] or box[1] >= box[3]:
            return "beside the photograph"
        return photograph.crop(box), {"region": numbers(box), "boxes": box}

    _write(selection, folder, ["region"], crop)


def write_erased(selection: Selection, folder: Path) -> None:
    """Write a picture without the salient region per row, and the manifest."""
    threshold = THRESHOLD if selection.options.threshold is None else selection.options.threshold
    fill = selection.options.fill or FILLS[0]
    color = mean_color(ModelSpec.from_json(selection.run.settings["spec"], "run.json"))

    def erasure(row: Row, levels: Array, photograph: Image.Image) -> tuple[Image.Image, dict[str, Any]] | str:
        if fill == "blur":
            filling = np.asarray(photograph.filter(ImageFilter.GaussianBlur(BLUR * max(photograph.size))))
        else:
            filling = np.asarray(color if fill == "mean" else 0, dtype=np.uint8)
        erased, share = erase(np.asarray(photograph), levels, threshold, _view(row), filling)
        if not share:
            return "beside the photograph"
        return Image.fromarray(erased), {"erased": f"{share:.4f}", "boxes": (0, 0, *photograph.size)}

    _write(selection, folder, ["erased"], erasure)


def _write(
    selection: Selection,
    folder: Path,
    own: Sequence[str],
    change: Callable[[Row, Array, Image.Image], tuple[Image.Image, dict[str, Any]] | str],
) -> None:
    """Write what `change` makes of each photograph, with its `own` columns; its words are why a row was passed by."""
    suffix, settings = FORMATS[selection.options.format or "jpeg"]
    photographs = Photographs(selection.run)
    plan = read_plan(selection.run.path, selection.run.settings)
    known = {name: plan[name] for name in ("label", "boxes") if name in plan.column_names}
    known = {name: column for name, column in known.items() if column.null_count < len(column)}

    def make(rows: list[Row]) -> list[dict[str, Any] | str]:
        try:
            photograph = photographs.open(rows[0])
        except ImageRefused as refusal:
            return [f"photograph {refusal.status}"] * len(rows)
        made: list[dict[str, Any] | str] = []
        for row in rows:
            levels = strength(row.saliency())
            found = "flat map" if levels is None else change(row, levels, photograph)
            if isinstance(found, str):
                made.append(found)
                continue
            picture, facts = found
            if suffix == ".jpg" and max(picture.size) > JPEG_SIDE:
                made.append(f"longer than the {JPEG_SIDE} pixels of a JPEG")
                continue
            name = f"images/{overlay_name(row, suffix)}"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, **settings)
            line = {"uri": name, "source_id": row.id, "source_uri": row.path, **about(row), **facts}
            made.append(line | _known(known, row.row, facts["boxes"]))
        return made

    with manifest(folder, ["uri", *known, "source_id", "source_uri", *own, *ABOUT]) as add:
        for made in in_threads(make, selection.images()):
            for line in made:
                if isinstance(line, str):
                    selection.skipped[line] += 1
                else:
                    add(line)
                    selection.written += 1


def _view(row: Row) -> Sequence[float]:
    return row.crop_box or (0, 0, row.width or 0, row.height or 0)


def _known(known: Mapping[str, pa.ChunkedArray], row: int, region: Box) -> dict[str, Any]:
    """The image's label, and its boxes on the part of the photograph that the picture shows."""
    label = known["label"][row].as_py() if "label" in known else None
    boxes = known["boxes"][row].as_py() if "boxes" in known else None
    return {"label": label, "boxes": ";".join(_clipped(boxes or (), region))}


def _clipped(boxes: Iterable[Mapping[str, float]], region: Box) -> Iterator[str]:
    """Boxes as manifests hold them, relative to a region and clipped to it; those outside are left out."""
    left, top, right, bottom = region
    for box in boxes:
        x0, x1 = (min(max(box[side], left), right) - left for side in ("x0", "x1"))
        y0, y1 = (min(max(box[side], top), bottom) - top for side in ("y0", "y1"))
        if x0 < x1 and y0 < y1:
            yield numbers((x0, y0, x1, y1))

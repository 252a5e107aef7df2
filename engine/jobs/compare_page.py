"""The page of a comparison: figures, what was left out and why, and the worst pairs beside each other."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...models.preprocess import ImageRefused
from .compare import MEASURES, Comparison, measure_name, pair_name, score_text
from .report import THUMBNAIL_SIDE, Photographs, overlay, relative_box, replacing, template
from .store import Row, Run

Array = npt.NDArray[Any]

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # would hide what a name is


def write_page(first: Run, second: Run, comparison: Comparison) -> Path:
    """Write OUT/index.html of a comparison; the page holds everything it needs.

    Raises:
        InputError: the page can't be written.
        RunError: a plan is damaged.
    """
    told = comparison.told
    page = Path(told["out"]) / "index.html"
    head, tail = template("compare.html", f"{first.path.name} and {second.path.name} - heatmill")
    photographs = Photographs(first), Photographs(second)
    names = [run.settings["spec"].get("label_names", ()) for run in (first, second)]
    with replacing(page) as file:
        file.write(head)
        file.write(_figures(told, comparison.flips, names).encode())
        if comparison.worst:
            what = measure_name(told["worst_by"], told["top"])
            file.write(f"<h2>The {len(comparison.worst)} pairs of the lowest {what}</h2>\n<ul class=pairs>\n".encode())
            for pair in comparison.worst:
                rows = pair.first, pair.second
                figures = [
                    _figure(name, row, _picture(row, side, photographs))
                    for side, (name, row) in enumerate(zip("AB", rows, strict=True))
                ]
                measures = ", ".join(
                    f"{measure_name(name, told['top'])} {value:.4f}"
                    for name, value in zip(MEASURES, pair.values, strict=True)
                )
                about = f"<p class=measures>{measures}</p><p class=id>{_text(pair.first.id)}</p>"
                card = f"<div class=sides>{''.join(figures)}</div><div class=about>{about}</div>"
                file.write(f"<li class=pair>{card}</li>\n".encode())
            file.write(b"</ul>\n")
        file.write(tail)
    return page


def _figures(told: dict[str, Any], flips: Sequence[tuple[Row, Row]], names: Sequence[Sequence[str]]) -> str:
    images, predictions = told["images"], told["predictions"]
    parts = [
        '<p class="brand">heatmill compare</p>',
        f"<h1>A: {_text(told['run_a'])}<br>B: {_text(told['run_b'])}</h1>",
        "<ul class=summary>",
        f"<li><b>{images['common']:,}</b> images in both</li>",
        *(f"<li><b>{images[f'only_{side}']:,}</b> only in {side.upper()}</li>" for side in "ab"),
        f"<li><b>{predictions['flipped']:,}</b> of {predictions['compared']:,} predictions flipped</li>",
        "</ul>",
        *(
            f'<p class="note strong">The run {side.upper()} is not complete.</p>'
            for side, whole in told["complete"].items()
            if not whole
        ),
    ]
    if told["differences"]:
        parts += ["<h2>What differs between the runs</h2>", _table(["", "A", "B"], told["differences"])]
    else:
        parts.append('<p class="note">The runs have the same settings.</p>')
    parts += ["<div class=groups>", *(_group(group, told["top"]) for group in told["groups"]), "</div>"]
    alone = [
        (side.upper(), what, f"{number:,}")
        for side, found in told["unmatched"].items()
        for what, number in found.items()
    ]
    if alone:
        parts += ["<h2>Rows without a counterpart</h2>", _table(["Only in", "Rows of", "Rows"], alone)]
    if flips:
        shown = f" ({len(flips)} of {predictions['flipped']:,})" if len(flips) < predictions["flipped"] else ""
        lines = [[rows[0].id, *map(_prediction, rows, names)] for rows in flips]
        parts += [f"<h2>Flipped predictions{shown}, the surest first</h2>", _table(["Image", "A", "B"], lines)]
    return "\n".join(parts) + "\n"


def _group(group: dict[str, Any], top: float) -> str:
    """The figures of one method and target."""
    parts = [f"<h2>{_text(pair_name(group))}: {group['compared']:,} of {group['pairs']:,} pairs</h2>"]
    if group["compared"]:
        lines = [[measure_name(name, top), *(f"{value:.4f}" for value in group[name].values())] for name in MEASURES]
        parts.append(_table(["", "Mean", "Median", "5%", "Least"], lines))
    if moved := score_text(group):
        parts.append(f"<p class=note>{moved[0].upper()}{moved[1:]}.</p>")
    for reason, number in group["excluded"].items():
        parts.append(f'<p class="note strong">Not counted: {_text(reason)} ({number:,})</p>')
    return f"<section>{''.join(parts)}</section>"


def _prediction(row: Row, names: Sequence[str]) -> str:
    """The predicted class, its name and its score."""
    name = names[row.prediction] if row.prediction is not None and row.prediction < len(names) else ""
    score = "no score" if row.prediction_score is None else f"{row.prediction_score:.4g}"
    return f"{row.prediction} {name} ({score})"


def _picture(row: Row, side: int, photographs: Sequence[Photographs]) -> Array:
    """A row's map over its photograph, or over grey where the photograph is gone."""
    try:
        photograph = np.asarray(photographs[side].open(row, THUMBNAIL_SIDE))
    except ImageRefused:
        width, height = row.width or 1, row.height or 1
        scale = THUMBNAIL_SIDE / max(width, height)
        photograph = np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 128, np.uint8)
    height, width = photograph.shape[:2]
    box = tuple(part * length for part, length in zip(relative_box(row), (width, height) * 2, strict=True))
    return overlay(photograph, row.saliency(), box)


def _figure(name: str, row: Row, picture: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    score = "no score" if row.score is None else f"{row.score:.4g}"
    caption = _text(f"{name}: {row.method}, {row.target_source}, {row.target} {row.label_name or ''} ({score})")
    return (
        f'<figure><img alt="{caption}" src="data:image/webp;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; its first column heads the lines, and numbers stand to the right."""

    def cell(text: str) -> str:
        return f"<td{' class=number' if re.fullmatch('[-0-9.,]+', text) else ''}>{_text(text)}</td>"

    top = "".join(f"<th scope=col>{_text(text)}</th>" for text in head)
    body = "".join(f"<tr><th scope=row>{_text(first)}</th>{''.join(map(cell, rest))}</tr>\n" for first, *rest in lines)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _text(text: str) -> str:
    return html.escape(_HIDDEN.sub("\ufffd", text))

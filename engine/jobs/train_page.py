"""The page of a training: how the loss went, and how the maps of a few held-out photographs changed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...kernels.finish import finish
from ...models.preprocess import denormalise
from ..types import Array
from .report import overlay, replacing
from .train_settings import TrainJob
from .trainer import Trainer
from .worker import prepare

SIDE = 112
WIDTH, HEIGHT, MARGIN = 320, 170, 28
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { color: #667 } dd { margin: 0 }
figure { display: inline-block; width: 320px; margin: 0 1rem 1rem 0; vertical-align: top }
figcaption, small { color: #667; font-size: .85rem }
table { border-collapse: collapse } td, th { padding: .15rem .5rem; text-align: right; font-weight: normal }
th { color: #667 } .pictures { overflow-x: auto } .pictures td, .pictures th { padding: 2px; text-align: center }
.pictures td { vertical-align: top } img { display: block } svg text { font-size: 11px; fill: #667 }
.first { stroke: #b5482a; color: #b5482a } .second { stroke: #2a6fb5; color: #2a6fb5 }
.third { stroke: #4c8a3f; color: #4c8a3f } path { fill: none; stroke-width: 2 }
.axis { stroke: #99a; stroke-width: 1 } .best { stroke: #99a; stroke-dasharray: 3 3; stroke-width: 1 }
"""
KINDS = ("first", "second", "third")


def write_page(job: TrainJob, trainer: Trainer) -> Path:
    """Write RUN/report/index.html: curves, figures by epoch, and example maps; it needs no network.

    Raises:
        InputError: it can't be written.
    """
    history, best = trainer.at.history, trainer.at.best
    facts = {
        "Model": f"{job.model.name}, layer {trainer.tap.name}",
        "Variant": f"{job.variant}, loss {job.loss}",
        "Images": f"{len(trainer.trained)} trained on, {len(trainer.held)} held out",
        "Classes": f"{trainer.count - len(trainer.untrained)} of {trainer.count} have a training image",
        "Schedule": f"{job.preset}: {len(history)} of {trainer.schedule.epochs} epochs, batches of "
        f"{trainer.schedule.batch_size}, rate {trainer.schedule.rate:g}, seed {job.seed}",
        "Kept": f"epoch {history[best]['epoch']}, held-out loss {history[best]['held_out']:.4g}",
    }
    measured = [entry for entry in history if "average_drop" in entry]
    curves = [
        _curve("Loss", {"trained": _line(history, "loss"), "held out": _line(history, "held_out")}, best + 1),
        _curve(
            "Parts of the loss", {name: _line(history, name) for name in ("entropy", "area", "variation")}, best + 1
        ),
        _curve(
            "Held-out photographs under their maps, %",
            {"average drop": _line(measured, "average_drop"), "increase": _line(measured, "increase")},
            best + 1,
        ),
    ]
    terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in facts.items())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    body = (
        f"<h1>L-CAM on {html.escape(job.model.name)}</h1><dl>{terms}</dl><h2>Curves</h2>{''.join(curves)}"
        f"<h2>Maps of held-out photographs</h2>{_pictures(trainer, measured)}<h2>Epochs</h2>{_table(history)}"
    )
    page = job.folder / "report" / "index.html"
    with replacing(page) as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><title>{html.escape(job.out.name)} - heatmill</title><style>{STYLE}</style>'
            f"<body>{body}</body></html>\n".encode()
        )
    return page


def _line(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["epoch"], float(entry[name])) for entry in history]


def _curve(title: str, lines: Mapping[str, list[tuple[int, float]]], best: int) -> str:
    """A small figure of some lines over the epochs; a dashed one where the weights were kept."""
    values = [value for line in lines.values() for _, value in line]
    epochs = [epoch for line in lines.values() for epoch, _ in line]
    low, high = min(*values, 0.0), max(*values, 1e-9)
    first, last = min(epochs), max(*epochs, min(epochs) + 1)

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = MARGIN + (epoch - first) / (last - first) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    paths, keys = [], []
    for kind, (name, line) in zip(KINDS, lines.items(), strict=False):
        points = " L ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        paths.append(f'<path class="{kind}" d="M {points}"/>')
        keys.append(f'<span class="{kind}">{html.escape(name)} {line[-1][1]:.3g}</span>')
    x0, y0 = place(first, low)
    x1, y1 = place(last, high)
    bx, _ = place(best, low)
    axes = f'<path class="axis" d="M {x0:.1f},{y1:.1f} L {x0:.1f},{y0:.1f} L {x1:.1f},{y0:.1f}"/>'
    axes += f'<path class="best" d="M {bx:.1f},{y1:.1f} L {bx:.1f},{y0:.1f}"/>'
    axes += f'<text x="{x0 + 4:.0f}" y="{y1 - 6:.0f}">{high:.3g}</text>'
    axes += f'<text x="{x0:.0f}" y="{y0 + 16:.0f}">epoch {first}</text>'
    axes += f'<text x="{x1:.0f}" y="{y0 + 16:.0f}" text-anchor="end">{last}</text>'
    svg = f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{axes}{"".join(paths)}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(title)}: {', '.join(keys)}</figcaption></figure>"


def _pictures(trainer: Trainer, measured: Sequence[Mapping[str, Any]]) -> str:
    """A row per photograph, a column per measured epoch."""
    names = trainer.loaded.spec.label_names
    head = "".join(f"<th>epoch {entry['epoch']}</th>" for entry in measured)
    lines = []
    for place, row in enumerate(trainer.shown.tolist()):
        prepared = prepare(
            trainer.images.slice(row, 1).to_pylist()[0], trainer.loaded.spec, trainer.loaded.model.input.dtype
        )
        if prepared.image is None:
            continue
        pixels = denormalise(prepared.image, trainer.loaded.spec)
        shown = np.asarray(Image.fromarray(pixels.squeeze()).convert("RGB").resize((SIDE, SIDE)))
        maps = finish(trainer.examples[:, place], ("minmax", "upsample"), trainer.loaded.facts.size)
        cells = "".join(f"<td>{_image(overlay(shown, one, (0, 0, SIDE, SIDE)))}</td>" for one in maps)
        known = int(trainer.classes[row])
        name = names[known] if known < len(names) else f"class {known}"
        warned = ", untrained" if known in trainer.untrained else ""
        caption = f"<small>{html.escape(name)}{warned}</small>"
        lines.append(f"<tr><td>{_image(shown)}{caption}</td>{cells}</tr>")
    return f'<div class="pictures"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _image(pixels: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=75)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" width="{pixels.shape[1]}" height="{pixels.shape[0]}" alt="">'


def _table(history: Sequence[Mapping[str, Any]]) -> str:
    names = (
        "epoch",
        "loss",
        "entropy",
        "area",
        "variation",
        "held_out",
        "average_drop",
        "increase",
        "images_per_second",
    )
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    lines = []
    for entry in history:
        cells = "".join(f"<td>{format(entry[name], '.4g') if name in entry else ''}</td>" for name in names)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"

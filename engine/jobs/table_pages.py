"""A comparison as text, Markdown, CSV, and one HTML page that needs neither a server nor a network."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cmap
import numpy as np

from ... import InputError
from ..types import Array
from .store import Run
from .table import Cell, Comparison, Difference, Slice

ARROWS = {"higher": "↑", "lower": "↓"}
WIDTH, HEIGHT = 420, 240
MOST_LINES = 12


def number(value: float) -> str:
    """Three digits behind the point, two digits of small numbers, a dash where there is no number."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def spread(cell: Cell) -> str:
    """A mean and its interval."""
    if not cell.n:
        return "-"
    return f"{number(cell.mean)} [{number(cell.low)}, {number(cell.high)}]"


def left_out(cell: Cell) -> str:
    """Why rows are not in the mean."""
    return ", ".join(f"{count} {status}" for status, count in cell.excluded.items())


def table_text(found: Comparison) -> str:
    """The table for a terminal: by metric a line for each entry, `*` the best, `=` what can't be told from it."""
    lines = []
    wide = max(len(entry.label) for entry in found.entries)
    for part in found.slices:
        if part.column:
            lines.append(f"--- {part.column}: {part.value} ({part.images} images)")
        for call in found.metrics:
            lines.append(f"{call.text} {ARROWS[call.metric.better]}")
            for i, entry in enumerate(found.entries):
                cell = part.cells[call.text, i]
                mark = _mark(found, part, call.text, i)
                told = f"; left out: {left_out(cell)}" if cell.excluded else ""
                lines.append(f"  {mark} {entry.label:{wide}}  {spread(cell)}  n={cell.n}{told}")
    legend = "mean [95% bootstrap interval]; ↑ higher is better, ↓ lower"
    if len(found.entries) > 1:
        legend += "; * the best of those judged on the most images, = not distinguishable from it (the paired "
        legend += "difference's interval holds 0)"
    return "\n".join([*lines, legend, *found.notes]) + "\n"


def _mark(found: Comparison, part: Slice, metric: str, entry: int) -> str:
    """`*` for the best, `=` for what can't be told from it; only of all images together."""
    rivals = sum(other.kind == found.entries[entry].kind for other in found.entries)
    if part.column or rivals < 2 or not part.cells[metric, entry].n:
        return " "
    return "*" if entry == found.leader(metric, entry) else "=" if found.level(metric, entry) else " "


# --- Markdown and CSV -----------------------------------------------------------------------------------------


def table_markdown(found: Comparison) -> str:
    """The table with a line for each entry; the best is bold, what can't be told from it has a `≈`."""
    heads = [f"{call.text} {ARROWS[call.metric.better]}" for call in found.metrics]
    lines = []
    for part in found.slices:
        if part.column:
            lines += ["", f"{part.column}: {part.value} ({part.images} images)", ""]
        lines += ["| | " + " | ".join(map(_escaped, heads)) + " |", "|---" * (len(heads) + 1) + "|"]
        sizes = {cell.n for cell in part.cells.values() if cell.n}
        for i, entry in enumerate(found.entries):
            shown = []
            for call in found.metrics:
                cell = part.cells[call.text, i]
                mark = _mark(found, part, call.text, i)
                text = f"**{spread(cell)}**" if mark == "*" else spread(cell) + (" ≈" if mark == "=" else "")
                shown.append(text + (f" (n={cell.n})" if len(sizes) > 1 and cell.n else ""))
            lines.append(f"| {_escaped(entry.label)} | " + " | ".join(shown) + " |")
        lines.append("")
        if len(sizes) == 1:
            lines += [f"n = {next(iter(sizes))}.", ""]
        excluded = [f"- {text}" for text in _exclusions(found, part)]
        lines += [*excluded, ""] if excluded else []
    lines.append(
        "Mean [95% bootstrap interval over images]. ↑ higher is better, ↓ lower. Bold: the best of those "
        "judged on the most images. ≈: not distinguishable from it, the interval of the paired difference holds 0."
    )
    return "\n".join([*lines, *found.notes]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _exclusions(found: Comparison, part: Slice) -> Iterator[str]:
    """What is left out of the means, a line for metrics and entries with the same counts."""
    lines: dict[tuple[str, str], list[str]] = {}
    for call in found.metrics:
        groups: dict[str, list[str]] = {}
        for i, entry in enumerate(found.entries):
            if told := left_out(part.cells[call.text, i]):
                groups.setdefault(told, []).append(entry.label)
        for told, labels in groups.items():
            whose = "" if len(labels) == len(found.entries) else f" ({', '.join(labels)})"
            lines.setdefault((whose, told), []).append(call.text)
    for (whose, told), metrics in lines.items():
        yield f"{', '.join(metrics)}{whose}: left out {told}"


def table_csv(found: Comparison) -> str:
    """A line for each slice, metric and entry."""
    rows: list[Sequence[Any]] = [
        ("slice", "value", "metric", "direction", "entry", "method", "n", "mean", "low", "high", "excluded")
    ]
    for part in found.slices:
        for call in found.metrics:
            for i, entry in enumerate(found.entries):
                cell = part.cells[call.text, i]
                told = (part.column, part.value, call.text, call.metric.better, entry.label, entry.method)
                rows.append((*told, cell.n, cell.mean, cell.low, cell.high, left_out(cell)))
    return _csv(rows)


def differences_csv(found: Comparison) -> str:
    """A line for each metric and pair of entries."""
    rows: list[Sequence[Any]] = [("metric", "a", "b", "n", "a - b", "low", "high", "a wins", "distinguishable")]
    for d in found.differences:
        labels = (found.entries[d.a].label, found.entries[d.b].label)
        rows.append((d.metric, *labels, d.n, d.mean, d.low, d.high, d.wins, "yes" if d.distinguishable else "no"))
    return _csv(rows)


def table_json(found: Comparison) -> dict[str, Any]:
    """The table for programs: means by slice, metric and entry, and the paired differences."""
    labels = [entry.label for entry in found.entries]
    cells = [
        {
            "slice": part.column,
            "value": part.value,
            "metric": call.text,
            "direction": call.metric.better,
            "entry": labels[i],
            "n": cell.n,
            **{name: _finite(getattr(cell, name)) for name in ("mean", "low", "high")},
            "excluded": dict(cell.excluded),
        }
        for part in found.slices
        for call in found.metrics
        for i, cell in ((i, part.cells[call.text, i]) for i in range(len(labels)))
    ]
    differences = [
        {
            "metric": d.metric,
            "a": labels[d.a],
            "b": labels[d.b],
            **{name: getattr(d, name) for name in ("n", "mean", "low", "high", "wins", "distinguishable")},
        }
        for d in found.differences
    ]
    return {"table": cells, "differences": differences, "notes": list(found.notes)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


# --- the page -------------------------------------------------------------------------------------------------

STYLE = """
:root { --ground: #f5f5f2; --card: #fff; --ink: #1d2022; --muted: #5a6066; --line: #deded8; --accent: #1f6f68; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #121416; --card: #1b1e21; --ink: #e7e9ea; --muted: #a1a8ae; --line: #2c3135; --accent: #66c2b7; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 28px clamp(14px, 3vw, 40px) 56px; background: var(--ground);
  color: var(--ink); font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; } h2 { margin: 40px 0 10px; font-size: 19px; }
h3 { margin: 22px 0 6px; font-size: 15px; } p, li, figcaption { color: var(--muted); max-width: 90ch; }
a { color: var(--accent); overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; background: var(--card); font-size: 14px; }
th, td { padding: 5px 10px; border: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } td small { display: block; color: var(--muted); white-space: nowrap; }
td.best { font-weight: 650; } td.best small { font-weight: 400; }
td.same { color: var(--muted); } .plots { display: flex; flex-wrap: wrap; gap: 18px; }
figure { margin: 0; padding: 12px; max-width: 446px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
svg { display: block; max-width: 100%; } svg text { fill: var(--muted); font-size: 11px; }
svg .axis { stroke: var(--line); } svg path { fill: none; stroke-width: 1.8; }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0; list-style: none; font-size: 13px; }
.key svg { display: inline-block; vertical-align: middle; margin-right: 5px; }
details { margin: 8px 0; } summary { cursor: pointer; }
"""


def table_html(found: Comparison, runs: Sequence[Run]) -> str:
    """The page: the table, its slices, the paired differences, the curves, and the best and worst images.

    Its content security policy allows its own style and no network.
    """
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">',
        f"<title>Evaluation - heatmill</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        "<h1>Evaluation</h1>",
        f"<p>{html.escape(_models(runs))}</p>",
        "<p>Mean, 95% bootstrap interval over images. ↑ higher is better, ↓ lower. Bold: the best of those "
        "judged on the most images. ≈: not distinguishable from it: the interval of the paired difference holds 0.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in found.notes),
    ]
    for part in found.slices:
        title = f"{part.column}: {part.value}" if part.column else "All images"
        parts += [f"<h2>{html.escape(title)} ({part.images})</h2>", *_html_table(found, part)]
    parts += _html_curves(found)
    parts += _html_differences(found)
    parts += _html_extremes(found)
    return "\n".join([*parts, "</body>\n</html>\n"])


def _models(runs: Sequence[Run]) -> str:
    told = []
    for run in runs:
        settings = run.settings
        name = Path(settings["model"]["path"]).name
        how = ", ".join(str(settings[key]) for key in ("backend", "provider", "precision") if settings.get(key))
        told.append(f"{run.path.name}: {name}, {how}, {settings['images']} images")
    return "; ".join(told)


def _html_table(found: Comparison, part: Slice) -> Iterator[str]:
    yield '<div class="wide"><table><thead><tr><th></th>'
    for call in found.metrics:
        title = html.escape(call.metric.summary, quote=True)
        yield f'<th title="{title}">{html.escape(call.text)} {ARROWS[call.metric.better]}</th>'
    yield "</tr></thead><tbody>"
    for i, entry in enumerate(found.entries):
        yield f"<tr><th>{html.escape(entry.label)}</th>"
        for call in found.metrics:
            cell = part.cells[call.text, i]
            mark = _mark(found, part, call.text, i)
            kind, level = (' class="best"' if mark == "*" else ""), (" ≈" if mark == "=" else "")
            limits = f"{number(cell.low)} to {number(cell.high)}, n={cell.n}" if cell.n else "no value"
            title = f' title="left out: {html.escape(left_out(cell), quote=True)}"' if cell.excluded else ""
            yield f"<td{kind}{title}>{number(cell.mean)}{level}<small>{limits}</small></td>"
        yield "</tr>"
    yield "</tbody></table></div>"
    lines = list(_exclusions(found, part))
    if lines:
        yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _html_curves(found: Comparison) -> Iterator[str]:
    drawn = [
        call
        for call in found.metrics
        if call.metric.again != "noise" and any(text == call.text for text, _ in found.curves)
    ]
    if drawn:
        yield '<h2>Curves</h2><div class="plots">'
        for call in drawn:
            lines = {i: curve for (text, i), curve in found.curves.items() if text == call.text}
            yield _plot(found, call.text, dict(list(lines.items())[:MOST_LINES]))
        yield "</div>"


def _plot(found: Comparison, metric: str, lines: dict[int, Array]) -> str:
    """Mean curves over their points, from the first to the last."""
    high = max(float(np.nanmax(curve)) for curve in lines.values())
    low = min(0.0, *(float(np.nanmin(curve)) for curve in lines.values()))
    steps = max(map(len, lines.values()))
    left, right, top, bottom = 40, WIDTH - 8, 8, HEIGHT - 22
    paths, keys = [], []
    for i, curve in lines.items():
        color = _color(i, len(found.entries))
        x = np.linspace(left, right, len(curve))
        y = bottom - (curve - low) / ((high - low) or 1) * (bottom - top)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b))
        label = html.escape(found.entries[i].label)
        paths.append(f'<path d="M{points}" stroke="{color}"><title>{label}</title></path>')
        swatch = f'<svg width="14" height="8"><path d="M0,4 14,4" stroke="{color}"/></svg>'
        keys.append(f"<li>{swatch}{label}</li>")
    grid = []
    for share in (0, 0.5, 1):
        y0, x0 = bottom - share * (bottom - top), left + share * (right - left)
        value = low + share * (high - low)
        grid.append(f'<path class="axis" d="M{left},{y0:.1f} {right},{y0:.1f}"/>')
        grid.append(f'<text x="{left - 5}" y="{y0 + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        grid.append(f'<text x="{x0:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{1 + share * (steps - 1):g}</text>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    drawing = f'<svg {size} role="img">{"".join(grid)}{"".join(paths)}</svg>'
    caption = f"<figcaption>{html.escape(metric)}, by point</figcaption>"
    return f'<figure>{drawing}<ul class="key">{"".join(keys)}</ul>{caption}</figure>'


def _color(i: int, count: int) -> str:
    return str(cmap.Colormap("google:turbo")((i + 0.5) / count).hex)


def _html_differences(found: Comparison) -> Iterator[str]:
    if found.differences:
        yield "<h2>Paired differences</h2><p>Row less column, on the images that both have; grey where the interval "
        yield "holds 0: not distinguishable. Wins: the share of images on which the row is the better, ties half.</p>"
    by_pair = {(d.metric, d.a, d.b): d for d in found.differences}
    for call in found.metrics:
        pairs = [key for key in by_pair if key[0] == call.text]
        if not pairs:
            continue
        used = sorted({i for _, a, b in pairs for i in (a, b)})
        heads = "".join(f"<th>{html.escape(found.entries[i].label)}</th>" for i in used)
        yield f"<details><summary>{html.escape(call.text)} {ARROWS[call.metric.better]}</summary>"
        yield f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>'
        for a in used:
            cells = "".join(
                _html_difference(by_pair.get((call.text, min(a, b), max(a, b))), a > b) if a != b else "<td></td>"
                for b in used
            )
            yield f"<tr><th>{html.escape(found.entries[a].label)}</th>{cells}</tr>"
        yield "</tbody></table></div></details>"


def _html_difference(d: Difference | None, turned: bool) -> str:
    if d is None:
        return "<td>-</td>"
    mean, low, high, wins = (-d.mean, -d.high, -d.low, 1 - d.wins) if turned else (d.mean, d.low, d.high, d.wins)
    kind = "" if d.distinguishable else ' class="same"'
    told = f"{number(low)} to {number(high)}, wins {wins:.0%}, n={d.n}"
    return f"<td{kind}>{mean:+.3f}<small>{told}</small></td>"


def _html_extremes(found: Comparison) -> Iterator[str]:
    if found.extremes:
        yield "<h2>Best and worst images</h2>"
    for call in found.metrics:
        shown = {i: ends for (text, i), ends in found.extremes.items() if text == call.text}
        if not shown:
            continue
        yield f"<details><summary>{html.escape(call.text)} {ARROWS[call.metric.better]}</summary>"
        yield '<div class="wide"><table><thead><tr><th></th><th>best</th><th>worst</th></tr></thead><tbody>'
        for i, ends in shown.items():
            cells = "".join(f"<td>{'<br>'.join(map(_link, end))}</td>" for end in ends)
            yield f"<tr><th>{html.escape(found.entries[i].label)}</th>{cells}</tr>"
        yield "</tbody></table></div></details>"


def _link(extreme: tuple[str, str, float]) -> str:
    name, uri, value = extreme
    address = uri if uri.startswith("file:///") else Path(uri).absolute().as_uri()
    return f'<a href="{html.escape(address, quote=True)}">{html.escape(name)}</a> {number(value)}'


def write_pages(found: Comparison, runs: Sequence[Run], folder: Path) -> Path:
    """Write table.md, table.csv, differences.csv and index.html to a folder; returns the page.

    Raises:
        InputError: the folder can't be written.
    """
    texts = {
        "table.md": table_markdown(found),
        "table.csv": table_csv(found),
        "differences.csv": differences_csv(found),
        "index.html": table_html(found, runs),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = folder / f".{os.getpid()}.part"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, folder / name)
    except OSError as err:
        raise InputError(f"{folder}: can't be written ({err.strerror}); give another folder with -o") from None
    return folder / "index.html"

"""Pictures of a run: overlay PNGs, and one HTML page that needs neither a server nor a network."""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import cmap
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ... import InputError
from ...models.preprocess import ImageRefused, decode
from ...models.spec import ModelSpec
from .objects import borders_png, described, sweep
from .sources import read
from .store import Row, Run, read_plan

Array = npt.NDArray[Any]

COLORMAPS: dict[str, str] = {
    "turbo": "google:turbo",
    "jet": "matlab:jet",
    "inferno": "bids:inferno",
    "viridis": "bids:viridis",
    "cividis": "cividis:cividis",
}
SIGNED = "crameri:vik"
OVERLAY_SIDE = 800
THUMBNAIL_SIDE = 256
MAP_SIDE = 56
OPACITY = 0.7
ALPHA_EXPONENT = 0.6  # below 1, so that the flanks of a peak still show their colour
DIMMED = 0.45
PEAK, PEAKED = 99, 0.5
_LUT_STEPS = 65
_UNSAFE = re.compile(r"[^\w.,=+() -]|--+|^[. -]+|[. -]+$")


def display(saliency: Array) -> tuple[Array, bool]:
    """A finished map as levels, and whether it is signed: 0..1 by min-max, or -1..1 with zero kept in the middle.

    Where single pixels stand out, as in gradients and relevance, the rest would not be seen: a map whose 99th
    percentile is below half of its peak is scaled to that percentile.
    """
    low, high = float(saliency.min()), float(saliency.max())
    signed = low < 0
    levels = saliency / max(-low, high) if signed else (saliency - low) / (high - low or 1)
    top = float(np.percentile(np.abs(levels), PEAK))
    return (np.clip(levels / top, -1, 1) if 0 < top < PEAKED else levels), signed


def overlay(photograph: Array, saliency: Array, box: tuple[float, ...], colormap: str = "turbo") -> Array:
    """A photograph under its saliency map: the map's colour where it is high, dimmed where the model saw nothing.

    Args:
        photograph: uint8 (h, w, 3).
        saliency: finished map (H, W); a map with negative values gets a diverging colormap.
        box: (x0, y0, x1, y1) of the map in pixels of the photograph; it may reach outside.
        colormap: of COLORMAPS.

    Returns:
        uint8 (h, w, 3).
    """
    levels, signed = display(saliency)
    x0, y0, x1, y1 = box
    rows = _positions(photograph.shape[0], y0, y1, levels.shape[0])
    columns = _positions(photograph.shape[1], x0, x1, levels.shape[1])
    seen = _within(rows, levels.shape[0])[:, None] & _within(columns, levels.shape[1])
    levels = _sample(levels, rows, columns)
    alpha = (OPACITY * np.abs(levels) ** ALPHA_EXPONENT)[..., None]
    indices = np.rint(((levels + 1) / 2 if signed else levels) * 255).astype(np.intp)
    colors = _lut(SIGNED if signed else COLORMAPS[colormap], 256)[indices]
    covered = photograph * (1 - alpha) + 255 * alpha * colors
    return np.asarray(np.rint(np.where(seen[..., None], covered, photograph * DIMMED)), dtype=np.uint8)


def _positions(count: int, low: float, high: float, size: int) -> Array:
    """Where the centres of `count` pixels lie on a map of `size` samples that covers low..high: half-pixel centres."""
    return np.asarray((np.arange(count) + 0.5 - low) / (high - low) * size - 0.5, dtype=np.float32)


def _within(positions: Array, size: int) -> Array:
    return np.asarray((positions >= -0.5) & (positions < size - 0.5))


def _sample(values: Array, rows: Array, columns: Array) -> Array:
    """A map (h, w) at fractional rows and columns: bilinear, edges clamped."""
    for positions in (rows, columns):
        last = len(values) - 1
        position = positions.clip(0, last)
        low = position.astype(np.intp)
        part = (position - low)[:, None]
        values = (values[low] * (1 - part) + values[np.minimum(low + 1, last)] * part).T
    return values


def write_overlays(run: Run, folder: Path | None = None, *, colormap: str = "turbo", limit: int | None = None) -> int:
    """Write a PNG for every map of a run: the upright photograph, at most 800 pixels long, under the map.

    A photograph that is gone or has changed since the run is passed by.

    Args:
        folder: where to; RUN/report/overlays if None. File names are `overlay_name`.
        colormap: of COLORMAPS.
        limit: only the first so many maps, in plan order.

    Returns:
        how many were written.

    Raises:
        InputError: unknown colormap, limit below 1, or the folder can't be written.
        RunError: a part or the plan is damaged.
    """
    _check(limit, colormap)
    folder = folder or run.path / "report" / "overlays"
    photographs = _Photographs(run)
    written = 0
    for _, rows in groupby(islice(run.rows(status="ok"), limit), key=lambda row: row.row):
        first = next(rows)
        try:
            photograph = np.asarray(photographs.open(first, OVERLAY_SIDE))
        except ImageRefused:
            continue
        height, width = photograph.shape[:2]
        left, top, right, bottom = _relative_box(first)
        box = (left * width, top * height, right * width, bottom * height)
        for row in (first, *rows):
            picture = Image.fromarray(overlay(photograph, row.saliency(), box, colormap))
            with replacing(folder / overlay_name(row)) as file:
                picture.save(file, "PNG", compress_level=4)
            written += 1
    return written


def overlay_name(row: Row) -> str:
    """The file name of a row's overlay, `id--method--target_source--class-label.png`, with the id's folders.

    No two rows of a run share one: a part that had to be changed to be safe on any file system ends in a hash.
    """
    identity = "/".join(_safe(part) for part in row.id.split("/")[-16:])
    method = row.method.replace(":", ",", 1)
    parts = [_marked(identity, row.id), _marked(_safe(method, 50), method), _safe(row.target_source)]
    label = f"-{_safe(row.label_name, 40)}" if row.label_name else ""
    return "--".join([*parts, f"{row.target}{label}.png"])


def _safe(text: str, most: int = 80) -> str:
    """`text` as one part of a file name, at most so many bytes."""
    return _UNSAFE.sub("_", text).encode()[:most].decode(errors="ignore") or "_"


def _marked(safe: str, text: str) -> str:
    """A safe name, with a hash of what it stands for if it is not that itself; `~` is in no safe name."""
    return safe if safe == text else f"{safe}~{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_report(run: Run, *, limit: int = 500, colormap: str = "turbo") -> Path:
    """Write RUN/report/index.html: a card per map, and a table of the bad rows.

    The page holds everything it needs. Where a run has more maps than `limit`, half of the images shown are the worst
    (those with a warning first, then the lowest score of the first target), half are spread evenly over the rest.

    Args:
        limit: the greatest number of cards, and of lines in the table.
        colormap: of COLORMAPS, what the page begins with.

    Returns:
        the page.

    Raises:
        InputError: unknown colormap, limit below 1, or the page can't be written.
        RunError: a part or the plan is damaged.
    """
    _check(limit, colormap)
    table = run.table()
    choice = _choose(table, limit)
    name = Path(run.settings["model"]["path"]).name
    head, tail = _template(f"{name} - heatmill")
    photographs = _Photographs(run)
    images: list[dict[str, Any]] = []
    cards: list[dict[str, Any]] = []
    page = run.path / "report" / "index.html"
    with replacing(page) as file:
        file.write(head)
        for rows in _chosen(run, choice, limit):
            image, photograph = _image_data(rows[0], photographs)
            maps: list[str] = []
            borders: dict[int, str] = {}
            for row in rows:
                card, png = _card(row, len(images), len(maps))
                if card["objects"]:
                    borders[len(maps)] = borders_png(row.arrays["segments"])
                cards.append(card)
                maps.append(png)
            pictures = {"photograph": photograph, "maps": maps, "borders": borders}
            file.write(_block(f"image-{len(images)}", pictures))
            images.append(image)
        data = {
            "model": name,
            "facts": _facts(run),
            "counts": _counts(run, table, choice, len(cards)),
            "images": images,
            "cards": cards,
            "sweeps": sweep(run.settings, table),
            "bad": _bad(table, limit, int(run.settings["rows_per_image"])),
            "names": _names(run, {card["prediction"] for card in cards}),
            "colormap": colormap,
            "colormaps": {known: _filter_tables(full, signed=False) for known, full in COLORMAPS.items()},
            "signed": _filter_tables(SIGNED, signed=True),
            "opacity": OPACITY,
        }
        file.write(_block("data", data))
        file.write(tail)
    return page


@dataclass(frozen=True, slots=True)
class _Choice:
    """The plan rows that get cards; `worst` of them were chosen as such, None where all are shown."""

    rows: Collection[int]
    worst: int | None


def _choose(table: pa.Table, limit: int) -> _Choice:
    ok = table.filter(pc.equal(table["status"], "ok"))
    rows, first, each = np.unique(ok["row"].to_numpy(), return_index=True, return_counts=True)
    if ok.num_rows <= limit:
        return _Choice(frozenset(rows.tolist()), None)
    reasons = pc.fill_null(pc.match_substring_regex(ok["extras"], '"(reason|warning)"'), False)
    flat = np.logical_or.reduceat(reasons.to_numpy(), first)
    scores = ok["score"].to_numpy()[first]
    room = max(1, limit // int(each.max()))
    worst = np.lexsort((scores, ~flat))[: (room + 1) // 2]
    others = np.delete(np.arange(len(rows)), worst)
    spread = others[np.linspace(0, len(others) - 1, room - len(worst)).round().astype(int)]
    return _Choice(frozenset(rows[np.concatenate([worst, spread])].tolist()), len(worst))


def _chosen(run: Run, choice: _Choice, limit: int) -> Iterator[list[Row]]:
    """The rows of each chosen image, in plan order."""
    last = max(choice.rows, default=-1)
    for position, rows in groupby(run.rows(status="ok"), key=lambda row: row.row):
        if position > last:
            return
        if position in choice.rows:
            yield list(islice(rows, limit))


class _Photographs:
    """The photographs of a run, as the run found them."""

    def __init__(self, run: Run) -> None:
        self._listed = read_plan(run.path, run.settings).select(["size", "mtime_ns"])
        self._exif = ModelSpec.from_json(run.settings["spec"], "run.json").exif

    def open(self, row: Row, side: int) -> Image.Image:
        """An image upright in RGB, scaled down to `side` pixels on its longer side.

        Raises:
            ImageRefused: it is gone, or not what it was.
        """
        size, mtime_ns = (self._listed[name][row.row].as_py() for name in ("size", "mtime_ns"))
        image = Image.fromarray(decode(read(row.path, size, mtime_ns), exif=self._exif))
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return image


def _image_data(row: Row, photographs: _Photographs) -> tuple[dict[str, Any], str | None]:
    """What the page says of an image, and its thumbnail."""
    thumbnail, gone = None, None
    try:
        file = io.BytesIO()
        photographs.open(row, THUMBNAIL_SIDE).save(file, "WEBP", quality=75)
        thumbnail = base64.b64encode(file.getvalue()).decode()
    except ImageRefused as refusal:
        gone = refusal.status
    box = [round(part, 5) for part in _relative_box(row)]
    return {"id": row.id, "width": row.width, "height": row.height, "box": box, "gone": gone}, thumbnail


def _card(row: Row, image: int, position: int) -> tuple[dict[str, Any], str]:
    """What the page says of a row, and its map as a small grey PNG."""
    levels, signed = display(row.saliency())
    extras = dict(row.extras)
    warning = extras.pop("reason", None) or extras.pop("warning", None)
    if warning is None and not levels.any():
        warning = "blank: the finished map has one value everywhere"
    objects = described(row.arrays)
    if objects:
        extras.pop("groups", None)  # said by rank
    card = {
        "image": image,
        "map": position,
        "signed": signed,
        "method": row.method,
        "target": row.target,
        "source": row.target_source,
        "label": row.label_name,
        "score": _finite(row.score),
        "prediction": row.prediction,
        "prediction_score": _finite(row.prediction_score),
        "warning": None if warning is None else str(warning),
        "objects": objects,
        "extras": [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in extras.items()],
    }
    return card, _map_png(levels, signed)


def _map_png(levels: Array, signed: bool) -> str:
    """Levels as an 8-bit grey PNG in base64: averaged down to MAP_SIDE; zero is the middle grey if signed."""
    scale = min(1.0, MAP_SIDE / max(levels.shape))
    height, width = (max(1, round(side * scale)) for side in levels.shape)
    unit = (levels + 1) / 2 if signed else levels
    small = Image.fromarray(unit.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    file = io.BytesIO()
    Image.fromarray(np.rint(np.asarray(small).clip(0, 1) * 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _relative_box(row: Row) -> tuple[float, ...]:
    """The crop box as fractions of the photograph's width and height."""
    if row.crop_box is None or not row.width or not row.height:
        return 0.0, 0.0, 1.0, 1.0
    return tuple(part / side for part, side in zip(row.crop_box, (row.width, row.height) * 2, strict=True))


def _finite(value: float | None) -> float | None:
    """A number that JSON can say, to six digits."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _names(run: Run, classes: set[int | None]) -> dict[str, str]:
    names = run.settings["spec"].get("label_names", ())
    return {str(index): names[index] for index in classes if index is not None and index < len(names)}


def _facts(run: Run) -> list[tuple[str, list[str]]]:
    """The header's terms, each with its lines."""
    settings, spec = run.settings, run.settings["spec"]
    methods = []
    for method in settings["methods"]:
        name = method["call"].partition(":")[0]
        methods.append(" ".join([name, *(f"{key}={value}" for key, value in method["parameters"].items())]))
    targets = [{"top": f"top{value}", "class": f"class {value}"}.get(kind, kind) for kind, value in settings["targets"]]
    backend = settings.get("backend")
    versions = {backend if name == "backend" else name: text for name, text in settings.get("versions", {}).items()}
    runs_on = [text for text in (backend, settings.get("provider"), settings.get("precision")) if text]
    height, width = run.input_size
    facts: list[tuple[str, list[str]]] = [
        ("Methods", methods),
        ("Targets", [", ".join(targets)]),
        ("Layer", [f"{settings.get('layer')} ({run.grid[0]} x {run.grid[1]})"] if run.grid else []),
        ("Input", [f"{height} x {width}, {spec.get('crop_mode', 'center')} crop"]),
        ("Runs on", [", ".join(runs_on)]),
        ("Seed", [str(settings.get("seed"))]),
        ("Model sha256", [settings["model"]["sha256"][:16]]),
        ("Versions", [", ".join(f"{name} {version}" for name, version in versions.items())]),
    ]
    return [(term, lines) for term, lines in facts if lines]


def _counts(run: Run, table: pa.Table, choice: _Choice, shown: int) -> dict[str, Any]:
    statuses = Counter(table["status"].to_pylist())
    ok = statuses.pop("ok", 0)
    return {
        "images": int(run.settings["images"]),
        "maps": ok,
        "bad": sum(statuses.values()),
        "statuses": statuses.most_common(),
        "shown": shown,
        "images_shown": len(choice.rows),
        "worst": choice.worst,
        "parts": [len(run.parts()), run.shards],
    }


def _bad(table: pa.Table, limit: int, each: int) -> list[dict[str, Any]]:
    """The rows without a map; those of one image with one reason are one line."""
    columns = ["row", "id", "method", "target_source", "status", "error"]
    rows = table.filter(pc.not_equal(table["status"], "ok")).select(columns).slice(0, limit * each).to_pylist()
    lines = []
    for _, group in islice(groupby(rows, key=lambda row: (row["row"], row["status"], row["error"])), limit):
        same = list(group)
        methods = sorted({row["method"] for row in same})
        lines.append({key: same[0][key] for key in ("id", "status", "error")} | {"methods": methods, "rows": len(same)})
    return lines


@lru_cache(maxsize=8)
def _lut(name: str, steps: int) -> Array:
    """A colormap's colours (steps, 3), 0..1."""
    return np.asarray(cmap.Colormap(name)(np.linspace(0, 1, steps)), dtype=np.float32)[:, :3]


def _filter_tables(name: str, signed: bool) -> dict[str, str]:
    """A colormap and its opacity as the tables of the page's SVG filters."""
    level = np.linspace(0, 1, _LUT_STEPS)
    alpha = np.abs(2 * level - 1 if signed else level) ** ALPHA_EXPONENT
    channels = zip("RGBA", (*_lut(name, _LUT_STEPS).T, alpha), strict=True)
    return {channel: " ".join(f"{value:.3g}" for value in values) for channel, values in channels}


def _template(title: str) -> tuple[bytes, bytes]:
    """The page before and after its data.

    Its content security policy allows its own script and style, pictures from its own data, and no network.
    """
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    policy = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("style", "script"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        policy.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    head, _, tail = page.partition("{{data}}")
    head = head.replace("{{policy}}", "; ".join(policy)).replace("{{title}}", html.escape(title))
    return head.encode(), tail.encode()


def _block(identity: str, data: Mapping[str, Any]) -> bytes:
    """A data block of the page; no text in it can end the block."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{identity}">{text}</script>\n'.encode()


def _check(limit: int | None, colormap: str) -> None:
    if colormap not in COLORMAPS:
        raise InputError(f"no colormap {colormap!r}; known: {', '.join(COLORMAPS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is complete."""
    temporary = path.parent / f".{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise
        raise InputError(f"{path}: can't be written ({err.strerror})") from None
    try:
        with file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""What a report says of superpixels that act together: their places, ranks, links and groups, and a sweep's curve."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from ..methods.ablation_ca import LINKED

Array = npt.NDArray[Any]

LINKS_DRAWN = 30


def described(arrays: Mapping[str, Array]) -> dict[str, Any] | None:
    """The objects of a row in the order of their contributions' magnitude, its links and groups by rank from 0.

    Returns:
        `parts`: for each rank where its number stands, (x, y) as shares of the map's sides. `links`: (rank, rank,
        correlation), the most telling first. `groups`: the ranks of each. None where a row has no objects.
    """
    if "links" not in arrays:
        return None
    segments, values = arrays["segments"], arrays["contribution"]
    order = np.argsort(-np.abs(values), kind="stable")
    rank = np.argsort(order)
    links = [
        [int(rank[first]), int(rank[second]), round(float(arrays["correlation"][first, second]), 3)]
        for first, second in arrays["links"][:LINKS_DRAWN]
    ]
    group = arrays["group"]
    groups = [sorted(rank[group == number].tolist()) for number in range(group.max() + 1)]
    return {"parts": [_middle(segments == part) for part in order], "links": links, "groups": groups}


def _middle(inside: Array) -> list[float]:
    """The pixel of a region that is nearest to its centre of mass."""
    places = np.argwhere(inside)
    y, x = places[((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return [round((x + 0.5) / inside.shape[1], 4), round((y + 0.5) / inside.shape[0], 4)]


def borders_png(segments: Array) -> str:
    """The lines between segments, white on nothing, as a PNG of one bit per pixel in base64."""
    lines = np.zeros(segments.shape, np.uint8)
    lines[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    lines[1:] |= segments[1:] != segments[:-1]
    picture = Image.fromarray(lines, mode="L")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=1, transparency=0, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def sweep(settings: Mapping[str, Any], table: pa.Table) -> list[dict[str, Any]]:
    """For methods that were asked at several numbers of superpixels, how strongly the strongest pair is correlated.

    Returns:
        For each such method its `call` without the number, and `points`: (superpixels asked, mean over the rows of the
        greatest |correlation|, mean level from which a pair counts as linked, rows). Rows with a reason say nothing of
        pairs, and are left out.
    """
    asked: dict[str, tuple[str, int]] = {}
    for method in settings["methods"]:
        name, parameters = method["call"].partition(":")[0], dict(method["parameters"])
        if "segments" in parameters:
            number = int(parameters.pop("segments"))
            asked[method["call"]] = (" ".join([name, *(f"{key}={value}" for key, value in parameters.items())]), number)
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for call, extras in zip(*(table[column].to_pylist() for column in ("method", "extras")), strict=True):
        told = json.loads(extras) if extras and call in asked else {}
        if "max_correlation" in told and "reason" not in told:
            text, number = asked[call]
            level = LINKED * told["correlation_error"]
            found.setdefault(text, {}).setdefault(number, []).append((told["max_correlation"], level))
    return [
        {
            "call": text,
            "points": [
                [number, *np.mean(rows, axis=0).round(4).tolist(), len(rows)] for number, rows in sorted(by.items())
            ],
        }
        for text, by in found.items()
        if len(by) > 1
    ]

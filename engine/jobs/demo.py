"""`heatmill demo`: the whole way on a real classifier and real photographs, both shipped by installed packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...models.zoo import build, write_photographs
from ..types import Array
from .job import explain
from .plan import Job
from .report import write_overlays, write_report
from .store import Row, open_run

MODEL = "efficientnet-lite0"


def demo(out: Path) -> dict[str, Any]:
    """Build the model, copy the photographs, explain; what the maps say and where the pictures are, as JSON values.

    Raises:
        HeatmillError: a package of the extra [demo] is missing, or the folder can't be written.
    """
    model = build(MODEL, out / f"{MODEL}.onnx")
    photographs, folder = out / "photographs", out / "run"
    write_photographs(photographs)
    exists = (folder / "run.json").exists()
    summary = explain(Job(model=model, inputs=(photographs,), out=folder, overwrite=exists))
    run = open_run(folder)
    write_overlays(run)
    return {
        "exit_code": summary.exit_code,
        "seconds": summary.seconds,
        "method": run.settings["methods"][0]["call"],
        "maps": [_describe(row) for row in run.rows(status="ok")],
        "pictures": str(folder / "report" / "overlays"),
        "page": str(write_report(run)),
    }


def demo_text(found: dict[str, Any]) -> str:
    """The answer of `demo` for people."""
    lines = [f"{len(found['maps'])} photographs explained with {found['method']} in {found['seconds']:.1f} s:"]
    for told in found["maps"]:
        lines.append(
            f"  {told['id']}: {told['label_name']} ({told['score']:.0%}); the map peaks {told['peak']}, "
            f"half of its weight lies on {told['half_on']:.0%} of the picture"
        )
    return "\n".join([*lines, f"pictures: {found['pictures']}", f"page:     {found['page']}"]) + "\n"


def _describe(row: Row) -> dict[str, Any]:
    saliency = row.saliency()
    h, w = saliency.shape
    y, x = divmod(int(saliency.argmax()), w)
    peak = f"{_third(y, h, ('top', 'middle', 'bottom'))} {_third(x, w, ('left', 'centre', 'right'))}"
    half = _half_share(saliency)
    return {"id": row.id, "label_name": row.label_name, "score": row.score, "peak": peak, "half_on": half}


def _third(position: int, size: int, names: tuple[str, str, str]) -> str:
    return names[min(3 * position // size, 2)]


def _half_share(saliency: Array) -> float:
    """The smallest share of the pixels that holds half of the map."""
    ranked = np.sort(saliency.ravel())[::-1].cumsum()
    return float((np.searchsorted(ranked, ranked[-1] / 2) + 1) / len(ranked))

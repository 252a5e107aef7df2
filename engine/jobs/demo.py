"""`heatmill demo`: the whole way on a real classifier and real photographs, both shipped by installed packages."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...models.zoo import build, write_photographs
from .job import explain
from .plan import Job
from .report import write_overlays, write_report
from .store import open_run

MODEL = "efficientnet-lite0"


def demo(out: Path, as_json: bool) -> int:
    """Build the model, copy the photographs, explain, and print where the pictures are and what the maps say.

    Raises:
        HeatmillError: a package of the extra [demo] is missing, or the folder can't be written.
    """
    model = build(MODEL, out / f"{MODEL}.onnx")
    photographs = out / "photographs"
    write_photographs(photographs)
    run_folder = out / "run"
    summary = explain(
        Job(model=model, inputs=(photographs,), out=run_folder, overwrite=(run_folder / "run.json").exists())
    )
    run = open_run(run_folder)
    write_overlays(run)
    page = write_report(run)
    if as_json:
        click.echo(json.dumps({"run": str(run_folder), "page": str(page), "images": summary.images}))
        return summary.exit_code
    click.echo(
        f"{summary.images} photographs explained with {run.settings['methods'][0]['call']} in {summary.seconds:.1f} s:"
    )
    for row in run.rows(status="ok"):
        saliency = row.saliency()
        h, w = saliency.shape
        y, x = divmod(int(saliency.argmax()), w)
        place = f"{_third(y, h, ('top', 'middle', 'bottom'))} {_third(x, w, ('left', 'centre', 'right'))}"
        click.echo(
            f"  {row.id}: {row.label_name} ({row.score:.0%}); the map peaks {place}, "
            f"half of its weight lies on {_half_share(saliency):.0%} of the picture"
        )
    click.echo(f"pictures: {run_folder / 'report' / 'overlays'}")
    click.echo(f"page:     {page}")
    return summary.exit_code


def _third(position: int, size: int, names: tuple[str, str, str]) -> str:
    return names[min(3 * position // size, 2)]


def _half_share(saliency: object) -> float:
    """The smallest share of the pixels that holds half of the map."""
    import numpy as np

    ranked = np.sort(np.asarray(saliency).ravel())[::-1].cumsum()
    return float((np.searchsorted(ranked, ranked[-1] / 2) + 1) / len(ranked))

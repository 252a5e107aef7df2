"""The metrics by name; a row here and a function in its kind's file. Presets are published settings by name."""

from __future__ import annotations

from collections.abc import Iterable

from ... import InputError
from ..calls import parse_call, plain
from ..types import Metric, MetricCall, nearest
from .faithfulness import CURVES, MASKED, ROAD
from .localization import LOCALIZATION
from .robustness import ROBUSTNESS
from .statistics import STATISTICS

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (*MASKED, *CURVES, ROAD, *LOCALIZATION, *STATISTICS, *ROBUSTNESS)
}

_CUTS = [f"{name}:{{}}" for name in ("average-drop", "increase", "average-gain")]

PRESETS: dict[str, tuple[str, ...]] = {
    "standard": (
        *("average-drop", "increase", "average-gain", "deletion", "insertion"),
        *("pointing-game", "energy-pointing-game", "box-error", "max-box-acc"),
        *("sparseness", "conservation", "completeness"),
    ),
    "scorecam": tuple(cut.format("keep=0.5,baseline=zero") for cut in _CUTS),
    "l-cam": tuple(cut.format(f"keep={keep},baseline=black") for keep in (1.0, 0.5, 0.15) for cut in _CUTS[:2]),
    "rise": ("deletion:steps=28,baseline=zero", "insertion:steps=28,baseline=rise-blur"),
}


def parse_metrics(texts: Iterable[str]) -> tuple[MetricCall, ...]:
    """Calls from `NAME[:key=value,...]` and names of presets, each once.

    Raises:
        InputError: unknown metric or parameter (nearest offered), or a value out of its range.
    """
    calls: dict[str, MetricCall] = {}
    presets = {plain(name): name for name in PRESETS}
    known = {plain(name) for name in METRICS}
    for text in texts:
        word = plain(text.strip())
        if word not in presets and plain(text.partition(":")[0].strip()) not in known:
            raise InputError(f"no metric or preset {text!r}; {nearest(text.casefold(), [*METRICS, *PRESETS])}")
        for each in PRESETS[presets[word]] if word in presets else (text,):
            metric, values = parse_call("metric", METRICS, each)
            call = MetricCall(metric, values)
            calls.setdefault(call.text, call)
    return tuple(calls.values())

"""Occlusion: how far the score falls while a window hides a part, averaged over the windows that a pixel lies in.

Zeiler and Fergus, ECCV 2014 (arXiv 1311.2901), who slide a grey square over the image.
"""

from __future__ import annotations

import numpy as np

from ...kernels import host
from ..types import (
    BASELINE_NAMES,
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    Method,
    Observation,
    Parameter,
    Parameters,
    WindowBank,
    always,
    never,
)


def starts(side: int, window: int, stride: int) -> Array:
    """Where windows begin along one axis: every stride, and one that ends at the border."""
    last = max(side - window, 0)
    return np.unique(np.append(np.arange(0, last, stride), last))


def share(facts: Facts, parameters: Parameters, seed: int) -> WindowBank:
    """Row 0 hides nothing."""
    window, stride = int(parameters["window"]), int(parameters["stride"])
    top, left = np.meshgrid(*(starts(side, window, stride) for side in facts.size), indexing="ij")
    corners = np.stack([top.ravel(), left.ravel()], axis=1)
    boxes = np.concatenate([corners, np.minimum(corners + window, facts.size)], axis=1)
    return WindowBank(np.concatenate([np.zeros((1, 4)), boxes]).astype(np.int32))


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    if shared is None:
        raise ValueError("occlusion needs its shared windows")
    return Expansion(shared, str(parameters["baseline"]), str(parameters["score"]), extras={"passes": len(shared)})


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    """`mean over the windows w around a pixel of f(x) - f(x without w)`."""
    bank = expansion.bank
    if not isinstance(bank, WindowBank):
        raise ValueError("occlusion combines windows")
    falls = scores[:, :1].astype(np.float64) - scores[:, 1:]
    sums = host.accumulate_windows(bank.boxes[1:], falls, facts.size)
    counts = host.accumulate_windows(bank.boxes[1:], np.ones((1, len(bank) - 1)), facts.size)
    return Combined(sums / counts, tuple({} for _ in scores))


def passes(facts: Facts, parameters: Parameters) -> int:
    window, stride = int(parameters["window"]), int(parameters["stride"])
    rows, columns = (len(starts(side, window, stride)) for side in facts.size)
    return 1 + rows * columns


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    window, stride = int(parameters["window"]), int(parameters["stride"])
    if stride > window:
        return f"stride {stride} exceeds window {window}: the pixels between would never be hidden"
    if parameters["score"] == "logit" and not facts.has_logits:
        return f"it is asked for logits, and the model gives {facts.output} only"
    return None


OCCLUSION = Method(
    name="occlusion",
    summary="how far the score falls while a window hides a part",
    citation="Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014",
    parameters={
        "window": Parameter(32, "side of the window in pixels", least=1, most=4096),
        "stride": Parameter(16, "pixels from one window to the next", least=1, most=4096),
        "baseline": Parameter("mean", "what the window shows", BASELINE_NAMES),
        "score": Parameter("posterior", "what a pass is asked for", ("posterior", "logit")),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("relu", "minmax"),
    passes=passes,
    refuses=refuses,
    share=share,
    needs_tap=never,
    pixels=always,
)

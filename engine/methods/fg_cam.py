"""FG-CAM: a CAM's contributions, kept by channel, are carried back to a finer layer by relevance rules.

Qiu, Jin, Zhang, AAAI 2024 (arXiv 2303.09171). Its paper and code know plain stacks of convolutions; residual sums and
concatenations divide relevance in proportion to what each branch brought, and grouped convolutions by group.
"""

from __future__ import annotations

import numpy as np

from ...models.graph.request import Request
from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    MapBank,
    Method,
    Observation,
    Parameter,
    Parameters,
    always,
    nearest,
)
from .grad_cam import gradients_at_tap, tap_gradient
from .lrp import kept
from .masks import once, scaled_after_upsampling, weights_of
from .one_pass import refuses

FINER = 4  # `to=auto` is the deepest layer of a quarter of the image's height and width that no path goes around


def destination(facts: Facts, parameters: Parameters) -> str:
    """The value that the contributions are carried back to; "" is the image."""
    asked = str(parameters["to"])
    if asked != "auto":
        return "" if asked == "image" else asked
    names = [tap.name for tap in facts.layers]
    before = facts.layers[: names.index(facts.tap.name)] if facts.tap and facts.tap.name in names else ()
    fine = [
        tap.name
        for tap in before
        if tap.name in facts.waists and all(FINER * (g + 1) >= s for g, s in zip(tap.grid, facts.size, strict=True))
    ]
    return fine[-1] if fine else ""


def carry_back(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    composite = "fg-cam" if parameters["bn"] == "fold" else "fg-cam-paper"
    layer = facts.tap.name if facts.tap else ""
    to = destination(facts, parameters)
    return (Request("relevance", at=to, start="map", composite=composite, start_at=layer),)


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """The CAM's contributions by channel, at once from gradients, or after a pass for every map."""
    features = observation.features
    if features is None:
        raise ValueError("fg-cam needs the layer's maps")
    if parameters["base"] == "grad-cam":
        weights = gradients_at_tap(facts, observation).mean(axis=(2, 3))
        return _second_stage(facts, observation, weights, parameters, {"passes": 0})
    found = once(scaled_after_upsampling(features, facts.size), np.ptp(features, axis=(1, 2)) > 0)
    extras = {"passes": len(found.masks), "channels": len(features)}
    bank = MapBank(found.masks) if len(found.masks) else None
    return Expansion(bank, carry=found.uses, extras=extras)


def _second_stage(
    facts: Facts, observation: Observation, weights: Array, parameters: Parameters, extras: dict[str, int]
) -> Expansion:
    if observation.features is None:
        raise ValueError("fg-cam needs the layer's maps")
    parts = weights[:, :, None, None].astype(np.float32) * observation.features
    if parameters["denoise"] == "yes":
        parts = np.stack([denoised(part) for part in parts])
    (request,) = carry_back(facts, parameters)
    of = np.arange(len(parts))
    passes = extras["passes"] + len(parts)
    return Expansion(through=request, of=of, starts=parts, extras={**extras, "passes": passes})


def denoised(parts: Array) -> Array:
    """The leading tenth (at least one) of the singular components of (c, h, w), each channel's mean taken off.

    The paper's code does not add the mean back, and keeps none of the components of a tiny map; here it is one.
    """
    flat = parts.reshape(len(parts), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    leading = max(1, int(0.1 * min(flat.shape)))
    left, values, right = np.linalg.svd(flat, full_matrices=False)
    kept_part = (left[:, :leading] * values[:leading]) @ right[:leading]
    return np.asarray(kept_part.reshape(parts.shape).astype(np.float32))


def read(facts: Facts, shown: Observation, row: int, expansion: Expansion, parameters: Parameters) -> Array:
    """Its channels' sum, and the share that arrived: of denoised maps, which sum to nothing, by magnitude."""
    (returned,) = shown.returned
    share = float(returned.kept[0])
    if parameters["denoise"] == "yes" and expansion.starts is not None:
        sent = float(np.abs(expansion.starts[row]).sum(dtype=np.float64))
        share = float(np.abs(returned.values[0]).sum(dtype=np.float64)) / sent if sent else 0.0
    return np.append(returned.values[0].sum(axis=0).ravel(), share)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, results: Array, parameters: Parameters
) -> Combined | Expansion:
    if expansion.through is None:
        weights = weights_of(results, expansion.carry)
        return _second_stage(facts, observation, weights, parameters, dict(expansion.extras))
    to = destination(facts, parameters)
    grid = next((tap.grid for tap in facts.layers if tap.name == to), facts.size)
    maps = results[:, :-1].reshape(len(results), *grid).astype(np.float32)
    return Combined(maps, tuple(kept(float(share)) for share in results[:, -1]))


def refuses_here(facts: Facts, parameters: Parameters) -> str | None:
    asked, names = str(parameters["to"]), [tap.name for tap in facts.layers]
    if asked not in ("auto", "image", *names):
        return f"to={asked} is no feature map of the model; {nearest(asked, ['image', *names])}"
    if parameters["bn"] == "paper" and "BatchNormalization" not in facts.operators:
        return "bn=paper passes over batch normalisation, and the file's is folded into its weights: leave bn=fold"
    return refuses(facts, parameters)


FG_CAM = Method(
    name="fg-cam",
    summary="a CAM's contributions carried back to a finer layer, or to the image",
    citation="Qiu, Jin, Zhang, Fine-Grained CAM, AAAI 2024",
    parameters={
        "base": Parameter("grad-cam", "the CAM whose contributions are carried back", ("grad-cam", "score-cam")),
        "to": Parameter("auto", "a layer, image, or auto: the deepest layer of a quarter of the image's size"),
        "denoise": Parameter("no", "keep the leading tenth of the contributions' components", ("no", "yes")),
        "bn": Parameter(
            "fold", "normalisation folded into the weights, or passed over as in the paper's code", ("fold", "paper")
        ),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: ("relu", "minmax", "upsample"),
    passes=lambda facts, parameters: 1 + (facts.tap.channels if parameters["base"] == "score-cam" and facts.tap else 0),
    refuses=refuses_here,
    backward=lambda facts, parameters: tap_gradient(facts, parameters) if parameters["base"] == "grad-cam" else (),
    through=carry_back,
    read=read,
    pixels=always,
)

"""The CAMs that weigh a layer's maps by gradients: Grad-CAM and its kin, each a row of WEIGHTINGS.

On heads of pooling and one linear layer the gradient at the layer is a row of the weights, and no backward pass runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...models.graph.request import Request
from ..types import (
    Array,
    Combined,
    Expansion,
    Facts,
    Method,
    Observation,
    Parameter,
    Parameters,
)
from .one_pass import expand, refuses

Weighting = Callable[[Array, Array, Parameters], Array]


def tap_gradient(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
    """The gradient at the layer; nothing where it is known from the head."""
    if facts.tap is None or not isinstance(facts.head, str):
        return ()
    return (Request(at=facts.tap.name),)


def gradients_at_tap(facts: Facts, observation: Observation) -> Array:
    """d raw score / d layer for each target, (k, c, h, w)."""
    if observation.returned:
        return observation.returned[0].values
    if isinstance(facts.head, str) or facts.tap is None:
        raise ValueError("no gradient came back, and the head is not linear")
    h, w = facts.tap.grid
    rows = facts.head.weight[observation.targets] / np.float32(h * w)
    return np.broadcast_to(rows[:, :, None, None], (*rows.shape, h, w))


def mean_gradient(gradients: Array, features: Array, parameters: Parameters) -> Array:
    """`sum_c mean(G_c) A_c` (Selvaraju et al., equations 1 and 2, without the ReLU)."""
    return _weighed(gradients.mean(axis=(2, 3), dtype=np.float64), features)


def elementwise(gradients: Array, features: Array, parameters: Parameters) -> Array:
    """`sum_c G_c A_c` (Draelos and Carin, HiResCAM)."""
    return np.asarray(np.einsum("kchw,chw->khw", gradients, features, dtype=np.float64))


def positive_elementwise(gradients: Array, features: Array, parameters: Parameters) -> Array:
    """`sum_c relu(G_c) A_c` (Jiang et al., equations 5 and 6)."""
    return elementwise(np.maximum(gradients, 0), features, parameters)


def axiomatic(gradients: Array, features: Array, parameters: Parameters) -> Array:
    """`sum_c w_c A_c`, `w_c = sum(G_c A_c) / (sum A_c + eps)` (Fu et al., equation 9; eps as in their code)."""
    products = np.einsum("kchw,chw->kc", gradients, features, dtype=np.float64)
    weights = products / (features.sum(axis=(1, 2), dtype=np.float64) + 1e-6)
    return _weighed(weights, features)


def second_order(gradients: Array, features: Array, parameters: Parameters) -> Array:
    """`sum_c w_c A_c`, `w_c = sum a relu(G_c)`, `a = G^2 / (2 G^2 + sum(A_c) G^3)` (Chattopadhay et al., equation 19).

    The sources disagree: "paper" is the equation, 0 / 0 being 0; "official" divides a by its sum over the positions of
    positive gradient, as the authors' code does; "grad-cam" adds 1e-6 to the denominator, as pytorch-grad-cam does.
    """
    slopes = gradients.astype(np.float64)
    total = features.sum(axis=(1, 2), dtype=np.float64)[None, :, None, None]
    variant = parameters["variant"]
    below = 2 * slopes**2 + total * slopes**3 + (1e-6 if variant == "grad-cam" else 0.0)
    above = np.where(slopes != 0, slopes**2, 0)
    if variant == "official":
        share = above / np.where(below != 0, below, 1)
        whole = np.where(slopes > 0, share, 0).sum(axis=(2, 3), keepdims=True)
        share = share / np.where(whole != 0, whole, 1)
    else:
        share = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    weights = (share * np.maximum(slopes, 0)).sum(axis=(2, 3))
    return _weighed(weights, features)


def _weighed(weights: Array, features: Array) -> Array:
    return np.asarray(np.einsum("kc,chw->khw", weights, features))


@dataclass(frozen=True, slots=True)
class Row:
    """One CAM of the family."""

    name: str
    summary: str
    citation: str
    weighting: Weighting


VARIANT = {"variant": Parameter("paper", "whose formula", ("paper", "official", "grad-cam"))}
WEIGHTINGS = (
    Row("grad-cam", "each map weighed by its mean gradient", "Selvaraju et al., Grad-CAM, ICCV 2017", mean_gradient),
    Row(
        "grad-cam++",
        "each map weighed by its positive gradients, at second order",
        "Chattopadhay et al., Grad-CAM++, WACV 2018",
        second_order,
    ),
    Row(
        "hires-cam",
        "gradient times activation at every position",
        "Draelos and Carin, HiResCAM, arXiv 2011.08891",
        elementwise,
    ),
    Row(
        "xgrad-cam",
        "each map weighed by its gradients, in proportion to its activations",
        "Fu et al., Axiom-based Grad-CAM, BMVC 2020",
        axiomatic,
    ),
    Row(
        "layer-cam",
        "positive gradient times activation at every position; for shallow layers too",
        "Jiang et al., LayerCAM, IEEE TIP 2021",
        positive_elementwise,
    ),
)


def _method(row: Row) -> Method:
    def combine(
        facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
    ) -> Combined:
        if observation.features is None:
            raise ValueError(f"{row.name} needs the layer's maps")
        maps = row.weighting(gradients_at_tap(facts, observation), observation.features, parameters)
        return Combined(maps.astype(np.float32), tuple({} for _ in maps))

    return Method(
        name=row.name,
        summary=row.summary,
        citation=row.citation,
        parameters=VARIANT if row.name == "grad-cam++" else {},
        expand=expand,
        combine=combine,
        finish=lambda parameters: ("relu", "upsample", "minmax"),
        passes=lambda facts, parameters: 0,
        refuses=refuses,
        backward=tap_gradient,
    )


GRADIENT_CAMS = tuple(_method(row) for row in WEIGHTINGS)

"""What one backward pass to the image shows: the gradient, gradient times input, and guided backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...models.graph.request import Request
from ..types import Array, Combined, Expansion, Facts, Method, Observation, Parameter, Parameters, always, never
from .one_pass import expand, refuses

CHANNELS: dict[str, Callable[[Array], Array]] = {
    "max": lambda values: np.abs(values).max(axis=1),
    "abs-sum": lambda values: np.abs(values).sum(axis=1),
    "sum": lambda values: values.sum(axis=1),
}


def channels(default: str) -> dict[str, Parameter]:
    """The option of how an image's channels become one map."""
    told = "how channels become one map: greatest magnitude, sum of magnitudes, or signed sum"
    return {"channels": Parameter(default, told, tuple(CHANNELS))}


def one_map(values: Array, parameters: Parameters) -> Array:
    """(k, c, h, w) as (k, h, w) by the asked rule."""
    return CHANNELS[str(parameters["channels"])](values).astype(np.float32)


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    maps = one_map(observation.returned[0].values, parameters)
    return Combined(maps, tuple({} for _ in maps))


def needs_relu(facts: Facts, parameters: Parameters) -> str | None:
    if facts.operators.isdisjoint({"Relu", "Clip"}):
        return "it is defined for ReLU and ReLU6 only, and the model has none"
    return refuses(facts, parameters)


@dataclass(frozen=True, slots=True)
class Row:
    """One method: what it asks for and how it is shown."""

    name: str
    summary: str
    citation: str
    request: Request
    channels: str
    finish: tuple[str, ...]
    refuses: Callable[[Facts, Parameters], str | None] = refuses


ROWS = (
    Row(
        "saliency",
        "the score's gradient at the image",
        "Simonyan, Vedaldi, Zisserman, Deep Inside Convolutional Networks, ICLR Workshops 2014",
        Request(),
        "max",
        ("minmax",),
    ),
    Row(
        "input-x-gradient",
        "the score's gradient times the image",
        "Shrikumar et al., Not Just a Black Box, arXiv 1605.01713",
        Request(times_input=True),
        "sum",
        ("relu", "minmax"),
    ),
    Row(
        "guided-backprop",
        "the gradient, positive parts only at every ReLU; sharp, but hardly depends on the class",
        "Springenberg et al., Striving for Simplicity, ICLR Workshops 2015",
        Request(kind="guided"),
        "max",
        ("minmax",),
        needs_relu,
    ),
)


def _method(row: Row) -> Method:
    def backward(facts: Facts, parameters: Parameters) -> tuple[Request, ...]:
        return (row.request,)

    return Method(
        name=row.name,
        summary=row.summary,
        citation=row.citation,
        parameters=channels(row.channels),
        expand=expand,
        combine=combine,
        finish=lambda parameters: row.finish,
        passes=lambda facts, parameters: 0,
        refuses=row.refuses,
        backward=backward,
        needs_tap=never,
        pixels=always,
    )


SALIENCIES = tuple(_method(row) for row in ROWS)

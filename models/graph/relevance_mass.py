"""The mass of relevance: sums over an image's row, what share of them arrived, and contrasts of two signals."""

from __future__ import annotations

from .backward import TINY, Walk
from .relevance_rules import stabilized


def total(walk: Walk, value: str, like: str, keepdims: bool = True) -> str:
    """The sum of each row of a value that has the axes of the forward value `like`."""
    return walk.emit.op("ReduceSum", value, list(range(1, len(walk.shape(like)))), keepdims=int(keepdims))


def of_mass_one(walk: Walk, value: str, like: str) -> str:
    """Divided by its sum; zero where that is zero."""
    return walk.emit.op("Div", value, stabilized(walk, total(walk, value, like), 0))


def share(walk: Walk, result: str, end: str, seed: str, at: str, signed: bool) -> str:
    """What part of the relevance arrived, (rows,): of its sum, or where the seed has both signs, of its magnitude.

    Args:
        result: what arrived at the value `end`.
        seed: what was sent from the value `at`.
    """
    emit = walk.emit

    def mass(value: str, like: str) -> str:
        return total(walk, emit.op("Abs", value) if signed else value, like, keepdims=False)

    whole = mass(seed, at)
    nothing = emit.op("Less", emit.op("Abs", whole), TINY)
    return emit.op("Where", nothing, 0.0, emit.op("Div", mass(result, end), emit.op("Where", nothing, 1.0, whole)))


def contrast(walk: Walk, signal: str, dual: str, end: str, sized: bool) -> str:
    """What arrived of the signal less what arrived of its dual, each divided by its own sum.

    Args:
        sized: the dual is scaled to the signal's sum instead, and the contrast keeps that size.
    """
    difference = walk.emit.op("Sub", of_mass_one(walk, signal, end), of_mass_one(walk, dual, end))
    return walk.emit.op("Mul", difference, total(walk, signal, end)) if sized else difference

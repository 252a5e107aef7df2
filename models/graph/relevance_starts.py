"""Where a relevance pass begins: what stands at the raw scores, or at the input of the last layer, for one class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .backward import START, Unsupported, Walk, one_hot, weights
from .canonize import product
from .relevance_facts import Facts
from .relevance_mass import of_mass_one, total
from .relevance_rules import ZPlus
from .relevance_units import unit_giving
from .vjp import VJP


@dataclass(frozen=True, slots=True)
class Start:
    """What is sent, and the value at which it stands.

    Attributes:
        seed: the relevance, in the shape of `at`.
        at: a forward value.
        signed: the seed has both signs: the class and the others in one pass.
        dual: what is sent against it, in a pass of its own; the maps of the two are contrasted where they are read.
        sized: the contrast keeps the size of what arrived for the class; else both maps have mass 1.
    """

    seed: str
    at: str
    signed: bool = False
    dual: str | None = None
    sized: bool = False


def _logit(walk: Walk, chosen: str) -> Start:
    """The raw score of the class."""
    scores = walk.graph.scores
    return Start(walk.emit.op("Mul", one_hot(walk, chosen), scores), scores)


def _one(walk: Walk, chosen: str) -> Start:
    """1 at the class."""
    return Start(one_hot(walk, chosen), walk.graph.scores)


def _weights(walk: Walk, chosen: str) -> Start:
    """The weights that are fed, whatever the class."""
    return Start(weights(walk), walk.graph.scores, signed=True)


def _clrp1(walk: Walk, chosen: str) -> Start:
    """1 at the class and -1 / (N - 1) at each of the others: contrastive LRP with the uniform dual of its paper and of
    Iwana et al. 2019, both signals of mass 1, in one signed pass.
    """
    scores = walk.graph.scores
    other = 1 / max(1, product(walk.shape(scores)[1:]) - 1)
    seed = walk.emit.op("Sub", walk.emit.op("Mul", one_hot(walk, chosen), 1 + other), other)
    return Start(seed, scores, signed=True)


def _clrp1_code(walk: Walk, chosen: str) -> Start:
    """|z_c| at the class, and against it |z_n| at the others, as in the code of Gu et al. 2018."""
    emit, scores = walk.emit, walk.graph.scores
    size = walk.once("relevance size", lambda: emit.op("Abs", scores))
    target = emit.op("Mul", one_hot(walk, chosen), size)
    return Start(target, scores, dual=emit.op("Sub", size, target))


def _sglrp(walk: Walk, chosen: str) -> Start:
    """The softmax's gradient: p_c (1 - p_c) + 1e-8 at the class, and against it p_n at the others (Iwana et al. 2019).

    The published code scales its second map to the sum of the first, so that the factor p_c of the others is left out:
    where the class has all the probability, p_c p_n would vanish.
    """
    emit, scores = walk.emit, walk.graph.scores
    axis = 1 + int(np.argmax([size or 1 for size in walk.shape(scores)[1:]]))
    hot = one_hot(walk, chosen)
    chances = walk.once("relevance softmax", lambda: emit.op("Softmax", scores, axis=axis))
    chance = emit.op("Mul", hot, chances)
    rest = total(walk, emit.op("Sub", chances, chance), scores)  # 1 - p_c, without cancellation
    peak = emit.op("Add", emit.op("Mul", total(walk, chance, scores), rest), 1e-8)
    lowest = float(np.finfo(emit.dtype).min)
    others = emit.op("Softmax", emit.op("Where", emit.op("Greater", hot, 0.5), lowest, scores), axis=axis)
    return Start(emit.op("Mul", hot, peak), scores, dual=others, sized=True)


STARTS: dict[str, Callable[[Walk, str], Start]] = {
    "logit": _logit,
    "one": _one,
    "weights": _weights,
    "clrp1": _clrp1,
    "clrp1-code": _clrp1_code,
    "sglrp": _sglrp,
}
BETWEEN = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast"}) | {
    *("QuantizeLinear", "DequantizeLinear"),
}


def started(walk: Walk, facts: Facts, chosen: str, start: str, start_at: str) -> Start:
    """What a relevance pass begins with.

    Raises:
        Unsupported: the graph does not end as the start needs it.
    """
    if start == "map":
        return Start(START, start_at)
    if start == "clrp2":
        return _clrp2(walk, facts, chosen)
    if start not in STARTS:
        raise ValueError(f"no start {start!r}; there are {', '.join((*STARTS, 'clrp2', 'map'))}")
    return STARTS[start](walk, chosen)


def _clrp2(walk: Walk, facts: Facts, chosen: str) -> Start:
    """|z_c| sent through the last layer by z+, and against it the same sent through its negated weights (Gu et al.
    2018). Both stand at the last layer's input.
    """
    value = walk.graph.scores
    sent = walk.emit.op("Mul", one_hot(walk, chosen), walk.emit.op("Abs", value))
    while (unit := unit_giving(walk, facts, value)) is None:
        op = walk.graph.producer.get(value)
        if op is None or op.kind not in BETWEEN:
            reason = f"{op.text} stands between" if op else "there is none"
            raise Unsupported(f"clrp2 needs raw scores straight from a linear layer; {reason}")
        sent, value = str(VJP[op.kind](walk, op, [sent])[0]), op.inputs[0]
    if unit.signal not in walk.needed:
        raise Unsupported("clrp2 starts at the input of the last layer, which does not depend on what is asked for")
    rule = ZPlus(eps=1e-9)
    signal, dual = (of_mass_one(walk, rule(form, sent), unit.signal) for form in (unit, unit.negated()))
    return Start(signal, unit.signal, dual=dual)

"""Where a relevance pass begins: what stands at the raw scores, or at the input of the last layer, for one class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .backward import START, Unsupported, Walk, one_hot
from .canonize import product
from .relevance_facts import Facts
from .relevance_rules import ZPlus, stabilized
from .relevance_units import unit_giving
from .vjp import VJP

# The others are contrasts: a signal for the class less one for the other classes, both of the same mass.
UNSIGNED = frozenset({"logit", "one", "map"})


def _logit(walk: Walk, chosen: str) -> str:
    """The raw score of the class."""
    return walk.emit.op("Mul", one_hot(walk, chosen), walk.graph.scores)


def _clrp1(walk: Walk, chosen: str) -> str:
    """1 at the class and -1 / (N - 1) at each of the others: contrastive LRP with the uniform dual of its paper and of
    Iwana et al. 2019, both signals of mass 1, in one signed pass.
    """
    other = 1 / max(1, product(walk.shape(walk.graph.scores)[1:]) - 1)
    return walk.emit.op("Sub", walk.emit.op("Mul", one_hot(walk, chosen), 1 + other), other)


def _clrp1_code(walk: Walk, chosen: str) -> str:
    """|z_c| at the class less |z_n| at the others, each divided by its own sum, as in the code of Gu et al. 2018."""
    emit, rank = walk.emit, len(walk.shape(walk.graph.scores))
    size = walk.once("relevance size", lambda: emit.op("Abs", walk.graph.scores))
    target = emit.op("Mul", one_hot(walk, chosen), size)
    return emit.op("Sub", _of_mass_one(walk, target, rank), _of_mass_one(walk, emit.op("Sub", size, target), rank))


def _sglrp(walk: Walk, chosen: str) -> str:
    """The softmax's gradient, p_c (1 - p_c) + 1e-8 at the class and -p_c p_n at the others (Iwana et al. 2019).

    The others are scaled to the class's part, as the published code scales its second map. That only matters where the
    class has all the probability: there p_c p_n would vanish beside 1e-8.
    """
    emit, shape = walk.emit, walk.shape(walk.graph.scores)
    axis = 1 + int(np.argmax([size or 1 for size in shape[1:]]))
    hot = one_hot(walk, chosen)
    chances = walk.once("relevance softmax", lambda: emit.op("Softmax", walk.graph.scores, axis=axis))
    chance = emit.op("Mul", hot, chances)
    rest = _sum(walk, emit.op("Sub", chances, chance), len(shape))  # 1 - p_c, without cancellation
    peak = emit.op("Add", emit.op("Mul", _sum(walk, chance, len(shape)), rest), 1e-8)
    lowest = float(np.finfo(emit.dtype).min)
    others = emit.op("Softmax", emit.op("Where", emit.op("Greater", hot, 0.5), lowest, walk.graph.scores), axis=axis)
    return emit.op("Mul", emit.op("Sub", hot, others), peak)


STARTS: dict[str, Callable[[Walk, str], str]] = {
    "logit": _logit,
    "one": one_hot,
    "clrp1": _clrp1,
    "clrp1-code": _clrp1_code,
    "sglrp": _sglrp,
}
BETWEEN = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast"}) | {
    *("QuantizeLinear", "DequantizeLinear"),
}


def started(walk: Walk, facts: Facts, chosen: str, start: str, start_at: str) -> tuple[str, str]:
    """The relevance that a pass begins with and the value it stands at.

    Raises:
        Unsupported: the graph does not end as the start needs it.
    """
    if start == "map":
        return START, start_at
    if start == "clrp2":
        return _clrp2(walk, facts, chosen)
    if start not in STARTS:
        raise ValueError(f"no start {start!r}; there are {', '.join((*STARTS, 'clrp2', 'map'))}")
    return STARTS[start](walk, chosen), walk.graph.scores


def _clrp2(walk: Walk, facts: Facts, chosen: str) -> tuple[str, str]:
    """|z_c| sent through the last layer by z+, less the same sent through its negated weights, each divided by its own
    sum (Gu et al. 2018). What is left stands at the last layer's input.
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
    rank = len(unit.shape)
    for_it = _of_mass_one(walk, rule(unit, sent), rank)
    against = _of_mass_one(walk, rule(unit.negated(), sent), rank)
    return walk.emit.op("Sub", for_it, against), unit.signal


def _of_mass_one(walk: Walk, value: str, rank: int) -> str:
    """Divided by its sum; zero where that is zero."""
    return walk.emit.op("Div", value, stabilized(walk, _sum(walk, value, rank), 0, nonnegative=True))


def _sum(walk: Walk, value: str, rank: int) -> str:
    """Over each row of a value of so many axes."""
    return walk.emit.op("ReduceSum", value, list(range(1, rank)), keepdims=1)

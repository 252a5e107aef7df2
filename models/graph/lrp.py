"""Relevance: for each operator, how what its outputs are credited with is divided among its inputs.

Linear layers follow the composite's rules (relevance_rules.py). Of the others, activations and normalisations pass
relevance on, sums and averages divide it in proportion to what each input contributes, and whatever only moves numbers
sends it where the gradient goes. A product is a signal and a factor: the signal takes all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .backward import START, Grads, Rule, Unsupported, Walk, one_hot
from .canonize import Op, product
from .composites import COMPOSITES, Composite
from .pooling import tied_adjoint
from .relevance_facts import LINEAR, Facts
from .relevance_rules import Array, LinearRule, LinearUnit, ZPlus, stabilized
from .vjp import VJP, unbroadcast

RelevanceRule = Callable[["Pass", Op, Grads], Sequence[str | None]]
Seed = tuple[str, str, bool]

RELEVANCE: dict[str, RelevanceRule] = {}

# Activations that give 0 for 0, those that need not, and operators that only move numbers or choose among them.
THROUGH_ZERO = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSwish", "Swish"}) | {
    *("Gelu", "Mish", "Tanh", "Erf", "Softsign", "Abs", "Neg", "Sqrt", "Sin", "LRN", "LpNormalization"),
    *("Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear"),
}
OTHERS = frozenset({"Sigmoid", "HardSigmoid", "Softplus", "Clip", "Exp", "Log", "Pow", "Reciprocal", "Cos"}) | {
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    "MeanVarianceNormalization",
}
MOVING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Pad"}) | {
    *("Expand", "Tile", "Gather", "DepthToSpace", "SpaceToDepth", "Where", "Trilu"),
    *("GlobalMaxPool", "ReduceMax", "ReduceMin"),
}
AVERAGING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"})
SUMS = frozenset({"Add", "Sum", "Sub", "Mean"})


def relevance(walk: Walk, chosen: str, composite: str, start: str, start_at: str) -> tuple[dict[str, str], Seed]:
    """What of the relevance that starts at the chosen class arrives at every end of the walk.

    Args:
        walk: the reverse walk.
        chosen: the class of every row, (rows, 1).
        composite: the rules, of `COMPOSITES`.
        start: of `STARTS`, "clrp2" or "map".
        start_at: the value at which a fed map stands.

    Returns:
        The relevance at each end; and the seed, the value it stood at, and whether it is signed (a contrast).

    Raises:
        Unsupported: operators without a rule lie between.
    """
    if composite not in COMPOSITES:
        raise ValueError(f"no composite {composite!r}; there are {', '.join(COMPOSITES)}")
    facts, scores = Facts(walk.graph), walk.graph.scores
    if start == "map":
        seed, at = START, start_at
    elif start == "clrp2":
        seed, at = _dual_weights(walk, facts, chosen)
    elif start in STARTS:
        seed, at = STARTS[start](walk, chosen), scores
    else:
        raise ValueError(f"no start {start!r}; there are {', '.join((*STARTS, 'clrp2', 'map'))}")
    state = Pass(walk, facts, COMPOSITES[composite], at, start == "logit")
    return walk.run({at: seed}, state.rules()), (seed, at, start not in UNSIGNED)



"""Relevance: for each operator, how what its outputs are credited with is divided among its inputs.

Linear layers follow the composite's rules (relevance_rules.py). Of the others, activations and normalisations pass
relevance on, sums and averages divide it in proportion to what each input contributes, and whatever only moves numbers
sends it where the gradient goes. A product is a signal and a factor: the signal takes all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from .backward import Grads, Rule, Unsupported, Walk
from .canonize import Op
from .composites import COMPOSITES, Composite
from .relevance_facts import LINEAR, Facts
from .relevance_mass import contrast, share
from .relevance_pooling import tied
from .relevance_rules import LinearRule, stabilized
from .relevance_starts import started
from .relevance_units import LinearUnit, linear_unit
from .vjp import VJP, unbroadcast

RelevanceRule = Callable[["Pass", Op, Grads], Sequence[str | None]]

RELEVANCE: dict[str, RelevanceRule] = {}

# Activations that give 0 for 0, those that need not, and operators that only move numbers or choose among them.
THROUGH_ZERO = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSwish"}) | {
    *("Swish", "Gelu", "Mish", "Tanh", "Erf", "Softsign", "Abs", "Neg", "Sqrt", "LRN", "LpNormalization"),
    *("Identity", "Dropout", "Cast"),
}
QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
NOT_THROUGH_ZERO = frozenset({"Sigmoid", "HardSigmoid", "Softplus", "Clip", "Exp", "Log", "Pow", "Reciprocal"}) | {
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
}
MOVING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Pad"}) | {
    *("Expand", "Gather", "DepthToSpace", "SpaceToDepth", "Where", "GlobalMaxPool", "ReduceMax", "ReduceMin"),
}
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"})
SUMS = frozenset({"Add", "Sum", "Sub", "Mean"})


def rule(*kinds: str) -> Callable[[RelevanceRule], RelevanceRule]:
    """Enter a rule in the table."""

    def enter(made: RelevanceRule) -> RelevanceRule:
        RELEVANCE.update(dict.fromkeys(kinds, made))
        return made

    return enter


def relevance(walk: Walk, chosen: str, composite: str, start: str, start_at: str) -> dict[str, tuple[str, str | None]]:
    """What of the relevance that starts at the chosen class arrives at every end of the walk.

    A contrast of two signals sends each in a pass of its own: what is lost on the way is lost to both, and each is
    divided by what arrived of it.

    Args:
        walk: the reverse walk.
        chosen: the class of every row, (rows, 1).
        composite: the rules, of `COMPOSITES`.
        start: of `relevance_starts.STARTS`, "clrp2" or "map".
        start_at: the value at which a fed map stands.

    Returns:
        For each end the relevance, and the share of it that arrived; of two signals the lesser share.

    Raises:
        Unsupported: operators without a rule lie between.
    """
    if composite not in COMPOSITES:
        raise ValueError(f"no composite {composite!r}; there are {', '.join(COMPOSITES)}")
    begun = started(walk, walk.facts, chosen, start, start_at)
    here = Pass(walk, walk.facts, COMPOSITES[composite], begun.at, vanishes=start == "logit")
    rules: dict[str, Rule] = {kind: partial(_ruled, here, made) for kind, made in RELEVANCE.items()}
    arrived = walk.run({begun.at: begun.seed}, rules)
    shares = {end: share(walk, found, end, begun.seed, begun.at, begun.signed) for end, found in arrived.items()}
    if begun.dual is None:
        return {end: (found, shares[end]) for end, found in arrived.items()}
    against = walk.run({begun.at: begun.dual}, rules)
    contrasts: dict[str, tuple[str, str | None]] = {}
    for end, found in arrived.items():
        lost = share(walk, against[end], end, begun.dual, begun.at, begun.signed)
        both = contrast(walk, found, against[end], end, begun.sized)
        contrasts[end] = (both, walk.emit.op("Min", shares[end], lost))
    return contrasts


def _ruled(here: Pass, made: RelevanceRule, walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return made(here, op, grads)


class Pass:
    """One reverse walk under one composite.

    Attributes:
        walk: where nodes are written.
        facts: what is known of the values.
        composite: the rules.
        seed_at: where the relevance starts.
        silent: the values whose relevance is zero wherever they are zero themselves.
    """

    def __init__(self, walk: Walk, facts: Facts, composite: Composite, seed_at: str, vanishes: bool) -> None:
        self.walk = walk
        self.facts = facts
        self.composite = composite
        self.seed_at = seed_at
        self.silent: set[str] = set()
        for op in reversed(walk.graph.ops):
            for name in op.outputs:
                if (name != seed_at or vanishes) and all(self._asks(user, name) for user in self._users(name)):
                    self.silent.add(name)

    def linear_rule(self, op: Op) -> LinearRule:
        """The composite's rule for a linear operator."""
        sources = self.facts.sources(op)
        if self.composite.first is not None and sources and op.inputs[sources[0]] in self.facts.pixels:
            return self.composite.first
        shapes = [self.walk.graph.shapes.get(name, ()) for name in (*op.inputs[:2], op.outputs[0])]
        on_one_cell = all(size == 1 for shape in shapes for size in shape[2:])
        return self.composite.conv if op.kind.startswith("Conv") and not on_one_cell else self.composite.dense

    def unit(self, op: Op) -> LinearUnit:
        """A linear operator as the rules take it."""
        unit = linear_unit(self.walk, self.facts, op)
        if self.seed_at == op.outputs[0]:  # which need not be the unit's output: a bias may be added behind it
            return unit
        return replace(unit, active=self.active(unit.output), passes_positive=self._passes_positive(unit.output))

    def active(self, name: str) -> str | None:
        """What a ReLU makes of a value, where it may be read in the value's place: relevance comes only to where the
        two are equal. The runtime can then fuse the two operators.
        """
        users = self._users(name)
        if name == self.seed_at or [user.kind for user in users] != ["Relu"]:
            return None
        return users[0].outputs[0] if users[0].outputs[0] in self.silent else None

    def denominator(self, op: Op) -> str:
        """An operator's output by which relevance can be divided."""
        whole, eps = self.active(op.outputs[0]) or op.outputs[0], self.composite.eps
        positive = whole in self.facts.nonnegative
        return self.walk.once(("relevance denominator", whole), lambda: stabilized(self.walk, whole, eps, positive))

    def _users(self, name: str) -> list[Op]:
        """The operators that may send relevance to a value."""
        users = self.walk.graph.users.get(name, [])
        return [user for user in users if not self.facts.signals.isdisjoint(user.outputs)]

    def _passes_positive(self, name: str) -> bool:
        """Whether it is certain that negative numbers of a value have no relevance."""
        users = self._users(name)
        if name == self.seed_at or not users:
            return False
        return all(self._cuts_at_zero(user) and user.outputs[0] in self.silent for user in users)

    def _cuts_at_zero(self, op: Op) -> bool:
        low = self.walk.constant(op.inputs[1]) if op.kind == "Clip" and len(op.inputs) > 1 else None
        return op.kind == "Relu" or (low is not None and not low.any())

    def _asks(self, op: Op, name: str) -> bool:
        """Whether what an operator sends to an input is certainly zero wherever the input is zero."""
        sources = self.facts.sources(op)
        if op.kind in LINEAR:
            return self.linear_rule(op).needs_input
        if op.kind in SUMS and len(sources) > 1:
            return not (op.kind == "Sub" and self.facts.is_statistic(op.inputs[1], op.inputs[0]))
        if op.kind in AVERAGES or op.kind == "Resize":
            return True
        if op.kind == "BatchNormalization":
            return self.composite.norm == "epsilon"
        through = op.kind in THROUGH_ZERO | QUANTISERS | MOVING or op.kind in ("MaxPool", "Mul")
        if through or self._cuts_at_zero(op) or (op.kind == "Div" and name == op.inputs[0]):
            return all(output in self.silent for output in op.outputs if output)
        return False


# ----- layers -----


@rule(*LINEAR)
def linear(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    unit = here.unit(op)
    return _only(op, unit.position, here.linear_rule(op)(unit, str(grads[0])))


@rule("BatchNormalization")
def batch_normalization(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """Where it could not be folded into a layer before it."""
    if here.composite.norm == "pass":
        if here.composite.fold_norm:
            here.walk.note(op, "relevance passes over batch normalisation that follows no layer")
        return _only(op, 0, grads[0])
    return _in_proportion(here, op, grads)


# ----- what passes, and what only moves -----


@rule(*THROUGH_ZERO, *NOT_THROUGH_ZERO)
def passed(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """All to the one operand, or the first of two."""
    return _passed_to(here, op, here.facts.sources(op)[0], grads)


@rule(*QUANTISERS)
def quantised(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    here.walk.note(op, "relevance passes over the rounding of quantised values")
    return _passed_to(here, op, 0, grads)


@rule(*MOVING)
def routed(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """Where the gradient goes."""
    return VJP[op.kind](here.walk, op, grads)


@rule("Max", "Min")
def extreme(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """To the winner; beside constants it is an activation."""
    return passed(here, op, grads) if len(here.facts.sources(op)) == 1 else routed(here, op, grads)


@rule("MaxPool")
def max_pool(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    if here.composite.pool == "ties":
        return [tied(here.walk, op, str(grads[0]))]
    if here.composite.pool == "winner":
        return routed(here, op, grads)
    emit, output = here.walk.emit, op.outputs[0]
    positive = here.walk.once(("relevance above zero", output), lambda: emit.mask(emit.op("Greater", output, 0.0)))
    return routed(here, op, [emit.op("Mul", grads[0], positive)])


# ----- sums -----


@rule(*SUMS)
def added(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """In proportion to the summands, a / (a + b); a constant takes nothing, nor does a mean that is taken off."""
    sources = here.facts.sources(op)
    if op.kind == "Sub" and len(sources) == 2 and here.facts.is_statistic(op.inputs[1], op.inputs[0]):
        return _passed_to(here, op, 0, grads)
    return _passed_to(here, op, sources[0], grads) if len(sources) == 1 else _in_proportion(here, op, grads)


@rule("Resize")
def resized(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    return _in_proportion(here, op, grads)


@rule(*AVERAGES)
def averaged(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """In proportion to the inputs; to the positive ones only, where the composite says so."""
    walk, image = here.walk, op.inputs[0]
    if here.composite.pool != "proportional" or image in here.facts.nonnegative:
        return _in_proportion(here, op, grads)
    positive = walk.once(("relevance positive", image), lambda: walk.emit.op("Relu", image))

    def denominator() -> str:
        whole = walk.emit.op(op.kind, positive, *op.inputs[1:], **op.attributes)
        return stabilized(walk, whole, here.composite.eps, nonnegative=True)

    shared = walk.emit.op("Div", grads[0], walk.once(("relevance of positive", op.outputs[0]), denominator))
    return [walk.emit.op("Mul", positive, VJP[op.kind](walk, op, [shared])[0])]


# ----- products -----


@rule("Mul")
def multiplied(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """All to the signal. In x f(x), as SiLU, GELU or Mish are written out, both factors lead to it; else one factor is
    a constant or a gate.
    """
    sources, facts = here.facts.sources(op), here.facts
    if len(sources) == 1:
        return _passed_to(here, op, sources[0], grads)
    root = facts.common(list(op.inputs))
    if root is not None:
        nearer = facts.distance(op.inputs[1], root) < facts.distance(op.inputs[0], root)
        return _passed_to(here, op, int(nearer), grads)
    gate = facts.gate(op)
    if gate is None:
        raise Unsupported("neither factor is a gate of the other, so that there is no relevance rule for their product")
    return _passed_to(here, op, 1 - gate, grads)


@rule("Div")
def divided(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    """All to the numerator: what it is divided by is a norm or a deviation."""
    return _passed_to(here, op, here.facts.sources(op)[0], grads)


# ----- refused by name -----


@rule("Softmax", "LogSoftmax", "Einsum", "Attention")
def refused(here: Pass, op: Op, grads: Grads) -> Sequence[str | None]:
    raise Unsupported("attention has no relevance rule; a gradient method works here")


# ----- what the rules share -----


def _only(op: Op, position: int, part: str | None) -> list[str | None]:
    return [part if i == position else None for i in range(len(op.inputs))]


def _passed_to(here: Pass, op: Op, position: int, grads: Grads) -> list[str | None]:
    """All to one operand, summed over what broadcasting repeated."""
    return _only(op, position, unbroadcast(here.walk, str(grads[0]), op.outputs[0], op.inputs[position]))


def _in_proportion(here: Pass, op: Op, grads: Grads) -> list[str | None]:
    """R_i = x_i d y / d x_i R / y: each input's part in a sum, by the operator's gradient."""
    emit = here.walk.emit
    shared = emit.op("Div", grads[0], here.denominator(op))
    parts = VJP[op.kind](here.walk, op, [shared])
    return [None if part is None else emit.op("Mul", op.inputs[i], part) for i, part in enumerate(parts)]

"""Which rule each kind of operator gets in a relevance pass: the composites of the literature, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .relevance_rules import AlphaBeta, Epsilon, Flat, Gamma, LinearRule, ZBox, ZPlus


@dataclass(frozen=True, slots=True)
class Composite:
    """The rules of one relevance pass.

    Attributes:
        conv: of convolutions.
        dense: of Gemm and MatMul, and of convolutions on a grid of one cell, which exporters write for them.
        first: of linear layers that read the image itself, where it differs.
        pool: what MaxPool does: "winner" sends all to the first greatest input, as the gradient does; "ties" divides it
            equally among equal ones; "proportional" is the winner's share x_i / max(x), nothing where that is not
            positive, and makes averages use positive inputs only.
        norm: what a BatchNormalization that could not be folded does: "epsilon" treats it as a linear layer of one
            weight for each channel, "pass" as an activation.
        fold_norm: whether batch normalisation is to be folded into the layers before it.
        eps: stabilises the denominators of sums, averages and normalisations.
    """

    conv: LinearRule
    dense: LinearRule
    first: LinearRule | None = None
    pool: Literal["winner", "ties", "proportional"] = "winner"
    norm: Literal["epsilon", "pass"] = "pass"
    fold_norm: bool = True
    eps: float = 1e-6


_Z_PLUS = ZPlus(eps=1e-9)
_FG_CAM = Composite(ZPlus(eps=0), ZPlus(eps=0), first=ZBox(own=True, eps=0), pool="proportional", eps=0)

COMPOSITES: dict[str, Composite] = {
    # LRP-0 everywhere: input times gradient for ReLU networks.
    "zero": Composite(Epsilon(0), Epsilon(0), norm="epsilon", eps=0),
    "epsilon": Composite(Epsilon(), Epsilon(), norm="epsilon"),
    # These four equal zennit's composites of the same names: z+ has the positive bias in its denominator.
    "epsilon-plus": Composite(ZPlus(bias=True), Epsilon()),
    "epsilon-plus-flat": Composite(ZPlus(bias=True), Epsilon(), first=Flat()),
    "epsilon-gamma-box": Composite(Gamma(0.25), Epsilon(), first=ZBox()),
    "epsilon-alpha2-beta1": Composite(AlphaBeta(2, 1), Epsilon()),
    # From here on z+ has no bias, so that relevance is conserved.
    "z-plus": Composite(_Z_PLUS, _Z_PLUS, eps=1e-9),
    # Deep Taylor decomposition: Montavon et al. 2017, doi:10.1016/j.patcog.2016.11.008.
    "deep-taylor": Composite(_Z_PLUS, _Z_PLUS, first=ZBox(eps=1e-9), eps=1e-9),
    # Gu, Yang and Tresp 2018, arXiv 1812.02100, as their published code has it.
    "clrp": Composite(_Z_PLUS, _Z_PLUS, first=ZBox(eps=1e-9), pool="ties", eps=1e-9),
    # Qiu, Jin and Zhang 2024, arXiv 2303.09171; sums, which it lacks, divide in proportion. Its code passes over batch
    # normalisation and ignores its scale and sign.
    "fg-cam": _FG_CAM,
    "fg-cam-paper": replace(_FG_CAM, fold_norm=False),
}

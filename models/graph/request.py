"""What a backward graph is asked for. Apart from the transform, so that naming it imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One quantity to compute for every image and target.

    Attributes:
        kind: "gradient", "guided" (ReLU passes only positive gradients) or "relevance".
        at: the value at which it is wanted; "" is the image.
        start: where a relevance pass begins: "logit", a contrast ("clrp1", "clrp1-code", "clrp2", "sglrp"), or "map",
            which is fed at `start_at`. A gradient begins with 1 at the target's raw score, or is that of the
            target's cross-entropy ("cross-entropy", "cross-entropy-sigmoid"). Either may begin with "weights" of all
            raw scores, which are fed.
        composite: the rules of a relevance pass, of `lrp.COMPOSITES`.
        start_at: the value at which a fed map stands.
        times_input: multiplied by the value it is taken at.
    """

    kind: str = "gradient"
    at: str = ""
    start: str = "logit"
    composite: str = ""
    start_at: str = ""
    times_input: bool = False

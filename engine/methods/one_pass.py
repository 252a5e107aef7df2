"""What the methods share whose map comes of the observation alone, or follows a score back."""

from __future__ import annotations

from ..types import Bank, Expansion, Facts, Observation, Parameters


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """No further pass."""
    return Expansion(extras={"passes": 0})


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    """Gradients of probabilities vanish where the network is sure, so that a softmax end must be taken away."""
    if facts.has_logits:
        return None
    return f"it follows the raw score back, and the model gives {facts.output} only"

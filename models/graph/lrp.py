"""Relevance: for each operator, how what its outputs are credited with is divided among its inputs."""

from __future__ import annotations

from .backward import Unsupported, Walk


def relevance(
    walk: Walk, chosen: str, composite: str, start: str, start_at: str
) -> tuple[dict[str, str], tuple[str, str, bool]]:
    """What of the relevance that starts at the chosen class arrives at every end of the walk.

    Returns:
        The relevance at each end; and the seed, the value it stood at, and whether it is signed (a contrast).
    """
    raise Unsupported("relevance has no rules yet")

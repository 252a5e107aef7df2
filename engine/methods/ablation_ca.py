"""Ablation-CA style: superpixels as objects, what each contributes, and which of them act together.

After Wang et al., Journal of Xiamen University 2024; its text leaves the estimators open, and these are shares of
variance in one Monte Carlo sample. Each of its pictures shows every object with an even chance; u is +1 for an object
that is shown, -1 for one that is not, and q the score.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ..types import (
    Array,
    Bank,
    Combined,
    Expansion,
    Facts,
    Method,
    Observation,
    Parameter,
    Parameters,
    SegmentBank,
    always,
    never,
)
from .segments import (
    ONE_SEGMENT,
    SAME_SCORE,
    STEADY,
    coin_flips,
    distinct,
    painted,
    refuses_coalitions,
    segments_of,
    steady,
    superpixel_options,
    superpixels,
)

SEGMENTS = 40
LINKED = 4.0  # standard errors from which a pair counts as linked: one of 16000 unlinked pairs does


def expand(facts: Facts, observation: Observation, parameters: Parameters, shared: Bank | None) -> Expansion:
    """The whole picture, each object hidden alone, with `pairs=exact` each two of them, and the random pictures."""
    segments, count = segments_of(observation)
    samples = int(parameters["samples"])
    pairs = list(combinations(range(count), 2)) if parameters["pairs"] == "exact" else []
    bits = np.ones((1 + count + len(pairs) + samples, count), np.uint8)
    for row, hidden in enumerate([*((part,) for part in range(count)), *pairs], start=1):
        bits[row, list(hidden)] = 0
    bits[-samples:] = coin_flips(observation, samples, count)
    once, uses = distinct(bits)
    carry = (uses, pairs, 2.0 * bits[-samples:] - 1)
    extras = {"passes": len(once), "segments": count, "samples": samples}
    return Expansion(
        SegmentBank(segments, once), str(parameters["baseline"]), str(parameters["score"]), carry=carry, extras=extras
    )


def contributions(signs: Array, scores: Array) -> tuple[Array, Array, Array]:
    """Every object's `E[q | u = +1] - E[q | u = -1]`, its standard error, and its share of q's variance.

    The share is `corr(q, u)^2`. An object that was always shown, or never, has 0.

    Args:
        signs: (samples, objects) of -1 and 1.
        scores: (samples,).
    """
    values, errors = np.zeros(signs.shape[1]), np.zeros(signs.shape[1])
    for part, column in enumerate(signs.T):
        shown, hidden = scores[column > 0], scores[column < 0]
        if len(shown) and len(hidden):
            values[part] = shown.mean() - hidden.mean()
            errors[part] = np.sqrt(shown.var() / len(shown) + hidden.var() / len(hidden))
    spread = signs.var(axis=0) * scores.var()
    covariance = (signs - signs.mean(axis=0)).T @ (scores - scores.mean()) / len(scores)
    shares = np.divide(covariance**2, spread, out=np.zeros_like(spread), where=spread > 0)
    return values, errors, shares


def correlations(signs: Array, scores: Array) -> Array:
    """`corr(q, u_i u_j)` of every pair, (objects, objects); 0 on the diagonal, and where q hardly varies.

    Its square is the pair's own share of q's variance: + for objects that need one another, - for those that stand in
    for one another, 0 for those whose contributions add up. The standard error is 1 / sqrt(samples).
    """
    if steady(scores):
        return np.zeros((signs.shape[1],) * 2)
    standard = (scores - scores.mean()) / scores.std()
    covariance = (signs * standard[:, None]).T @ signs / len(scores)
    spread = 1 - (signs.T @ signs / len(scores)) ** 2
    found = np.divide(covariance, np.sqrt(spread.clip(0)), out=np.zeros_like(covariance), where=spread > STEADY)
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def linked(correlation: Array, values: Array, samples: int) -> tuple[Array, Array]:
    """The linked pairs (n, 2), most telling first by `|r| (|m_i| + |m_j|) / 2`, and every object's group (objects,).

    Groups are what links connect, numbered by their best link; an object without a link has -1.
    """
    from scipy.sparse.csgraph import connected_components

    first, second = np.nonzero(np.triu(np.abs(correlation) > LINKED / np.sqrt(samples), 1))
    weights = np.abs(correlation[first, second]) * (np.abs(values[first]) + np.abs(values[second])) / 2
    pairs = np.stack([first, second], axis=1)[np.argsort(-weights, kind="stable")].astype(np.int32)
    between = np.zeros(correlation.shape, bool)
    between[first, second] = True
    components = connected_components(between, directed=False)[1]
    groups = np.full(len(values), -1, np.int32)
    for number, component in enumerate(dict.fromkeys(components[pairs[:, 0]])):
        groups[components == component] = number
    return pairs, groups


def combine(
    facts: Facts, observation: Observation, expansion: Expansion, scores: Array, parameters: Parameters
) -> Combined:
    uses, pairs, signs = expansion.carry
    segments, count = segments_of(observation)
    maps, extras, arrays = [], [], []
    for row in scores.astype(np.float64)[:, uses]:
        sampled = row[-len(signs) :]
        values, errors, shares = contributions(signs, sampled)
        reason = ONE_SEGMENT if count == 1 else SAME_SCORE if steady(sampled) else None
        if reason:
            values = np.zeros(count)
        correlation = correlations(signs, sampled)
        links, groups = linked(correlation, values, len(signs))
        single = row[0] - row[1 : 1 + count]
        named = {
            "contribution": values,
            "contribution_error": errors,
            "variance_share": shares,
            "single": single,
            "correlation": correlation,
        }
        if pairs:
            both = row[0] - row[1 + count : 1 + count + len(pairs)]
            first, second = np.array(pairs).T
            exact = np.zeros((count, count))
            exact[first, second] = exact[second, first] = both - single[first] - single[second]
            named["pair_excess"] = exact
        told = {
            "linked": len(links),
            "groups": [np.flatnonzero(groups == number).tolist() for number in range(groups.max() + 1)],
            "max_correlation": float(f"{np.abs(correlation).max():.4g}"),
            "correlation_error": float(f"{1 / np.sqrt(len(signs)):.4g}"),
        }
        if reason:
            told["reason"] = reason
        kept = {name: values.astype(np.float32) for name, values in named.items()}
        arrays.append({"segments": segments, **kept, "links": links, "group": groups})
        extras.append(told)
        maps.append(painted(segments, values[None])[0])
    return Combined(np.stack(maps), tuple(extras), tuple(arrays))


def passes(facts: Facts, parameters: Parameters) -> int:
    count = int(parameters["segments"])
    pairs = count * (count - 1) // 2 if parameters["pairs"] == "exact" else 0
    return 1 + count + pairs + int(parameters["samples"])


def refuses(facts: Facts, parameters: Parameters) -> str | None:
    if parameters["score"] == "logit" and not facts.has_logits:
        return f"it is asked for logits, and the model gives {facts.output} only"
    count = int(parameters["segments"])
    rows = int(parameters["samples"]) + (count**2 // 2 if parameters["pairs"] == "exact" else 0)
    return refuses_coalitions(rows, parameters, SEGMENTS)


ABLATION_CA = Method(
    name="ablation-ca",
    summary="superpixels as objects: what each contributes, and which of them act together",
    citation="after Wang et al., Ablation-CA, Journal of Xiamen University 2024",
    parameters={
        "samples": Parameter(2048, "random pictures", least=16, most=1_000_000),
        "pairs": Parameter("sampled", "also hide each two objects alone", ("sampled", "exact")),
        "score": Parameter("posterior", "what a pass is asked for", ("posterior", "logit")),
        **superpixel_options("slic", SEGMENTS, "mean"),
    },
    expand=expand,
    combine=combine,
    finish=lambda parameters: (),
    passes=passes,
    refuses=refuses,
    superpixels=superpixels,
    arrays=True,
    needs_tap=never,
    pixels=always,
)

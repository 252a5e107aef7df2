"""Rows that several methods ask of one image, once.

Random grids, superpixels, windows, feature maps and ranked pixels as masks: where two methods have the same baseline
behind equal masks, their pictures are equal, and one pass answers both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .types import Array, Bank, GridBank, MapBank, RankBank, SegmentBank, WindowBank


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows that go through a graph, and of which methods' rows they are.

    Attributes:
        takers: for each method the row that answers each of its own, (n,); None where they are the same.
    """

    bank: Bank | None
    baseline: str
    takers: dict[int, Array | None]

    def __len__(self) -> int:
        return 0 if self.bank is None else len(self.bank)


# Of each kind of bank: the arrays that make a row's mask, those that only go along, and what else must be the same.
_KINDS: dict[type, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    MapBank: (("maps",), (), ("rule",)),
    GridBank: (("bits", "offsets"), ("counts",), ()),
    SegmentBank: (("bits",), (), ("segments",)),
    WindowBank: (("boxes",), (), ()),
    RankBank: (("of", "thresholds"), (), ("ranks",)),
}


def concatenated(banks: Sequence[Bank]) -> Bank:
    """Banks of one kind, which share what is not of a row, as one."""
    masks, along, _ = _KINDS[type(banks[0])]
    rows: dict[str, Any] = {name: np.concatenate([getattr(bank, name) for bank in banks]) for name in (*masks, *along)}
    return replace(banks[0], **rows)


def joined(banks: dict[int, tuple[Bank, str]]) -> list[Asked]:
    """What methods ask of one image, each a bank and a baseline, with equal rows once.

    Superpixels and ranks are the same where they are the same array. Methods without a row in common keep banks of
    their own.
    """
    groups: dict[Hashable, list[int]] = {}
    for method, (bank, baseline) in banks.items():
        like: Hashable = method  # of its own
        if type(bank) in _KINDS:
            masks, _, same = _KINDS[type(bank)]
            shapes = [(getattr(bank, name).shape[1:], getattr(bank, name).dtype) for name in masks]
            others = [value if isinstance(value := getattr(bank, name), str) else id(value) for name in same]
            like = (type(bank), baseline, *shapes, *others)
        groups.setdefault(like, []).append(method)
    return [asked for methods in groups.values() for asked in _once({method: banks[method] for method in methods})]


def _once(banks: dict[int, tuple[Bank, str]]) -> list[Asked]:
    apart = [Asked(bank, baseline, {method: None}) for method, (bank, baseline) in banks.items()]
    if len(banks) == 1:
        return apart
    bank, baseline = next(iter(banks.values()))
    masks, along, _ = _KINDS[type(bank)]
    rows: dict[str, Any] = {
        name: np.concatenate([getattr(other, name) for other, _ in banks.values()]) for name in (*masks, *along)
    }
    whole = np.hstack([np.ascontiguousarray(rows[name]).reshape(len(rows[name]), -1).view(np.uint8) for name in masks])
    _, first, inverse = np.unique(whole.view(f"V{whole.shape[1]}").ravel(), return_index=True, return_inverse=True)
    if len(first) == len(whole):
        return apart
    order = np.argsort(first)
    places = np.argsort(order)[inverse.ravel()]
    ends = np.cumsum([len(other) for other, _ in banks.values()])
    takers = dict(zip(banks, np.split(places, ends[:-1]), strict=True))
    union = replace(bank, **{name: part[first[order]] for name, part in rows.items()})
    return [Asked(union, baseline, dict(takers))]

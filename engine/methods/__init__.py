"""The methods by name; one file each, one row here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ... import InputError
from ..calls import parse_call, plain
from ..types import Method, MethodCall
from .ablation_ca import ABLATION_CA
from .cam import CAM
from .cf_cam import CF_CAM
from .fg_cam import FG_CAM
from .grad_cam import GRADIENT_CAMS
from .group_cam import GROUP_CAM
from .head_cams import HEAD_CAMS
from .integrated_gradients import INTEGRATED_GRADIENTS
from .kernel_shap import KERNEL_SHAP
from .l_cam import L_CAM
from .lime import LIME
from .lrp import RELEVANCES
from .occlusion import OCCLUSION
from .rise import RISE
from .saliency import SALIENCIES
from .score_cam import SCORE_CAM
from .score_cam_kin import SCORE_CAM_KIN
from .sidu import SIDU
from .sise import SISES
from .smoothgrad import SMOOTHGRAD
from .xrai import XRAI

__all__ = ["METHODS", "parse_method", "parse_methods", "plain"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        SCORE_CAM,
        *SCORE_CAM_KIN,
        *SISES,
        *(CF_CAM, GROUP_CAM, SIDU, RISE, OCCLUSION, LIME, KERNEL_SHAP, ABLATION_CA, L_CAM, CAM),
        *HEAD_CAMS,
        *GRADIENT_CAMS,
        FG_CAM,
        *RELEVANCES,
        *SALIENCIES,
        *(INTEGRATED_GRADIENTS, SMOOTHGRAD, XRAI),
    )
}


def parse_method(text: str) -> MethodCall:
    """A call from `NAME[:key=value,...]`.

    Raises:
        InputError: unknown method or parameter (nearest offered), or a value out of its range.
    """
    method, values = parse_call("method", METHODS, text)
    return MethodCall(method, values)


RANGE = re.compile(r"([\w-]+) *= *(\d+)\.\.(\d+)(?:\.\.(\d+))?(?=,|$)")
STEP, MOST = 10, 100


def parse_methods(texts: Iterable[str]) -> tuple[MethodCall, ...]:
    """Calls as `parse_method`'s; a whole number may be a range A..B or A..B..STEP, which stands for a call each.

    Raises:
        InputError: as for one, or a range that is empty, too long, doubled, or of another kind of number.
    """
    calls: list[MethodCall] = []
    for text in texts:
        found = RANGE.search(text)
        if found is None:
            calls.append(parse_method(text))
            continue
        key, first, last, step = found[1], int(found[2]), int(found[3]), int(found[4] or STEP)
        values = range(first, last + 1, max(step, 1))
        if not 1 <= len(values) <= MOST or step < 1:
            raise InputError(f"method {text!r}: {found[0]} stands for no value, or for more than {MOST}")
        swept = [parse_method(f"{text[: found.start()]}{key}={value}{text[found.end() :]}") for value in values]
        if type(swept[0].method.parameters[key].default) is not int:
            raise InputError(f"method {text!r}: {key!r} is not a whole number and has no range")
        calls += swept
    return tuple(calls)

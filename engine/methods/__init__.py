"""The methods by name; one file each, one row here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ... import InputError
from ..types import Method, MethodCall, Value, nearest
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


def plain(name: str) -> str:
    """A method name without case, `-` and `_`; `++`, `pp` and `plusplus` are one."""
    return name.casefold().replace("-", "").replace("_", "").replace("plusplus", "pp").replace("++", "pp")


def parse_method(text: str) -> MethodCall:
    """A call from `NAME[:key=value,...]`.

    Raises:
        InputError: unknown method or parameter (nearest offered), or a value out of its range.
    """
    name, _, options = text.partition(":")
    by_plain = {plain(known): method for known, method in METHODS.items()}
    method = by_plain.get(plain(name.strip()))
    if method is None:
        raise InputError(f"no method {name!r}; {nearest(name.casefold(), list(METHODS))}")
    values: dict[str, Value] = {key: parameter.default for key, parameter in method.parameters.items()}
    given: set[str] = set()
    for option in filter(None, options.split(",")):
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in values:
            raise InputError(f"method {method.name} has no parameter {key!r}; {nearest(key, list(values) or ['none'])}")
        if not equals or key in given:
            raise InputError(f"method {method.name}: give {key!r} once, as {key}=VALUE")
        given.add(key)
        values[key] = _value(method, key, value)
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


def _value(method: Method, key: str, text: str) -> Value:
    parameter = method.parameters[key]
    where = f"method {method.name}, parameter {key!r}"
    if parameter.choices:
        by_plain = {plain(choice): choice for choice in parameter.choices}
        if plain(text) not in by_plain:
            raise InputError(f"{where}: no choice {text!r}; {nearest(text, list(parameter.choices))}")
        return by_plain[plain(text)]
    kind = type(parameter.default)
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"{where}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    number = float(value)
    low = float("-inf") if parameter.least is None else parameter.least
    high = float("inf") if parameter.most is None else parameter.most
    if not low <= number <= high:
        raise InputError(f"{where}: {text} lies outside {low:g} .. {high:g}")
    return value

"""The methods by name; one file each, one row here."""

from __future__ import annotations

from ... import InputError
from ..types import Method, MethodCall, Value, nearest
from .cam import CAM
from .cf_cam import CF_CAM
from .fg_cam import FG_CAM
from .grad_cam import GRADIENT_CAMS
from .group_cam import GROUP_CAM
from .integrated_gradients import INTEGRATED_GRADIENTS
from .kernel_shap import KERNEL_SHAP
from .lime import LIME
from .lrp import RELEVANCES
from .occlusion import OCCLUSION
from .rise import RISE
from .saliency import SALIENCIES
from .score_cam import SCORE_CAM
from .score_cam_kin import SCORE_CAM_KIN
from .sidu import SIDU
from .smoothgrad import SMOOTHGRAD

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        SCORE_CAM,
        *SCORE_CAM_KIN,
        *(CF_CAM, GROUP_CAM, SIDU, RISE, OCCLUSION, LIME, KERNEL_SHAP, CAM),
        *GRADIENT_CAMS,
        FG_CAM,
        *RELEVANCES,
        *SALIENCIES,
        *(INTEGRATED_GRADIENTS, SMOOTHGRAD),
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

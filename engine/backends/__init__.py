"""The runtimes by name, and the choice among them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ... import BackendError
from .base import (
    PRECISIONS,
    DeviceSession,
    Offer,
    Plan,
    Profile,
    Session,
    cpu_flags,
    device_of,
    first_line,
    open_driver,
    usable_cores,
)

__all__ = [
    "BACKENDS",
    "PORTABLE",
    "PRECISIONS",
    "DeviceSession",
    "Offer",
    "Plan",
    "Profile",
    "Session",
    "build_plan",
    "choose",
    "cpu_flags",
    "device_of",
    "first_line",
    "open_driver",
    "open_session",
    "pick_provider",
    "survey",
    "usable_cores",
    "wanted_precision",
]

BACKENDS: dict[str, str] = {"reference": ".reference", "onnxruntime": ".ort", "tensorrt": ".trt"}

# The (backend, provider) that take backward graphs in TensorRT's operators only.
PORTABLE = frozenset(
    {
        *(("tensorrt", provider) for provider in ("tensorrt", "rtx")),
        *(("onnxruntime", provider) for provider in ("tensorrt", "nv-tensorrt-rtx")),
    }
)


def _door(name: str) -> Any:
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}; known: {', '.join(BACKENDS)}")
    try:
        return import_module(BACKENDS[name], __package__)
    except ModuleNotFoundError as err:
        raise BackendError(f"backend {name!r} needs {err.name}: pip install '{err.name}'") from err


def open_session(backend: str, model: bytes, profile: Profile) -> Session:
    """A session of the named backend.

    Raises:
        BackendError: unknown or not installed (with the pip line), or it refuses the model or the precision.
    """
    session: Session = _door(backend).open(model, profile)
    return session


def build_plan(backend: str, model: bytes, profile: Profile, target: str | None = None) -> Plan:
    """Build what the named backend runs, ahead of time.

    Args:
        target: the GPU it is for, as sm_89; None is what the backend takes by itself.

    Raises:
        BackendError: it refuses the graph or the target.
    """
    plan: Plan = _door(backend).build_plan(model, profile, target)
    return plan


def survey(device: int = 0) -> list[Offer]:
    """What every known backend gives on this machine; `device` is the number of the GPU that is asked."""
    return [offer for name in BACKENDS for offer in _door(name).survey(device)]


def pick_provider(backend: str) -> str:
    """The provider that a backend takes by itself.

    Raises:
        BackendError: it builds nothing ahead of time.
    """
    door = _door(backend)
    if not hasattr(door, "pick_provider"):
        raise BackendError(f"backend {backend} builds nothing ahead of time; --backend tensorrt does")
    return str(door.pick_provider(None))


def wanted_precision(precision: str, own: str) -> str:
    """The precision in which a file is to run, where `own` is its own arithmetic, which `auto` takes.

    Raises:
        BackendError: no such precision, or not of this file.
    """
    wanted = own if precision == "auto" else precision
    if wanted not in PRECISIONS:
        raise BackendError(f"no precision {wanted!r}; known: auto, {', '.join(PRECISIONS)}")
    if wanted == "int8" and own != "int8":
        raise BackendError("precision int8 needs a quantised (QDQ) model file; this one is not")
    if own != "fp32" and wanted != own:
        raise BackendError(f"the model file is in {own}: it runs as it is (--precision auto), not in {wanted}")
    return wanted


def choose(backend: str, provider: str | None, precision: str, own: str, device: int = 0) -> list[tuple[str, str, str]]:
    """The (backend, provider, precision) that give what was asked.

    Args:
        own: the file's own arithmetic, which `auto` takes. A file in fp16 or int8 runs as it is; one in fp32 may also
            be run in tf32, bf16 or fp16 where the backend gives it.

    Raises:
        BackendError: nothing on this machine gives it; says what each provider lacks.
    """
    wanted = wanted_precision(precision, own)
    named = "onnxruntime" if backend == "auto" else backend
    known = _door(named).survey(device)
    if provider is None:
        offers = [offer for offer in known if not offer.by_name]
    else:
        offers = [offer for offer in known if offer.provider == provider]
    if not offers:
        names = ", ".join(offer.provider for offer in known)
        raise BackendError(f"backend {named} has no provider {provider!r}; known: {names}")
    made = wanted == "fp16" and own != "fp16"
    fit = [
        (offer.backend, offer.provider, wanted)
        for offer in offers
        if wanted in offer.precisions and (offer.halves or not made)
    ]
    if not fit:
        reasons = "; ".join(f"{offer.provider}: {offer.note}" for offer in offers if offer.halves or not made)
        if made:
            raise BackendError(
                "precision fp16 needs a model file in half precision; this one is not, and no backend here makes one "
                f"of it ({reasons or f'nor does {named} on a CPU'})"
            )
        raise BackendError(f"no {wanted} on this machine with backend {named} ({reasons})")
    return fit

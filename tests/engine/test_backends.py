"""The choice among backends, and how ONNX Runtime is asked, where the machine itself can't show it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from heatmill import BackendError
from heatmill.engine import backends
from heatmill.engine.backends import base, ort
from heatmill.engine.backends.base import Offer, Profile


@pytest.fixture
def openvino(monkeypatch):
    """A plugin that offers a CPU device, and a runtime that remembers what it was asked; returns what it was asked."""
    asked: dict = {}

    class Options:
        def add_provider_for_devices(self, devices, options):
            asked.update(devices=devices, config=json.loads(Path(options["load_config"]).read_text()))

    def session(model, options, providers=None):
        asked.update(model=model, providers=providers, threads=options.intra_op_num_threads)
        return SimpleNamespace(run=lambda outputs, feeds: [])

    device = SimpleNamespace(ep_name=ort.OPENVINO, ep_metadata={"ov_device": "CPU"})
    gpu = SimpleNamespace(ep_name=ort.OPENVINO, ep_metadata={"ov_device": "GPU"})
    runtime = SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=Options,
        InferenceSession=session,
        register_execution_provider_library=lambda name, path: asked.update(library=path),
        get_ep_devices=lambda: [gpu, device],
    )
    monkeypatch.setattr(ort, "ort", runtime)
    monkeypatch.setattr(ort, "import_module", lambda name: SimpleNamespace(get_library_path=lambda: "libov.so"))
    monkeypatch.setattr(ort.metadata, "version", lambda name: "1.8.1")
    ort._openvino_devices.cache_clear()
    yield asked
    ort._openvino_devices.cache_clear()


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvinos_precision_is_pinned(openvino, monkeypatch, precision, hint):
    monkeypatch.setattr(ort, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    session = ort.open(b"graph", Profile(8, precision, "openvino", threads=3))
    assert openvino["config"]["CPU"]["INFERENCE_PRECISION_HINT"] == hint
    assert openvino["config"]["CPU"]["INFERENCE_NUM_THREADS"] == "3"
    assert [device.ep_metadata["ov_device"] for device in openvino["devices"]] == ["CPU"]
    assert (session.provider, session.precision, session.flexible) == ("openvino", precision, False)


def test_bf16_is_refused_where_it_would_be_emulated(openvino, monkeypatch):
    monkeypatch.setattr(ort, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    with pytest.raises(BackendError, match="no amx_bf16"):
        ort.open(b"graph", Profile(8, "bf16", "openvino"))
    with pytest.raises(BackendError, match="no bf16 on this machine"):
        backends.choose("auto", None, "bf16", own="fp32")


def test_the_default_provider_is_the_runtimes_own(openvino):
    session = ort.open(b"graph", Profile(8))
    assert openvino["providers"] == ["CPUExecutionProvider"]
    assert openvino["threads"] == base.usable_cores()
    assert session.flexible


def test_auto_measures_between_providers_of_one_precision(monkeypatch):
    offers = [
        Offer("onnxruntime", "cpu", "1", ("fp32", "int8"), ""),
        Offer("onnxruntime", "openvino", "1", ("fp32", "bf16", "int8"), ""),
    ]
    monkeypatch.setattr(ort, "survey", lambda: offers)
    pick = backends.choose
    assert [fit[1] for fit in pick("auto", None, "auto", own="fp32")] == ["cpu", "openvino"]
    assert pick("auto", None, "bf16", own="fp32") == [("onnxruntime", "openvino", "bf16")]
    assert pick("auto", "cpu", "auto", own="int8") == [("onnxruntime", "cpu", "int8")]
    assert pick("reference", None, "fp32", own="fp32") == [("reference", "numpy", "fp32")]


def test_the_faster_session_is_kept(make_model, monkeypatch):
    from heatmill.engine import opening

    seconds = {"cpu": 0.2, "openvino": 0.1}
    sessions = {name: SimpleNamespace(provider=name) for name in seconds}
    monkeypatch.setattr(opening, "choose", lambda *asked: [("onnxruntime", name, "fp32") for name in seconds])
    monkeypatch.setattr(opening, "open_session", lambda backend, graph, profile: sessions[profile.provider])
    monkeypatch.setattr(opening, "_seconds", lambda session, feed, output: seconds[session.provider])
    assert opening.open_best(opening.load(make_model(), ["cam"])).provider == "openvino"


def test_a_control_groups_quota_counts(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(base, "Path", lambda name: quota)
    monkeypatch.setattr(base.os, "sched_getaffinity", lambda process: set(range(64)))
    for text, cores in (("200000 100000", 2), ("max 100000", 64), ("50000 100000", 1), ("garbage", 64)):
        quota.write_text(text)
        assert base.usable_cores() == cores


def test_a_missing_package_names_the_pip_line(monkeypatch):
    def missing(name, package=None):
        raise ModuleNotFoundError("no", name="onnxruntime")

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.raises(BackendError, match="pip install 'onnxruntime'"):
        backends.open_session("onnxruntime", b"", Profile(1))

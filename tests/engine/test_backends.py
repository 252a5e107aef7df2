"""The choice among backends, and how ONNX Runtime is asked, where the machine itself can't show it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from heatmill import BackendError
from heatmill.engine import backends
from heatmill.engine.backends import base, ort
from heatmill.engine.backends.base import Offer, Profile
from tests import architectures as made
from tests.engine.host_driver import HostDriver
from tests.models.test_architectures import CASES, on_onnxruntime


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
        get_available_providers=lambda: ["CPUExecutionProvider"],
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
    monkeypatch.setattr(ort, "survey", lambda device: offers)
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


# ----- GPUs: on the CPU provider with pointers of the host, and with a runtime that remembers what it was asked -----


@pytest.fixture
def driver(monkeypatch) -> HostDriver:
    found = HostDriver()
    monkeypatch.setattr(ort, "open_driver", lambda index: found)
    return found


def on_cpu(proto, profile: Profile, driver: HostDriver) -> ort.OrtDeviceSession:
    """A device session whose device is the host."""
    data = ort.device_graph(proto.SerializeToString(), profile, "here")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return ort.OrtDeviceSession(session, "cuda", profile.precision, ("cpu", 0), driver, 77)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16)])
def test_values_stay_on_the_device(precision, dtype, driver):
    proto = made.resnet()
    session = on_cpu(proto, Profile(4, precision), driver)
    rows = np.random.default_rng(0).normal(size=(4, 3, 33, 33)).astype(np.float32)
    image, scores = driver.put(rows.astype(dtype)), driver.empty((4, 7), np.float32)
    session.run_on_device({made.IMAGE: image}, {made.SCORES: scores})
    (wanted,) = session.run({made.IMAGE: rows}, [made.SCORES])
    np.testing.assert_array_equal(driver.get(scores), wanted)
    plain = on_onnxruntime(proto, {made.IMAGE: rows})[made.SCORES]
    np.testing.assert_allclose(wanted, plain, rtol=0, atol=1e-5 if precision == "fp32" else 1e-2)
    assert session.input_dtype == dtype
    assert (session.stream, session.flexible) == (77, False)
    with pytest.raises(ValueError, match="image is float64"):
        session.run_on_device({made.IMAGE: driver.put(rows.astype(np.float64))}, {made.SCORES: scores})


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_is_computed_from_shapes_is_left(name, tmp_path):
    """With every size fixed: such nodes would be put on the CPU, and the session would be refused."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    data = ort.device_graph(CASES[name].make().SerializeToString(), Profile(4), "here")
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not left & {"Shape", "Size", "ConstantOfShape", "Range"}


def test_open_sizes_are_the_models_or_refused():
    proto = made.vgg()
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    data = ort.device_graph(proto.SerializeToString(), Profile(4, input_shape=(3, 32, 32)), "here")
    dims = onnx.load_model_from_string(data).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [4, 3, 32, 32]
    with pytest.raises(BackendError, match="here: input 'image' has open sizes"):
        ort.device_graph(proto.SerializeToString(), Profile(4), "here")


@pytest.fixture
def gpu(monkeypatch, driver):
    """A runtime with every provider for GPUs; returns what it was asked."""
    asked: dict = {"providers": None}

    class Options:
        def add_session_config_entry(self, key, value):
            asked[key] = value

        def add_provider_for_devices(self, devices, options):
            asked.update(devices=devices, settings=options)

    class Session:
        def __init__(self, model, options, providers=None, enable_fallback=1):
            asked.update(model=model, enable_fallback=enable_fallback)
            self.names = [DEVICE_NAMES["nv-tensorrt-rtx"]]
            if providers:
                (self.names[0], asked["settings"]), *others = providers
                assert not others
            if asked.get("falls back"):
                self.names = ["CPUExecutionProvider"]

        def get_providers(self):
            return self.names

        def get_inputs(self):
            return [SimpleNamespace(name="image", type="tensor(float16)")]

        def get_outputs(self):
            return []

    devices = [
        SimpleNamespace(ep_name=DEVICE_NAMES["nv-tensorrt-rtx"]),
        SimpleNamespace(ep_name="CPUExecutionProvider"),
    ]
    runtime = SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=Options,
        InferenceSession=Session,
        get_available_providers=lambda: [*DEVICE_NAMES.values(), "CPUExecutionProvider"],
        register_execution_provider_library=lambda name, path: asked.update(library=path),
        get_ep_devices=lambda: devices,
        preload_dlls=lambda: print("Failed to load libcudnn.so.9"),
    )
    monkeypatch.setattr(ort, "ort", runtime)
    monkeypatch.setattr(ort, "import_module", lambda name: SimpleNamespace(get_library_path=lambda: "librtx.so"))
    monkeypatch.setattr(ort, "_openvino_devices", list)
    versions = {ort.RTX_PACKAGE: "0.5.0", "onnxruntime-ep-openvino": "1.8.1"}
    monkeypatch.setattr(ort.metadata, "version", versions.__getitem__)
    ort._registered_plugin.cache_clear()
    yield asked
    ort._registered_plugin.cache_clear()


DEVICE_NAMES = {name: found.name for name, found in ort.DEVICES.items()}


@pytest.mark.parametrize("provider", ort.DEVICES)
def test_a_gpu_gets_everything_or_refuses(provider, gpu, capsys):
    for precision in ort.DEVICES[provider].gives:
        session = ort.open(made.vgg().SerializeToString(), Profile(4, precision, provider))
        assert gpu["session.disable_cpu_ep_fallback"] == "1"
        assert gpu["enable_fallback"] == 0
        assert gpu["settings"]["user_compute_stream"] == "77"
        if provider == "cuda":
            assert gpu["settings"]["use_tf32"] == ("1" if precision == "tf32" else "0")
        kinds = {tensor.data_type for tensor in onnx.load_model_from_string(gpu["model"]).graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in kinds) == (precision == "fp16")
        assert (session.provider, session.precision) == (provider, precision)
    assert capsys.readouterr().out == ""
    gpu["falls back"] = True
    with pytest.raises(
        BackendError, match=r"would have run on the CPU; it needs libcuda, CUDA's libraries and cuDNN 9"
    ):
        ort.open(made.vgg().SerializeToString(), Profile(4, "fp16", provider))


def test_what_runs_on_a_gpu_is_offered_and_named_providers_only_by_name(gpu, monkeypatch):
    pick = backends.choose
    assert pick("auto", None, "fp32", own="fp32")[-1] == ("onnxruntime", "cuda", "fp32")
    assert pick("auto", None, "fp16", own="fp32") == [("onnxruntime", "cuda", "fp16")]
    assert pick("auto", None, "tf32", own="fp32") == [("onnxruntime", "cuda", "tf32")]
    assert pick("auto", "nv-tensorrt-rtx", "fp16", own="fp32") == [("onnxruntime", "nv-tensorrt-rtx", "fp16")]
    with pytest.raises(BackendError, match=r"no fp32 on this machine.*no switch that keeps fp32 from being tf32"):
        pick("auto", "tensorrt", "fp32", own="fp32")

    def none(index):
        raise BackendError("no GPU 0 can be used here: libcuda.so.1")

    monkeypatch.setattr(ort, "open_driver", none)
    offers = {offer.provider: offer for offer in ort.survey()}
    for name in ort.DEVICES:
        assert offers[name].precisions == ()
        assert "libcuda.so.1" in offers[name].note
    with pytest.raises(BackendError, match=r"no backend here makes one of it \(cuda: no GPU 0"):
        pick("auto", "cuda", "fp16", own="fp32")
    with pytest.raises(BackendError, match="needs a model file in half precision"):
        pick("auto", "cpu", "fp16", own="fp32")


def test_what_is_not_installed_says_how():
    offers = {offer.provider: offer for offer in ort.survey()}
    for name in ort.DEVICES:
        assert offers[name].precisions == ()
        assert "pip install" in offers[name].note


def test_every_backend_and_provider_that_is_portable_is_known():
    known = {(offer.backend, offer.provider) for offer in backends.survey()}
    assert known >= backends.PORTABLE

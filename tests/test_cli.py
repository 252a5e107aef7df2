"""The command line: one line and the right exit code for every bad input, and answers for people and programs."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from heatmill import __version__, open_run
from heatmill.cli import main
from heatmill.engine.jobs import bench as benching
from heatmill.engine.jobs import forecast as forecasting
from heatmill.engine.jobs import plan as plans
from heatmill.engine.jobs import sources, store
from heatmill.engine.jobs.exports import EXPORTS
from heatmill.engine.methods import METHODS, parse_method
from heatmill.engine.metrics import METRICS
from tests.architectures import vit
from tests.engine.test_trt import install

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "bench",
    "compare",
    "compile",
    "demo",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "inspect",
    "methods",
    "plan",
    "report",
    "train-lcam",
    "verify",
]


@pytest.fixture
def heatmill(capfd):
    """heatmill(*arguments) -> exit code, stdout and stderr of the command, its children's included."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments], prog_name="heatmill")
        return ended.value.code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_model, save_photographs):
    """A folder as the examples of the help have it: model.onnx, photos/, val.csv; not to be changed."""
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "model.onnx")
    save_photographs(folder / "photos", 4)
    lines = [
        f"photos/{path.relative_to(folder / 'photos')},{i}" for i, path in enumerate((folder / "photos").rglob("*.png"))
    ]
    (folder / "val.csv").write_text("\n".join(["uri,label", *lines]))
    return folder


@pytest.fixture(scope="module")
def run(place):
    """A complete run; not to be changed."""
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "explain",
                str(place / "model.onnx"),
                str(place / "photos"),
                "-o",
                str(place / "made"),
                "-m",
                "cam",
                "--quiet",
            ]
        )
    return place / "made"


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """The working folder: a copy of `place`, without the run."""
    shutil.copytree(place, tmp_path / "here", ignore=shutil.ignore_patterns("made"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def listing(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refusal(heatmill, folder, *arguments, code=2):
    """The line of a refused call, which left the folder as it was."""
    before = listing(folder)
    found, told, line = heatmill(*arguments)
    assert (found, told) == (code, "")
    assert line.startswith("heatmill: ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert listing(folder) == before
    return line


# --- bad models -----------------------------------------------------------------------------------------------


def graph(nodes, inputs, outputs, constants=(), opset=17, domains=()):
    made = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", opset), *domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def image(*shape):
    return helper.make_tensor_value_info("input", TensorProto.FLOAT, shape or ["N", 3, 33, 29])


def floats(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


POOLED = (helper.make_node("GlobalAveragePool", ["input"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]))


def text_model(good):
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["N", 128])
    return graph([helper.make_node("Cast", ["tokens"], ["scores"], to=1)], [tokens], [floats("scores", "N", 128)])


def detector(good):
    return graph([helper.make_node("Relu", ["input"], ["boxes"])], [image()], [floats("boxes", "N", 3, 33, 29)])


def two_inputs(good):
    nodes = [helper.make_node("Add", ["input", "other"], ["sum"]), *POOLED]
    return graph(nodes, [image(), floats("other", "N", 3, 33, 29)], [floats("f", "N", 3)])


def custom(good):
    nodes = [*POOLED, helper.make_node("Secret", ["f"], ["scores"], domain="acme")]
    return graph(nodes, [image()], [floats("scores", "N", 3)], domains=[("acme", 1)])


def cyclic(good):
    nodes = [helper.make_node("Add", ["f", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), *POOLED]
    return graph(nodes, [image()], [floats("a", "N", 3)])


def external(location, length=60):
    def make(good):
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 5], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("length", str(length))):
            weight.external_data.add(key=key, value=value)
        nodes = [*POOLED, helper.make_node("MatMul", ["f", "w"], ["scores"])]
        return graph(nodes, [image()], [floats("scores", "N", 5)], [weight])

    return make


def claims(good):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**40, 5], raw_data=b"1234")
    nodes = [*POOLED, helper.make_node("MatMul", ["f", "w"], ["scores"])]
    return graph(nodes, [image()], [floats("scores", "N", 5)], [weight])


def greedy(good):
    nodes = [
        *POOLED,
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["f", "nothing"], ["scores"]),
    ]
    shape = numpy_helper.from_array(np.array([2**36]), "shape")
    return graph(nodes, [image()], [floats("scores", "N", 3)], [shape])


BAD_MODELS = {
    "not ONNX": (lambda good: b"\0\1\2 something", "is not ONNX"),
    "text": (lambda good: b"a shopping list\n", "is not ONNX, it looks like plain text"),
    "a pickle": (lambda good: pickle.dumps({}), "is not ONNX, it looks like a pickle"),
    "empty": (lambda good: b"", "is empty"),
    "truncated": (lambda good: good[: len(good) // 2], "truncated or damaged ONNX file"),
    "opset 99": (lambda good: graph(POOLED, [image()], [floats("f", "N", 3)], opset=99), "has opset 99"),
    "text model": (text_model, "an image input is (batch, channels, height, width)"),
    "detector": (detector, "is not a classifier: no output has the shape (batch, classes)"),
    "two inputs": (two_inputs, "it has 2 inputs ('input', 'other')"),
    "custom operator": (custom, "is the custom operator 'acme::Secret'"),
    "a cycle": (cyclic, "is not valid ONNX"),
    "data outside": (external("../secret.bin"), "outside the model's folder"),
    "absolute data": (external("/dev/zero"), "it must be a path inside the model's folder"),
    "missing data": (external("weights.bin"), "needs its external data 'weights.bin', which is missing"),
    "data beyond its end": (external("val.csv", 10**9), "its external length is 1000000000"),
    "a tensor of a false size": (claims, "the file is damaged"),
    "256 GiB": (greedy, "needs more memory than this machine has"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(heatmill, here, name):
    make, told = BAD_MODELS[name]
    (here.parent / "secret.bin").write_bytes(bytes(60))
    path = here / "model.onnx"
    path.write_bytes(make(path.read_bytes()))
    if name == "256 GiB":
        spec = json.loads((here / "model.json").read_text())
        (here / "model.json").write_text(json.dumps({**spec, "label_names": []}))
    line = refusal(heatmill, here, "explain", path, "photos", "-o", "run", "-m", "rise:masks=4")
    assert told in line
    assert "model.onnx" in line


def test_a_model_that_is_not_there_or_a_folder(heatmill, here):
    for command in (["explain", "nowhere.onnx", "photos", "-o", "run"], ["inspect", "nowhere.onnx"]):
        assert "nowhere.onnx: No such file or directory" in refusal(heatmill, here, *command)
    assert "is a folder; give the .onnx file in it" in refusal(heatmill, here, "inspect", "photos")


def test_no_spec(heatmill, here):
    (here / "model.json").unlink()
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run")
    assert "nothing says how its images are prepared; give --preprocess imagenet" in line
    (here / "model.json").write_text('{"input_size": [3, 33, 29]}')
    assert "spec field 'mean' is missing" in refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run")


# --- bad flags and inputs ---------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--device 0,one": "--device '0,one': give numbers of GPUs, each once, as 0 or 0,1,2,3",
    "--device 1,1": "--device '1,1': give numbers of GPUs",
    "--device 0": "a device is asked for, and onnxruntime (cpu) runs on the processor",
    "--layer feature": "no layer 'feature'; nearest: features",
    "--target 5": "class 5 is out of range: the model has classes 0 to 4",
    "--target -1": "class -1 is out of range",
    "--target top6": "target 'top6': the model has 5 classes",
    "--target 'great whale'": "no class 'great whale'; nearest: great white",
    "--target label": "target 'label' needs a manifest with a column 'label' or 'target'",
    "--target top1 --target top1": "a target was given twice",
    "--method scorecan": "no method 'scorecan'; nearest: score-cam",
    "--method rise:mask=7": "method rise has no parameter 'mask'; nearest: masks",
    "--method rise:masks=0": "lies outside 1 .. 1e+06",
    "--method score-cam:variant=ofical": "no choice 'ofical'; nearest: official",
    "--method cam --method CAM": "a method was given twice",
    "--batch-size 0": "--batch-size '0': give auto or a number from 1 to 4096",
    "--batch-size many": "--batch-size 'many'",
    "--seed -1": "--seed",
    "--limit 0": "--limit",
    "--workers 0": "--workers",
    "--max-bad 2": "--max-bad",
    "--metod cam": "--method",
    "--preprocess imagenat": "'imagenat' is no file and no preset; presets: imagenet, raw",
    "--labels nowhere.txt": "nowhere.txt: No such file or directory",
    "--labels model.json": "model.json: the classes of the labels are not",
    "--output logit": "use one of logits, probabilities, sigmoid",
    "--scores other": "has no score output 'other'",
    "--backend tensorflow": "no backend 'tensorflow'; known: reference, onnxruntime",
    "--provider abacus": "has no provider 'abacus'; known: cpu, openvino",
    "--precision fp8": "fp8",
    "--precision int8": "precision int8 needs a quantised (QDQ) model file",
    "--log-format xml": "'xml' is not one of 'auto', 'json'",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(heatmill, here, flags):
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run", *shlex.split(flags))
    assert BAD_FLAGS[flags] in line


def test_missing_arguments_and_unknown_commands(heatmill, here):
    for arguments in (["model.onnx"], ["model.onnx", "photos"], ["-o", "run"]):
        assert "give MODEL, INPUTS and -o OUT (heatmill explain --help)" in refusal(
            heatmill, here, "explain", *arguments
        )
    assert "No such command 'explian'. (Did you mean one of: 'explain', 'plan'?)" in refusal(heatmill, here, "explian")
    assert "Missing argument 'RUN'. (heatmill verify --help)" in refusal(heatmill, here, "verify")


def test_bad_inputs(heatmill, here, monkeypatch):
    (here / "empty").mkdir()
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").touch()
    (here / "no-uri.csv").write_text("name,label\na,1\n")
    (here / "twice.csv").write_text("uri\nphotos/photo0.png\nphotos/photo0.png\n")
    (here / "label.csv").write_text("uri,label\nphotos/photo0.png,9\n")
    (here / "gap.csv").write_text("uri,label\nphotos/photo0.png,1\nphotos/photo2.png,\n")
    for given, told in {
        "nowhere": "'nowhere' does not exist",
        "s3://bucket/photos": "only local files can be read",
        "empty": "no image (",
        "notes": "it holds 1 other file",
        "model.json": "is neither a folder nor an image",
        "no-uri.csv": "has no column uri",
        "twice.csv": "have the same id",
        "label.csv": "label of 'photos/photo0.png': class 9 is out of range",
        "gap.csv": "1 images have no label, the first is 'photos/photo2.png'",
    }.items():
        targets = ("-t", "label") if given in ("label.csv", "gap.csv") else ()
        line = refusal(heatmill, here, "explain", "model.onnx", given, "-o", "run", *targets)
        assert told in line

    def locked(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sources.os, "scandir", locked)
    code, told, line = heatmill("explain", "model.onnx", "photos", "-o", "run")
    assert (code, told, line.count("\n")) == (2, "", 1)
    assert "cannot list the folder" in line
    assert "(Permission denied)" in line


def test_bad_output_folders(heatmill, here, monkeypatch):
    (here / "file").touch()
    for out, told in {
        "file": "file: is a file; -o takes a folder",
        "file/run": "not writable",
        "photos": "holds 'photo0.png' and is not a run; give a new or empty folder",
    }.items():
        assert told in refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", out)
    monkeypatch.setattr(plans.os, "access", lambda path, mode: not mode & os.W_OK)
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "some/where/run")
    assert "some/where/run: can't be written" in line
    assert "give another folder with -o" in line


def test_a_backend_that_is_not_installed(heatmill, here, monkeypatch):
    """In the process that runs the model, too."""
    (here / "site").mkdir()
    (here / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(here / "site"))
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run", "--backend", "onnxruntime")
    assert "backend 'onnxruntime' needs onnxruntime: pip install 'onnxruntime'" in line


def test_other_settings(heatmill, here, run):
    shutil.copytree(run, here / "run")
    line = refusal(
        heatmill, here, "explain", "model.onnx", "photos", "-o", "run", "-m", "rise:masks=9", "--seed", "4", code=5
    )
    assert line.startswith("heatmill: run: belongs to other settings (")
    assert "--seed: 0 in the run, 4 asked" in line
    assert "--method: [{'name': 'cam'}] in the run, [{'name': 'rise', 'masks': 9," in line


# --- what is not a bad input --------------------------------------------------------------------------------------


def test_a_bug_is_called_one_and_debug_shows_where(heatmill, here, monkeypatch):
    def broken(*arguments):
        raise KeyError("what?")

    monkeypatch.setattr(plans, "check_folder", broken)
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run", code=1)
    assert line == "heatmill: a bug in heatmill: KeyError: 'what?'; --debug shows where\n"
    code, told, shown = heatmill("explain", "model.onnx", "photos", "-o", "run", "--debug")
    assert (code, told) == (1, "")
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "in broken\n" in shown
    assert shown.endswith("heatmill: a bug in heatmill: KeyError: 'what?'\n")


def test_debug_shows_the_traceback_of_a_refusal(heatmill, here):
    code, told, shown = heatmill("inspect", "nowhere.onnx", "--debug")
    assert (code, told) == (2, "")
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.splitlines()[-1].startswith("heatmill: ")


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("run: interrupted; resume"), 130, "run: interrupted; resume"),
        (OSError(28, "No space left on device", "a/b"), 4, "a/b: no space is left; the same command resumes"),
        (OSError(30, "Read-only file system", "a/b"), 2, "a/b: Read-only file system"),
        (click.Abort(), 130, "interrupted"),
        (
            ValueError("two\nlines \x1b[31m"),
            1,
            "a bug in heatmill: ValueError: two lines \\x1b[31m; --debug shows where",
        ),
    ],
)
def test_whatever_happens_is_one_line(heatmill, here, monkeypatch, raised, code, told):
    def happen(run):
        raise raised

    monkeypatch.setattr(store, "verify", happen)
    assert refusal(heatmill, here, "verify", "run", code=code) == f"heatmill: {told}\n"


# --- answers ------------------------------------------------------------------------------------------------------


def test_too_many_bad_images_are_exit_code_3(heatmill, here):
    (here / "photos" / "bad.jpg").write_bytes(b"no photograph")
    code, told, noted = heatmill("explain", "model.onnx", "photos", "-o", "run", "-m", "cam")
    assert code == 3
    assert re.fullmatch(r"run: 4 of 5 maps of 5 images, \d+\.\d s\n  not_an_image: 1\n", told)
    assert noted.splitlines()[-1] == (
        "heatmill: 1 of 5 images are bad, more than --max-bad 0.01 allows; heatmill report run lists them"
    )
    code, told, noted = heatmill(
        "explain", "model.onnx", "photos", "-o", "run", "-m", "cam", "--max-bad", "0.2", "--json"
    )
    assert code == 0
    assert json.loads(told)["statuses"] == {"not_an_image": 1, "ok": 4}


def test_json_is_one_object_and_progress_goes_to_stderr(heatmill, here):
    explain = ("explain", "model.onnx", "photos", "-o", "run", "-m", "cam", "--json", "--save-overlays")
    code, told, noted = heatmill(*explain, "--log-format", "json")
    found = json.loads(told)
    assert (code, told.count("\n")) == (0, 1)
    assert (found["run"], found["images"], found["rows"], found["overlays"]) == ("run", 4, 4, 4)
    assert [json.loads(line)["event"] for line in noted.splitlines()] == ["progress"]
    assert len(list(Path("run/report/overlays").rglob("*.png"))) == 4
    for command, key in (
        (["inspect", "model.onnx"], "layers"),
        (["methods"], "score-cam"),
        (["doctor"], "backends"),
        (["verify", "run"], "committed"),
        (["report", "run"], "page"),
    ):
        code, told, noted = heatmill(*command, "--json")
        assert (code, told.count("\n"), noted) == (0, 1, "")
        assert key in json.loads(told)


def test_quiet(heatmill, here):
    code, told, noted = heatmill("explain", "model.onnx", "photos", "-o", "run", "-m", "cam", "--quiet")
    assert (code, noted) == (0, "")
    assert told.startswith("run: 4 of 4 maps of 4 images, ")


def test_verify_says_sound_incomplete_or_damaged(heatmill, here, run):
    shutil.copytree(run, here / "run")
    assert heatmill("verify", "run") == (0, "run: 1 of 1 shards, 4 rows, 4 maps: sound\n", "")
    (part,) = Path("run/data").iterdir()
    data = part.read_bytes()
    part.write_bytes(data[:-50])
    line = refusal(heatmill, here, "verify", "run", code=5)
    assert line.startswith(f"heatmill: {part}: damaged (")
    part.unlink()
    assert heatmill("verify", "run") == (4, "run: 0 of 1 shards, 0 rows, 0 maps: incomplete\n", "")
    assert "nowhere: not a run (it has no run.json)" in refusal(heatmill, here, "verify", "nowhere", code=5)
    assert "nowhere: not a run (it has no run.json)" in refusal(heatmill, here, "report", "nowhere", code=5)


def test_inspect_shows_what_is_there_without_a_spec(heatmill, here):
    (here / "model.json").unlink()
    code, told, noted = heatmill("inspect", "model.onnx")
    assert (code, noted) == (0, "")
    assert "input    input: NCHW float32 dynamic x 3 x 33 x 29\n" in told
    assert "* features: 12 maps of 9x8 (nchw)" in told
    assert "give --preprocess imagenet" in told
    code, told, _ = heatmill("inspect", "model.onnx", "--preprocess", "raw", "--layer", "r1", "--json")
    found = json.loads(told)
    assert (code, found["layer"], found["trial"]["runs"], found["trial"]["classes"]) == (0, "r1", True, 5)
    told = {"runs": True, "passes": 9, "backward": 0, "head_alone": False, "back_to": None}
    assert found["methods"]["score-cam"] == told
    assert found["methods"]["saliency"] == told | {"passes": 1, "backward": 1, "back_to": "image"}


def test_method_names_ignore_case_and_dashes(heatmill, here):
    for name in METHODS:
        for spelling in (name, name.upper(), name.replace("-", "_"), name.replace("-", ""), name.title()):
            assert parse_method(spelling).method is METHODS[name]
    code, *_ = heatmill(
        "explain", "model.onnx", "photos", "-o", "run", "-m", "SCORE_cam:variant=Grad_CAM", "--limit", "1"
    )
    assert code == 0
    assert [row.method for row in open_run("run").rows()] == ["score-cam:variant=grad-cam"]


def test_what_can_not_be_followed_back_is_refused_before_a_run_is_made(heatmill, here):
    onnx.save(vit(classes=5), here / "vit.onnx")
    (here / "vit.json").write_text((here / "model.json").read_text().replace("[3, 33, 29]", "[3, 32, 32]"))
    line = refusal(heatmill, here, "explain", "vit.onnx", "photos", "-o", "run", "-m", "lrp")
    assert "no backward graph" in line
    assert "attention" in line
    code, told, _ = heatmill("inspect", "vit.onnx")
    assert code == 0
    assert "saliency, input-x-gradient: 1 pass per image and back to the image\n" in told
    assert "lrp, clrp, sglrp, deep-taylor: can't run: no backward graph" in told


# --- configuration ------------------------------------------------------------------------------------------------


def test_every_flag_can_stand_in_a_config(heatmill, here):
    given = [
        *("model.onnx", "photos", "-o", "run", "-m", "cam", "-m", "rise:masks=9", "-t", "top2", "-t", "great white"),
        *("--layer", "r1", "--preprocess", "raw", "--labels", "names.txt", "--output", "logits", "--scores", "logits"),
        *("--backend", "onnxruntime", "--provider", "cpu", "--precision", "fp32", "--batch-size", "5", "--seed", "7"),
        *("--limit", "3", "--workers", "2", "--max-bad", "0.25", "--quiet", "--json", "--save-overlays"),
    ]
    given[given.index("-m") : given.index("-t")] = ["-m", "score-cam", "-m", "rise:masks=9"]
    (here / "names.txt").write_text("a\nb\nc\ngreat white\ne\n")
    code, text, noted = heatmill("explain", *given, "--generate-config")
    assert (code, noted, Path("run").exists()) == (0, "", False)
    keys = {
        *("model", "inputs", "out", "method", "target", "layer", "preprocess", "labels", "output", "scores", "backend"),
        *("provider", "precision", "batch-size", "seed", "limit", "workers", "max-bad", "overwrite", "save-overlays"),
        *("quiet", "log-format", "json", "dry-run"),
    }
    assert tomllib.loads(text).keys() == keys
    assert tomllib.loads(text)["method"] == ["score-cam", "rise:masks=9"]
    (here / "run.toml").write_text(text)
    assert heatmill("explain", "--config", "run.toml", "--generate-config") == (0, text, "")
    code, told, noted = heatmill("explain", "--config", "run.toml")
    assert (code, noted) == (0, "")
    assert json.loads(told)["rows"] == 3 * 2 * 3
    said = json.loads(Path("run/run.json").read_text())
    assert (said["seed"], said["batch_size"], said["layer"], said["precision"]) == (7, 5, "r1", "fp32")
    assert said["targets"] == [["top", 2], ["class", 3]]
    assert said["spec"]["label_names"] == ["a", "b", "c", "great white", "e"]


def test_flags_go_before_the_config(heatmill, here):
    (here / "run.toml").write_text('model = "model.onnx"\ninputs = "photos"\nout = "run"\nmethod = "rise"\nseed = 3\n')
    code, text, _ = heatmill("explain", "--config", "run.toml", "-m", "cam", "--seed", "4", "--generate-config")
    found = tomllib.loads(text)
    assert (code, found["method"], found["seed"], found["inputs"], found["out"]) == (0, ["cam"], 4, ["photos"], "run")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("metod = 'cam'", "unknown key 'metod'; nearest: method"),
        ("seed = 1.5", "--seed"),
        ("seed = true", "--seed"),
        ("quiet = 'perhaps'", "--quiet"),
        ("seed = ", "can't be read as TOML"),
        ("[explain]\nseed = 1", "unknown key 'explain'"),
        (None, "No such file"),
    ],
)
def test_bad_configs(heatmill, here, text, told):
    if text is not None:
        (here / "run.toml").write_text(text)
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "run", "--config", "run.toml")
    assert told in line


# --- help ---------------------------------------------------------------------------------------------------------


def examples(command):
    text = main.commands[command].help.partition("Example:")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_help(heatmill):
    assert sorted(main.commands) == COMMANDS
    code, told, noted = heatmill()
    assert (code, noted) == (0, "")
    assert heatmill("--help") == (0, told, "")
    assert "Example: heatmill explain model.onnx photos/ -o run\n" in told
    for command in COMMANDS:
        code, told, noted = heatmill(command, "-h")
        assert (code, noted) == (0, "")
        assert f"Example: heatmill {command}" in told
        assert all(line.startswith(f"heatmill {command}") for line in examples(command))
        assert all(option.help for option in main.commands[command].params if isinstance(option, click.Option)) or (
            command in ("bench", "demo")
        )
    assert heatmill("--version") == (0, f"heatmill, version {__version__}\n", "")


def test_the_examples_of_the_help_run(heatmill, here, monkeypatch):
    """All but the demo's, which needs its extra."""
    monkeypatch.setattr(benching, "BARE_SECONDS", 0.01)
    monkeypatch.setattr(forecasting, "LANE_SECONDS", 0.01)
    for command in (
        "explain",
        "verify",
        "report",
        "evaluate",
        "inspect",
        "methods",
        "doctor",
        "bench",
        "plan",
        "train-lcam",
    ):
        for line in examples(command):
            if command == "explain":
                shutil.rmtree("run", ignore_errors=True)
            code, told, _ = heatmill(*shlex.split(line)[1:])
            assert (code, bool(told)) == (0, True), line


@pytest.fixture
def two(here, run):
    """`run` and `run-fp16` in the working folder, as the examples of the help have them."""
    shutil.copytree(run, "run")
    shutil.copytree(run, "run-fp16")
    return here


def test_compare(heatmill, two):
    code, told, noted = heatmill("compare", "run", "run-fp16")
    assert (code, noted) == (0, "")
    assert "images: 4 in both, 0 only in A, 0 only in B\n" in told
    assert "predictions: 0 of 4 flipped (0.00%)\n" in told
    assert told.endswith("\nrun/report/compare/run-fp16/index.html\n")
    code, told, _ = heatmill("compare", "run", "run-fp16", "-o", "audit", "--json", "--top", "5", "--by", "cosine")
    found = json.loads(told)
    (group,) = found["groups"]
    assert (code, found["top"], found["page"]) == (0, 0.05, "audit/index.html")
    assert (group["pairs"], group["spearman"]["least"]) == (4, pytest.approx(1))
    assert sorted(path.name for path in Path("audit").iterdir()) == ["index.html", "pairs.parquet", "summary.json"]
    assert heatmill("verify", "run")[0] == 0
    part = next(Path("run-fp16/data").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    shutil.rmtree("run/report")
    assert "damaged" in refusal(heatmill, two, "compare", "run", "run-fp16", code=5)


def test_what_compare_refuses(heatmill, two):
    assert "missing: not a run" in refusal(heatmill, two, "compare", "run", "missing", code=5)
    assert "--method-b 'rise': run-fp16 has cam" in refusal(
        heatmill, two, "compare", "run", "run-fp16", "--method-b", "rise"
    )
    assert "--top" in refusal(heatmill, two, "compare", "run", "run-fp16", "--top", "0")
    assert "--by" in refusal(heatmill, two, "compare", "run", "run-fp16", "--by", "mean")


def test_export(heatmill, two):
    code, told, noted = heatmill("export", "run", "--as", "crops", "-o", "crops")
    assert (code, told, noted) == (0, f"{two / 'crops'}: 4 crops\n", "")
    code, told, _ = heatmill(
        "explain", "model.onnx", "crops/manifest.csv", "-o", "again", "-m", "cam", "--quiet", "--json"
    )
    assert (code, json.loads(told)["statuses"]) == (0, {"ok": 4})
    for kind in ("erased", "npy", "png", "hdf5-virelay", "fiftyone"):
        code, told, _ = heatmill("export", "run", "--as", kind, "-o", f"made/{kind}", "--json")
        assert (code, json.loads(told)["written"]) == (0, 4)


def test_what_export_refuses(heatmill, two):
    assert "is there already" in refusal(heatmill, two, "export", "run", "--as", "npy", "-o", "photos")
    assert "--fill is for --as erased" in refusal(
        heatmill, two, "export", "run", "--as", "npy", "-o", "out", "--fill", "black"
    )
    assert "--as" in refusal(heatmill, two, "export", "run", "--as", "zarr", "-o", "out")
    assert "missing: not a run" in refusal(heatmill, two, "export", "missing", "--as", "npy", "-o", "out", code=5)
    assert "--threshold" in refusal(heatmill, two, "export", "run", "--as", "crops", "-o", "out", "--threshold", "0")


def test_the_kinds_of_export_are_the_table():
    (kind,) = (option for option in main.commands["export"].params if option.name == "kind")
    assert kind.type.choices == tuple(EXPORTS)
    known = {option.name for option in main.commands["export"].params}
    assert set().union(*(found.takes for found in EXPORTS.values())) <= known


def test_the_examples_of_compare_and_export_run(heatmill, two):
    shutil.rmtree("run")
    assert (
        heatmill("explain", "model.onnx", "photos", "-o", "run", "-m", "cam", "-m", "rise:masks=8", "--quiet")[0] == 0
    )
    for command in ("compare", "export"):
        for line in examples(command):
            code, told, _ = heatmill(*shlex.split(line)[1:])
            assert (code, bool(told)) == (0, True), line


# --- evaluate -----------------------------------------------------------------------------------------------------


def test_evaluate_prints_the_table_and_writes_it(heatmill, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    code, told, noted = heatmill("evaluate", tmp_path / "run", "--metric", "increase", "--metric", "conservation")
    assert code == 0
    assert "increase ↑\n    cam  " in told
    assert "conservation ↓\n    cam  -  n=0; left out: 4 not_stated" in told
    assert told.endswith(f"{tmp_path / 'run' / 'report' / 'evaluation' / 'index.html'}\n")
    assert "4/4 images" in noted
    call = ("evaluate", tmp_path / "run", "--metric", "increase", "-o", tmp_path / "out", "--json", "--quiet")
    code, told, noted = heatmill(*call)
    found = json.loads(told)
    assert (code, noted, found["page"]) == (0, "", str(tmp_path / "out" / "index.html"))
    assert (found["runs"][0]["computed"], found["runs"][0]["statuses"]) == (0, {"ok": 4})
    assert found["table"][0]["n"] == 4
    assert (tmp_path / "out" / "table.md").read_text().startswith("| | increase ↑ |")


def test_evaluate_lists_metrics_and_presets(heatmill):
    code, told, _ = heatmill("evaluate", "--list")
    assert code == 0
    for name, metric in METRICS.items():
        assert f"{name} ({metric.better} is better): {metric.summary}\n" in told
    assert "preset l-cam: average-drop:keep=1.0,baseline=black " in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "deletions"), "no metric or preset 'deletions'; nearest: deletion, insertion"),
        (("--metric", "deletion:steps=1"), "metric deletion, parameter 'steps': 1 lies outside 2 .. 1000"),
        (("--method", "rise"), "no run has the method 'rise'; known: cam"),
        (("--by", "scene"), "no such column in the manifest"),
        (("--by", "correct"), "have no labels; a manifest can give them"),
        (("--model", "nowhere.onnx"), "nowhere.onnx"),
    ],
)
def test_evaluate_refuses_in_a_line(heatmill, run, tmp_path, arguments, message):
    shutil.copytree(run, tmp_path / "run")
    code, told, line = heatmill("evaluate", tmp_path / "run", *arguments)
    assert (code, told, line.count("\n")) == (2, "", 1) or arguments[0] == "--model"
    assert code == 2
    assert message in line
    assert not (tmp_path / "run" / "metrics").exists()


def test_evaluate_of_what_is_no_run(heatmill, tmp_path):
    assert "not a run (it has no run.json)" in refusal(heatmill, tmp_path, "evaluate", tmp_path / "nothing", code=5)


# --- train-lcam ---------------------------------------------------------------------------------------------------


def test_an_attention_is_trained_and_explains_every_class(heatmill, here):
    call = ("train-lcam", "model.onnx", "photos", "-o", "lcam.onnx", "--epochs", "2", "--json", "--log-format", "json")
    code, told, noted = heatmill(*call)
    found = json.loads(told)
    assert (code, found["out"], found["run"], found["trained"]) == (0, "lcam.onnx", "lcam.training", 3)
    events = [json.loads(line) for line in noted.splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2]
    assert {"loss", "entropy", "area", "variation", "held_out", "average_drop", "increase"} <= epochs[-1].keys()
    code, told, noted = heatmill(*call[:-3])
    assert code == 0
    assert told.startswith("lcam.onnx: epoch ")
    assert "have none and are marked untrained" in told
    code, *_ = heatmill("explain", "lcam.onnx", "photos", "-o", "run", "-m", "l-cam", "-t", "all", "--quiet")
    assert code == 0
    assert [row.target for row in open_run("run").rows()] == [0, 1, 2, 3, 4] * 4
    line = refusal(heatmill, here, "explain", "lcam.onnx", "photos", "-o", "x", "-m", "l-cam", "--layer", "r1")
    assert "method l-cam can't run: its attention reads layer 'features'; leave --layer out" in line
    line = refusal(heatmill, here, "explain", "model.onnx", "photos", "-o", "x", "-m", "l-cam")
    assert "method l-cam can't run: the file has no attention; heatmill train-lcam makes one with it" in line
    line = refusal(heatmill, here, "train-lcam", "model.onnx", next(Path("photos").glob("*.png")), "-o", "x.onnx")
    assert "1 image is not enough" in line
    line = refusal(heatmill, here, *call[:-3], "--variant", "img", code=5)
    assert "lcam.training: belongs to other settings (--variant: fm in the run, img asked)" in line


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx(tmp_path, monkeypatch):
    """A stand-in for TensorRT-RTX on a machine without a GPU, and a cache of the test's own."""
    provider = install("rtx", tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield provider
    sys.modules.pop("tensorrt_rtx", None)


def test_plans_are_built_ahead(heatmill, here, tmp_path, rtx):
    call = ("compile", "model.onnx", "--provider", rtx, "-m", "cf-cam", "-m", "saliency", "--precision", "fp16")
    code, told, _ = heatmill(*call, "--json")
    found = json.loads(told)
    assert (code, found["provider"]) == (0, "rtx")
    network, observation = found["graphs"]
    assert (network["graph"], network["precision"], network["rows"]) == ("network", "fp16", 32)
    assert (observation["graph"], observation["precision"]) == ("observation", "fp32")
    for graph in found["graphs"]:
        assert Path(graph["plan"]).is_relative_to(tmp_path / "cache" / "heatmill")
        assert Path(graph["plan"]).stat().st_size == graph["bytes"]
        assert (graph["cached"], graph["activation_bytes"] > 0) == (False, True)
    code, told, _ = heatmill(*call)
    assert code == 0
    assert told.count("was there") == 2
    code, told, _ = heatmill(*call, "--target-gpu", "sm_89", "--target-gpu", "sm_120", "--json")
    assert [graph["target"] for graph in json.loads(told)["graphs"]] == ["sm_89", "sm_120"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-gpu", "sm_90"], "--target-gpu sm_90: TensorRT-RTX 1.7.1.116 builds for sm_86, sm_89, sm_120"),
        (["--precision", "int8"], "needs a quantised"),
        (["--precision", "half"], "no precision 'half'"),
        (["--provider", "cuda"], "backend tensorrt has no provider 'cuda'; known: tensorrt, rtx"),
        (["--backend", "onnxruntime"], "backend onnxruntime builds nothing ahead of time; --backend tensorrt does"),
        (["-m", "nonsense"], "nonsense"),
    ],
)
def test_what_compile_refuses(heatmill, here, rtx, arguments, message):
    assert message in refusal(heatmill, here, "compile", "model.onnx", *arguments)


def test_compile_names_a_refused_operator(heatmill, here, rtx):
    proto = onnx.load("model.onnx")
    proto.graph.node[-1].output[0] = "raw"
    proto.graph.node.append(helper.make_node("Unsqueeze", ["raw", "axis"], ["a"]))
    proto.graph.node.append(helper.make_node("Concat", ["a"] * 5, ["square"], axis=1))
    proto.graph.node.append(helper.make_node("Det", ["square"], ["det"], name="the volume"))
    proto.graph.node.append(helper.make_node("Unsqueeze", ["det", "axis"], ["column"]))
    proto.graph.node.append(helper.make_node("Add", ["raw", "column"], ["logits"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    onnx.save(proto, "model.onnx")
    line = refusal(heatmill, here, "compile", "model.onnx", "--provider", "rtx")
    assert "tensorrt (rtx) refuses operator Det 'the volume'" in line


# --- in a process of its own --------------------------------------------------------------------------------------


def child(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_starting_costs_no_heavy_import():
    script = (
        "import sys\n"
        "from heatmill.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'onnx', 'onnxruntime', 'pyarrow', 'google.protobuf', 'PIL', 'rich', 'psutil', 'simplejpeg'}\n"
        "    print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    for arguments in (["methods"], ["--help"], ["explain", "--help"], ["--version"]):
        ended = child("-c", script, *arguments)
        assert (ended.returncode, ended.stderr) == (0, "[]\n")


def test_ways_to_start_it(tmp_path):
    expected = child("-m", "heatmill.cli", "methods", cwd=tmp_path)
    assert expected.returncode == 0
    assert expected.stdout.startswith("score-cam: ")
    started = child(ROOT / "cli.py", "methods", cwd=tmp_path)
    assert (started.returncode, started.stdout) == (0, expected.stdout)
    console = shutil.which("heatmill", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert console is not None
    assert subprocess.run([console, "methods"], capture_output=True, text=True).stdout == expected.stdout


def test_a_reader_that_goes_away_gets_no_traceback():
    started = subprocess.Popen([sys.executable, "-m", "heatmill.cli", "methods"], stdout=-1, stderr=-1, text=True)
    started.stdout.close()
    assert started.stderr.read() == ""
    started.stderr.close()
    assert started.wait() == 1


def test_a_name_that_is_not_utf8(heatmill, here):
    name = os.fsdecode(b"gr\xfcn")
    try:
        shutil.copytree("photos", name)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    Image.new("RGB", (40, 40), (9, 99, 9)).save(Path(name) / "flat.png")
    code, *_ = heatmill("explain", "model.onnx", name, "-o", "run", "-m", "cam", "--json", "--quiet")
    assert code == 0
    assert len(list(open_run("run").rows(status="ok"))) == 5

"""Every method on every architecture: what runs, and that docs/methods.md says so.

Run this file as a script to write the table anew: `python -m tests.engine.test_method_table`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from heatmill import InputError
from heatmill.engine.explainer import Engine
from heatmill.engine.methods import METHODS
from heatmill.engine.opening import load, open_best, read_graph
from heatmill.engine.passes import check_backward, open_passes
from heatmill.engine.types import Item, Target
from heatmill.models.find_spec import find_spec
from heatmill.models.graph.attention import with_attention
from heatmill.models.load import open_model
from tests import architectures as made

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- table: tests/engine/test_method_table.py -->", "<!-- end of table -->"
ARCHITECTURES: dict[str, Callable[[], onnx.ModelProto]] = {
    "ResNet": made.resnet,
    "VGG": made.vgg,
    "DenseNet": made.densenet,
    "Inception": made.inception,
    "SqueezeNet": made.squeezenet,
    "ShuffleNet": made.shufflenet,
    "MobileNetV2": made.mobilenet_v2,
    "MobileNetV3": made.mobilenet_v3,
    "EfficientNet": made.efficientnet,
    "ConvNeXt": made.convnext,
    "ViT": made.vit,
    "Swin": made.swin,
}
FEW = {
    "rise": "rise:masks=16",
    "integrated-gradients": "integrated-gradients:steps=3",
    "smoothgrad": "smoothgrad:samples=3",
    "ss-cam": "ss-cam:samples=2",
    "is-cam": "is-cam:steps=2",
    "xrai": "xrai:steps=2",
    "occlusion": "occlusion:window=40,stride=40",
    "lime": "lime:samples=8,superpixels=slic,segments=4",
    "ablation-ca": "ablation-ca:samples=16,segments=4",
    "kernel-shap": "kernel-shap:samples=8,segments=4",
}
SIGNS = {True: "yes", False: "-"}


def explained(folder: Path, architecture: str) -> dict[str, bool]:
    """Which methods gave finite maps for two images, all asked of one engine; the others were refused beforehand."""
    proto = ARCHITECTURES[architecture]()
    path = folder / f"{architecture}.onnx"
    onnx.save(proto, path)
    side = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    spec = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.25] * 3, "output": "logits"}
    path.with_suffix(".json").write_text(json.dumps(spec))
    with_random_attention(path)
    able = {}
    for name in METHODS:
        try:
            check_backward(load(path, [FEW.get(name, name)]))
        except InputError:
            able[name] = False
        else:
            able[name] = True
    loaded = load(path, [FEW.get(name, name) for name, can in able.items() if can])
    session, targets = open_best(loaded, batch_size=8), [Target("predicted"), Target("class", 1)]
    engine = Engine(loaded, session, targets, 8, passes=open_passes(loaded, session, targets, 8))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, side, side)).astype(np.float32)
    found = list(engine.stream(Item(i, image) for i, image in enumerate(images)))
    assert len(found) == 4 * sum(able.values())
    for explanation in found:
        assert explanation.status == "ok", (architecture, explanation.method.text, explanation.error)
    return able


def with_random_attention(path: Path) -> None:
    """The file with what `l-cam` reads, which no other method may mind."""
    model = open_model(path)
    spec, _ = find_spec(model)
    tap = read_graph(model, spec).choose(None)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(model.classes, tap.channels)), rng.normal(size=model.classes)
    onnx.save(with_attention(model, spec, tap, weight, bias, {"untrained": []}), path)


def table(able: dict[str, dict[str, bool]]) -> str:
    head = f"| `--method` | {' | '.join(able)} |\n|---|{'---|' * len(able)}\n"
    rows = [f"| `{name}` | {' | '.join(SIGNS[found[name]] for found in able.values())} |" for name in METHODS]
    return head + "\n".join(rows) + "\n"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_methods_run_as_the_page_says(architecture, tmp_path):
    told = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    column = [cell.strip() for cell in told[0].split("|")].index(architecture)
    said = {cells[1].strip().strip("`"): cells[column].strip() for cells in (line.split("|") for line in told[2:])}
    assert said == {name: SIGNS[can] for name, can in explained(tmp_path, architecture).items()}


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        able = {architecture: explained(Path(folder), architecture) for architecture in ARCHITECTURES}
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(able)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()

"""What `heatmill export` writes for ViRelAy, opened by ViRelAy's own project reader.

ViRelAy 1.0 asks for older packages than the other peers do, so that it is in no extra:
pip install --no-deps virelay; pip install pyyaml matplotlib h5py.
"""

from __future__ import annotations

import numpy as np
import pytest

from heatmill.engine.jobs.exports import export
from heatmill.engine.jobs.exports.base import Options
from tests.jobs.test_report import Builder

pytestmark = pytest.mark.peers

COLOURS = ["gray-red", "black-green", "black-fire-red", "black-yellow", "blue-white-red", "jet"]


def test_virelay_opens_its_project(tmp_path):
    model = pytest.importorskip("virelay.model")
    builder = Builder(tmp_path)
    builder.targets, builder.rows_per_image = [["top", 2]], 2
    rng = np.random.default_rng(0)
    for i in range(3):
        builder.image(f"{i}")
        for rank in (1, 2):
            builder.add(rng.normal(size=(2, 2)), target=i + rank - 1, target_source=f"top{rank}", pred=i)
    run = builder.open()
    export(run, "hdf5-virelay", tmp_path / "out", Options())
    for rank in (1, 2):
        project = model.Project(str(tmp_path / f"out/cam--top{rank}.yaml"))
        rows = [row for row in run.rows() if row.target_source == f"top{rank}"]
        assert len(project.dataset) == len(rows) == 3
        for i, row in enumerate(rows):
            attribution, sample = project.get_attribution(i), project.get_sample(i)
            np.testing.assert_allclose(attribution.data.sum(axis=2), row.upsampled(), rtol=1e-6, atol=1e-6)
            assert [label.name for label in attribution.labels] == [row.label_name]
            assert [label.name for label in sample.labels] == [builder.names[i]]
            assert np.argmax(attribution.prediction) == i
            for colour in COLOURS:
                for behind in (None, sample.data):
                    assert attribution.render_heatmap(colour, behind).shape == (8, 8, 3)
        project.close()
    with pytest.raises(LookupError):
        model.Project(str(tmp_path / "out/cam--top1.yaml")).get_attribution(3)

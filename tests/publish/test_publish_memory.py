"""Publishing holds a layer, never the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import Checkpointer
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone sets a process's peak memory back")
def test_the_peak_is_that_of_the_largest_layer(tmp_path: Path) -> None:
    spec = ModelSpec(n_layers=16, d_model=16, n_features=8192, kind="jumprelu", threshold_init=0.5)
    model = CrossLayerTranscoder(spec)
    Checkpointer(tmp_path / "run").save(1, model=model.state_dict(), optimizer={}, state={"spec": spec.to_dict()})
    layer = sum(parameter.numel() * 4 for parameter in model.source_layers[0].parameters())
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    (tmp_path / "published").mkdir()
    found = subprocess.run(
        [sys.executable, "-m", "tests.publish.peak_memory", str(tmp_path / "run"), str(tmp_path / "published")],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    # The layer, its folded copy and a matrix on the way; all layers are more than seven.
    assert torch.tensor(int(found.stdout)) < 4 * layer < 0.6 * whole

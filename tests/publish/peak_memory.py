"""Peak memory of publishing: `python -m tests.publish.peak_memory RUN OUTPUT` prints what writing and checking the
newest checkpoint's weights held at most beyond what was there before, in bytes.
"""

import sys
from pathlib import Path

import torch

from tests.model.peak_memory import peak_bytes
from trainer.checkpoint import Checkpointer
from trainer.config import RunConfig
from trainer.publish.export import write_weights
from trainer.publish.layout import CROSS_LAYER, LayoutConfig
from trainer.publish.rows import VerificationRows
from trainer.publish.streamed import StreamedModel


def main(run: str, output: str) -> None:
    """Publishes once to load what is loaded on first use, and once measured."""
    torch.set_num_threads(1)
    checkpoint = Checkpointer(run).newest_good(model_only=True)
    assert checkpoint is not None
    model = StreamedModel(checkpoint, RunConfig(), torch.device("cpu"))
    layout = LayoutConfig(CROSS_LAYER, "model", "in", "out", "scan")
    rows = VerificationRows(torch.randn(4, model.spec.n_layers, model.spec.d_model), "held-out")

    def publish() -> None:
        _, comparison = write_weights(Path(output), model, layout, torch.float32, rows)
        assert comparison.passed

    publish()
    print(peak_bytes(publish, torch.device("cpu")))


if __name__ == "__main__":
    main(*sys.argv[1:])

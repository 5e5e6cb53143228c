"""A run on the tiny store."""

from pathlib import Path

import pytest

from tests.training.runs import tiny_run
from trainer.config import RunConfig


@pytest.fixture
def run(tiny_store: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of 12 steps of 96 tokens into a fresh folder."""
    return tiny_run(tiny_store, tmp_path / "run")

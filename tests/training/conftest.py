"""A tiny real store (harvested from the tiny Llama) and configs of runs on it."""

from pathlib import Path

import pytest

from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.harvest import harvest
from tests.training.runs import tiny_run
from trainer.config import RunConfig


@pytest.fixture(scope="session")
def tiny_store(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The config of a run on a store of some 1,500 rows in 3 layers of width 16. Read only; copy it with `tiny_run`."""
    config = RunConfig(
        subject=SubjectConfig(path=str(tiny_llama)),
        text=TextConfig(path=f"{tiny_text}/*.txt", context_length=32, held_out_documents=4, documents_per_block=8),
        store=StoreConfig(
            path=str(tmp_path_factory.mktemp("store") / "store"),
            tokens=1_536,
            held_out_tokens=192,
            chunk_rows=32,
            shard_rows=128,
        ),
        device="cpu",
    )
    harvest(config.subject, config.text, config.store, device="cpu")
    return config


@pytest.fixture
def run(tiny_store: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of 12 steps of 96 tokens into a fresh folder."""
    return tiny_run(tiny_store, tmp_path / "run")

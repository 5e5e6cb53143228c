"""Settings and fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Read when transformers, datasets and wandb are imported: no test talks to a network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from activation_store.device import make_products_reproducible

if TYPE_CHECKING:
    from tests.job import Job
    from trainer.config import RunConfig

# Tests share a few cores with one another; sums are then in one order as well.
torch.set_num_threads(1)
# Some tests put tensors on a GPU themselves.
make_products_reproducible()
if not torch.cuda.is_available():
    # Read when triton is first imported, which torch.optim does: its kernels then run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the processes that share the files out end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """A command that a test runs in this process sets its own number of threads, and sums depend on it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers and d_model 16, with a tokenizer that adds BOS. Read only."""
    # Imported here, for tests/gpu run where only torch, triton, numpy and pytest are installed.
    from tests.tiny import tiny_subject_folder

    return tiny_subject_folder(tmp_path_factory.mktemp("subject") / "tiny", "llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 .txt documents of 3 to 40 sentences. Read only."""
    from tests.tiny import tiny_text_folder

    return tiny_text_folder(tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> "Job":
    """A store, a run and a published folder, made once by the command itself. Read only."""
    from tests.job import run_job

    return run_job(tmp_path_factory.mktemp("job"), tiny_llama, tiny_text)


@pytest.fixture(scope="session")
def tiny_store(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> "RunConfig":
    """The config of a run on a store of some 1,500 rows in 3 layers of width 16. Read only; copy it with `tiny_run`."""
    from activation_store.config import StoreConfig, SubjectConfig, TextConfig
    from activation_store.harvest import harvest
    from trainer.config import RunConfig

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

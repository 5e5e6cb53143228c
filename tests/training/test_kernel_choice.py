"""The backend of a run: refused before anything is written where it cannot run; a GPU's run is looked at anywhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_store.errors import UserError
from tests.training.runs import records
from trainer.checkpoint import Checkpointer
from trainer.config import KernelBackend, KernelsConfig, RunConfig
from trainer.kernels import dispatch
from trainer.load import load_run
from trainer.run_folder import load_config, save_config
from trainer.train import train


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton as a user has it; the other tests run it in its interpreter where there is no GPU."""
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(run: RunConfig) -> None:
    run.kernels = KernelsConfig(backend=KernelBackend.triton)
    with pytest.raises(UserError, match=r"kernels\.backend=triton runs on device=cuda, not on cpu; use .*backend=auto"):
        train(run)
    assert not Path(run.run).exists()


def test_a_run_of_another_backend_is_loaded_and_says_which_it_was(run: RunConfig) -> None:
    run.kernels = KernelsConfig(backend=KernelBackend.reference, dense_above_density=0.25)
    train(run)
    assert records(run.run)
    checkpoint = Checkpointer(run.run).newest_good()
    assert checkpoint is not None
    environment = checkpoint.state["environment"]
    assert (environment["kernels"], environment["dense_above_density"]) == ("reference", 0.25)
    assert load_run(run.run).model.kernels.name == "reference"

    config = load_config(run.run)
    config.kernels.backend = KernelBackend.triton
    save_config(run.run, config)
    assert load_run(run.run).model.backend == "auto"

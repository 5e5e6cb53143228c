"""`source=rolling` through the command: training and harvest are killed, and the end is that of a run that was not."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.main import main
from tests.job import tiny_words, working_in
from tests.training.runs import assert_same_bits, checkpoint_tensors, records
from trainer.checkpoint import Checkpointer
from trainer.run_folder import load_config

_STEPS = 40


@pytest.fixture(scope="module")
def words(tiny_llama: Path, tiny_text: Path) -> dict[str, str]:
    """A rolling run of 40 steps of 64 tokens, a checkpoint every 4, on windows of 256 rows."""
    changed = {
        "source": "rolling",
        "source.statistics_tokens": "600",
        "source.mixed_windows": "2",
        "source.pool_rows": "256",
        "source.lanes": "4",
        "store.window_bytes": f"{256 * 2 * 3 * 16 * 4}",
        "store.claim_seconds": "2",
        "train.tokens": f"{_STEPS * 64}",
        "train.batch_size_tokens": "64",
        "train.checkpoint_every": "4",
        "train.log_every": "1",
        "train.eval_every": "20",
    }
    known = dict(word.split("=", 1) for word in tiny_words(tiny_llama, tiny_text))
    del known["output"]
    return {**known, **changed}


def _command(verb: str, words: dict[str, str], **changes: str) -> list[str]:
    values = words | {name.replace("__", "."): value for name, value in changes.items()}
    return [verb, *(f"{key}={value}" for key, value in values.items())]


def _start(command: list[str]) -> subprocess.Popen[str]:
    layerloom = str(Path(sys.executable).with_name("layerloom"))
    return subprocess.Popen([layerloom, *command], stderr=subprocess.DEVNULL, text=True)


def _kill(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_training_and_killed_harvest_end_as_if_nothing_had_been(
    words: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_in(tmp_path):
        # The least budget is what the refusal of another says.
        refused = _command("train", words, source__budget_bytes="70_000")
        assert main(refused) == 2
        least = re.findall(r"use at least (\d+)", capsys.readouterr().err)
        assert len(least) == 1
        whole = _command("train", words, source__budget_bytes=least[0], source__harvesters="1")
        assert main(whole) == 0
        again = words | {"store.path": "store_again", "run": "again", "source.budget_bytes": least[0]}
        harvest, training = _start(_command("harvest", again)), _start(_command("train", again))
        deadline = time.monotonic() + 300
        while len(list(Path("again").glob("checkpoints/step_*/COMPLETE"))) < 2 and time.monotonic() < deadline:
            assert (harvest.poll(), training.poll()) == (None, None)
            time.sleep(0.005)
        _kill(harvest, training)
        found = Checkpointer("again").newest_good()
        assert found is not None
        assert 4 <= found.step < _STEPS
        harvest = _start(_command("harvest", again))
        assert main(_command("train", again)) == 0
        assert harvest.wait(60) == 0, "the harvest ends with training"
        assert_same_bits(checkpoint_tensors("again"), checkpoint_tensors("run"))
        assert records("again") == records("run")
        assert main(["evaluate", "run=run", "eval.documents=6", "launch.threads=1"]) == 0
        assert main(["store", "info", "store"]) == 0
        assert main(["store", "remove", "store", "confirm=true"]) == 0
    assert load_config(tmp_path / "run").source.mixed_windows == 2


@pytest.mark.slow
def test_a_harvester_that_stops_is_named_and_what_makes_no_sense_is_refused(
    words: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_in(tmp_path):
        gone = _command("train", words, source__harvesters="1", source__harvester_devices="[cuda:7]")
        assert main(gone) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"harvester 1 of 1 \(process \d+\) stopped: .*cuda", said), said
    assert main(_command("train", words, train__checkpoint_every="0")) == 2
    assert "train.checkpoint_every=0 with source=rolling" in capsys.readouterr().err
    assert main(_command("harvest", words, source="live")) == 2
    assert "needs no harvest" in capsys.readouterr().err

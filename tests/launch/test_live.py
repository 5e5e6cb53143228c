"""`source=live` through the command: train, be killed, resume, evaluate, publish, without a store."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.main import main
from tests.docs.test_layout import check
from tests.job import tiny_words, working_in
from tests.training.runs import assert_same_bits, checkpoint_tensors, records
from trainer.checkpoint import Checkpointer

_STEPS = 40


@pytest.fixture(scope="module")
def words(tiny_llama: Path, tiny_text: Path) -> list[str]:
    """A live run of 40 steps, a checkpoint every 4, on 600 rows of statistics."""
    changed = {
        "source": "live",
        "source.deterministic": "true",
        "source.statistics_tokens": "600",
        "source.ring_bytes": "400_000",
        "train.tokens": f"{_STEPS * 128}",
        "train.checkpoint_every": "4",
        "train.log_every": "1",
        "train.eval_every": "20",
    }
    known = dict(word.split("=", 1) for word in tiny_words(tiny_llama, tiny_text))
    del known["output"]
    return [f"{key}={value}" for key, value in {**known, **changed, "store.path": "never_made"}.items()]


@pytest.mark.slow
def test_a_live_run_is_killed_resumed_evaluated_and_published(words: list[str], tmp_path: Path) -> None:
    killed = [word for word in words if not word.startswith("run=")] + ["run=killed"]
    command = [str(Path(sys.executable).with_name("layerloom")), "train", *killed]
    with working_in(tmp_path):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while len(list(Path("killed").glob("checkpoints/step_*/COMPLETE"))) < 2 and time.monotonic() < deadline:
            assert child.poll() is None, child.communicate()
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        found = Checkpointer("killed").newest_good()
        assert found is not None
        assert 4 <= found.step < _STEPS
        assert main(["train", *killed]) == 0
        assert main(["train", *words]) == 0
        assert_same_bits(checkpoint_tensors("killed"), checkpoint_tensors("run"))
        assert records("killed") == records("run")
        assert main(["evaluate", "run=run", "eval.documents=6", "launch.threads=1"]) == 0
        assert main(["publish", "run=run", "output=published", "launch.threads=1"]) == 0
    assert not (tmp_path / "never_made").exists()
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluation["documents"] == 6
    assert 0 < evaluation["fvu"] < 1.2
    check("Run", tmp_path / "run")


def test_what_makes_no_sense_is_refused_in_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "source.fill_fraction=0": "source.fill_fraction=0.0 must be above 0",
        "source.harvesters=-1": "source.harvesters=-1 must not be negative",
        "source.ring_bytes=1000": "use at least",
    }
    with working_in(tmp_path):
        for word, wanted in refused.items():
            assert main(["train", *words, word]) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert wanted in said
        assert not list(tmp_path.iterdir())
        assert main(["sweep", *words[:-1], "output=sweep", "activation.k=2,3"]) == 2
        assert "source=disk" in capsys.readouterr().err

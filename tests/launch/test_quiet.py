"""What libraries would say that is no business of the run."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="wants DeepSpeed")
def test_deepspeed_that_another_library_imports_says_nothing_of_devices() -> None:
    code = "from launch.stages import quiet_libraries; quiet_libraries(); import deepspeed; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "accelerator" not in done.stdout + done.stderr
    assert done.stdout == "imported\n"

"""Time and peak memory of a block, its children included."""

import subprocess
import sys
import time

from launch.usage import Usage

MEGABYTE = 1 << 20


def test_a_block_that_allocates_is_seen() -> None:
    with Usage() as quiet:
        time.sleep(0.3)
    with Usage() as busy:
        data = bytearray(b"x" * (200 * MEGABYTE))
        time.sleep(0.5)
        del data
    assert 0.3 <= quiet.seconds < 10
    assert busy.peak_bytes - quiet.peak_bytes > 150 * MEGABYTE


def test_children_count() -> None:
    with Usage() as quiet:
        pass
    code = f"import time; data = bytearray(b'x' * {200 * MEGABYTE}); time.sleep(1.5)"
    with Usage() as busy:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert busy.peak_bytes - quiet.peak_bytes > 150 * MEGABYTE

"""The shared helpers: atomic files, progress, config differences, devices, files of packages."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activation_store import atomic, progress
from activation_store.compare import config_differences
from activation_store.device import resolve_device
from activation_store.errors import UserError
from activation_store.packages import resolve_package_path
from activation_store.progress import Progress, counted, human_bytes, human_count, human_seconds, layer_range

WRITE_FOREVER = """
import sys
from activation_store.atomic import write_text
number = 0
while True:
    number += 1
    write_text(sys.argv[1], f"{number} " * 50_000)
    if number == 1:
        print("begun", flush=True)
"""


def test_atomic_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    atomic.write_json(path, {"a": [1, None, "ü"]})
    assert atomic.read_json(path) == {"a": [1, None, "ü"]}
    atomic.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, {"x": float("nan")})
    assert atomic.create_json(tmp_path / "once.json", 1)
    assert not atomic.create_json(tmp_path / "once.json", 2)
    assert atomic.read_json(tmp_path / "once.json") == 1
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["new", "once.json", "value.json"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    child = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    words = path.read_text().split()
    assert len(words) == 50_000
    assert len(set(words)) == 1


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert atomic.free_bytes(tmp_path / "a" / "b") > 0
    assert atomic.free_bytes(tmp_path / "a") == pytest.approx(atomic.free_bytes(tmp_path), rel=0.05)


def test_differences_name_key_and_both_values() -> None:
    old = {"store": {"dtype": "float16", "tokens": 5, "layers": [0, 1]}, "gone": 1}
    new = {"store": {"dtype": "float32", "tokens": 5, "layers": (0, 1), "extra": ""}}
    assert config_differences(old, new) == [
        "store.dtype: float16 there, float32 asked for",
        "store.extra: nothing there, '' asked for",
        "gone: 1 there, nothing asked for",
    ]
    assert config_differences(old, old) == []


def test_progress_lines_have_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress("harvest", total=1000, unit="tok", initial=200, stream=stream) as bar:
        now += 4.0
        bar.advance(80)
        assert stream.getvalue() == ""
        now += 6.5
        bar.advance(130, note="layer 3")
        assert stream.getvalue() == "harvest: 41% (410/1k tok), 20 tok/s, 30 s left, layer 3\n"
        now += 29.5
        bar.advance(590)
        now += 2.0
    assert len(stream.getvalue().splitlines()) == 2  # the end is told once
    assert stream.getvalue().splitlines()[-1] == "harvest: 100% (1k/1k tok), 19 tok/s, took 42 s, layer 3"


def test_progress_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("verify", total=4, unit="B", stream=stream) as bar:
        bar.advance(4, note="shard 2")
    assert "verify" in stream.getvalue()
    assert "shard 2" in stream.getvalue()
    assert "4.00/4.00" in stream.getvalue()


def test_human_numbers() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1.5e9, 2e15)] == ["0 B", "999 B", "1 kB", "1.5 GB", "2e+03 TB"]
    assert [human_seconds(s) for s in (0.4, 59.4, 60, 3599, 3725)] == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 02 min"]  # fmt: skip  # noqa: E501
    assert [human_count(n) for n in (7, 12_345, 4.56e6, 3e9)] == ["7", "12.3k", "4.56M", "3G"]
    assert [counted(n, "row") for n in (0, 1, 1_526)] == ["0 rows", "1 row", "1,526 rows"]
    assert counted(2, "process", "processes") == "2 processes"
    assert [layer_range(n) for n in ([], [4], [4, 5, 6])] == ["no layers", "layer 4", "layers 4-6"]


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device=gpu is not a device; use auto"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="device=cuda:99 is not there"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_whoever_resolves_a_gpu_has_reproducible_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS reads the variable at the first product of a process, which needs a device first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    resolve_device("cpu")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert resolve_device(name).type == "cuda"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    resolve_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what the user has set"


def test_package_files_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipped_here"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_package_path("package://shipped_here/data/x.gguf") == package / "data" / "x.gguf"
    with pytest.raises(UserError, match="no_such_thing is not installed; run: pip install no-such-thing"):
        resolve_package_path("package://no_such_thing/x")
    assert resolve_package_path("some/file.txt") == Path("some/file.txt")

"""Parts of files, read where the page cache has them: the file's bytes or none, and never a killed process."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import mapped as module
from activation_store.mapped import mapped

SIZE = 70_000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def descriptor() -> Iterator[int]:
    if not module._Supported.populate:
        pytest.skip("mapped on Linux alone")
    with tempfile.TemporaryFile() as file:
        file.write(CONTENT.tobytes())
        file.flush()
        with mapped(file.fileno(), 0, 1) as data:
            if data is None:
                pytest.skip("this system's kernel or file system does not let a file be mapped in this way")
        yield file.fileno()


@settings(deadline=None)
@given(start=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
def test_the_files_bytes_or_nothing(descriptor: int, start: int, length: int) -> None:
    with mapped(descriptor, start, length) as data:
        if start + length > SIZE:
            assert data is None
        else:
            assert data is not None
            np.testing.assert_array_equal(data, CONTENT[start : start + length])


@pytest.mark.parametrize("size", [0, 100, 4096, 5000, 8192, 60_000])
def test_a_file_cut_short_after_it_was_opened(tmp_path: Path, descriptor: int, size: int) -> None:
    """Touching a page that is gone would end this process."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    with open(path, "rb") as file:
        os.truncate(path, size)
        for start, length in [(0, SIZE), (0, size + 1), (4096, 60_000), (size, 1), (50, 4_000)]:
            with mapped(file.fileno(), start, length) as data:
                if start + length > size:
                    assert data is None
                elif data is not None:
                    assert (data == CONTENT[start : start + length]).all()


def test_nothing_stays_mapped(descriptor: int) -> None:
    def maps() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    with mapped(descriptor, 0, SIZE):
        pass
    before = maps()
    for _ in range(20):
        with mapped(descriptor, 0, SIZE):
            pass
        with pytest.raises(KeyError), mapped(descriptor, 5, 9_000):
            raise KeyError
    assert maps() <= before + 2


def test_a_kernel_that_cannot_is_asked_once(descriptor: int) -> None:
    asked: list[int] = []

    def refuse(*_: object) -> int:
        asked.append(1)
        module.ctypes.set_errno(errno.EINVAL)
        return -1

    with patch.object(module, "_madvise", refuse), patch.object(module._Supported, "populate", True):
        for _ in range(3):
            with mapped(descriptor, 0, SIZE) as data:
                assert data is None
    assert len(asked) == 1


def test_what_is_not_in_the_page_cache_is_left_to_read(descriptor: int) -> None:
    with patch.object(module, "in_page_cache", lambda *_: False), mapped(descriptor, 0, SIZE) as data:
        assert data is None

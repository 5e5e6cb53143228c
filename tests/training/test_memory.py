"""Freed buffers are reused without page faults while asked for, and given back after it."""

import multiprocessing
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import torch

from trainer.memory import freed_memory_kept

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Seen:
    """Page faults of 20 buffers each, and what the process still holds in bytes, before and after it is left."""

    faults_without: int
    faults_with: int
    held_inside: int
    held_after: int


def _fill_and_free() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(_BYTES // 4, dtype=torch.float32).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _look() -> _Seen:
    process = psutil.Process()
    without = sum(_fill_and_free() for _ in range(20))
    before = process.memory_info().rss
    with freed_memory_kept(torch.device("cpu")):
        # The first few find holes that small objects have nibbled at.
        inside = sum(_fill_and_free() for _ in range(20))
        held_inside = process.memory_info().rss - before
    return _Seen(without, inside, held_inside, process.memory_info().rss - before)


def test_pages_stay_while_asked_for_and_go_back_after_it() -> None:
    # In a process of its own: what an allocator does depends on everything that was ever allocated beside it.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seen = pool.submit(_look).result()
    assert seen.faults_with < seen.faults_without / 2
    assert seen.held_inside > _BYTES / 2
    assert seen.held_after < _BYTES / 4


def test_other_devices_are_left_alone() -> None:
    with freed_memory_kept(torch.device("meta")):
        pass

"""What the processes of test_train_engines.py run."""

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker
from wandb.proto.wandb_internal_pb2 import Record

from activation_store.errors import AgreedInterruptError
from launch.main import main
from tests.parallel.resume_cases import ended_by
from trainer.config import RunConfig
from trainer.train import train


def interrupted(config: RunConfig, step: int) -> None:
    """Trains, and stops after that step, for the last rank gets a SIGINT in it."""

    def interrupt() -> None:
        if int(os.environ["RANK"]) == config.parallel.data * config.parallel.feature - 1:
            signal.raise_signal(signal.SIGINT)

    ended_by(interrupt, AgreedInterruptError, config, step)


def commanded(words: list[str]) -> int:
    """The command's exit code."""
    return main(words)


def tracked(config: RunConfig) -> int:
    """Trains; how many runs accelerate's tracker of wandb has started on this rank."""
    real, started = WandBTracker.start, 0

    def start(tracker: WandBTracker) -> None:
        nonlocal started
        started += 1
        real(tracker)

    WandBTracker.start = start
    try:
        train(config)
    finally:
        WandBTracker.start = real
    return started


def wandb_history(run: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines and the config that wandb's offline file has."""
    (file,) = Path(run).glob("wandb/offline-run-*/*.wandb")
    lines, config = [], {}
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.history.item:
            lines.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        for source in (record.run.config, record.config):
            config |= {item.key: json.loads(item.value_json) for item in source.update}
    return lines, config


def _records(file: bytes) -> Iterator[bytes]:
    """Of a log in leveldb's format behind a header of 7 bytes: blocks of 32 KiB; a record may have several parts."""
    at, parts, head = 7, b"", struct.Struct("<IHB")  # checksum, length, 1 whole, 2 first, 3 middle, 4 last
    while at + head.size <= len(file):
        if (left := 2**15 - at % 2**15) < head.size:
            at += left
            continue
        _, length, kind = head.unpack_from(file, at)
        at += head.size
        parts += file[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""

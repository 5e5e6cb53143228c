"""A slow link between two processes of this machine: two network namespaces and a pair of interfaces with a rate.

As root on Linux, with iproute2. What the machine's own network does is not touched.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_NEW_NETWORK = 0x40000000


class End(NamedTuple):
    """One end of a link: the namespace, and the interface in it."""

    namespace: str
    interface: str


@contextmanager
def link(rate: str) -> Iterator[list[End]]:
    """Both ends of a link that lets through `rate` each way, in the words of `tc`: 1gbit, 100mbit."""
    name = f"ll{os.getpid()}"
    ends = [End(f"{name}{side}", f"{name}{side}") for side in "ab"]
    try:
        for end in ends:
            _run("ip", "netns", "add", end.namespace)
        _run("ip", "link", "add", ends[0].interface, "type", "veth", "peer", "name", ends[1].interface)
        for number, end in enumerate(ends, 1):
            _run("ip", "link", "set", end.interface, "netns", end.namespace)
            inside = ("ip", "netns", "exec", end.namespace)
            _run(*inside, "ip", "address", "add", f"10.77.0.{number}/24", "dev", end.interface)
            _run(*inside, "ip", "link", "set", end.interface, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            limit = ("rate", rate, "burst", "256kb", "latency", "400ms")
            _run(*inside, "tc", "qdisc", "add", "dev", end.interface, "root", "tbf", *limit)
        yield ends
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "delete", end.namespace], check=False)


def enter(end: End) -> None:
    """Moves this process to an end; gloo then speaks over its interface."""
    descriptor = os.open(Path("/run/netns") / end.namespace, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {end.namespace}")
    finally:
        os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = end.interface


def _run(*words: str) -> None:
    subprocess.run(words, check=True)

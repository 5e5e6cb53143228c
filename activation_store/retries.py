"""Trying again what a server or a network failed to do, with growing pauses, for so many seconds in all."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class StorageError(OSError):
    """A request to an object store that failed for good, in one line."""


class TransientError(Exception):
    """A request that failed for a reason that may pass: the server's fault, or the network's."""


@dataclass(frozen=True, slots=True)
class Retries:
    """Pauses double from `first_pause` to `longest_pause` seconds, each shortened by chance by up to a half.

    What fails is tried again until `seconds` have passed since its first failure.
    """

    seconds: float = 60.0
    first_pause: float = 0.1
    longest_pause: float = 5.0

    def run(self, request: Callable[[int], T]) -> T:
        """`request(n)` for attempts n = 0, 1, ... until one does not raise TransientError. Raises StorageError."""
        attempt, pause, first_failure = 0, self.first_pause, 0.0
        while True:
            try:
                return request(attempt)
            except TransientError as error:
                now = time.monotonic()
                first_failure = first_failure if attempt else now
                left = first_failure + self.seconds - now
                if left <= 0:
                    raise StorageError(f"{error} (tried {attempt + 1} times in {self.seconds:g} s)") from error
            # By chance, so that many workers do not come back at once. This order is nobody's result.
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, self.longest_pause)
            attempt += 1

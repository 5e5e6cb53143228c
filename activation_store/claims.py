"""Who works on what: claims that live as long as their counters move.

A claim is an object `claims/<name>` with its owner's id and a counter that the owner's heartbeat raises. Another worker
that sees the same counter in `PATIENCE` of its own observations in a row takes over. Only each worker's own pace of
looking counts: no clock is read, and none is compared between machines. A claim keeps two workers from the same work;
it does not have to: what they make is created if absent, so that work done twice loses a race and harms nothing.
"""

import json
import threading
import uuid
from dataclasses import dataclass, field

from activation_store.errors import UserError
from activation_store.storage import Storage

CLAIMS = "claims"
# Observations of an unchanged counter after which a claim counts as left. The owner raises it once between two of them.
PATIENCE = 8


@dataclass(slots=True)
class _Seen:
    """What the last observation of somebody's claim was, and how often it was that."""

    value: bytes
    times: int = 1


@dataclass(slots=True)
class _Held:
    storage: Storage
    name: str
    counter: int = 0


@dataclass(slots=True)
class Claims:
    """The claims of one worker, in any number of storages, and its heartbeat. Close it (or use `with`)."""

    # Pause between two observations, and between two beats of the heart.
    pause_seconds: float
    worker: str = field(default_factory=lambda: uuid.uuid4().hex)
    _held: dict[tuple[int, str], _Held] = field(default_factory=dict)
    _seen: dict[tuple[int, str], _Seen] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def take(self, storage: Storage, name: str) -> bool:
        """Claims what nobody claims."""
        key = f"{CLAIMS}/{name}"
        if not storage.put_if_absent(key, [self._value(0)]):
            return False
        self._hold(storage, name)
        return True

    def observe(self, storage: Storage, name: str) -> bool:
        """Looks at a claim once more; True if it is free, or was left and is taken over now.

        To be called at most once in `pause_seconds` (see `pause`).
        """
        place = (id(storage), name)
        try:
            value = storage.get(f"{CLAIMS}/{name}")
        except FileNotFoundError:
            self._seen.pop(place, None)
            return self.take(storage, name)
        seen = self._seen.get(place)
        if seen is None or seen.value != value:
            self._seen[place] = _Seen(value)
            return False
        seen.times += 1
        if seen.times <= PATIENCE:
            return False
        del self._seen[place]
        # Two may take over at once; the one that writes last beats on, and both do the same work.
        storage.put(f"{CLAIMS}/{name}", self._value(0))
        self._hold(storage, name)
        return True

    def release(self, storage: Storage, name: str) -> None:
        """Gives a claim up; another may take it at once."""
        with self._lock:
            if self._held.pop((id(storage), name), None) is None:
                return
            if self._owner(storage, name) == self.worker:
                storage.delete(f"{CLAIMS}/{name}")

    def pause(self) -> None:
        """Waits between two rounds of observations, by the machine's monotonic pace."""
        self._stop.wait(self.pause_seconds)

    def close(self) -> None:
        """Stops the heart and gives up what is still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for held in list(self._held.values()):
            try:
                self.release(held.storage, held.name)
            except (OSError, UserError):
                # It will be seen to stand still.
                continue

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self, storage: Storage, name: str) -> None:
        with self._lock:
            self._held[id(storage), name] = _Held(storage, name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self.pause_seconds / 2):
            with self._lock:
                for place, held in list(self._held.items()):
                    try:
                        if self._owner(held.storage, held.name) != self.worker:
                            # Taken over while this process stood still. The work goes on; whoever commits first wins.
                            del self._held[place]
                            continue
                        held.counter += 1
                        held.storage.put(f"{CLAIMS}/{held.name}", self._value(held.counter))
                    except (OSError, UserError):
                        # A full disk or a lost network: whoever writes rows will say so.
                        continue

    def _owner(self, storage: Storage, name: str) -> str | None:
        try:
            owner: str = json.loads(storage.get(f"{CLAIMS}/{name}"))["worker"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return owner

    def _value(self, counter: int) -> bytes:
        return json.dumps({"worker": self.worker, "counter": counter}).encode()

"""Training's side of its live harvesters: a thread of this process, or processes of their own; how one ended.

A connection goes both ways: `Filled` and errors from the harvester, numbers of freed rows to it. Its end is the end of
the other side: training notices a harvester that was killed, a harvester notices training that was.
"""

from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

import torch

from activation_store.children import Child
from activation_store.device import resolve_device
from activation_store.errors import UserError
from activation_store.live_harvest import Filled, HarvesterJob, serve
from activation_store.ring import IntRows, Ring, RowQueue
from activation_store.subject import load_subject


class Harvester:
    """One harvester, begun. Close it."""

    def __init__(self, job: HarvesterJob, ring: Ring, *, own_process: bool) -> None:
        self._name = f"harvester {job.part + 1} of {job.layout.parts}"
        self._device = job.device
        self._free, self._filled = RowQueue(ring.free[job.part]), RowQueue(ring.filled[job.part])
        self._child: Child | None = None
        self._thread: Thread | None = None
        if own_process:
            self._child = Child("activation_store.live_process", job, ring.descriptor)
            self.connection = self._child.connection
        else:
            self.connection, theirs = Pipe()
            self._start_thread(job, ring, theirs)

    @property
    def pid(self) -> int | None:
        """Of its process, if it has its own."""
        return None if self._child is None else self._child.pid

    def __str__(self) -> str:
        where = "a thread of this process" if self._child is None else f"process {self._child.pid}"
        return f"{self._name} ({where}, on {self._device})"

    def receive(self) -> tuple[Filled, IntRows]:
        """Its next message, which is there, and the numbers of the rows. Raises UserError if it has ended."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise UserError(self._end()) from None
        if isinstance(message, str):
            raise UserError(f"{self} stopped: {message}")
        assert isinstance(message, Filled)
        return message, self._filled.take(message.rows)

    def free(self, rows: IntRows) -> None:
        """Gives rows of its part back to it. Raises UserError if it has ended."""
        self._free.put(rows)
        try:
            self.connection.send(len(rows))
        except OSError:
            raise UserError(self._end()) from None

    def close(self) -> None:
        """Ends it: nothing of what it does outlives training."""
        self.connection.close()
        if self._child is not None:
            self._child.close()
        if self._thread is not None:
            self._thread.join()

    def _start_thread(self, job: HarvesterJob, ring: Ring, theirs: Connection) -> None:
        # Here, and apart from the generators: making a model draws numbers, when it does must not matter to training.
        with torch.random.fork_rng(devices=[]):
            subject = load_subject(job.subject, device=resolve_device(job.device))
        self._thread = Thread(target=serve, args=(job, subject, ring, theirs), name="harvester", daemon=True)
        self._thread.start()

    def _end(self) -> str:
        """How it ended, and what to do."""
        how = "died, its traceback is on stderr" if self._child is None else self._child.end()
        return f"{self} {how}; its rows are missing: mend that, or use fewer source.harvesters"

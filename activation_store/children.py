"""A process that this one started to work beside it: with a connection whose end is the end of the other side."""

import signal
import subprocess
import sys
from multiprocessing import Pipe

# How long a process that has hung up may take to end.
_END_SECONDS = 10.0


class Child:
    """`python -m MODULE CONNECTION DESCRIPTORS...`, begun; it receives `job`. Close it: that ends it."""

    def __init__(self, module: str, job: object, *descriptors: int) -> None:
        self.connection, theirs = Pipe()
        handed = (theirs.fileno(), *descriptors)
        # -P: the working folder may hold modules of the same names.
        command = [sys.executable, "-P", "-m", module, *map(str, handed)]
        self._process = subprocess.Popen(command, pass_fds=handed, stdin=subprocess.DEVNULL)
        theirs.close()
        self.connection.send(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> str:
        """How it ended, having hung up."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "hung up but did not end"
        if code < 0:
            memory = " (the system kills so when memory runs out)" if code == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{memory}"
        return f"exited with {code}, what it said is above"

    def close(self) -> None:
        """Ends it: nothing of what it does outlives this process."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

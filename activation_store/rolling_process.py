"""`python -m activation_store.rolling_process CONNECTION`: a worker of a rolling store that training started.

The job comes over the connection, the end of which ends the process: a worker may be killed at any point.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection
from threading import Thread

import torch

from activation_store.errors import UserError
from activation_store.rolling_harvest import RollingJob, harvest_rolling


def main(connection: Connection) -> None:
    """Until training hangs up or is done. Ctrl-C and a batch system's SIGTERM go to all processes: training decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    job = connection.recv()
    assert isinstance(job, RollingJob)
    torch.set_num_threads(job.source.harvester_threads)
    Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        harvest_rolling(job.subject, job.text, job.store, job.source, device=job.device)
    except UserError as error:
        connection.send(str(error))


def _end_with(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        # Nothing half-visible is left behind, by design of the store.
        os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

"""`python -m activation_store.live_process CONNECTION RING`: a live harvester in a process of its own.

Both arguments are descriptors that training handed down; the job comes over the connection.
"""

import signal
import sys
from multiprocessing.connection import Connection

import torch

from activation_store.device import resolve_device
from activation_store.errors import UserError, os_error_line
from activation_store.live_harvest import HarvesterJob, serve
from activation_store.ring import Ring
from activation_store.subject import load_subject


def main(connection: Connection, ring: int) -> None:
    """Until training hangs up. Ctrl-C and a batch system's SIGTERM go to all processes: training decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    job = connection.recv()
    assert isinstance(job, HarvesterJob)
    torch.set_num_threads(job.threads)
    try:
        subject = load_subject(job.subject, device=resolve_device(job.device))
    except UserError as error:
        connection.send(str(error))
    except OSError as error:
        connection.send(os_error_line(error))
    else:
        serve(job, subject, Ring(job.layout, ring), connection)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))

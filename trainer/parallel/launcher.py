"""What torchrun or srun say in the environment about this process, and how many run beside it. Imports no torch.

torch reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun sets. `srun` says the same in
words of its own, which `adopt_launcher` translates.
"""

import os
import re
from collections.abc import MutableMapping

from activation_store.errors import UserError

_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    # Not SLURM_NTASKS, which the batch script has too: it is one process, whatever it may start.
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
# Of the ports that users may take, below those that the system hands out.
_FIRST_PORT, _PORTS = 15_000, 15_000


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets torchrun's variables from srun's where a job step has several tasks and torchrun's are not there."""
    if "WORLD_SIZE" in environment or int(environment.get(_SLURM["WORLD_SIZE"], "1")) == 1:
        return
    for ours, theirs in _SLURM.items():
        environment[ours] = environment[theirs]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # Steps of one job may run side by side.
    number = 97 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: `n3` of `n3`, of `n[3-5,8]` and of `n3,m1`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no host; set MASTER_ADDR to the host of rank 0")
    return "".join(part for part in found.groups() if part)


def process_count() -> int:
    """Processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launching_words() -> list[str]:
    """The command line that starts this job, up to its verb; torchrun's over several nodes is for each of them."""
    count, here = process_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if count == 1:
        return ["layerloom"]
    if not here:
        alike = re.fullmatch(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return ["srun", "-n", str(count), *(["--ntasks-per-node", alike[1]] if alike else []), "layerloom"]
    nodes = ["--nnodes", str(count // here), *_meeting_place()] if count > here else []
    return ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "launch.main"]


def _meeting_place() -> list[str]:
    """Where torchrun's agents find each other: at this job's host and port, which are free once it has ended."""
    host, port = os.environ.get("MASTER_ADDR", "HOST"), os.environ.get("MASTER_PORT", "PORT")
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}"]


def local_rank() -> int:
    """Which of the processes of this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this is rank 0, which speaks for all where all would say the same."""
    return int(os.environ.get("RANK", "0")) == 0

"""train.profile: a Chrome trace of a few steps, a file for each rank (docs/parallel.md says how to read it)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from activation_store.progress import report
from trainer.parallel.agreement import Agreement

PROFILE_FOLDER = "profile"
# Steps of this call that are let pass (the first ones compile kernels), that warm the profiler up, that are recorded.
SKIPPED, WARM_UP, RECORDED = 4, 1, 3


@contextmanager
def profiled(folder: Path, rank: int, agreement: Agreement, *, wanted: bool) -> Iterator["StepProfile"]:
    """Records steps of the block into `folder`/profile if wanted; collective."""
    if not wanted:
        yield StepProfile(None)
        return
    file = folder / PROFILE_FOLDER / f"rank_{rank:05d}.json.gz"
    with agreement.together():
        file.parent.mkdir(exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def write(recorded: profile) -> None:
        recorded.export_chrome_trace(str(file))
        report(f"train: wrote traces of {RECORDED} steps to {file.parent}")

    with profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=write,
        # The feed works in a thread of its own, backward passes in those of autograd.
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
    ) as recording:
        yield StepProfile(recording)


class StepProfile:
    """Told of the end of each step."""

    def __init__(self, recording: profile | None) -> None:
        self._recording = recording

    def step(self) -> None:
        """A step has ended."""
        if self._recording is not None:
            self._recording.step()

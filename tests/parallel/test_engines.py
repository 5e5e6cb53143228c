"""Every engine on real processes against one device: losses and norms of 20 steps, the first gradients, final weights.

After one step Adam's moments are the clipped gradient and its square, so they stand for the gradients; they come as a
checkpoint's pieces, which have to make up the serial model's tensors.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.engine_runs import Case, assemble, run_case, run_serial, smallest_gap
from tests.parallel.processes import Processes

# What tensors differ by, relative to their largest entry.
EXACT, ROUNDING = 1e-9, 1e-5
# Of float32 trajectories: so chosen that no selection hangs on rounding.
SEED, SMALLEST_GAP = 0, 1e-4
TOPK: dict[str, Any] = {"activation.auxk_coefficient": 0.0}
PLAIN: dict[str, Any] = {"engine.kind": "plain"}
ACCELERATE: dict[str, Any] = {"engine.kind": "accelerate"}
FSDP: dict[str, Any] = {"engine.kind": "fsdp"}
# Every activation, with the losses that look at the whole microbatch.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk with auxk": {"activation.kind": "topk", "activation.auxk_k": 3},
    "topk over layers": {**TOPK, "activation.kind": "topk", "activation.scope": "all_layers", "model.skip": True},
    "batchtopk": {"activation.kind": "batchtopk", "activation.pre_act_lambda": 0.01},
    "relu": {"activation.kind": "relu", "activation.tanh_lambda": 0.01},
    "jumprelu": {
        "activation.kind": "jumprelu",
        "activation.l0_lambda": 0.01,
        "activation.l0_target": 9.0,
        "activation.tanh_lambda": 0.01,
    },
}


def zero(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed's words."""
    return {"engine.kind": "deepspeed", "engine.zero_stage": stage, "engine.offload_optimizer": offload}


def case_of(engine: Mapping[str, Any], words: Mapping[str, Any] = TOPK, **values: Any) -> Case:
    """In float64; DeepSpeed, which has none, in float32."""
    single = engine["engine.kind"] == "deepspeed"
    return Case(words={**words, **engine}, dtype=torch.float32 if single else torch.float64, seed=SEED, **values)


def check(processes: Processes, case: Case, data: int, feature: int, tolerance: float | None = None) -> None:
    """A mesh trains as one device does: losses and norms of all steps on all ranks, moments after the first step,
    everything after the last.
    """
    tolerance = tolerance or (EXACT if case.dtype == torch.float64 else ROUNDING)
    if case.dtype == torch.float32 and tolerance <= ROUNDING:
        assert smallest_gap(case) > SMALLEST_GAP
    serial, ranks = run_serial(case), processes.run(run_case, case, data, feature)
    for rank in ranks:
        for found, wanted in zip(rank.losses, serial.losses, strict=True):
            assert found == pytest.approx(wanted, rel=tolerance)
        assert rank.norms == pytest.approx(serial.norms, rel=tolerance)
    for when in ("first", "last"):
        tensors = assemble([getattr(rank, when) for rank in ranks])
        expected = assemble([getattr(serial, when)])
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert difference(tensors[name], tensor) <= tolerance, f"{name}, {when} step"


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest entry; NaN where the other is, too."""
    assert torch.equal(found.isnan(), wanted.isnan())
    largest = float(wanted.nan_to_num().abs().max())
    return float((found - wanted).nan_to_num().abs().max()) / max(largest, 1e-30)


# Each stops on its way: what a checkpoint holds goes into a new engine, which goes on.
@pytest.mark.parametrize("engine", [PLAIN, FSDP, ACCELERATE], ids=lambda words: words["engine.kind"])
def test_two_data_ranks_accumulate_and_go_on_as_one_device(two_ranks: Processes, engine: dict[str, Any]) -> None:
    check(two_ranks, case_of(engine, microbatches=3, stop=7), 2, 1)

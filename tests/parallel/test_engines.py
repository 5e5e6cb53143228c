"""Every engine on real processes against one device: losses and norms of 20 steps, the first gradients, final weights.

After one step Adam's moments are the clipped gradient and its square, so they stand for the gradients; they come as a
checkpoint's pieces, which have to make up the serial model's tensors.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.engine_runs import B, Case, assemble, run_case, run_serial, smallest_gap
from tests.parallel.processes import Processes
from trainer.config import ParallelConfig
from trainer.parallel.mesh import open_mesh

# What tensors differ by, relative to their largest entry.
EXACT, ROUNDING = 1e-9, 1e-5
# Of float32 trajectories: so chosen that no selection hangs on rounding.
SEED, SMALLEST_GAP = 17, 1e-4
TOPK: dict[str, Any] = {"activation.auxk_coefficient": 0.0}
PLAIN: dict[str, Any] = {"engine.kind": "plain"}
ACCELERATE: dict[str, Any] = {"engine.kind": "accelerate"}
FSDP: dict[str, Any] = {"engine.kind": "fsdp"}
# Every activation, with the losses that look at the whole microbatch.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk with auxk": {"activation.kind": "topk", "activation.auxk_k": 3},
    # Rows: b_dec and W_skip lie whole on every rank, and count once in the norm.
    "topk over layers": {
        **TOPK,
        "activation.kind": "topk",
        "activation.scope": "all_layers",
        "model.skip": True,
        "parallel.decoder_split": "rows",
    },
    "batchtopk": {"activation.kind": "batchtopk", "activation.pre_act_lambda": 0.01},
    "relu": {"activation.kind": "relu", "activation.tanh_lambda": 0.01},
    "jumprelu": {
        "activation.kind": "jumprelu",
        "activation.l0_lambda": 0.01,
        "activation.l0_target": 9.0,
        "activation.tanh_lambda": 0.01,
    },
}


# Features die within two steps and come back: AuxK's loss and its gradients are there from the third step on.
DEAD: dict[str, Any] = {"activation.kind": "topk", "activation.auxk_k": 3}
DEAD_SEED, DEAD_AFTER = 14, 2 * B


def zero(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed's words."""
    return {"engine.kind": "deepspeed", "engine.zero_stage": stage, "engine.offload_optimizer": offload}


def case_of(engine: Mapping[str, Any], words: Mapping[str, Any] = TOPK, **values: Any) -> Case:
    """In float64; DeepSpeed, which has none, in float32."""
    single = engine["engine.kind"] == "deepspeed"
    dtype = torch.float32 if single else torch.float64
    return Case(**{"words": {**words, **engine}, "dtype": dtype, "seed": SEED, **values})


def dead_case(engine: Mapping[str, Any], **words: Any) -> Case:
    """With dead features from early on, and AuxK."""
    return case_of(engine, {**DEAD, **words}, seed=DEAD_SEED, dead_after=DEAD_AFTER)


def check(processes: Processes, case: Case, data: int, feature: int, tolerance: float | None = None) -> None:
    """A mesh trains as one device does: losses and norms of all steps on all ranks, moments after the first step,
    everything after the last.
    """
    tolerance = tolerance or (EXACT if case.dtype == torch.float64 else ROUNDING)
    if case.dtype == torch.float32 and tolerance <= ROUNDING:
        assert smallest_gap(case) > SMALLEST_GAP
    serial, ranks = run_serial(case), processes.run(run_case, case, data, feature)
    if case.dead_after == DEAD_AFTER:
        assert all(auxk > 0 for *_, auxk in serial.losses[2:])
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


def test_the_feature_axis_alone(two_ranks: Processes) -> None:
    check(two_ranks, case_of(PLAIN, microbatches=2), 1, 2)


@pytest.mark.parametrize(
    ("engine", "activation", "data"),
    [
        (PLAIN, "jumprelu", 4),
        (PLAIN, "batchtopk", 2),
        (FSDP, "topk over layers", 2),
        (ACCELERATE, "topk with auxk", 2),
    ],
    ids=str,
)
def test_four_ranks_are_one_device(four_ranks: Processes, engine: dict[str, Any], activation: str, data: int) -> None:
    check(four_ranks, case_of(engine, ACTIVATIONS[activation]), data, 4 // data)


@pytest.mark.parametrize("engine", [PLAIN, FSDP, ACCELERATE], ids=lambda words: words["engine.kind"])
def test_the_bits_do_not_depend_on_a_stop(four_ranks: Processes, engine: dict[str, Any]) -> None:
    """Four ranks: two add the same two numbers whatever the layout of buckets."""
    words = {**TOPK, **engine}
    through, stopped = (
        four_ranks.run(run_case, Case(words=words, steps=6, stop=stop, microbatches=2), 4, 1) for stop in (None, 3)
    )
    for one, other in zip(through, stopped, strict=True):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        for name, boxes in one.last.items():
            for box, again in zip(boxes, other.last[name], strict=True):
                assert torch.equal(box.tensor.nan_to_num(), again.tensor.nan_to_num()), name


@pytest.mark.parametrize(
    ("engine", "data", "values"),
    [
        (zero(1), 2, {}),
        (zero(2), 4, {"microbatches": 2, "stop": 7}),
        (zero(3), 2, {"stop": 7}),
        (zero(2, offload=True), 2, {}),
    ],
    ids=str,
)
def test_zero_is_one_device(four_ranks: Processes, engine: dict[str, Any], data: int, values: dict[str, Any]) -> None:
    check(four_ranks, case_of(engine, **values), data, 4 // data)


def test_dead_features_come_back_as_on_one_device(four_ranks: Processes) -> None:
    check(four_ranks, dead_case(zero(3)), 2, 2)


@pytest.mark.parametrize("engine", [PLAIN, FSDP, ACCELERATE, zero(2)], ids=lambda words: words["engine.kind"])
def test_mixed_precision_on_a_mesh(four_ranks: Processes, engine: dict[str, Any]) -> None:
    """Products in bfloat16: other losses than float32's, close to those of one device."""
    case = Case(words={**TOPK, **engine, "train.precision": "bf16"}, steps=3)
    serial, whole = run_serial(case), run_serial(Case(words=TOPK, steps=3))
    for rank in four_ranks.run(run_case, case, 2, 2):
        assert rank.losses[0][0] == pytest.approx(serial.losses[0][0], rel=1e-4)
        assert rank.losses[0][0] != pytest.approx(whole.losses[0][0], rel=1e-6)
        assert rank.norms == pytest.approx(serial.norms, rel=2e-2)


ENGINES = {"plain": PLAIN, "fsdp": FSDP, "accelerate": ACCELERATE}
ENGINES |= {f"zero {stage}": zero(stage) for stage in (1, 2, 3)} | {"zero 3 offload": zero(3, offload=True)}


@pytest.mark.matrix
@pytest.mark.parametrize("data", [4, 2])
@pytest.mark.parametrize("split", ["columns", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("engine", ["plain", "fsdp", "accelerate"])
def test_every_engine_on_every_mesh(four_ranks: Processes, engine: str, activation: str, split: str, data: int) -> None:
    if data == 4 and split == "rows":
        pytest.skip("one rank of the feature axis splits nothing")
    words = {**ACTIVATIONS[activation], "parallel.decoder_split": split}
    check(four_ranks, case_of(ENGINES[engine], words, microbatches=2), data, 4 // data)


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("split", ["columns", "rows"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name.startswith("zero")])
def test_every_stage_of_zero_on_every_mesh(
    two_ranks: Processes, four_ranks: Processes, engine: str, split: str, mesh: tuple[int, int]
) -> None:
    processes = two_ranks if mesh == (2, 1) else four_ranks
    check(processes, case_of(ENGINES[engine], {**TOPK, "parallel.decoder_split": split}, microbatches=2), *mesh)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("mesh", "split"),
    [
        *(((data, 1), "columns") for data in (2, 4)),
        *((mesh, split) for mesh in ((1, 2), (1, 4), (2, 2)) for split in ("columns", "rows")),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_dead_features_with_every_engine(
    two_ranks: Processes, four_ranks: Processes, engine: str, mesh: tuple[int, int], split: str
) -> None:
    processes = two_ranks if mesh[0] * mesh[1] == 2 else four_ranks
    check(processes, dead_case(ENGINES[engine], **{"parallel.decoder_split": split}), *mesh)


# DeepSpeed has no float64. Where a threshold selects, the fewer features there are, the fewer come near it.
_FEW: dict[str, Any] = {**TOPK, "model.n_features": 8}
ZERO_ACTIVATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "topk over layers": (0, ACTIVATIONS["topk over layers"]),
    "batchtopk": (0, {**TOPK, "activation.kind": "batchtopk"}),
    "relu": (2, {**_FEW, **ACTIVATIONS["relu"]}),
    "jumprelu": (3, {**_FEW, **ACTIVATIONS["jumprelu"]}),
}


@pytest.mark.matrix
@pytest.mark.parametrize("data", [4, 2])
@pytest.mark.parametrize("activation", ZERO_ACTIVATIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_of_zero_with_every_activation(
    four_ranks: Processes, stage: int, activation: str, data: int
) -> None:
    seed, words = ZERO_ACTIVATIONS[activation]
    check(four_ranks, case_of(zero(stage), words, seed=seed), data, 4 // data)


def test_ranks_with_other_layers_dense_sum_the_same_gradients(four_ranks: Processes) -> None:
    """A layer's density is that of a rank's own tokens, and the order in which gradients come hangs on it."""
    seed, words = ZERO_ACTIVATIONS["batchtopk"]
    check(four_ranks, case_of(zero(2), words, seed=seed), 4, 1)


def _twice(case: Case) -> list[list[float]]:
    losses = []
    for _ in range(2):
        with open_mesh(ParallelConfig(), torch.device("cpu")):
            losses.append(run_case(case, 1, 1).losses[-1])
    return losses


def test_a_second_run_of_deepspeed_in_one_process() -> None:
    """It keeps process groups in its modules, of which the end of the first run must not leave it any."""
    with Processes(1) as process:
        [(first, second)] = process.run(_twice, case_of(zero(2), steps=2))
    assert first == second

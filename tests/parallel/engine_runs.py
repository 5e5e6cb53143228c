"""Short trainings on a tiny problem, by any engine on any mesh, and what they leave as the serial model's tensors.

Legend: B tokens of a global microbatch, L layers, D d_model, F features of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from tests.training.runs import tiny_run
from trainer.config import DecoderSplit, EngineKind, RunConfig
from trainer.loss import StepContext, dead_features
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.collectives import collectives_of
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.mesh import Mesh, mesh_of
from trainer.saving.pieces import Pieces, as_pieces

B, L, D, F, K = 12, 3, 16, 32, 2
STEPS = 20
_DEAD_AFTER = 10 * B

Look = Callable[[CrossLayerTranscoder, Sequence[ActivationBatch]], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training: `words` of its config by dotted name, its dtype, and what the run does beside stepping.

    stop: after so many steps the state goes through checkpoint pieces into a new engine. dead_after: tokens for which a
    dead feature is silent.
    """

    words: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    steps: int = STEPS
    microbatches: int = 1
    stop: int | None = None
    seed: int = 0
    dead_after: int = _DEAD_AFTER


@dataclass
class Outcome:
    """One rank's. By step: loss, residual, L0, AuxK's part of the loss; the norm. Pieces of model and optimizer after
    step 1 and the last.
    """

    losses: list[list[float]]
    norms: list[float]
    first: Pieces
    last: Pieces


def run_case(case: Case, data: int, feature: int) -> Outcome:
    """On a rank of a mesh (of torch.distributed's processes)."""
    return _run(case, _config(case, data, feature), mesh_of(data, feature, torch.device("cpu")))


def run_serial(case: Case, look: Look | None = None) -> Outcome:
    """The same on one device, by the plain engine, in this process. `look` sees every step's microbatches before it."""
    config = _config(case, 1, 1)
    config.engine = replace(config.engine, kind=EngineKind.plain)
    return _run(replace(case, stop=None), config, Mesh(), look)


def _run(case: Case, config: RunConfig, mesh: Mesh, look: Look | None = None) -> Outcome:
    engine, model = _new(case, config, mesh)
    context = StepContext(k=K, penalty_scale=1.0, dead_after_tokens=case.dead_after, lr=2e-3)
    outcome = Outcome([], [], {}, {})
    for step in range(case.steps):
        if step == case.stop:
            state = _state(engine)
            engine, model = _new(case, config, mesh)
            _load(engine, state)
        microbatches = [_share(case, step * case.microbatches + n, mesh, model) for n in range(case.microbatches)]
        if look is not None:
            look(model, microbatches)
        loss = engine.backward(microbatches, context, residual=True)
        norm = float(engine.gradient_norm())
        engine.update(norm)
        model.record_step(loss.fired, B * case.microbatches, loss.batch_threshold_L, 0.9)
        assert loss.residual_L is not None
        parts = (loss.total, loss.residual_L.sum(), loss.l0_L.sum(), loss.auxk)
        outcome.losses.append([float(part) for part in parts])
        outcome.norms.append(norm)
        if step == 0:
            outcome.first = _state(engine)
    outcome.last = _state(engine)
    return outcome


def assemble(ranks: Sequence[Pieces]) -> dict[str, Tensor]:
    """The whole tensors that the pieces of all ranks make up.

    Raises:
        AssertionError: a number that no rank has, or that two ranks have differently.
    """
    whole: dict[str, Tensor] = {}
    for pieces in ranks:
        for name, boxes in pieces.items():
            for box in boxes:
                if name not in whole:
                    whole[name] = torch.full(box.shape, torch.nan, dtype=torch.float64)
                assert whole[name].shape == box.shape, name
                place = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
                old, new = whole[name][place], box.tensor.double()
                known = ~old.isnan()
                assert torch.equal(old[known], new[known]), f"{name}: two ranks differ"
                whole[name][place] = new
    return whole


def smallest_gap(case: Case) -> float:
    """How near, over the serial run's steps, a selection comes to another: the smallest difference between the last
    selected pre-activation and the first that is not (topk, batchtopk), or of a pre-activation from its threshold and
    the ends of its band (relu, jumprelu); and of those of the dead features among which AuxK selects.
    """
    gaps: list[float] = []
    activation = _config(case, 1, 1).activation

    def look(model: CrossLayerTranscoder, microbatches: Sequence[ActivationBatch]) -> None:
        dead = dead_features(model, case.dead_after) if activation.auxk_coefficient else []
        for batch in microbatches:
            pre_LBF = [model.pre_activations(n, batch.mlp_in[:, n]) for n in range(L)]
            gaps.append(_gap(model, pre_LBF))
            gaps.extend(
                _gap_of_dead(pre_BF[:, dead_F], activation.auxk_k)
                for pre_BF, dead_F in zip(pre_LBF, dead, strict=bool(dead))
                if dead_F.any()
            )

    run_serial(case, look)
    return min(gaps)


def _gap(model: CrossLayerTranscoder, pre_LBF: list[Tensor]) -> float:
    spec = model.spec
    if not spec.is_topk:
        logs = [layer.log_threshold for layer in model.source_layers]
        thetas = [0.0 if log is None else log.detach().exp() for log in logs]
        away = [(pre - theta).abs() for pre, theta in zip(pre_LBF, thetas, strict=True)]
        ends = [] if spec.kind == "relu" else [(from_threshold - spec.bandwidth / 2).abs() for from_threshold in away]
        return min(float(distance.min()) for distance in away + ends)
    over, k = (pre_LBF, K) if spec.scope == "layer" else ([torch.cat(pre_LBF, dim=1)], K * L)
    gaps = []
    for pre_BF in over:
        rows, count = (pre_BF, k) if spec.kind == "topk" else (pre_BF.reshape(1, -1), k * len(pre_BF))
        best = rows.topk(count + 1, dim=1).values
        gaps.append(float((best[:, -2] - best[:, -1]).min()))
    return min(gaps)


def _gap_of_dead(pre_Bn: Tensor, k: int) -> float:
    """As AuxK selects: the k largest of a token, if they are positive."""
    ranked_Bn = torch.nn.functional.pad(pre_Bn, (0, k + 1), value=-torch.inf).sort(dim=1, descending=True).values
    last_B, next_B = ranked_Bn[:, k - 1], ranked_Bn[:, k].clamp_min(0.0)
    # Where fewer than k are positive what counts is how near one comes to being so.
    return float(torch.where(last_B > 0, last_B - next_B, pre_Bn.abs().amin(dim=1)).min())


def _new(case: Case, config: RunConfig, mesh: Mesh) -> tuple[Engine, CrossLayerTranscoder]:
    model = _model(case, config, mesh)
    return build_engine(config, model, mesh), model


def _state(engine: Engine) -> Pieces:
    """Copies of model and optimizer."""
    with engine.master_weights():
        state = {**engine.model_state(), **{f"optimizer.{k}": v for k, v in engine.optimizer_state().items()}}
        return {
            name: [replace(box, tensor=box.tensor.detach().clone()) for box in boxes]
            for name, boxes in as_pieces(state).items()
        }


def _load(engine: Engine, saved: Pieces) -> None:
    with engine.master_weights():
        state = {**engine.model_state(), **{f"optimizer.{k}": v for k, v in engine.optimizer_state().items()}}
        for name, boxes in as_pieces(state).items():
            for box, old in zip(boxes, saved[name], strict=True):
                assert (box.offsets, box.sizes) == (old.offsets, old.sizes), name
                box.tensor.copy_(old.tensor)


def _config(case: Case, data: int, feature: int) -> RunConfig:
    words = {
        "train.batch_size_tokens": B * case.microbatches,
        "train.microbatch_tokens": B,
        "parallel.data": data,
        "parallel.feature": feature,
        "optim.clip_norm": 1.0,
        "kernels.backend": "reference",
        "model.n_features": F,
        # Several buckets.
        "engine.bucket_bytes": 4096,
        **case.words,
    }
    return tiny_run(RunConfig(), Path("unused"), words)


def _model(case: Case, config: RunConfig, mesh: Mesh) -> CrossLayerTranscoder:
    spec = ModelSpec(
        n_layers=L,
        d_model=D,
        n_features=config.model.n_features,
        k=K,
        span=config.model.span.value,
        score=config.activation.score.value,
        kind=config.activation.kind.value,
        scope=config.activation.scope.value,
        skip=config.model.skip,
        threshold_init=0.3,
    )
    by_columns = config.parallel.decoder_split is not DecoderSplit.rows
    collectives = collectives_of(mesh, by_columns=by_columns)
    return CrossLayerTranscoder(spec, seed=case.seed, collectives=collectives, backend="reference").to(case.dtype)


def _share(case: Case, number: int, mesh: Mesh, model: CrossLayerTranscoder) -> ActivationBatch:
    """This rank's part of a global microbatch: its rows, and its columns of the targets."""
    g = torch.Generator().manual_seed(1000 * case.seed + number)
    mlp_in = torch.randn(B, L, D, generator=g, dtype=torch.float64)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / D**0.5
    mlp_out = torch.relu(mlp_in @ mix)
    each = B // mesh.data.size
    rows = slice(mesh.data.rank * each, (mesh.data.rank + 1) * each)
    columns = model.local_columns(mlp_out[rows].to(case.dtype))
    return ActivationBatch(mlp_in[rows].to(case.dtype), columns, torch.arange(B)[rows], epoch=0)

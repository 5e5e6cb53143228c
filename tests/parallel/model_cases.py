"""One model on a mesh against the same model on one device: what runs on every rank.

Every rank makes both (tiny) models, so that nothing but verdicts has to leave it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.cases import all_losses, context, kill, make_model
from trainer.config import ActivationConfig, KernelsConfig
from trainer.loss import LossOutput, StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import exchanged
from trainer.model.features import LayerCodes
from trainer.parallel.collectives import collectives_of
from trainer.parallel.mesh import Mesh, end_groups, mesh_of

SHAPE = {"n_layers": 3, "d_model": 12, "n_features": 64, "k": 7}
TOKENS = 44


@dataclass(frozen=True)
class Case:
    """A model and how it is spread. spec: of the model; dense: every layer takes the dense path.

    compiled: float32 with the kernels of a CPU, and large gradients written into memory that lives on.
    """

    data: int
    feature: int
    by_columns: bool
    spec: dict[str, Any]
    dense: bool = False
    per_token: bool = False
    tied: bool = False
    steps: int = 3
    compiled: bool = False

    def __str__(self) -> str:
        words = [f"{self.data}x{self.feature}", "columns" if self.by_columns else "rows", *map(str, self.spec.values())]
        return "-".join([*words, *(name for name in ("dense", "per_token", "tied", "compiled") if getattr(self, name))])


def check_all(cases: list[Case]) -> list[str]:
    """What is wrong, by case; empty where all is well."""
    wrong = []
    for case in cases:
        try:
            check(case)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
        # A rank that failed early would leave the others waiting in the next collective.
        failed = torch.tensor([len(wrong)])
        dist.all_reduce(failed)
        if int(failed):
            break
        end_groups()
    return wrong


class Pair:
    """The model on the mesh and the one on this device alone, with the same parameters and the same global batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.mesh: Mesh = mesh_of(case.data, case.feature, torch.device("cpu"))
        dtype = torch.float32 if case.compiled else torch.float64
        self.whole, self.x, self.y = make_model(n_tokens=TOKENS, dtype=dtype, **{**SHAPE, **case.spec})
        self.tolerance = 2e-5 if case.compiled else 1e-9
        if case.tied:
            _tie(self.whole, self.x)
        kill(self.whole)
        self.whole.running_threshold_L.fill_(0.4)
        backend = "cpu" if case.compiled else "reference"
        self.model = CrossLayerTranscoder(
            self.whole.spec, collectives=collectives_of(self.mesh, by_columns=case.by_columns), backend=backend
        ).to(dtype)
        self.model.gradient_buffers.enabled = case.compiled
        self.part = self.model.collectives.partitioning
        self.partitions = self.model.partitions()
        with torch.no_grad():
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                tensor.copy_(self.local(name, dict(self._tensors(self.whole))[name]))
        share = TOKENS // case.data
        self.rows = slice(self.mesh.data.rank * share, (self.mesh.data.rank + 1) * share)

    @staticmethod
    def _tensors(model: CrossLayerTranscoder) -> list[tuple[str, Tensor]]:
        return [*model.named_parameters(), *model.named_buffers()]

    def local(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter, gradient or buffer."""
        return self.part.local(whole, self.partitions[name])

    def losses(
        self, activation: ActivationConfig, step: StepContext, x: Tensor, y: Tensor
    ) -> tuple[LossOutput, LossOutput]:
        """On one device and on the mesh."""
        kernels = KernelsConfig(dense_above_density=0.0 if self.case.dense else 1.0)
        whole = compute_loss(self.whole, x, y, step, activation=activation, kernels=kernels)
        mine = self.model.local_columns(y[self.rows])
        spread = compute_loss(self.model, x[self.rows], mine, step, activation=activation, kernels=kernels)
        return whole, spread

    def mean_over_data(self, tensor: Tensor) -> Tensor:
        """What the engine does with gradients and losses."""
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.mesh.data.group)
        return total / self.mesh.data.size

    def square_norm(self) -> Tensor:
        """Of the gradients of the model on the mesh, over both axes, each parameter counted once."""
        split, replicated = self.x.new_zeros(()), self.x.new_zeros(())
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            is_split = self.part.size > 1 and self.part.split_dim(self.partitions[name]) is not None
            (split if is_split else replicated).add_(parameter.grad.square().sum())
        dist.all_reduce(split, group=self.mesh.feature.group)  # zero on an axis of one rank
        return replicated + split


def check(case: Case) -> None:
    """Losses, selections, gradients and weights of a few steps, with clipping."""
    pair = Pair(case)
    activation, _ = all_losses(pair.whole)
    step = replace(context(pair.whole), per_token=case.per_token)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (pair.whole, pair.model)]
    generator = torch.Generator().manual_seed(5)
    for number in range(case.steps):
        whole, spread = pair.losses(activation, step, pair.x, pair.y)
        _check_losses(pair, whole, spread, number)
        _check_selection(pair, whole, spread)
        for output, optimizer in zip((whole, spread), optimizers, strict=True):
            optimizer.zero_grad()
            output.total.backward()
        _check_gradients(pair, number)
        for optimizer in optimizers:
            optimizer.step()
        for model, output in ((pair.whole, whole), (pair.model, spread)):
            model.record_step(output.fired, TOKENS, output.batch_threshold_L)
        # Other rows, so that the tie of a tied case is not met again in weights that have parted by rounding.
        pair.x = pair.x + 0.3 * torch.randn(pair.x.shape, generator=generator, dtype=pair.x.dtype)
    for name, tensor in pair._tensors(pair.whole):
        found = dict(pair._tensors(pair.model))[name]
        _close(f"{name} after {case.steps} steps", pair.local(name, tensor).detach(), found.detach(), pair.tolerance)


def _check_losses(pair: Pair, whole: LossOutput, spread: LossOutput, number: int) -> None:
    for name in ("total", "mse", "penalty", "auxk", "pre_act", "mse_L", "l0_L"):
        expected, found = getattr(whole, name), pair.mean_over_data(getattr(spread, name))
        _close(f"{name} of step {number}", expected.detach(), found, pair.tolerance)
    if whole.batch_threshold_L is not None:
        _close("batch_threshold_L", whole.batch_threshold_L, spread.batch_threshold_L, pair.tolerance)
    y_hat = pair.model.local_columns(whole.y_hat_BTD)[pair.rows]
    _close(f"y_hat of step {number}", y_hat, spread.y_hat_BTD, pair.tolerance)
    if pair.case.spec["kind"] != "topk":
        assert float(whole.pre_act) > 0 or number > 0, "the case has no pre-activation loss"
    assert float(whole.auxk) > 0 or number > 0, "the case has no AuxK loss"


def _check_selection(pair: Pair, whole: LossOutput, spread: LossOutput) -> None:
    """Entry by entry, on this rank's tokens and features."""
    for expected, found in zip(whole.codes, spread.codes, strict=True):
        if expected is None:
            assert found is None
            continue
        features = pair.part.part(expected.n_features) if pair.part.size > 1 else slice(None)
        mine = expected.to_dense()[pair.rows, features]
        assert torch.equal(mine != 0, found.to_dense() != 0), "other entries are selected"
        gathered = exchanged(pair.model.collectives, found)
        if pair.part.columns_split:
            _close("gathered codes", expected.to_dense()[pair.rows], gathered.to_dense(), pair.tolerance)
            _check_order(gathered)


def _check_order(codes: LayerCodes) -> None:
    places = codes.tokens * codes.n_features + codes.feature_ids
    assert bool((places.diff() > 0).all()), "codes are not in order of (token, feature)"


def _check_gradients(pair: Pair, number: int) -> None:
    parameters = dict(pair.model.named_parameters())
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad = pair.mean_over_data(parameter.grad)
    for name, parameter in pair.whole.named_parameters():
        assert parameter.grad is not None
        found = parameters[name].grad
        assert found is not None
        _close(f"gradient of {name} in step {number}", pair.local(name, parameter.grad), found, pair.tolerance)
    norm = torch.nn.utils.get_total_norm([p.grad for p in pair.whole.parameters() if p.grad is not None])
    _close(f"norm of step {number}", norm, pair.square_norm().sqrt(), pair.tolerance)
    for model in (pair.whole, pair.model):
        for parameter in model.parameters():
            parameter.grad /= norm


def _close(what: str, expected: Tensor, found: Tensor, tolerance: float) -> None:
    assert expected.shape == found.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if expected.dtype in (torch.bool, torch.int64):
        assert torch.equal(expected, found), f"{what} differs"
        return
    scale = max(float(expected.abs().nan_to_num().max()), 1e-3) if expected.numel() else 1.0
    difference = float((expected - found).abs().nan_to_num().max()) / scale if expected.numel() else 0.0
    assert torch.equal(expected.isnan(), found.isnan()), f"{what}: other entries are NaN"
    assert difference <= tolerance, f"{what} differs by {difference:.2e}"


def _tie(model: CrossLayerTranscoder, x: Tensor) -> None:
    """Equal scores across ranks, tokens and layers: features repeat within a layer, tokens repeat on every rank.

    Groups of equal scores have 8 or 9 tokens, so that a budget ends within one.
    """
    with torch.no_grad():
        x.copy_(x[torch.arange(x.shape[0]) % 5])
        for layer in model.source_layers:
            half = layer.W_enc.shape[0] // 2
            for parameter in (layer.W_enc, layer.b_enc, layer.W_dec):
                parameter[half:] = parameter[:half]
        first = model.source_layers[0]
        for layer in model.source_layers[1:]:
            layer.W_enc.copy_(first.W_enc)
            layer.b_enc.copy_(first.b_enc)
        for name in ("input_shift_LD", "input_scale_LD"):
            getattr(model, name).copy_(getattr(model, name)[:1].expand_as(getattr(model, name)).clone())
        x.copy_(x[:, :1].expand_as(x).clone())

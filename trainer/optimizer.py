"""Adam over named parameters, with its state as named tensors and clipping folded into the update.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)

Dense: a row whose gradient is zero still decays its moments and moves. What is not all in float32 is updated by
`trainer.table_adam`, the rest by torch's Adam.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from trainer.config import OptimConfig, ParamDtype, StateDtype
from trainer.kernels.dispatch import DenseAdam
from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.model.runtime import FusedUpdates
from trainer.table_adam import TableAdam

# Where torch has an Adam in one kernel. Elsewhere it goes op by op.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_STATE_NAMES = ("exp_avg", "exp_avg_sq")
# Nearly all of a model: what optim.fused_update updates in the backward pass, and what the precisions are for.
TABLES = ("W_enc", "W_dec")


class NamedAdam:
    """torch.optim.Adam for parameters with names.

    The fused kernel divides gradients by a given number as it reads them, so that clipping costs no pass of its own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        *,
        seed: int = 0,
        dense_adam: DenseAdam | None = None,
    ) -> None:
        """Turns W_enc and W_dec into what `config` wants them stored as. seed: of the stochastic rounding; dense_adam:
        what updates those of them that stay in float32, in place of torch's kernel.
        """
        low = config.state_dtype is not StateDtype.fp32 or config.param_dtype is not ParamDtype.fp32
        self._tables = {
            name: TableAdam(name, parameter, config, seed=seed)
            for name, parameter in parameters.items()
            if low and is_table(name)
        }
        self.parameters = {name: parameter for name, parameter in parameters.items() if name not in self._tables}
        self._fused_updates: FusedUpdates | None = None
        self._dense_adam = dense_adam
        device = next(iter(self.parameters.values())).device
        self._fused = device.type in _FUSED_DEVICES
        # The kernel takes its divisor in float32.
        self._fused_division = self._fused and all(p.dtype != torch.float64 for p in self.parameters.values())
        self._adam = Adam(
            self.parameters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=self._fused,
        )
        self._stepper: Optimizer = self._adam

    def wrap(self, wrapper: Callable[[Optimizer], Optimizer]) -> None:
        """Let the steps of torch's Adam go through what `wrapper` makes of it."""
        self._stepper = wrapper(self._adam)

    def step(self, lr: float, *, divide_gradients_by: float = 1.0) -> None:
        """One update of every parameter. A parameter without a gradient counts as one of zeros, unless the backward
        pass has updated it already.
        """
        for parameter in self.parameters.values():
            if self._fused_updates is not None and self._fused_updates.updated(parameter):
                self._adam.state[parameter]["step"] += 1
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for table in self._tables.values():
            table.step(lr, divide_gradients_by=divide_gradients_by)
        if self._dense_adam is not None:
            self._update_tables(self._dense_adam, lr, divide_gradients_by)
        for group in self._adam.param_groups:
            group["lr"] = lr
        if divide_gradients_by == 1.0:
            self._stepper.step()
        elif self._fused_division:
            self._step_scaled(divide_gradients_by)
        else:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(divide_gradients_by)
            self._stepper.step()

    @torch.no_grad()
    def _update_tables(self, dense_adam: DenseAdam, lr: float, divisor: float) -> None:
        """Updates the tables that have gradients, and takes these away: torch's Adam does the rest."""
        hyper: AdamHyper | None = None
        for name, parameter in self.parameters.items():
            if not is_table(name) or parameter.grad is None or parameter.dtype != torch.float32:
                continue
            state = self._adam.state[parameter]
            if not state:
                self.tensors()
            state["step"] += 1
            if hyper is None:
                # All have taken as many steps.
                hyper = self._hyper(lr, float(state["step"]))
            exp_avg, exp_avg_sq = (state[key] for key in _STATE_NAMES)
            dense_adam(parameter.detach(), exp_avg, exp_avg_sq, parameter.grad, hyper, divisor)
            parameter.grad = None

    def _hyper(self, lr: float, step: float) -> AdamHyper:
        group = self._adam.param_groups[0]
        beta1, beta2 = group["betas"]
        return AdamHyper(lr, beta1, beta2, group["eps"], 1 - beta1**step, 1 - beta2**step)

    def _step_scaled(self, divisor: float) -> None:
        device = next(iter(self.parameters.values())).device
        # torch's own interface between GradScaler and fused optimizers.
        # Filled there: a copy from the host would wait for the tables' updates.
        self._adam.grad_scale = torch.full((), divisor, device=device)  # type: ignore[attr-defined]
        self._adam.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        try:
            self._stepper.step()
        finally:
            del self._adam.grad_scale, self._adam.found_inf  # type: ignore[attr-defined]

    def register_fused(self, fused: FusedUpdates) -> None:
        """Let `fused` update W_enc and W_dec of every layer, with the moments kept here."""
        self._fused_updates = fused
        tensors = self.tensors()
        for name, parameter in self.parameters.items():
            if is_table(name):
                fused.register(parameter, *(tensors[f"{name}.{key}"] for key in _STATE_NAMES))

    def begin_fused(self, lr: float) -> None:
        """Before a backward pass whose gradients are to be used up at once."""
        assert self._fused_updates is not None
        state = self._adam.state[next(iter(self.parameters.values()))]
        self._fused_updates.begin(self._hyper(lr, float(state["step"]) + 1))

    def zero_grad(self) -> None:
        """Drops all gradients; large buffers are kept by the model's runtime (`GradientBuffers`)."""
        self._adam.zero_grad(set_to_none=True)
        for table in self._tables.values():
            table.parameter.grad = None

    @contextmanager
    def master_weights(self) -> Iterator[None]:
        """Until it is left, parameters with a float32 master are that master; then they are rounded from it."""
        with_master = [table for table in self._tables.values() if table.master is not None]
        for table in with_master:
            table.show_master()
        try:
            yield
        finally:
            for table in with_master:
                table.hide_master()

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`; made of zeros where there is none yet.

        8-bit moments are two tensors each, `.codes` and `.scales`. A float32 master is not among them: it is the
        parameter of that name while `master_weights` lasts.
        """
        named = {name: tensor for table in self._tables.values() for name, tensor in table.tensors().items()}
        for name, parameter in self.parameters.items():
            state = self._adam.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device if self._fused else "cpu")
                for key in _STATE_NAMES:
                    state[key] = torch.zeros_like(parameter, requires_grad=False)
            named |= {f"{name}.{key}": state[key] for key in ("step", *_STATE_NAMES)}
        return named


def is_table(name: str) -> bool:
    """Whether the parameter of that name is one of TABLES."""
    return name.rpartition(".")[2] in TABLES


def gradient_norm(parameters: Mapping[str, nn.Parameter], used_up: Sequence[Tensor] = ()) -> Tensor:
    """The global L2 norm of all gradients, 0-dim float64: see `gradient_squares`."""
    return gradient_squares(parameters, used_up).sqrt()


def gradient_squares(
    parameters: Mapping[str, nn.Parameter], used_up: Sequence[Tensor] = (), *, device: torch.device | None = None
) -> Tensor:
    """The sum of squares of all gradients, 0-dim float64. used_up: sums of those that are gone already; device: where
    the zero of no gradients is to be, by default with the parameters.

    Rows of the last dim are summed in float32 and the rows in float64: one pass at full speed, and exact to about
    1e-7, where a float32 sum over a whole tensor of 10^7 entries is off by some 1e-3.
    """
    squares = [
        torch.linalg.vector_norm(parameter.grad, dim=-1).square_().sum(dtype=torch.float64)
        for parameter in parameters.values()
        if parameter.grad is not None
    ] + list(used_up)
    if device is None:
        device = next((parameter.device for parameter in parameters.values()), None)
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)

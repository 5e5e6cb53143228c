"""Adam for one large table (W_enc or W_dec of a layer) whose numbers are not all kept in float32.

The arithmetic is that of torch.optim.Adam, in float32, a block of rows at a time: read, update, round and put back.
"""

import torch
from torch import Tensor, nn

from trainer.config import Master, OptimConfig, ParamDtype, StateDtype
from trainer.state_formats import Bfloat16Table, BlockTable, Float32Table, TableFormat
from trainer.stochastic_rounding import BitsKey, bits_key, high_half, low_half, random_bits

# Values of a block of rows: enough to outweigh the calls (on a CPU, half of that took 1.2 times as long, twice as much
# the same), and few enough for their copies to be small beside the table.
_BLOCK_VALUES = {"cpu": 2**17}
_BLOCK_VALUES_ELSEWHERE = 2**22


class TableAdam:
    """One parameter's storage, moments and updates.

    Its random bits are a function of (seed, step, name, element). A bfloat16 parameter has float32 gradients.
    """

    def __init__(self, name: str, parameter: nn.Parameter, config: OptimConfig, *, seed: int) -> None:
        """Stores `parameter` (float32 so far) as `config` says; the values it has now are rounded to nearest."""
        self._name, self.parameter, self._config, self._seed = name, parameter, config, seed
        self._shape = (parameter.numel() // parameter.shape[-1], parameter.shape[-1])
        self._step = torch.zeros(())
        self.master: Tensor | None = None
        self._rounded: Tensor | None = None
        if config.param_dtype is ParamDtype.bf16:
            if config.master is Master.fp32:
                self.master = parameter.data
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32
        self._weights = self._weights_format()
        self._moments = {
            "exp_avg": self._moment_format(signed=True),
            "exp_avg_sq": self._moment_format(signed=False),
        }

    def tensors(self) -> dict[str, Tensor]:
        """`.step`, `.exp_avg...`, `.exp_avg_sq...` by name. A master is the parameter's own tensor in a checkpoint."""
        named = {f"{self._name}.step": self._step}
        for moment, table in self._moments.items():
            for suffix, tensor in table.tensors().items():
                # With the parameter's own shape, but for the scales of blocks, which have blocks for columns.
                shape = (*self.parameter.shape[:-1], tensor.shape[1])
                named[f"{self._name}.{moment}{suffix}"] = tensor.view(shape)
        return named

    def show_master(self) -> None:
        """Makes the parameter the master itself, for whoever reads or loads its values."""
        assert self.master is not None
        self._rounded, self.parameter.data = self.parameter.data, self.master

    def hide_master(self) -> None:
        """Makes the parameter bfloat16 again: the master, rounded to nearest."""
        assert self.master is not None
        assert self._rounded is not None
        self.parameter.data, self._rounded = self._rounded.copy_(self.master), None

    @torch.no_grad()
    def step(self, lr: float, *, divide_gradients_by: float = 1.0) -> None:
        """One update; a parameter without a gradient counts as one of zeros."""
        self._step += 1
        n = int(self._step)
        keys = [bits_key(self._seed, n, f"{self._name}/{what}") for what in ("weights", "moments")]
        n_rows, n_columns = self._shape
        block = max(1, _BLOCK_VALUES.get(self.parameter.device.type, _BLOCK_VALUES_ELSEWHERE) // n_columns)
        for start in range(0, n_rows, block):
            rows = slice(start, min(start + block, n_rows))
            self._update(
                rows,
                self._gradient(rows, divide_gradients_by),
                keys,
                lr / (1 - self._config.beta1**n),
                (1 - self._config.beta2**n) ** 0.5,
            )

    def _update(
        self, rows: slice, gradient: Tensor, keys: list[BitsKey], step_size: float, root_correction: float
    ) -> None:
        config, (exp_avg, exp_avg_sq) = self._config, self._moments.values()
        m = exp_avg.read(rows).lerp_(gradient, 1 - config.beta1)
        v = exp_avg_sq.read(rows).mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        denominator = v.sqrt().div_(root_correction).add_(config.eps)
        weights = self._weights.read(rows).addcdiv_(m, denominator, value=-step_size)
        self._weights.write(rows, weights, low_half(self._bits(self._weights, rows, keys[0])))
        if self.master is not None:
            self.parameter.data.view(self._shape)[rows] = weights
        bits = self._bits(exp_avg, rows, keys[1])
        exp_avg.write(rows, m, low_half(bits))
        exp_avg_sq.write(rows, v, high_half(bits))

    def _bits(self, table: TableFormat, rows: slice, key: BitsKey) -> Tensor:
        """32 random bits for each value of these rows; none for a format without rounding."""
        n_columns = self._shape[1]
        if not table.rounds:
            return torch.empty(0, dtype=torch.int32, device=self.parameter.device)
        count = (rows.stop - rows.start) * n_columns
        return random_bits(key, rows.start * n_columns, count, self.parameter.device).view(-1, n_columns)

    def _gradient(self, rows: slice, divisor: float) -> Tensor:
        if self.parameter.grad is None:
            return torch.zeros(rows.stop - rows.start, self._shape[1], device=self.parameter.device)
        gradient = self.parameter.grad.view(self._shape)[rows].float()
        return gradient if divisor == 1.0 else gradient / divisor

    def _weights_format(self) -> TableFormat:
        table = (self.parameter.data if self.master is None else self.master).view(self._shape)
        return Bfloat16Table(table) if table.dtype == torch.bfloat16 else Float32Table(table)

    def _moment_format(self, *, signed: bool) -> TableFormat:
        device = self.parameter.device
        if self._config.state_dtype is StateDtype.int8:
            return BlockTable(*self._shape, signed=signed, device=device)
        if self._config.state_dtype is StateDtype.bf16:
            return Bfloat16Table(torch.zeros(self._shape, dtype=torch.bfloat16, device=device))
        return Float32Table(torch.zeros(self._shape, device=device))

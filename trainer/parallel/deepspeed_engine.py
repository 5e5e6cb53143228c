"""DeepSpeed's ZeRO over the data axis: optimizer (1), gradients (2) and parameters (3) are sharded.

DeepSpeed is given an `mpu` object with the mesh's axes, and the marks on parameters that are partitioned over the
feature axis; without either it sums and clips the wrong numbers, without an error.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim import Adam

from activation_store.batch import ActivationBatch
from trainer.config import RunConfig
from trainer.loss import LossOutput, StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.engine import BatchLoss
from trainer.parallel.losses import LossModule, Microbatch, step_loss
from trainer.parallel.mesh import Mesh
from trainer.parallel.parts import flat_boxes, is_split, piece
from trainer.saving.pieces import Piece, State, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Total(nn.Module):
    """The loss alone, for DeepSpeed finds tensors in what a module returns only if these are all there is."""

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        self.loss = loss
        self.output: LossOutput | None = None

    def forward(self, mlp_in_BLD: Tensor, mlp_out_BLD: Tensor, context: StepContext) -> Tensor:
        """0-dim; the rest is left in `output`."""
        self.output = self.loss(mlp_in_BLD, mlp_out_BLD, context)
        return self.output.total


class _Axes:
    """The mesh as DeepSpeed asks for it (Megatron's `mpu`)."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._ranks = [mesh.feature.rank + n * mesh.feature.size for n in range(mesh.data.size)]

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same part of the model."""
        return self._mesh.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return self._ranks

    def get_data_parallel_rank(self) -> int:
        """This process's place among them."""
        return self._mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the parts of one model."""
        return self._mesh.feature.group

    def get_model_parallel_rank(self) -> int:
        """This process's place among them."""
        return self._mesh.feature.rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.feature.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class DeepSpeedEngine:
    """See Engine. Adam is torch's; DeepSpeed's own for the CPU compiles for minutes and is no faster."""

    def __init__(self, config: RunConfig, model: CrossLayerTranscoder, mesh: Mesh) -> None:
        # Launchers other than torch's need not set it; DeepSpeed asks for it, though the device is chosen.
        os.environ.setdefault("LOCAL_RANK", str(model.threshold_LF.device.index or 0))
        if not dist.is_initialized():
            # DeepSpeed wants a process group even for one process.
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        self._mesh, self._model = mesh, model
        self._partitions, self._partitioning = model.partitions(), model.collectives.partitioning
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            split = is_split(self._partitions[name], self._partitioning)
            parameter.model_parallel = parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        self._stage = config.engine.zero_stage
        self._total = _Total(LossModule(config, model))
        self._engine = self._initialise(config)
        self._zero: Any = self._engine.optimizer
        self._inner: Adam = self._zero.optimizer
        for flat in self._flats():
            self._inner.state[flat] = {"step": torch.zeros(())} | {key: torch.zeros_like(flat) for key in _MOMENTS}
        if self._stage == 3:
            _reduce_at_the_end(self._total)
        else:
            _reduce_in_one_order(self._zero)
        self._lr = 0.0
        self._exposed = False

    def _initialise(self, config: RunConfig) -> Any:
        # torch 2.13 has other names for what DeepSpeed calls in every step.
        warnings.filterwarnings("ignore", message="`torch.distributed.*_tensor` is deprecated", category=FutureWarning)
        # Compiled on first use for minutes, and a compilation that is killed leaves a lock that hangs every later run.
        __compatible_ops__["deepspeed_shm_comm"] = False
        if self._stage == 3:
            # One unit: see trainer.parallel.fsdp.
            set_z3_leaf_modules(self._total, [_Total])
        optim = config.optim
        adam = Adam(self._parameters.values(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        return deepspeed.initialize(
            model=self._total,
            optimizer=adam,
            config=_deepspeed_config(config),
            mpu=_Axes(self._mesh) if self._mesh.size > 1 else None,
            dist_init_required=False,
        )[0]

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """See Engine."""
        self._lr = context.lr

        def run(microbatch: Microbatch) -> LossOutput:
            total = self._engine(microbatch.mlp_in_BLD, microbatch.mlp_out_BLD, context)
            self._engine.backward(total)
            if not microbatch.last:
                self._engine.step()  # counts the microbatch
            output = self._total.output
            assert output is not None
            self._total.output = None
            return output

        return step_loss(microbatches, run, self._model, self._mesh.data, residual=residual)

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        if self._stage == 3:
            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        else:
            norm = self._zero.scaled_global_norm()
        return torch.as_tensor(norm, dtype=torch.float64)

    def update(self, norm: float) -> None:
        """See Engine. DeepSpeed clips by the norm that it finds itself, the same."""
        for group in self._inner.param_groups:
            group["lr"] = self._lr
        self._engine.step()

    def model_state(self) -> State:
        """See Engine."""
        self._exposed = True
        state: dict[str, Any] = {name: self._pieces(name, None) for name in self._parameters}
        for name, buffer in self._model.named_buffers():
            state[name] = piece(buffer, self._partitions[name], self._partitioning)
        return state

    def optimizer_state(self) -> State:
        """See Engine."""
        state: dict[str, Any] = {}
        step = self._inner.state[self._flats()[0]]["step"]
        for name in self._parameters:
            state[f"{name}.step"] = whole(step)
            state |= {f"{name}.{key}": self._pieces(name, key) for key in _MOMENTS}
        return state

    @contextmanager
    def master_weights(self) -> Iterator[None]:
        """See Engine. Every rank has the whole parameters meanwhile."""
        with ExitStack() as stack:
            if self._stage == 3:
                parameters = list(self._parameters.values())
                stack.enter_context(deepspeed.zero.GatheredParameters(parameters, modifier_rank=None))
            yield
        if self._exposed:
            self._take_over()

    def _take_over(self) -> None:
        """Masters and steps may have been loaded: the parameters and the other flat tensors follow."""
        self._exposed = False
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def _flats(self) -> list[Tensor]:
        """The flat float32 tensors that this rank updates."""
        flats = (
            self._zero.single_partition_of_fp32_groups if self._stage < 3 else self._zero.fp32_partitioned_groups_flat
        )
        return list(flats)

    def _pieces(self, name: str, key: str | None) -> list[Piece]:
        """This rank's boxes of a parameter's float32 master (key: of that moment)."""
        flat, start = self._run(self._parameters[name], key)
        shape, partition = self._shapes[name], self._partitions[name]
        return [
            piece(box, partition, self._partitioning, shape=shape, offsets=offsets)
            for offsets, box in flat_boxes(flat, start, shape)
        ]

    def _run(self, parameter: nn.Parameter, key: str | None) -> tuple[Tensor, int]:
        """This rank's numbers of a parameter, a view of a flat tensor, and the place of the first of them."""
        if self._stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return torch.empty(0), 0
            at = mapping.hp_fragment_address
            flat = self._flats()[mapping.param_group_index]
            start, count = mapping.lp_fragment_address.start, at.numel
            at = at.start
        else:
            group, at, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._flats()[group]
            start = self._mesh.data.rank * size
            numel = math.prod(parameter.ds_shape)  # type: ignore[attr-defined]
            count = min(max(numel - start, 0), size)
        source = flat if key is None else self._inner.state[flat][key]
        return source.detach()[at : at + count], start


def _reduce_in_one_order(zero: Any) -> None:
    """DeepSpeed (stage 2) fills its buckets in the order in which gradients come. Ranks of which one has a layer dense
    and another has it sparse get them in other orders, and would sum different parameters. Here each gradient waits for
    those before it.
    """
    order = [parameter for group in zero.bit16_groups for parameter in reversed(group)]
    process, waiting, done = zero.process_gradients, {}, 0

    def in_order(parameter: nn.Parameter, group: int) -> None:
        nonlocal done
        waiting[parameter] = group
        while done < len(order) and order[done] in waiting:
            process(order[done], waiting.pop(order[done]))
            done += 1
        done %= len(order)

    zero.process_gradients = in_order


def _reduce_at_the_end(unit: nn.Module) -> None:
    """DeepSpeed sums a unit's gradients in a hook for when those of its inputs are there. Here inputs have none, and
    the hook runs before the backward pass does. It then waits for the end of the pass.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    hooks = unit._backward_hooks
    for key, hook in list(hooks.items()):

        def later(*args: Any, hook: Any = hook) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: hook(*args))

        hooks[key] = later


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    train, engine = config.train, config.engine
    microbatch = train.microbatch_tokens or train.batch_size_tokens
    numbers = max(1, engine.bucket_bytes // 4)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": numbers,
        "allgather_bucket_size": numbers,
        # Small parameters too: what stays whole on every rank would not be in a checkpoint's pieces.
        "stage3_param_persistence_threshold": 0,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": microbatch // config.parallel.data,
        "gradient_accumulation_steps": train.batch_size_tokens // microbatch,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }

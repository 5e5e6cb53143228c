"""Configs of training, evaluation and publishing: one dataclass for each group of conf/.

Plain typed dataclasses, registered as schemas in Hydra's ConfigStore by `launch.schema`; nothing heavy is imported.
Rules across fields live in `launch.validate`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from activation_store.config import SourceConfig, StoreConfig, SubjectConfig, TextConfig


class Span(StrEnum):
    """Target layers of a source layer: itself and all later ones (a CLT), or itself alone (per-layer transcoders)."""

    cross_layer = "cross_layer"
    per_layer = "per_layer"


class Scaling(StrEnum):
    """How activations are scaled before the model, from the store's statistics over the rows that training uses.

    `layer`: unit mean square per layer; `dimension`: unit mean square per layer and dimension; `standardize`: zero mean
    and unit variance per layer and dimension; `none`.
    """

    none = "none"
    layer = "layer"
    dimension = "dimension"
    standardize = "standardize"


class DecoderInit(StrEnum):
    """`uniform`: U(+-1/sqrt(L d)); `zeros`."""

    uniform = "uniform"
    zeros = "zeros"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The cross-layer transcoder's shape, scaling and initialisation."""

    # Features of each source layer.
    n_features: int = 768
    # Target layers of a source: cross_layer (CLT) or per_layer (PLT).
    span: Span = Span.cross_layer
    # Adds W_skip[t] mlp_in[t] to the reconstruction of layer t.
    skip: bool = False
    # Scaling of inputs and of targets (scaled units are those of the loss).
    input_scaling: Scaling = Scaling.dimension
    target_scaling: Scaling = Scaling.layer
    # Encoder init U(+-encoder_scale/sqrt(n_features)).
    encoder_init_scale: float = 1.0
    decoder_init: DecoderInit = DecoderInit.uniform
    # Share of (token, feature) pairs with pre > 0 (jumprelu: pre > theta) at the start, set through b_enc from data;
    # null: b_enc = 0.
    initial_density: float | None = None
    # Seed of the initialisation.
    seed: int = 0


class ActivationKind(StrEnum):
    """The sparse activation functions (science.md's equations are in `trainer.model.activation`)."""

    relu = "relu"
    jumprelu = "jumprelu"
    topk = "topk"
    batchtopk = "batchtopk"


class SelectionScope(StrEnum):
    """Whether top-k selects within each layer (k per token and layer) or over all layers (k * n_layers per token)."""

    layer = "layer"
    all_layers = "all_layers"


class Score(StrEnum):
    """What top-k selects by: the activation, or the activation times its decoder norm over all targets."""

    activation = "activation"
    decoder_norm = "decoder_norm"


class ThresholdScope(StrEnum):
    """Granularity of the calibrated threshold of the inference rule."""

    layer = "layer"
    feature = "feature"


@dataclass(kw_only=True, slots=True)
class ActivationConfig:
    """The activation function, its sparsity penalties and its dead-feature terms."""

    # The activation function.
    kind: ActivationKind = ActivationKind.topk
    # Active features per token and layer (topk, batchtopk).
    k: int = 16
    # k falls linearly from this to k over `k_anneal_fraction` of the steps; 0: constant.
    k_start: int = 0
    k_anneal_fraction: float = 0.0
    scope: SelectionScope = SelectionScope.layer
    score: Score = Score.activation
    # JumpReLU: initial theta, and the bandwidth eps of the straight-through estimator.
    threshold_init: float = 0.03
    bandwidth: float = 1.0
    # Coefficient and steepness of lambda * sum tanh(c * ||W_dec,i|| * a_i), ramped linearly over a share of training
    # (relu, jumprelu).
    tanh_lambda: float = 0.0
    tanh_c: float = 4.0
    # Coefficient and target of lambda * (2 / L0*) * (L0 - L0*)^2, L0 per token summed over layers (jumprelu).
    l0_lambda: float = 0.0
    l0_target: float = 0.0
    # Share of training over which both penalties ramp up linearly.
    penalty_ramp_fraction: float = 0.7
    # AuxK: coefficient (relative to the mse, both per token and summed over layers and d) and number of dead features
    # per token and layer that reconstruct the residual error; 0: off.
    auxk_coefficient: float = 0.03125
    auxk_k: int = 32
    # Coefficient of the pre-activation loss on dead features; 0: off.
    pre_act_lambda: float = 0.0
    # A feature is dead when silent for so many tokens; null: min(10M, a tenth of the run's tokens).
    dead_after_tokens: int | None = None
    # Inference rule: granularity of the calibrated threshold, and training rows that calibrate it.
    threshold_scope: ThresholdScope = ThresholdScope.layer
    calibration_tokens: int = 16_384
    # batchtopk: share of the steps, at the start, in which it selects per token, as topk does.
    per_token_fraction: float = 0.0
    # batchtopk: decay per step of the running threshold.
    threshold_decay: float = 0.99


class StateDtype(StrEnum):
    """Adam's moments of W_enc and W_dec: `fp32`; `bf16`, rounded stochastically; `int8`, 8 bit in blocks of at most 256
    of a row, rounded stochastically.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class ParamDtype(StrEnum):
    """W_enc and W_dec as the forward and backward pass see them. Their gradients are float32 either way."""

    fp32 = "fp32"
    bf16 = "bf16"


class Master(StrEnum):
    """What bf16 parameters are updated in: `fp32`, a copy that the optimizer keeps; `none`, stochastic rounding."""

    fp32 = "fp32"
    none = "none"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Adam, gradient clipping, and the precision of what Adam keeps."""

    # Learning rate after the warm-up.
    lr: float = 4e-3
    # Adam's decay rates of the two moments, and its epsilon.
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # Clip by the exact global norm; 0: off.
    clip_norm: float = 1.0
    # Adam's two moments of W_enc and W_dec: fp32 (8 bytes a parameter), bf16 (4) or int8 (2). Biases, thresholds and
    # W_skip keep fp32.
    state_dtype: StateDtype = StateDtype.fp32
    # W_enc and W_dec: fp32 (4 bytes a parameter) or bf16 (2; products with train.precision=bf16 then read them as they
    # are).
    param_dtype: ParamDtype = ParamDtype.fp32
    # With param_dtype=bf16: fp32 keeps a copy (4 bytes more), which is updated, saved, measured and published; none
    # rounds each update stochastically into the parameter.
    master: Master = Master.fp32
    # Update W_enc and W_dec inside the backward pass: their gradients never exist, which saves memory and time. Needs
    # clip_norm=0 and one microbatch per update. In steps with a second gradient (AuxK, pre-activation loss) they do.
    fused_update: bool = False


class DecayShape(StrEnum):
    """Shape of the learning rate's decay to `final_lr_fraction`."""

    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, constant, decay."""

    # Steps over which the rate rises linearly from 0.
    warmup_steps: int = 20
    # Share of the steps, at the end, over which the rate decays.
    decay_fraction: float = 0.8
    # Shape of the decay, and the share of the rate at which it ends.
    decay_shape: DecayShape = DecayShape.linear
    final_lr_fraction: float = 0.0


class Precision(StrEnum):
    """`fp32`, or `bf16`: matrix products under autocast with fp32 parameters, sums and optimizer."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    # Tokens to train on; more than the store holds: epochs, each in a new order.
    tokens: int = 142_000
    # Tokens of an update, and of one forward (a divisor; null: the same).
    batch_size_tokens: int = 512
    microbatch_tokens: int | None = None
    precision: Precision = Precision.fp32
    # Steps between checkpoints (0: only at the end), and how many of the newest are kept.
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    # Where checkpoints go, if not into the run folder: another folder, or s3://BUCKET/PREFIX (also gs://, az://), for
    # this run alone.
    checkpoint_path: str = ""
    # Train on while a checkpoint is written, from a copy in CPU memory as large as this process's part of it.
    async_checkpoint: bool = True
    # Steps between evaluations on the store's held-out rows; 0: only at the end.
    eval_every: int = 150
    # Steps between lines of metrics.jsonl.
    log_every: int = 10
    # Start over, discarding what the run folder holds.
    fresh: bool = False
    # Write a Chrome trace of three of the first steps of this call, a file for each rank, into the run folder.
    profile: bool = False


class DecoderSplit(StrEnum):
    """How decoders lie on the feature axis: `columns`, each rank its part of d_model of every feature (sparse codes
    travel); `rows`, each rank its own features' decoders whole (reconstructions are summed); `auto`: whichever is
    faster by a table of measured steps (where nothing was measured, whichever moves fewer bytes), decided before step 1
    and logged; evaluate takes columns, or rows where d_model does not divide.
    """

    auto = "auto"
    columns = "columns"
    rows = "rows"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """The device mesh. Processes (one a device, started by torchrun or srun) number data * feature."""

    # Ranks of the data axis (each sees its share of a batch) and of the feature axis (each holds its share of the
    # features).
    data: int = 1
    feature: int = 1
    # How decoders are split over the feature axis. A change goes through a checkpoint.
    decoder_split: DecoderSplit = DecoderSplit.auto


class EngineKind(StrEnum):
    """Who owns backward, clipping and the update, and what the ranks of the data axis share (docs/parallel.md).

    `plain`: gradients are summed. `fsdp`: torch's fully_shard; parameters, gradients and optimizer are sharded.
    `accelerate`: Hugging Face's, with torch's DDP. `deepspeed`: ZeRO.
    """

    plain = "plain"
    fsdp = "fsdp"
    accelerate = "accelerate"
    deepspeed = "deepspeed"


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The training engine."""

    # Which engine.
    kind: EngineKind = EngineKind.plain
    # Bytes of gradients that are summed over the data axis in one message, while the backward pass goes on.
    bucket_bytes: int = 33_554_432
    # deepspeed: what is sharded over the data axis: 1 the optimizer, 2 gradients too, 3 parameters too.
    zero_stage: int = 2
    # deepspeed: keep the optimizer's state, and update, in the memory of the CPU.
    offload_optimizer: bool = False


class KernelBackend(StrEnum):
    """Implementation of the sparse ops: `reference` is plain torch, `cpu` numba, `triton` for CUDA devices."""

    auto = "auto"
    reference = "reference"
    cpu = "cpu"
    triton = "triton"


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """Sparse kernels, and when to go dense instead."""

    # Which implementation: auto takes triton on CUDA, cpu (numba) on a CPU, and reference (plain torch) where these do
    # not run.
    backend: KernelBackend = KernelBackend.auto
    # A layer whose share of active entries (jumprelu: and band entries) exceeds this is computed by dense products;
    # null: where these are faster, as measured by `layerloom tune` on this machine, else from a table in the code.
    dense_above_density: float | None = None


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """`layerloom evaluate`: measurement on held-out documents."""

    # Held-out documents measured (0: all), and contexts of each, spread evenly over it.
    documents: int = 24
    contexts_per_document: int = 1
    # Contexts in one forward of the subject.
    batch_contexts: int = 4
    # Also run the replacement model (three more forwards of the whole subject).
    replacement: bool = True


class PublishFormat(StrEnum):
    """Layout of the published folder."""

    circuit_tracer = "circuit_tracer"


@dataclass(kw_only=True, slots=True)
class PublishConfig:
    """`layerloom publish`: weights, configuration, evaluation and model card in one folder."""

    # Which layout.
    format: PublishFormat = PublishFormat.circuit_tracer
    # Dtype of the published weights.
    dtype: str = "float32"
    # `scan` in config.yaml and the repository's name in the card, "org/name"; empty: layerloom/<folder name>.
    repo: str = ""
    # `model_name` in config.yaml: what circuit-tracer loads beside the weights; empty: the subject's
    # (subject.model_name).
    model_name: str = ""
    # Licence of the published weights (SPDX id).
    license: str = "apache-2.0"


class WandbMode(StrEnum):
    """Weights & Biases: off by default; offline needs no account."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """Metrics. `metrics.jsonl` in the run folder is always written."""

    # Whether metrics also go to Weights & Biases, and under which project and name (empty: the run folder's).
    wandb: WandbMode = WandbMode.disabled
    project: str = "layerloom"
    name: str = ""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What a training run is made of; the resolved one lies in the run folder as config.yaml."""

    subject: SubjectConfig = field(default_factory=SubjectConfig)
    text: TextConfig = field(default_factory=TextConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    # The run folder.
    run: str = "runs/demo/run"
    # auto (CUDA, else the CPU), cpu, cuda, cuda:1, ...
    device: str = "auto"

"""Rules of a run's config that need nothing but the config: checked before anything is read or written.

Pure and light to import; `launch.validate`, `layerloom train` and preflight all call `check_run_config`.
"""

from collections.abc import Callable, Iterator
from itertools import chain

from activation_store.config import SourceKind
from activation_store.errors import UserError
from trainer.config import (
    ActivationKind,
    DecoderInit,
    EngineKind,
    Master,
    ParallelConfig,
    ParamDtype,
    RunConfig,
    Score,
)

_TOP_K_KINDS = (ActivationKind.topk, ActivationKind.batchtopk)


def check_run_config(config: RunConfig) -> None:
    """Raises UserError with the first rule that `config` breaks: what was given, what is wanted, what to do."""
    rules: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
        _parallel,
        _model,
        _activation,
        _optim,
        _engine,
        _train,
        _source,
    )
    problem = next(chain.from_iterable(rule(config) for rule in rules), None)
    if problem is not None:
        raise UserError(problem)


def _parallel(config: RunConfig) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    for axis in ("data", "feature"):
        size = getattr(parallel, axis)
        if size < 1:
            yield f"parallel.{axis}={size} must be at least 1"
    ranks = parallel.data * parallel.feature
    key = "batch_size_tokens" if train.microbatch_tokens is None else "microbatch_tokens"
    microbatch = getattr(train, key)
    if microbatch % ranks:
        yield (
            f"train.{key}={microbatch} cannot be shared equally by {ranks} processes (parallel.data={parallel.data} x "
            f"parallel.feature={parallel.feature}); use {_nearest_multiples(microbatch, ranks)}"
        )
    n_features = config.model.n_features
    if n_features % parallel.feature:
        yield (
            f"model.n_features={n_features} is not divisible by parallel.feature={parallel.feature}; use "
            f"{_nearest_multiples(n_features, parallel.feature)}"
        )


def check_features(n_features: int, parallel: ParallelConfig) -> None:
    """Raises UserError where the features of a transcoder that is there cannot be split evenly."""
    if n_features % parallel.feature:
        raise UserError(
            f"the run's model.n_features={n_features} is not divisible by parallel.feature={parallel.feature}; use "
            f"parallel.feature={_nearest_divisors(n_features, parallel.feature)}"
        )


def check_columns(d_model: int, parallel: ParallelConfig) -> None:
    """Raises UserError where the columns of the decoders (known once the subject is) cannot be split evenly."""
    if d_model % parallel.feature:
        raise UserError(
            f"the subject's d_model={d_model} is not divisible by parallel.feature={parallel.feature}, and decoders "
            f"are split by its columns; use parallel.feature={_nearest_divisors(d_model, parallel.feature)}, or "
            "parallel.decoder_split=rows"
        )


def _model(config: RunConfig) -> Iterator[str]:
    model, store = config.model, config.store
    if model.n_features < 1:
        yield f"model.n_features={model.n_features} must be at least 1"
    if model.encoder_init_scale <= 0:
        yield f"model.encoder_init_scale={model.encoder_init_scale} must be greater than 0; 1.0 is the default"
    if model.initial_density is not None and not 0 < model.initial_density < 1:
        yield f"model.initial_density={model.initial_density} must lie between 0 and 1, or be null for b_enc = 0"
    if store.layer_stop is not None and store.layer_stop <= store.layer_start:
        yield (
            f"store.layer_stop={store.layer_stop} must be greater than store.layer_start={store.layer_start}; "
            "null means up to the last layer"
        )


def _activation(config: RunConfig) -> Iterator[str]:
    activation = config.activation
    if activation.kind in _TOP_K_KINDS:
        yield from _top_k(config)
    if activation.kind is ActivationKind.topk:
        yield from _per_token_top_k(config)
    if activation.kind is ActivationKind.jumprelu:
        for name in ("threshold_init", "bandwidth"):
            value = getattr(activation, name)
            if value <= 0:
                yield f"activation.{name}={value} must be greater than 0"
    yield from _penalties(config)
    yield from _dead_features(config)
    for name in ("k_anneal_fraction", "per_token_fraction", "penalty_ramp_fraction"):
        value = getattr(activation, name)
        if not 0 <= value <= 1:
            yield f"activation.{name}={value} must lie in [0, 1]: it is a share of the run's steps"
    for name in ("auxk_coefficient", "pre_act_lambda", "tanh_lambda", "l0_lambda"):
        value = getattr(activation, name)
        if value < 0:
            yield f"activation.{name}={value} must not be negative; 0 switches it off"
    if activation.calibration_tokens < 1:
        yield f"activation.calibration_tokens={activation.calibration_tokens} must be at least 1"
    if not 0 <= activation.threshold_decay < 1:
        yield f"activation.threshold_decay={activation.threshold_decay} must lie in [0, 1)"


def _per_token_top_k(config: RunConfig) -> Iterator[str]:
    activation = config.activation
    if activation.pre_act_lambda != 0:
        yield (
            f"activation.pre_act_lambda={activation.pre_act_lambda} has no threshold to refer to with "
            "activation.kind=topk; use 0 (AuxK revives dead features), or batchtopk, jumprelu or relu"
        )
    if activation.per_token_fraction != 0:
        yield (
            f"activation.per_token_fraction={activation.per_token_fraction} is for batchtopk; topk always selects per "
            "token: use 0, or activation=topk"
        )


def _dead_features(config: RunConfig) -> Iterator[str]:
    activation = config.activation
    if activation.auxk_coefficient > 0 and activation.auxk_k < 1:
        yield f"activation.auxk_k={activation.auxk_k} must be at least 1; activation.auxk_coefficient=0 is off"
    if activation.dead_after_tokens is not None and activation.dead_after_tokens < 1:
        yield f"activation.dead_after_tokens={activation.dead_after_tokens} must be at least 1, or null"


def _top_k(config: RunConfig) -> Iterator[str]:
    activation, n_features = config.activation, config.model.n_features
    if activation.score is Score.decoder_norm and config.model.decoder_init is DecoderInit.zeros:
        yield (
            "model.decoder_init=zeros makes every score 0 with activation.score=decoder_norm; use "
            "model.decoder_init=uniform, or activation.score=activation"
        )
    if not 1 <= activation.k <= n_features:
        yield (
            f"activation.k={activation.k} must lie between 1 and model.n_features={n_features}; "
            "lower k or raise n_features"
        )
    if activation.k_start and not activation.k <= activation.k_start <= n_features:
        yield (
            f"activation.k_start={activation.k_start} must lie between activation.k={activation.k} and "
            f"model.n_features={n_features}; 0 keeps k constant"
        )
    if activation.k_start > activation.k and activation.k_anneal_fraction == 0:
        yield (
            f"activation.k_start={activation.k_start} has no effect with activation.k_anneal_fraction=0; "
            "give the share of the steps over which k falls, such as 0.2"
        )


def _penalties(config: RunConfig) -> Iterator[str]:
    activation = config.activation
    if activation.tanh_lambda and activation.kind in _TOP_K_KINDS:
        yield (
            f"activation.tanh_lambda={activation.tanh_lambda} is for relu and jumprelu; "
            f"{activation.kind} sets its sparsity by activation.k: use 0"
        )
    if activation.l0_lambda and activation.kind is not ActivationKind.jumprelu:
        yield f"activation.l0_lambda={activation.l0_lambda} is for jumprelu, not {activation.kind}: use 0"
    if activation.l0_target and not activation.l0_lambda:
        yield (
            f"activation.l0_target={activation.l0_target} has no effect with activation.l0_lambda=0; give the "
            "coefficient of its penalty, such as 0.001, or use activation.l0_target=0"
        )
    if activation.l0_lambda and activation.l0_target <= 0:
        yield (
            f"activation.l0_target={activation.l0_target} must be greater than 0 with "
            f"activation.l0_lambda={activation.l0_lambda}; it is the L0 per token summed over layers"
        )


def _optim(config: RunConfig) -> Iterator[str]:
    optim, schedule = config.optim, config.schedule
    if optim.lr <= 0:
        yield f"optim.lr={optim.lr} must be greater than 0"
    for name in ("beta1", "beta2"):
        value = getattr(optim, name)
        if not 0 <= value < 1:
            yield f"optim.{name}={value} must lie in [0, 1)"
    if optim.eps < 0:
        yield f"optim.eps={optim.eps} must not be negative"
    if optim.clip_norm < 0:
        yield f"optim.clip_norm={optim.clip_norm} must not be negative; 0 switches clipping off"
    if optim.param_dtype is ParamDtype.fp32 and optim.master is Master.none:
        yield (
            "optim.master=none has no effect with optim.param_dtype=fp32, which is its own master; use "
            "optim.param_dtype=bf16, or optim.master=fp32"
        )
    if optim.fused_update:
        yield from _fused_update(config)
    if schedule.warmup_steps < 0:
        yield f"schedule.warmup_steps={schedule.warmup_steps} must not be negative"
    for name in ("decay_fraction", "final_lr_fraction"):
        value = getattr(schedule, name)
        if not 0 <= value <= 1:
            yield f"schedule.{name}={value} must lie in [0, 1]"


def _fused_update(config: RunConfig) -> Iterator[str]:
    """An update inside the backward pass knows one gradient at a time, and once."""
    for name in ("state_dtype", "param_dtype"):
        if (value := getattr(config.optim, name)) != "fp32":
            yield f"optim.fused_update=true has no kernel for optim.{name}={value} yet; use fp32, or fused_update=false"
    if config.optim.clip_norm > 0:
        yield (
            f"optim.fused_update=true cannot clip by the global norm; set optim.clip_norm=0 "
            f"(got {config.optim.clip_norm})"
        )
    if config.train.microbatch_tokens not in {None, config.train.batch_size_tokens}:
        yield (
            f"optim.fused_update=true cannot add up microbatches; set train.microbatch_tokens=null "
            f"(got {config.train.microbatch_tokens})"
        )
    if config.activation.tanh_lambda > 0:
        yield (
            f"optim.fused_update=true has no place for the gradient of the tanh penalty's decoder norms; "
            f"set activation.tanh_lambda=0 (got {config.activation.tanh_lambda})"
        )


def _engine(config: RunConfig) -> Iterator[str]:
    engine, optim = config.engine, config.optim
    if engine.bucket_bytes < 1:
        yield f"engine.bucket_bytes={engine.bucket_bytes} must be at least 1; 33554432 is the default"
    if engine.zero_stage not in {1, 2, 3}:
        yield f"engine.zero_stage={engine.zero_stage} must be 1, 2 or 3; engine=plain shards nothing"
    if engine.offload_optimizer and engine.kind is not EngineKind.deepspeed:
        yield f"engine.offload_optimizer=true is for engine=deepspeed, not {engine.kind}; use false"
    if optim.fused_update and (engine.kind is not EngineKind.plain or config.parallel.data > 1):
        yield (
            "optim.fused_update=true has no gradients that could be summed over ranks; use it with engine=plain and "
            f"parallel.data=1 (got engine={engine.kind}, parallel.data={config.parallel.data}), or fused_update=false"
        )
    stored = {"param_dtype"} | (set() if engine.kind is EngineKind.accelerate else {"state_dtype"})
    if engine.kind is not EngineKind.plain:
        for name in sorted(stored):
            if (value := getattr(optim, name)) != "fp32":
                yield f"optim.{name}={value} is for engine=plain; with engine={engine.kind} use fp32"


def _train(config: RunConfig) -> Iterator[str]:
    train = config.train
    batch = train.batch_size_tokens
    if batch < 1:
        yield f"train.batch_size_tokens={batch} must be at least 1"
    microbatch = train.microbatch_tokens
    if microbatch is not None and (microbatch < 1 or batch % microbatch):
        yield (
            f"train.microbatch_tokens={microbatch} does not divide train.batch_size_tokens={batch}; "
            f"use {_nearest_divisor(batch, microbatch)}, or null for one forward per update"
        )
    if train.tokens < batch:
        yield (
            f"train.tokens={train.tokens} is less than one batch of train.batch_size_tokens={batch}; "
            "raise the former or lower the latter"
        )
    if train.keep_checkpoints < 1:
        yield f"train.keep_checkpoints={train.keep_checkpoints} must be at least 1"
    if train.log_every < 1:
        yield f"train.log_every={train.log_every} must be at least 1"
    for name in ("checkpoint_every", "eval_every"):
        value = getattr(train, name)
        if value < 0:
            yield f"train.{name}={value} must not be negative; 0 means only at the end"


def _source(config: RunConfig) -> Iterator[str]:
    source = config.source
    for name in ("pool_rows", "lanes", "run_rows", "threads", "statistics_tokens", "harvester_threads", "ring_bytes"):
        value = getattr(source, name)
        if value < 1:
            yield f"source.{name}={value} must be at least 1"
    for name in ("budget_bytes", "mixed_windows"):
        value = getattr(source, name)
        if value < 1:
            yield f"source.{name}={value} must be at least 1"
    if source.kind is SourceKind.rolling and config.train.checkpoint_every == 0:
        yield (
            "train.checkpoint_every=0 with source=rolling: the store makes room at checkpoints; give the steps between "
            "them, such as 100"
        )
    if source.prefetch_bytes < 0:
        yield f"source.prefetch_bytes={source.prefetch_bytes} must not be negative; 0 reads one batch ahead"
    if source.harvesters < 0:
        yield f"source.harvesters={source.harvesters} must not be negative; 0 is a thread of the training process"
    if not 0 < source.fill_fraction <= 1:
        yield (
            f"source.fill_fraction={source.fill_fraction} must be above 0 and at most 1: it is the share of the ring "
            "that is filled before a batch is drawn"
        )


def _nearest_multiples(number: int, factor: int) -> str:
    """The two next to `number`, or the one above what is too small."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"


def _nearest_divisors(whole: int, wanted: int) -> str:
    """The two next to `wanted`."""
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    below, above = [n for n in divisors if n < wanted], [n for n in divisors if n > wanted]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))


def _nearest_divisor(whole: int, wanted: int) -> int:
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))

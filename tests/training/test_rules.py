"""Every rule of a run's config refuses in one line that names the field, the value and a remedy."""

import pytest
from omegaconf import OmegaConf

from activation_store.errors import UserError
from trainer.config import ActivationKind, EngineKind, RunConfig
from trainer.rules import check_run_config

BROKEN = [
    ({"parallel.data": 0}, "parallel.data=0"),
    ({"parallel.data": 3, "parallel.feature": 2}, r"_tokens=512 .* 6 processes \(.*=3 x .*=2\); use 510 or 516"),
    ({"parallel.data": 3, "train.microbatch_tokens": 2}, "microbatch_tokens=2 .* 3 processes .* use 3"),
    ({"parallel.feature": 4, "model.n_features": 1025}, "n_features=1025 .* parallel.feature=4; use 1024 or 1028"),
    ({"parallel.feature": 0}, "parallel.feature=0"),
    ({"model.n_features": 0}, "model.n_features=0"),
    ({"model.encoder_init_scale": 0.0}, "encoder_init_scale"),
    ({"model.initial_density": 1.0}, "initial_density=1.0"),
    ({"store.layer_start": 3, "store.layer_stop": 3}, "store.layer_stop=3"),
    ({"activation.k": 2000}, "activation.k=2000 .* model.n_features=768"),
    ({"activation.k": 0}, "activation.k=0"),
    ({"activation.k_start": 4, "activation.k_anneal_fraction": 0.5}, "activation.k_start=4"),
    ({"activation.k_start": 64}, "k_anneal_fraction=0"),
    ({"activation.kind": "topk", "activation.pre_act_lambda": 0.1}, "pre_act_lambda=0.1 .*=topk"),
    ({"activation.kind": "topk", "activation.per_token_fraction": 0.5}, "per_token_fraction=0.5 is for batchtopk"),
    ({"activation.kind": "jumprelu", "activation.l0_target": 9.0}, "l0_target=9.0 has no effect .*l0_lambda=0"),
    ({"model.decoder_init": "zeros", "activation.score": "decoder_norm"}, "decoder_init=zeros .*score=decoder_norm"),
    ({"activation.kind": "jumprelu", "activation.threshold_init": 0.0}, "threshold_init=0.0"),
    ({"activation.kind": "jumprelu", "activation.bandwidth": -1.0}, "bandwidth=-1.0"),
    ({"activation.tanh_lambda": 0.1}, "tanh_lambda=0.1 .* topk"),
    ({"activation.kind": "relu", "activation.l0_lambda": 0.1}, "l0_lambda=0.1 .* relu"),
    ({"activation.kind": "jumprelu", "activation.l0_lambda": 0.1}, "l0_target=0.0"),
    ({"activation.penalty_ramp_fraction": 1.5}, "penalty_ramp_fraction=1.5"),
    ({"activation.auxk_coefficient": -1.0}, "auxk_coefficient=-1.0"),
    ({"activation.auxk_k": 0}, "auxk_k=0"),
    ({"activation.dead_after_tokens": 0}, "dead_after_tokens=0"),
    ({"activation.calibration_tokens": 0}, "calibration_tokens=0"),
    ({"activation.threshold_decay": 1.0}, "threshold_decay=1.0"),
    ({"optim.lr": 0.0}, "optim.lr=0.0"),
    ({"optim.beta2": 1.0}, "optim.beta2=1.0"),
    ({"optim.eps": -1.0}, "optim.eps=-1.0"),
    ({"optim.clip_norm": -1.0}, "clip_norm=-1.0"),
    ({"optim.master": "none"}, "optim.master=none .*param_dtype=fp32"),
    ({"optim.fused_update": True, "optim.clip_norm": 0.0, "optim.state_dtype": "int8"}, "optim.state_dtype=int8"),
    ({"optim.fused_update": True, "optim.clip_norm": 0.0, "optim.param_dtype": "bf16"}, "optim.param_dtype=bf16"),
    ({"optim.fused_update": True}, r"set optim.clip_norm=0 \(got 1.0\)"),
    ({"optim.fused_update": True, "optim.clip_norm": 0.0, "train.microbatch_tokens": 1}, r"\(got 1\)"),
    (
        {
            "optim.fused_update": True,
            "optim.clip_norm": 0.0,
            "activation.tanh_lambda": 0.1,
            "activation.kind": ActivationKind.relu,
        },
        "set activation.tanh_lambda=0",
    ),
    ({"engine.bucket_bytes": 0}, "engine.bucket_bytes=0"),
    ({"engine.zero_stage": 0}, "engine.zero_stage=0 .* engine=plain"),
    ({"engine.offload_optimizer": True}, "offload_optimizer=true is for engine=deepspeed, not plain"),
    (
        {"optim.fused_update": True, "optim.clip_norm": 0.0, "engine.kind": EngineKind.accelerate},
        r"fused_update=true .*parallel.data=1 \(got engine=accelerate, parallel.data=1\)",
    ),
    ({"engine.kind": EngineKind.fsdp, "optim.state_dtype": "bf16"}, "optim.state_dtype=bf16 is for engine=plain"),
    ({"engine.kind": EngineKind.accelerate, "optim.param_dtype": "bf16"}, "optim.param_dtype=bf16 .*accelerate"),
    ({"schedule.warmup_steps": -1}, "warmup_steps=-1"),
    ({"schedule.decay_fraction": 1.1}, "decay_fraction=1.1"),
    ({"train.batch_size_tokens": 0}, "batch_size_tokens=0"),
    ({"train.batch_size_tokens": 1000, "train.microbatch_tokens": 300}, "microbatch_tokens=300 .* use 250"),
    ({"train.tokens": 100}, "train.tokens=100 .*batch_size_tokens=512"),
    ({"train.keep_checkpoints": 0}, "keep_checkpoints=0"),
    ({"train.log_every": 0}, "log_every=0"),
    ({"train.eval_every": -1}, "eval_every=-1"),
    ({"source.pool_rows": 0}, "pool_rows=0"),
]


def _config(overrides: dict[str, object]) -> RunConfig:
    tree = OmegaConf.structured(RunConfig)
    for key, value in overrides.items():
        OmegaConf.update(tree, key, value)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig)
    return config


def test_the_defaults_break_no_rule() -> None:
    check_run_config(RunConfig())


@pytest.mark.parametrize(("overrides", "message"), BROKEN, ids=[str(list(case[0].items())) for case in BROKEN])
def test_a_broken_rule_is_named_in_one_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_run_config(_config(overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"activation.kind": "batchtopk", "activation.pre_act_lambda": 0.1},
        {"activation.kind": "relu", "activation.tanh_lambda": 0.1, "activation.k": 10**6},
        {"activation.kind": "jumprelu", "activation.l0_lambda": 0.1, "activation.l0_target": 20.0},
        {"activation.k_start": 64, "activation.k_anneal_fraction": 0.2},
        {"activation.kind": "batchtopk", "activation.per_token_fraction": 0.5},
        {"activation.kind": "jumprelu", "model.decoder_init": "zeros", "activation.score": "decoder_norm"},
        {"model.decoder_init": "zeros"},
        {"train.microbatch_tokens": 256},
    ],
    ids=str,
)
def test_what_is_sensible_is_let_through(overrides: dict[str, object]) -> None:
    check_run_config(_config(overrides))

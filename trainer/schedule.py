"""What changes over a run, each a pure function of the step: nothing to save, nothing to restore.

Steps count updates from 1 to `total_steps`; a value "at step n" is the one that update n uses.
"""

import math
from dataclasses import dataclass

from trainer.config import ActivationConfig, ActivationKind, DecayShape, OptimConfig, RunConfig, ScheduleConfig

_MOST_DEAD_AFTER_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate, k and penalty scale at every step of a run of `total_steps` updates."""

    total_steps: int
    optim: OptimConfig
    schedule: ScheduleConfig
    activation: ActivationConfig

    def learning_rate(self, step: int) -> float:
        """lr * min(warm-up, decay).

        Warm-up is step / warmup_steps: step `warmup_steps` has the full rate. The last D = round(decay_fraction *
        total_steps) steps decay: with p = (step - total_steps + D) / (D + 1), the factor is 1 - (1 - final) p (linear)
        or final + (1 - final) (1 + cos(pi p)) / 2 (cosine). It would be `final_lr_fraction` one step after the last,
        so that no step is spent at a rate of zero.
        """
        cfg = self.schedule
        warmup = min(1.0, step / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        return self.optim.lr * min(warmup, self._decay(step))

    def _decay(self, step: int) -> float:
        cfg = self.schedule
        decay_steps = round(cfg.decay_fraction * self.total_steps)
        into_decay = step - (self.total_steps - decay_steps)
        if into_decay <= 0:
            return 1.0
        share = into_decay / (decay_steps + 1)
        if cfg.decay_shape is DecayShape.cosine:
            return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * (1 + math.cos(math.pi * share)) / 2
        return 1 - (1 - cfg.final_lr_fraction) * share

    def k(self, step: int) -> int:
        """k per token and layer: k_start at step 1, falling linearly to k at round(k_anneal_fraction * total_steps)."""
        cfg = self.activation
        anneal_steps = round(cfg.k_anneal_fraction * self.total_steps)
        if not cfg.k_start or step >= anneal_steps:
            return cfg.k
        share = (step - 1) / (anneal_steps - 1)
        return round(cfg.k_start + (cfg.k - cfg.k_start) * share)

    def per_token(self, step: int) -> bool:
        """Whether batchtopk selects per token: in the first round(per_token_fraction * total_steps) steps."""
        return step <= round(self.activation.per_token_fraction * self.total_steps)

    def penalty_scale(self, step: int) -> float:
        """Factor of both sparsity penalties: step / R up to 1, R = round(penalty_ramp_fraction * total_steps)."""
        ramp_steps = round(self.activation.penalty_ramp_fraction * self.total_steps)
        return min(1.0, step / ramp_steps) if ramp_steps else 1.0


def total_steps(config: RunConfig) -> int:
    """Updates of the run: whole batches in `train.tokens`."""
    return config.train.tokens // config.train.batch_size_tokens


def build_schedule(config: RunConfig) -> Schedule:
    """The schedule of a run."""
    return Schedule(
        total_steps=total_steps(config),
        optim=config.optim,
        schedule=config.schedule,
        activation=config.activation,
    )


def dead_after_tokens(config: RunConfig) -> int:
    """Tokens of silence after which a feature counts as dead: as given, else min(10M, a tenth of the run's tokens)."""
    given = config.activation.dead_after_tokens
    return given if given is not None else max(1, min(_MOST_DEAD_AFTER_TOKENS, config.train.tokens // 10))


def uses_k(kind: ActivationKind) -> bool:
    """Whether the activation has a k (and so the k schedule an effect)."""
    return kind in (ActivationKind.topk, ActivationKind.batchtopk)

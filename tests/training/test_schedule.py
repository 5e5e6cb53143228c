"""Schedules against values worked out by hand."""

import math
from itertools import pairwise

import pytest

from trainer.config import (
    ActivationConfig,
    DecayShape,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.schedule import Schedule, build_schedule, dead_after_tokens, total_steps


def _schedule(
    total: int, schedule: ScheduleConfig | None = None, activation: ActivationConfig | None = None
) -> Schedule:
    return Schedule(
        total_steps=total,
        optim=OptimConfig(lr=2.0),
        schedule=schedule or ScheduleConfig(warmup_steps=0, decay_fraction=0.0),
        activation=activation or ActivationConfig(),
    )


def test_warm_up_then_constant_then_linear_decay() -> None:
    cfg = ScheduleConfig(warmup_steps=4, decay_fraction=0.3, final_lr_fraction=0.2)
    schedule = _schedule(10, cfg)
    rates = [schedule.learning_rate(step) for step in range(1, 11)]
    # D = 3 decay steps, p = 1/4, 2/4, 3/4, factor 1 - 0.8 p
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8])


def test_cosine_decay_is_halfway_in_its_middle_and_never_zero() -> None:
    cfg = ScheduleConfig(warmup_steps=0, decay_fraction=0.7, decay_shape=DecayShape.cosine)
    schedule = _schedule(10, cfg)
    rates = [schedule.learning_rate(step) for step in range(1, 11)]
    assert rates[:3] == [2.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)  # p = 4/8
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert rates[9] > 0


def test_no_warm_up_and_no_decay_is_constant() -> None:
    schedule = _schedule(5)
    assert {schedule.learning_rate(step) for step in range(1, 6)} == {2.0}


def test_warm_up_longer_than_the_run_still_decays() -> None:
    schedule = _schedule(4, ScheduleConfig(warmup_steps=8, decay_fraction=0.5))
    rates = [schedule.learning_rate(step) for step in range(1, 5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, min(1.0, 2 / 3)])


def test_k_falls_linearly_to_k() -> None:
    activation = ActivationConfig(k=4, k_start=20, k_anneal_fraction=0.5)
    schedule = _schedule(10, activation=activation)
    assert [schedule.k(step) for step in range(1, 11)] == [20, 16, 12, 8, 4, 4, 4, 4, 4, 4]
    constant = _schedule(10, activation=ActivationConfig(k=16))
    assert {constant.k(step) for step in range(1, 11)} == {16}


@pytest.mark.parametrize("fraction", [0.1, 0.05, 1.0])
def test_k_reaches_k_whatever_the_share(fraction: float) -> None:
    activation = ActivationConfig(k=3, k_start=9, k_anneal_fraction=fraction)
    schedule = _schedule(10, activation=activation)
    assert schedule.k(10) == 3


def test_penalties_ramp_linearly() -> None:
    schedule = _schedule(10, activation=ActivationConfig(penalty_ramp_fraction=0.4))
    assert [schedule.penalty_scale(step) for step in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert _schedule(10, activation=ActivationConfig(penalty_ramp_fraction=0.0)).penalty_scale(1) == 1.0


def test_batchtopk_selects_per_token_at_first() -> None:
    schedule = _schedule(8, activation=ActivationConfig(per_token_fraction=0.25))
    assert [schedule.per_token(step) for step in range(1, 5)] == [True, True, False, False]
    assert not _schedule(8).per_token(1)


def test_whole_batches_are_counted_and_dead_after_has_its_default() -> None:
    config = RunConfig(train=TrainConfig(tokens=1_050, batch_size_tokens=100))
    assert total_steps(config) == 10
    assert build_schedule(config).total_steps == 10
    assert dead_after_tokens(config) == 105
    config.train.tokens = 10**9
    assert dead_after_tokens(config) == 10_000_000
    config.activation.dead_after_tokens = 7
    assert dead_after_tokens(config) == 7

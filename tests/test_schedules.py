"""Section 7, schedules: properties of the pure functions of progress, and the average of the weights."""
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train_gpt import (
    Config,
    UserError,
    ema_share,
    is_looping,
    lr_multiplier,
    muon_momentum,
    training_budget_seconds,
    training_progress,
)

TINY = 1e-9
share = st.floats(0.0, 1.0)


# --- progress
@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(0, 200_000), st.floats(1.0, 10_000.0), st.floats(0.0, 0.99),
       st.floats(0.0, 20_000.0))
def test_progress_is_the_further_of_steps_and_seconds(iterations, step, wallclock, reserved, elapsed):
    config = Config(iterations=iterations, max_wallclock_seconds=wallclock, gptq_reserve_seconds=reserved * wallclock)
    budget = training_budget_seconds(config)
    assert budget == wallclock - reserved * wallclock > 0
    progress = training_progress(config, step, elapsed)
    assert 0.0 <= progress <= 1.0
    assert progress == min(1.0, max(step / iterations, elapsed / budget))
    assert training_progress(config, step + 1, elapsed) >= progress
    assert training_progress(config, step, elapsed + 1.0) >= progress


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(0, 2000), st.floats(0.0, 1e9))
def test_without_a_wallclock_only_steps_count(iterations, step, elapsed):
    config = Config(iterations=iterations, max_wallclock_seconds=0.0)
    assert math.isinf(training_budget_seconds(config))
    assert training_progress(config, step, elapsed) == min(1.0, step / iterations)


def test_published_budget():
    """592 seconds of 600: the reserve of 8 seconds is kept back."""
    assert training_budget_seconds(Config()) == 592.0
    assert training_progress(Config(), 0, 0.0) == 0.0
    assert training_progress(Config(), 0, 296.0) == 0.5
    assert training_progress(Config(), 20_000, 0.0) == 1.0
    assert training_progress(Config(), 1, 592.0) == training_progress(Config(), 1, 700.0) == 1.0


# --- learning rate
@settings(deadline=None)
@given(share, share, share, share)
def test_lr_is_bounded_falls_and_keeps_its_floor(frac, floor, first, second):
    config = Config(warmdown_frac=frac, min_lr=floor)
    early, late = sorted((first, second))
    a, b = lr_multiplier(config, early), lr_multiplier(config, late)
    assert floor - TINY <= b <= a + TINY <= 1 + 2 * TINY
    if early < 1 - frac:
        assert a == 1.0


@settings(deadline=None)
@given(st.floats(0.05, 1.0), share, share)
def test_lr_is_linear_above_the_floor(frac, floor, progress):
    config = Config(warmdown_frac=frac, min_lr=floor)
    assume(progress > 1 - frac)
    assert lr_multiplier(config, progress) == pytest.approx(max((1 - progress) / frac, floor), abs=TINY)


@pytest.mark.parametrize("progress, expected", [
    (0.0, 1.0), (0.1499, 1.0), (0.15, 1.0), (0.575, 0.5), (0.9, 0.1 / 0.85), (0.915, 0.1), (0.95, 0.1), (1.0, 0.1)])
def test_lr_of_the_published_settings(progress, expected):
    assert lr_multiplier(Config(), progress) == pytest.approx(expected, abs=1e-12)


def test_lr_ends_of_the_range():
    assert lr_multiplier(Config(warmdown_frac=0.0, min_lr=0.0), 1.0) == 1.0
    assert lr_multiplier(Config(warmdown_frac=1.0, min_lr=0.0), 1.0) == 0.0
    assert lr_multiplier(Config(warmdown_frac=1.0, min_lr=0.0), 0.25) == 0.75


# --- momentum
@settings(deadline=None)
@given(st.floats(0.0, 0.9999), st.floats(0.0, 0.9999), st.integers(0, 2000), st.integers(0, 4000))
def test_momentum_warms_up_linearly(start, end, steps, step):
    config = Config(muon_momentum=end, muon_momentum_warmup_start=start, muon_momentum_warmup_steps=steps)
    value, following = muon_momentum(config, step), muon_momentum(config, step + 1)
    assert min(start, end) - TINY <= value <= max(start, end) + TINY
    assert abs(following - end) <= abs(value - end) + TINY
    if steps:
        assert muon_momentum(config, 0) == start
    if step >= steps:
        assert value == pytest.approx(end, abs=1e-12)
    elif step + 1 <= steps:
        assert following - value == pytest.approx((end - start) / steps, abs=TINY)


def test_momentum_of_the_published_settings():
    assert muon_momentum(Config(), 0) == 0.92
    assert muon_momentum(Config(), 750) == pytest.approx(0.945)
    assert muon_momentum(Config(), 1500) == muon_momentum(Config(), 9999) == pytest.approx(0.97)


# --- looping
@settings(deadline=None)
@given(share, share, st.integers(0, 3))
def test_looping_starts_once_and_stays(start, progress, loops):
    config = Config(enable_looping_at=start, num_loops=loops)
    assert is_looping(config, progress) is (loops > 0 and progress >= start)
    assert is_looping(config, start) is (loops > 0)
    if is_looping(config, progress):
        assert is_looping(config, min(progress + 0.1, 1.0))


# --- the average of the weights
@settings(deadline=None)
@given(st.floats(0.0, 0.9999), st.integers(0, 2 ** 32 - 1), st.integers(1, 40))
def test_running_average_is_the_bias_corrected_mean_of_the_history(decay, seed, steps):
    """lerp by ema_share after each step = sum of decay^age w / sum of decay^age; the initial weights have no part."""
    history = np.random.default_rng(seed).normal(size=steps)
    average = 1e6  # the initial value is forgotten wholly
    for step, weight in enumerate(history, 1):
        part = ema_share(decay, step)
        assert 0 < part <= 1 + TINY
        average += part * (weight - average)
    factors = decay ** np.arange(steps - 1, -1, -1.0)
    assert average == pytest.approx(float(factors @ history / factors.sum()), abs=1e-6)


@settings(deadline=None)
@given(st.floats(0.0, 0.9999), st.integers(1, 10_000))
def test_ema_share_falls_towards_one_minus_decay(decay, step):
    assert ema_share(decay, 1) == pytest.approx(1.0)
    assert 1 - decay <= ema_share(decay, step + 1) <= ema_share(decay, step) + TINY


@pytest.mark.parametrize("name", ["ema_decay", "beta1", "beta2"])
def test_a_decay_of_one_is_refused(name):
    """It has no bias-corrected mean: ema_share would divide by zero, and torch refuses such an AdamW."""
    with pytest.raises(UserError, match=name.upper()):
        Config(**{name: 1.0})

"""Section 7, schedules: properties of the pure functions of progress, and the average of the weights."""
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train_gpt import (
    Config,
    Stage,
    UserError,
    decay_multiplier,
    lr_multiplier,
    muon_momentum,
    scheduled,
    stage_at,
    stages,
    training_budget_seconds,
    training_progress,
    warmdown,
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
    a, b = lr_multiplier(config, early, 7), lr_multiplier(config, late, 7)
    assert floor - TINY <= b <= a + TINY <= 1 + 2 * TINY
    if early < 1 - frac:
        assert a == 1.0


@settings(deadline=None)
@given(st.floats(0.05, 1.0), share, share)
def test_lr_is_the_share_that_is_left_above_the_floor(frac, floor, progress):
    config = Config(warmdown_frac=frac, min_lr=floor)
    assume(progress > 1 - frac)
    assert lr_multiplier(config, progress, 7) == pytest.approx(max((1 - progress) / frac, floor), abs=TINY)


@pytest.mark.parametrize("progress, expected", [
    (0.0, 1.0), (0.1499, 1.0), (0.15, 1.0), (0.575, 0.5), (0.9, 0.1 / 0.85), (0.915, 0.1), (0.95, 0.1), (1.0, 0.1)])
def test_lr_of_the_published_settings(progress, expected):
    assert lr_multiplier(Config(), progress, 100) == pytest.approx(expected, abs=1e-12)


def test_lr_ends_of_the_range():
    assert lr_multiplier(Config(warmdown_frac=0.0, min_lr=0.0), 1.0, 9) == 1.0
    assert lr_multiplier(Config(warmdown_frac=1.0, min_lr=0.0), 1.0, 9) == 0.0
    assert lr_multiplier(Config(warmdown_frac=1.0, min_lr=0.0), 0.25, 9) == 0.75


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2000))
def test_warmdown_iters_are_the_last_steps_where_steps_end_the_training(iterations, window, step):
    """The first WARMDOWN_ITERS - iterations steps are missing where the run is shorter than its warmdown."""
    config = Config(iterations=iterations, max_wallclock_seconds=0, warmdown_iters=window, min_lr=0.0,
                    warmdown_frac=0.123)
    step %= iterations
    value = lr_multiplier(config, training_progress(config, step, 0.0), step)
    expected = min((iterations - step) / min(window, iterations), 1.0)
    assert value == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4000), st.floats(0.01, 1.0))
def test_warmdown_iters_are_turned_into_time_by_the_steps_so_far(step, window, progress):
    """As published: milliseconds left / (WARMDOWN_ITERS x milliseconds per step so far), at most 1."""
    config = Config(warmdown_iters=window, min_lr=0.0)
    budget = 1000.0 * training_budget_seconds(config)
    elapsed = progress * budget
    left, warmdown_time = max(budget - elapsed, 0.0), window * elapsed / step
    published = left / max(warmdown_time, 1e-9) if left <= warmdown_time < budget else None
    if published is not None:
        assert lr_multiplier(config, progress, step) == pytest.approx(published, abs=1e-6)
    elif warmdown_time < budget:
        assert lr_multiplier(config, progress, step) == 1.0
    else:
        assert lr_multiplier(config, progress, step) == pytest.approx(1 - progress)


def test_warmdown_iters_do_not_divide_by_zero_at_the_start():
    config = Config(warmdown_iters=3500)
    assert [lr_multiplier(config, *start) for start in ((0.0, 0), (0.5, 0), (0.0, 5))] == [1.0] * 3


# --- weight decay
@settings(deadline=None)
@given(share, share, st.floats(0.0, 2.0))
def test_weight_decay_tapers_linearly_to_its_last_share(start, progress, last):
    config = Config(wd_taper_start_frac=start, wd_taper_final_mult=last)
    if not 0 < start < 1 or progress <= start:
        assert decay_multiplier(config, progress) == 1.0
    else:
        expected = np.interp(progress, [start, 1.0], [1.0, last])
        assert decay_multiplier(config, progress) == pytest.approx(expected, abs=1e-6)
        assert decay_multiplier(config, 1.0) == pytest.approx(last, abs=TINY)


def test_weight_decay_of_the_published_taper():
    config = Config(wd_taper_start_frac=0.7)
    values = [decay_multiplier(config, progress) for progress in (0.0, 0.7, 0.85, 1.0)]
    assert values == pytest.approx([1.0, 1.0, 0.75, 0.5])
    assert decay_multiplier(Config(), 1.0) == 1.0


# --- schedules in words
@pytest.mark.parametrize("text, values", [
    ("", {0.0: 7.0, 1.0: 7.0}), ("4@1", {0.0: 4.0, 0.5: 4.0, 1.0: 4.0}),
    ("1@0.25,2@0.5,4@1", {0.0: 1.0, 0.25: 1.0, 0.2501: 2.0, 0.5: 2.0, 0.5001: 4.0, 1.0: 4.0}),
    (" 4@0.5, 2@1 ", {0.0: 4.0, 0.5: 4.0, 0.75: 2.0, 1.0: 2.0})])
def test_a_value_holds_until_its_fraction(text, values):
    config = Config(train_seq_schedule=text, train_seq_len=4)
    assert {progress: scheduled(config, "train_seq_schedule", progress, 7.0) for progress in values} == values


@settings(deadline=None)
@given(share)
def test_learning_rates_go_with_the_root_of_the_batch(progress):
    plain, config = Config(), Config(batch_schedule="0.25@0.2,0.5@0.6,1@1")
    part = 0.25 if progress <= 0.2 else 0.5 if progress <= 0.6 else 1.0
    assert lr_multiplier(config, progress, 9) == pytest.approx(lr_multiplier(plain, progress, 9) * math.sqrt(part))
    assert warmdown(config, progress, 9) == warmdown(plain, progress, 9)
    assert stage_at(config, progress, 9).batch_share == part


# --- stages
EVERYTHING = {"train_seq_len": 256, "train_seq_schedule": "64@0.1,128@0.5,256@1", "batch_schedule": "0.5@0.3,1@1",
              "qat_start": 0.85, "enable_looping_at": 0.35}


def test_a_stage_is_what_its_settings_say():
    config = Config(**EVERYTHING)
    expected = {0.0: (False, False, 64, 0.5), 0.1: (False, False, 64, 0.5), 0.2: (False, False, 128, 0.5),
                0.34: (False, False, 128, 1.0), 0.35: (True, False, 128, 1.0), 0.55: (True, False, 256, 1.0),
                0.85: (True, True, 256, 1.0), 1.0: (True, True, 256, 1.0)}
    assert {progress: stage_at(config, progress, 5) for progress in expected} == expected
    assert stage_at(Config(), 0.0, 0) == Stage(False, False, 2048, 1.0)
    assert isinstance(stage_at(config, 0.2, 0).seq_len, int)


def test_quantizing_begins_where_the_warmdown_falls_below_the_threshold():
    """The share of the batch has no part in it."""
    for batch_schedule in ("", "0.25@0.9,1@1"):
        config = Config(late_qat_threshold=0.5, warmdown_frac=0.4, batch_schedule=batch_schedule)
        assert [stage_at(config, progress, 9).quantizing for progress in (0.0, 0.7, 0.79, 0.81, 1.0)] \
            == [False, False, False, True, True]
    assert not any(stage_at(Config(min_lr=0.0), progress, 9).quantizing for progress in (0.0, 0.5, 1.0))


STAGED = [{}, EVERYTHING, {"num_loops": 0}, {"enable_looping_at": 0.0}, {"qat_start": 0.999},
          {"late_qat_threshold": 0.15},
          {**EVERYTHING, "late_qat_threshold": 0.5, "warmdown_iters": 5000, "qat_start": 0.0}]


@pytest.mark.parametrize("changes", STAGED, ids=lambda changes: " ".join(changes) or "default")
@pytest.mark.parametrize("iterations", [1, 8, 777, 5000])
def test_every_stage_that_a_run_passes_is_listed_with_its_share(changes, iterations):
    """What compiles before the clock starts must be all that training needs."""
    config = Config(**{"iterations": iterations, "max_wallclock_seconds": 0, **changes})
    listed = stages(config)
    assert sum(listed.values()) == pytest.approx(1.0)
    assert all(share > 0 for share in listed.values()) or config.warmdown_iters
    passed = [stage_at(config, training_progress(config, step, 0.0), step) for step in range(iterations)]
    assert set(passed) <= set(listed)
    assert list(dict.fromkeys(passed)) == [stage for stage in listed if stage in passed], "in the order of the run"
    if iterations == 5000:
        for stage, part in listed.items():
            assert passed.count(stage) / iterations == pytest.approx(part, abs=0.002)


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
    assert stage_at(config, progress, 1).looping is (loops > 0 and progress >= start)
    assert stage_at(config, start, 1).looping is (loops > 0)
    if stage_at(config, progress, 1).looping:
        assert stage_at(config, min(progress + 0.1, 1.0), 1).looping


# --- the average of the weights
@pytest.mark.parametrize("name", ["ema_decay", "beta1", "beta2"])
def test_a_decay_of_one_is_refused(name):
    """It has no bias-corrected mean: its average would divide by zero, and torch refuses such an AdamW."""
    with pytest.raises(UserError, match=name.upper()):
        Config(**{name: 1.0})


def test_short_intervals_and_stages_that_the_clock_decides_are_listed():
    short = stages(Config(train_seq_schedule="1024@0.5,512@0.5005,2048@1", num_loops=0))
    assert [stage.seq_len for stage in short] == [1024, 2048, 512] and sum(short.values()) == pytest.approx(1.0)
    clock = Config(train_seq_schedule="1024@0.9,2048@1", num_loops=0, warmdown_iters=3500, late_qat_threshold=0.15)
    assert {(stage.quantizing, stage.seq_len) for stage in stages(clock)} == {
        (False, 1024), (True, 1024), (False, 2048), (True, 2048)}
    passed = {stage_at(clock, step / 4500, step) for step in range(4500)}  # of 20,000: the clock ends it early
    assert passed <= set(stages(clock)) and any(stage.quantizing and stage.seq_len == 1024 for stage in passed)

"""Section 2, runtime (devices, log, atomic files, signals) and section 8, train: resuming, the clock, divergence."""
import errno
import os
import resource
import signal
import types
from dataclasses import replace

import pytest
import torch
from helpers import watch_steps
from hypothesis import given
from hypothesis import strategies as st
from program import SETTINGS, write_data

import train_gpt
from train_gpt import (
    Config,
    Interrupted,
    Log,
    StopRequest,
    Trainer,
    UserError,
    World,
    attention_sdpa,
    choose_device,
    open_dataset,
    stages,
    training_budget_seconds,
    write_atomic,
)


def world_of(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(data, tmp_path):
    """make(**changes) -> a Trainer whose steps' losses are kept in .losses; before(step) is called before a step."""
    made = []

    def build(data_path=data, world=None, before=None, **changes) -> Trainer:
        base, _ = Config.from_env({name: str(value) for name, value in SETTINGS.items()})
        config = replace(base, **{"data_path": str(data_path), "log_dir": str(tmp_path / "logs"), "run_id": "run",
                                  "data_dir": str(tmp_path / "none"), **changes})
        world = world or world_of()
        trainer = Trainer(config, world, Log(world, config), open_dataset(config, world_of()), attention_sdpa, False)
        watch_steps(trainer, before)
        made.append(trainer)
        return trainer

    yield build
    for trainer in made:
        trainer.loader.close()


def no_validation():
    raise AssertionError("nobody asked for a validation")


def train(trainer: Trainer, stop: StopRequest | None = None, validate=no_validation) -> Trainer:
    trainer.run(stop or StopRequest(), validate)
    return trainer


def log_lines(trainer: Trainer) -> list[str]:
    return trainer.log.path.read_text().splitlines()


def same_state(a: Trainer, b: Trainer) -> bool:
    """Bit for bit: weights, averages, optimizer."""
    states = [{"params": t.params, "averages": t.averages, **t.optimizer.state_dict()} for t in (a, b)]
    flat = [dict(flatten(state)) for state in states]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(flat[0][key], flat[1][key]) for key in flat[0])


def flatten(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), torch.as_tensor(value)


def interrupt_before(trainer_step: int, stop: StopRequest):
    """A signal that arrives during the step after `trainer_step` steps."""
    def before(trainer: Trainer) -> None:
        if trainer.step == trainer_step:
            stop.received = True
    return before


# --- resuming
@pytest.mark.parametrize("last", [1, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make, last):
    """Interrupted before and after looping starts."""
    whole, stop = train(make()), StopRequest()
    first = make(run_id="first", before=interrupt_before(last - 1, stop))
    with pytest.raises(Interrupted) as caught:
        train(first, stop)
    assert str(caught.value) == str(first.checkpoint_path) and first.step == last and not first.finished
    second = make(run_id="second", seed=7)  # the checkpoint decides, not the seed
    assert not same_state(first, second)
    second.load(str(caught.value))
    assert second.step == last and second.elapsed_seconds == first.elapsed_seconds and same_state(first, second)
    train(second)
    assert first.losses + second.losses == whole.losses and len(whole.losses) == 8
    assert same_state(second, whole) and second.finished and second.model.looping == whole.model.looping is True
    assert whole.losses[0] > whole.losses[-1] + 0.5, "it does not learn"


def test_a_run_may_resume_with_another_split_of_the_batch(make):
    """Plain rows, so that the split does not change what attention sees."""
    whole, stop = train(make(document_mask=False)), StopRequest()
    with pytest.raises(Interrupted):
        train(make(document_mask=False, before=interrupt_before(2, stop)), stop)
    second = make(document_mask=False, micro_batch_tokens=256, run_id="second")
    second.load(str(whole.checkpoint_path))
    train(second)
    assert second.config.accumulation_steps(1) == 2 and len(second.losses) == 5
    assert second.losses == pytest.approx(whole.losses[3:], abs=1e-5)
    assert second.tokens == whole.tokens == 8 * 512


def test_a_run_reads_the_stream_once_whatever_the_split_of_the_batch(make):
    """Plain rows, which stay in order."""
    seen = []
    for changes in ({}, {"micro_batch_tokens": 256}, {"batch_schedule": "0.5@0.5,1@1"}):
        trainer, used = make(iterations=4, document_mask=False, **changes), []

        def train_step(micro_batches, progress, original=trainer.train_step, used=used):
            used.extend(batch.ids for batch in micro_batches)
            return original(micro_batches, progress)

        trainer.train_step = train_step
        train(trainer)
        used = torch.cat(used, 1)[0].numpy()
        assert (used == trainer.loader.stream.slice(0, len(used))).all()
        seen.append((len(used), trainer.tokens))
    assert seen == [(2048, 2048), (2048, 2048), (3 * 256 + 512, 3 * 256 + 512)]


def test_a_finished_checkpoint_is_not_trained_on(make):
    whole = train(make())
    again = make(run_id="again", iterations=100)
    again.load(str(whole.checkpoint_path))
    assert again.finished and again.step == 8 and again.last_loss == whole.losses[-1]
    assert all(torch.equal(whole.params[name], again.params[name]) for name in whole.params)
    assert all(torch.equal(whole.averages[name], again.averages[name]) for name in whole.averages)


def test_warmup_leaves_no_trace(make):
    plain = train(make())
    warm = make(run_id="warm")
    seconds = warm.warmup(2)
    assert list(seconds) == list(stages(warm.config)) and [stage.looping for stage in seconds] == [False, True]
    assert min(seconds.values()) > 0 and len(warm.losses) == 4
    assert same_state(warm, make(run_id="fresh")) and not warm.optimizer.adam.state
    warm.losses.clear()
    train(warm)
    assert warm.losses == plain.losses and same_state(warm, plain)


def test_a_resumed_run_keeps_its_state_through_the_warmup(make):
    """As main does it: warm up, then load."""
    whole, stop = train(make()), StopRequest()
    with pytest.raises(Interrupted) as caught:
        train(make(run_id="first", before=interrupt_before(3, stop)), stop)
    second = make(run_id="second")
    second.warmup(1)
    second.losses.clear()
    second.load(str(caught.value))
    assert train(second).losses == whole.losses[4:]


@pytest.mark.parametrize("start, looping", [(0.0, [True] * 8), (0.5, [False] * 4 + [True] * 4), (1.0, [False] * 8)])
def test_looping_starts_at_its_fraction(make, start, looping):
    seen = []
    trainer = make(enable_looping_at=start, before=lambda trainer: seen.append(trainer.model.looping))
    train(trainer)
    assert seen == looping


def test_a_longer_training_may_resume_before_the_looping_of_the_checkpoint(make):
    """Its own schedule decides what the model does, not what it did when the checkpoint was written."""
    stop, seen = StopRequest(), []
    with pytest.raises(Interrupted) as caught:
        train(make(before=interrupt_before(4, stop)), stop)
    second = make(run_id="second", iterations=20, force_stop_step=9,
                  before=lambda trainer: seen.append(trainer.model.looping))
    second.load(str(caught.value))
    train(second)
    assert seen == [False, False, True, True]


# --- checkpoints that do not fit
def test_checkpoints_of_another_run_are_refused(make, tmp_path):
    path = str(train(make(iterations=1)).checkpoint_path)
    for changes, complaint in (({"qk_gain_init": 5.0, "rope_base": 500.0}, "ROPE_BASE=10000.0, now 500.0"),
                               ({"mlp_mult": 3.0}, "MLP_MULT=2.0, now 3.0"),
                               ({"document_mask": False}, "DOCUMENT_MASK=True, now False"),
                               ({"ema_decay": 0.0}, "EMA_DECAY>0=True, now False"),
                               ({"data_path": write_data(tmp_path / "other", 1)}, "use the same settings and data")):
        trainer = make(run_id="other", **changes)
        before = {name: p.clone() for name, p in trainer.params.items()}
        with pytest.raises(UserError) as caught:
            trainer.load(path)
        assert f"RESUME={path}" in str(caught.value) and complaint in str(caught.value)
        assert trainer.step == 0 and all(torch.equal(p, before[name]) for name, p in trainer.params.items())
    make(run_id="same").load(path)


def test_files_that_are_no_whole_checkpoint_are_refused(make, tmp_path):
    good = train(make(iterations=1)).checkpoint_path.read_bytes()
    trainer, broken = make(run_id="same"), tmp_path / "broken"
    for content in (b"", b"text", good[:-1000], good[:len(good) // 2], good[:100], b"PK" + good[2:50]):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="no readable checkpoint"):
            trainer.load(str(broken))
    torch.save({"weights": torch.ones(3)}, broken)
    with pytest.raises(UserError, match="no readable checkpoint"):
        trainer.load(str(broken))
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"RESUME={absent}: no readable checkpoint"):
            trainer.load(str(absent))
    broken.write_bytes(good)
    trainer.load(str(broken))


def test_other_learning_rates_and_lengths_may_resume(make):
    path = str(train(make(iterations=1)).checkpoint_path)
    trainer = make(run_id="more", matrix_lr=0.01, iterations=50, max_wallclock_seconds=100.0, eval_stride=8)
    trainer.load(path)
    assert trainer.step == 1


# --- divergence
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(make, value):
    def before(trainer):
        if trainer.step == 4:
            original = trainer.forward
            trainer.forward = lambda *batch: original(*batch) * value

    trainer = make(before=before, checkpoint_every_seconds=1e-9)
    with pytest.raises(UserError) as caught:
        train(trainer)
    text, path = str(caught.value), trainer.checkpoint_path
    assert f"train_loss:{value} at step 5" in text and f"Last checkpoint: {path}" in text and "MATRIX_LR" in text
    after = make(run_id="after")
    after.load(str(path))
    assert after.step == 4 and not after.finished and all(p.isfinite().all() for p in after.params.values())
    assert train(after).losses[0] == pytest.approx(train(make(run_id="whole")).losses[4], abs=1e-6)


def test_without_checkpoints_the_complaint_says_how_to_get_some(make):
    trainer = make(scalar_lr=1e38, tied_embed_lr=1e38)
    with pytest.raises(UserError, match=r"training diverged; .* Last checkpoint: none; CHECKPOINT_EVERY_SECONDS"):
        train(trainer)
    assert not trainer.checkpoint_path.exists()


def test_the_checkpoint_named_after_a_divergence_has_finite_weights(make):
    """The step that breaks the weights has a finite loss, so the checkpoint after it must not be the last one left."""
    trainer = make(tied_embed_lr=1e38, scalar_lr=1e38, checkpoint_every_seconds=1e-9)
    with pytest.raises(UserError, match="training diverged") as caught:
        train(trainer)
    path = str(caught.value).split("Last checkpoint: ")[1]
    if path.endswith(".checkpoint"):
        again = make(run_id="again")
        again.load(path)
        assert all(p.isfinite().all() for p in again.params.values())


# --- the clock
class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        stub = types.SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(train_gpt, "time", stub)

    def step(self, seconds: float):
        def before(trainer: Trainer) -> None:
            self.now += seconds
        return before

    def validate(self, seconds: float):
        def validate():
            self.now += seconds
            return types.SimpleNamespace(val_loss=1.0, val_bpb=1.0)
        return validate


@pytest.mark.parametrize("changes", [
    {}, {"val_loss_every": 1}, {"val_loss_every": 3}, {"checkpoint_every_seconds": 2.5}, {"ema_decay": 0.0},
    {"val_loss_every": 2, "checkpoint_every_seconds": 2.0}], ids=str)
@pytest.mark.parametrize("seconds", [1.0, 1.3, 4.9])
def test_training_ends_within_the_wallclock(make, monkeypatch, changes, seconds):
    """Budget 9.5 s: no step begins that would not end in time; validations do not count."""
    clock = Clock(monkeypatch)
    trainer = make(iterations=100, max_wallclock_seconds=10.0, gptq_reserve_seconds=0.5, before=clock.step(seconds),
                   **changes)
    train(trainer, validate=clock.validate(50.0))
    budget = training_budget_seconds(trainer.config)
    assert budget == 9.5 and trainer.elapsed_seconds == pytest.approx(seconds * len(trainer.losses))
    assert trainer.elapsed_seconds <= budget, "over the budget"
    assert trainer.elapsed_seconds + seconds > budget, "ended too early"
    assert any(line.startswith("stopping_early: wallclock_cap train_time:") for line in log_lines(trainer))


def test_writing_a_checkpoint_is_no_step(make, monkeypatch):
    """It takes 2 s of the wallclock, but the step behind it does not count as 3 s long: 7 steps, not 6, fit 9.5 s."""
    clock = Clock(monkeypatch)
    trainer = make(iterations=100, max_wallclock_seconds=10.0, gptq_reserve_seconds=0.5, before=clock.step(1.0),
                   checkpoint_every_seconds=5.0)
    save = trainer.save
    trainer.save = lambda: (save(), clock.step(0.0 if trainer.finished else 2.0)(trainer))
    train(trainer)
    assert len(trainer.losses) == 7 and trainer.elapsed_seconds == pytest.approx(9.0)


def test_a_resumed_run_ends_within_the_wallclock(make, monkeypatch):
    """The first step after resuming has no older one to judge by, but the checkpoint knows how long steps take."""
    clock, stop = Clock(monkeypatch), StopRequest()
    changes = {"iterations": 100, "max_wallclock_seconds": 10.0, "gptq_reserve_seconds": 0.5}

    def before(trainer):
        clock.now += 1.5
        stop.received = trainer.step == 5

    with pytest.raises(Interrupted) as caught:
        train(make(before=before, **changes), stop)
    second = make(run_id="second", before=clock.step(1.5), **changes)
    second.load(str(caught.value))
    train(second)
    assert second.elapsed_seconds <= 9.5


def test_time_spent_before_resuming_counts(make, monkeypatch):
    clock, stop = Clock(monkeypatch), StopRequest()
    changes = {"iterations": 100, "max_wallclock_seconds": 10.0, "gptq_reserve_seconds": 0.5}

    def before(trainer):
        clock.now += 1.0
        stop.received = trainer.step == 5

    with pytest.raises(Interrupted) as caught:
        train(make(before=before, **changes), stop)
    clock.now += 500.0
    second = make(run_id="second", before=clock.step(1.0), **changes)
    second.load(str(caught.value))
    train(second)
    assert second.step == 9 and second.elapsed_seconds == pytest.approx(9.0)


class LateWorld(World):
    """Rank 1 of two, which began 0.4 s after rank 0 and hears of rank 0's clock."""

    def sum(self, values, operation=None):
        if len(values) == 1:  # who was told to stop
            return values
        return [train_gpt.time.perf_counter() - self.trainer.start + (0.4 if self.trainer.losses else 0.0), *values[1:]]


@pytest.mark.parametrize("seconds", [1.02, 1.3])
@pytest.mark.parametrize("every", [0, 1, 4])
def test_all_ranks_stop_after_the_same_step(make, monkeypatch, seconds, every):
    """Each rank decides by the agreed clock alone, also after a validation: else one waits for the other for ever."""
    steps = []
    for rank in (0, 1):
        clock = Clock(monkeypatch)

        def before(trainer, clock=clock, rank=rank):  # in its first step rank 0 waits for rank 1
            clock.now += seconds + (0.4 if rank == 0 and not trainer.losses else 0.0)

        world = (World, LateWorld)[rank](0, 1, torch.device("cpu"), torch.float32)
        trainer = make(iterations=100, max_wallclock_seconds=10.0, gptq_reserve_seconds=0.2, world=world,
                       val_loss_every=every, before=before)
        world.trainer, world.rank = trainer, rank
        train(trainer, validate=clock.validate(7.0))
        steps.append(trainer.step)
    assert steps[0] == steps[1]


def test_validations_stop_the_clock(make, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = train(make(val_loss_every=3, before=clock.step(1.0)), validate=clock.validate(20.0))
    assert trainer.elapsed_seconds == pytest.approx(8.0)
    lines = [line for line in log_lines(trainer) if "val_loss:" in line]
    assert lines == [f"step:{step}/8 val_loss:1.0000 val_bpb:1.0000 train_time:{step}000ms paused_seconds:20.0"
                     for step in (3, 6)]


def test_validations_do_not_change_training(make):
    plain = train(make())
    watched = train(make(run_id="watched", val_loss_every=2),
                    validate=lambda: types.SimpleNamespace(val_loss=1.0, val_bpb=1.0))
    assert watched.losses == plain.losses


def test_checkpoints_are_written_at_intervals(make, monkeypatch):
    clock = Clock(monkeypatch)
    trainer = train(make(checkpoint_every_seconds=2.5, before=clock.step(1.0)))
    lines = [line for line in log_lines(trainer) if line.startswith("checkpoint ")]
    assert lines == [f"checkpoint step:{step} path:{trainer.checkpoint_path}" for step in (3, 6, 8)]
    assert sorted(p.name for p in trainer.checkpoint_path.parent.iterdir()) == ["run.checkpoint", "run.txt"]


def test_checkpoints_in_training_do_not_change_it(make):
    plain = train(make())
    saving = train(make(run_id="saving", checkpoint_every_seconds=1e-9))
    assert saving.losses == plain.losses and same_state(plain, saving)


def test_force_stop_step_ends_early_with_unchanged_schedules(make):
    whole, short = train(make()), train(make(run_id="short", force_stop_step=5))
    assert short.step == 5 and short.finished and short.losses == whole.losses[:5]
    later = train(make(run_id="later", force_stop_step=50, iterations=5))
    assert later.step in (5, 50)


def test_a_signal_saves_and_a_signal_in_the_last_step_is_not_lost(make):
    """It came while stopping was deferred: the program may not go on to quantize and score as if nothing was."""
    for last in (3, 7):
        stop = StopRequest()
        trainer = make(before=interrupt_before(last, stop))
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            train(trainer, stop)
        assert trainer.checkpoint_path.exists() and trainer.step == last + 1


# --- signals
def test_outside_training_a_signal_ends_the_program_at_once():
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)
    assert not stop.received


def test_in_training_the_first_signal_waits_repeats_count_once_and_the_second_ends(monkeypatch):
    clock, stop = Clock(monkeypatch), StopRequest()
    stop.deferred = True
    stop.handle(signal.SIGINT, None)
    assert stop.received
    for later in (0.1, 1.0, 0.8):  # a launcher passes the Ctrl-C on, more than once
        clock.now += later
        try:
            stop.handle(signal.SIGTERM, None)
        except KeyboardInterrupt:  # which would end pytest itself
            pytest.fail("a repeated signal ended the program")
    clock.now += 0.2
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_both_signals_are_installed():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        assert train_gpt.main({"ITERATIONS": "many"}) == 2
        handlers = [signal.getsignal(number) for number in numbers]
        stop = handlers[0].__self__
        assert isinstance(stop, StopRequest) and handlers == [stop.handle] * 2
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# --- files
def fail_with(error: BaseException):
    def write(file) -> None:
        file.write(b"half of the n")
        raise error
    return write


@pytest.mark.parametrize("error, reason", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos\nframe #0"), "unexpected pos")])
def test_a_failed_write_keeps_the_old_file(tmp_path, error, reason):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"), "LOG_DIR")
    with pytest.raises(UserError) as caught:
        write_atomic(path, fail_with(error), "LOG_DIR")
    assert str(path) in str(caught.value) and reason in str(caught.value) and "set LOG_DIR" in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path] and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("x")])
def test_an_interrupted_write_keeps_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"), "LOG_DIR")
    with pytest.raises(type(error)):
        write_atomic(path, fail_with(error), "LOG_DIR")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "a half-written file is left"


def test_a_full_disk_keeps_the_old_checkpoint(make):
    """A limit on the size of files stands in for the disk; torch's writer turns its error into another."""
    trainer = train(make(iterations=1))
    old = trainer.checkpoint_path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        with pytest.raises(UserError, match="LOG_DIR"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert trainer.checkpoint_path.read_bytes() == old
    assert sorted(p.name for p in trainer.checkpoint_path.parent.iterdir()) == ["run.checkpoint", "run.txt"]


def test_write_atomic_makes_folders_and_names_the_variable_where_it_cannot(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "file", lambda file: file.write(b"x"), "LOG_DIR")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with pytest.raises(UserError, match=r"Not a directory; .* set ARTIFACT_PATH|File exists; .* set ARTIFACT_PATH"):
        write_atomic(tmp_path / "a" / "b" / "file" / "below", lambda file: file.write(b"x"), "ARTIFACT_PATH")


def test_only_rank_0_writes_the_log(tmp_path, capsys):
    config = Config(log_dir=str(tmp_path / "logs"), run_id="run", num_layers=12)
    source = b"# the source\nprint('\xc3\xa9')\n"
    other = Log(world_of(1, 2), config)
    train_gpt.write_run_header(other, config, world_of(1, 2), source)
    other("event")
    assert not (tmp_path / "logs").exists() and capsys.readouterr() == ("", "")
    log = Log(world_of(0, 2), config)
    train_gpt.write_run_header(log, config, world_of(0, 2), source)
    log("quiet", to_terminal=False)
    log.progress("not shown in a file")
    text = (tmp_path / "logs" / "run.txt").read_text()
    assert text.startswith(source.decode()) and text.endswith("\nquiet\n") and "not shown" not in text
    for part in ("=" * 100, "num_layers:12", "matrix_lr:0.026", "train_gpt:0.", f"torch:{torch.__version__}",
                 "device:cpu", "world_size:2", "source_sha256:"):
        assert part in text
    shown = capsys.readouterr().out
    assert "the source" not in shown and "quiet" not in shown and "num_layers" not in shown and "run_id:run" in shown
    Log(world_of(), config)("appended")
    assert (tmp_path / "logs" / "run.txt").read_text() == text + "appended\n"


def test_a_log_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"set LOG_DIR"):
        Log(world_of(), Config(log_dir=str(tmp_path / "file" / "logs"), run_id="run"))


# --- devices
def hardware(monkeypatch, gpus: int = 0, capability=(9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")


@pytest.mark.parametrize("machine, device, rank, chosen", [
    ({}, "auto", 0, "cpu"), ({"gpus": 1}, "auto", 0, "cuda:0"), ({"gpus": 8}, "auto", 7, "cuda:7"),
    ({"gpus": 1}, "cpu", 3, "cpu"), ({"gpus": 1, "capability": (7, 0)}, "cuda", 0, "cuda:0")])
def test_the_device_is_the_best_that_serves_all_processes(monkeypatch, machine, device, rank, chosen):
    hardware(monkeypatch, **machine)
    assert str(choose_device(Config(device=device), rank)) == chosen


@pytest.mark.parametrize("machine, device, rank, complaint", [
    ({}, "cuda", 0, "DEVICE=cuda: torch finds no CUDA device; .*DEVICE=cpu"),
    ({"gpus": 2}, "auto", 2, "3 or more ranks, 2 GPUs: lower --nproc_per_node")])
def test_devices_that_cannot_serve_are_refused(monkeypatch, machine, device, rank, complaint):
    hardware(monkeypatch, **machine)
    with pytest.raises(UserError, match=complaint):
        choose_device(Config(device=device), rank)


@given(st.floats(1, 1e4), st.floats(0, 1), st.integers(0, 100), st.floats(0, 2))
def test_progress_is_the_share_of_the_budget_that_is_further(wallclock, reserve, step, used):
    config = Config(max_wallclock_seconds=wallclock, gptq_reserve_seconds=reserve * wallclock * 0.9, iterations=100)
    budget = training_budget_seconds(config)
    assert train_gpt.training_progress(config, step, used * budget) == pytest.approx(min(max(step / 100, used), 1))
    unlimited = Config(max_wallclock_seconds=0, iterations=100)
    assert train_gpt.training_progress(unlimited, step, 1e9) == step / 100

"""Sections 7 to 9, options of the training: SWA, quantization-aware training, schedules, resuming."""
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import random_batch, randomize, single_world, tiny_environment, watch_steps
from helpers import tiny_config as any_tiny_config
from program import result_of, step_losses, write_data
from test_options_model import MANY
from test_train import interrupt_before, same_state, train

import train_gpt
from train_gpt import (
    GPT,
    PARAM_TABLE,
    QUANTIZERS,
    Config,
    Evaluator,
    Interrupted,
    Log,
    StopRequest,
    Trainer,
    attention_sdpa,
    fake_quantizer,
    open_dataset,
    quantize,
    quantizer_of,
    round_steps,
    sigma_steps,
)

TABLES = {"embedding", "head", "bigram_table"}
EVERY_BANK = {"bigram_hash_buckets": 20, "bigram_hash_dim": 6, "embed_dim": 20, "tie_embeddings": False,
              "depth_lora_rank": 3, "mlp_activation": "swiglu"}


def tiny_config(**changes) -> Config:
    """With quantizers that training can go through."""
    return any_tiny_config(**({"matrix_quantizer": "rtn", "embed_quantizer": "rtn", "target_bytes": 0} | changes))


def rtn_grid(weight: torch.Tensor, bits: int, clip_sigmas: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes, steps."""
    steps, levels = round_steps(sigma_steps(weight, bits, clip_sigmas)), 2 ** (bits - 1) - 1
    return (weight / steps).round().clamp(-levels, levels), steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(data, tmp_path):
    """make(**changes) -> a Trainer; before(trainer) and after(trainer) are called around each step."""
    made = []

    def build(before=None, after=None, **changes) -> Trainer:
        config = tiny_config(**{"data_path": str(data), "log_dir": str(tmp_path / "logs"), "run_id": "run",
                                "data_dir": str(tmp_path / "none"), "iterations": 8, "max_wallclock_seconds": 0.0,
                                "train_log_every": 1, **changes})
        world = single_world()
        dataset = open_dataset(config, world)
        trainer = Trainer(config, world, Log(world, config), dataset, attention_sdpa, "", fake_quantizer(config))
        trainer.dataset = dataset
        watch_steps(trainer, before, after)
        made.append(trainer)
        return trainer

    yield build
    for trainer in made:
        trainer.loader.close()


def copies(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def resumed(make, last: int, **changes) -> tuple[Trainer, Trainer]:
    """A training that is interrupted after `last` steps, and the one that continues it, finished."""
    stop = StopRequest()
    first = make(run_id="first", before=interrupt_before(last - 1, stop), **changes)
    with pytest.raises(Interrupted) as caught:
        train(first, stop)
    second = make(run_id="second", **changes)
    second.load(str(caught.value))
    assert first.step == second.step == last
    return first, train(second)


# --- stochastic weight averaging
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("every, expected", [(1, [8, 9, 10, 11, 12]), (2, [8, 10, 12]), (5, [10])])
def test_shipped_weights_are_the_mean_of_the_snapshots(make, ema_decay, every, expected):
    """The multiplier falls below 0.5 behind progress 0.505: step 8, which begins at 7 / 12, is the first there."""
    history = {}
    changes = {"iterations": 12, "swa_start_frac": 0.5, "swa_every": every, "warmdown_frac": 0.99,
               "ema_decay": ema_decay}
    trainer = train(make(after=lambda t: history.update({t.step + 1: copies(t.averages or t.params)}), **changes))
    assert trainer.num_snapshots == len(expected)
    trainer.use_averages()
    for name, shipped in trainer.params.items():
        naive = torch.stack([history[step][name].double() for step in expected]).mean(0)
        assert torch.allclose(shipped.double(), naive, rtol=1e-6, atol=1e-8), name
    assert not torch.equal(trainer.params["q_proj"], history[12]["q_proj"])


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_without_snapshots_the_ema_or_the_last_weights_are_shipped(make, ema_decay):
    trainer = train(make(ema_decay=ema_decay, swa_start_frac=0.5, swa_every=100))
    expected = copies(trainer.averages or trainer.params)
    assert trainer.num_snapshots == 0 and trainer.snapshots == {}
    trainer.use_averages()
    assert all(torch.equal(trainer.params[name], value) for name, value in expected.items())


@pytest.mark.parametrize("last", [3, 6, 7])
def test_snapshots_survive_an_interruption(make, last):
    changes = {"swa_start_frac": 0.6, "swa_every": 2, "ema_decay": 0.9}
    whole, (first, second) = train(make(**changes)), resumed(make, last, **changes)
    assert first.num_snapshots == {3: 0, 6: 1, 7: 1}[last] and second.num_snapshots == whole.num_snapshots == 2
    assert all(torch.equal(second.snapshots[name], whole.snapshots[name]) for name in whole.params)
    assert second.snapshots.keys() == whole.snapshots.keys() and same_state(second, whole)


# --- quantization-aware training
def on_the_grid(config: Config, params: dict) -> dict[str, torch.Tensor]:
    """Weights as the exporter would give them back, where QAT is meant to touch them."""
    result = copies(params)
    for name, (quantizer, arrays) in quantize(config, params).items():
        if quantizer == "rtn" and (config.qat_embedding or name not in TABLES):
            result[name] = QUANTIZERS[quantizer].decode(arrays, tuple(params[name].shape))
    return result


def model_with(config: Config, weights: dict, looping: bool = True) -> GPT:
    model = GPT(config)
    model.load_state_dict(weights)
    model.looping = looping
    return model


def gradients(model: GPT, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    nats = model(*batch)
    nats.mean().backward()
    return nats.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [
    {}, {"qat_embedding": True}, EVERY_BANK, {**EVERY_BANK, "qat_embedding": True},
    {"matrix_quantizer": "fp16", "qat_embedding": True}], ids=lambda changes: " ".join(changes) or "default")
def test_loss_and_gradients_are_those_of_the_quantized_weights(changes):
    """Straight through: what the quantized weights' gradients are, the weights themselves get."""
    config = tiny_config(matrix_bits=4, embed_bits=4, **changes)
    model, batch = model_with(config, GPT(config).state_dict()), random_batch(3, 96, 64)
    model.init_weights(0)
    randomize(model, 1)
    expected = gradients(model_with(config, on_the_grid(config, dict(model.named_parameters()))), batch)
    plain, before = model(*batch).detach(), copies(dict(model.named_parameters()))
    model.fake_quantize = fake_quantizer(config)
    nats, grads = gradients(model, batch)
    assert torch.allclose(nats, expected[0], atol=1e-4) and (nats - plain).abs().max() > 1e-2
    assert grads.keys() == expected[1].keys() >= {"embedding", "q_proj"}
    for name, grad in grads.items():
        assert torch.allclose(grad, expected[1][name], rtol=1e-3, atol=1e-5), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the weights themselves stay"
    assert torch.equal(model.eval()(*batch), model_with(config, before).eval()(*batch)), "evaluation is not quantized"


@pytest.mark.parametrize("changes, begins", [
    ({"qat_start": 0.5}, 4), ({"qat_start": 0.51}, 5), ({"late_qat_threshold": 0.3, "warmdown_frac": 1.0}, 6),
    ({"qat_start": 0.25, "qat_embedding": True, "enable_looping_at": 0.6}, 2), ({}, 8)], ids=str)
def test_training_goes_through_the_quantizer_from_its_stage_on(make, changes, begins):
    """The loss of every step is that of the weights before it, on the grid or not."""
    expected = []

    def before(trainer):
        config, params = trainer.config, dict(trainer.params)
        weights = on_the_grid(config, params) if trainer.step >= begins else copies(params)
        with torch.no_grad():
            reference = model_with(config, weights, trainer.model.looping)
            expected.append(torch.stack([reference(*batch).mean() for batch in trainer.batches]).mean().item())
        assert (trainer.model.fake_quantize is not None) == (trainer.step >= begins)

    trainer = train(make(before=before, matrix_bits=3, embed_bits=3, **changes))
    assert trainer.losses == pytest.approx(expected, abs=1e-5) and len(expected) == 8


def test_noise_is_for_looped_layers_alone():
    """Uniform within half a step of the grid, fresh each time; everything else is rounded."""
    config = tiny_config(qat_noise=True, loop_start=1, loop_end=2, qat_embedding=True, **EVERY_BANK)
    model = GPT(config)
    model.init_weights(0)
    randomize(model, 1)
    fake, seen = fake_quantizer(config), set()
    for name, parameter in model.named_parameters():
        if quantizer_of(config, name)[0] != "rtn":
            assert torch.equal(fake(name, 1, parameter), parameter)
            continue
        codes, scale = rtn_grid(parameter[0], *quantizer_of(config, name)[1:])
        for layer in (-1, 0, 1, 2, 3):
            ours, again = fake(name, layer, parameter[0]), fake(name, layer, parameter[0])
            if layer in (1, 2):
                draws = torch.stack([ours, again] + [fake(name, layer, parameter[0]) for _ in range(62)])
                shift = (draws - parameter[0]) / scale  # the smallest tensor has six entries: one draw is no sample
                assert shift.abs().max() <= 0.5 + 1e-3 and shift.std() > 0.25 and not torch.equal(ours, again)
                seen.add(name)
            else:
                assert torch.allclose(ours, codes * scale, atol=1e-6) and torch.equal(ours, again)
    assert {"q_proj", "down_proj", "q_adapter_in"} < seen and PARAM_TABLE.keys() > seen
    quiet = fake_quantizer(replace(config, num_loops=0, depth_lora_rank=0))
    assert torch.equal(quiet("q_proj", 1, model.q_proj[1]), quiet("q_proj", 1, model.q_proj[1]))


def test_noise_is_uniform_and_the_model_tells_the_layer():
    config = tiny_config(qat_noise=True, model_dim=256, rope_dims=8, loop_start=1, loop_end=2)
    model = GPT(config)
    model.init_weights(0)
    model.fake_quantize, model.looping = fake_quantizer(config), True
    banks = {name: p.detach().unbind(0) for name, p in model.named_parameters() if name in ("q_proj", "up_proj")}
    for visit in model.plans[1]:
        first, second = (model.visit_weights(banks, visit) for _ in range(2))
        for name, bank in banks.items():
            assert torch.equal(first[name], second[name]) != (visit.layer in (1, 2))
            if visit.layer == 1:
                shift = (first[name] - bank[1]) / rtn_grid(bank[1], *quantizer_of(config, name)[1:])[1]
                assert abs(float(shift.mean())) < 0.01 and float(shift.std()) == pytest.approx(12 ** -0.5, rel=0.02)


# --- the loss
@pytest.mark.parametrize("progress, count", [(0.0, 1), (0.3, 2), (0.7, 4)])
def test_loss_and_gradients_are_those_of_the_mean_over_micro_batches(make, monkeypatch, progress, count):
    """Their number changes between stages, and so does the weight of each."""
    trainer, seen = make(batch_schedule="0.25@0.2,0.5@0.6,1@1"), {}

    def step(loss, *_):
        seen.update({name: p.grad.clone() for name, p in trainer.params.items() if p.grad is not None})
        return loss, None

    monkeypatch.setattr(trainer.optimizer, "step", step)
    trainer.train_step(trainer.next_batches(0.9), 0.9)  # with another weight
    trainer.model.zero_grad()
    batches = trainer.next_batches(progress)
    trainer.train_step(batches, progress)
    trainer.model.zero_grad()
    loss = torch.stack([trainer.model(*batch).mean() for batch in batches]).mean()
    loss.backward()
    assert len(batches) == count and trainer.losses[1] == pytest.approx(loss.item(), abs=1e-5)
    for name, grad in seen.items():
        assert torch.allclose(grad, trainer.params[name].grad, rtol=1e-3, atol=1e-6), name
    assert {"embedding", "skip_weight"} < seen.keys()


def test_evaluation_knows_none_of_it(make):
    """The same weights have the same score, whatever the training's options."""
    plain = make()
    randomize(plain.model, 1)
    odd = make(z_loss=0.1, qat_start=1e-9, qat_embedding=True, matrix_bits=2,
               train_seq_schedule="16@0.5,64@1", batch_schedule="0.5@0.5,1@1")
    odd.model.load_state_dict(plain.model.state_dict())
    odd.next_batches(0.5)
    assert odd.model.fake_quantize and odd.stage.seq_len == 16
    scores = []
    for trainer in (plain, odd):
        trainer.model.eval()
        trainer.model.looping = True
        evaluator = Evaluator(trainer.config, trainer.world, trainer.log, trainer.dataset, "")
        scores.append(evaluator.score(trainer.forward, 64).nats)
    assert scores[0] == scores[1] > 0


# --- schedules
def test_the_batch_schedule_changes_tokens_and_learning_rates(make, monkeypatch):
    trainer, tokens, scales = make(batch_schedule="0.25@0.3,0.5@0.6,1@1", warmdown_frac=0.0), [], []
    step = trainer.optimizer.step

    def remember(loss, lr_scale, *rest):
        tokens.append(sum(batch.ids.numel() for batch in trainer.batches))
        scales.append(lr_scale)
        return step(loss, lr_scale, *rest)

    monkeypatch.setattr(trainer.optimizer, "step", remember)
    train(trainer)
    assert tokens == [128] * 3 + [256] * 2 + [512] * 3 and trainer.tokens == sum(tokens)
    assert scales == pytest.approx([0.5] * 3 + [math.sqrt(0.5)] * 2 + [1.0] * 3)


def test_the_weight_decay_tapers_with_progress_for_muon_alone(make):
    """Without gradients a step only shrinks: by lr x wd x multiplier."""
    seen = []
    trainer = make(wd_taper_start_frac=0.5, wd_taper_final_mult=0.0, tied_embed_lr=0.5)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *arguments: (seen.append(arguments[3]), step(*arguments))[1]
    train(trainer)
    assert seen == pytest.approx([1.0] * 5 + [0.75, 0.5, 0.25])
    trainer.optimizer.reset()
    before = copies(trainer.params)
    for parameter in trainer.params.values():
        parameter.grad = torch.zeros_like(parameter)
    step(torch.zeros(()), 1.0, 0.9, 0.25)
    for name, factor in (("q_proj", 1 - 0.026 * 0.095 * 0.25), ("embedding", 1 - 0.5 * 0.085)):
        assert torch.allclose(trainer.params[name], before[name] * factor, rtol=1e-6, atol=0), name


def test_the_length_schedule_cuts_segments(make):
    longest = []
    train(make(train_seq_schedule="16@0.3,32@0.6,64@1", before=lambda trainer: longest.append(max(
        int(batch.segments.boundaries.diff().max()) for batch in trainer.batches))))
    assert longest == [16] * 3 + [32] * 2 + [64] * 3


# --- all at once
ALL_AT_ONCE = {
    **MANY["many"], "train_seq_len": 64, "eval_seq_len": 96, "train_seq_schedule": "16@0.2,32@0.7,64@1",
    "batch_schedule": "0.5@0.4,1@1", "late_qat_threshold": 0.4,
    "qat_embedding": True, "swa_start_frac": 0.5, "swa_every": 1, "ema_decay": 0.9, "warmdown_iters": 8,
    "wd_taper_start_frac": 0.3, "normuon_beta2": 0.95,
    "muon_wd_after": True, "train_order": "strided"}


@pytest.mark.parametrize("last", [1, 3, 5, 7])
def test_many_options_at_once_resume_to_the_same_result(make, last):
    whole = train(make(**ALL_AT_ONCE))
    first, second = resumed(make, last, **ALL_AT_ONCE)
    assert first.losses + second.losses == whole.losses and whole.losses[-1] < whole.losses[0] - 0.3
    assert same_state(second, whole) and second.stage == whole.stage and second.stage.quantizing
    assert (second.num_snapshots, second.tokens) == (whole.num_snapshots, whole.tokens) and whole.num_snapshots > 1
    for trainer in (second, whole):
        trainer.use_averages()
    assert same_state(second, whole)


def test_the_program_runs_with_many_options_at_once(data, tmp_path, capsys):
    """From the settings to the score of the artifact, which QAT keeps near that of the weights; then once more."""
    def run(**changes):
        variables = {**ALL_AT_ONCE, "iterations": 16, "eval_mode": "packed", **changes}
        environment = tiny_environment(data, **{name: int(value) if isinstance(value, bool) else value
                                                for name, value in variables.items()}, log_dir=tmp_path)
        capsys.readouterr()
        code = train_gpt.main(environment)
        return code, *capsys.readouterr()

    code, out, err = run()
    assert (code, err) == (0, "") and len(step_losses(out)) == 16 and out.count("\nstage step:") >= 4
    stages = result_of(out)["stages"]
    assert stages["quantized"]["val_loss"] == pytest.approx(stages["averaged"]["val_loss"], abs=0.05)
    assert stages["averaged"]["val_loss"] < 3.9, "it does not learn"
    code, again, _ = run(resume=tmp_path / "run.checkpoint")
    assert code == 0 and not step_losses(again)
    for stage, score in result_of(again)["stages"].items():
        assert score["nats"] == stages[stage]["nats"]


# --- the temperature of evaluation
@pytest.mark.parametrize("changes", [{}, {"softcap_type": "poly5"}, {"softcap_type": "two_sided", "vocab_bias": True}])
def test_a_temperature_divides_the_logits_of_evaluation_alone(changes):
    model = GPT(tiny_config(**changes))
    model.init_weights(0)
    randomize(model, 1)
    ids, targets, segments = random_batch(0, 64, 16)
    with torch.no_grad():
        model.temperature = 1.3
        features = model.features(ids, segments)
        training, warm = model.train().logits(features), model.eval().logits(features)
        nats = model(ids, targets, segments)
        model.temperature = 1.0
        plain = model.logits(features)
    assert torch.equal(training, plain) and (plain - warm).abs().max() > 0.1
    torch.testing.assert_close(warm, plain / 1.3)
    torch.testing.assert_close(nats, -(plain / 1.3).log_softmax(-1).gather(1, targets.T)[:, 0], rtol=1e-4, atol=1e-4)


def unread_nats(trainer, temperature: float) -> float:
    """Of three micro-batches that training would have read next."""
    config, model, total = trainer.config, trainer.model, 0.0
    part = config.micro_batch_tokens
    for first in range(trainer.tokens, trainer.tokens + 3 * part, part):
        window = trainer.dataset.train.slice(first, part + 1)
        ids, targets, segments = train_gpt.window_batch(config, window, config.train_seq_len)
        with torch.no_grad():
            logits = model.eval().logits(model.features(ids, segments))
        total -= float((logits / temperature).log_softmax(-1).gather(1, targets.T).sum())
    model.train()
    return total


@pytest.mark.parametrize("scale", [1.4, 1.45])
def test_the_fitted_temperature_is_the_best_one_for_text_that_no_step_saw(make, scale):
    """A model whose head is scaled, so that it is neither too sure of itself nor too little."""
    trainer = train(make(eval_temperature=0.0, softcap_type="tanh", logit_softcap=1000.0, matrix_lr=0.05,
                         gptq_calibration_batches=3))
    with torch.no_grad():
        trainer.model.embedding.mul_(scale)  # features do not change: they are normalized
    grid = [round(0.9 + 0.01 * i, 2) for i in range(21)]
    nats = [unread_nats(trainer, t) for t in grid]
    found = train_gpt.fit_temperature(trainer.config, trainer)
    assert found == grid[nats.index(min(nats))] and 0.9 < found < 1.1
    assert trainer.model.training and trainer.model.temperature == 1.0  # not changed by trying


def test_a_temperature_is_not_fitted_to_text_that_was_read(make):
    trainer = make(eval_temperature=0.0, softcap_type="tanh", gptq_calibration_batches=3)
    part, total = trainer.config.micro_batch_tokens, len(trainer.dataset.train)
    found = []
    for left in (3, 2):  # micro-batches
        trainer.tokens = (total // part - left) * part
        found.append(train_gpt.fit_temperature(trainer.config, trainer))
    assert found[0] != found[1] == 1.0
    for given in (0.7, 1.0):
        assert train_gpt.fit_temperature(replace(trainer.config, eval_temperature=given), trainer) == given


@pytest.mark.parametrize("temperature", [0, 1.1])
def test_fitting_alone_counts_as_calibration(data, capsys, temperature):
    """Without a quantizer that is guided: the line in the log has the result's seconds, where there are any."""
    variables = tiny_environment(data, EVAL_MODE="packed", MATRIX_QUANTIZER="rtn", EMBED_QUANTIZER="rtn",
                                 EVAL_TEMPERATURE=temperature, GPTQ_CALIBRATION_BATCHES=2, RUN_ID=f"rtn{temperature}")
    assert train_gpt.main(variables) == 0
    output = capsys.readouterr().out
    seconds = re.findall(r"^calibration tokens:\d+ temperature:\d\.\d+ seconds:(\S+)$", output, re.MULTILINE)
    found = result_of(output)["calibration_seconds"]
    assert [float(x) for x in seconds] == ([found] if temperature == 0 else []) and (found > 0) == (temperature == 0)


def test_the_artifact_keeps_its_temperature(data, capsys):
    """A later score is that of the artifact, whatever the setting says then."""
    def score(**changes) -> dict:
        variables = tiny_environment(data, EVAL_MODE="packed", MATRIX_QUANTIZER="fp16", EMBED_QUANTIZER="fp16",
                                     TARGET_BYTES=0, **changes)
        assert train_gpt.main(variables) == 0
        return result_of(capsys.readouterr().out)["stages"]
    found = {t: score(EVAL_TEMPERATURE=t, RUN_ID=f"t{t}") for t in (1, 1.2)}
    assert found[1]["averaged"] == found[1.2]["averaged"] | {"seconds": found[1]["averaged"]["seconds"]}
    assert found[1.2]["quantized"]["nats"] != found[1]["quantized"]["nats"]
    path = Path(tiny_environment(data)["LOG_DIR"]) / "t1.2.artifact"
    assert train_gpt.read_artifact(path)[0]["temperature"] == 1.2
    for given in (0, 1, 1.1):
        again = score(EVAL_ONLY=path, EVAL_TEMPERATURE=given, RUN_ID=f"again{given}")
        assert again["quantized"]["nats"] == found[1.2]["quantized"]["nats"]

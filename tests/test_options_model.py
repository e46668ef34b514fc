"""Section 5, model: every option against reference.py's loops over tokens and heads, alone and many at once."""
import math

import numpy as np
import pytest
import reference
import torch
from helpers import random_batch, randomize, single_world, tiny_config

from train_gpt import (
    BOS,
    GPT,
    Config,
    Optimizer,
    bigram_buckets,
    make_batch,
    make_segments,
    param_shapes,
    poly5,
    rotary_frequencies,
    segment_mean,
    visit_plan,
)

LONGER = {"train_seq_len": 16, "eval_seq_len": 40}
BIGRAM = {"bigram_hash_buckets": 13, "bigram_hash_dim": 6}
FOUR_BY_THREE = {"loop_start": 0, "loop_end": 3, "num_loops": 2, "parallel_start_layer": 0}
OPTIONS = {  # name -> what differs from tiny_config
    "plain": {}, "value_residual": {"value_residual": True},
    "value_residual_no_loops": {"value_residual": True, "num_loops": 0},
    "dense_gate": {"attn_gate": "dense"}, "output_gate": {"attn_gate": "output"},
    "no_gate": {"sparse_attn_gate_scale": 0.0}, "no_rope": {"rope_dims": 0},
    "ntk": {"rope_scaling": "ntk", **LONGER}, "yarn": {"rope_scaling": "yarn", **LONGER},
    "ntk_stretch": {"rope_scaling": "ntk", "rope_stretch": 3.0},
    "yarn_stretch": {"rope_scaling": "yarn", "rope_stretch": 3.0},
    "smear_off": {"smear_gate": "off"}, "smear_static": {"smear_gate": "static"}, "smear_mean": {"smear_gate": "mean"},
    **{f"bigram_{kind}": {"bigram_hash": kind, **BIGRAM} for kind in ("92821", "36313", "1000003", "31")},
    "factored": {"embed_dim": 20}, "untied": {"tie_embeddings": False}, "vocab_bias": {"vocab_bias": True},
    "swiglu": {"mlp_activation": "swiglu"}, "mlp_hidden": {"mlp_hidden": 40},
    "projection_norm": {"projection_norm": True}, "poly5": {"softcap_type": "poly5", "logit_softcap": 8.0},
    "two_sided": {"softcap_type": "two_sided", "logit_softcap": 8.0}, "z_loss": {"z_loss": 0.01},
    "gptj": {"gptj_block": True}, "adapters": {"depth_lora_rank": 3},
    "four_by_three": {"depth_lora_rank": 2, **FOUR_BY_THREE}}
MANY = {
    "many": {
        "value_residual": True, "attn_gate": "dense", "rope_scaling": "yarn", **LONGER, "smear_gate": "static",
        "bigram_hash": "36313", **BIGRAM, "embed_dim": 20, "vocab_bias": True, "mlp_activation": "swiglu",
        "projection_norm": True, "softcap_type": "two_sided", "z_loss": 0.01, "gptj_block": True, "depth_lora_rank": 3,
        "logit_softcap": 8.0},
    "other_many": {
        "value_residual": True, "attn_gate": "output", "rope_scaling": "ntk", "rope_stretch": 2.0, "smear_gate": "mean",
        "bigram_hash": "1000003", **BIGRAM, "tie_embeddings": False, "mlp_hidden": 24, "softcap_type": "poly5",
        "logit_softcap": 8.0, "skip_gates_enabled": False, "ln_scale": False}}
ALL = OPTIONS | MANY


def model_of(changes: dict, looping: bool = True, training: bool = False) -> GPT:
    model = GPT(tiny_config(**changes))
    model.init_weights(0)
    randomize(model, 0)
    model.looping = looping
    return model.train(training)


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


@torch.no_grad()
def nats_of(model: GPT, *batch) -> torch.Tensor:
    return model(*batch)


def three_columns(seed: int, total: int = 18, seq_len: int = 7):
    """Targets with some that are absent, but in the first column."""
    ids, targets, segments = random_batch(seed, total, seq_len)
    others = np.random.default_rng(seed).integers(-1, 64, (2, total))
    others[:, :3] = -1
    return ids, torch.cat((targets[0][:, None], torch.from_numpy(others.T)), 1)[None], segments


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_nats_are_those_of_the_reference(name, looping):
    """In evaluation and, where that differs, in training; three targets per token."""
    batch = ids, targets, segments = three_columns(1)
    for training in (False, True)[:1 + ("z_loss" in ALL[name] or "rope_scaling" in ALL[name])]:
        model = model_of(ALL[name], looping, training)
        expected = reference.option_nats(model.config, weights_of(model), ids[0], targets[0],
                                         segments.positions.tolist(), looping, training).detach()
        torch.testing.assert_close(nats_of(model, *batch).double(), expected, rtol=2e-4, atol=2e-4)
        assert (expected[targets[0] < 0] == 0).all() and (expected[targets[0] >= 0] > 0).all()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_every_option_changes_the_function(name):
    """With the same weights, where both models have them: an option that is read nowhere would not."""
    training = name == "z_loss"
    model, plain = model_of(OPTIONS[name], True, training), model_of({}, True, training)
    shapes = {key: p.shape for key, p in model.named_parameters()}
    plain.load_state_dict({key: p for key, p in plain.state_dict().items() if shapes.get(key) != p.shape}
                          | {key: p for key, p in model.state_dict().items()
                             if key in param_shapes(plain.config) and plain.get_parameter(key).shape == p.shape})
    batch = random_batch(2, 40, 40)
    assert (nats_of(model, *batch) - nats_of(plain, *batch)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MANY)
def test_gradients_of_many_options_are_those_of_the_reference(name):
    model = model_of(MANY[name], training=True).double()
    model.dtype = torch.float64
    ids, targets, segments = three_columns(3, 14)
    share = torch.tensor([1.0, 0.5, 0.25])
    (model(ids, targets, segments) * share).mean().backward()
    weights = weights_of(model)
    nats = reference.option_nats(model.config, weights, ids[0], targets[0], segments.positions.tolist(), True, True)
    gradients = torch.autograd.grad((nats * share).mean(), list(weights.values()))
    for (key, parameter), gradient in zip(model.named_parameters(), gradients):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        assert (parameter.grad - gradient).norm() < 2e-3 * gradient.norm(), key  # parts of it are float32


# --- off is the identity
@pytest.mark.parametrize("changes, base, values", [
    ({"value_residual": True}, {}, {"value_mix": [0.0, 1.0]}),
    ({"attn_gate": "dense"}, {"sparse_attn_gate_scale": 0.0}, {"attn_gate_bias": 40.0, "attn_gate": 0.0}),
    ({"attn_gate": "output"}, {"sparse_attn_gate_scale": 0.0}, {"attn_gate": 0.0}),
    ({"smear_gate": "static"}, {"smear_gate": "off"}, {"static_smear": 40.0}),
    ({"smear_gate": "mean"}, {"smear_gate": "off"}, {"mean_smear": 0.0}),
    ({}, {"smear_gate": "off"}, {"smear_scale": 0.0}),
    (BIGRAM, {}, {"bigram_proj": 0.0}), (BIGRAM, {}, {"bigram_table": 0.0}),
    ({"bigram_hash": "36313", **BIGRAM}, {}, {"bigram_scale": 0.0}),
    ({"vocab_bias": True}, {}, {"vocab_bias": 0.0}),
    ({"softcap_type": "two_sided"}, {}, {"softcap_scale": 0.0}),
    ({"depth_lora_rank": 3}, {}, {"q_adapter_out": 0.0, "v_adapter_out": 0.0}),
    ({"z_loss": 0.1}, {}, {}), ({"rope_scaling": "ntk"}, {}, {}), ({"rope_scaling": "yarn"}, {}, {})], ids=str)
def test_a_neutral_value_is_the_model_without_the_option(changes, base, values):
    """Bit for bit but for rounding; and the same weights otherwise."""
    model, plain = model_of(changes), model_of(base)
    with torch.no_grad():
        for key, value in values.items():
            model.get_parameter(key).copy_(torch.tensor(value).expand_as(model.get_parameter(key)))
    plain.load_state_dict({key: p for key, p in model.state_dict().items() if key in param_shapes(plain.config)})
    batch = random_batch(4, 48, 20)
    torch.testing.assert_close(nats_of(model, *batch), nats_of(plain, *batch), rtol=1e-5, atol=1e-5)
    for key, value in values.items():
        if value != [0.0, 1.0] and (key, value) != ("bigram_table", 0.0):  # and the value matters
            with torch.no_grad():
                model.get_parameter(key).add_(0.5 if value < 40 else -40.0)
            assert (nats_of(model, *batch) - nats_of(plain, *batch)).abs().max() > 1e-4, key


def test_initial_values_of_the_options():
    """Published: gates near 1, caps equal, hashed pairs and adapters silent but not dead, smear near the own token."""
    model = GPT(tiny_config(**MANY["many"]))
    model.init_weights(0)
    constants = {"attn_gate": 0, "attn_gate_bias": 4, "value_mix": 0.5, "static_smear": 3,
                 "bigram_proj": 0, "bigram_scale": 0.05, "vocab_bias": 0, "softcap_scale": 0, "q_adapter_out": 0,
                 "v_adapter_out": 0, "out_proj": 0, "down_proj": 0}
    for name, value in constants.items():
        assert (model.get_parameter(name) == value).all(), name
    assert model.get_parameter("bigram_table").std().item() == pytest.approx(0.01, rel=0.3)
    for name in ("q_adapter_in", "v_adapter_in"):
        bound = model.config.model_dim ** -0.5
        largest = model.get_parameter(name).abs().max().item()
        assert 0.9 * bound < largest <= bound
    for name in ("embed_in", "embed_out"):
        matrix = model.get_parameter(name)[0].detach()
        gram = matrix.T @ matrix if matrix.size(0) > matrix.size(1) else matrix @ matrix.T
        torch.testing.assert_close(gram, torch.eye(20), rtol=0, atol=1e-5)
    other = GPT(tiny_config(**MANY["other_many"]))
    other.init_weights(0)
    assert not other.get_parameter("head").any() and not other.get_parameter("mean_smear").any()


# --- value residual
def test_value_residual_reaches_only_layers_behind_the_loops():
    """The first layer's own attention and the later layers' are silenced: then its values matter to nobody else."""
    model = model_of({"num_layers": 6, "parallel_start_layer": 0, "xsa_last_n": 3, "value_residual": True,
                      "loop_start": 2, "loop_end": 3})
    assert model.get_parameter("value_mix").shape == (2, 2)
    batch = random_batch(5, 24, 24)
    with torch.no_grad():
        model.get_parameter("out_proj")[0] = 0
    model(*batch).mean().backward()
    gradient = model.get_parameter("v_proj").grad[0].clone()
    assert gradient.abs().max() > 1e-6  # not detached, as it is in PR #532
    model.zero_grad()
    with torch.no_grad():
        model.get_parameter("out_proj")[4:] = 0
    model(*batch).mean().backward()
    assert not model.get_parameter("v_proj").grad[0].any()
    assert model.get_parameter("v_proj").grad[1:4].abs().amax((1, 2)).min() > 1e-6


@pytest.mark.parametrize("changes, rows", [
    ({}, 2), ({"num_loops": 0}, 3), ({"loop_end": 2}, 1), ({"num_loops": 0, "loop_start": 99, "loop_end": 98}, 3)])
def test_value_residual_has_a_row_for_each_layer_behind_the_loops(changes, rows):
    assert param_shapes(tiny_config(value_residual=True, **changes))["value_mix"] == (rows, 2)


# --- rotary scaling
def table(config: Config, training: bool) -> torch.Tensor:
    return torch.tensor(reference.frequencies(config, training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stretch", [0.0, 2.5])
@pytest.mark.parametrize("scaling", ["none", "ntk", "yarn"])
def test_frequencies_are_the_published_formulas(scaling, stretch, training):
    for shape in ({"model_dim": 32, "rope_dims": 8}, {"model_dim": 256, "rope_dims": 96, "rope_base": 5000.0}):
        config = tiny_config(rope_scaling=scaling, rope_stretch=stretch, num_heads=2, train_seq_len=1024,
                             eval_seq_len=1408, **shape)
        ours, plain = rotary_frequencies(config, training), table(tiny_config(num_heads=2, **shape), True)
        torch.testing.assert_close(ours, table(config, training), rtol=1e-5, atol=0)
        scaled = scaling != "none" and (stretch > 0 or not training)
        assert torch.equal(ours, rotary_frequencies(tiny_config(num_heads=2, **shape), True)) is not scaled
        if scaled:  # the fastest pair keeps its speed; with yarn the slowest one is slowed down by the whole stretch
            whole = stretch or 1408 / 1024
            assert ours[0] == 1 and (ours[1:] <= plain[1:] * 1.0001).all()
            share = (plain[-1] / ours[-1]).item()
            assert share == pytest.approx(whole, rel=0.02 if scaling == "ntk" else 0.3) and share <= whole * 1.0001


def test_a_shorter_evaluation_is_not_scaled():
    short = tiny_config(rope_scaling="ntk", train_seq_len=64, eval_seq_len=32)
    assert torch.equal(rotary_frequencies(short, False), rotary_frequencies(short, True))


# --- smear
def test_running_mean_is_that_of_the_own_segment():
    random = np.random.default_rng(0)
    starts = np.array([0, 1, 2, 9, 10, 24])
    segments = make_segments(starts, 30, 14, 0)
    x = torch.from_numpy(random.normal(size=(30, 5)).astype(np.float32))
    mean = segment_mean(x, segments.positions)
    torch.testing.assert_close(mean, reference.mean_so_far(x, segments.positions.tolist()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean[starts], x[starts], rtol=1e-5, atol=1e-6)
    for place in (0, 5, 12, 29):
        changed = x.clone()
        changed[place] += 100
        after, end = segment_mean(changed, segments.positions), min([*starts[starts > place], 30])
        assert torch.equal(after[:place], mean[:place]) and (after[place:end] != mean[place:end]).all()
        torch.testing.assert_close(after[end:], mean[end:], rtol=1e-4, atol=1e-4)


def test_running_mean_is_exact_in_long_batches():
    """A micro-batch of the default size, in a channel that is far from 0: no digits are lost to other segments."""
    x = 50 + torch.randn(98304, 2, generator=torch.Generator().manual_seed(0))
    mean = segment_mean(x, torch.arange(98304) % 2048)
    expected = x.double().view(48, 2048, 2).cumsum(1) / torch.arange(1, 2049)[:, None]
    assert (mean.view(48, 2048, 2) - expected).abs().max() < 1e-3


# --- hashed pairs
@pytest.mark.parametrize("kind", ["92821", "36313", "1000003", "31"])
def test_all_pairs_share_a_single_bucket(kind):
    ids = torch.arange(50)
    assert torch.equal(bigram_buckets(ids, ids > 0, kind, 1), torch.zeros(50, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["92821", "36313", "1000003", "31"])
@pytest.mark.parametrize("buckets", [2, 4096, 10240])
def test_buckets_are_the_published_hashes(kind, buckets):
    random = np.random.default_rng(0)
    ids = random.integers(0, 8192, 500)
    starts = np.flatnonzero(random.random(500) < 0.1)
    starts = np.union1d([0], starts)
    segments = make_segments(starts, 500, 500, 0)
    ours = bigram_buckets(torch.from_numpy(ids), segments.positions != 0, kind, buckets)
    expected = [reference.bigram_bucket(kind, buckets, None if t in set(starts.tolist()) else int(ids[t - 1]),
                                        int(ids[t])) for t in range(500)]
    assert ours.tolist() == expected and min(expected) >= 0 and max(expected) < buckets
    if kind == "36313":  # the last row is for starts alone
        assert (np.flatnonzero(ours.numpy() == buckets - 1) == starts).all()
    if buckets > 2:
        assert len(set(expected)) > 300


@pytest.mark.parametrize("kind", ["92821", "36313", "1000003", "31"])
def test_the_table_of_hashed_pairs_is_not_dead(kind):
    """PR #532's table and projection both start at zero and stay there for ever; ours learn, both of them."""
    config = tiny_config(bigram_hash=kind, **BIGRAM)
    model = GPT(config)
    model.init_weights(0)
    optimizer = Optimizer(config, single_world(), dict(model.named_parameters()))
    batch, before = random_batch(6, 64, 32), {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        loss = model(*batch).mean()
        loss.backward()
        gradients = {name: model.get_parameter(name).grad for name in before if name.startswith("bigram")}
        assert gradients["bigram_proj"].abs().max() > 0
        assert bool(gradients["bigram_table"].abs().max() > 0) is (step > 0)
        optimizer.step(loss.detach(), 1.0, 0.9)
    for name in before:
        if name.startswith("bigram"):
            assert not torch.equal(model.get_parameter(name), before[name]), name


# --- initial values
@pytest.mark.parametrize("vocab, width", [(200, 48), (24, 48)])
def test_overtone_init_has_the_singular_values_of_a_string(vocab, width):
    """s_k = s_1 / sqrt(k), with the singular vectors of the normal initial values."""
    models = [GPT(tiny_config(vocab_size=vocab, model_dim=width, embed_init=kind)) for kind in ("normal", "overtone")]
    for model in models:
        model.init_weights(3)
    normal, ours = (model.get_parameter("embedding").detach().double() for model in models)
    u, s, vh = torch.linalg.svd(normal, full_matrices=False)
    expected = torch.stack([s[0] / math.sqrt(k) for k in range(1, min(vocab, width) + 1)])
    torch.testing.assert_close(torch.linalg.svdvals(ours), expected, rtol=1e-4, atol=1e-7)
    inner = u.T @ ours @ vh.T
    torch.testing.assert_close(inner, expected.diag(), rtol=1e-4, atol=1e-6)
    assert torch.equal(models[0].get_parameter("q_proj"), models[1].get_parameter("q_proj"))


def test_phase_init_moves_from_the_embedding_to_the_stream():
    model = GPT(tiny_config(num_layers=10, parallel_start_layer=0, resid_mix_init="phase"))
    model.init_weights(0)
    mix = model.get_parameter("resid_mix").detach()
    for i in range(10):
        p = 1 / (1 + math.exp(-3 * (i / 9 - 0.5)))
        torch.testing.assert_close(mix[i, 0], torch.full((32,), p))
        torch.testing.assert_close(mix[i, 1], torch.full((32,), 1 - p))
    assert (round(mix[0, 0, 0].item(), 2), round(mix[9, 0, 0].item(), 2)) == (0.18, 0.82)
    one = GPT(tiny_config(num_layers=1, num_loops=0, parallel_start_layer=0, xsa_last_n=0, resid_mix_init="phase"))
    one.init_weights(0)
    assert one.get_parameter("resid_mix").isfinite().all()


def test_uniform_init_is_that_of_torchs_linear_layers():
    changes = {"model_dim": 64, "embed_dim": 48, "depth_lora_rank": 4, "mlp_mult": 3.0}
    uniform, plain = (GPT(tiny_config(matrix_init=kind, **changes)) for kind in ("uniform", "orthogonal"))
    uniform.init_weights(0)
    plain.init_weights(0)
    for name, columns in (("q_proj", 64), ("k_proj", 64), ("v_proj", 64), ("up_proj", 64), ("embed_in", 48),
                          ("embed_out", 64)):
        matrix, bound = uniform.get_parameter(name).detach(), columns ** -0.5
        assert 0.97 * bound < matrix.abs().max() <= bound, name
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(matrix.mean().item()) < 0.05 * bound
        assert not torch.equal(matrix, plain.get_parameter(name))
    assert not uniform.get_parameter("out_proj").any() and not uniform.get_parameter("down_proj").any()


# --- the head
def test_poly5_is_the_published_polynomial():
    u = torch.linspace(-4, 4, 801, dtype=torch.float64)
    for x, y in zip(u.tolist(), poly5(u).tolist()):
        c = min(max(x, -2.0), 2.0)
        assert y == pytest.approx(min(max(c * (1 - c ** 2 / 3 + c ** 4 / 15), -1.0), 1.0), abs=1e-12)
    assert poly5(torch.tensor([1.7, 9.0, -9.0])).tolist() == [1, 1, -1]


def test_two_sided_caps_are_really_trained():
    """The published AsymLogit never is: here both caps have a gradient, and one step of the optimizer moves both."""
    model = model_of({"softcap_type": "two_sided", "logit_softcap": 8.0}, training=True)
    scale = model.get_parameter("softcap_scale")
    torch.nn.init.zeros_(scale)
    batch = random_batch(7, 64, 32)
    features = model.features(batch[0], batch[2])
    raw, logits = features @ model.get_parameter("embedding").T, model.logits(features)
    torch.testing.assert_close(logits, 8 * torch.tanh(raw / 8), rtol=1e-5, atol=1e-5)
    assert (raw > 0).any() and (raw < 0).any()
    optimizer = Optimizer(model.config, single_world(), dict(model.named_parameters()))
    loss = model(*batch).mean()
    loss.backward()
    assert scale.grad is not None and (scale.grad.abs() > 1e-5).all()
    optimizer.step(loss.detach(), 1.0, 0.9)
    assert (scale.abs() > 1e-3).all()
    with torch.no_grad():
        scale.copy_(torch.tensor([0.5, -0.5]))
        logits = model.logits(1e4 * features.detach())
    above, below = 8 * math.exp(0.5), 8 * math.exp(-0.5)
    assert logits.max().item() == pytest.approx(above) and logits.min().item() == pytest.approx(-below)


def test_z_loss_is_only_in_training_and_only_in_the_first_column():
    batch = three_columns(8)
    model, plain = model_of({"z_loss": 0.05}), model_of({})
    assert torch.equal(nats_of(model, *batch), nats_of(plain, *batch))
    difference = nats_of(model.train(), *batch) - nats_of(plain.train(), *batch)
    with torch.no_grad():
        log_sum = torch.logsumexp(plain.logits(plain.features(batch[0], batch[2])), -1)
    torch.testing.assert_close(difference[:, 0], 0.05 * log_sum.square(), rtol=1e-3, atol=1e-4)
    assert (difference[:, 0] > 1e-3).all() and not difference[:, 1:].any()


@pytest.mark.parametrize("name", ["plain", "many", "other_many"])
def test_columns_of_targets_are_separate_calls(name):
    model, (ids, targets, segments) = model_of(ALL[name]), three_columns(9)
    columns = nats_of(model, ids, targets, segments)
    for c in range(3):
        torch.testing.assert_close(nats_of(model, ids, targets[:, :, c], segments), columns[:, c])
    model.train()
    model(ids, targets[:, :, 1:], segments)[:3].sum().backward()  # all absent
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if not model.config.z_loss:
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["many", "other_many", "poly5"])
def test_probabilities_sum_to_one(name):
    model, (ids, _, segments) = model_of(ALL[name]), random_batch(10, 12, 12)
    nats = nats_of(model, ids, torch.arange(64).expand(1, 12, 64), segments)
    torch.testing.assert_close((-nats.double()).exp().sum(1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-5)


# --- plans
@pytest.mark.parametrize("changes, looped, plain, adapters", [
    ({"num_layers": 9, "loop_start": 3, "loop_end": 5, "num_loops": 2},  # stem, core, tail: 3 / 3 x 3 / 3
     [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8], list(range(9)),
     [-1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1]),
    ({"num_layers": 4, "loop_start": 0, "loop_end": 3, "num_loops": 2},  # 4 unique x 3
     [0, 1, 2, 3] * 3, [0, 1, 2, 3], list(range(12))),
    ({"num_layers": 2, "loop_start": 0, "loop_end": 1, "num_loops": 4},  # 2 x 5
     [0, 1] * 5, [0, 1], list(range(10))),
    ({"num_layers": 5, "loop_start": 0, "loop_end": 4, "num_loops": 1},  # 5 x 2
     [0, 1, 2, 3, 4] * 2, [0, 1, 2, 3, 4], list(range(10))),
    ({"num_layers": 6, "loop_start": 2, "loop_end": 2, "num_loops": 3},
     [0, 1, 2, 2, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3, -1, -1, -1])])
def test_plans_of_shared_layers(changes, looped, plain, adapters):
    config = tiny_config(depth_lora_rank=2, parallel_start_layer=0, xsa_last_n=1, **changes)
    on, off = visit_plan(config, True), visit_plan(config, False)
    assert ([v.layer for v in on], [v.layer for v in off]) == (looped, plain)
    assert [v.adapter for v in on] == adapters
    first = {v.layer: v.adapter for v in reversed(on)}
    assert [v.adapter for v in off] == [first[layer] for layer in plain]
    shapes = param_shapes(config)
    assert shapes["q_adapter_in"][0] == shapes["v_adapter_out"][0] == max(adapters) + 1
    assert [v.push for v in on] == [i < len(on) // 2 for i in range(len(on))]
    without = visit_plan(tiny_config(parallel_start_layer=0, xsa_last_n=1, **changes), True)
    assert {v.adapter for v in without} == {-1}


def test_visits_of_a_looped_layer_use_their_own_adapters():
    """A row changes the nats where its visit takes place, and nowhere else."""
    model = model_of({"depth_lora_rank": 2})  # one looped layer, two visits
    batch = random_batch(11, 24, 24)
    for name in ("q_adapter_in", "q_adapter_out", "v_adapter_in", "v_adapter_out"):
        parameter = model.get_parameter(name)
        assert len(parameter) == 2
        for row in range(2):
            for looping in (False, True):
                model.looping = looping
                before = nats_of(model, *batch)
                with torch.no_grad():
                    parameter[row] += 0.5
                after = nats_of(model, *batch)
                with torch.no_grad():
                    parameter[row] -= 0.5
                assert torch.equal(before, after) is (row == 1 and not looping), (name, row, looping)


# --- sizes
EARLY = {"vocab_size": 1024, "num_layers": 9, "mlp_mult": 3.0, "rope_dims": 64, "ln_scale": False, "xsa_last_n": 0,
         "skip_gates_enabled": False, "num_loops": 0, "parallel_start_layer": 0, "sparse_attn_gate_scale": 0.0,
         "smear_gate": "off", "leaky_relu_slope": 0.0}
ELEVEN = {**EARLY, "num_layers": 11, "rope_dims": 16, "xsa_last_n": 4, "smear_gate": "static", "ln_scale": True,
          "bigram_hash": "36313"}
TERNARY = {**EARLY, "vocab_size": 8192, "embed_dim": 254, "model_dim": 768, "mlp_mult": 4.0, "vocab_bias": True,
           "projection_norm": True, "softcap_type": "poly5", "rope_dims": 96, "rope_scaling": "yarn"}
VALUE_EMBEDDINGS = 1024 * 128 + 128 * 256 + 1 + 2  # of 03-22 and 03-23: not an option here
UNUSED_HEAD = 8192 * 768  # of the ternary record and the binary one, counted but not stored


@pytest.mark.parametrize("published, missing, changes", [
    (21_778_504, 0, EARLY),  # MixedQuant
    (22_368_840, 0, {**EARLY, "smear_gate": "static", "bigram_hash_buckets": 4096}),  # SmearOrtho
    (26_993_756, VALUE_EMBEDDINGS, {**ELEVEN, "bigram_hash_buckets": 2048}),  # GPTQ-lite
    (26_928_220, VALUE_EMBEDDINGS, {**ELEVEN, "bigram_hash_buckets": 1536, "leaky_relu_slope": 0.5}),  # 03-23
    (26_469_573, 0, {**ELEVEN, "mlp_hidden": 1500, "bigram_hash_buckets": 2048, "attn_gate": "dense",
                     "value_residual": True}),  # PR #532
    (22_526_496, 0, {**EARLY, "num_layers": 4, "model_dim": 768, "rope_dims": 96, "loop_end": 3, "loop_start": 0,
                     "num_loops": 2, "depth_lora_rank": 4, "xsa_last_n": 3, "bigram_hash_buckets": 2048,
                     "bigram_hash": "1000003"}),  # PR #363, 4 x 3
    (106_154_616, UNUSED_HEAD, {**TERNARY, "num_layers": 15, "smear_gate": "mean"}),  # binary
    (73_685_840, UNUSED_HEAD, {**TERNARY, "num_layers": 10}),  # ternary, published as 73.7 M
    (35_943_512, 0, {"smear_gate": "off", "sparse_attn_gate_scale": 0.0, "parallel_start_layer": 0, "loop_start": 4,
                     "loop_end": 5}),  # SP8192 04-05
    (35_945_673 - 8 * (4 + 2), 0, {"softcap_type": "two_sided"})])  # PR #2135, less the lanes that nobody uses
def test_parameter_counts_of_the_published_models(published, missing, changes):
    config = Config(**{"softcap_type": "tanh", "eval_mode": "sliding"} | changes)
    assert sum(math.prod(shape) for shape in param_shapes(config).values()) + missing == published
    with torch.device("meta"):
        assert {name: tuple(p.shape) for name, p in GPT(config).named_parameters()} == param_shapes(config)


# --- causality
@pytest.mark.parametrize("name", ALL)
def test_a_token_changes_only_what_follows_it_in_its_segment(name):
    """Bit for bit."""
    model, starts = model_of(ALL[name]), [0, 1, 9, 14, 23]
    ids = np.random.default_rng(0).integers(2, 64, 23)
    ids[9] = BOS
    segments = make_segments(np.array(starts[:-1]), 23, 9, 0)
    before = nats_of(model, *make_batch(ids, ids, segments))
    for place in (0, 1, 5, 10, 13, 22):
        changed = ids.copy()
        changed[place] = 2 + (ids[place] + 20) % 62
        moved = (nats_of(model, *make_batch(changed, ids, segments)) != before).tolist()
        end = next(end for end in starts if end > place)
        assert not any(moved[:place]) and moved[place], place
        if model.config.smear_gate != "mean":  # whose running sums go through all segments, and so does their rounding
            assert not any(moved[end:]), place


@pytest.mark.parametrize("name", ["many", "other_many", "smear_mean"])
def test_documents_do_not_see_each_other_nor_where_they_stand(name):
    model, random = model_of(ALL[name]), np.random.default_rng(1)
    documents = [np.concatenate(([BOS], random.integers(2, 64, length))) for length in (9, 30, 14)]

    def together(order: list[int]) -> list[torch.Tensor]:
        parts = [documents[i] for i in order]
        lengths = [len(part) for part in parts]
        segments = make_segments(np.cumsum([0, *lengths[:-1]]), sum(lengths), 31, 0)
        nats = nats_of(model, *make_batch(np.concatenate(parts), np.concatenate(parts), segments)).split(lengths)
        return [nats[order.index(i)] for i in sorted(order)]

    for one, other, alone in zip(together([0, 1, 2]), together([2, 0, 1]), [together([i])[0] for i in range(3)]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)

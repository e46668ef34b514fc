"""Section 5, model: parameter counts, visit plan, the forward pass against reference.py, causality, initial values."""
import math
from pathlib import Path

import pytest
import reference
import torch
from helpers import random_batch, randomize, tiny_config

from train_gpt import (
    BOS,
    GPT,
    Config,
    Segments,
    cut_segments,
    exclusive,
    make_segments,
    norm,
    param_shapes,
    rotary,
    rotary_angles,
    rotary_frequencies,
    skip_rows,
    visit_plan,
)

PRESETS = Path(__file__).resolve().parent.parent / "presets"
PLAIN = {  # the naive baseline's model
    "leaky_relu_slope": 0.0, "rope_dims": 16, "ln_scale": False, "qk_gain_init": 1.5, "xsa_last_n": 0,
    "skip_gates_enabled": False, "num_loops": 0, "parallel_start_layer": 0, "sparse_attn_gate_scale": 0.0,
    "smear_gate": "off"}


def describe_plan(config, plan) -> str:
    """'0+ 1+ 3-0 8-3|': + keeps its output, -r takes a skip through row r, | is a two-lane block."""
    return " ".join(f"{v.layer}{'+' * v.push}{f'-{v.skip}' if v.skip >= 0 else ''}{'|' * v.parallel}"
                    for v in plan)


def preset(name: str) -> Config:
    lines = (line.split("=", 1) for line in (PRESETS / name).read_text().splitlines() if line[:1] not in ("", "#"))
    return Config.from_env(dict(lines))[0]


def starts_of(segments: Segments) -> list[int]:
    return (segments.positions == 0).nonzero()[:, 0].tolist()


def model_of(config: Config, looping: bool = False, seed: int = 0) -> GPT:
    model = GPT(config)
    model.init_weights(seed)
    randomize(model, seed)
    model.looping = looping
    return model


# --- counts and plans
@pytest.mark.parametrize("config, count", [
    (preset("r0427.env"), 35_945_671 - 8 * (4 + 2)),  # published: lane parameters in 8 layers that use none
    (preset("naive_baseline.env"), 17_059_912)])
def test_parameter_counts_of_the_published_models(config, count):
    assert sum(math.prod(shape) for shape in param_shapes(config).values()) == count
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == count


def test_plan_of_the_defaults_is_the_published_one():
    """Section 1.8: encoder, decoder, which encoder application each decoder layer takes."""
    config = Config()
    on, off = visit_plan(config, True), visit_plan(config, False)
    assert [v.layer for v in on if v.push] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [v.layer for v in on if not v.push] == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.layer for v in off if v.push] == [0, 1, 2, 3, 4]
    assert [v.layer for v in off if not v.push] == [5, 6, 7, 8, 9, 10]
    for plan, pairs in ((on, [(5, 7), (3, 6), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0), (10, None)]),
                        (off, [(5, 4), (6, 3), (7, 2), (8, 1), (9, 0), (10, None)])):
        kept, taken = [], []
        for i, visit in enumerate(plan):
            if not visit.push:
                taken.append((visit.layer, kept.pop() if visit.skip >= 0 else None))
            else:
                kept.append(i)
        assert taken == pairs
    assert [v.parallel for v in on] == [False] * 14 + [True] * 3
    assert {v.adapter for v in (*on, *off)} == {-1}
    assert len(skip_rows(config)) == 8
    assert describe_plan(config, off) == "0+ 1+ 2+ 3+ 4+ 5-0 6-4 7-5 8-6| 9-7| 10|"


@pytest.mark.parametrize("changes", [
    {}, {"num_loops": 3}, {"num_loops": 1, "loop_start": 0, "loop_end": 7}, {"num_loops": 0},
    {"num_layers": 6, "loop_start": 2, "loop_end": 2, "parallel_start_layer": 0, "xsa_last_n": 0}])
def test_skip_rows_belong_to_a_layer_and_its_occurrence(changes):
    config = Config(**changes)
    rows = skip_rows(config)
    assert sorted(rows.values()) == list(range(len(rows)))
    for looping in (False, True):
        encoder, decoder = reference.published_order(config, looping)
        plan = visit_plan(config, looping)
        assert [v.layer for v in plan] == encoder + decoder
        for j, visit in enumerate(plan[len(encoder):]):
            row = reference.skip_row(config, visit.layer, decoder[:j].count(visit.layer)) if j < len(encoder) else -1
            assert visit.skip == row


# --- the forward pass
@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("changes", [
    {}, PLAIN, {"num_loops": 2, "loop_start": 0, "loop_end": 1, "xsa_last_n": 4}, {"parallel_start_layer": 0},
    {"parallel_start_layer": 2, "num_heads": 4, "num_kv_heads": 2}, {"skip_gates_enabled": False, "ln_scale": False},
    {"num_layers": 1, "num_loops": 0, "parallel_start_layer": 0, "xsa_last_n": 1, "rope_dims": 0}])
def test_forward_equals_the_reference(changes, looping):
    config = tiny_config(**changes)
    model = model_of(config, looping)
    ids, targets, segments = random_batch(1, 40, 16)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = reference.forward(config, weights, ids[0], targets[0], starts_of(segments), looping)
    with torch.no_grad():
        nats = model(ids, targets, segments)
    assert nats.dtype == torch.float32 and nats.shape == (40,)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_the_reference():
    config = tiny_config()
    model = model_of(config, looping=True).double()
    model.dtype = torch.float64
    ids, targets, segments = random_batch(2, 20, 8)
    model(ids, targets, segments).mean().backward()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    nats = reference.forward(config, weights, ids[0], targets[0], starts_of(segments), True)
    for (name, parameter), gradient in zip(model.named_parameters(),
                                           torch.autograd.grad(nats.mean(), list(weights.values()))):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert (parameter.grad - gradient).norm() < 1e-3 * gradient.norm(), name  # logits are float32


def test_a_later_token_changes_nothing_before_it():
    config = tiny_config()
    model = model_of(config, looping=True)
    ids, targets, segments = random_batch(3, 48, 48)
    ids[0, 1:] = ids[0, 1:].clamp_min(2)  # one document
    segments = make_segments(cut_segments(ids[0].numpy(), 48, True), 48, 48, 0)
    with torch.no_grad():
        before = model(ids, targets, segments)
        for place in (1, 17, 47):
            changed = ids.clone()
            changed[0, place] = 2 + (changed[0, place] - 1) % 62
            after = model(changed, targets, segments)
            assert torch.equal(before[:place], after[:place])
            assert not torch.equal(before[place:], after[place:])


def test_documents_do_not_see_each_other_nor_where_they_stand():
    config = tiny_config()
    model = model_of(config, looping=True)
    random = torch.Generator().manual_seed(4)
    documents = [torch.cat((torch.tensor([BOS]), torch.randint(2, 64, (length,), generator=random)))
                 for length in (9, 30, 14)]

    def nats_of(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        ids = torch.cat(parts)
        segments = make_segments(cut_segments(ids.numpy(), 64, True), len(ids), 64, 0)
        with torch.no_grad():
            return list(model(ids[None], ids[None], segments).split([len(part) for part in parts]))

    together, alone = nats_of(documents), [nats_of([document])[0] for document in documents]
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    shuffled = nats_of([documents[2], documents[0], documents[1]])
    torch.testing.assert_close(shuffled[2], together[1], rtol=1e-5, atol=1e-5)


def test_empty_segments_change_nothing():
    config = tiny_config()
    model = model_of(config, looping=True)
    ids, targets, segments = random_batch(5, 64, 16)
    _, _, padded = random_batch(5, 64, 16, num_segments=40)
    assert padded.boundaries.numel() == 41 and padded.max_length == 16
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets, segments), model(ids, targets, padded), rtol=1e-5, atol=1e-5)


def test_columns_of_targets_are_separate_calls():
    config = tiny_config()
    model = model_of(config)
    ids, targets, segments = random_batch(6, 32, 16)
    other = (targets + 7) % 64
    with torch.no_grad():
        both = model(ids, torch.stack((targets, other), -1), segments)
        assert both.shape == (32, 2)
        torch.testing.assert_close(both[:, 0], model(ids, targets, segments))
        torch.testing.assert_close(both[:, 1], model(ids, other, segments))


def test_probabilities_sum_to_one():
    config = tiny_config()
    model = model_of(config)
    ids, _, segments = random_batch(7, 16, 16)
    every_token = torch.arange(64).expand(1, 16, 64)
    with torch.no_grad():
        nats = model(ids, every_token, segments)
    torch.testing.assert_close((-nats.double()).exp().sum(1), torch.ones(16, dtype=torch.float64), rtol=1e-5, atol=1e-5)


# --- pieces
def test_norm_uses_the_eps_of_the_published_model():
    x = torch.full((1, 8), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(norm(x), reference.rms(x))
    assert norm(torch.zeros(1, 8)).abs().max() == 0


def test_rotary_of_no_dimensions_is_the_identity():
    x, frequencies = torch.randn(5, 2, 8), rotary_frequencies(tiny_config(rope_dims=0), True)
    assert frequencies.numel() == 0 and torch.equal(rotary(x, *rotary_angles(torch.arange(5), frequencies)), x)


def test_rotary_turns_as_the_published_one():
    x, frequencies = torch.randn(5, 2, 16), rotary_frequencies(tiny_config(rope_base=500.0), True)
    places = torch.tensor([0, 1, 2, 0, 7], dtype=torch.int32)
    turned = rotary(x, *rotary_angles(places, frequencies))
    for t, place in enumerate(places.tolist()):
        for h in range(2):
            torch.testing.assert_close(turned[t, h], reference.rotate(x[t, h], place, 8, 500.0))


def test_exclusive_output_is_orthogonal_to_the_own_value():
    y, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    out = exclusive(y, v)
    torch.testing.assert_close(out, reference.exclude_own_value(y, v), rtol=1e-4, atol=1e-5)
    assert (out.unflatten(1, (2, 2)) * v[:, :, None]).sum(-1).abs().max() < 1e-4
    assert torch.equal(exclusive(y, torch.zeros_like(v)), y)
    torch.testing.assert_close(exclusive(y, 1e-6 * v), out, rtol=1e-4, atol=1e-5)  # however short the value is


def test_exclusive_computes_in_float32():
    y, v = torch.randn(6, 4, 8).bfloat16(), torch.randn(6, 2, 8).bfloat16()
    out = exclusive(y, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference.exclude_own_value(y.float(), v.float()), rtol=1e-4, atol=1e-5)


# --- initial values
def test_initial_values_are_the_published_ones():
    config = tiny_config(vocab_size=1000, model_dim=64)
    model = GPT(config)
    model.init_weights(0)
    w = {name: p.detach() for name, p in model.named_parameters()}
    for name in ("q_proj", "k_proj", "v_proj"):
        for matrix in w[name]:
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
    for matrix in w["up_proj"]:
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.size(1)), rtol=0, atol=1e-5)
    constants = {"out_proj": 0, "down_proj": 0, "q_gain": 5, "attn_gate": 0, "attn_scale": 1, "mlp_scale": 1,
                 "skip_weight": 1, "skip_gate": 0, "lane_resid": 1.1, "lane_mix": 1, "smear_gate": 0, "smear_scale": 0}
    for name, value in constants.items():
        assert torch.equal(w[name], torch.full_like(w[name], value)), name
    assert (w["resid_mix"][:, 0] == 1).all() and (w["resid_mix"][:, 1] == 0).all()
    assert w["embedding"].std().item() == pytest.approx(0.005, rel=0.02)
    assert set(w) == set(constants) | {"embedding", "q_proj", "k_proj", "v_proj", "up_proj", "resid_mix"}
    ids, targets, segments = random_batch(8, 64, 64, 1000)
    with torch.no_grad():
        assert model(ids, targets, segments).mean().item() == pytest.approx(math.log(1000), rel=2e-3)


def test_initial_values_depend_on_the_seed_alone():
    first, second, third = (GPT(tiny_config()) for _ in range(3))
    first.init_weights(1)
    second.init_weights(1)
    third.init_weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.q_proj, third.q_proj) and not torch.equal(first.embedding, third.embedding)


def test_bfloat16_activations_stay_close_to_float32():
    config = tiny_config()
    exact, rough = GPT(config), GPT(config, torch.bfloat16)
    exact.init_weights(0)
    rough.init_weights(0)
    ids, targets, segments = random_batch(9, 64, 32)
    with torch.no_grad():
        a, b = exact(ids, targets, segments), rough(ids, targets, segments)
    assert b.dtype == torch.float32 and all(p.dtype == torch.float32 for p in rough.parameters())
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)

"""What tests/test_model.py and tests/test_attention.py let pass: each test fails for one mutation of section 5."""
import sys
import types

import numpy as np
import pytest
import reference
import torch
from helpers import randomize, tiny_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train_gpt import (
    BOS,
    GPT,
    Segments,
    UserError,
    attention_sdpa,
    choose_attention,
    load_fa4,
    make_batch,
    make_segments,
    norm,
    param_shapes,
    skip_rows,
    visit_plan,
)

HOPPER = torch.device("cuda", 0)


def model_of(config) -> GPT:
    model = GPT(config)
    model.init_weights(0)
    randomize(model, 0)
    return model


# --- model
@pytest.mark.parametrize("smear_gate, unsmeared", [
    ("input", [0, 2, 4, 6]), ("static", [0, 2, 4, 6]), ("off", list(range(8))), ("mean", list(range(8)))])
def test_a_bos_inside_a_segment_takes_no_smear(smear_gate, unsmeared):
    """DOCUMENT_MASK=0 puts several documents in one segment; the published mask is by BOS. The mean is the blocks'."""
    model, ids = model_of(tiny_config(smear_gate=smear_gate)), np.array([5, 6, BOS, 7, 8, 9, BOS, 4])
    segments = make_segments(np.array([0, 4]), 8, 4, 0)
    embedded = model.embed(torch.from_numpy(ids)[None], segments)
    plain = norm(model.embedding[torch.from_numpy(ids)])
    assert [t for t in range(8) if torch.allclose(embedded[t], plain[t], atol=1e-6)] == unsmeared


def test_a_new_model_does_not_loop():
    assert GPT(tiny_config()).looping is False


def test_a_model_without_skips_has_no_empty_parameters():
    config = tiny_config(num_layers=1, num_loops=0, parallel_start_layer=0, xsa_last_n=0)
    assert not {"skip_weight", "skip_gate", "lane_resid", "lane_mix"} & set(param_shapes(config))


@st.composite
def model_settings(draw):
    """Any layers, loops and lanes that belong together."""
    layers = draw(st.integers(1, 12))
    first, last = sorted(draw(st.tuples(st.integers(0, layers - 1), st.integers(0, layers - 1))))
    try:
        return tiny_config(num_layers=layers, num_loops=draw(st.integers(0, 3)), loop_start=first, loop_end=last,
                           parallel_start_layer=draw(st.integers(0, layers - 1)), xsa_last_n=0,
                           depth_lora_rank=draw(st.integers(0, 2)))
    except UserError:
        assume(False)


@settings(deadline=None)
@given(model_settings())
def test_plans_of_any_settings(config):
    """Every kept output is taken once, rows keep their layer, lanes never join early, no parameter is unused.

    Every visit of a looped layer has an adapter of its own, in both plans the same one for its n-th visit.
    """
    layer_of, used = {row: layer for (layer, _), row in skip_rows(config).items()}, set()
    for looping in (False, True):
        plan = visit_plan(config, looping)
        encoder, decoder = reference.published_order(config, looping)
        assert [v.layer for v in plan] == encoder + decoder
        rows = [v.skip for v in plan if v.skip >= 0]
        assert len(set(rows)) == len(rows) == sum(v.push for v in plan)
        assert not any(v.push and v.skip >= 0 for v in plan)
        assert all(layer_of[v.skip] == v.layer for v in plan if v.skip >= 0)
        lanes = [v.parallel for v in plan]
        assert lanes == sorted(lanes) and not any(v.push and lane for v, lane in zip(plan, lanes))
        lane_layers = {v.layer for v, lane in zip(plan, lanes) if lane}
        count = param_shapes(config).get("lane_mix", (0,))[0]  # rows of the last layers
        assert lane_layers == set(range(config.num_layers - count, config.num_layers))
        used |= set(rows)
        looped = range(config.loop_start, config.loop_end + 1) if config.depth_lora_rank else range(0)
        assert all((v.adapter >= 0) == (v.layer in looped) for v in plan)
        adapters = [v.adapter for v in plan if v.adapter >= 0]
        assert sorted(adapters) == list(range(len(looped) * (1 + looping * config.num_loops)))
        assert all((v.adapter - v.layer + config.loop_start) % len(looped) == 0 for v in plan if v.adapter >= 0)
    assert used == set(range(param_shapes(config).get("skip_weight", (0,))[0]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 22), st.booleans())
def test_a_token_changes_only_what_follows_it_in_its_segment(place, looping):
    """Bit for bit, at every place: causality and isolation at once."""
    model, starts = model_of(tiny_config()), [0, 1, 9, 14, 23]
    model.looping = looping
    ids = np.random.default_rng(0).integers(2, 64, 23)
    changed = ids.copy()
    changed[place] = 2 + (ids[place] + 20) % 62
    segments = make_segments(np.array(starts[:-1]), 23, 9, 0)
    with torch.no_grad():
        before, after = (model(*make_batch(x, ids, segments)) for x in (ids, changed))
    moved, end = (before != after).tolist(), next(end for end in starts if end > place)
    assert not any(moved[:place]) and not any(moved[end:]) and moved[place]


# --- attention
def flash_packages(monkeypatch, *present: str) -> None:
    """Stub packages that import; the others do not."""
    fa3 = types.ModuleType("flash_attn_interface")
    fa3.__dict__["flash_attn_varlen_func"] = lambda *arguments, **named: None
    fa4 = types.ModuleType("flash_attn.cute.interface")
    fa4.__dict__.update(_flash_attn_fwd=lambda *a, **k: None, _flash_attn_bwd=lambda *a, **k: None)
    parents = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fa3 if "fa3" in present else None)
    for name, module in {**parents, "flash_attn.cute.interface": fa4}.items():
        monkeypatch.setitem(sys.modules, name, module if "fa4" in present else None)


@pytest.fixture
def forget_fa4():
    """Its operators are registered anew, now and for whoever comes next."""
    load_fa4.cache_clear()
    yield
    load_fa4.cache_clear()


@pytest.mark.parametrize("capability, present, expected", [
    ((9, 0), ("fa3", "fa4"), "fa3"), ((10, 0), ("fa3",), "fa3"), ((9, 0), ("fa4",), "fa4"), ((9, 0), (), "varlen"),
    ((8, 9), ("fa3", "fa4"), "varlen"), ((8, 0), ("fa4",), "varlen"), ((7, 5), ("fa3", "fa4"), "sdpa")])
def test_auto_takes_the_first_engine_of_the_machine(monkeypatch, forget_fa4, capability, present, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    flash_packages(monkeypatch, *present)
    assert choose_attention("auto", HOPPER)[0] == expected


@pytest.mark.parametrize("name, module", [("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute.interface")])
@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])
def test_a_broken_wheel_is_passed_over_or_named(monkeypatch, forget_fa4, name, module, error):
    class Broken(types.ModuleType):
        def __getattr__(self, attribute):
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            raise error("libcudart.so.13: cannot open shared object file")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    flash_packages(monkeypatch)
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, Broken(module))
    assert choose_attention("auto", HOPPER)[0] == "varlen"
    with pytest.raises(UserError, match=f"ATTENTION={name}: .*use ATTENTION=auto"):
        choose_attention(name, HOPPER)


def test_fa4_fakes_have_the_shapes_of_the_real_results(monkeypatch, forget_fa4):
    """torch.compile believes the fakes; q is (T, H, E) and the log-sum-exp (H, T) in float32."""
    flash_packages(monkeypatch, "fa4")
    attend = load_fa4()
    q, k = (torch.empty(10, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    y, lse = torch.ops.train_gpt.fa4(q, k, k, None, None, bounds, 8)
    assert y.shape == q.shape and y.dtype == q.dtype and lse.shape == (4, 10) and lse.dtype == torch.float32
    for dlse in (None, lse):
        for spread, shapes in ((None, (q, k, k)), (q, (q, q, q))):
            grads = torch.ops.train_gpt.fa4_backward(q, k, k, spread, spread, bounds, y, lse, y, dlse, 8)
            assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in shapes]
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, k)]  # and through autograd
    attend(*inputs, Segments(bounds, bounds, 8)).float().sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)


def test_full_segments_are_not_copied(monkeypatch):
    """The fast path: rows that are all full go to the kernel as they lie."""
    q, k, v = (torch.randn(24, heads, 8) for heads in (4, 2, 2))
    segments = make_segments(np.array([0, 8, 16]), 24, 8, 0)
    expected = reference.attention(q, k, v, [0, 8, 16])
    monkeypatch.setattr(torch.Tensor, "index_copy", None)
    assert torch.allclose(attention_sdpa(q, k, v, segments), expected, atol=1e-5)

"""Section 5, attention back ends: each equals the reference; the absent ones are called as their packages want it."""
import inspect
import sys
import types

import numpy as np
import pytest
import reference
import torch
from helpers import random_batch, random_segments
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError, attention_sdpa, choose_attention, load_fa3, load_fa4, load_varlen, make_segments

CPU = torch.device("cpu")


def inputs(seed: int, tokens: int, heads: int = 4, kv_heads: int = 2, width: int = 8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, count, width, generator=generator) for count in (heads, kv_heads, kv_heads)]


def starts_of(segments) -> list[int]:
    return (segments.positions == 0).nonzero()[:, 0].tolist()


def check(attention, tolerance: float = 1e-5) -> None:
    q, k, v = inputs(0, 32)
    _, _, segments = random_batch(0, 32, 8, num_segments=16)
    torch.testing.assert_close(attention(q, k, v, segments), reference.attention(q, k, v, starts_of(segments)),
                               rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=6))),
       st.integers(0, 5), st.sampled_from([(2, 1), (4, 2), (3, 3)]))
def test_sdpa_equals_the_reference(places, empty, heads):
    total, starts = places[0], sorted({0, *places[1]})
    segments = make_segments(np.array(starts), total, total, len(starts) + empty if empty else 0)
    q, k, v = inputs(total, total, *heads)
    torch.testing.assert_close(attention_sdpa(q, k, v, segments), reference.attention(q, k, v, starts),
                               rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10 ** 6), st.integers(1, 40), st.integers(1, 9))
def test_sdpa_of_padded_batches(seed, total, seq_len):
    """Segments end before SEQ_LEN, and empty ones follow: only the tokens' own places count."""
    segments = random_segments(np.random.default_rng(seed), total, seq_len)
    q, k, v = inputs(seed, total)
    torch.testing.assert_close(attention_sdpa(q, k, v, segments), reference.attention(q, k, v, starts_of(segments)),
                               rtol=1e-4, atol=1e-5)


def test_sdpa_of_full_segments():
    q, k, v = inputs(1, 24)
    segments = make_segments(np.array([0, 8, 16]), 24, 8, 0)
    torch.testing.assert_close(attention_sdpa(q, k, v, segments), reference.attention(q, k, v, [0, 8, 16]),
                               rtol=1e-4, atol=1e-5)


def test_auto_takes_sdpa_on_the_cpu():
    assert choose_attention("auto", CPU) == ("sdpa", attention_sdpa)


@pytest.mark.parametrize("name", ["fa3", "fa4", "varlen"])
def test_an_engine_that_is_absent_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"ATTENTION={name}: .*ATTENTION=auto"):
        choose_attention(name, CPU)


def test_order_of_preference_and_missing_wheels(monkeypatch):
    """On a Hopper GPU the first engine whose package imports is taken; a broken wheel is passed over."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose_attention("auto", torch.device("cuda", 0))[0] == "varlen"
    with pytest.raises(UserError, match="ATTENTION=fa3"):
        choose_attention("fa3", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_attention("auto", torch.device("cuda", 0))[0] == "sdpa"


# --- stubs stand for packages that are not here; they check their arguments
def segment_starts(boundaries: torch.Tensor) -> list[int]:
    assert boundaries.dtype == torch.int32 and boundaries[0] == 0
    return sorted({b for b in boundaries.tolist() if b < boundaries[-1]})


@pytest.mark.parametrize("as_tuple", [False, True])
def test_fa3_call(monkeypatch, as_tuple):
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, deterministic=None):
        assert causal and cu_q is cu_k and max_q == max_k == 8
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        y = reference.attention(q, k, v, segment_starts(cu_q))
        return (y, None) if as_tuple else y
    module = types.ModuleType("flash_attn_interface")
    module.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    check(load_fa3())


@pytest.mark.parametrize("has_gqa_switch", [False, True])
def test_varlen_call(monkeypatch, has_gqa_switch):
    def without(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0) and cu_q is cu_k and max_q == max_k == 8
        return reference.attention(query, key, value, segment_starts(cu_q))

    def switched(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return without(query, key, value, cu_q, cu_k, max_q, max_k, window_size=window_size)
    module = types.ModuleType("torch.nn.attention.varlen")
    module.__dict__["varlen_attn"] = switched if has_gqa_switch else without
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    check(load_varlen())


def test_varlen_call_fits_the_installed_torch(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def bound(*arguments, **named):
        call = signature.bind(*arguments, **named)
        assert call.arguments["window_size"] == (-1, 0) and call.arguments["max_q"] == call.arguments["max_k"] == 8
        assert call.arguments.get("enable_gqa", False) == ("enable_gqa" in signature.parameters)
        q, k, v, bounds = call.args[:4]
        return reference.attention(q, k, v, segment_starts(bounds))
    bound.__dict__["__signature__"] = signature
    monkeypatch.setattr(varlen, "varlen_attn", bound)
    check(load_varlen())


def fake_fa4(calls: list[str]) -> types.ModuleType:
    """flash_attn.cute.interface with its two low-level functions, computed by the reference."""
    def fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, return_lse, tile_mn):
        assert causal and return_lse and tile_mn is None and max_seqlen_q == max_seqlen_k == 8
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append("forward")
        return reference.attention(q, k, v, segment_starts(cu_seqlens_q)), q.new_zeros(q.size(1), q.size(0)), None

    def bwd(q, k, v, y, dy, lse, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            deterministic):
        assert causal and softmax_scale == q.size(-1) ** -0.5 and lse.shape == (q.size(1), q.size(0))
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert dy.is_contiguous(), "the kernels want it so"
        assert max_seqlen_q == max_seqlen_k == 8, "the longest length must reach the backward pass"
        calls.append("backward")
        starts = segment_starts(cu_seqlens_q)
        torch.testing.assert_close(y, reference.attention(q, k, v, starts))
        return (*reference.attention_gradients(q, k, v, dy, starts), None)
    module = types.ModuleType("flash_attn.cute.interface")
    module.__dict__.update(_flash_attn_fwd=fwd, _flash_attn_bwd=bwd)
    return module


def install(monkeypatch, interface: types.ModuleType) -> None:
    """Makes a stub the flash_attn.cute.interface that imports."""
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)


@pytest.fixture
def forget_fa4():
    """No stub stays behind in the cache, nor any earlier one."""
    load_fa4.cache_clear()
    yield
    load_fa4.cache_clear()


def test_fa4_call_forward_and_backward(monkeypatch, forget_fa4):
    calls: list[str] = []
    install(monkeypatch, fake_fa4(calls))
    attention = load_fa4()
    check(attention)
    _, _, segments = random_batch(0, 32, 8, num_segments=16)
    leaves = [x.requires_grad_() for x in inputs(1, 32)]
    dy = torch.randn(4, 32, 8).transpose(0, 1)  # not contiguous, as behind a transpose
    ours = torch.autograd.grad(attention(*leaves, segments), leaves, dy)
    theirs = torch.autograd.grad(reference.attention(*leaves, starts_of(segments)), leaves, dy)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls == ["forward", "forward", "backward"]


SPREADING = """
class FlashAttentionBackwardSm90:
    qhead_per_kvhead = 1

    def load(self, *given):
        loads.append((self.qhead_per_kvhead, given))


def _flash_attn_bwd(q, k, v, y, dy, lse, scale, causal, **named):
    FlashAttentionBackwardSm90().load("tensors", None)
    _flash_attn_bwd.compile_cache["key"] = "kernel"
    return gradients(q, k, v, dy, named["cu_seqlens_q"])


_flash_attn_bwd.compile_cache = {}
"""


@pytest.mark.parametrize("version", ["4.0.0b36", "4.0.0b37"])
def test_fa4_spreads_the_gradients_of_shared_keys_in_the_known_version(monkeypatch, forget_fa4, version):
    """Its kernel divides heads of q by their share, in a function of its own; k and v look as if they had H heads."""
    tokens, heads, kv, width, loads, seen = 32, 4, 2, 8, [], []

    def gradients(q, k, v, dy, bounds):
        seen.append((k, v))
        if k.size(1) == heads:  # spread
            k, v = (x[:, :kv].repeat_interleave(heads // kv, 1) for x in (k, v))
        return *reference.attention_gradients(q, k, v, dy, segment_starts(bounds)), None
    namespace = (interface := fake_fa4([])).__dict__
    exec(SPREADING, namespace)  # a function without a closure, as the real one
    namespace.update(loads=loads, gradients=gradients)
    install(monkeypatch, interface)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [types.SimpleNamespace(version=version)])
    _, _, segments = random_batch(0, tokens, 8, num_segments=16)
    q, dy = torch.randn(tokens, heads, width, requires_grad=True), torch.randn(tokens, heads, width)
    k, v = (torch.randn(tokens + heads // kv, kv, width)[:tokens].requires_grad_() for _ in "kv")
    spread = [torch.zeros(()).expand(tokens, heads, width).requires_grad_() for _ in "kv"]
    load_fa4()(q, k, v, segments, *spread).backward(dy)
    wanted = reference.attention_gradients(q, k, v, dy, starts_of(segments))
    if version == "4.0.0b36":
        sums = [x.grad.unflatten(1, (kv, -1)).sum(2) for x in spread]
        assert k.grad is None and v.grad is None and loads == [(heads // kv, ("tensors", heads // kv))]
        assert all(x.shape == q.shape and torch.equal(x[:, :kv], y) for x, y in zip(seen[0], (k, v)))
        assert not namespace["_flash_attn_bwd"].compile_cache, "other users' kernels stay what they are"
    else:
        sums = [k.grad, v.grad]
        assert loads == [(1, ("tensors", None))] and not any(x.grad is not None for x in spread)
    for a, b in zip((q.grad, *sums), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_engines_that_are_present_agree(forget_fa4):
    device = torch.device("cuda")
    _, _, segments = random_batch(0, 8192, 1024, num_segments=1024)
    segments = segments._replace(boundaries=segments.boundaries.to(device), positions=segments.positions.to(device))
    values = [x.to(device, torch.bfloat16) for x in inputs(0, 8192, 8, 4, 64)]
    results = {}
    for name in train_gpt.ATTENTIONS:
        try:
            _, attention = choose_attention(name, device)
        except UserError:
            continue
        leaves = [x.clone().requires_grad_() for x in values]
        y = attention(*leaves, segments)
        y.float().square().sum().backward()
        results[name] = [y, *(x.grad for x in leaves)]
    assert "sdpa" in results
    for tensors in results.values():
        for a, b in zip(tensors, results["sdpa"]):
            assert (a.float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()

"""Section 4, kernels: each against plain torch in float32 on the same rounded inputs, forward and backward."""
import sys

import numpy as np
import program
import pytest
import torch
from helpers import tiny_config

from train_gpt import (
    BOS,
    GPT,
    PLAIN,
    Config,
    Kernels,
    UserError,
    attention_sdpa,
    choose_attention,
    choose_kernels,
    compile_model,
    cut_segments,
    differentiable,
    load_cross_entropy,
    load_exclude,
    load_fa4,
    load_leaky2,
    load_linear_add,
    load_mix_norm,
    load_product,
    load_rotate_heads,
    make_batch,
    make_segments,
    rotary_angles,
    to_device,
    written,
)

sys.path.insert(0, str(program.ROOT / "bench"))
from speed import (
    cross_entropy_twin,
    exclude_twin,
    leaky2_twin,
    linear_add_twin,
    mix_norm_twin,
    rotate_heads_twin,
)

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
                         reason="needs a Hopper GPU")


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).bfloat16().cuda()


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def no_worse(fused, twin, inputs: list[torch.Tensor | None], *numbers: float) -> None:
    """Output and gradients in bfloat16, against the twin in float32: no worse than the twin's in bfloat16."""
    ours, exact, plain = ([x if x is None else x.to(kind, copy=True).requires_grad_() for x in inputs]
                          for kind in (torch.bfloat16, torch.float32, torch.bfloat16))
    out, wanted, rounded = torch.compile(fused, dynamic=False)(*ours, *numbers), twin(*exact, *numbers), twin(
        *plain, *numbers)
    grad = draw(*out.shape)
    for result in (out, wanted, rounded):
        result.backward(grad.to(result.dtype))
    assert out.shape == wanted.shape and error(out, wanted) < 1.1 * error(rounded, wanted) + 1e-3
    for a, b, c in zip(ours, exact, plain):
        assert a is None or error(a.grad, b.grad) < 1.1 * error(c.grad, b.grad) + 1e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, width, hidden, slope", [
    (98304, 512, 2048, 0.5), (1000, 512, 1504, 0.3), (1, 64, 256, 0.5), (777, 48, 112, 0.0), (130, 16, 16, 1.0)])
@pytest.mark.parametrize("based", [False, True])
def test_leaky2_is_its_plain_form(tokens, width, hidden, slope, based):
    torch.manual_seed(0)
    no_worse(load_leaky2(), leaky2_twin, [draw(tokens, width), draw(hidden, width, scale=width ** -0.5), draw(
        width, hidden, scale=hidden ** -0.5), draw(tokens, width) if based else None], slope)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, inner, out", [
    (98304, 512, 1024), (98304, 512, 512), (1000, 1504, 512), (1, 64, 256), (777, 112, 48), (130, 16, 16)])
@pytest.mark.parametrize("based", [False, True])
def test_linear_add_is_its_plain_form(tokens, inner, out, based):
    torch.manual_seed(0)
    no_worse(load_linear_add(), linear_add_twin, [draw(tokens, inner), draw(out, inner, scale=inner ** -0.5),
                                                  draw(tokens, out) if based else None])


@pytest.mark.gpu
@gpu
def test_leaky2_keeps_the_sign_and_nothing_else_of_what_it_squares():
    torch.manual_seed(1)
    n, up = draw(300, 64), draw(208, 64, scale=0.125)
    post = load_product()(n, up.T, "leaky2", slope=0.5)
    before = n.double() @ up.double().T
    clear = before.abs() > 1e-3  # sums in float32 may differ in sign below
    assert torch.equal(((post.view(torch.int16) & 1) == 1)[clear], (before < 0)[clear]) and (post >= 0).all()
    exact = torch.where(before < 0, 0.5 * before, before).square()
    assert ((post.double() - exact) / exact)[clear].mean().abs() < 2e-4  # no bias
    assert ((post.double() - exact) / exact)[clear].abs().max() < 2 ** -7


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, heads, kv, width, pairs", [
    (98304, 8, 4, 64, 8), (1001, 3, 1, 32, 4), (1, 8, 8, 128, 64), (77, 6, 3, 16, 0), (50, 1, 1, 64, 5)])
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2, 3, 4), (0, 3, 4)])
def test_rotate_heads_is_its_plain_form(tokens, heads, kv, width, pairs, used):
    """Gradients of keys and values come to them, or to what takes those of each query head, or to both."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    qkv, gain = draw(tokens, (heads + 2 * kv) * width), torch.randn(heads).cuda()
    frequencies = 1e4 ** -(torch.arange(pairs) / max(pairs, 1))
    cos, sin = (x.cuda() for x in rotary_angles(torch.arange(tokens) % 2048, frequencies))
    ours, exact = ([qkv.clone().requires_grad_(), gain.clone().requires_grad_()],
                   [qkv.float().requires_grad_(), gain.clone().requires_grad_()])

    out = torch.compile(load_rotate_heads(), dynamic=False)(*ours, cos, sin, width)
    wanted = rotate_heads_twin(*exact, cos, sin, width)
    assert all(x.untyped_storage().nbytes() < 1024 for x in out[3:])
    grads = [draw(*wanted[i].shape) for i in used]
    torch.autograd.backward([out[i] for i in used], grads)
    torch.autograd.backward([wanted[i] for i in used], [grad.float() for grad in grads])
    for a, b in zip((*out[:3], ours[0].grad, ours[1].grad), (*wanted[:3], exact[0].grad, exact[1].grad)):
        assert a.shape == b.shape and error(a, b) < 4e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, heads, kv, width", [
    (98304, 8, 4, 64), (1001, 4, 1, 64), (77, 8, 8, 128), (500, 6, 3, 64)])
def test_fa4_spreads_the_gradients_of_keys_and_values(tokens, heads, kv, width):
    """Each query head's share, instead of their sums: against the sums of attention in float32."""
    torch.manual_seed(0)
    others = np.random.default_rng(0).integers(0, tokens, 1 + tokens // 700)
    starts = np.unique(np.append(np.arange(0, tokens, 2048), others))
    segments = to_device(make_segments(starts, tokens, 2048, 256), torch.device("cuda"))
    q, grad = draw(tokens, heads, width).requires_grad_(), draw(tokens, heads, width)
    k, v = (draw(tokens + heads // kv, kv, width)[:tokens] for _ in "kv")
    spread = [q.new_empty(()).detach().expand(tokens, heads, width).requires_grad_() for _ in "kv"]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out, wanted = load_fa4()(q, k, v, segments, *spread), attention_sdpa(*exact, segments)
    out.backward(grad)
    wanted.backward(grad.float())
    sums = [x.grad.float().unflatten(1, (kv, -1)).sum(2) for x in spread]
    for a, b in zip((out, q.grad, *sums), (wanted, *(x.grad for x in exact))):
        assert a.shape == b.shape and error(a, b) < 8e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, heads, kv, width", [
    (98304, 8, 4, 64), (1001, 3, 1, 32), (1, 8, 8, 128), (77, 6, 3, 16), (50, 1, 1, 64)])
def test_exclude_is_its_plain_form(tokens, heads, kv, width):
    torch.manual_seed(0)
    y, v, opened = draw(tokens, heads, width), draw(tokens, kv, width), torch.rand(tokens, heads).cuda()
    ours, exact = ([x.to(kind, copy=True).requires_grad_() for x in (y, v)] + [opened.clone().requires_grad_()]
                   for kind in (torch.bfloat16, torch.float32))
    out, wanted = torch.compile(load_exclude(), dynamic=False)(*ours), exclude_twin(*exact)
    grad = draw(*out.shape)
    out.backward(grad)
    wanted.backward(grad.float())
    for a, b in zip((out, *(x.grad for x in ours)), (wanted, *(x.grad for x in exact))):
        assert a.shape == b.shape and error(a, b) < 4e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, width, vocab", [(98304, 512, 8192), (1001, 64, 1024), (3, 48, 300), (1, 16, 16)])
@pytest.mark.parametrize("learned", [0, 1])
def test_cross_entropy_is_its_plain_form(tokens, width, vocab, learned):
    """Some targets count for nothing; logits reach well beyond their caps."""
    torch.manual_seed(0)
    x, head, targets = draw(tokens, width), draw(vocab, width), torch.randint(vocab, (tokens,)).cuda()
    targets[1::7] = -1
    ours, exact = ([x.to(kind, copy=True).requires_grad_(), head.to(kind, copy=True).requires_grad_(), targets,
                    torch.tensor([30.0, 20.0], device="cuda", requires_grad=True), learned]
                   for kind in (torch.bfloat16, torch.float32))
    out, wanted = torch.compile(load_cross_entropy(), dynamic=False)(*ours), cross_entropy_twin(*exact)
    assert not out[1::7].any()
    weight = torch.rand(tokens).cuda()
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    leaves = (0, 1, 3) if learned else (0, 1)
    for a, b in zip((out, *(ours[i].grad for i in leaves)), (wanted, *(exact[i].grad for i in leaves))):
        assert a.shape == b.shape and error(a, b) < 8e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens, width, window", [(98304, 512, 12), (1001, 100, 7), (1, 16, 16), (7777, 48, 1)])
@pytest.mark.parametrize("skip", [False, True])
def test_mix_norm_is_its_plain_form(tokens, width, window, skip):
    torch.manual_seed(0)
    streams, mix = [draw(tokens, width) for _ in range(3)], torch.randn(3, width).cuda()
    scale = torch.tensor(0.7).cuda()
    ours = [*(x.clone().requires_grad_() for x in streams), mix.clone().requires_grad_()]
    exact = [*(x.float().requires_grad_() for x in streams), mix.clone().requires_grad_()]

    if not skip:
        ours[0] = exact[0] = None
    fused = torch.compile(load_mix_norm(), dynamic=False)
    # the gradient of the third stream is its chain's
    out, wanted = fused(*ours, scale, ours[2], window), mix_norm_twin(*exact, scale, exact[2], window)
    assert out[3].shape == (tokens, width) and out[3].untyped_storage().nbytes() < 1024
    grads = draw(tokens, width), draw(tokens, width), draw(tokens, window), draw(tokens, width)
    torch.autograd.backward(out, grads)
    torch.autograd.backward(wanted, [grad.float() for grad in grads])
    ours, exact = ([x.grad for x in inputs if x is not None] for inputs in (ours, exact))
    for a, b in zip((*out[:3], *ours), (*wanted[:3], *exact)):
        assert a.shape == b.shape and error(a, b) < 6e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("looping, changes", [
    (False, {}), (True, {}), (False, {"attn_gate": "dense"}),
    (False, {"xsa_last_n": 0, "sparse_attn_gate_scale": 0.0})])
def test_the_model_with_kernels_has_the_gradients_of_the_plain_one(looping, changes):
    """In bfloat16, against float32: no worse than bfloat16 is without kernels."""
    torch._dynamo.reset()  # other cases' graphs count towards torch's limit
    config = Config(**changes)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, 8193)
    tokens[::300] = BOS
    segments = make_segments(cut_segments(tokens[:-1], 512, True), 8192, 512, 32)
    batch = to_device(make_batch(tokens[:-1], tokens[1:], segments), torch.device("cuda"))
    attention = choose_attention("auto", torch.device("cuda"))[1]
    forms = {"exact": (torch.float32, attention_sdpa, PLAIN), "plain": (torch.bfloat16, attention, PLAIN),
             "fused": (torch.bfloat16, attention, choose_kernels(config, torch.device("cuda")))}
    grads = {}
    for form, (dtype, attend, kernels) in forms.items():
        model = GPT(config, dtype, attend, kernels)
        model.init_weights(0)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():  # no output is zero
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=random), alpha=0.02 if p.dim() == 3 else 0.1)
        model.cuda().looping = looping
        nats = compile_model(model, form == "fused")(*batch)
        nats.mean().backward()
        grads[form] = {"nats": nats.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    for name, exact in grads["exact"].items():
        plain, fused = (error(grads[form][name], exact) for form in ("plain", "fused"))
        print(f"{name:14} plain {plain:.2e} fused {fused:.2e}")
        chance = 1e-3 if exact.numel() > 99 else 4e-3  # few numbers: nothing averages their roundings
        assert fused < 1.2 * plain + chance, (name, plain, fused)


def test_an_output_that_nobody_differentiates_has_no_gradient():
    """Of two outputs x + y (or x) and z x: backward gets None for the other one, the inputs, and the number."""
    seen = []

    def launch(factor, x, y, total, scaled):
        total.copy_(x if y is None else x + y)
        scaled.copy_(factor * x)

    def launch_backward(factor, x, y, dtotal, dscaled, dx):
        seen.append((dtotal is None, dscaled is None))
        dx.copy_((0 if dtotal is None else dtotal) + (0 if dscaled is None else factor * dscaled))

    operator = differentiable(
        "toy", "T?f TT T", written(launch, lambda x, *_: (torch.empty_like(x), torch.empty_like(x))),
        written(launch_backward, lambda x, *_: torch.empty_like(x)),
        lambda kept, grads, dx: (dx, None if kept[1] is None else grads[0], None))
    for y in (None, torch.randn(3, requires_grad=True)):
        x = torch.randn(3, requires_grad=True)
        total, scaled = torch.compile(operator, backend="aot_eager", fullgraph=True)(x, y, 2.5)
        assert torch.equal(total, x if y is None else x + y) and torch.equal(scaled, 2.5 * x)
        total.sum().backward(retain_graph=True)
        scaled.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 3.5)) and (y is None or torch.equal(y.grad, torch.ones(3)))
    x = torch.randn(3, requires_grad=True)
    operator(x, None, 2.0)[1].sum().backward()
    assert seen[-1] == (True, False) and torch.equal(x.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("changes", [{}, {"fused_kernels": False}, {"mlp_activation": "swiglu"}])
def test_a_cpu_uses_plain_torch(changes):
    assert choose_kernels(tiny_config(**changes), CPU) == PLAIN


def test_a_kernel_without_triton_says_so(monkeypatch):
    monkeypatch.setattr("train_gpt.triton", None)
    monkeypatch.setattr("train_gpt.TRITON", ("tritone",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for load in (load_rotate_heads, load_exclude, load_mix_norm, load_cross_entropy):
        load.cache_clear()
    kernels = choose_kernels(tiny_config(mlp_hidden=40), torch.device("cuda"))
    assert kernels == PLAIN._replace(note=" (no cross_entropy: No module named 'tritone')")


@pytest.mark.parametrize("error, note", [
    (ModuleNotFoundError("No module named 'quack'"), "No module named 'quack'"),
    (TypeError("__call__() got an unexpected keyword\nand more"), "__call__() got an unexpected keyword")])
def test_a_kernel_whose_package_is_missing_or_new_leaves_the_others(monkeypatch, error, note):
    def missing():
        raise error
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in ("linear_add", "leaky2"):
        monkeypatch.setattr(f"train_gpt.load_{name}", missing)
    others = ("rotate_heads", "exclude", "mix_norm", "cross_entropy")
    for name in others:
        monkeypatch.setattr(f"train_gpt.load_{name}", lambda name=name: name)
    kernels = choose_kernels(tiny_config(), torch.device("cuda"))
    assert kernels.names == f"torch+{'+'.join(others)} (no leaky2: {note})"
    assert tuple(getattr(kernels, name) for name in others) == others


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("changes, missing", [
    ({}, ""), ({"attn_gate": "dense"}, ""), ({"value_residual": True}, "rotate_heads"),
    ({"mlp_activation": "swiglu"}, "leaky2"), ({"projection_norm": True}, "leaky2"),
    ({"mlp_hidden": 40}, "linear_add leaky2"), ({"logit_softcap": 31.0}, "cross_entropy"),
    ({"softcap_type": "poly5"}, "cross_entropy"), ({"z_loss": 1e-4}, "cross_entropy"),
    ({"vocab_bias": True}, "cross_entropy"),
    ({"model_dim": 192, "num_heads": 4, "mlp_mult": 2.0}, "rotate_heads exclude"),
    ({"fp8_matmul": True, "num_kv_heads": 2}, "linear_add leaky2"),
    ({"fused_kernels": False}, "linear_add leaky2 rotate_heads exclude mix_norm cross_entropy")])
def test_settings_choose_the_kernels(changes, missing):
    kernels = choose_kernels(tiny_config(**changes), torch.device("cuda"))
    fused = [name for name in Kernels._fields[3:-1] if name not in missing.split()]
    assert kernels.names == "+".join(["fp8" if changes.get("fp8_matmul") else "torch", *fused])


def test_products_of_8_bit_floats_are_refused_where_the_device_has_none():
    with pytest.raises(UserError, match=r"FP8_MATMUL=1 DEVICE=auto: .*\(this is cpu .*; set FP8_MATMUL=0"):
        choose_kernels(tiny_config(fp8_matmul=True), CPU)

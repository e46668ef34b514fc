"""Section 6, optim: its options against loops in float64. Section 5: products in 8-bit floats."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, single_world, tiny_config
from reference import newton_schulz
from test_optim import MUON, NaiveOptimizer, generator, make_model, saved, set_grads, world_of

from train_gpt import (
    GPT,
    NEWTON_SCHULZ,
    Config,
    Fp8Linear,
    Kernels,
    MuonGroup,
    Optimizer,
    UserError,
    choose_kernels,
    muon_update,
)


# --- the options of Muon
def naive_normuon(update: torch.Tensor, seen: torch.Tensor, beta2: float) -> torch.Tensor:
    """Rows of one matrix over the roots of their running mean squares `seen`, which it changes; same norm as before."""
    rows = []
    for r, row in enumerate(update):
        seen[r] = beta2 * seen[r] + (1 - beta2) * sum(float(x) ** 2 for x in row) / len(row)
        rows.append(row / math.sqrt(seen[r]))
    scaled = torch.stack(rows)
    return scaled * math.sqrt(float(update.square().sum()) / float(scaled.square().sum()))


class NaiveOptions(NaiveOptimizer):
    """That optimizer with NorMuon, decay behind the update, and an untied embedding."""

    def __init__(self, config: Config, model: GPT):
        super().__init__(config, model)
        self.seen = {name: torch.zeros(w.shape[:2]).double() for name, w in self.weights.items() if name in MUON}

    def rates(self, name: str) -> tuple[float, float]:
        config = self.config
        if name in ("embedding", "head", "bigram_table"):
            untied = config.head_lr if name == "head" else config.embed_lr
            return config.tied_embed_lr if config.tie_embeddings else untied, config.embed_wd
        return super().rates(name)

    def muon(self, name: str, grad: torch.Tensor, momentum: float, lr: float, decay: float, coefficients) -> None:
        config = self.config
        for weight, buffer, g, seen in zip(self.weights[name], self.first[name], grad, self.seen[name]):
            buffer.copy_(momentum * buffer + g)
            update = g + momentum * buffer
            if config.muon_row_normalize:
                update = torch.stack([row / row.norm() for row in update])
            update = torch.as_tensor(newton_schulz(update, coefficients))
            if config.normuon_beta2:
                update = naive_normuon(update, seen, config.normuon_beta2)
            move = lr * math.sqrt(max(1.0, g.size(0) / g.size(1))) * update
            shrink = 1 - lr * decay
            weight.copy_((weight - move) * shrink if config.muon_wd_after else weight * shrink - move)


STRONG = {"matrix_lr": 0.1, "muon_wd": 2.0}  # so that the order of decay and update matters
UNTIED = {"tie_embeddings": False, "embed_lr": 0.3, "head_lr": 0.07, "embed_wd": 0.6}
CASES = {
    "normuon": {"normuon_beta2": 0.9, **STRONG}, "normuon_raw": {"normuon_beta2": 0.5, "muon_row_normalize": False,
                                                                   **STRONG},
    "wd_after": {"muon_wd_after": True, **STRONG}, "three_steps": {"muon_backend_steps": 3, **STRONG},
    "quintic": {"muon_coefficients": "quintic", **STRONG}, "untied": UNTIED,
    "long_quintic": {"muon_coefficients": "quintic", "muon_backend_steps": 7, **STRONG},
    "tied": {"embed_lr": 0.3, "head_lr": 0.07, "bigram_hash_buckets": 9, "bigram_hash_dim": 5},
    "many": {"normuon_beta2": 0.95, "muon_wd_after": True, "muon_backend_steps": 3, "depth_lora_rank": 3,
             "embed_dim": 20, "bigram_hash_buckets": 9, "bigram_hash_dim": 5, **STRONG, **UNTIED}}
STEPS = [(1.0, 0.85, 1.0), (0.6, 0.9, 0.7), (0.25, 0.97, 0.0), (0.5, 0.95, 0.5)]  # lr, momentum, decay


@pytest.mark.parametrize("name", CASES)
def test_steps_with_options_are_the_naive_ones(name):
    """The decay's factor is Muon's alone."""
    config = tiny_config(**CASES[name])
    model = make_model(config)
    optimizer, naive = Optimizer(config, single_world(), dict(model.named_parameters())), NaiveOptions(config, model)
    for step, (lr_scale, momentum, decay_scale) in enumerate(STEPS):
        grads = set_grads(model, step)
        naive.step(grads, lr_scale, momentum, decay_scale)
        optimizer.step(torch.tensor(0.0), lr_scale, momentum, decay_scale)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), naive.weights[key], rtol=3e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name, option", [
    ("normuon", "normuon_beta2"), ("normuon_raw", "normuon_beta2"), ("wd_after", "muon_wd_after"),
    ("three_steps", "muon_backend_steps"), ("quintic", "muon_coefficients"), ("long_quintic", "muon_backend_steps"),
    ("many", "normuon_beta2"), ("many", "muon_wd_after"), ("many", "muon_backend_steps")])
def test_every_option_of_the_optimizer_changes_the_step(name, option):
    """By far more than what the comparison with the loops lets pass."""
    results = []
    for changes in (CASES[name], {key: value for key, value in CASES[name].items() if key != option}):
        model = make_model(tiny_config(**changes))
        optimizer = Optimizer(model.config, single_world(), dict(model.named_parameters()))
        for step in range(2):
            set_grads(model, step)
            optimizer.step(torch.tensor(0.0), 1.0, 0.9)
        results.append(model.q_proj.detach())
    assert (results[0] - results[1]).abs().max() > 2e-3


@pytest.mark.parametrize("tall", [False, True])
def test_normuon_equalizes_rows_of_the_model_and_keeps_the_norm(tall):
    """After one step all rows, of the matrix as it is in the model, have one size."""
    grad = torch.randn(2, 8, 20, generator=generator(1))
    shapes = {"momentum": (2, 8, 20), "row_square": (2, 8, 1), "column_square": (2, 1, 20)}
    arguments = torch.tensor(0.9), torch.full((2, 1, 1), tall), False
    fresh = [{key: torch.zeros(shape) for key, shape in shapes.items()} for _ in range(2)]
    plain = muon_update(grad, fresh[0], *arguments, 0.0, NEWTON_SCHULZ["polar"])
    scaled = muon_update(grad, fresh[1], *arguments, 0.9, NEWTON_SCHULZ["polar"])
    sizes = [x.norm(dim=1 if tall else 2) for x in (plain, scaled)]
    assert (sizes[0].amax(1) / sizes[0].amin(1)).min() > 1.02
    assert torch.allclose(sizes[1], sizes[1].mean(1, keepdim=True).expand_as(sizes[1]), rtol=1e-4)
    torch.testing.assert_close(scaled.norm(dim=(1, 2)), plain.norm(dim=(1, 2)))
    zero = muon_update(0 * grad, {key: torch.zeros(shape) for key, shape in shapes.items()}, *arguments, 0.9,
                       NEWTON_SCHULZ["polar"])
    assert not zero.any()  # the empty slots of the last rank, and no NaN


# --- state on any number of ranks
def gather_from(ranks: list[Optimizer], monkeypatch) -> None:
    """Ranks that never communicate collect each other's shares."""
    def gather(group: MuonGroup, own: torch.Tensor):
        place = next(i for i, optimizer in enumerate(ranks) if group in optimizer.groups)
        index, key = ranks[place].groups.index(group), next(key for key, x in group.state.items() if x is own)
        return torch.cat([optimizer.groups[index].state[key] for optimizer in ranks]), None
    monkeypatch.setattr(MuonGroup, "gather", gather)


@pytest.mark.parametrize("writers, readers", [(1, 2), (1, 3), (2, 3), (3, 1), (2, 1), (3, 2)])
def test_the_state_of_normuon_goes_over_to_other_numbers_of_ranks(monkeypatch, writers, readers):
    config = tiny_config(normuon_beta2=0.9, **STRONG)
    model = make_model(config)
    params = dict(model.named_parameters())
    one = Optimizer(config, single_world(), params)
    for step in range(2):
        set_grads(model, step)
        one.step(torch.tensor(0.0), 1.0, 0.9)
    expected = saved(one)
    assert set(expected["muon"]) == {"momentum", "row_square", "column_square"}
    for key in expected["muon"]:
        assert set(expected["muon"][key]) == MUON & set(params)
        assert all(x.abs().min() > 0 for x in expected["muon"][key].values())
    state = expected
    for size in (writers, readers):
        ranks = [Optimizer(config, world_of(rank, size), params) for rank in range(size)]
        for optimizer in ranks:
            optimizer.load_state_dict(copy.deepcopy(state))
        with monkeypatch.context() as patch:
            gather_from(ranks, patch)
            state = saved(ranks[-1])
    for key in expected["muon"]:
        assert all(torch.equal(state["muon"][key][name], x) for name, x in expected["muon"][key].items())
    assert all(torch.equal(x, state["adam"][i][key]) for i, entry in expected["adam"].items()
               for key, x in entry.items())
    grads = {name: torch.randn(p.shape, generator=generator(9)) for name, p in params.items() if name in MUON}
    for i, group in enumerate(one.groups):
        packed = group.pack([grads[name] for name in group.names], torch.float32)
        updates = []
        for optimizer in ranks:
            mine = optimizer.groups[i]
            own = torch.cat((packed, torch.zeros(readers, *packed.shape[1:])))[mine.world.rank * mine.share:]
            updates.append(muon_update(own[:mine.share], mine.state, torch.tensor(0.9), mine.own_tall, True, 0.9,
                                       NEWTON_SCHULZ["polar"]))
        whole = muon_update(packed, group.state, torch.tensor(0.9), group.own_tall, True, 0.9, NEWTON_SCHULZ["polar"])
        torch.testing.assert_close(torch.cat(updates)[:group.count], whole, rtol=1e-4, atol=1e-5)


# --- products in 8-bit floats
POSITIVE = [(code % 8) / 8 * 2 ** -6 if code < 8 else (1 + (code % 8) / 8) * 2.0 ** (code // 8 - 7)
            for code in range(127)]  # the finite e4m3 numbers, from 0 to 448


def naive_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3 number of each entry, float64; of two equally near ones that with the even mantissa."""
    def nearest(value: float) -> float:
        code = min(range(127), key=lambda c: (abs(POSITIVE[c] - abs(value)), c % 2))
        return math.copysign(POSITIVE[code], value)
    return torch.tensor([nearest(value) for value in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = Fp8Linear.apply(x, weight)
    assert isinstance(y, torch.Tensor)
    return y


@pytest.mark.parametrize("factor", [1.0, 1e-3, 40.0])
def test_fp8_products_are_those_of_quantized_operands(factor):
    """Weights are scaled to 448, activations are not, but clamped there."""
    x = torch.randn(12, 32, generator=generator(1))
    x[0, :4] = torch.tensor([1e3, -1e9, 447.0, 1e-4])
    weight = factor * torch.randn(48, 32, generator=generator(2))
    weight[3] = 0.0
    scale = weight.abs().max() / 448
    expected = naive_e4m3(x) @ naive_e4m3(weight / scale).T * scale.double()
    y = fp8_linear(x, weight)
    assert y.dtype == torch.float32 and not y[:, 3].any()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert not fp8_linear(x, 0 * weight).any()


def test_fp8_products_of_small_integers_are_exact():
    x, weight = (torch.randint(-8, 9, shape, generator=generator(3)).float() for shape in ((16, 32), (48, 32)))
    weight[5, 7] = 448.0  # the scale is then 1
    assert torch.equal(fp8_linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_close_and_their_gradients_are_those_of_the_plain_product(dtype):
    """Gradients do not see the quantization: they multiply the operands as they were before it."""
    results = {}
    for name, linear in (("plain", F.linear), ("fp8", fp8_linear)):
        x, weight, upstream = (torch.randn(shape, generator=generator(seed)).to(dtype) for seed, shape in (
            (4, (64, 128)), (5, (96, 128)), (6, (64, 96))))
        x.requires_grad_()
        weight.requires_grad_()
        y = linear(x, weight)
        y.backward(upstream)
        assert y.dtype == dtype and x.grad is not None and weight.grad is not None
        results[name] = y.detach().double(), x.grad, weight.grad
    (exact, *gradients), (rough, *ours) = results["plain"], results["fp8"]
    assert 0.005 < (rough - exact).norm() / exact.norm() < 0.05
    for a, b in zip(gradients, ours):
        assert b.dtype == dtype
        torch.testing.assert_close(a, b)


def test_fp8_is_for_training_alone():
    """Of the blocks: the scores of a model in evaluation are those without it, bit for bit."""
    models = [make_model(tiny_config(**changes)) for changes in ({}, {"fp8_matmul": True})]
    models[1].kernels = Kernels(fp8_linear)
    batch = random_batch(0, 48, 16)
    with torch.no_grad():
        exact, ours = (model.eval()(*batch) for model in models)
        plain, rough = (model.train()(*batch) for model in models)
    assert torch.equal(exact, ours)
    assert torch.equal(plain, exact) and 1e-3 < (rough - exact).abs().mean() < 0.2 * exact.mean()


def test_fp8_is_refused_where_it_cannot_work(monkeypatch):
    config, gpu = tiny_config(fp8_matmul=True, fused_kernels=False), torch.device("cuda")
    assert choose_kernels(tiny_config(), torch.device("cpu")).linear is F.linear
    with pytest.raises(UserError, match=r"FP8_MATMUL=1 .*\(this is cpu .*set FP8_MATMUL=0"):
        choose_kernels(config, torch.device("cpu"))
    for capability, works in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        if works:
            x, weight = torch.randn(16, 32), torch.randn(32, 32)
            assert torch.equal(choose_kernels(config, gpu).linear(x, weight), fp8_linear(x, weight))
        else:
            with pytest.raises(UserError, match="FP8_MATMUL=1"):
                choose_kernels(config, gpu)
    for changes in ({"mlp_hidden": 40}, {"model_dim": 40, "mlp_hidden": 48}, {"num_heads": 4}):  # keys of 8 channels
        with pytest.raises(UserError, match="multiples of 16"):
            choose_kernels(tiny_config(fp8_matmul=True, **changes), gpu)

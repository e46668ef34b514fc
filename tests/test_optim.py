"""Section 6, optim: Newton-Schulz, Muon, AdamW, sharing out over ranks, clipping, PARAM_TABLE, state."""
import ast
import copy
import io
import math
import os
import subprocess
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import randomize, single_world, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import muon_step, newton_schulz

import train_gpt
from train_gpt import (
    GPT,
    NEWTON_SCHULZ,
    PARAM_TABLE,
    Config,
    MuonGroup,
    Optimizer,
    World,
    muon_update,
    orthogonalize,
    param_shapes,
)

ROOT = Path(train_gpt.__file__).resolve().parent
POLAR, QUINTIC = NEWTON_SCHULZ["polar"], NEWTON_SCHULZ["quintic"][:5]
MUON = {"q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj", "embed_in", "embed_out", "bigram_proj",
        "q_adapter_in", "q_adapter_out", "v_adapter_in", "v_adapter_out"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world_of(rank: int, size: int) -> World:
    """A rank of a world that never communicates."""
    return World(rank, size, torch.device("cpu"), torch.float32)


# --- Newton-Schulz
@pytest.mark.parametrize("coefficients", [POLAR, POLAR[:3], QUINTIC], ids=["polar", "polar3", "quintic"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (1, 1, 5), (2, 12, 48)])
def test_orthogonalize_is_the_published_iteration(coefficients, shape):
    x = torch.randn(shape, generator=generator(1))
    result = orthogonalize(x, coefficients)
    assert result.shape == x.shape and result.dtype == torch.float32
    for matrix, ours in zip(x, result):
        theirs = torch.as_tensor(newton_schulz(matrix.double(), coefficients))
        assert torch.allclose(ours.double(), theirs.double(), atol=2e-4)


@pytest.mark.parametrize("coefficients, low, high", [(POLAR, 0.85, 1.15), (QUINTIC, 0.6, 1.25)])
def test_orthogonalize_is_the_orthogonal_factor_of_the_svd(coefficients, low, high):
    """Singular vectors stay, singular values become about 1."""
    for seed in range(5):
        x = torch.randn(1, 16, 40, generator=generator(seed), dtype=torch.float64)
        u, _, vh = torch.linalg.svd(x[0], full_matrices=False)
        inner = u.mT @ orthogonalize(x, coefficients)[0] @ vh.mT
        values = inner.diagonal()
        assert low < values.min() and values.max() < high
        assert (inner - values.diag()).abs().max() < 1e-6


def test_orthogonalize_forgets_the_scale_and_keeps_zero():
    x = torch.randn(2, 4, 6, generator=generator())
    assert torch.allclose(orthogonalize(x, POLAR), orthogonalize(1000 * x, POLAR), atol=1e-4)
    assert not orthogonalize(torch.zeros(2, 4, 6), POLAR).any()


def test_polar_coefficients_are_the_published_ones():
    assert len(POLAR) == 5 and POLAR[0] == (8.156554524902461, -22.48329292557795, 15.878769915207462)
    assert POLAR[4] == (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
    assert set(NEWTON_SCHULZ["quintic"]) == {(3.4445, -4.7750, 2.0315)}


# --- Muon's update
def update_of(grad: torch.Tensor, buffer: torch.Tensor, momentum: float, tall: torch.Tensor, row_normalize: bool) \
        -> torch.Tensor:
    """Muon's update without NorMuon; changes the buffer."""
    return muon_update(grad, {"momentum": buffer}, torch.tensor(momentum), tall, row_normalize, 0.0, POLAR)


def test_tall_matrices_have_the_rows_of_the_model_normalized():
    """A transposed tall matrix gets what row normalization of the matrix as it is in the model would give."""
    tall = torch.randn(3, 24, 8, generator=generator(2)) * torch.rand(3, 24, 1, generator=generator(3))
    buffer = torch.randn(3, 24, 8, generator=generator(4))
    ours_buffer = buffer.mT.contiguous()
    ours = update_of(tall.mT.contiguous(), ours_buffer, 0.9, torch.ones(3, 1, 1, dtype=torch.bool), True)
    after = 0.9 * buffer + tall
    update = tall + 0.9 * after
    update = update / update.norm(dim=2, keepdim=True)
    assert torch.allclose(ours_buffer.mT, after, atol=1e-6)
    assert torch.allclose(ours.mT, orthogonalize(update.mT, POLAR).mT, atol=1e-4)
    wrong = update_of(tall.mT.contiguous(), buffer.mT.contiguous(), 0.9, torch.zeros(3, 1, 1, dtype=torch.bool), True)
    assert (ours - wrong).abs().max() > 0.01  # the flag matters


def test_update_mixes_tall_and_wide_matrices():
    x, buffer = (torch.randn(2, 4, 6, generator=generator(seed)) for seed in (5, 6))
    flags = torch.tensor([True, False])[:, None, None]
    both = update_of(x, buffer.clone(), 0.5, flags, True)
    for i in range(2):
        one = slice(i, i + 1)
        alone = update_of(x[one], buffer[one].clone(), 0.5, flags[one], True)
        assert torch.allclose(both[one], alone, atol=1e-5)


def test_update_has_the_gradients_dtype_and_a_float32_buffer():
    buffer = torch.zeros(1, 4, 6)
    grad = torch.randn(1, 4, 6, generator=generator()).bfloat16()
    update = update_of(grad, buffer, 0.9, torch.zeros(1, 1, 1, dtype=torch.bool), True)
    assert update.dtype == torch.bfloat16 and buffer.dtype == torch.float32 and torch.equal(buffer, grad.float())


def test_zero_rows_make_no_nan():
    for flag in (True, False):
        grad = torch.randn(1, 4, 6, generator=generator())
        grad[0, 1], grad[0, :, 2] = 0.0, 0.0
        update = update_of(grad, torch.zeros(1, 4, 6), 0.9, torch.tensor([[[flag]]]), True)
        assert update.isfinite().all() and update.abs().max() < 2


# --- the whole step
def make_model(config: Config, seed: int = 0) -> GPT:
    model = GPT(config)
    model.init_weights(seed)
    randomize(model, seed)
    return model


def set_grads(model: GPT, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients in, the same ones in float64 out."""
    source, grads = generator(1000 + seed), {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source) * scale
        grads[name] = parameter.grad.double()
    return grads


class NaiveOptimizer:
    """Muon matrix by matrix and AdamW by their formulas, in float64."""

    def __init__(self, config: Config, model: GPT):
        self.config, self.step_count = config, 0
        self.weights = {name: p.detach().double() for name, p in model.named_parameters()}
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def rates(self, name: str) -> tuple[float, float]:
        """Learning rate and weight decay, written out."""
        config = self.config
        if name in MUON:
            return config.matrix_lr, config.muon_wd
        if name == "embedding":
            return config.tied_embed_lr, config.embed_wd
        return config.scalar_lr, config.adam_wd

    def muon(self, name: str, grad: torch.Tensor, momentum: float, lr: float, decay: float, coefficients) -> None:
        """One step of a bank, matrix by matrix."""
        for i, weight in enumerate(self.weights[name]):
            new, buffer = muon_step(weight, grad[i], self.first[name][i], momentum, lr, decay, coefficients,
                                    self.config.muon_row_normalize)
            self.weights[name][i], self.first[name][i] = torch.as_tensor(new), torch.as_tensor(buffer)

    def step(self, grads: dict[str, torch.Tensor], lr_scale: float, momentum: float, decay_scale: float = 1.0) -> float:
        config, self.step_count = self.config, self.step_count + 1
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        factor = min(1.0, config.grad_clip_norm / (norm + 1e-6)) if config.grad_clip_norm else 1.0
        coefficients = NEWTON_SCHULZ[config.muon_coefficients][:config.muon_backend_steps]
        for name, weight in self.weights.items():
            grad, (lr, decay) = grads[name] * factor, self.rates(name)
            lr = lr * lr_scale
            if name in MUON:
                self.muon(name, grad, momentum, lr, decay * decay_scale, coefficients)
                continue
            first, second = self.first[name], self.second[name]
            first.mul_(config.beta1).add_(grad * (1 - config.beta1))
            second.mul_(config.beta2).add_(grad.square() * (1 - config.beta2))
            mean, variance = (x / (1 - beta ** self.step_count) for x, beta in
                              ((first, config.beta1), (second, config.beta2)))
            weight.mul_(1 - lr * decay).sub_(lr * mean / (variance.sqrt() + config.adam_eps))
        return norm


@pytest.mark.parametrize("changes", [
    {}, {"grad_clip_norm": 0.0, "muon_row_normalize": False}, {"muon_coefficients": "quintic", "muon_backend_steps": 3},
    {"grad_clip_norm": 1e6, "muon_wd": 0.0, "embed_wd": 0.5, "adam_wd": 0.3, "beta1": 0.7, "beta2": 0.95},
    {"muon_wd": 2.0, "matrix_lr": 0.1, "adam_eps": 1e-3}])
def test_steps_on_one_rank_are_the_naive_ones(changes):
    config = tiny_config(**changes)
    model = make_model(config)
    optimizer, naive = Optimizer(config, single_world(), dict(model.named_parameters())), NaiveOptimizer(config, model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, (lr_scale, momentum) in enumerate([(1.0, 0.85), (0.6, 0.9), (0.25, 0.97)]):
        grads = set_grads(model, step, scale=0.01 if step == 1 else 1.0)
        loss, norm = optimizer.step(torch.tensor(2.5), lr_scale, momentum)
        assert float(norm) == pytest.approx(naive.step(grads, lr_scale, momentum), rel=1e-5)
        assert loss.shape == () and float(loss) == 2.5
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.detach().double(), naive.weights[name], rtol=1e-4, atol=5e-5), (step, name)
    assert all((p.detach() - start[name]).abs().max() > 1e-4 for name, p in model.named_parameters())


@pytest.mark.parametrize("rows, columns, kappa", [(32, 8, 2.0), (8, 32, 1.0), (8, 8, 1.0), (24, 8, math.sqrt(3))])
def test_decay_is_decoupled_and_tall_matrices_move_further(rows, columns, kappa):
    """W (1 - lr wd) - lr kappa O with O about orthogonal: the update has about min(rows, columns) unit values."""
    config = tiny_config(matrix_lr=0.1, muon_wd=0.5, grad_clip_norm=0.0, muon_row_normalize=False)
    weight = torch.nn.Parameter(torch.ones(2, rows, columns))
    small = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(config, single_world(), {"up_proj": weight, "q_gain": small})
    weight.grad, small.grad = torch.randn(2, rows, columns, generator=generator()), torch.ones(2, 2)
    optimizer.step(torch.tensor(0.0), 0.5, 0.9)
    values = torch.linalg.svdvals((1 - 0.05 * 0.5) - weight.detach()) / 0.05
    assert torch.allclose(values, torch.full_like(values, kappa), rtol=0.2)


# --- sharing out over ranks
def bank_group(world: World, counts: tuple[int, int], rows: int, columns: int, beta2: float = 0.0) -> MuonGroup:
    params = {"up_proj": torch.zeros(counts[0], rows, columns), "down_proj": torch.zeros(counts[1], columns, rows)}
    return MuonGroup(Config(normuon_beta2=beta2), list(params), params, world)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 5), st.integers(1, 5),
       st.sampled_from([0.0, 0.9]))
def test_pack_and_unpack_are_inverse_and_shares_cover_all_once(size, counts, rows, columns, beta2):
    tensors = [torch.randn(counts[0], rows, columns), torch.randn(counts[1], columns, rows)]
    groups = [bank_group(world_of(rank, size), counts, rows, columns, beta2) for rank in range(size)]
    for group in groups:
        packed = group.pack(tensors, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(group.unpack(packed), tensors))
        assert packed.shape == (group.share * size, min(rows, columns), max(rows, columns))
        assert not packed[sum(counts):].any() and group.share * size - sum(counts) < size
        low, high = packed.shape[1:]
        assert {name: tuple(x.shape) for name, x in group.state.items()} == {"momentum": (group.share, low, high)} | (
            {"row_square": (group.share, low, 1), "column_square": (group.share, 1, high)} if beta2 else {})
        assert all(x.dtype == torch.float32 and not x.any() for x in group.state.values())
        assert group.own_tall.shape == (group.share, 1, 1)
    tall = torch.cat([group.own_tall for group in groups]).flatten().tolist()
    assert tall[:sum(counts)] == [rows > columns] * counts[0] + [columns > rows] * counts[1]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.booleans(), st.sampled_from([0.0, 0.9]))
def test_shares_together_make_the_update_of_one_rank(size, counts, row_normalize, beta2):
    """In three steps, the last two with state."""
    source = generator()
    ranks = [bank_group(world_of(rank, size), counts, 12, 4, beta2) for rank in range(size)]
    one = bank_group(world_of(0, 1), counts, 12, 4, beta2)

    def updates_of(group: MuonGroup, tensors: list[torch.Tensor]) -> torch.Tensor:
        own = group.pack(tensors, torch.float32)[group.world.rank * group.share:][:group.share]
        return muon_update(own, group.state, torch.tensor(0.9), group.own_tall, row_normalize, beta2, POLAR)

    for _ in range(3):
        tensors = [torch.randn(shape, generator=source) for shape in ((counts[0], 12, 4), (counts[1], 4, 12))]
        together = ranks[-1].unpack(torch.cat([updates_of(group, tensors) for group in ranks]))
        whole = one.unpack(updates_of(one, tensors))
        assert [x.shape for x in together] == [x.shape for x in tensors]
        assert all(torch.allclose(a, b, atol=1e-5) and b.abs().max() > 0.1 for a, b in zip(together, whole))


def option_configs() -> dict[str, Config]:
    """Every flag turned over, every choice, and what else makes or removes parameters or moments; none left out."""
    numbers = [("embed_dim", 16), ("depth_lora_rank", 3), ("xsa_last_n", 0), ("mlp_hidden", 40), ("num_loops", 0),
               ("parallel_start_layer", 0), ("sparse_attn_gate_scale", 0.0), ("normuon_beta2", 0.9),
               ("bigram_hash_buckets", 13), ("num_layers", 5)]
    changes = [(f.name, not f.default) for f in fields(Config) if f.type is bool] + numbers + [
        (name, choice) for name, choices in train_gpt.CHOICES.items() for choice in choices]
    pairs = {"bigram_hash": {"bigram_hash_buckets": 13}}
    configs = {f"{name}={value}": tiny_config(**{name: value, **pairs.get(name, {})}) for name, value in changes}
    everything = dict(numbers) | {
        "num_loops": 1, "parallel_start_layer": 3, "xsa_last_n": 2, "sparse_attn_gate_scale": 0.5,
        "tie_embeddings": False, "vocab_bias": True, "value_residual": True, "attn_gate": "dense",
        "softcap_type": "two_sided", "bigram_hash": "36313", "mlp_activation": "swiglu"}
    return configs | {f"everything, smear {kind}": tiny_config(**everything, smear_gate=kind)
                      for kind in train_gpt.CHOICES["smear_gate"]}


OPTIONS = option_configs()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_is_optimized_once(name):
    model = GPT(OPTIONS[name])
    params = dict(model.named_parameters())
    assert {key: tuple(p.shape) for key, p in params.items()} == param_shapes(model.config)
    assert set(params) <= set(PARAM_TABLE)
    optimizer = Optimizer(model.config, single_world(), params)
    names = {p.data_ptr(): key for key, p in params.items()}
    assert len(names) == len(params)
    in_muon = [names[p.data_ptr()] for group in optimizer.groups for p in group.params]
    assert in_muon == [key for group in optimizer.groups for key in group.names]
    assert all(p.numel() == params[key].numel() for group in optimizer.groups
               for key, p in zip(group.names, group.params))
    assert sorted(in_muon + [names[p.data_ptr()] for p in optimizer.adam_params]) == sorted(params)
    assert set(in_muon) == set(params) & MUON
    in_adam = [p for settings in optimizer.adam.param_groups for p in settings["params"]]
    assert Counter(map(id, in_adam)) == Counter(map(id, optimizer.adam_params))
    shapes = [group.state["momentum"].shape for group in optimizer.groups]
    assert len({tuple(shape[1:]) for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "everything" in name])
def test_a_step_with_all_options_moves_every_parameter(name):
    model = make_model(OPTIONS[name])
    optimizer = Optimizer(model.config, single_world(), dict(model.named_parameters()))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    set_grads(model, 0)
    optimizer.step(torch.tensor(0.0), 1.0, 0.9)
    for key, p in model.named_parameters():
        for old, new in zip(before[key], p.detach()):  # every row, matrix or layer of it
            assert (old - new).abs().max() > 1e-4, key


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(AssertionError, match="novel"):
        Optimizer(tiny_config(), single_world(), {"novel": torch.zeros(2, 2)})


# --- clipping
@settings(deadline=None, max_examples=40)
@given(st.one_of(st.just(0.0), st.floats(1e-3, 5.0)), st.floats(-4.0, 4.0), st.integers(0, 99))
def test_clip_scales_the_global_norm(limit, exponent, seed):
    config = tiny_config(grad_clip_norm=limit)
    optimizer = Optimizer(config, single_world(), dict(make_model(config).named_parameters()))
    source = generator(seed)
    own, small = ([torch.randn(shape, generator=source) * 10 ** exponent for shape in shapes]
                  for shapes in ([(2, 3, 4), (1, 5, 5)], [(7,), (2, 2)]))
    before = [x.clone() for x in own + small]
    expected = math.sqrt(sum(float(x.double().square().sum()) for x in before))
    norm = optimizer.clip(own, small)
    assert float(norm) == pytest.approx(expected, rel=1e-5) and norm.shape == ()
    factor = min(1.0, limit / (expected + 1e-6)) if limit else 1.0
    for x, y in zip(own + small, before):
        assert torch.allclose(x, y * factor, rtol=1e-4, atol=0)
    after = math.sqrt(sum(float(x.double().square().sum()) for x in own + small))
    assert after <= (limit or math.inf) * 1.0001 and after <= expected * 1.0001


# --- PARAM_TABLE
def preset_configs() -> dict[str, Config]:
    """The default, every preset, and settings that switch parts off or on."""
    configs = {"default": Config(), "tiny": tiny_config(), "flat": Config(num_loops=0, parallel_start_layer=0),
               "bare": Config(skip_gates_enabled=False, smear_gate="off", sparse_attn_gate_scale=0.0)}
    for path in sorted((ROOT / "presets").glob("*.env")):
        text = subprocess.run(["bash", "-c", f"set -a; . '{path}'; env -0"], capture_output=True, text=True, check=True,
                              env={"PATH": os.environ["PATH"]}).stdout
        variables = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
        names = {f.name.upper() for f in fields(Config)}
        configs[path.stem] = Config.from_env({k: v for k, v in variables.items() if k in names})[0]
    return configs


@pytest.mark.parametrize("name, config", preset_configs().items())
def test_every_parameter_has_a_row(name, config):
    with torch.device("meta"):
        params = {key: tuple(p.shape) for key, p in GPT(config).named_parameters()}
    assert params == param_shapes(config)
    assert set(params) <= set(PARAM_TABLE)
    assert all(len(params[key]) == 3 for key in params if key in MUON)


def written_keys(table: ast.Dict) -> list[str]:
    """Names as they stand in the source of PARAM_TABLE, with those in **dict.fromkeys(..., ROLE)."""
    names = []
    for key, value in zip(table.keys, table.values):
        if key is None:
            assert isinstance(value, ast.Call) and ast.unparse(value.func) == "dict.fromkeys"
            names += eval(ast.unparse(value.args[0]), vars(train_gpt))
        else:
            names.append(ast.literal_eval(key))
    return names


def test_rows_are_unique_used_and_name_config_fields():
    tree = ast.parse((ROOT / "train_gpt.py").read_bytes())
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                 and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PARAM_TABLE")
    assert isinstance(table, ast.Dict)
    keys = written_keys(table)
    assert len(keys) == len(set(keys)) and set(keys) == set(PARAM_TABLE)
    assert set().union(*map(param_shapes, OPTIONS.values())) == set(PARAM_TABLE), "rows without use"
    types = train_gpt.KINDS | {"embedding_lr": float}  # that of the tied or the untied one
    assert Config(tied_embed_lr=0.1, embed_lr=0.2).embedding_lr == 0.1
    assert Config(tied_embed_lr=0.1, embed_lr=0.2, tie_embeddings=False).embedding_lr == 0.2
    for name, role in PARAM_TABLE.items():
        assert role.optimizer in ("muon", "adam")
        assert types[role.lr] is float and types[role.weight_decay] is float, name
        quantizer = (role.quantizer, role.bits, role.clip_sigmas)
        assert all(quantizer) or not any(quantizer), name
        if role.quantizer:
            assert [types[field] for field in quantizer] == [str, int, float], name
    assert {name for name, role in PARAM_TABLE.items() if role.optimizer == "muon"} == MUON


# --- state
def advance(model: GPT, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(model, step)
        optimizer.step(torch.tensor(0.0), 1.0 - 0.1 * step, 0.9)


def equal_weights(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_reset_forgets_everything():
    config = tiny_config()
    used, fresh = make_model(config), make_model(config)
    optimizer = Optimizer(config, single_world(), dict(used.named_parameters()))
    advance(used, optimizer, range(3))
    assert not equal_weights(used, fresh)
    optimizer.reset()
    used.load_state_dict(fresh.state_dict())
    advance(used, optimizer, range(3, 6))
    advance(fresh, Optimizer(config, single_world(), dict(fresh.named_parameters())), range(3, 6))
    assert equal_weights(used, fresh)


def saved(optimizer: Optimizer) -> dict:
    """A state as a checkpoint file keeps it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_saved_state_continues_identically():
    config = tiny_config()
    straight = make_model(config)
    optimizer = Optimizer(config, single_world(), dict(straight.named_parameters()))
    advance(straight, optimizer, range(2))
    state, resumed = saved(optimizer), copy.deepcopy(straight)
    advance(straight, optimizer, range(2, 5))
    other = Optimizer(config, single_world(), dict(resumed.named_parameters()))
    other.load_state_dict(state)
    advance(resumed, other, range(2, 5))
    assert equal_weights(straight, resumed)
    forgetful = Optimizer(config, single_world(), dict(resumed.named_parameters()))
    advance(resumed, forgetful, range(5, 6))
    advance(straight, optimizer, range(5, 6))
    assert not equal_weights(straight, resumed)  # the state matters


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_state_of_one_rank_is_shared_out_over_many(size):
    config = tiny_config()
    model = make_model(config)
    one = Optimizer(config, single_world(), dict(model.named_parameters()))
    advance(model, one, range(2))
    state = saved(one)
    assert set(state["muon"]) == {"momentum"}
    assert {name: tuple(x.shape) for name, x in state["muon"]["momentum"].items()} == \
        {name: shape for name, shape in param_shapes(config).items() if name in MUON}
    ranks = [Optimizer(config, world_of(rank, size), dict(model.named_parameters())) for rank in range(size)]
    for optimizer in ranks:
        optimizer.load_state_dict(copy.deepcopy(state))
    for i, group in enumerate(one.groups):
        packed = torch.cat([optimizer.groups[i].state["momentum"] for optimizer in ranks])
        assert torch.equal(packed[:group.count], group.state["momentum"]) and not packed[group.count:].any()
